"""SR-GNN: Wu et al., "Session-based Recommendation with Graph Neural Networks", AAAI 2019 (arXiv 1811.00855)."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone
from lit_llmers.backbones.dropout import Dropout
from lit_llmers.backbones.items import item_embedding
from lit_llmers.errors import UserError


class SRGNN(Backbone):
    """A gated graph network over the graph of a history's items, read out by attention from the last one (eq. 1-8).

    An item is one node however often it occurs. Each position holds its node's vector, so the graph needs no list of nodes:
    what follows an item, and what precedes it, are averages over the positions next to its occurrences.

    We differ from the paper as the official code does: the reset gate acts after the hidden state's matrix and the gates
    have biases, which is torch's GRU cell; the bias of eq. 1 is in its input bias. As in the paper and not in its code, an
    edge weighs as often as it occurs. The dropout is ours.

    Args:
        n_items: items in the catalogue, numbered from 1.
        max_length: longest history; the graph itself knows no limit.
        dim: width of everything (D = d).
        layers: propagation steps, which share their weights. The last hidden state is the read-out after the last of them.
        dropout: probability, on the last item's and the global vector before they are combined.
        init_std: standard deviation of all initial weights.

    Raises:
        UserError: there is no layer, or every position is asked.
    """

    every_position: ClassVar[bool] = False

    def __init__(
        self,
        n_items: int,
        max_length: int,
        dim: int = 64,
        layers: int = 1,
        dropout: float = 0.0,
        init_std: float = 0.1,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise UserError(f"SR-GNN's layers is {layers}. It must be at least 1.")
        self.layers, self.width, self.dim = layers, dim, dim
        self.incoming, self.outgoing = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)  # H of eq. 1
        self.cell = nn.GRUCell(2 * dim, dim)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)  # W_1 and c, W_2 of eq. 6
        self.attention = nn.Linear(dim, 1, bias=False)  # q of eq. 6
        self.combine = nn.Linear(2 * dim, dim, bias=False)  # W_3 of eq. 7
        self.dropout = Dropout(dropout)
        for weight in self.parameters():
            nn.init.normal_(weight, std=init_std)
        self.items = item_embedding(n_items, dim, init_std)

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        if every_position:
            raise UserError("SR-GNN reads one session of a row. Use sequences.examples=prefixes or last.")
        before, after = _session_graph(items, mask, x.dtype)
        states = []
        for _ in range(self.layers):
            states.append(x[:, -1:])
            message = torch.cat([before @ self.incoming(x), after @ self.outgoing(x)], 2)  # [B, L, 2d]
            x = self.cell(message.flatten(0, 1), x.flatten(0, 1)).view_as(x)
        last = x[:, -1:]  # [B, 1, d], the local vector
        weight = self.attention(torch.sigmoid(self.query(last) + self.key(x))).masked_fill(~mask[..., None], 0)  # [B, L, 1]
        session = torch.cat([last, weight.transpose(1, 2) @ x], 2)
        return [*states, self.combine(self.dropout(session))]

    def head(self, state: Tensor) -> Tensor:
        return state

    def item_table(self) -> Tensor:
        return self.items.weight


def _session_graph(items: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of averages over what precedes and what follows an item, two times `[B, L, L]`.

    Position j follows the item at i where j - 1 holds the same item as i. A row sums to 1, or to 0 where nothing follows.
    """
    same = (items[:, :, None] == items[:, None]) & mask[:, None]  # [B, L, L], padded positions are no one's equals
    after = F.pad(same[:, :, :-1].to(dtype), (1, 0))
    before = F.pad((same[:, :, 1:] & mask[:, None, :-1]).to(dtype), (0, 1))
    return before / before.sum(2, keepdim=True).clamp(min=1), after / after.sum(2, keepdim=True).clamp(min=1)
