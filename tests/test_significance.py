"""The paired test against scipy and by coverage; seeds are averaged before users are compared."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from lit_llmers.errors import UserError
from lit_llmers.reporting import significance
from lit_llmers.reporting.significance import holm, paired_over_seeds, paired_test, spread


def test_figures_against_scipy():
    rng = np.random.default_rng(0)
    b = rng.random(400)
    a = b + rng.normal(0.02, 0.1, 400)
    result = paired_test(a, b)
    assert result["difference"] == pytest.approx((a - b).mean())
    assert result["relative"] == pytest.approx((a - b).mean() / b.mean())
    assert result["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    reference = stats.bootstrap(
        (a - b,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = reference.high - reference.low
    assert result["low"] == pytest.approx(reference.low, abs=0.05 * width)
    assert result["high"] == pytest.approx(reference.high, abs=0.05 * width)


def test_pairing_is_used():
    rng = np.random.default_rng(0)
    b = rng.random(200)
    a = b + 0.01 + rng.normal(0, 0.005, 200)
    assert paired_test(a, b)["p"] < 1e-6
    assert paired_test(a, rng.permutation(b))["p"] > 0.01


def test_the_interval_covers_no_difference_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        result = paired_test(rng.normal(size=100), rng.normal(size=100))
        covered += result["low"] <= 0 <= result["high"]
    assert 178 <= covered <= 200  # 95 % of 200 is 190, with four standard deviations


@pytest.mark.parametrize("several", [False, True])
def test_many_users_are_drawn_by_their_values(several, monkeypatch):
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 3, 3000) / 2, rng.integers(0, 2, 3000) / 2
    user = np.sort(rng.integers(0, 2000, 3000)) if several else None
    one_by_one = paired_test(a, b, user=user)
    monkeypatch.setattr(significance, "MANY", 1000)
    by_value = paired_test(a, b, user=user)
    width = one_by_one["high"] - one_by_one["low"]
    for end in ("low", "high"):
        assert by_value[end] != one_by_one[end]
        assert by_value[end] == pytest.approx(one_by_one[end], abs=0.05 * width)
    assert by_value["p"] == one_by_one["p"]


def test_rows_of_one_user_count_as_one():
    rng = np.random.default_rng(4)
    a, b = rng.random(60), rng.random(60)
    alone = paired_test(a, b)
    assert paired_test(a, b, user=rng.permutation(60)) == alone
    thrice = paired_test(a.repeat(3), b.repeat(3), user=np.arange(60).repeat(3))
    assert thrice == pytest.approx(alone)
    assert paired_test(a.repeat(3), b.repeat(3))["p"] < alone["p"], "taken for other users they would count thrice"
    by_seed = paired_over_seeds([a.repeat(3)] * 2, [b.repeat(3)] * 2, user=np.arange(60).repeat(3))
    assert by_seed["p"] == thrice["p"]


def test_the_interval_covers_it_where_users_have_many_rows_that_resemble_each_other():
    rng = np.random.default_rng(5)
    covered, naive, rejected = 0, 0, 0
    for _ in range(200):
        user = np.arange(80).repeat(rng.integers(1, 12, 80))
        gain = rng.normal(size=80)[user] + 0.3 * rng.normal(size=len(user))
        nothing = np.zeros(len(user))
        result, wrong = paired_test(gain, nothing, user=user), paired_test(gain, nothing)
        covered += result["low"] <= 0 <= result["high"]
        naive += wrong["low"] <= 0 <= wrong["high"]
        rejected += result["p"] < 0.05
    assert 176 <= covered <= 200
    assert 0 <= rejected <= 24
    assert naive < 150


def test_swapping_the_models_turns_the_sign_and_the_seed_decides_the_draw():
    rng = np.random.default_rng(3)
    a, b = rng.random(50), rng.random(50)
    forth, back = paired_test(a, b), paired_test(b, a)
    assert forth["difference"] == -back["difference"]
    assert forth["p"] == pytest.approx(back["p"])
    assert paired_test(a, b) == forth
    assert paired_test(a, b, seed=1)["low"] != forth["low"]


def test_constant_differences():
    ones = np.ones(5)
    figures = ("difference", "relative", "low", "high", "relative_low", "relative_high", "p")
    assert paired_test(ones, ones) == dict.fromkeys(figures, 0) | {"p": 1}
    assert paired_test(2 * ones, ones) == dict.fromkeys(figures, 1) | {"p": 0}
    assert paired_test(ones, 0 * ones)["relative"] is None


def test_the_share_has_an_interval_of_its_own_in_which_the_reference_varies_too():
    rng = np.random.default_rng(7)
    b = rng.random(400)
    a = b + rng.normal(0.02, 0.1, 400)
    result = paired_test(a, b)
    reference = stats.bootstrap(
        (a, b), lambda a, b: a.mean() / b.mean() - 1, paired=True, vectorized=False, n_resamples=9_999, method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    width = reference.high - reference.low
    assert result["relative_low"] == pytest.approx(reference.low, abs=0.05 * width)
    assert result["relative_high"] == pytest.approx(reference.high, abs=0.05 * width)


def test_a_reference_that_hits_too_rarely_leaves_the_share_without_bounds():
    rare = np.eye(1, 200).ravel()
    result = paired_test(np.ones(200), rare)
    assert result["relative"] == pytest.approx(199)
    assert result["relative_low"] is result["relative_high"] is None


def test_bad_input():
    with pytest.raises(UserError, match="at least two"):
        paired_test(np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match="one length"):
        paired_test(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="finite"):
        paired_test(np.array([1, math.nan]), np.ones(2))
    with pytest.raises(ValueError, match="seed by seed"):
        paired_over_seeds([np.ones(3)], [np.ones(3), np.ones(3)])


def test_seeds_are_averaged_per_user_before_the_test():
    rng = np.random.default_rng(4)
    a, b = rng.random((3, 80)), rng.random((3, 80))
    result = paired_over_seeds(list(a), list(b))
    by_seed = result.pop("by_seed")
    assert result == paired_test(a.mean(0), b.mean(0))
    assert by_seed == pytest.approx((a - b).mean(1).tolist())
    copies = paired_over_seeds([a[0]] * 9, [b[0]] * 9)
    assert copies["p"] == pytest.approx(paired_test(a[0], b[0])["p"]), "more copies of a seed prove nothing more"


def test_spread():
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert spread([5.0]) == (5.0, None)
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_memory_does_not_grow_with_the_resamples():
    values = np.random.default_rng(0).random(30_000)
    tracemalloc.start()
    paired_test(values, values[::-1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20  # all resamples at once would take 2000 x 30,000 x 8 bytes = 480 MB


@pytest.mark.parametrize(
    ("p", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 no less than that
        ([0.2], [0.2]),
        ([0.6, 0.5], [1, 1]),
        ([], []),
    ],
)
def test_holm_by_hand(p, corrected):
    assert holm(p) == pytest.approx(corrected)


def test_holm_keeps_the_error_of_the_whole_family():
    rng = np.random.default_rng(0)
    families = rng.random((2000, 6))  # p-values where nothing differs
    wrong = np.mean([min(holm(p)) < 0.05 for p in families])
    assert 0.035 < wrong < 0.065  # 5 %, with three standard deviations; uncorrected it is 26 %
