"""How several processes share the training of one model: from a stage's trainer settings to Lightning's strategies.

`ddp` copies the model to every process. The sharded strategies cut up the base, which is the large language model inside: all
else (projections, tables, heads) is small and stays whole on every process. A sharded model is built like any other, but with
content on the first process alone: the others make the base without memory (`without_weights`), and layer by layer what the
first one has is sent and cut up. So its initial weights are those of one process, whatever the base's own way to start, and no
process but the first ever holds the whole base, and that one in the host's memory.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch import distributed as dist

from lit_llmers.conf.schema import SHARDED, TrainerConfig
from lit_llmers.errors import UserError
from lit_llmers.processes import Processes
from lit_llmers.teachers.base import without_weights

PERSISTENT = 100_000  # elements: a smaller tensor of the base stays whole under ZeRO-3 too
STATE = "state.pt"  # in a checkpoint's folder, what is no shard


def make_strategy(settings: TrainerConfig) -> Any:
    """What Lightning's Trainer takes as its strategy."""
    if settings.strategy == "auto":
        return "auto"
    if settings.strategy == "ddp":
        return DDPStrategy(find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True)
    return FullyShardedStrategy(settings) if settings.strategy == "fsdp2" else ZeroStrategy(settings)


def check_machine(settings: TrainerConfig) -> None:
    """Check, before anything starts, that an accelerator and a strategy can run on this machine.

    Raises:
        UserError: a package is missing, or there is no or are too few devices.
    """
    if settings.strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"trainer.strategy={settings.strategy} needs DeepSpeed: pip install 'lit-llmers[deepspeed]'. Or use trainer=fsdp2."
        )
    cards = torch.cuda.device_count() or int(torch.backends.mps.is_available())
    on_cards = settings.accelerator in ("cuda", "gpu", "mps") or (settings.accelerator == "auto" and cards)
    if on_cards and not cards:
        raise UserError(
            f"trainer.accelerator={settings.accelerator}, but PyTorch finds no GPU here. Use trainer.accelerator=auto or cpu."
        )
    if on_cards and settings.devices > cards:
        raise UserError(
            f"trainer.devices={settings.devices} asks for more GPUs than the {cards} of this machine. Lower it, or use "
            "trainer.num_nodes for several machines."
        )


def construction(settings: TrainerConfig) -> AbstractContextManager[None]:
    """The context to build a stage's model in: under a sharded strategy only the first process makes the base's weights."""
    elsewhere = settings.strategy in SHARDED[1:] and not Processes.here().first
    return without_weights() if elsewhere else nullcontext()


def base_of(module: nn.Module) -> nn.Module:
    """The large part of a model: Hugging Face's, or PEFT's around it."""
    return next(each for each in module.modules() if hasattr(each, "get_input_embeddings") and hasattr(each, "config"))


def whole_state(trainer: L.Trainer) -> dict[str, Tensor]:
    """The module's state without what is frozen, put together on the first process's CPU; empty on the others. A collective."""
    module, state, seen = trainer.lightning_module, {}, {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter) and not value.requires_grad:
            continue
        if id(value) not in seen:  # tied ones are there twice
            with _gathered(value) as found:
                seen[id(value)] = found.detach().cpu().clone() if trainer.is_global_zero else value
        state[name] = seen[id(value)]
    return state if trainer.is_global_zero else {}


@contextmanager
def _gathered(value: Tensor) -> Iterator[Tensor]:
    status: Any = getattr(value, "ds_status", None)
    if status is not None and status.name == "NOT_AVAILABLE":  # of ZeRO-3, and in shards at the moment
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            yield value
    else:
        yield value.full_tensor() if hasattr(value, "full_tensor") else value


