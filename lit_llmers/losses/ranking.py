"""Ranking distillation: a student learns from the list of items that a teacher ranks best. One value per target, in nats.

Lists are best first. Where `valid` is false an entry only fills up a list that is too short: it weighs nothing. Weights carry
no gradient, and neither does anything that the teacher said.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_llmers.losses.task import cross_entropy

_ROWS = 128  # rows whose scores of the whole catalogue are in memory at once
_COMPARED = 2**20  # cells of comparisons in memory at once
_DEEPEST = -700.0  # of differences between scores: exp is above zero in float64


def estimated_rank(listed: Tensor, drawn: Tensor, n_items: int) -> Tensor:
    """The student's 0-based rank of listed items, from items drawn at random: `floor((n - 1) * share that scores above)`.

    Source: RD, Tang and Wang, "Ranking Distillation: Learning Compact Ranking Models With High Performance for Recommender
    System", KDD 2018 (arXiv 1809.07428).

    Args:
        listed: `[T, K]` the student's scores.
        drawn: `[T, M]` its scores of random items.

    Returns:
        `[T, K]` whole numbers, without gradient. They are `(n - 1) / M` apart.
    """
    listed, drawn = listed.detach(), drawn.detach()
    above = torch.empty_like(listed)
    step = min(len(listed), max(1, _COMPARED // (listed.shape[1] * drawn.shape[1])))
    buffer = drawn.new_empty(step, listed.shape[1], drawn.shape[1])
    for start in range(0, len(listed), step):
        rows = slice(start, start + step)
        higher = torch.gt(drawn[rows, None], listed[rows, :, None], out=buffer[: len(listed[rows])])
        torch.sum(higher, 2, out=above[rows])
    return ((n_items - 1) * above / drawn.shape[1]).floor_()


# ---- losses ------------------------------------------------------------------------------------------------------------


def list_bce(
    listed: Tensor,
    weight: Tensor,
    negative: Tensor | None = None,
    free: Tensor | None = None,
    official_negative_term: bool = False,
) -> Tensor:
    """`sum_r w_r (-log sigmoid(s_r) - log(1 - sigmoid(s-)))`: the listed items are positives, as much as they weigh.

    Source: RD (KDD 2018), without negatives; DLLM2Rec, "Distillation Matters: Empowering Sequential Recommenders to
    Match the Performance of Large Language Models", RecSys 2024 (arXiv 2405.00338), with one.

    Args:
        listed: `[T, K]` the student's scores.
        weight: `[T, K]`; 0 where an entry only fills up.
        negative: `[T, N]` scores of items off the list, whose term is their mean; None: RD, without it.
        free: `[T, N]` which of them count; None: all.
        official_negative_term: DLLM2Rec's official code has `-log sigmoid(1 - s-)` instead, which is a slip: it pushes a
            negative down to 1 and not to 0. For reproducing its figures.

    Returns:
        `[T]`.
    """
    weight = weight.detach()
    loss = (weight * F.softplus(-listed)).sum(1)
    if negative is None:
        return loss
    miss = F.softplus(negative - 1 if official_negative_term else negative)
    return loss + weight.sum(1) * counted_mean(miss, free)


def propensity(popularity: Tensor, power: float = 0.05) -> Tensor:
    """DROS's propensity `((f_j + 1) / sum_i (f_i + 1))^power`, not renormalised: `[n]` counts without padding -> `[n]`."""
    share = popularity.double() + 1
    return (share / share.sum()) ** power


def log_energy(user: Tensor, item_table: Tensor, propensity: Tensor, beta: float = 1.0) -> Tensor:
    """`log sum_j e^(p_j s_j^2 / beta)` over the catalogue, by which DROS weighs its worst case: a pass over all scores.

    Args:
        user: `[T, d]`.
        item_table: `[n, d]` (no padding row).
        propensity: `[n]`.
        beta: radius of the distributions that are considered.

    Returns:
        `[T]`. Gradients recompute the scores, so that memory does not grow with targets x items.
    """

    def of(rows: Tensor, table: Tensor) -> Tensor:
        return ((rows @ table.T).square() * (propensity / beta)).logsumexp(1)

    pieces = user.split(_ROWS)
    with torch.autocast(user.device.type, enabled=False):  # half precision would be nats off
        return torch.cat([checkpoint(of, piece, item_table, use_reentrant=False, preserve_rng_state=False) for piece in pieces])


def dros(listed: Tensor, own: Tensor, energy: Tensor, beta: float = 1.0) -> Tensor:
    """Distributionally robust loss of each listed item c as if it were the target.

    `log(sum_j e^(p_j s_j^2 / beta) - e^(p_c s_c^2 / beta) + e^(p_c (s_c - 1)^2 / beta))`. Source: Yang et al., "A Generic
    Learning Framework for Sequential Recommendation with Distribution Shifts", SIGIR 2023, as in DLLM2Rec's code.

    Args:
        listed: `[T, K]` the student's scores s_c.
        own: `[T, K]` their propensities p_c.
        energy: `[T]` see `log_energy`.

    Returns:
        `[T, K]`.
    """
    share = (own * listed.square() / beta - energy[:, None]).clamp(max=-torch.finfo(listed.dtype).eps)
    return energy[:, None] + torch.logaddexp(torch.log1p(-share.exp()), own * (listed - 1).square() / beta - energy[:, None])


