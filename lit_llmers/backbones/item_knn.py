"""Item-based nearest neighbours: Sarwar et al., "Item-Based Collaborative Filtering Recommendation Algorithms", WWW 2001, in
the form of Deshpande & Karypis, "Item-Based Top-N Recommendation Algorithms", ACM TOIS 22(1), 2004."""

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from lit_llmers.backbones import CountingBackbone
from lit_llmers.errors import UserError

_ENTRIES = 2**22  # of the similarity matrix in memory at once while it is built, some 150 MB


class ItemKNN(CountingBackbone):
    """An item scores the sum of its similarities to the items of the history that have it among their k nearest.

    With c(i) the users of item i and c(i, j) those of both, `similarity = c(i, j) / (sqrt(c(i) c(j)) + shrink)`: the cosine of
    the binary columns of the user-item matrix (Deshpande & Karypis, section 4.2.1), which shrinkage pulls to zero where few
    users stand behind it. Similarities are not normalised per item. An item that repeats in a history counts as often. Of equal
    similarities at the k-th place that of the smaller item number is kept.

    Args:
        n_items: items in the catalogue, numbered from 1.
        n_users: of the training part.
        training_pairs: `[E, 2]` int64, user 0..U-1 and item 1..n; a repeated pair counts once.
        neighbours: k, stored for each item; an item with fewer has item 0 with weight 0 in their places.
        shrink: added to the denominator; in users.

    Raises:
        UserError: `neighbours` is below 1 or `shrink` below 0.
    """

    nearest: Tensor
    weight: Tensor

    def __init__(
        self, n_items: int, n_users: int, training_pairs: np.ndarray, neighbours: int = 100, shrink: float = 10.0
    ) -> None:
        super().__init__()
        if neighbours < 1 or shrink < 0:
            raise UserError(f"item_knn: neighbours is {neighbours} and shrink {shrink}. At least 1 and 0 are needed.")
        self.width = self.dim = neighbours
        nearest, weight = _nearest(_user_columns(training_pairs, n_items, n_users), neighbours, shrink)
        self.register_buffer("nearest", torch.from_numpy(nearest))  # [n+1, k] int32
        self.register_buffer("weight", torch.from_numpy(weight))  # [n+1, k] float32

    def scores(self, items: Tensor, mask: Tensor) -> Tensor:
        nearest, weight = self.nearest[items].flatten(1), self.weight[items].flatten(1)  # [B, L * k]
        return weight.new_zeros(len(items), len(self.weight)).scatter_add(1, nearest.long(), weight)


def _user_columns(pairs: np.ndarray, n_items: int, n_users: int) -> csr_array:
    """`[n+1, U]`, 1 where the user has the item."""
    matrix = csr_array((np.ones(len(pairs), np.float32), (pairs[:, 1], pairs[:, 0])), (n_items + 1, n_users))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _nearest(items: csr_array, neighbours: int, shrink: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers `[n+1, k]` int32 and similarities `[n+1, k]` float32 of each item's nearest, the highest first."""
    rows = items.shape[0]
    nearest, weight = np.zeros((rows, neighbours), np.int32), np.zeros((rows, neighbours), np.float32)
    users, root = items.T.tocsr(), np.sqrt(np.diff(items.indptr)).astype(np.float32)
    # an item shares at most as many items as its users have, all taken together
    most = np.concatenate([[0], np.cumsum(np.minimum(items @ np.diff(users.indptr), rows))])
    start = 0
    while start < rows:
        stop = max(start + 1, int(np.searchsorted(most, most[start] + _ENTRIES, side="right")) - 1)
        both = items[start:stop] @ users  # c(i, j), sparse
        row, column = np.repeat(np.arange(start, stop), np.diff(both.indptr)), both.indices
        similarity = both.data / (root[row] * root[column] + np.float32(shrink))
        # one number to sort by: the bits of a positive float ascend with it, below them the item's number descends
        key = (similarity.view(np.int32).astype(np.int64) << 32) + (rows - column)
        key[column == row] = 0
        best = np.zeros((stop - start, neighbours), np.int64)
        for place, own in enumerate(np.split(key, both.indptr[1:-1])):
            if len(own) > neighbours:
                own = np.partition(own, -neighbours)[-neighbours:]
            best[place, : len(own)] = own
        best = np.sort(best, axis=1)[:, ::-1]
        nearest[start:stop] = np.where(best > 0, rows - (best & 0xFFFFFFFF), 0)
        weight[start:stop] = (best >> 32).astype(np.int32).view(np.float32)
        start = stop
    return nearest, weight
