import numpy as np
import pytest

from lit_llmers.data.splits import (
    check_moments,
    check_order,
    enough,
    given,
    k_core,
    leave_one_out,
    offsets_of,
    temporal,
    undecided,
    without_history,
)
from lit_llmers.errors import UserError


def test_k_core_goes_on_until_nothing_changes() -> None:
    # users 0,1,2 with items 0,1 form a 2-core; user 3 hangs on item 2, item 2 on user 3 and 2, and so on
    users = np.array([0, 0, 1, 1, 2, 2, 2, 3, 3])
    items = np.array([0, 1, 0, 1, 0, 1, 2, 2, 3])
    # item 3 has one -> goes; user 3 is left with one -> goes; item 2 is left with one -> goes
    assert k_core(users, items, 2, 2).tolist() == [True] * 6 + [False] * 3
    assert k_core(users, items, 1, 1).all()
    assert not k_core(users, items, 3, 3).any()  # user 2 has three items, but item 2 has two: all unravels
    assert k_core(users, items, 3, 1).tolist() == [False] * 4 + [True] * 3 + [False] * 2


def test_k_core_does_not_depend_on_the_order_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    users, items = rng.integers(40, size=200), rng.integers(30, size=200)
    order = rng.permutation(200)
    core = k_core(users, items, 4, 5)
    assert 0 < core.sum() < 200
    assert np.bincount(users[core])[users[core]].min() >= 4
    assert np.bincount(items[core])[items[core]].min() >= 5
    np.testing.assert_array_equal(k_core(users[order], items[order], 4, 5), core[order])


def test_enough() -> None:
    assert enough(np.array([2, 0, 2, 1, 2]), 2).tolist() == [True, False, True, False, True]


def test_leave_one_out() -> None:
    offsets = offsets_of(np.array([0, 0, 0, 1, 1, 1, 1, 1]))
    assert offsets.tolist() == [0, 3, 8]
    assert leave_one_out(offsets).tolist() == [0, 1, 2, 0, 0, 0, 1, 2]


def test_equal_times_leave_open_what_is_held_out() -> None:
    times = [[1, 2, 3], [1, 2, 2], [1, 1, 2], [1, 1, 1], [1, 1, 2, 3], [1, 2, 2, 3], [5, 6, 6, 7, 8]]
    offsets = np.cumsum([0, *map(len, times)])
    assert undecided(offsets, np.concatenate(times)).tolist() == [False, True, True, True, False, True, False]
    positions = [[1, 2, 3], [1, 2, 3], [1, 1, 2], [1, 1, 2], [1, 1, 1, 1], [1, 2, 3, 3], [1, 2, 2, 3, 4]]
    found = undecided(offsets, np.concatenate(times), np.concatenate(positions))
    assert found.tolist() == [False, False, True, True, False, False, False]


def test_given_names() -> None:
    labels = np.array(["train", "val", "Validation", "valid", "TEST"], dtype=object)
    assert given(labels, "x").tolist() == [0, 1, 1, 1, 2]
    with pytest.raises(UserError, match=r"shop\.csv: the split 'tset' is none of .*Did you mean 'test'"):
        given(np.array(["train", "tset"], dtype=object), "shop.csv")


def test_a_split_that_goes_back_in_time_names_the_user() -> None:
    users = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    ids = np.array(["ann", "bob", "cid"], dtype=object)
    check_order(np.array([0, 1, 2, 0, 0, 2, 0, 0]), users, ids, "shop.csv")
    with pytest.raises(UserError, match=r"shop\.csv: user 'bob' has a train interaction after a test one \(2 users"):
        check_order(np.array([0, 1, 2, 0, 2, 0, 1, 0]), users, ids, "shop.csv")


def test_without_history() -> None:
    assert without_history(np.array([0, 2, 1, 2, 0]), np.array([0, 0, 1, 1, 2])).tolist() == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_temporal_cuts_at_two_moments_that_all_users_share() -> None:
    times = np.array([7, 1, 10, 3, 5, 2, 9, 4, 8, 6])
    split, moments = temporal(times, [0.8, 0.9])
    assert moments == [9, 10]
    assert split.tolist() == [0, 0, 2, 0, 0, 0, 1, 0, 0, 0]
    assert temporal(times * 0.5, [0.2, 0.5])[0].tolist() == [2, 0, 2, 1, 1, 0, 2, 1, 2, 2]


def test_temporal_keeps_a_moment_together_whatever_the_quantiles_are() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        times, quantiles = rng.integers(20, size=200), np.sort(rng.uniform(0.05, 0.95, 2))
        split, _ = temporal(times, quantiles)
        parts = [times[split == part] for part in (0, 1, 2)]
        for early, late in ((parts[0], parts[1]), (parts[1], parts[2]), (parts[0], parts[2])):
            if early.size and late.size:
                assert early.max() < late.min()
        assert (split == 0).mean() <= quantiles[0]


def test_positions_are_no_moments() -> None:
    users = np.array([0, 0, 1, 1, 1])
    check_moments(users, np.array([3, 5, 4, 4, 9]), "shop.csv")
    for first in (0, 1):
        with pytest.raises(UserError, match=rf"shop\.csv: every user's first .* the time {first}\. Those are positions"):
            check_moments(users, np.array([0, 1, 0, 1, 2]) + first, "shop.csv")
