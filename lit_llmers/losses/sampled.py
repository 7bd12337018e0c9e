"""The recommender's own loss against a sample of the catalogue: one value per target, in nats.

Which items are drawn, and how, is the caller's business (`students.negatives`). Losses over k negatives are means and not
sums, so that a learning rate serves any k; sums of the papers are named where they differ.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def sampled_softmax(
    user: Tensor, item_table: Tensor, target: Tensor, negatives: Tensor, log_q: Tensor, sparse: bool = False
) -> Tensor:
    """Softmax cross-entropy whose denominator is estimated from shared negatives, with the log-q correction.

    Source: Bengio and Senecal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language
    Model", IEEE Transactions on Neural Networks 19(4), 2008. With scores `s` the loss of a row is
    `log(e^s_target + sum over its negatives j of e^(s_j - log(K q_j))) - s_target`. The target is there by rule and not by
    chance, so it carries no correction; a negative that is the row's own target is no negative for that row. The sum is
    then an unbiased estimate of the full softmax's denominator, and exact when every item is drawn once with q = 1/n.

    Args:
        user: `[T, d]` user vectors.
        item_table: `[n+1, d]` item vectors; row 0 is padding.
        target: `[T]` item 1..n.
        negatives: `[K]` items 1..n, drawn independently, with replacement; the same for all rows.
        log_q: `[n+1]` log-probability of each item in one draw.
        sparse: the table's gradient is one of the rows that are read alone.

    Returns:
        `[T]` in float32 at least; 0 for a row whose negatives all are its target.
    """
    kind = torch.promote_types(torch.promote_types(user.dtype, item_table.dtype), torch.float32)
    ids = torch.cat([target, negatives])  # at once: each look-up's gradient is as large as the table, unless it is sparse
    own, others = F.embedding(ids, item_table, sparse=sparse).to(kind).split([len(target), len(negatives)])
    with torch.autocast(user.device.type, enabled=False):  # half precision would be a tenth of a nat off
        user = user.to(kind)
        positive = (user * own).sum(1)
        logits = torch.addmm(-log_q[negatives].to(kind) - math.log(len(negatives)), user, others.T)  # [T, K]
        logits = logits.masked_fill(negatives == target[:, None], -torch.inf)
        return -F.logsigmoid(positive - logits.logsumexp(1))


def binary(positive: Tensor, negative: Tensor) -> Tensor:
    """Binary cross-entropy of one positive and K negatives: `-(log sigmoid(s+) + sum log(1 - sigmoid(s-))) / (K + 1)`.

    Source: SASRec, "Self-Attentive Sequential Recommendation", ICDM 2018 (arXiv 1808.09781), section III-E, with one
    negative that the user has not met, where it is a sum: twice this mean. So a paper's weight of a term beside that sum is
    twice what it is here.

    Args:
        positive: `[T]` scores of the targets.
        negative: `[T, K]` scores of the negatives.

    Returns:
        `[T]`.
    """
    return _binary(positive, negative, 1.0)


def gbce(positive: Tensor, negative: Tensor, n_items: int, t: float) -> Tensor:
    """Generalised binary cross-entropy: the positive's probability is raised to a power against overconfidence.

    Source: Petrov and Macdonald, "gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative
    Sampling", RecSys 2023 (arXiv 2308.07192). `-(log sigmoid(s+)^b + sum log(1 - sigmoid(s-))) / (K + 1)` with the sampling
    rate `a = K / (n - 1)` and `b = a (t (1 - 1/a) + 1/a) = 1 - t (1 - a)`.

    Args:
        positive: `[T]` scores of the targets.
        negative: `[T, K]` scores of negatives, drawn uniformly over all items but the target.
        n_items: size of the catalogue without padding.
        t: calibration: 0 is `binary`, 1 undoes all of the overconfidence that the sampling causes.

    Returns:
        `[T]`.
    """
    rate = min(1.0, negative.shape[1] / max(1, n_items - 1))  # drawn with replacement, K may exceed the catalogue
    return _binary(positive, negative, 1 - t * (1 - rate))


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """Bayesian personalised ranking: the mean over the negatives of `-log sigmoid(s+ - s-)`.

    Source: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009 (arXiv 1205.2618), BPR-Opt
    without its L2 term.

    Args:
        positive: `[T]` scores of the targets.
        negative: `[T, K]` scores of the negatives.

    Returns:
        `[T]`.
    """
    return -F.logsigmoid(positive[:, None] - negative).mean(1)


def own_softmax(positive: Tensor, negative: Tensor) -> Tensor:
    """Softmax over a target and the negatives of its own row: `-log(e^s+ / (e^s+ + sum e^s-))`.

    Source: AlphaRec, "Language Representations Can be What Recommenders Need", ICLR 2025 (arXiv 2407.05441), with cosines over
    a temperature as scores. The negatives are drawn uniformly, so a correction would be one constant for all of them: there is
    none. In contrast to the other losses of k negatives it grows with k, by about log k.

    Args:
        positive: `[T]` scores of the targets.
        negative: `[T, K]` scores of the negatives.

    Returns:
        `[T]`.
    """
    return -F.logsigmoid(positive - negative.logsumexp(1))


def _binary(positive: Tensor, negative: Tensor, power: float) -> Tensor:
    return (F.logsigmoid(positive) * power + F.logsigmoid(-negative).sum(1)) / -(negative.shape[1] + 1)
