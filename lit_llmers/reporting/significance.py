"""Whether one model is better than another: paired over the same users, and over seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from lit_llmers.errors import UserError

RESAMPLES = 2000
ENDS = (0.025, 0.975)  # of an interval
CHUNK = 2**20
MANY = 2**17  # users


def paired_test(a: np.ndarray, b: np.ndarray, seed: int = 0, user: np.ndarray | None = None) -> dict[str, float | None]:
    """Compare a metric of two models on the same rows.

    The interval is a percentile bootstrap over users: 2000 times, as many users are drawn with replacement, each with all
    its rows, and the mean difference of the rows is taken. p is two-sided, of the paired t-test; where users have several
    rows, of the t-test for a ratio of means over clusters (Cochran, Sampling Techniques, 3rd ed., 1977, section 6.4). Both
    speak of other users for these very models; how far training anew would move the difference is not in them (see
    `paired_over_seeds`).

    Args:
        a: `[n]` the metric of each row under the first model.
        b: `[n]` under the second, the reference, in the same order.
        seed: of the bootstrap.
        user: `[n]` whose row each is; None where every row is another user's.

    Returns:
        `difference` mean(a) - mean(b); `relative` the same as a share of mean(b), None where that is 0; `low` and
        `high` of the 95 % interval of the difference; `relative_low` and `relative_high` of that of the share, in which mean(b)
        varies too, None where a draw without a hit of the second model leaves it without bounds; `p`.

    Raises:
        UserError: fewer than two users.
        ValueError: a and b are not of the same users, or not finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"two finite vectors of one length are compared, not {a.shape} and {b.shape}")
    gain, other, rows = a - b, b, np.ones(len(a))
    if user is not None and len((counted := np.unique(user, return_inverse=True, return_counts=True))[2]) < len(a):
        _, code, count = counted
        gain, other, rows = np.bincount(code, gain), np.bincount(code, b), count.astype(np.float64)
    users = len(gain)
    if users < 2:
        raise UserError(f"A paired test needs at least two evaluated users, there is {users}. Evaluate on more users.")
    mean, reference = float((a - b).mean()), float(b.mean())
    gains, others, numbers = _bootstrap(np.stack([gain, other, rows]), seed)
    low, high = np.quantile(gains / numbers, ENDS)
    residual = gain - mean * rows
    error = np.sqrt((residual**2).sum() / (users * (users - 1))) / (len(a) / users)
    constant = np.ptp(gain / rows) == 0  # the t statistic is 0/0 or infinite
    p = float(mean == 0) if constant else float(2 * stats.t.sf(abs(mean) / error, users - 1))
    relative = mean / reference if reference else None
    bounds = np.quantile(gains / others, ENDS).tolist() if (others != 0).all() else [None, None]
    return {
        "difference": mean,
        "relative": relative,
        "low": float(low),
        "high": float(high),
        "relative_low": bounds[0],
        "relative_high": bounds[1],
        "p": p,
    }


def paired_over_seeds(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], seed: int = 0, user: np.ndarray | None = None
) -> dict[str, Any]:
    """Compare two models that were trained with several seeds each.

    Every row's metric is averaged over the seeds first, then `paired_test` compares the averages: users are the
    sample, and more seeds do not inflate it. What training anew does shows in `by_seed`, the means' differences.

    Args:
        a: for each seed, `[n]` the metric of each row under the first model.
        b: for each seed, `[n]` under the second, the reference; the same seeds and rows in the same order.
        seed: of the bootstrap.
        user: `[n]` whose row each is; None where every row is another user's.

    Returns:
        `paired_test`'s figures, and `by_seed`, the list of differences.

    Raises:
        UserError: fewer than two users.
        ValueError: different numbers of seeds or of users.
    """
    if len(a) != len(b) or not len(a) or len({len(metric) for metric in (*a, *b)}) > 1:
        raise ValueError(f"{len(a)} and {len(b)} seeds of the same users are compared seed by seed")
    first, second = np.stack(a).astype(np.float64), np.stack(b).astype(np.float64)  # [seeds, n]
    by_seed = (first.mean(1) - second.mean(1)).tolist()
    return {**paired_test(first.mean(0), second.mean(0), seed, user), "by_seed": by_seed}


def holm(p: Sequence[float]) -> list[float]:
    """Correct the p-values of a family of tests for its size (Holm, Scand. J. Statist. 6, 1979, pp. 65-70).

    The smallest of m is multiplied by m, the next by m - 1, and so on; none falls below one before it or exceeds 1. Then
    the probability of one false discovery or more in the whole family is at most the level at which they are read.
    """
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p, dtype=np.float64)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (denominator n - 1; None for a single value) of one figure per seed."""
    if not len(values):
        raise ValueError("no values")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _bootstrap(values: np.ndarray, seed: int) -> np.ndarray:
    """Sums `[c, RESAMPLES]` of n draws with replacement from the columns of `values` `[c, n]`, `CHUNK` draws at a time.

    Many users share few values, and how often each of them is drawn is one multinomial draw: of a million users in a second,
    not in half a minute.
    """
    rng, users = np.random.default_rng(seed), values.shape[1]
    if users > MANY:
        distinct, count = np.unique(values, axis=1, return_counts=True)
        if distinct.shape[1] < users // 10:
            return np.stack([distinct @ rng.multinomial(users, count / users) for _ in range(RESAMPLES)], 1)
    step = max(1, CHUNK // users)
    sums = []
    for start in range(0, RESAMPLES, step):
        draw = rng.integers(0, users, (min(step, RESAMPLES - start), users))
        sums.append(np.stack([column[draw].sum(1) for column in values]))
    return np.concatenate(sums, 1)
