"""GRU4Rec: Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks", ICLR 2016, 1511.06939."""

import torch
from torch import Tensor, nn

from lit_llmers.backbones import Backbone
from lit_llmers.backbones.dropout import Dropout
from lit_llmers.backbones.items import item_embedding
from lit_llmers.errors import UserError


class GRU4Rec(Backbone):
    """GRUs over item embeddings; a linear layer maps the last state to a user vector, scored against the item table.

    The form that RecBole made common: GRUs without biases, item embeddings in place of one-hot vectors, whole histories
    in place of session-parallel mini-batches. One width serves embeddings and states (D = d); there is no final norm.

    Args:
        n_items: items in the catalogue, numbered from 1.
        max_length: longest history; the recurrence itself knows no limit.
        dim: width of everything.
        layers: stacked GRUs.
        dropout: probability, on the item embeddings.
        init_std: standard deviation of the initial item embeddings.
        sparse: gradients and optimiser steps for the items of a batch and its negatives alone, however large the catalogue
            is: see `lit_llmers.optimizer.RowwiseAdamW`. For a loss that draws negatives.

    Raises:
        UserError: there is no layer.
    """

    def __init__(
        self,
        n_items: int,
        max_length: int,
        dim: int = 64,
        layers: int = 1,
        dropout: float = 0.2,
        init_std: float = 0.02,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise UserError(f"GRU4Rec's layers is {layers}. It must be at least 1.")
        self.layers, self.width, self.dim, self.max_length, self.sparse = layers, dim, dim, max_length, sparse
        self.items = item_embedding(n_items, dim, init_std, sparse)
        self.dropout = Dropout(dropout)
        self.grus = nn.ModuleList(nn.GRU(dim, dim, bias=False, batch_first=True) for _ in range(layers))
        self.dense = nn.Linear(dim, dim)
        for gru in self.grus:
            for weight in gru.parameters():
                nn.init.xavier_uniform_(weight)

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        # Padding is moved from the left of a row to its right, where a recurrence cannot have seen it yet.
        batch, length = mask.shape
        position = torch.arange(length, device=mask.device)
        padding = length - mask.sum(1, keepdim=True)  # [B, 1]
        row = torch.arange(batch, device=mask.device)[:, None]
        shifted = row * length + (position + padding).clamp(max=length - 1)  # [B, L]
        x = self.dropout(x.flatten(0, 1).index_select(0, shifted.flatten()).view_as(x))
        states = [x]
        for gru in self.grus:
            x, _ = gru(x)
            states.append(x)
        read = position if every_position else position[-1:]
        source = (read - padding).clamp(min=0)  # [B, P], where the read-out positions are now
        return [state.flatten(0, 1)[row * length + source] for state in states]  # [B, P, D]

    def head(self, state: Tensor) -> Tensor:
        return self.dense(state)

    def item_table(self) -> Tensor:
        return self.items.weight
