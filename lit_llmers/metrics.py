"""Ranking metrics from the rank of one target per row: HR@k, NDCG@k, MRR, on the full catalogue or stored candidates.

A rank is 0-based and fractional: the number of candidates that score above the target plus half of those that tie with
it. A model that scores all items alike therefore lands in the middle of the catalogue, and never first.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import Tensor

from lit_llmers.errors import UserError, unknown
from lit_llmers.files import atomic_write, read_json, sha256, write_json

KS = (1, 5, 10, 20)
CANDIDATES_VERSION = 1


@torch.no_grad()
def target_ranks(
    user: Tensor,
    item_table: Tensor,
    target: Tensor,
    seen_row: Tensor | None = None,
    seen_item: Tensor | None = None,
    chunk: int = 128,
) -> Tensor:
    """Rank each row's target among all items 1..n that are not in its history, by counting; ties count half.

    Nothing is sorted: one matrix product per chunk of rows fills a reused buffer `[chunk, n+1]`, what is no candidate
    becomes -inf, and with s = sign(score - target's score) the rank is #(s = 1) + #(s = 0) / 2 = (n+1 + sum of s) / 2.
    Half-precision inputs are multiplied in float32. Items with equal vectors tie, up to the rounding of the product.

    Args:
        user: `[B, d]` user vectors.
        item_table: `[n+1, d]` item vectors; item 0 is padding and never a candidate.
        target: `[B]` item index 1..n. It stays in the ranking even where the history names it.
        seen_row: `[P]`, in any order: row `seen_row[p]` has `seen_item[p]` in its history.
        seen_item: `[P]`; item 0 is ignored.
        chunk: rows scored at a time. Memory is `chunk * (n+1)` scores, whatever B is.

    Returns:
        `[B]` float32, 0 for a target above all others.

    Raises:
        UserError: the model gives NaN or infinite scores.
        ValueError: an index is out of range.
    """
    user, table = _finite(user, item_table)
    rows, width = len(user), len(table)
    _check_items(target, 1, width, "target")
    if rows == 0:
        return torch.empty(0, device=user.device)
    seen, bounds = _seen_cells(seen_row, seen_item, rows, width, chunk)
    chunk = min(chunk, rows)
    scores = torch.empty(chunk, width, dtype=user.dtype, device=user.device)
    ones = torch.ones(width, dtype=user.dtype, device=user.device)
    ranks = torch.empty(rows, dtype=torch.float32, device=user.device)
    for number, start in enumerate(range(0, rows, chunk)):
        stop = min(start + chunk, rows)
        part = torch.mm(user[start:stop], table.T, out=scores[: stop - start])  # [chunk, n+1]
        own = target[start:stop, None]
        reference = part.gather(1, own)
        if seen is not None:
            part.view(-1).index_fill_(0, seen[bounds[number] : bounds[number + 1]] - start * width, -torch.inf)
        ranks[start:stop] = _count_above(part, reference, own, ones)
    return ranks


@torch.no_grad()
def candidate_ranks(user: Tensor, item_table: Tensor, target: Tensor, candidates: Tensor, chunk: int = 128) -> Tensor:
    """Rank each row's target among its own candidates; ties count half, as in `target_ranks`.

    Args:
        user: `[B, d]` user vectors.
        item_table: `[n+1, d]` item vectors.
        target: `[B]` item index 1..n.
        candidates: `[B, N]` item indices; 0 and the target itself are skipped.
        chunk: rows scored at a time; memory is `chunk * N * d` values.

    Returns:
        `[B]` float32.

    Raises:
        UserError: the model gives NaN or infinite scores.
        ValueError: an index is out of range.
    """
    user, table = _finite(user, item_table)
    _check_items(target, 1, len(table), "target")
    _check_items(candidates, 0, len(table), "candidate")
    ranks = torch.empty(len(user), dtype=torch.float32, device=user.device)
    ones = torch.ones(candidates.shape[1] + 1, dtype=user.dtype, device=user.device)
    for start in range(0, len(user), chunk):
        own = target[start : start + chunk, None]
        ids = torch.cat([own, candidates[start : start + chunk]], 1).long()  # [chunk, 1+N]
        scores = torch.einsum("bd,bkd->bk", user[start : start + chunk], table[ids])
        reference = scores[:, :1].clone()
        scores.masked_fill_((ids == 0) | (ids == own), -torch.inf)
        ranks[start : start + chunk] = _count_above(scores, reference, None, ones)
    return ranks


def ranking_metrics(ranks: Tensor, ks: tuple[int, ...] = KS) -> dict[str, float]:
    """Mean HR@k and NDCG@k for each k, and MRR without cut-off, of 0-based ranks `[B]`.

    Raises:
        UserError: there are no ranks.
    """
    if len(ranks) == 0:
        raise UserError("There are no rows to evaluate. Look at the split: every user needs a held-out interaction.")
    names = [f"HR@{k}" for k in ks] + [f"NDCG@{k}" for k in ks] + ["MRR"]
    return {name: per_user_metric(ranks, name).mean().item() for name in names}


def per_user_metric(ranks: Tensor, name: str) -> Tensor:
    """One metric for every row: `[B]` float64.

    With r the 0-based rank: HR@k is 1 where r + 1 <= k, NDCG@k is 1 / log2(r + 2) there (one relevant item, so the
    ideal DCG is 1), MRR is 1 / (r + 1). Half a place beyond the cut-off is a miss, so ties never flatter.

    Raises:
        UserError: an unknown metric.
    """
    position = ranks.double() + 1
    kind, _, cut = name.partition("@")
    if name == "MRR":
        return 1 / position
    if kind not in ("HR", "NDCG") or not cut.isdigit() or int(cut) < 1:
        raise unknown("metric", name, [f"{kind}@{k}" for kind in ("HR", "NDCG") for k in KS] + ["MRR"])
    gain = torch.ones_like(position) if kind == "HR" else 1 / torch.log2(position + 1)
    return gain * (position <= int(cut))


class RankingMetrics(torchmetrics.Metric):
    """Collects 0-based ranks over batches and processes; `compute` gives `ranking_metrics` of them all."""

    full_state_update = False
    ranks: list[Tensor]

    def __init__(self, ks: tuple[int, ...] = KS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks = tuple(ks)
        self.add_state("ranks", default=[], dist_reduce_fx="cat")

    def update(self, ranks: Tensor) -> None:
        """Add the ranks `[B]` of a batch."""
        self.ranks.append(ranks.detach().float())

    def compute(self) -> dict[str, float]:
        """Metrics of all ranks so far.

        Raises:
            UserError: no rank was added.
        """
        ranks = self.ranks if isinstance(self.ranks, Tensor) else torch.cat([torch.empty(0), *(r.cpu() for r in self.ranks)])
        return ranking_metrics(ranks, self.ks)


# ---- the sampled protocol: stored candidates, so that every model and every run ranks the same ones -----------------


def make_candidates(
    items: np.ndarray,
    offsets: np.ndarray,
    n_items: int,
    user: np.ndarray,
    target: np.ndarray,
    n: int = 999,
    seed: int = 0,
) -> np.ndarray:
    """Draw for every evaluation row n different items, uniformly among those its user meets in no part of the split.

    Args:
        items: `[N]` item indices 1..n_items, users one after the other, train, validation and test.
        offsets: `[U+1]`; user u owns `items[offsets[u]:offsets[u+1]]`.
        n_items: size of the catalogue.
        user: `[rows]` user index of each evaluation row.
        target: `[rows]` its target, which is never drawn.
        n: candidates per row.
        seed: of the draw; equal arguments give equal candidates.

    Returns:
        `[rows, n]` int32.

    Raises:
        UserError: a user has fewer than n items left to draw from.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((len(user), n), dtype=np.int32)
    step = max(1, 2**22 // (n_items + 1))  # 16 MB of keys
    for start in range(0, len(user), step):
        who = user[start : start + step]
        keys = rng.random((len(who), n_items + 1), dtype=np.float32)  # the n smallest keys are a uniform draw
        lengths = offsets[who + 1] - offsets[who]
        row = np.repeat(np.arange(len(who)), lengths)
        at = np.arange(len(row)) + np.repeat(offsets[who] - np.cumsum(lengths) + lengths, lengths)
        keys[row, items[at]] = 2  # above every key
        keys[np.arange(len(who)), target[start : start + step]] = 2
        keys[:, 0] = 2
        left = (keys < 2).sum(1)
        if left.min() < n:
            raise UserError(
                f"protocol=sampled-{n} needs {n} items that a user never met, but user number {who[left.argmin()]} has "
                f"only {left.min()} of the catalogue's {n_items} left. Use protocol=full."
            )
        out[start : start + step] = np.argpartition(keys, n - 1, axis=1)[:, :n]
    return out


def save_candidates(path: Path, candidates: np.ndarray, split: str) -> None:
    """Write candidates `[rows, n]` as npy, and `<path>.json` with their SHA-256 and the split's fingerprint."""
    path = Path(path)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, candidates, allow_pickle=False)
    rows, n = candidates.shape
    record = {"version": CANDIDATES_VERSION, "split": split, "rows": rows, "n": n, "sha256": sha256(path)}
    write_json(path.with_name(path.name + ".json"), record)


def load_candidates(path: Path, split: str) -> tuple[np.ndarray, str]:
    """Read the stored candidates of the split with this fingerprint.

    Returns:
        `[rows, n]` int32, and the file's SHA-256, which belongs into the result.

    Raises:
        UserError: the file is missing, damaged, of another version or of another split.
    """
    path = Path(path)
    record = read_json(path.with_name(path.name + ".json"))
    if record["version"] != CANDIDATES_VERSION:
        raise UserError(f"{path} has format version {record['version']}, not {CANDIDATES_VERSION}. Remove it to draw it anew.")
    if record["split"] != split:
        raise UserError(f"{path} holds candidates for the split {record['split']}, not for {split}. Remove it to draw it anew.")
    if not path.exists() or sha256(path) != record["sha256"]:
        raise UserError(f"{path} is missing or was altered (its checksum is not the stored one). Remove it to draw it anew.")
    return np.load(path, allow_pickle=False), record["sha256"]


# ---- parts ----------------------------------------------------------------------------------------------------------


def _finite(user: Tensor, item_table: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or float64, after proving that no score can be NaN or infinite: |score| <= d max|u| max|v|."""
    dtype = torch.promote_types(torch.promote_types(user.dtype, item_table.dtype), torch.float32)
    user, table = user.detach().to(dtype), item_table.detach().to(dtype)
    if len(user) == 0:
        return user, table
    largest = [torch.stack(x.aminmax()).abs().max() for x in (user, table)]
    bound = user.shape[1] * largest[0] * largest[1]
    if not bound < torch.finfo(dtype).max:  # also False for NaN
        what = "user vectors" if not torch.isfinite(largest[0]) else "item vectors"
        what = "scores" if torch.isfinite(torch.stack(largest)).all() else what
        raise UserError(
            f"The model gives {what} that are NaN, infinite or too large, so its items cannot be ranked. The training "
            "diverged: lower optimizer.lr, or use trainer.precision=32-true."
        )
    return user, table


def _check_items(items: Tensor, lowest: int, width: int, what: str) -> None:
    if items.numel() and not lowest <= int(items.min()) <= int(items.max()) < width:
        raise ValueError(f"a {what} lies outside of {lowest}..{width - 1}: {int(items.min())}..{int(items.max())}")


def _seen_cells(
    seen_row: Tensor | None, seen_item: Tensor | None, rows: int, width: int, chunk: int
) -> tuple[Tensor | None, list[int]]:
    """The history's flat cells `[P]` in a score matrix `[rows, width]`, ascending by row, and each chunk's bounds."""
    if seen_row is None or seen_item is None or len(seen_row) == 0:
        return None, []
    _check_items(seen_item, 0, width, "seen item")
    if not 0 <= int(seen_row.min()) <= int(seen_row.max()) < rows:
        raise ValueError(f"a seen row lies outside of 0..{rows - 1}")
    if (seen_row[1:] < seen_row[:-1]).any():
        seen_row, order = seen_row.sort()
        seen_item = seen_item[order]
    edges = torch.arange(0, rows + chunk, chunk, device=seen_row.device)
    return seen_row * width + seen_item, torch.searchsorted(seen_row.contiguous(), edges).tolist()


def _count_above(scores: Tensor, reference: Tensor, own: Tensor | None, ones: Tensor) -> Tensor:
    """Ranks `[b]` from scores `[b, width]` (overwritten), where -inf is no candidate; `own`: the targets' columns."""
    if own is not None:
        scores[:, 0] = -torch.inf
        scores.scatter_(1, own, -torch.inf)
    signs = scores.sub_(reference).sign_()  # 1 above, 0 tied, -1 below or no candidate
    return ((signs.mv(ones) + scores.shape[1]) / 2).float()
