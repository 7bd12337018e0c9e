"""Which items of a teacher's lists, and which besides, a step learns from. All draws are torch's, anew at each step.

A place is a 0-based rank in the teacher's list, `[T, K]` lists have their best item at place 0.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lit_llmers.callbacks.teacher_lists import of_drawn
from lit_llmers.data.loader import Batch
from lit_llmers.losses.ranking import estimated_rank
from lit_llmers.losses.scores import in_memory

Met = tuple[Tensor, Tensor]  # `[P]` numbers of targets, ascending, and `[P]` items that do not compete there; item 0 is none

_TOGETHER = 16  # neighbouring targets that share the items drawn from the catalogue
_CELLS = {"cpu": 2**20, "other": 2**26}  # of a table of draws x items in memory at once
_ROWS = 64  # targets whose scores of the whole catalogue are in memory at once


# ---- items of the list -------------------------------------------------------------------------------------------------


def draw_places(log_weight: Tensor, valid: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Draw places of each list without replacement, each next one in proportion to the weights of those left.

    Args:
        log_weight: `[T, K]` or `[K]`; -inf is never drawn.
        valid: `[T, K]`; what is false is never drawn.
        number: how many, at most K.

    Returns:
        places `[T, number]`, ascending, and `[T, number]` which of them were drawn: the first ones, and all of them unless a
        list has fewer places with a weight.
    """
    number = min(number, valid.shape[1])
    waiting = torch.rand(valid.shape, device=valid.device).neg_().log1p_().neg_().clamp_(min=1e-30)  # exponential, but faster
    key = torch.where(valid, log_weight - waiting.log_(), -torch.inf)  # the largest are the draw (Efraimidis and Spirakis)
    least = _sorted(key)[:, -number:].select(1, 0).clamp(min=torch.finfo(key.dtype).min)
    taken = key >= least[:, None]
    column = taken.cumsum(1).clamp_(max=number).mul_(taken)  # 1..number, 0 for what is not taken
    every = torch.arange(key.shape[1], device=key.device).expand_as(key)
    place = column.new_zeros(len(key), number + 1).scatter_(1, column, every)
    drawn = torch.arange(number, device=key.device) < taken.sum(1, keepdim=True)
    return place[:, 1:].masked_fill(~drawn, 0), drawn


def rank_log_weight(length: int, temperature: float, device: torch.device | None = None) -> Tensor:
    """`-r / temperature` for r = 1 .. length: items high in the list are likelier (RRD, CIKM 2020; CD, ICDM 2019)."""
    return -torch.arange(1, length + 1, device=device) / temperature


def discrepancy_log_weight(rank: Tensor, place: Tensor, epsilon: float) -> Tensor:
    """`log tanh(max(0, epsilon (r_S - r_T)))`: what the student ranks too low, the more so the likelier (DCD, CIKM 2021).

    Args:
        rank: `[T, K]` the student's rank of each listed item.
        place: `[T, K]` or `[K]` the teacher's. Negated, both give what the student ranks too high.
    """
    return torch.tanh(epsilon * (rank - place)).clamp(min=0).log()


def met_before(batch: Batch, drawn: Tensor | None = None) -> Met:
    """What each target's student has met by then, which no teacher's list has.

    Of a row those are the items before the target. A pair has no before: it is all that its user has met in training.
    """
    if "items" not in batch:
        return batch["seen_row"], batch["seen_item"]
    if batch["target"].dim() == 1:
        return _one_by_one(of_drawn(batch["items"], drawn))
    row, last = of_drawn(batch["target"].nonzero(), drawn).unbind(1)  # the item at a target's own position comes before it
    items = batch["items"].index_select(0, row)
    return _one_by_one(items.masked_fill_(torch.arange(items.shape[1], device=items.device) > last[:, None], 0))


def _one_by_one(items: Tensor) -> Met:
    """Those of rows `[T, L]`."""
    return torch.arange(len(items), device=items.device)[:, None].expand_as(items).reshape(-1), items.reshape(-1)


