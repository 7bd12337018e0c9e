"""What a student shows to the loss terms."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StudentOutput:
    """One forward pass, flattened over the scored positions: `T` targets of a batch (`T = B` with one target per row).

    Attributes:
        user: `[T, d]` user vectors that score items by their dot product with the item table.
        items: `[n+1, d]` the item table of this forward pass, row 0 is padding.
        hidden: layers+1 tensors `[T, D]`, the hidden states at those positions; index 0 is the input embedding, the last is
            after the final norm. None unless a loss term requires it. (A tuple and not one tensor: a term that reads some
            layers then costs no copy of all, forward or backward.)
        softmax: whether the task's loss is each target's cross-entropy among `items`, with these user vectors. A term may then
            have it count more, see `Term.counts_more`.
    """

    user: Tensor
    items: Tensor
    hidden: tuple[Tensor, ...] | None = None
    softmax: bool = False
