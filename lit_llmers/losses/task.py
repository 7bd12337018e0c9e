"""The recommender's own loss: softmax cross-entropy over the whole catalogue."""

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 128  # rows of logits in memory at once; of 64 to 512 the fastest or equal on a CPU
_SAFE = 60.0  # largest logit whose exponential may be summed over any catalogue in float32


def cross_entropy(user: Tensor, item_table: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Per-row cross-entropy of the target under a softmax over all items.

    With scores `s = user @ item_table.T` the loss of a row is `logsumexp(s) - s[target]`. The logits exist only for a
    chunk of rows at a time: the gradients of a chunk are made while its logits are in memory and nothing of size rows x
    items is kept, so that memory does not grow with batch x catalogue. Reduce the losses by a sum, divided by what you like:
    after a mean of torch's an accelerator makes the table's gradient a second time.

    Args:
        user: `[T, d]` user vectors.
        item_table: `[n, d]` vectors of the items that compete (no padding row).
        target: `[T]` int64 row of the item table.
        weight: `[T]` factors of the losses, without gradient; None is 1. A factor that is put on the result instead costs the
            table's gradient a second time.

    Returns:
        `[T]` losses in nats, in float32 at least: a sum of exponentials over a catalogue needs more than half precision.
    """
    kind = torch.promote_types(torch.promote_types(user.dtype, item_table.dtype), torch.float32)
    user, item_table, weight = user.to(kind), item_table.to(kind), None if weight is None else weight.to(kind)
    with torch.autocast(user.device.type, enabled=False):
        if not torch.is_grad_enabled() or not (user.requires_grad or item_table.requires_grad):
            chunks = zip(user.split(_CHUNK), target.split(_CHUNK), strict=True)
            loss = torch.cat([F.cross_entropy(u @ item_table.T, t, reduction="none") for u, t in chunks])
            return loss if weight is None else loss * weight
        return _ChunkedCrossEntropy.apply(user, item_table, target, weight)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward makes the gradients: with p the softmax, d user = p @ W - W[target], d W = p.T @ user - scatter(user).

    With a weight they are those of the weighted losses. They hold for a unit cotangent in every row; backward scales `d user`
    by row. The table's gradient sums over rows, so it is made for a uniform cotangent, which is what a sum over rows sends
    back; anything else is recomputed. What an accelerator computes is never looked at, for the step would wait for it.
    """

    @staticmethod
    def forward(ctx, user: Tensor, item_table: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        needs_user, needs_table = ctx.needs_input_grad[:2]
        loss = user.new_empty(len(user))
        d_user = torch.empty_like(user) if needs_user else None
        d_table = item_table.new_zeros(item_table.shape[1], len(item_table)) if needs_table else None  # [d, n]
        buffer = user.new_empty(min(_CHUNK, len(user)), len(item_table))
        ones = user.new_ones(len(item_table))
        # no logit exceeds |u| |w|: where that is small, the row's maximum need not be found and taken off
        safe = user.device.type == "cpu" and bool(user.norm(dim=1).max() * item_table.norm(dim=1).max() < _SAFE)
        for start in range(0, len(user), _CHUNK):
            rows = slice(start, start + _CHUNK)
            logits = torch.mm(user[rows], item_table.T, out=buffer[: len(user[rows])])  # [c, n]
            if not safe:
                logits.sub_(logits.amax(1, keepdim=True))  # changes neither the loss nor its gradient
            at_target = logits.gather(1, target[rows, None]).squeeze(1)
            weights = logits.exp_()  # softmax before its division, in place
            total = weights.mv(ones)
            loss[rows] = total.log() - at_target
            if d_user is not None:
                torch.mm(weights, item_table, out=d_user[rows]).div_(total[:, None])
            if d_table is not None:
                share = total.reciprocal() if weight is None else weight[rows] / total
                d_table.addmm_((user[rows] * share[:, None]).T, weights)
        if d_user is not None:
            d_user.sub_(item_table[target])
        weighted = user
        if weight is not None:
            loss.mul_(weight)
            weighted = user * weight[:, None]
            d_user = None if d_user is None else d_user.mul_(weight[:, None])
        if d_table is not None:
            d_table = d_table.T.contiguous().index_add_(0, target, weighted, alpha=-1.0)
        ctx.save_for_backward(user, item_table, target, weight, d_user, d_table)
        return loss

    @staticmethod
    def backward(ctx, cotangent: Tensor):
        user, item_table, target, weight, d_user, d_table = ctx.saved_tensors
        if d_table is not None:
            if _is_uniform(cotangent):
                d_table = d_table * cotangent[0]
            else:
                d_table = _table_gradient(user, item_table, target, cotangent if weight is None else cotangent * weight)
        if d_user is not None:
            d_user = d_user * cotangent[:, None]
        return d_user, d_table, None, None


def _is_uniform(cotangent: Tensor) -> bool:
    """Whether all rows `[T]` are known to have one cotangent: what a sum sends back is one number in memory."""
    return cotangent.stride(0) == 0 or (cotangent.device.type == "cpu" and bool((cotangent == cotangent[0]).all()))


def _table_gradient(user: Tensor, item_table: Tensor, target: Tensor, cotangent: Tensor) -> Tensor:
    """Gradient of the item table for a cotangent that differs between rows, again by chunks."""
    gradient = torch.zeros_like(item_table)
    for start in range(0, len(user), _CHUNK):
        rows = slice(start, start + _CHUNK)
        probability = torch.softmax(user[rows] @ item_table.T, 1)
        gradient.addmm_(probability.T, user[rows] * cotangent[rows, None])
    return gradient.index_add_(0, target, -user * cotangent[:, None])
