"""What a student shows to the loss terms."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StudentOutput:
    """One forward pass, flattened over the scored positions: `T` targets of a batch (`T = B` with one target per row).

    Attributes:
        user: `[T, d]` user vectors that score items by their dot product with the item table.
        hidden: `[T, layers+1, D]` hidden states at those positions, index 0 the input embedding, the last after the final
            norm; None unless a loss term requires it.
    """

    user: Tensor
    hidden: Tensor | None = None
