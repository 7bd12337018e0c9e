"""Popularity: the items with the most training interactions, the same for every user."""

import numpy as np
import torch
from torch import Tensor

from lit_llmers.backbones import CountingBackbone


class Popularity(CountingBackbone):
    """The floor under every recommender.

    Args:
        n_items: items in the catalogue, numbered from 1.
        training_pairs: `[E, 2]` int64, user and item 1..n; every interaction counts, also a repeated one.
    """

    count: Tensor

    def __init__(self, n_items: int, training_pairs: np.ndarray) -> None:
        super().__init__()
        self.width = self.dim = 1
        self.register_buffer("count", torch.from_numpy(np.bincount(training_pairs[:, 1], minlength=n_items + 1)).float())

    def scores(self, items: Tensor, mask: Tensor) -> Tensor:
        return self.count.expand(len(items), -1)