def weighted_dros(loss: Tensor, weight: Tensor, official_dros_mean: bool = False) -> Tensor:
    """`sum_r w_r L_r` of each target.

    Args:
        loss, weight: `[T, K]`.
        official_dros_mean: DLLM2Rec's official code multiplies `[B, 1]` by `[B]` and so takes the batch's mean weight for
            every target. For reproducing its figures.

    Returns:
        `[T]`.
    """
    weight = weight.detach()
    return ((weight.mean(0) if official_dros_mean else weight) * loss).sum(1)


def relaxed_listwise(interesting: Tensor, others: Tensor, valid: Tensor | None = None, free: Tensor | None = None) -> Tensor:
    """`-sum_k (s_k - log(sum_{i >= k} e^s_i + sum_j e^s_j))`: the list in its order, above all others in none.

    Source: RRD, Kang et al., "DE-RRD: A Knowledge Distillation Framework for Recommender System", CIKM 2020 (arXiv
    2012.04357). Differences between scores of a row above 700 count as 700.

    Args:
        interesting: `[T, K]` the student's scores, the teacher's best first.
        others: `[T, L]` scores of uninteresting items.
        valid: `[T, K]`; None: all.
        free: `[T, L]` which of the others count; None: all.

    Returns:
        `[T]`.
    """
    valid = torch.ones_like(interesting, dtype=torch.bool) if valid is None else valid
    free = torch.ones_like(others, dtype=torch.bool) if free is None else free
    both, real = torch.cat([interesting, others], 1).double(), torch.cat([valid, free], 1)
    highest = both.detach().masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    shifted = (both - highest.clamp(min=torch.finfo(interesting.dtype).min)).clamp(_DEEPEST, 0)
    score, rest = shifted.split([interesting.shape[1], others.shape[1]], 1)
    below = (score.exp() * valid).flip(1).cumsum(1).flip(1) + (rest.exp() * free).sum(1, keepdim=True)
    return ((below.masked_fill(~valid, 1).log() - score) * valid).sum(1).to(interesting.dtype)


def pairwise(better: Tensor, worse: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over the pairs of `-log sigmoid(s_better - s_worse)`, 0 without any.

    Source: UnKD, Chen et al., "Unbiased Knowledge Distillation for Recommendation", WSDM 2023 (arXiv 2211.14729),
    without the 1e-10 that its code adds inside the logarithm.

    Args:
        better, worse: `[T, P]` the student's scores.
        real: `[T, P]` which pairs count; None: all.

    Returns:
        `[T]`.
    """
    return counted_mean(F.softplus(worse - better), real)


def soft_top_k(listed: Tensor, labels: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between soft labels and the student's softmax over the teacher's list.

    With the teacher's softmax as labels (`soft_targets`) it is ListNet's top-one loss: Cao et al., "Learning to Rank: From
    Pairwise Approach to Listwise Approach", ICML 2007.

    Args:
        listed: `[T, K]` scores of the student.
        labels: `[T, K]`, 0 where not `valid`.
        valid: `[T, K]`.

    Returns:
        `[T]`; its least value is the labels' entropy.
    """
    return -(labels * _masked(listed, valid, temperature).log_softmax(1)).sum(1)


def soft_top_k_of_all(
    user: Tensor, item_table: Tensor, items: Tensor, listed: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """As `soft_top_k`, but the student's softmax is over the whole catalogue: `sum_k p_k (logsumexp(s / t) - s_k / t)`.

    Args:
        user: `[T, d]`.
        item_table: `[n+1, d]`; row 0 is padding.
        items: `[T, K]`, best first.

    Returns:
        `[T]`; 0 for an empty list. It costs what a cross-entropy over the catalogue costs.
    """
    user, item_table = user.to(listed.dtype), item_table.to(listed.dtype)
    first = (items[:, 0] - 1).clamp(min=0)
    full = cross_entropy(user / temperature, item_table[1:], first, labels.sum(1))  # sum_k p_k (logsumexp - s_0 / t)
    gap = listed[:, :1] - listed
    return full + (labels * gap).sum(1) / temperature


def soft_top_k_beside(user: Tensor, item_table: Tensor, target: Tensor, listed: Tensor, labels: Tensor) -> Tensor:
    """What `soft_top_k_of_all` has over the cross-entropy of another item under the same softmax: the target's.

    `sum_k p_k (logsumexp(s) - s_k) = sum_k p_k * (logsumexp(s) - s_target) + sum_k p_k (s_target - s_k)`. This is the second
    sum, at temperature 1; the first is the student's own loss of the target, which has been paid for.

    Args:
        user: `[T, d]`.
        item_table: `[n+1, d]`; row 0 is padding.
        target: `[T]` 1..n.
        listed, labels: `[T, K]`.

    Returns:
        `[T]`, of either sign.
    """
    own = (user.to(listed.dtype) * F.embedding(target, item_table).to(listed.dtype)).sum(1)
    return (labels * (own[:, None] - listed)).sum(1)


def soft_targets(teacher: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """The teacher's softmax over its list, `[T, K]`; all zero for an empty list."""
    return _masked(teacher.detach(), valid, temperature).softmax(1) * valid


def _masked(scores: Tensor, valid: Tensor, temperature: float) -> Tensor:
    return (scores / temperature).masked_fill(~valid, torch.finfo(scores.dtype).min)


def counted_mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean of those values `[T, K]` that count (None: all): `[T]`, 0 without any."""
    if counted is None:
        return values.mean(1)
    return (values * counted).sum(1) / counted.sum(1).clamp(min=1)
