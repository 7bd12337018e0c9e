"""Whether one model is better than another: paired over the same users, and over seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from lit_llmers.errors import UserError

RESAMPLES = 2000
CHUNK = 2**20


def paired_test(a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict[str, float | None]:
    """Compare a metric of two models on the same users.

    The interval is a percentile bootstrap over users: 2000 times, n users are drawn with replacement and their mean
    difference is taken. p is two-sided, of the paired t-test. Both speak of other users for these very models; how far
    training anew would move the difference is not in them (see `paired_over_seeds`).

    Args:
        a: `[n]` the metric of each user under the first model.
        b: `[n]` under the second, the reference, in the same order.
        seed: of the bootstrap.

    Returns:
        `difference` mean(a) - mean(b); `relative` the same as a share of mean(b), None where that is 0; `low` and
        `high` of the 95 % interval of the difference; `p`.

    Raises:
        UserError: fewer than two users.
        ValueError: a and b are not of the same users, or not finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"two finite vectors of one length are compared, not {a.shape} and {b.shape}")
    if len(a) < 2:
        raise UserError(f"A paired test needs at least two evaluated rows, there is {len(a)}. Evaluate on more users.")
    gain = a - b
    mean, reference = float(gain.mean()), float(b.mean())
    low, high = np.quantile(_bootstrap(gain, seed), [0.025, 0.975])
    constant = np.ptp(gain) == 0  # the t statistic is 0/0 or infinite
    p = float(mean == 0) if constant else float(stats.ttest_rel(a, b).pvalue)
    relative = mean / reference if reference else None
    return {"difference": mean, "relative": relative, "low": float(low), "high": float(high), "p": p}


def paired_over_seeds(a: Sequence[np.ndarray], b: Sequence[np.ndarray], seed: int = 0) -> dict[str, Any]:
    """Compare two models that were trained with several seeds each.

    Every user's metric is averaged over the seeds first, then `paired_test` compares the averages: users are the
    sample, and more seeds do not inflate it. What training anew does shows in `by_seed`, the means' differences.

    Args:
        a: for each seed, `[n]` the metric of each user under the first model.
        b: for each seed, `[n]` under the second, the reference; the same seeds and users in the same order.
        seed: of the bootstrap.

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
    return {**paired_test(first.mean(0), second.mean(0), seed), "by_seed": by_seed}


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (denominator n - 1; None for a single value) of one figure per seed."""
    if not len(values):
        raise ValueError("no values")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _bootstrap(values: np.ndarray, seed: int) -> np.ndarray:
    """Means `[RESAMPLES]` of n draws with replacement from `values` `[n]`, about `CHUNK` draws in memory at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // len(values))
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    return np.concatenate([values[rng.integers(0, len(values), (size, len(values)))].mean(1) for size in sizes])
