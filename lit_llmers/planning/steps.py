"""The steps of a stage's model, rehearsed: of training, of ranking, of reading texts. All of it goes inside `pretending`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lit_llmers.backbones import CollaborativeBackbone
from lit_llmers.callbacks.float32 import HALVES
from lit_llmers.conf.schema import TrainerConfig
from lit_llmers.losses.feature import block_boundaries
from lit_llmers.planning.models import FakeGrounded
from lit_llmers.planning.rehearsal import Rehearsal, faked, rehearse_inference, rehearse_training
from lit_llmers.planning.sharing import Sizes, base_of, dtype_of, sizes_of
from lit_llmers.ranking import Catalogue, top_items
from lit_llmers.record import block_states
from lit_llmers.students.recommender import Recommender
from lit_llmers.students.sequential import SequentialRecommender
from lit_llmers.teachers.base import checkpoint_activations

HALF = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}
FEW, SOME = 2, 3  # layers that stand for those of a deep language model, all of which are alike


@dataclass(frozen=True)
class Online:
    """A frozen teacher beside a student that trains, whole on every process.

    Attributes:
        weights: bytes.
        step: what it says of a full batch of the longest rows.
        share, precision: as `Training` has them.
    """

    weights: int
    step: Rehearsal
    share: float
    precision: str


@dataclass
class Training:
    """What is trained, and what one of its steps takes.

    Attributes:
        step: of a full batch of the longest rows.
        share: how long a row is on average, as a part of the longest.
        sizes: of the weights as they train.
        own: of the weights as they are stored, and frozen.
        precision: that its products are computed in.
        other: the step with layers recomputed, or not, whichever it does not do; None where there is no choice.
        teacher: that runs beside it; None where there is none.
    """

    step: Rehearsal
    share: float
    sizes: Sizes
    own: Sizes
    precision: str
    other: Rehearsal | None = None
    teacher: Online | None = None

    @property
    def beside(self) -> int:
        """Bytes of the teacher's weights."""
        return 0 if self.teacher is None else self.teacher.weights


def training_step(model: Any, loss: Callable[[], Tensor], trainer: TrainerConfig, share: float) -> Training:
    """Rehearse a step as the trainer takes it, with and without recomputed layers where there is a choice."""
    autocast, own = types(trainer)[0], sizes_of(faked(model))
    accumulate = trainer.accumulate_grad_batches > 1 or trainer.strategy == "ddp"  # whose buckets hold the gradients

    def rehearse() -> Rehearsal:
        return _deep(model, lambda: rehearse_training(model, loss, autocast, accumulate))

    with _as_trained(model, trainer):
        step, other, base = rehearse(), None, base_of(model)
        if base is not None and getattr(base, "supports_gradient_checkpointing", False):
            recomputes = any(getattr(part, "gradient_checkpointing", False) for part in base.modules())
            _recompute(base, not recomputes)
            other = rehearse()
            _recompute(base, recomputes)
        return Training(step, share, sizes_of(model), own, precision(model, trainer), other)


def ranking_step(model: Recommender, rows: int, length: int, trainer: TrainerConfig | None = None) -> Rehearsal:
    """One batch of ranking; during training, with the trainer's precision."""
    if isinstance(model.backbone, CollaborativeBackbone):
        length = 1
    batch = histories(rows, length, False)

    def ask() -> Any:
        tables = model.tables()
        return tables, model.vectors(batch, tables)

    return reading_step(model, ask, trainer)


def states_step(model: SequentialRecommender, batch: dict[str, Tensor], blocks: int, recorded: bool = True) -> Rehearsal:
    """One batch of a teacher's block states: read by its student, or `recorded`, while those of the batch before are there."""
    boundaries, targets = block_boundaries(model.backbone.layers, blocks), batch["target"].numel()

    def ask() -> Any:
        before = torch.empty(targets if recorded else 0, blocks, model.backbone.width, dtype=dtype_of(model))
        return before, block_states(model, batch, boundaries)

    return rehearse_inference(faked(model), ask)


def lists_step(model: Recommender, batch: dict[str, Tensor], k: int, of_targets: bool, met: int) -> Rehearsal:
    """One batch of a teacher's lists that are recorded, while those of the batch before are there.

    Args:
        of_targets: at each target of the batch, else after each whole history.
        met: items that are left out of a list.
    """
    lists = batch["target"].numel() if of_targets else len(batch["user"])

    def ask() -> Any:
        tables, seen = model.tables(), torch.ones(lists * met, dtype=torch.long)
        before = torch.empty(lists, k, dtype=torch.long), torch.empty(2, lists, k)  # items, items in 32 bits, scores
        if of_targets:
            catalogue, user = Catalogue(model.item_table()), model(batch).user  # type: ignore[arg-type]
            return tables, before, top_items(user, catalogue, k, seen, seen.clone())
        return tables, before, model.top_items(batch | {"seen_row": seen, "seen_item": seen.clone()}, k, tables)

    return reading_step(model, ask)


def titles_step(items: int, width: int, dtype: torch.dtype) -> Rehearsal:
    """The vectors of all titles, which stay while a tuned language model is asked."""
    grounded = FakeGrounded(items, width, dtype)
    return rehearse_inference(grounded, grounded.tables)


