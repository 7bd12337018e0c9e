"""BPR-MF: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009, 1205.2618."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Batch, CollaborativeBackbone
from lit_llmers.backbones.items import copy_table, item_embedding
from lit_llmers.backbones.rows import half_squares, occurrences, pair_scores


class BPRMF(CollaborativeBackbone):
    """Matrix factorisation: a user's score of an item is the dot product of their embeddings (section 4.3.1).

    We differ from the paper in the optimiser: Adam on mini-batches in place of SGD on single triples. There are no biases.

    Args:
        n_users, n_items: rows of the two tables; items are numbered from 1.
        dim: width of both (D = d).
        reg: lambda of BPR-Opt, one for all: weighs half the squares of the embeddings of a row's user, target and negatives
            (their mean), averaged over the batch.
        init_std: standard deviation of the initial embeddings.
        sparse: gradients and optimiser steps for the batch's rows alone: see `lit_llmers.optimizer.RowwiseAdamW`. The
            work of a step then does not grow with the tables; where a batch meets most rows it is slower.
    """

    def __init__(
        self, n_users: int, n_items: int, dim: int = 64, reg: float = 1e-4, init_std: float = 0.1, sparse: bool = False
    ) -> None:
        super().__init__()
        self.layers, self.width, self.dim, self.reg, self.sparse = 0, dim, dim, reg, sparse
        self.users = nn.Embedding(n_users, dim, sparse=sparse)
        nn.init.normal_(self.users.weight, std=init_std)
        self.items = item_embedding(n_items, dim, init_std, sparse)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.users.weight, self.items.weight

    def initialise(self, items: Tensor, users: Tensor | None = None) -> None:
        copy_table(self.items.weight, items)
        if users is not None:
            copy_table(self.users.weight, users, "users")

    def pair_scores(self, batch: Batch, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        return pair_scores(*self._rows(batch, users, items))

    def penalty(self, batch: Batch) -> Tensor | float:
        if not self.reg:
            return 0.0
        batch, users, items = self._rows(batch, self.users.weight, self.items.weight)
        of_users, of_items = occurrences(batch, len(users), len(items) - 1)
        return (half_squares(users, of_users) + half_squares(items, of_items)) * (self.reg / len(batch["user"]))

    def _rows(self, batch: Batch, users: Tensor, items: Tensor) -> tuple[Batch, Tensor, Tensor]:
        """The tables and a batch that points into them; with `sparse` tables of the rows that occur in it."""
        if not self.sparse:
            return batch, users, items
        rows, user = batch["user"].unique(return_inverse=True)
        columns, item = torch.cat([batch["target"][:, None], batch["negatives"]], 1).unique(return_inverse=True)
        batch = {"user": user, "target": item[:, 0], "negatives": item[:, 1:]}
        return batch, F.embedding(rows, users, sparse=True), F.embedding(columns, items, sparse=True)
