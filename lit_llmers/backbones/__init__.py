"""Plain torch modules, one paper each, that turn a history into a user vector.

A backbone has `layers`, `width` (D) and `dim` (d), and three methods:

- `forward(items [B, L] int64, mask [B, L] bool, every_position=False)` returns `layers + 1` hidden states `[B, P, D]`,
  where `P = L` with `every_position` and else 1, the read-out position. Index 0 is the input embedding, the last comes
  after the final norm. Rows are left-padded with item 0; padding has no influence on what real positions hold, and what
  padded positions hold is finite and means nothing.
- `head(state [..., D]) -> [..., d]` makes the user vector from the last hidden state.
- `item_table() -> [n+1, d]`: row 0 is padding and stays zero, because item 0 is never a candidate.

Constructor arguments named `n_items`, `max_length` and `item_table` are given by the stage that builds the backbone.
"""

from torch import Tensor, nn


class Backbone(nn.Module):
    """What every backbone offers; see the package for the meaning."""

    layers: int
    width: int
    dim: int

    def forward(self, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        """`layers + 1` hidden states `[B, P, D]` of histories `[B, L]`."""
        raise NotImplementedError

    def head(self, state: Tensor) -> Tensor:
        """User vectors `[..., d]` from the last hidden state `[..., D]`."""
        raise NotImplementedError

    def item_table(self) -> Tensor:
        """`[n+1, d]`, row 0 is padding."""
        raise NotImplementedError
