"""Scores of some items for each target: those of its own list, or those that neighbouring targets share."""

import warnings

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional as F


def list_scores(user: Tensor, item_table: Tensor, items: Tensor, sparse: bool = False) -> Tensor:
    """Scores `user[t] . item_table[items[t, k]]` of the items of each target's list.

    The vectors of the listed items are never all in memory, forward or backward; on a CPU it takes a tenth or less of the time
    of `einsum("td,tkd->tk", user, item_table[items])` and its gradient. While a graph is compiled, which takes no sparse
    matrices, it is that.

    Args:
        user: `[T, d]` user vectors.
        item_table: `[n+1, d]`; row 0 is padding.
        items: `[T, K]` int64 rows of the table, repeats allowed.
        sparse: the table's gradient is one of the listed rows alone; their vectors are in memory then.

    Returns:
        `[T, K]` in the wider of both precisions, at least float32.
    """
    wide = torch.promote_types(torch.promote_types(user.dtype, item_table.dtype), torch.float32)
    if sparse or torch.compiler.is_compiling():
        with torch.autocast(user.device.type, enabled=False):
            return torch.einsum("td,tkd->tk", user.to(wide), F.embedding(items, item_table, sparse=sparse).to(wide))
    return _ListScores.apply(user.to(wide), item_table.to(wide), items)


def in_memory(tensor: Tensor) -> bool:
    """Whether other libraries can read it: on the CPU, with content (`lit_llmers.plan` rehearses steps on tensors without)."""
    return type(tensor) is Tensor and tensor.device.type == "cpu"


class _ListScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, user: Tensor, item_table: Tensor, items: Tensor) -> Tensor:
        ctx.save_for_backward(user, item_table, items)
        fits = in_memory(items) and items.shape[1] <= len(item_table)  # as many cells as the matrix has
        return (_sampled_on_cpu if fits else _sampled)(user.detach(), item_table.detach(), items)

    @staticmethod
    def backward(ctx, cotangent: Tensor):
        user, item_table, items = ctx.saved_tensors
        cotangent = cotangent.contiguous()
        d_user = d_table = None
        if ctx.needs_input_grad[0]:
            d_user = F.embedding_bag(items, item_table, per_sample_weights=cotangent, mode="sum")
        if ctx.needs_input_grad[1]:  # the same sum the other way round: an item's users, weighed by the cotangent
            by_item = _by_item_on_cpu if in_memory(items) else _by_item
            row, first, weight = by_item(items, cotangent, len(item_table))
            d_table = F.embedding_bag(row, user, first, per_sample_weights=weight, mode="sum")
        return d_user, d_table, None


def _sampled(user: Tensor, item_table: Tensor, items: Tensor) -> Tensor:
    """The scores are the gradient of `sum_k w_k item_k` in its weights w, for a cotangent `user`; one kernel computes that."""
    with torch.enable_grad():
        weight = user.new_zeros(items.shape).requires_grad_()
        bags = F.embedding_bag(items, item_table, per_sample_weights=weight, mode="sum")
    return torch.autograd.grad(bags, weight, user)[0]


def _sampled_on_cpu(user: Tensor, item_table: Tensor, items: Tensor) -> Tensor:
    """The same in half the time, by a kernel for the cells of a product that a sparse matrix has.

    That of a CPU takes each row's columns as they come; cuSPARSE asks for sorted and different ones.
    """
    first = torch.arange(len(items) + 1, dtype=torch.int32) * items.shape[1]
    values, shape = user.new_zeros(items.numel()), (len(items), len(item_table))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that CSR tensors are new
        cells = torch.sparse_csr_tensor(first, items.flatten().int(), values, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(cells, user, item_table.T, beta=0.0).values().view(items.shape)


def _by_item(items: Tensor, weight: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of lists in the order of their items: target and weight `[T K]`, and `[n]` where each item's begin."""
    order = items.flatten().int().argsort()
    count = torch.bincount(items.flatten(), minlength=n)
    return order.div(items.shape[1], rounding_mode="floor"), count.cumsum(0) - count, weight.flatten()[order]


def _by_item_on_cpu(items: Tensor, weight: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in a third of the time: counted and not sorted."""
    first = np.arange(len(items) + 1, dtype=np.int32) * items.shape[1]
    lists = csr_array((weight.flatten().numpy(), items.flatten().int().numpy(), first), (len(items), n)).tocsc()
    return torch.from_numpy(lists.indices), torch.from_numpy(lists.indptr[:-1]), torch.from_numpy(lists.data)


def shared_scores(user: Tensor, item_table: Tensor, items: Tensor) -> Tensor:
    """Scores of items that neighbouring targets share: target t is scored on the items of row `t // ceil(T / R)`.

    Args:
        user: `[T, d]` user vectors.
        item_table: `[n+1, d]`; row 0 is padding.
        items: `[R, N]` int64 rows of the table.

    Returns:
        `[T, N]` in the wider of both precisions, at least float32.
    """
    wide = torch.promote_types(torch.promote_types(user.dtype, item_table.dtype), torch.float32)
    together = -(-len(user) // len(items))
    users = F.pad(user.to(wide), (0, 0, 0, together * len(items) - len(user))).view(len(items), together, -1)
    vectors = F.embedding(items, item_table).to(wide)  # [R, N, d]
    with torch.autocast(user.device.type, enabled=False):
        return (users @ vectors.mT).flatten(0, 1)[: len(user)]
