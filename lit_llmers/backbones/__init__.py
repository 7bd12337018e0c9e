"""Plain torch modules, one paper each, of three kinds: by what they know a user from.

`Backbone`, sequential: a history becomes a user vector. It has `layers`, `width` (D) and `dim` (d), and these methods:

- `forward(items [B, L] int64, mask [B, L] bool, every_position=False)` returns `layers + 1` hidden states `[B, P, D]`,
  where `P = L` with `every_position` and else 1, the read-out position. Index 0 is the input embedding, the last comes
  after the final norm. Rows are left-padded with item 0; padding has no influence on what real positions hold, and what
  padded positions hold is finite and means nothing.
- `forward` is `read(embed(items), items, mask, every_position)`: `embed` makes the item vectors `[B, L, d]` as they enter,
  before any scale, position or dropout, and `read` does the rest. What stands between them is the business of
  `lit_llmers.fusion`.
- `head(state [..., D]) -> [..., d]` makes the user vector from the last hidden state.
- `item_table() -> [n+1, d]`: row 0 is padding and stays zero, because item 0 is never a candidate.

`CollaborativeBackbone`: users and items are rows of two tables, without order. `CountingBackbone`: nothing is trained,
the training interactions are counted.

Constructor arguments named `n_items`, `n_users`, `max_length`, `item_table` (of other stages) and `training_pairs`
(`[E, 2]` int64 numpy array: user 0..U-1, item 1..n) are given by the stage that builds the backbone.
"""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lit_llmers.backbones.items import copy_table
from lit_llmers.backbones.rows import pair_scores

Batch = dict[str, Tensor]


class Backbone(nn.Module):
    """What every sequential backbone offers; see the package for the meaning.

    Attributes:
        every_position: whether `forward` can read out at every position, as `sequences.examples=sequence` asks.
        causal: whether a position sees its past alone when it trains, so that a teacher's signals belong to it.
        sparse: whether the item table's gradients are of the rows that are read alone.
    """

    every_position: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    sparse: bool = False
    layers: int
    width: int
    dim: int
    items: nn.Embedding

    def forward(self, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        """`layers + 1` hidden states `[B, P, D]` of histories `[B, L]`."""
        return self.read(self.embed(items), items, mask, every_position)

    def embed(self, items: Tensor) -> Tensor:
        """Item vectors `[B, L, d]`; zero for item 0."""
        return self.items(items)

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        """The hidden states of `forward` from item vectors `[B, L, d]` and the items that they stand for."""
        raise NotImplementedError

    def initialise(self, items: Tensor) -> None:
        """Take `[n+1, d]` as the initial item table but for its padding row.

        Raises:
            UserError: it has another shape.
        """
        copy_table(self.items.weight, items)

    def head(self, state: Tensor) -> Tensor:
        """User vectors `[..., d]` from the last hidden state `[..., D]`."""
        raise NotImplementedError

    def item_table(self) -> Tensor:
        """`[n+1, d]`, row 0 is padding."""
        raise NotImplementedError

    def training_view(self, batch: Batch) -> Batch:
        """The batch as this model trains on it."""
        return batch

    def mean_targets(self, lengths: np.ndarray, targets: float) -> float:
        """Mean number of targets in a row as this model trains on it.

        Args:
            lengths: `[R]` items that the training rows read.
            targets: mean number of next items to be predicted in them.
        """
        return targets

    def serving_size(self) -> int:
        """Numbers that serving holds: the parameters, but a table made of others counts in their place, and once."""
        return sum(parameter.numel() for parameter in self.parameters())


class CollaborativeBackbone(nn.Module):
    """What every collaborative backbone offers."""

    layers: int
    width: int
    dim: int

    def forward(self) -> tuple[Tensor, Tensor]:
        """All users `[U, d]` and items `[n+1, d]` as they score each other; row 0 of the items is padding and zero."""
        raise NotImplementedError

    def initialise(self, items: Tensor, users: Tensor | None = None) -> None:
        """Take `[n+1, d]` as the initial items but for the padding row, and `[U, d]` as the initial users if given.

        Raises:
            UserError: they have another shape.
        """
        raise NotImplementedError

    def pair_scores(self, batch: Batch, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of each row's target `[B]` and of its negatives `[B, N]`, from what `forward` returned."""
        return pair_scores(batch, users, items)

    def penalty(self, batch: Batch) -> Tensor | float:
        """A regulariser of the batch, a scalar."""
        return 0.0

    @torch.no_grad()
    def serving_size(self) -> int:
        """Numbers that serving holds: the two final tables, whatever they are made of."""
        return sum(table.numel() for table in self())


class CountingBackbone(nn.Module):
    """What every backbone without trained parameters offers."""

    layers = 0
    width: int
    dim: int

    def scores(self, items: Tensor, mask: Tensor) -> Tensor:
        """Scores `[B, n+1]` of the whole catalogue for histories `[B, L]`."""
        raise NotImplementedError

    def serving_size(self) -> int:
        """Numbers that serving holds, of those that are trained: none."""
        return 0
