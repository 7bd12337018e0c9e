"""Where a model puts the target of each row among all items, or among stored candidates, and which items it puts first.

A rank is 0-based and fractional: the number of candidates that score above the target plus half of those that tie with
it. A model that scores all items alike therefore lands in the middle of the catalogue, and never first.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_llmers.errors import UserError

_TILE = 192  # columns of a product are a multiple of it: 24 and 48 (AVX-512), 16, 32, 64 and 96 divide it
_BLOCK = {"cpu": (128, 64 * _TILE), "other": (512, 1024 * _TILE)}  # users and items scored at a time: 6 MB, 400 MB


class Catalogue:
    """Item vectors made ready for ranking, once for many batches of users.

    How a matrix product rounds a cell depends on the shape of the matrices, and the rows and columns that do not fill a tile
    of the processor's kernel are rounded differently from the rest. So items are multiplied in blocks of a multiple of
    `_TILE` columns, which the kernels' tiles divide, with always the same number of users: then a score depends on its two
    vectors alone. Items with equal vectors tie wherever they stand, and a rank does not change with the batch around it.

    Args:
        item_table: `[n+1, d]` item vectors, row 0 is padding. Half precision becomes float32.

    Attributes:
        table: `[n+1, d]`.
        users: rows of a product.
        items: items of a block; the last may have fewer.
        blocks: the table cut by rows, the last filled up with zeros to a multiple of `_TILE`.
        buffer: for the scores of one block, kept because fresh memory costs as much as a pass over it.

    Raises:
        UserError: a vector is NaN or infinite.
    """

    def __init__(self, item_table: Tensor) -> None:
        self.table = item_table.detach().to(torch.promote_types(item_table.dtype, torch.float32))
        self._largest = _largest(self.table)
        if not torch.isfinite(self._largest):
            raise _diverged("item vectors")
        self.users, self.items = _BLOCK["cpu" if self.table.device.type == "cpu" else "other"]
        self.blocks = list(self.table.split(self.items))
        self.blocks[-1] = F.pad(self.blocks[-1], (0, 0, 0, -len(self.table) % _TILE))
        self.buffer = self.table.new_empty(self.users * max(map(len, self.blocks)))

    def __len__(self) -> int:
        return len(self.table)

    def readable(self, user: Tensor) -> Tensor:
        """The user vectors `[B, d]` in the items' precision, proven to give finite scores: `|s| <= d max|u| max|v|`.

        Raises:
            UserError: a vector is NaN or infinite, or a score may overflow.
        """
        user = user.detach().to(self.table.dtype)
        largest = _largest(user)
        if not user.shape[1] * largest * self._largest < torch.finfo(user.dtype).max:  # also where it is NaN
            raise _diverged("scores" if torch.isfinite(largest) else "user vectors")
        return user

    def scores_of(self, user: Tensor, item: Tensor) -> Tensor:
        """The score of one item `[B]` for each user `[B, d]`, rounded as in a block: `[B, 1]`."""
        fill = -len(user) % self.users
        users, own = F.pad(user, (0, 0, 0, fill)).split(self.users), F.pad(item, (0, fill)).split(self.users)
        scores = user.new_empty(len(users), self.users)
        product = user.new_empty(self.users, self.users + -self.users % _TILE)
        for line, some, columns in zip(scores, users, own, strict=True):
            vectors = self.table[F.pad(columns, (0, -self.users % _TILE))]
            line.copy_(torch.mm(some, vectors.T, out=product).diagonal())  # out: not what autocast would make of it
        return scores.view(-1, 1)[: len(user)]


@torch.no_grad()
def target_ranks(
    user: Tensor,
    items: Tensor | Catalogue,
    target: Tensor,
    seen_row: Tensor | None = None,
    seen_item: Tensor | None = None,
) -> Tensor:
    """Rank each row's target among all items 1..n that are not in its history, by counting; ties count half, exactly.

    Nothing is sorted. The scores of some users and some items at a time fill a reused buffer, what is no candidate becomes
    -inf, and with s = sign(score - target's score) a rank is #(s = 1) + #(s = 0) / 2 = (cells + sum of s) / 2: three passes
    over a buffer that stays in the cache.

    Args:
        user: `[B, d]` user vectors.
        items: `[n+1, d]` item vectors, or the `Catalogue` made of them, to make it once for many batches. Item 0 is padding
            and never a candidate.
        target: `[B]` item index 1..n. It stays in the ranking even where the history names it.
        seen_row: `[P]`, in any order: row `seen_row[p]` has `seen_item[p]` in its history.
        seen_item: `[P]`; item 0 is ignored.

    Returns:
        `[B]` float32, 0 for a target above all others.

    Raises:
        UserError: the model gives NaN or infinite scores.
        ValueError: an index is out of range.
    """
    items = items if isinstance(items, Catalogue) else Catalogue(items)
    user = items.readable(user)
    _check_items(target, 1, len(items), "target")
    total = user.new_zeros(len(user))
    hidden = [_seen(seen_row, seen_item, len(user), len(items), target), _with_padding(target)]
    for rows, _, scores, own in _scored(user, items, hidden, target):
        total[rows].add_(_signs(scores, own))
    return ((total + len(items)) / 2).float()


@torch.no_grad()
def candidate_ranks(user: Tensor, items: Tensor | Catalogue, target: Tensor, candidates: Tensor) -> Tensor:
    """Rank each row's target among its own candidates; ties count half, as in `target_ranks`.

    Args:
        user: `[B, d]` user vectors.
        items: `[n+1, d]` item vectors, or the `Catalogue` made of them.
        target: `[B]` item index 1..n.
        candidates: `[B, N]` item indices; 0 and the target itself are skipped.

    Returns:
        `[B]` float32. Memory is that of 2^23 values or of one row's candidates, whatever B is.

    Raises:
        UserError: the model gives NaN or infinite scores.
        ValueError: an index is out of range.
    """
    items = items if isinstance(items, Catalogue) else Catalogue(items)
    user = items.readable(user)
    _check_items(target, 1, len(items), "target")
    _check_items(candidates, 0, len(items), "candidate")
    ranks = torch.empty(len(user), dtype=torch.float32, device=user.device)
    step = max(1, 2**23 // (user.shape[1] * (candidates.shape[1] + 1)))
    for start in range(0, len(user), step):
        rows = slice(start, start + step)
        ids = torch.cat([target[rows, None], candidates[rows]], 1).long()  # [step, 1+N]
        scores = items.table[ids].mul_(user[rows, None]).sum(2)  # a matrix product would round equal vectors differently
        own = scores[:, :1].clone()
        scores.masked_fill_((ids == 0) | (ids == ids[:, :1]), -torch.inf)
        ranks[rows] = ((_signs(scores, own) + scores.shape[1]) / 2).float()
    return ranks


@torch.no_grad()
def top_items(
    user: Tensor,
    items: Tensor | Catalogue,
    k: int,
    seen_row: Tensor | None = None,
    seen_item: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best items of each row that are not in its history, best first; other arguments as in `target_ranks`.

    Which of two items with equal scores comes first is not defined. Memory does not grow with users x items.

    Returns:
        `[B, k]` item indices, 0 where a row has fewer than k candidates, and `[B, k]` their scores, there -inf.
    """
    items = items if isinstance(items, Catalogue) else Catalogue(items)
    user = items.readable(user)
    best = user.new_full((len(user), k), -torch.inf)
    found = torch.zeros(len(user), k, dtype=torch.long, device=user.device)
    padding = torch.zeros(len(user), dtype=torch.long, device=user.device)
    hidden = [_seen(seen_row, seen_item, len(user), len(items), padding), _with_padding(padding)]
    for rows, first, scores, _ in _scored(user, items, hidden):
        value, column = scores.topk(min(k, scores.shape[1]), 1)
        best[rows], order = torch.cat([best[rows], value], 1).topk(k, 1)
        found[rows] = torch.cat([found[rows], column + first], 1).gather(1, order)
    return found.masked_fill_(best == -torch.inf, 0), best


def _scored(
    user: Tensor, items: Catalogue, hidden: list[tuple[Tensor, Tensor]], target: Tensor | None = None
) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Scores of all users for all items in blocks that share one buffer, with -inf for what is no candidate.

    Args:
        hidden: pairs of rows, ascending, and items that are no candidates.

    Yields:
        rows, first, scores, own: `scores` `[b, w]` of the users `rows` for the items `first .. first+w-1`, to be overwritten
        at will; `own` `[b, 1]` are the scores of their targets (no targets: empty).
    """
    step, count = items.users, len(user)
    if not count:
        return
    whole = len(items.blocks) == 1
    wanted = user.new_empty(count, 0, dtype=torch.long) if target is None else target[:, None]
    own = wanted.to(user.dtype) if target is None or whole else items.scores_of(user, target)
    rows = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    users = F.pad(user, (0, 0, 0, -count % step)).split(step)
    for first, block in zip(range(0, len(items), items.items), items.blocks, strict=True):
        width, real = len(block), min(len(block), len(items) - first)
        flat = items.buffer[: step * width]
        scores = flat.view(step, width)
        span = None if whole else (first, first + width)
        cells = zip(*(_cells(row, item, span, step, width, len(rows)) for row, item in hidden), strict=True)
        for place, chunk, column, reference, hide in zip(rows, users, wanted.split(step), own.split(step), cells, strict=True):
            torch.mm(chunk, block.T, out=scores)
            if whole and target is not None:
                reference = scores.gather(1, column)
            for cell in hide:
                flat.index_fill_(0, cell, -torch.inf)
            yield place, first, scores[: place.stop - place.start, :real], reference


def _cells(row: Tensor, item: Tensor, span: tuple[int, int] | None, step: int, width: int, blocks: int) -> tuple[Tensor, ...]:
    """For each of the blocks `[step, width]` the flat places of the pairs that have an item in `span` (None: in any)."""
    if span is not None:
        inside = ((item >= span[0]) & (item < span[1])).nonzero().squeeze(1)
        row, item = row[inside], item[inside] - span[0]
    bounds = torch.searchsorted(row, torch.arange(blocks, device=row.device)[1:] * step)
    return torch.tensor_split(row % step * width + item, bounds.cpu())


def _signs(scores: Tensor, own: Tensor) -> Tensor:
    """Cells above `own` minus cells below it in each row: `[b, w]` (overwritten) and `[b, 1]` -> `[b]`."""
    return scores.sub_(own).sign_().sum(1)


def _with_padding(item: Tensor) -> tuple[Tensor, Tensor]:
    """In each row the item `[B]` and item 0, as pairs of rows and items `[2 B]`."""
    row = torch.arange(len(item), device=item.device)
    return row.repeat_interleave(2), torch.stack([item, torch.zeros_like(item)], 1).flatten()


def _seen(row: Tensor | None, item: Tensor | None, rows: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The checked pairs of the history, rows ascending; where there are none, nothing like `like`."""
    if row is None or item is None or len(row) == 0:
        return like[:0], like[:0]
    _check_items(item, 0, width, "seen item")
    if (row[1:] < row[:-1]).any():
        row, order = row.sort()
        item = item[order]
    if not 0 <= int(row[0]) <= int(row[-1]) < rows:
        raise ValueError(f"a seen row lies outside of 0..{rows - 1}")
    return row.contiguous(), item


def _check_items(items: Tensor, lowest: int, width: int, what: str) -> None:
    if items.numel() and not lowest <= int(items.min()) <= int(items.max()) < width:
        raise ValueError(f"a {what} lies outside of {lowest}..{width - 1}: {int(items.min())}..{int(items.max())}")


def _largest(vectors: Tensor) -> Tensor:
    """The largest absolute value, NaN if there is one; 0 of nothing."""
    return torch.stack(vectors.aminmax()).abs().max() if vectors.numel() else vectors.new_zeros(())


def _diverged(what: str) -> UserError:
    return UserError(
        f"The model gives {what} that are NaN, infinite or too large, so its items cannot be ranked. The training "
        "diverged: lower optimizer.lr, or use trainer.precision=32-true."
    )
