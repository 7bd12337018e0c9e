"""CL4SRec: Xie et al., "Contrastive Learning for Sequential Recommendation", ICDE 2022 (arXiv 2010.14395)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_llmers.callbacks.distillation import Distillation, Reduce, Term
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError
from lit_llmers.losses.alignment import info_nce_among
from lit_llmers.students.output import StudentOutput

Encode = Callable[[Tensor, Tensor], Tensor]
CROP, HIDE, REORDER = WAYS = range(3)


class SequenceContrastTerm(Term):
    """InfoNCE between two augmented views of each row: of all views of the batch, which one is of the same history?

    The history is the row's items and the last of its targets, of which the oldest give way where they are more than
    `max_length`. The two views are made in two different ways, or in the only one there is. The negatives of a view are the
    `2 (B - 1)` views of the other rows. The similarity is the dot product, as in the paper.

    A row's contrast, the mean of its two views', weighs as much as one target does, whether the row has one or a hundred:
    the paper's sums are over users here, over users and places there.

    Args:
        encode: user vectors `[R, d]` of histories `[R, L]` and their mask.
        max_length: of a history that the student can read.
        crop, hide, reorder: see `augment`; a way whose share is 0 is not drawn.
        temperature: divides the similarities.
        reduce: a sum over the targets of a batch, divided by how many a typical one has.
    """

    def __init__(
        self, encode: Encode, max_length: int, crop: float, hide: float, reorder: float, temperature: float, reduce: Reduce
    ) -> None:
        super().__init__()
        self.encode, self.max_length, self.temperature, self.reduce = encode, max_length, temperature, reduce
        self.crop, self.hide, self.reorder = crop, hide, reorder
        self.ways = [way for way, share in zip(WAYS, (crop, hide, reorder), strict=True) if share]

    def forward(self, output: StudentOutput, batch: Batch) -> Tensor:
        rows = len(batch["items"])
        last = batch["target"].reshape(rows, -1)[:, -1:]
        items = torch.cat([batch["items"], last], 1)[:, -self.max_length :].repeat(2, 1)  # [2B, L]
        drawn = torch.rand(rows, len(self.ways), device=items.device).argsort(1)[:, :2].expand(rows, 2)  # a row's two differ
        ways = torch.tensor(self.ways, device=items.device)[drawn.T.flatten()]  # [2B]
        views = self.encode(*augment(items, items > 0, ways, self.crop, self.hide, self.reorder))  # [2B, d]
        own = torch.arange(len(views), device=views.device)
        contrast = info_nce_among(views, views, own.roll(rows), own, temperature=self.temperature, cosine=False)  # [2B]
        return self.reduce(contrast / 2, batch)


class SequenceContrast(Distillation):
    """Two views of one history are to have user vectors closer to each other than to those of other histories.

    Both are read by the student itself, with its dropout, in one pass that costs up to twice the student's own encoding.
    We differ from the paper in that an item is hidden behind the zero vector of padding, where the paper learns a vector
    for it; that rows may be windows of one user's history, or prefixes, where the paper's batches hold users once; that a
    history of two or three items has one hidden and two shuffled, where the shares round to none; and that a row's views
    are made in two different ways where there are two. The paper draws both from one set and does not ask that they differ;
    they do in the CL4SRec of RuihongQiu/DuoRec, which leaves the last target out.

    A share of 0 leaves that way out. With one alone, as the paper compares them, both views are made in it.

    Args:
        max_length: of a history that the student can read.
        crop: share of a history that cropping keeps (the paper's eta); 0 does not keep nothing, but crops no view.
        hide: share of the items that masking hides (gamma); 0 hides none.
        reorder: share of a history that reordering shuffles (beta); 0 shuffles none.
        temperature: divides the dot products; the paper has none. Vectors that end in a norm, as SASRec's, are as long as
            the root of their width, which is a good value.
        weight: of a row's contrast beside one target's loss (lambda).
        decay_epochs: see `Distillation`.

    Raises:
        UserError: a share outside 0..1, three shares of 0, or a temperature that is not positive.
    """

    name = "sequence_contrast"
    whole_rows = True

    def __init__(
        self,
        max_length: int,
        crop: float = 0.6,
        hide: float = 0.3,
        reorder: float = 0.6,
        temperature: float = 1.0,
        weight: float = 0.1,
        decay_epochs: int = 0,
    ) -> None:
        super().__init__(weight, decay_epochs)
        for name, value in {"crop": crop, "hide": hide, "reorder": reorder}.items():
            if not 0 <= value <= 1:
                raise UserError(f"sequence_contrast: {name} is {value}. It is a share, from 0 to 1.")
        if not (crop or hide or reorder):
            raise UserError("sequence_contrast: crop, hide and reorder are 0, so no view differs. Give one of them a share.")
        if not temperature > 0:
            raise UserError(f"sequence_contrast: temperature is {temperature}. It must be positive.")
        self.max_length, self.temperature = max_length, temperature
        self.crop, self.hide, self.reorder = crop, hide, reorder

    @classmethod
    def compares_rows(cls, arguments: dict[str, Any]) -> bool:
        return True

    def build(self, student: Any) -> SequenceContrastTerm:
        if not student.backbone.causal:
            raise UserError(
                f"sequence_contrast: {type(student.backbone).__name__} trains on rows in which items are hidden already. "
                "Choose a causal student, such as sasrec."
            )
        return SequenceContrastTerm(
            student.encode, self.max_length, self.crop, self.hide, self.reorder, self.temperature, student.reduce
        )


def augment(items: Tensor, mask: Tensor, way: Tensor, crop: float, hide: float, reorder: float) -> tuple[Tensor, Tensor]:
    """Change each row in one of the paper's three ways.

    Crop keeps `max(1, floor(crop * n))` items in a row out of n; mask hides `max(1, floor(hide * n))` items wherever they
    are; reorder shuffles `max(2, floor(reorder * n))` items in a row. One item alone stays as it is. A hidden item is item 0
    where `mask` is true.

    Args:
        items: `[R, L]`, left-padded with 0.
        mask: `[R, L]` bool.
        way: `[R]`, `CROP`, `HIDE` or `REORDER`.

    Returns:
        new items and mask, of the same shapes.
    """
    (rows, length), device = items.shape, items.device
    way = way[:, None]
    noise = torch.rand(rows, length, device=device)
    column = torch.arange(length, device=device)
    count = mask.sum(1, keepdim=True)  # [R, 1]
    place = column - length + count  # [R, L], 0 is a row's first item

    # what crop keeps and reorder shuffles is a span
    kept, moved = (crop * count).long().clamp(min=1), (reorder * count).long().clamp(min=2).minimum(count)
    size = torch.where(way == CROP, kept, moved)
    start = (torch.rand(rows, 1, device=device) * (count - size + 1)).long()
    to_the_end = (column - (count - start - size)).clamp(min=0)
    in_span = (place >= start) & (place < start + size)
    shuffled = torch.where(in_span, start + noise * size, place).argsort(1)
    source = torch.where(way == CROP, to_the_end, torch.where(way == REORDER, shuffled, column))
    mask = torch.where(way == CROP, mask & (column >= length - size), mask)

    order_of_hiding = noise.masked_fill(~mask, 2.0).argsort(1).argsort(1)
    hidden = (way == HIDE) & (order_of_hiding < (hide * count).long().clamp(min=1)) & (count > 1)
    return items.gather(1, source).masked_fill(hidden | ~mask, 0), mask
