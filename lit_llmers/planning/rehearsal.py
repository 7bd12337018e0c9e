"""One step of a model on fake tensors, which have a shape and a type and no numbers: what it keeps in memory and computes.

The model's own code runs, forward and backward, with its losses, its checkpointed layers and its attention; what every
operation allocates is counted while it lives. Where that code asks for a number, the answer is the one that costs most: every
position holds an item, every mask is full.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lit_llmers import ranking
from lit_llmers.backbones import mixgcf, rows
from lit_llmers.backbones.dropout import Dropout

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Rehearsal:
    """What one step takes besides the weights, in bytes; the optimiser's state is not in it.

    Attributes:
        kept: what lives when the forward pass has ended: the activations, for the backward pass; without gradients the answer.
        forward, backward: the most that lives in each pass, gradients of trained weights included.
        gradients: bytes of the gradients.
        flops: floating-point operations of matrix products, forward and backward.
        kernels: operations that compute something, each a kernel on a GPU.
    """

    kept: int
    forward: int
    backward: int
    gradients: int
    flops: int
    kernels: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


def rehearse_training(
    model: nn.Module, loss: Callable[[], Tensor], autocast: torch.dtype | None = None, accumulate: bool = False
) -> Rehearsal:
    """A step after the first: the last step's gradients live until the forward pass has ended, as Lightning has it.

    Of tables with gradients in rows those of the last step are left out: the backward pass makes as many.

    Args:
        model: as `faked` gave it.
        loss: makes a scalar; what it takes from outside is fake too.
        autocast: the type of mixed precision.
        accumulate: gradients stay through the backward pass.
    """
    model.train()
    trained, in_rows = [parameter for parameter in model.parameters() if parameter.requires_grad], tables_in_rows(model)
    with _counting(model) as live, _autocast(autocast):
        for parameter in trained:
            if parameter not in in_rows:
                parameter.grad = torch.empty_like(parameter)
        gradients = live.now
        value = loss()
        kept, forward, live.peak = live.now - gradients, live.peak, live.now
        if not accumulate:
            for parameter in trained:
                parameter.grad = None
        with torch.autocast("cpu", enabled=False):
            value.backward()
    for parameter in trained:
        parameter.grad = None
    return Rehearsal(kept, forward, live.peak, gradients, live.flops, live.kernels)


def tables_in_rows(model: nn.Module) -> set[Tensor]:
    """The tables whose gradients are of the rows that a batch reads alone."""
    return {part.weight for part in model.modules() if isinstance(part, nn.Embedding) and part.sparse}


def rehearse_inference(model: nn.Module, ask: Callable[[], Any], autocast: torch.dtype | None = None) -> Rehearsal:
    """One batch without gradients."""
    model.eval()
    with torch.no_grad(), _counting(model) as live, _autocast(autocast):
        answer = ask()
    kept = live.now
    del answer
    return Rehearsal(kept, live.peak, 0, 0, live.flops, live.kernels)


@contextmanager
def pretending(accelerated: bool = True) -> Iterator[None]:
    """Inside, new tensors are fake, modules are built without memory, and a number that is asked for is made up.

    What is made in one `pretending` is of no use in another.

    Args:
        accelerated: the backbones' own short cuts on a CPU are not taken, and items are ranked in blocks as large as a GPU's.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.utils, "swap_tensors", _take))
        stack.enter_context(patch.object(torch, "inference_mode", _without_gradients))
        if accelerated:
            stack.enter_context(patch.object(Dropout, "_plain", lambda self, x: True))
            for module in (rows, mixgcf):
                stack.enter_context(patch.object(module, "pair_dots", rows.plain_dots))
            stack.enter_context(patch.dict(ranking._BLOCK, cpu=ranking._BLOCK["other"]))
        stack.enter_context(_Mode(allow_non_fake_inputs=True))
        stack.enter_context(_MadeUp())
        stack.enter_context(_RealStaysReal())
        yield


def _without_gradients(mode: bool = True) -> Any:
    """In place of inference mode, in which a product is not seen as such."""
    return torch.no_grad() if mode else nullcontext()


def _take(tensor: Tensor, other: Tensor) -> None:
    """In place of a swap, which fake tensors refuse: `module.to(...)` swaps, and PEFT calls it."""
    tensor.data = other.data


