"""Caser: Tang & Wang, "Personalized Top-N Sequential Recommendation via Convolutional Sequence Embedding", WSDM 2018
(arXiv 1809.07426)."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone
from lit_llmers.backbones.dropout import Dropout
from lit_llmers.backbones.items import copy_table, item_embedding
from lit_llmers.errors import UserError, unknown

_ACTIVATIONS = {"identity": nn.Identity, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class Caser(Backbone):
    """Convolutions over the matrix of the last items' embeddings; items are scored by a table of their own (eq. 3-10).

    Horizontal filters of every height up to the window's slide over time and keep their largest value; vertical filters
    are weighted sums over time. A fully connected layer makes the user vector of both.

    We differ from the paper in what belongs to a single user or item beside its vector: there is no user embedding, for
    histories are all that is read and a new user can be served, and no bias of items; padding is a zero vector, which the
    official code trains. Each training row has one target, where the paper has the next two or three items.

    Args:
        n_items: items in the catalogue, numbered from 1.
        max_length: longest history, of which no more than `window` items are read.
        dim: width of everything (D = d).
        window: last items that are read (the paper's L).
        horizontal: filters of each height 1..window.
        vertical: filters as high as the window and one wide.
        dropout: probability, on what the fully connected layer reads.
        conv_activation: of the horizontal filters (the paper's phi_c); `identity`, `relu`, `sigmoid` or `tanh`.
        fc_activation: of the fully connected layer (phi_a).
        init_std: standard deviation of the initial item tables.

    Raises:
        UserError: an unknown activation, `window` is no length, or every position is asked.
    """

    every_position: ClassVar[bool] = False
    layers = 1

    def __init__(
        self,
        n_items: int,
        max_length: int,
        dim: int = 64,
        window: int = 5,
        horizontal: int = 16,
        vertical: int = 4,
        dropout: float = 0.5,
        conv_activation: str = "relu",
        fc_activation: str = "relu",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if window < 1:
            raise UserError(f"Caser's window is {window}. It must be at least 1.")
        for name, value in {"conv_activation": conv_activation, "fc_activation": fc_activation}.items():
            if value not in _ACTIVATIONS:
                raise unknown(f"activation (Caser's {name})", value, _ACTIVATIONS)
        self.width, self.dim, self.window = dim, dim, window
        self.items = item_embedding(n_items, dim, init_std)
        self.candidates = item_embedding(n_items, dim, init_std)
        self.horizontal = nn.ModuleList(nn.Conv1d(dim, horizontal, height) for height in range(1, window + 1))
        self.vertical = nn.Linear(window, vertical)
        self.dense = nn.Linear(vertical * dim + window * horizontal, dim)
        self.conv_activation, self.fc_activation = _ACTIVATIONS[conv_activation](), _ACTIVATIONS[fc_activation]()
        self.dropout = Dropout(dropout)

    def forward(self, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        return super().forward(items[:, -self.window :], mask[:, -self.window :], every_position)

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        if every_position:
            raise UserError("Caser reads one window of a row. Use sequences.examples=prefixes or last.")
        x = F.pad(x, (0, 0, self.window, 0))[:, -self.window :]  # [B, L, d], L the window from here on
        over_time = x.transpose(1, 2)  # [B, d, L]
        summed = self.vertical(over_time).transpose(1, 2).flatten(1)  # [B, vertical * d]
        largest = [self.conv_activation(conv(over_time)).amax(2) for conv in self.horizontal]  # L x [B, horizontal]
        z = self.fc_activation(self.dense(self.dropout(torch.cat([summed, *largest], 1))))
        return [x[:, -1:], z[:, None]]

    def head(self, state: Tensor) -> Tensor:
        return state

    def item_table(self) -> Tensor:
        return self.candidates.weight

    def initialise(self, items: Tensor) -> None:
        """Both tables, of the items read and of those scored."""
        super().initialise(items)
        copy_table(self.candidates.weight, items)
