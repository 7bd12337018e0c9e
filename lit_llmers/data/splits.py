"""Which interactions are kept, and which train, validate and test. Arrays in, arrays out."""

from collections.abc import Sequence

import numpy as np

from lit_llmers.data.dataset import TEST, TRAIN, VALID
from lit_llmers.errors import UserError, nearest

NAMES = {"train": TRAIN, "valid": VALID, "val": VALID, "validation": VALID, "test": TEST}


def enough(codes: np.ndarray, least: int) -> np.ndarray:
    """Say of each interaction whether its user (or item) has at least `least` of them: `[N]` codes -> `[N]` bool."""
    return np.bincount(codes)[codes] >= least if len(codes) else np.zeros(0, bool)


def k_core(users: np.ndarray, items: np.ndarray, k_users: int, k_items: int) -> np.ndarray:
    """Find the largest set of interactions in which every user has `k_users` and every item `k_items` of them.

    Dropping an item may leave a user with too few, and the other way round, so it is repeated until nothing changes.

    `[N]` and `[N]` int codes from 0 -> `[N]` bool, the interactions in the core.
    """
    keep = np.ones(len(users), bool)
    while True:
        of_user, of_item = np.bincount(users[keep]), np.bincount(items[keep])
        inside = np.flatnonzero(keep)
        drop = inside[(of_user[users[inside]] < k_users) | (of_item[items[inside]] < k_items)]
        if not drop.size:
            return keep
        keep[drop] = False


def offsets_of(users: np.ndarray) -> np.ndarray:
    """Where each user's block begins: `[N]` codes 0..U-1, ascending, all present -> `[U+1]` int64."""
    return np.concatenate([[0], np.cumsum(np.bincount(users))]).astype(np.int64)


def leave_one_out(offsets: np.ndarray) -> np.ndarray:
    """The last interaction of a user tests, the one before it validates, the others train: `[U+1]` -> `[N]` uint8.

    Interactions at the same time keep the order that they are in, so where times are coarse the file may decide.
    """
    split = np.full(offsets[-1], TRAIN, np.uint8)
    split[offsets[1:] - 1] = TEST
    split[offsets[1:] - 2] = VALID
    return split


def undecided(offsets: np.ndarray, times: np.ndarray, *ties: np.ndarray) -> np.ndarray:
    """Say of each user whether times leave open which interactions `leave_one_out` holds out: `[U+1]`, `[N]` -> `[U]` bool.

    They do where the test or the validation interaction is at the same time as the interaction before it, and is alike in all
    `ties` `[N]` too.
    """
    last = offsets[1:] - 1
    same = np.logical_and.reduce([each[1:] == each[:-1] for each in (times, *ties)])  # [N-1]
    return same[last - 1] | same[last - 2]


def check_moments(users: np.ndarray, times: np.ndarray, origin: str) -> None:
    """Check that times can be compared between users: `[N]` codes from 0 and `[N]` times.

    Raises:
        UserError: every user begins at the same time, as positions do.
    """
    first = np.full(users.max() + 1, np.inf)
    np.minimum.at(first, users, times)
    if len(first) > 1 and (first == first[0]).all():
        raise UserError(
            f"{origin}: every user's first interaction has the time {first[0]:g}. Those are positions within a user, and "
            "data.split=temporal needs moments that all users share. Choose their column with data.columns.time=NAME, or use "
            "data.split=leave-one-out."
        )


def temporal(times: np.ndarray, quantiles: Sequence[float]) -> tuple[np.ndarray, list[float]]:
    """Train before one moment, validate from there to a second, test from there on, for all users alike.

    A moment is the time before which the quantile's share of all interactions lies. What happened at one moment stays
    together, so where many times are equal the parts before are smaller than their shares.

    `[N]` times -> `[N]` uint8, and the two moments.
    """
    ordered = np.sort(times)
    moments = [ordered[int(share * len(ordered))].item() for share in quantiles]
    return np.array([TRAIN, VALID, TEST], np.uint8)[np.searchsorted(moments, times, side="right")], moments


def given(labels: np.ndarray, origin: str) -> np.ndarray:
    """Turn the names of a `split` column into TRAIN, VALID and TEST: `[N]` str -> `[N]` uint8.

    Raises:
        UserError: a name is none of train, valid (val, validation) and test.
    """
    names, codes = np.unique(labels.astype(str), return_inverse=True)
    for name in names:
        if name.lower() not in NAMES:
            raise UserError(
                f"{origin}: the split '{name}' is none of {', '.join(NAMES)}.{nearest(name.lower(), NAMES)} Correct the column."
            )
    return np.array([NAMES[name.lower()] for name in names], np.uint8)[codes]


def check_order(split: np.ndarray, users: np.ndarray, ids: np.ndarray, origin: str) -> None:
    """Check that no user's split goes back in time.

    `split` and `users` are `[N]`, ordered by user and time; `ids` are the `[U]` original user ids.

    Raises:
        UserError: a user has, for example, a train row after a test row; it names the user.
    """
    back = np.flatnonzero((users[1:] == users[:-1]) & (split[1:] < split[:-1]))
    if back.size:
        names = ("train", "valid", "test")
        row = back[0]
        raise UserError(
            f"{origin}: user '{ids[users[row]]}' has a {names[split[row + 1]]} interaction after a {names[split[row]]} "
            f"one ({len(np.unique(users[back]))} users have such). A given split must follow time within each user: "
            "correct the column, or use data.split=leave-one-out."
        )


def without_history(split: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Say which interactions belong to a user (or item) without any training interaction: `[N]` and `[N]` -> `[N]` bool."""
    trained = np.bincount(codes, weights=split == TRAIN) if len(codes) else np.zeros(0)
    return trained[codes] == 0
