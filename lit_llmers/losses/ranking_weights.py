"""How much each item of a teacher's list counts: by its place, by the teacher's confidence and by how the student ranks it.

Lists are `[T, K]`, of T targets and K items. Where `valid` is false an entry only fills up a list that is too short and weighs
nothing. No gradient reaches a weight.
"""

import math

import torch
from torch import Tensor

FLOOR = 1e-8  # DLLM2Rec adds it to confidence and consistency, so that weights never sum to zero


def position_weights(
    valid: Tensor, steepness: float, place: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`e^(-r / steepness) / sum of it`, r = 1, 2, ... the teacher's rank (RD; DLLM2Rec's w^p).

    Args:
        valid: `[T, K]`.
        place: `[T, K]` 0-based ranks in the teacher's list; None: the entries are its first.

    Returns:
        `[T, K]`, of sum 1 where a list is not empty.
    """
    place = torch.arange(valid.shape[1], device=valid.device).expand_as(valid) if place is None else place
    place = place.to(dtype).masked_fill(~valid, torch.inf)
    best = place.amin(1, keepdim=True).nan_to_num(posinf=0.0)  # far down a list all would be 0
    return _normalised(torch.exp((best - place) / steepness))


def scaled_distance(scores: Tensor, valid: Tensor) -> Tensor:
    """How far each item of a list is from its best: 0 for the best, 1 for the worst, all 0 where they are equal.

    Source: min-max scaling as BIGRec's (arXiv 2308.08434), which takes its extremes from the distances of the whole catalogue.
    A record has a list and no more, so the worst of the list is 1 here, where it would be but little above the best there.

    Args:
        scores: `[T, K]` of the teacher, higher is better, in any unit.
        valid: `[T, K]`.

    Returns:
        `[T, K]`, inf where not `valid`.
    """
    scores = scores.detach()
    best = scores.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    worst = scores.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    distance = (best - scores) / (best - worst).clamp(min=torch.finfo(scores.dtype).tiny)
    return distance.masked_fill(~valid, torch.inf)


def confidence_weights(scores: Tensor, valid: Tensor, raw: bool = False, distance: Tensor | None = None) -> Tensor:
    """`e^(-d) / sum of it`, d the teacher's distance (DLLM2Rec's w^c); a score is the distance with its sign changed.

    By default the distances of a list are scaled to 0..1 (best to worst) first, see `scaled_distance`: raw Euclidean distances
    of LLM states are so large that every `e^(-d)` is below the constant 1e-8 that is added to it, and the weights of a list are
    all equal. Scaled ones also serve where scores are logits.

    Args:
        scores: `[T, K]` of the teacher, higher is better.
        valid: `[T, K]`.
        raw: as the official code does: no scaling, and 1e-8 added; see `below_floor`.
        distance: `[T, K]` scaled over longer lists, which these were drawn from; None: over these.

    Returns:
        `[T, K]`, of sum 1 where a list is not empty.
    """
    if not raw:
        distance = scaled_distance(scores, valid) if distance is None else distance.masked_fill(~valid, torch.inf)
        return _normalised(torch.exp(-distance))
    scores = scores.detach().masked_fill(~valid, -torch.inf)
    exponent = scores - scores.amax(1, keepdim=True).clamp(min=0)  # scores above 0 are no distances and might overflow
    return _normalised((exponent.exp() + FLOOR) * valid)


def below_floor(scores: Tensor, valid: Tensor) -> Tensor:
    """Which lists have nothing but scores s of `e^s < 1e-8`, below -18.4, of which raw confidence weighs all items alike.

    Returns:
        `[T]` bool, false for an empty list.
    """
    return valid.any(1) & ~(valid & (scores > math.log(FLOOR))).any(1)


def consistency_weights(rank: Tensor, k: int, valid: Tensor) -> Tensor:
    """1 where the student's rank is among its own first k, plus 1e-8 (DLLM2Rec's w^o, which is not normalised): `[T, K]`."""
    return ((rank < k).to(rank.dtype) + FLOOR) * valid


def discrepancy_weights(rank: Tensor, place: Tensor, mu: float) -> Tensor:
    """`max(0, tanh(mu * (student's rank - teacher's rank)))`, both 0-based, `[T, K]` (RD)."""
    return torch.tanh(mu * (rank - place)).clamp(min=0)


def combine(weights: dict[str, Tensor], factors: dict[str, float], how: str, normalise: bool) -> Tensor:
    """One weight `[T, K]` from several: `sum` of factor * weight (DLLM2Rec) or their `product` (RD).

    Args:
        weights: `[T, K]` each, by name.
        factors: by the same names.
        normalise: divide by the sum over each list (DLLM2Rec; RD's official code does not).
    """
    scaled = [factors[name] * weight for name, weight in weights.items()]
    total = scaled[0]
    for weight in scaled[1:]:
        total = total + weight if how == "sum" else total * weight
    return _normalised(total) if normalise else total


def _normalised(weight: Tensor) -> Tensor:
    total = weight.sum(1, keepdim=True)
    return weight / total.masked_fill(total == 0, 1)