class _Spread:
    """Sends what the first process has to the others, module by module, with memory for those that have none.

    Args:
        dtype: what floating-point parameters become on the way; None leaves theirs.
    """

    def __init__(self, strategy: Any, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.first, self.device = strategy.is_global_zero, device
        self.made: dict[int, nn.Parameter] = {}
        named = strategy.lightning_module.named_parameters()
        self.dtypes = strategy.broadcast({name: parameter.dtype for name, parameter in named})
        self.names = {id(parameter): name for name, parameter in strategy.lightning_module.named_parameters()}
        self.half = dtype

    def __call__(self, module: nn.Module) -> None:
        """The parameters and buffers of the module itself, not of those inside it."""
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in self.made:
                dtype = self.dtypes[self.names[id(parameter)]]
                dtype = self.half if self.half and dtype.is_floating_point else dtype
                if parameter.is_meta:
                    empty = torch.empty(parameter.shape, dtype=dtype, device=self.device)
                    self.made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                else:
                    parameter.data = parameter.data.to(self.device, dtype)
                    self.made[id(parameter)] = parameter
                dist.broadcast(self.made[id(parameter)].data, 0)
            module._parameters[name] = self.made[id(parameter)]
        for name, buffer in list(module.named_buffers(recurse=False)):
            full = torch.empty_like(buffer, device=self.device) if buffer.is_meta else buffer.to(self.device)
            dist.broadcast(full, 0)
            module._buffers[name] = full


class _InFolders:
    """What the sharded strategies share: a checkpoint is a folder that all processes write, and Lightning gathers nothing."""

    in_folders = True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """The weights are in place when `load_checkpoint` returns."""

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """So is the optimiser's state."""


class ZeroStrategy(_InFolders, DeepSpeedStrategy):
    """DeepSpeed's ZeRO-2 or ZeRO-3, on CPUs too.

    Gradients are accumulated as Lightning counts, so that an epoch's last step is taken though it has fewer micro-batches.
    AdamW is torch's own also where its state lies in the host's memory: DeepSpeed's needs a compiler on every machine.
    """

    handles_gradient_accumulation = False

    def __init__(self, settings: TrainerConfig) -> None:
        if settings.accelerator == "cpu" or not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"
        stage = 2 if settings.strategy == "zero2" else 3
        zero: dict[str, Any] = {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "memory_efficient_linear": False,  # it would replace torch's own for the rest of the process
        }
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = PERSISTENT
        if settings.strategy == "zero3-offload":
            zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
        config = {
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "train_micro_batch_size_per_gpu": settings.batch_size // settings.processes,
            "gradient_clipping": settings.gradient_clip_val or 0.0,
        }
        super().__init__(config=config, exclude_frozen_parameters=True, logging_level=logging.ERROR)

    def _format_batch_size_and_grad_accum_config(self) -> None:
        self.config["gradient_accumulation_steps"] = 1  # type: ignore[index]

    def setup_environment(self) -> None:
        if os.environ.get("DS_ACCELERATOR") != "cpu":
            return super().setup_environment()
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo will do; that would be compiled first
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices or []))]
        super(DeepSpeedStrategy, self).setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        self._init_config_if_needed()
        if self.half is not None:  # buffers and what enters are not
            autocast = partial(torch.autocast, self.root_device.type, self.half)
            self.precision_plugin.forward_context = autocast  # type: ignore[method-assign]
        if self.zero_stage_3:
            self._shard(module)
        super().setup(trainer)
        if self.zero_stage_3:
            self._keep_whole(module)

    @property
    def half(self) -> torch.dtype | None:
        """What DeepSpeed makes of all parameters; the optimiser has its own of those that train, in float32."""
        return {"bf16": torch.bfloat16, "16": torch.float16}.get(str(self.precision_plugin.precision).partition("-")[0])

    def _shard(self, module: nn.Module) -> None:
        """Cut up the base; the engine will do so with the rest."""
        import deepspeed

        spread = _Spread(self, self.root_device, self.half)
        base = set(base_of(module).modules())
        for part in reversed(list(module.modules())):  # what is inside a module comes before it
            spread(part)
            if part in base and next(part.parameters(recurse=False), None) is not None:
                deepspeed.zero.Init(module=part, config_dict_or_path=self.config)

    def _keep_whole(self, module: nn.Module) -> None:
        """What is not of the base is used in many places, and outside of any forward pass: it is never taken apart."""
        kept = self.deepspeed_engine.optimizer.persistent_parameters
        base = set(base_of(module).parameters())
        small: list[Any] = [parameter for parameter in module.parameters() if parameter not in base]
        kept.extend(parameter for parameter in small if not parameter.ds_persist)
        for parameter in small:
            parameter.ds_persist = parameter.is_external_param = True
        if kept:
            kept[0].all_gather(kept)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        accumulating = self.lightning_module.trainer.fit_loop._should_accumulate()  # type: ignore[union-attr]
        self.deepspeed_engine.set_gradient_accumulation_boundary(not accumulating)
        return super().backward(closure_loss, *args, **kwargs)

    def block_backward_sync(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()  # shards of gradients are summed up, not whole ones

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        _, state = self.deepspeed_engine.load_checkpoint(
            str(checkpoint_path), load_lr_scheduler_states=False, load_module_strict=False
        )
        return {"state_dict": {}, **state}


class FullyShardedStrategy(_InFolders, ModelParallelStrategy):
    """FSDP2: torch's own sharding of weights, gradients and the optimiser's state, layer by layer."""

    def __init__(self, settings: TrainerConfig) -> None:
        super().__init__(data_parallel_size=settings.processes, tensor_parallel_size=1)
        self.settings = settings
        self.whole: list[nn.Parameter] = []  # trained on every process

    def setup(self, trainer: L.Trainer) -> None:
        from lightning.fabric.utilities.optimizer import _optimizers_to_device
        from torch.distributed.tensor import DTensor

        module = self.lightning_module
        assert module is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self._shard(module)
        self.whole = [each for each in module.parameters() if each.requires_grad and not isinstance(each, DTensor)]
        self.model = self.precision_plugin.convert_module(module)
        self.model_to_device()
        self.barrier()
        self.precision_plugin.clip_grad_by_norm = self._clip  # type: ignore[method-assign]
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        _optimizers_to_device(self.optimizers, self.root_device)

    def _shard(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        base = base_of(module)
        names = {name for each in base.modules() for name in getattr(each, "_no_split_modules", None) or ()}
        layers = {each for each in base.modules() if type(each).__name__ in names}
        root = next(child for child in module.children() if base in set(child.modules()))  # whose forward runs the base
        policy = MixedPrecisionPolicy()
        if self.settings.precision == "bf16-mixed":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        spread = _Spread(self, self.root_device)
        for part in reversed(list(module.modules())):  # what is inside a module comes before it
            spread(part)
            if part in layers or part is root:
                large = set(base.parameters())
                small = {parameter for parameter in part.parameters() if parameter not in large}
                mesh = self.device_mesh["data_parallel"]
                fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=small)

    def post_backward(self, closure_loss: Tensor) -> None:
        """What is whole is averaged over the processes. (Twice is the same as once, so micro-batches may be added up.)"""
        gradients = [parameter.grad for parameter in self.whole if parameter.grad is not None]
        if gradients:
            together = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(together)
            together /= self.world_size
            for gradient, averaged in zip(gradients, together.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(averaged.view_as(gradient))

    def _clip(self, optimizer: Any, clip_val: float) -> None:
        """By the norm of all gradients, those in shards and those that are whole."""
        from torch.nn.utils import clip_grads_with_norm_, get_total_norm

        groups = [group["params"] for group in optimizer.param_groups]
        gradients = [[each.grad for each in group if each.grad is not None] for group in groups]
        norms = [get_total_norm(each) for each in gradients if each]
        norm = torch.stack([each.full_tensor() if hasattr(each, "full_tensor") else each for each in norms]).norm()
        for group in groups:
            clip_grads_with_norm_(group, clip_val, norm)

    # ---- checkpoints -----------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        import torch.distributed.checkpoint as dcp

        folder = Path(self.broadcast(filepath))
        dcp.save(self._shards(), checkpoint_id=folder)
        if self.is_global_zero:
            torch.save(checkpoint, folder / STATE)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

        assert self.model is not None
        shards, options = self._shards(), self._options(strict=False)
        dcp.load(shards, checkpoint_id=checkpoint_path)
        set_model_state_dict(self.model, shards["model"], options=options)
        set_optimizer_state_dict(self.model, self._plain_optimizers(), optim_state_dict=shards["optimizer"], options=options)
        return torch.load(Path(checkpoint_path) / STATE, map_location="cpu", weights_only=True)

    def _shards(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        assert self.model is not None
        model, optimizer = get_state_dict(self.model, self._plain_optimizers(), options=self._options())
        return {"model": model, "optimizer": optimizer}

    def _plain_optimizers(self) -> list[Any]:
        return [getattr(each, "_optimizer", each) for each in self.optimizers]

    def _options(self, strict: bool = True) -> Any:
        from torch.distributed.checkpoint.state_dict import StateDictOptions

        return StateDictOptions(ignore_frozen_params=True, strict=strict)
