"""LLM-ESR's retrieval self-distillation: Liu et al., "LLM-ESR: Large Language Models Enhancement for Long-tailed Sequential
Recommendation", NeurIPS 2024 (arXiv 2405.20646), section 3.3."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_llmers.callbacks.distillation import Distillation, Readers, Term, check_share
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError, unknown
from lit_llmers.losses.alignment import soft_clip
from lit_llmers.students.output import StudentOutput
from lit_llmers.text.tables import has_vector

KINDS = ("mse", "soft_clip")
PICKED, ITEMS, MASK = "retrieved_rows", "retrieved_items", "retrieved_mask"
_CHUNK = 1024  # users whose cosines to all users are in memory at once

Encode = Callable[[Tensor, Tensor], Tensor]


class HistorySource(Protocol):
    """Where users' training histories come from."""

    def inputs(self, users: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
        """The latest training items `[N, L]` of the users `[N]` but the last one, left-padded with 0, and their mask."""
        ...


def nearest_users(users: Tensor, number: int) -> Tensor:
    """The users of the largest cosine to each user, best first and never himself: `[U, number]` int64.

    -1 stands where there is none: users without text, whose vector is zero, have no neighbours and are nobody's.

    Args:
        users: `[U, D]`.
        number: M.
    """
    unit, silent = F.normalize(users.float(), dim=1), ~has_vector(users)
    parts = []
    for rows in torch.arange(len(unit), device=unit.device).split(_CHUNK):
        cosine = (unit[rows] @ unit.T).masked_fill_(silent, -torch.inf)
        cosine.scatter_(1, rows[:, None], -torch.inf)
        value, neighbour = cosine.topk(min(number, len(unit) - 1), dim=1)
        parts.append(neighbour.masked_fill((value == -torch.inf) | silent[rows, None], -1))
    return torch.cat(parts)


class SelfDistillationTerm(Term):
    """The distance between rows' user vectors and the mean of what the student itself says about their neighbours.

    Args:
        encode: user vectors `[R, d]` of histories `[R, L]` and their mask.
        kind: see `SelfDistillation`.
        temperature: of `soft_clip`.
    """

    requires = frozenset({PICKED, ITEMS, MASK})
    per_target = False

    def __init__(self, encode: Encode, kind: str, temperature: float) -> None:
        super().__init__()
        self.encode, self.kind, self.temperature = encode, kind, temperature

    def forward(self, output: StudentOutput, batch: Batch) -> Tensor:
        rows, items, mask = batch[PICKED], batch[ITEMS], batch[MASK]  # [R], [R, N, L], [R, N, L]
        if not len(rows):
            return 0 * output.user.sum()
        read = mask.any(2)  # [R, N]
        with torch.no_grad():
            vectors = self.encode(items[read], mask[read])  # [sum of read, d]
            teacher = vectors.new_zeros(len(rows), vectors.shape[1])
            teacher.index_add_(0, read.nonzero()[:, 0], vectors)
            teacher /= read.sum(1, keepdim=True)
        user = output.user.index_select(0, last_targets(batch["target"]).index_select(0, rows))
        kind = torch.promote_types(user.dtype, torch.float32)
        user, teacher = user.to(kind), teacher.to(kind)
        if self.kind == "mse":
            return (user - teacher).square().mean()
        return soft_clip(user, teacher, temperature=self.temperature).mean()


def last_targets(target: Tensor) -> Tensor:
    """The number among a batch's targets `[T]` of the last one in each row: `[B]`.

    Args:
        target: `[B]`, or `[B, P]` with 0 where there is none; every row has one.
    """
    if target.dim() == 1:
        return torch.arange(len(target), device=target.device)
    return (target > 0).sum(1).cumsum(0) - 1


class SelfDistillation(Distillation):
    """A user's vector is drawn to the mean of those of the users whose text is most like his, as the student sees them now.

    For the many with a short history the neighbours say more than they do themselves. The student encodes the neighbours with
    its dropout and without gradient, as in the official code; which text was near is computed once. With a target at every
    position the vector is the one at a row's last target. Neighbours are read up to where rows are, before their own last
    training item, as there; those without an item before it are left out.

    Cost: N histories are encoded for each row. With N = 10 a SASRec's step (128 rows of 50 items, 3,706 items, one core) takes
    1.9 times as long, with 2 neighbours 1.13 times and with `share: 0.1` 1.07 times. The neighbours are found once, in
    `U^2 D` operations.

    Args:
        users: `[U, D]` the users' text vectors.
        histories: gives the users' training items.
        neighbours: N.
        among: N of this many nearest are drawn at random at each step; None takes the N nearest.
        kind: `mse`, mean over the width, or `soft_clip`.
        temperature: of `soft_clip`.
        share: of a batch's rows, drawn at random at each step, that have neighbours.
        length: items of a neighbour that are read, the latest ones; None reads as many as a training row holds.
        weight: factor of the term in the student's loss (alpha).
        decay_epochs: see `Distillation`.

    Raises:
        UserError: an unknown kind, a number out of its range, or a temperature that `mse` does not read.
    """

    name = "self_distillation"
    whole_rows = True
    sources: ClassVar[dict[str, tuple[str, str]]] = {"users": ("from", "users")}
    readers: ClassVar[Readers] = (("kind: soft_clip", lambda own: own.kind == "soft_clip", ("temperature",)),)

    def __init__(
        self,
        users: Tensor,
        histories: HistorySource,
        neighbours: int = 10,
        among: int | None = None,
        kind: str = "mse",
        temperature: float = 1.0,
        share: float = 1.0,
        length: int | None = None,
        weight: float = 0.1,
        decay_epochs: int = 0,
    ) -> None:
        super().__init__(weight, decay_epochs)
        if kind not in KINDS:
            raise unknown("kind (self_distillation.kind)", kind, KINDS)
        if neighbours < 1:
            raise UserError(f"self_distillation: neighbours is {neighbours}. It must be at least 1.")
        if among is not None and among < neighbours:
            raise UserError(f"self_distillation: among is {among}. It must be at least the {neighbours} neighbours, or null.")
        if length is not None and length < 1:
            raise UserError(f"self_distillation: length is {length}. It must be at least 1, or null.")
        if not temperature > 0:
            raise UserError(f"self_distillation: temperature is {temperature}. It must be positive.")
        check_share("self_distillation", share)
        if len(users) < 2:
            raise UserError("self_distillation: there is only one user, who has no neighbour. Take more data.")
        self.users, self.histories = users, histories
        self.neighbours, self.among, self.share, self.length = neighbours, among, share, length
        self.kind, self.temperature = kind, temperature
        self.check_read()
        self.nearest = torch.empty(0)  # [U, M], found in `build`

    @classmethod
    def compares_rows(cls, arguments: dict[str, Any]) -> bool:
        return True  # the mean is over those rows of a batch that have neighbours

    def build(self, student: Any) -> SelfDistillationTerm:
        if not student.backbone.causal:
            raise UserError(
                f"self_distillation: {type(student.backbone).__name__} trains on rows in which items are hidden, so it has no "
                "user vector to compare. Choose a causal student, such as sasrec."
            )
        self.nearest = nearest_users(self.users, self.among or self.neighbours)
        return SelfDistillationTerm(student.encode, self.kind, self.temperature)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        batch.update(self.retrieve(batch))

    def retrieve(self, batch: Batch) -> Batch:
        """The rows `[R]` of the batch that have neighbours to learn from, and those `[R, N, L]`, on the batch's device."""
        number = len(batch["user"])
        rows = torch.arange(number)
        if self.share < 1:
            rows = torch.randperm(number)[: max(1, round(self.share * number))]
        nearest = self.nearest[batch["user"].cpu()[rows]]  # [R, M]
        if nearest.shape[1] > self.neighbours:
            nearest = nearest.gather(1, torch.rand(nearest.shape).argsort(1)[:, : self.neighbours])
        items, mask = self.histories.inputs(nearest.clamp(min=0).flatten(), self.length)
        items, mask = (x.unflatten(0, nearest.shape) for x in (items, mask))  # [R, N, L]
        mask = mask & (nearest >= 0)[:, :, None]
        found = mask.any(2).any(1).nonzero().squeeze(1)
        device = batch["user"].device
        return {PICKED: rows[found].to(device), ITEMS: items[found].to(device), MASK: mask[found].to(device)}
