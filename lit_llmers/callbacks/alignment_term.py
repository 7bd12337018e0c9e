"""What alignment computes at each step: how far the vectors that a batch names are from their signals."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_llmers.callbacks.distillation import Reduce, Term
from lit_llmers.callbacks.embedding_distillation import distinct, drawn, item_sets, number_of_targets, with_signal
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError
from lit_llmers.losses.alignment import cosine, info_nce_among, multi_kernel_mmd, soft_clip
from lit_llmers.students.output import StudentOutput
from lit_llmers.text.tables import has_vector

DRAWN = 512  # targets that a step looks at where no share is given
COLDEST = 0.01  # a learned temperature stays above, as CLIP's
Views = Callable[[], tuple[Tensor, Tensor]]


def two_views(backbone: Any) -> Views:
    """What makes a student's two item tables `[n+1, d]`: by identity and by text.

    Raises:
        UserError: it has not got two.
    """
    if not (hasattr(backbone, "id_table") and hasattr(backbone, "text_table")):
        raise UserError(
            "alignment: there is nothing to align the items with. Name a stage with item vectors in 'from', or give the "
            "student a fusion with two views of an item, such as concat."
        )
    return lambda: (backbone.id_table(), backbone.text_table())


class Bank(nn.Module):
    """The vectors of the entities that were last met, each once and as it was then.

    Attributes:
        ids: `[size]`, the latest first; 0 where there is none yet.
        vectors: `[size, d]`.
    """

    ids: Tensor
    vectors: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("vectors", torch.zeros(size, dim))

    @torch.no_grad()
    def exchange(self, ids: Tensor, vectors: Tensor) -> Tensor:
        """Take in vectors `[M, d]` of different entities `[M]`, 1 and up; return those `[K, d]` of the others that are in."""
        others = ((self.ids > 0) & ~torch.isin(self.ids, ids)).nonzero().squeeze(1)
        known, rest = self.ids[others], self.vectors[others]
        size, filled = len(self.ids), min(len(self.ids), len(ids) + len(known))
        self.ids[:filled] = torch.cat([ids, known])[:size]
        self.vectors[:filled] = torch.cat([vectors.to(rest), rest])[:size]
        self.ids[filled:] = 0
        return rest.to(vectors)


class Known(nn.Module):
    """The entities that have a signal. They alone are pairs, and they alone compete.

    Args:
        signals: `[N, D]`; a row of zeros is none.

    Attributes:
        mask: `[N]` bool, whether an entity is one of them.
        place: `[N]` its number among them.
    """

    mask: Tensor
    place: Tensor

    def __init__(self, signals: Tensor) -> None:
        super().__init__()
        mask = has_vector(signals)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("place", mask.cumsum(0) - 1, persistent=False)
        missing = int((~mask).sum())
        self.first = missing if mask[missing:].all() else None  # the only ones without stand before it: padding

    def rows(self, table: Tensor) -> Tensor:
        """Their rows of a table `[N, d]`, `[M, d]`."""
        return table.index_select(0, self.mask.nonzero().squeeze(1)) if self.first is None else table[self.first :]


class AlignmentTerm(Term):
    """The mean over a batch's targets of how far the student's vectors are from the signals, each entity being there once.

    `item`, `negative` and `user` in the log are the parts, which add up: a batch of pairs has negatives and users beside
    its targets. With `mmd` the targets of a batch without negatives have uniform items among them. One without a signal adds
    nothing.

    Args:
        items: `[n+1, D]` signals; or what makes the student's two tables at each step, its own and that of text.
        users: `[U, D]` or None.
        texts: `[n+1, D]`, whose rows of zeros say which items have no signal; those of `users` do so themselves.
        kind, negatives, symmetric: see `Alignment`.
        temperature: to start with, or to keep.
        learn_temperature: whether it is trained.
        of_signal, of_student: projectors.
        banks: of signals and, if `symmetric`, of the student's vectors.
        share: of a batch's targets; None takes `DRAWN` of them.
        reduce: the student's.
    """

    items: Tensor | None
    users: Tensor | None

    def __init__(
        self,
        items: Tensor | Views,
        users: Tensor | None,
        texts: Tensor,
        kind: str,
        negatives: str,
        symmetric: bool,
        temperature: float,
        learn_temperature: bool,
        of_signal: nn.Module,
        of_student: nn.Module,
        banks: list[Bank],
        share: float | None,
        reduce: Reduce,
    ) -> None:
        super().__init__()
        self.views = None if isinstance(items, Tensor) else items
        self.register_buffer("items", items if isinstance(items, Tensor) else None, persistent=False)
        self.register_buffer("users", users, persistent=False)
        self.known_items, self.known_users = Known(texts), None if users is None else Known(users)
        self.kind, self.negatives, self.symmetric = kind, negatives, symmetric
        self.of_signal, self.of_student, self.banks = of_signal, of_student, nn.ModuleList(banks)
        self.share, self.reduce = share, reduce
        self.fixed = temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learn_temperature else None

    @property
    def temperature(self) -> float | Tensor:
        """Of this step."""
        return self.fixed if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, output: StudentOutput, batch: Batch) -> Tensor:
        if self.log_temperature is not None:
            with torch.no_grad():
                self.log_temperature.clamp_(min=math.log(COLDEST))
        parts = {}
        table, signals = (output.items, self.items) if self.views is None else self.views()
        assert signals is not None
        sets = item_sets(batch, self.known_items.mask, uniform=self.kind == "mmd")
        for name, (index, found) in zip(("item", "negative"), sets, strict=False):
            parts[name] = found * self._aligned(table, signals, index, self.known_items, self.negatives)
        if self.users is not None:
            known: Any = self.known_users
            index, found = with_signal(batch["user"], known.mask)
            parts["user"] = found * self._aligned(output.users, self.users, index, known, "all")  # type: ignore[attr-defined]
        targets = number_of_targets(output, batch)
        parts = {name: self.reduce(value.expand(targets), batch) for name, value in parts.items()}
        self.parts = {name: value.detach() for name, value in parts.items()}
        if self.log_temperature is not None:
            self.learned = {"temperature": self.log_temperature.detach().exp()}
        return torch.stack(list(parts.values())).sum()

    def _aligned(self, table: Tensor, signals: Tensor, index: Tensor, known: Known, negatives: str) -> Tensor:
        """The mean over the rows `index` `[K]` of a table `[N, d]`, all of them `known`, or over a share of them; a scalar."""
        if not len(index):  # every parameter gets a gradient of zero: without one, training on several devices stops
            student, signal = self._promoted(table[:0], signals[:0])
            return (student.sum() + signal.sum()) / self.temperature
        ids, weight = distinct(drawn(index, self.share, DRAWN), len(signals))
        if self.kind == "info_nce" and negatives == "all":
            return self._against_all(known.rows(table), known.rows(signals), known.place[ids], weight)
        student, signal = self._promoted(table.index_select(0, ids), signals.index_select(0, ids))
        if self.kind == "mmd":
            return multi_kernel_mmd(student, signal)
        return self._among_themselves(student, signal, ids, weight, negatives)

    def _promoted(self, student: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
        """Both after their projectors."""
        student, signal = self.of_student(student), self.of_signal(signal)
        kind = torch.promote_types(torch.promote_types(student.dtype, signal.dtype), torch.float32)
        return student.to(kind), signal.to(kind)

    def _against_all(self, table: Tensor, signals: Tensor, own: Tensor, weight: Tensor) -> Tensor:
        """The losses of the rows `own` `[M]` against all rows of the other side, times the weights `[M]`, summed."""
        student, signal = self._promoted(table if self.symmetric else table.index_select(0, own), signals)
        settings: Any = {"temperature": self.temperature, "weight": weight}
        values = info_nce_among(student.index_select(0, own) if self.symmetric else student, signal, own, **settings)
        if not self.symmetric:
            return values.sum()
        other = info_nce_among(signal.index_select(0, own), student, own, **settings)
        return (values.sum() + other.sum()) / 2  # halves of sums, not the sum of halves: see `cross_entropy`

    def _among_themselves(self, student: Tensor, signal: Tensor, ids: Tensor, weight: Tensor, negatives: str) -> Tensor:
        """The losses of M different entities, times the weights `[M]`, summed."""
        if self.kind == "cosine":
            return (cosine(student, signal) * weight).sum()
        if self.kind == "soft_clip":
            return (soft_clip(signal, student, temperature=self.temperature) * weight).sum()
        pairs = [(student, signal), (signal, student)] if self.symmetric else [(student, signal)]
        values = []
        for side, (anchor, candidates) in enumerate(pairs):
            if negatives == "bank":
                bank: Any = self.banks[side]
                candidates = torch.cat([candidates, bank.exchange(ids, candidates)])
            values.append(info_nce_among(anchor, candidates, temperature=self.temperature, weight=weight).sum())
        return torch.stack(values).mean()