def _cut(met: Met, targets: int, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """So many targets at a time: which, and of those their places among them `[p]` and the items `[p]`."""
    starts = range(0, targets, size)
    target, item = met
    ends = torch.searchsorted(target.contiguous(), torch.tensor([*starts, targets], device=target.device)).tolist()
    for number, start in enumerate(starts):
        own = slice(ends[number], ends[number + 1])
        yield slice(start, start + size), target[own] - start, item[own]


def student_ranks(
    user: Tensor,
    item_table: Tensor,
    items: Tensor,
    listed: Tensor,
    met: Met,
    samples: int | None,
    deepest: int,
) -> Tensor:
    """The student's own 0-based rank of listed items among the items that were not met: `[T, K]`, without gradient.

    Args:
        user: `[T, d]`.
        item_table: `[n+1, d]`.
        items: `[T, K]`.
        listed: `[T, K]` their scores.
        met: what does not compete.
        samples: random items, the same for all targets, that the rank is estimated from; None: the exact rank, from the
            scores of the whole catalogue.
        deepest: exact ranks from this on count as it, so that not all of a row need be put in order.
    """
    user, item_table = user.detach().to(listed.dtype), item_table.detach().to(listed.dtype)
    n_items = len(item_table) - 1
    if samples is not None:
        drawn = torch.randint(1, n_items + 1, (samples,), device=user.device)
        scores = _products(user, item_table[drawn])  # [T, M]
        column = drawn.new_full((n_items + 1,), samples)  # where an item was drawn, samples: nowhere
        column[drawn] = torch.arange(samples, device=drawn.device)
        hit = torch.zeros(len(user), samples + 1, dtype=torch.bool, device=user.device)
        _mark(hit, met[0], column.index_select(0, met[1]), True)
        scores = scores.masked_fill_(hit[:, column[drawn]], -torch.inf)  # a repeated item has one column
        return estimated_rank(listed, scores, n_items)
    rank = torch.empty_like(listed)
    for rows, target, item in _cut(met, len(user), _ROWS):
        scores = _products(user[rows], item_table)  # [c, n+1]
        own = scores.gather(1, items[rows])  # rounded as the others are
        scores[:, 0] = -torch.inf
        _mark(scores, target, item, -torch.inf)
        best = _best(scores, deepest)
        rank[rows] = (best.shape[1] - torch.searchsorted(best, own, right=True)).clamp_(max=deepest).to(rank.dtype)
    return rank


def _mark(table: Tensor, row: Tensor, column: Tensor, value: float) -> None:
    """Set these cells of a table, in place."""
    table.view(-1).index_fill_(0, row * table.shape[1] + column, value)


def _products(user: Tensor, items: Tensor) -> Tensor:
    """Scores of all items for all users, in full precision: in bf16 most ranks would be others."""
    with torch.autocast(user.device.type, enabled=False):
        return user @ items.T


def _best(scores: Tensor, number: int) -> Tensor:
    """The so many best scores of each row `[c, n]`, ascending; on a CPU the rows are put in another order."""
    number = min(number, scores.shape[1])
    if not in_memory(scores):
        return scores.topk(number).values.flip(1)
    scores.numpy().partition(-number, axis=1)
    return _sorted(scores[:, -number:])


def _sorted(rows: Tensor) -> Tensor:
    """Each row ascending. On a CPU by NumPy, which takes a twentieth of torch's time."""
    return torch.from_numpy(np.sort(rows.numpy(), axis=1)) if in_memory(rows) else rows.sort(1).values


# ---- pairs within groups of like popularity ----------------------------------------------------------------------------


def popularity_groups(popularity: Tensor, groups: int) -> Tensor:
    """Cut the items, most popular first, into groups of about equally many training interactions.

    Source: UnKD, WSDM 2023, and its code: a group is full when the next item would bring it above the total / groups, and a
    last group with at most half of that joins the one before. So there may be fewer groups, or more. Items without any
    interaction are in the last.

    Args:
        popularity: `[n+1]` training interactions; index 0 is padding.
        groups: how many are wanted.

    Returns:
        `[n+1]` int64 group of each item, 0 the most popular, -1 for the padding.
    """
    count, order = popularity[1:].long().cpu().sort(descending=True, stable=True)
    total = count.cumsum(0)
    full = int(total[-1]) / groups
    group_of, start, group, before = torch.empty_like(count), 0, -1, 0
    while start < len(count):
        stop = max(start + 1, int(torch.searchsorted(total, before + full, right=True)))
        if group < 0 or stop < len(count) or int(total[-1]) - before > full / 2:
            group += 1
        group_of[order[start:stop]] = group
        start, before = stop, int(total[stop - 1])
    return torch.cat([group_of.new_full((1,), -1), group_of]).to(popularity.device)


def group_quotas(popularity: Tensor, group_of: Tensor, pairs: int, power: float) -> list[int]:
    """How many of the pairs each group gets, as UnKD's code has it: the less popular, the more.

    Args:
        popularity: `[n+1]`.
        group_of: `[n+1]`, see `popularity_groups`.
        pairs: in all. The quotas are rounded, and may add up to a few more.
        power: 0 gives all groups alike (its default `lamda`), 1 the full difference.
    """
    count = int(group_of.max()) + 1
    average = torch.stack([popularity[group_of == group].double().mean() for group in range(count)])
    share = average.max() + average.min() - average
    share = (share / share.sum().clamp(min=1e-9)).mul(100).round().div(100).clamp(min=0.1) ** power
    quotas = [round(x * pairs) for x in (share / share.sum()).tolist()]
    lacking = pairs - sum(quotas)
    return [quota + (group < lacking) for group, quota in enumerate(quotas)]


def draw_pairs(group: Tensor, quotas: list[int], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pairs of places within each group, both in proportion to `e^(-r / temperature)`, r = 1, 2, ... within the group.

    UnKD redraws until no pair has the same place twice; here such a pair, and those of a group without two items in the list,
    do not count.

    Args:
        group: `[T, K]` group of each listed item, -1 for none.
        quotas: pairs of each group.

    Returns:
        `[T, P]` places of the better and of the worse item, and which of the pairs count.
    """
    first, second, real = [], [], []
    for number, quota in enumerate(quotas):
        if not quota:  # there are fewer pairs than groups
            continue
        member = group == number
        rank = member.cumsum(1)  # 1 for its first
        weight = torch.exp(-rank / temperature) * member
        total = weight.cumsum(1)
        uniform = torch.rand(len(group), 2 * quota, device=group.device) * total[:, -1:]
        place = torch.searchsorted(total, uniform, right=True).clamp_(max=group.shape[1] - 1)
        one, other = place.split(quota, 1)
        first.append(torch.minimum(one, other))
        second.append(torch.maximum(one, other))
        real.append((one != other) & member.gather(1, place).view(len(group), 2, quota).all(1))
    return torch.cat(first, 1), torch.cat(second, 1), torch.cat(real, 1)


# ---- items off the list ------------------------------------------------------------------------------------------------


def met_items(batch: Batch, drawn: Tensor | None = None) -> Met:
    """What each target's user is known to have met: the row and the target, or all that a pair's user has in training."""
    if "items" not in batch:
        return batch["seen_row"], batch["seen_item"]
    target = batch["target"]
    rows = None
    if target.dim() == 2:
        rows = target.nonzero()[:, 0]
        met = torch.cat([batch["items"], target[:, -1:]], 1)  # every target but the last is an item of the row
    else:
        met = torch.cat([batch["items"], target[:, None]], 1)
    if drawn is not None:
        rows = drawn if rows is None else rows[drawn]
    return _one_by_one(met if rows is None else met.index_select(0, rows))


def draw_others(listed: Tensor, met: Met, number: int, n_items: int) -> tuple[Tensor, Tensor]:
    """Draw items uniformly, with replacement; what is in the list or was met does not count.

    As many neighbouring targets as `_TOGETHER` share a draw: their scores then are a matrix product, at a tenth of the cost.

    Args:
        listed: `[T, K]` items of each target's list, 0 fills up.
        met: the others that are no candidates.
        number: N.
        n_items: n.

    Returns:
        `[R, N]` items 1..n, those of target t in row `t // ceil(T / R)`; and which of them count, `[T, N]`.
    """
    targets, device = len(listed), listed.device
    draws = -(-targets // _TOGETHER)
    together = -(-targets // draws)
    drawn = torch.randint(1, n_items + 1, (draws, number), device=device)
    free = torch.empty(targets, number, dtype=torch.bool, device=device)
    step = max(1, _CELLS["cpu" if device.type == "cpu" else "other"] // (n_items + 1))
    for start, (part, target, item) in zip(range(0, draws, step), _cut(met, targets, step * together), strict=True):
        own, lists = drawn[start : start + step], listed[part]
        column = own.new_full((len(own), n_items + 1), number)  # where an item was drawn, number: nowhere
        column.scatter_(1, own, torch.arange(number, device=device).expand_as(own))
        row = torch.arange(len(lists), device=device).div(together, rounding_mode="floor")
        first = row * (n_items + 1)
        hit = free.new_zeros(len(row), number + 1)
        hit.scatter_(1, column.view(-1).take(lists + first[:, None]), True)
        _mark(hit, target, column.view(-1).index_select(0, first.index_select(0, target).add_(item)), True)
        free[part] = ~hit.gather(1, column.gather(1, own)[row])  # a repeated item has one column
    return drawn, free
