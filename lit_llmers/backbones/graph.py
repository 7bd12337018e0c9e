"""The graph of users and items, and the propagation over it that LightGCN and all that is built on it share.

Nodes are numbered users first: user u is node u, item i is node U + i. Node U is item 0, the padding: it has no neighbour.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn

from lit_llmers.backbones.rows import bag_sums
from lit_llmers.errors import UserError


class Graph(nn.Module):
    """`D^-1/2 A D^-1/2`, symmetric, between users and items (He et al., SIGIR 2020, eq. 7), in CSR form.

    Attributes:
        offsets: `[N+1]` int32; node v has the entries `offsets[v]:offsets[v+1]`.
        columns: `[2E]` int32, the neighbours.
        weights: `[2E]`, one over the root of the product of both degrees.
    """

    offsets: Tensor
    columns: Tensor
    weights: Tensor

    def __init__(self, offsets: Tensor, columns: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, table: Tensor) -> Tensor:
        """One propagation of the nodes `[N, d]`, without gradient: see `propagate`."""
        return bag_sums(self.offsets, self.columns, self.weights, table)


@dataclass(frozen=True, eq=False)
class Edges:
    """The different pairs of a training part, from which the graph and its random parts are made.

    Attributes:
        user, item: `[E]`, ordered by user.
        by_item: `[E]`, the edges' numbers ordered by item.
    """

    n_users: int
    n_items: int
    user: np.ndarray
    item: np.ndarray
    by_item: np.ndarray

    @classmethod
    def of(cls, pairs: np.ndarray, n_users: int, n_items: int) -> "Edges":
        """The edges of `[E, 2]` pairs, user 0..U-1 and item 1..n, of which some may repeat."""
        once = csr_array((np.ones(len(pairs), np.float32), (pairs[:, 0], pairs[:, 1])), (n_users, n_items + 1))
        once.sum_duplicates()
        user = np.repeat(np.arange(n_users, dtype=np.int32), np.diff(once.indptr))
        by_item = csr_array((np.arange(once.nnz, dtype=once.indices.dtype), once.indices, once.indptr), once.shape).tocsc().data
        return cls(n_users, n_items, user, once.indices, by_item)

    def graph(self, keep: np.ndarray | None = None) -> Graph:
        """The normalised graph of all edges, or of those in the mask `[E]`; degrees are counted in what is kept."""
        user, item, by_item = self.user, self.item, self.by_item
        if keep is not None:
            renumbered = np.cumsum(keep) - 1
            user, item, by_item = user[keep], item[keep], renumbered[by_item[keep[by_item]]]
        degree = [np.bincount(user, minlength=self.n_users), np.bincount(item, minlength=self.n_items + 1)]
        scale = [np.maximum(count, 1) ** -0.5 for count in degree]
        weight = scale[0][user] * scale[1][item]
        return Graph(
            torch.from_numpy(np.concatenate([[0], np.cumsum(np.concatenate(degree))]).astype(np.int32)),
            torch.from_numpy(np.concatenate([item + self.n_users, user[by_item]]).astype(np.int32)),
            torch.from_numpy(np.concatenate([weight, weight[by_item]])).to(torch.get_default_dtype()),
        )


def check_layers(layers: int, with_input: bool = True) -> None:
    """Refuse a number of propagations that leaves nothing to average.

    Raises:
        UserError: it is negative, or 0 where x_0 is not in the mean.
    """
    least = 0 if with_input else 1
    if layers < least:
        why = "" if with_input else " with with_input=false, which leaves the layers alone"
        raise UserError(f"model.layers is {layers}. It must be at least {least}{why}.")


def propagate(table: Tensor, graphs: Sequence[Graph], with_input: bool = True) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Layer after layer `x_k = A_k x_(k-1)` from `x_0`, and the mean of the layers (LightGCN, eq. 7 and 8).

    The matrices are symmetric, so the gradient is the same chain of products backwards, `g_0 + A_1 (g_1 + A_2 (g_2 + ...))`:
    as many products as forward, and no transposed matrix.

    Args:
        table: `[N, d]`, x_0.
        graphs: one for each layer.
        with_input: whether x_0 is in the mean.

    Returns:
        the mean `[N, d]`, and `x_1 ... x_L`, each `[N, d]`.
    """
    mean, *hops = _Propagation.apply(table, tuple(graphs), with_input)
    return mean, tuple(hops)


class _Propagation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, graphs: tuple[Graph, ...], with_input: bool):
        ctx.graphs, ctx.with_input = graphs, with_input
        ctx.set_materialize_grads(False)
        hops, share = [table], 1 / (len(graphs) + with_input)
        for graph in graphs:
            hops.append(graph(hops[-1]))
        read = hops[0 if with_input else 1 :]
        mean = read[0] * share
        for hop in read[1:]:
            mean.add_(hop, alpha=share)
        return mean, *hops[1:]

    @staticmethod
    def backward(ctx, of_mean: Tensor | None, *of_hops: Tensor | None):
        shared = None if of_mean is None else of_mean / (len(ctx.graphs) + ctx.with_input)
        gradient = None  # from the last layer down; our own, so it is added to in place
        for graph, of_hop in zip(reversed(ctx.graphs), reversed(of_hops), strict=True):
            term = of_hop if shared is None else shared if of_hop is None else shared + of_hop
            if term is not None:
                gradient = term if gradient is None else gradient.add_(term)
            gradient = None if gradient is None else graph(gradient)
        if shared is not None and ctx.with_input:
            gradient = shared if gradient is None else gradient.add_(shared)
        return gradient, None, None
