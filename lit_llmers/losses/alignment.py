"""Contrast: an anchor is to find its positive among others. One value per anchor, in nats.

Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018 (arXiv 1807.03748), eq. 4,
with the density ratio `f(x, y) = e^(sim(x, y) / temperature)` of the methods that use it here.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_llmers.losses.task import cross_entropy


def info_nce(
    anchor: Tensor, positive: Tensor, negatives: Tensor | None = None, *, temperature: float, cosine: bool = True
) -> Tensor:
    """`-log(f(x, y+) / (f(x, y+) + sum over the negatives of f(x, y-)))`.

    Args:
        anchor: `[B, d]`.
        positive: `[B, d]`, one for each anchor.
        negatives: `[N, d]`, shared by all anchors and without their positives; None takes the other rows of `positive`.
        temperature: divides the similarities.
        cosine: similarity is the cosine; otherwise the dot product.

    Returns:
        `[B]`; 0 for a single anchor without negatives.
    """
    if negatives is None:
        return info_nce_among(anchor, positive, temperature=temperature, cosine=cosine)
    if cosine:
        anchor, positive, negatives = (F.normalize(x, dim=-1) for x in (anchor, positive, negatives))
    anchor = anchor / temperature
    return -F.logsigmoid((anchor * positive).sum(1) - (anchor @ negatives.T).logsumexp(1))


def info_nce_among(
    anchor: Tensor,
    candidates: Tensor,
    own: Tensor | None = None,
    excluded: Tensor | None = None,
    *,
    temperature: float,
    cosine: bool = True,
) -> Tensor:
    """InfoNCE where the positives stand among the candidates: all other candidates are an anchor's negatives.

    SGL's contrast takes all users (or items) of the other view as candidates, with `own` the users of the batch; CL4SRec's
    takes all views of the batch, and excludes the anchor from its own candidates. Without `excluded` memory does not grow
    with anchors x candidates.

    Args:
        anchor: `[B, d]`.
        candidates: `[N, d]`.
        own: `[B]` row of each anchor's positive among the candidates; None: anchor b has candidate b.
        excluded: `[B]` row of a candidate that is none for that anchor.
        temperature: divides the similarities.
        cosine: similarity is the cosine; otherwise the dot product.

    Returns:
        `[B]`.
    """
    if cosine:
        anchor, candidates = F.normalize(anchor, dim=-1), F.normalize(candidates, dim=-1)
    anchor = anchor / temperature
    own = torch.arange(len(anchor), device=anchor.device) if own is None else own
    if excluded is None:
        return cross_entropy(anchor, candidates, own)
    logits = (anchor @ candidates.T).scatter(1, excluded[:, None], -torch.inf)
    return F.cross_entropy(logits, own, reduction="none")