def reading_step(model: Any, read: Callable[[], Any], trainer: TrainerConfig | None = None) -> Rehearsal:
    """One batch without gradients; during training, with the trainer's precision."""
    faked(model)
    with _as_trained(model, trainer) if trainer else nullcontext():
        return _deep(model, lambda: rehearse_inference(model, read, types(trainer)[0] if trainer else None))


@contextmanager
def _as_trained(model: nn.Module, trainer: TrainerConfig) -> Iterator[None]:
    """Inside, the weights have the types that they train in."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    own, (_, every) = [tensor.dtype for tensor in tensors], types(trainer)
    for tensor in tensors:
        trained = tensor.requires_grad and tensor.dtype in HALVES and trainer.trains_in_float32
        _retyped(tensor, torch.float32 if trained else every)
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, own, strict=True):
            _retyped(tensor, dtype)


def _retyped(tensor: Any, dtype: torch.dtype | None) -> None:
    """Another type for a fake tensor of floating-point numbers."""
    if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
        tensor.data = torch.empty(tensor.shape, dtype=dtype)


def types(trainer: TrainerConfig) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The type of mixed precision, and the type that all weights are converted to."""
    half = HALF.get(trainer.precision)
    if trainer.strategy.startswith("zero") or trainer.precision.endswith("-true"):  # DeepSpeed mixes nothing: it converts
        return None, half
    return half, None


def precision(model: nn.Module, trainer: TrainerConfig | None = None) -> str:
    """What most products are computed in: the type of a language model's weights, or the trainer's; without either float32."""
    halves = {torch.bfloat16: "bf16-true", torch.float16: "16-true"}
    return halves.get(dtype_of(model), "32-true" if trainer is None else trainer.precision)


# ---- deep models -------------------------------------------------------------------------------------------------------------


def _deep(model: nn.Module, rehearse: Callable[[], Rehearsal]) -> Rehearsal:
    """The rehearsal of a deep language model, drawn as a line through those of its first layers."""
    base = base_of(model)
    terms = getattr(model, "terms", {})
    place = None if base is None or any("hidden" in term.requires for term in terms.values()) else _layers(base)
    if place is None or len(place[0]._modules[place[1]]) <= FEW + SOME:  # type: ignore[arg-type]
        return rehearse()
    depth = len(place[0]._modules[place[1]])  # type: ignore[arg-type]
    with _cut(base, *place, FEW):
        few = rehearse()
    with _cut(base, *place, SOME):
        some = rehearse()
    more = (depth - FEW) / (SOME - FEW)
    values = {each.name: (getattr(few, each.name), getattr(some, each.name)) for each in fields(Rehearsal)}
    return Rehearsal(**{name: round(low + (high - low) * more) for name, (low, high) in values.items()})


def _layers(base: nn.Module) -> tuple[nn.Module, str] | None:
    """Where the layers of a language model stand: the list that has most of its parameters."""
    lists = [
        (sum(parameter.numel() for parameter in part.parameters()), number, module, name)
        for number, module in enumerate(base.modules())
        for name, part in module.named_children()
        if isinstance(part, nn.ModuleList)
    ]
    return max(lists, key=lambda entry: entry[:2])[2:] if lists else None


@contextmanager
def _cut(base: Any, parent: nn.Module, name: str, layers: int) -> Iterator[None]:
    whole, depth = parent._modules[name], base.config.num_hidden_layers
    parent._modules[name], base.config.num_hidden_layers = whole[:layers], layers  # type: ignore[index]
    try:
        yield
    finally:
        parent._modules[name], base.config.num_hidden_layers = whole, depth


def _recompute(base: Any, recompute: bool) -> None:
    if recompute:
        checkpoint_activations(base)
    else:
        # renamed in the course of transformers 5
        disable = getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable
        disable()


# ---- batches -----------------------------------------------------------------------------------------------------------------


def histories(rows: int, length: int, every_position: bool) -> dict[str, Tensor]:
    """A batch of full histories, as `lit_llmers.data.loader` makes it, but that `sequences.context` has targets too."""
    items = torch.ones(rows, length, dtype=torch.long)
    number = torch.ones(rows, dtype=torch.long)
    return {
        "row": number,
        "user": number,
        "items": items,
        "mask": items > 0,
        "target": torch.ones_like(items) if every_position else number,
        "target_row": torch.ones(rows * length if every_position else rows, dtype=torch.long),
    }


def pairs(rows: int, negatives: int) -> dict[str, Tensor]:
    """A batch of pairs, as `lit_llmers.data.pairs` makes it."""
    number = torch.ones(rows, dtype=torch.long)
    drawn = torch.ones(rows, negatives, dtype=torch.long)
    return {"row": number, "user": number, "target": number, "negatives": drawn, "target_row": number}


def logits(model: Any, rows: int, length: int, keep: int) -> Tensor:
    """What a causal language model says after the last `keep` positions of texts: `[rows, keep, vocabulary]`."""
    tokens = torch.ones(rows, length, dtype=torch.long)
    said: Tensor = model(
        input_ids=tokens, attention_mask=tokens, position_ids=tokens, use_cache=False, logits_to_keep=min(length, keep + 1)
    ).logits
    return said[:, -keep:]


def states(model: Any, rows: int, length: int) -> Tensor:
    """The last hidden states of texts, `[rows, length, D]` float32."""
    tokens = torch.ones(rows, length, dtype=torch.long)
    found: Tensor = model(input_ids=tokens, attention_mask=tokens).last_hidden_state
    return found.float()
