"""What of a model each process holds while it trains, by strategy: arithmetic on numbers of parameters.

Activations are not in it: see `lit_llmers.planning.rehearsal`. Sizes of DeepSpeed's buffers are its defaults, which
`lit_llmers.processes.strategies` does not change.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_llmers.conf.schema import TrainerConfig
from lit_llmers.planning.rehearsal import Rehearsal, tables_in_rows

BUCKET = 500_000_000  # elements of a DeepSpeed buffer that gradients are reduced in
LIVE = 1_000_000_000  # parameters that ZeRO-3 keeps gathered at most
MASTER, MOMENTS = 4, 8  # bytes of a trained parameter: DeepSpeed's float32 copy, and AdamW's two in float32


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights. The base is the large language model inside, the only part that is ever cut up.

    Attributes:
        base, base_trained: of the base; trained: of its trained part.
        rest, rest_trained: of all else, buffers included.
        in_rows: of the trained rest, tables whose gradients are of a batch's rows alone.
        trained: trained parameters, their number.
        block: of the base's largest layer.
        live: of so many of the base's parameters as ZeRO-3 keeps gathered.
    """

    base: int = 0
    base_trained: int = 0
    rest: int = 0
    rest_trained: int = 0
    in_rows: int = 0
    trained: int = 0
    block: int = 0
    live: int = 0

    @property
    def weights(self) -> int:
        return self.base + self.rest

    @property
    def stepped(self) -> int:
        """Of what the optimiser steps."""
        return self.base_trained + self.rest_trained

    @property
    def gradients(self) -> int:
        """Gradients have the type of their weights; those in rows come and go with the backward pass."""
        return self.stepped - self.in_rows


@dataclass(frozen=True)
class Shares:
    """Bytes on each process's device between two steps.

    Attributes:
        gathered: buffers of the strategy, and weights that are put together while they are read.
        step: what the optimiser needs besides, while it steps.
        host: bytes in the host's memory instead.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int = 0
    step: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered


def shares(sizes: Sizes, strategy: str, world: int, fused: bool = True, mixed: bool = False) -> Shares:
    """What each of `world` processes holds.

    Args:
        fused: AdamW works in place; else its temporaries are as large as the trained weights.
        mixed: under `fsdp2`, layers are gathered in half the bytes of float32.
    """
    element = sizes.stepped // sizes.trained if sizes.trained else 2
    if strategy in ("auto", "ddp"):
        step = 0 if fused else sizes.gradients
        return Shares(sizes.weights, sizes.gradients, 2 * sizes.stepped, step=step)
    if strategy == "fsdp2":
        gradients = sizes.rest_trained + -(-sizes.base_trained // world)
        weights = sizes.rest + -(-sizes.base // world)
        gathered = 2 * sizes.block // (2 if mixed and element == 4 else 1)  # the layer at hand and the next
        return Shares(weights, gradients, 2 * gradients, gathered, 0 if fused else gradients)
    own = -(-sizes.trained // world)  # trained parameters that a process steps
    optimizer, step = (MASTER + MOMENTS) * own, MASTER * own
    if strategy == "zero2":
        return Shares(sizes.weights, element * own, optimizer, 2 * element * BUCKET, step)
    shard = -(-sizes.base // world)
    if strategy == "zero3":
        return Shares(sizes.rest + shard, element * own, optimizer, element * BUCKET + sizes.live, step)
    assert strategy == "zero3-offload"
    return Shares(sizes.rest, 0, 0, element * BUCKET + sizes.live, host=shard + MASTER * own + optimizer)


def held_by(sizes: Sizes, trainer: TrainerConfig, strategy: str | None = None, world: int | None = None) -> Shares:
    """What each process holds under the trainer's strategy, or another."""
    mixed = "mixed" in trainer.precision
    fused = not (trainer.gradient_clip_val and mixed)  # see `lit_llmers.optimizer`
    return shares(sizes, strategy or trainer.strategy, world or trainer.processes, fused, mixed)


def checkpoints(sizes: Sizes, strategy: str) -> tuple[int, int]:
    """Bytes of `best.ckpt` and `last.ckpt`. What was cut up is put together in the first, without the optimiser's state."""
    whole = 3 * sizes.stepped  # the weights, and AdamW's two moments in their type
    if strategy in ("auto", "ddp"):
        return whole, whole
    if strategy == "fsdp2":
        return sizes.stepped, whole
    return sizes.stepped, (MASTER + MOMENTS) * sizes.trained + (sizes.stepped if strategy == "zero2" else 0)


def training_memory(
    held: Shares, step: Rehearsal, ranking: Rehearsal | None, beside: int = 0, asked: Rehearsal | None = None
) -> dict[str, int]:
    """Bytes of each process, by what they are for; `peak` is the most at any time, while it trains or validates.

    `activations` wait for the backward pass, `buffers` are what comes and goes beside them, `host` is in the host's memory.

    Args:
        beside: bytes of the weights of a teacher that is `asked` before each step.
    """
    beyond = max(step.peak - step.gradients, 0 if asked is None else asked.peak)
    validation = 0 if ranking is None else ranking.peak
    return {
        "weights": held.weights + beside,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "gathered": held.gathered,
        "activations": step.kept,
        "buffers": beyond - step.kept,
        "validation": validation,
        "host": held.host,
        "peak": held.total + beside + max(beyond, validation, held.step),
    }


def inference_memory(weights: int, buffers: int) -> dict[str, int]:
    """Bytes of a process that asks a model, by what they are for: what stays, and the most that comes and goes."""
    zero = dict.fromkeys(("gradients", "optimizer", "gathered", "activations", "validation", "host"), 0)
    return {"weights": weights, **zero, "buffers": buffers, "peak": weights + buffers}


def base_of(model: nn.Module) -> nn.Module | None:
    """The large language model inside, PEFT's wrapper around it included; None where there is none."""
    return next((each for each in model.modules() if hasattr(each, "get_input_embeddings") and hasattr(each, "config")), None)


def dtype_of(model: nn.Module) -> torch.dtype:
    """What a model computes in: the type of the language model's weights, or float32."""
    base = base_of(model)
    return torch.float32 if base is None else next(base.parameters()).dtype


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of a model as it trains."""
    base = base_of(model)
    inside = {id(each) for each in base.parameters()} if base is not None else set()
    total: dict[str, int] = dict.fromkeys(("base", "base_trained", "rest", "rest_trained", "in_rows", "trained"), 0)
    elements = 0
    for parameter in model.parameters():
        part = "base" if id(parameter) in inside else "rest"
        total[part] += _bytes(parameter)
        if part == "base":
            elements += parameter.numel()
        if parameter.requires_grad:
            total[f"{part}_trained"] += _bytes(parameter)
            total["trained"] += parameter.numel()
    total["rest"] += sum(_bytes(buffer) for buffer in model.buffers())
    total["in_rows"] = sum(_bytes(table) for table in tables_in_rows(model) if table.requires_grad)
    lists = [each for each in base.modules() if isinstance(each, nn.ModuleList)] if base is not None else []
    blocks = [sum(map(_bytes, layer.parameters())) for each in lists for layer in each]
    live = total["base"] * min(LIVE, elements) // elements if elements else 0
    return Sizes(**total, block=max(blocks, default=0), live=live)


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