def faked(model: nn.Module) -> nn.Module:
    """The model, in place, with fake tensors where real ones are left. Call it inside `pretending`."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or _fake(tensor):
                    continue
                empty: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
                store[name] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return model


@contextmanager
def _counting(model: nn.Module) -> Iterator["_Live"]:
    live = _Live([*model.parameters(), *model.buffers()])
    with live:
        yield live


def _autocast(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


class _Mode(FakeTensorMode):
    """Stays itself when a module is copied: each of its tensors names it, and a copy would free its storages twice."""

    def __deepcopy__(self, memo: Any) -> "_Mode":
        return self


class _Live(TorchDispatchMode):
    """Counts bytes that live, operations and products; the model's own weights are not among the bytes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch then calls it directly, which is quicker

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self.now, self.peak, self.flops, self.kernels = 0, 0, 0, 0
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        kernel = _writes(func)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and self._see(tensor):
                kernel = True
        self.kernels += kernel
        self.flops += _flops(func._overloadpacket, args, kwargs, out)
        return out

    def _see(self, tensor: Tensor) -> bool:
        """Whether its storage is new."""
        if tensor.is_sparse:  # it has none: its indices and values are tensors of their own
            return any([self._see(tensor._indices()), self._see(tensor._values())])
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.own or key in self.sizes:
            return False
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)
        return True

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


@cache
def _writes(func: Any) -> bool:
    """Whether an operation changes what it is given."""
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments)


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    if packet is _ATTENTION:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if packet is _ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


class _RealStaysReal(TorchFunctionMode):
    """Real tensors, such as a graph's, are computed with until they meet a fake one; and what is no operation is made up."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [arg for arg in _flat((*args, *kwargs.values())) if isinstance(arg, Tensor)]
        if given and not any(map(_fake, given)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is Tensor.numpy:
            return np.ones(tuple(args[0].shape), str(args[0].dtype).removeprefix("torch."))
        if func is Tensor.tolist:
            return np.ones(tuple(args[0].shape), str(args[0].dtype).removeprefix("torch.")).tolist()
        if func is torch.tensor_split and isinstance(args[1], Tensor):  # nobody knows where it is cut: evenly
            return func(args[0], len(args[1]) + 1)
        if func is nn.functional.scaled_dot_product_attention and kwargs.get("dropout_p"):
            kwargs["dropout_p"] = 0.0  # kernels on a GPU keep a seed of it, and no mask
        return func(*args, **kwargs)


def _flat(args: Any) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, tuple | list):
            yield from _flat(arg)
        else:
            yield arg


def _fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


class _MadeUp(TorchDispatchMode):
    """Answers what fake tensors cannot: the answer that costs most."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch then calls it directly, which is quicker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _ANSWERS.get(func._overloadpacket)
        if answer is not None and any(isinstance(arg, FakeTensor) for arg in _flat(args)):
            return answer(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _number(func: Any, tensor: Tensor) -> Any:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _all_places(func: Any, tensor: Tensor) -> Tensor:
    return tensor.new_empty((tensor.numel(), tensor.ndim), dtype=torch.long)


def _counted(func: Any, tensor: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return tensor.new_empty(max(1, minlength), dtype=torch.long if weights is None else weights.dtype)


def _all_different(func: Any, tensor: Tensor, *_: Any, **__: Any) -> Any:
    flat = tensor.new_empty(tensor.numel())
    return flat, flat.new_empty(tensor.shape, dtype=torch.long), flat.new_empty(len(flat), dtype=torch.long)


def _once_each(func: Any, repeats: Any, *args: Any, **kwargs: Any) -> Tensor:
    if func is torch.ops.aten.repeat_interleave.Tensor:
        return repeats.new_empty(kwargs.get("output_size") or len(repeats), dtype=torch.long)
    return func(repeats, *args, **kwargs)


def _full_masks(func: Any, tensor: Tensor, indices: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`tensor[mask]` with a mask that is full."""
    whole = []
    for index in indices:
        masks = index is not None and index.dtype in (torch.bool, torch.uint8)
        whole += [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.ndim)] if masks else [index]
    return func(tensor, whole, *args, **kwargs)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._local_scalar_dense: _number,
    torch.ops.aten.nonzero: _all_places,
    torch.ops.aten.bincount: _counted,
    torch.ops.aten._unique2: _all_different,
    torch.ops.aten.repeat_interleave: _once_each,
    torch.ops.aten.index: _full_masks,
    torch.ops.aten.index_put: _full_masks,
    torch.ops.aten.index_put_: _full_masks,
    torch.ops.aten.masked_select: lambda func, tensor, mask: tensor.new_empty(tensor.numel()),
    torch.ops.aten.equal: lambda func, one, other: True,
    torch.ops.aten.random_: lambda func, tensor, *_, **__: tensor,
}
