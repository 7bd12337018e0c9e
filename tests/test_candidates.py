"""Stored candidates: how they are drawn, kept, and read from a user's own file."""

import hashlib
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from tiny import dataset, random_dataset

from lit_llmers import candidates
from lit_llmers.candidates import check_enough, load_candidates, make_candidates, read_candidates, save_candidates
from lit_llmers.data.dataset import TEST, TRAIN, VALID
from lit_llmers.data.sequences import EvaluationRows
from lit_llmers.errors import UserError


def small_dataset(users: int = 40, n_items: int = 60, seed: int = 0) -> dict:
    """Interactions of users with histories of different lengths; the last of each is the target."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 20, users)
    items = np.concatenate([rng.permutation(n_items)[:length] + 1 for length in lengths]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return {
        "items": items,
        "offsets": offsets,
        "n_items": n_items,
        "user": np.arange(users),
        "target": items[offsets[1:] - 1],
    }


@pytest.mark.parametrize("n", [30, 7])  # by a key for each item, and one by one
def test_candidates_are_different_unseen_items_drawn_by_seed(n):
    data = small_dataset()
    drawn = make_candidates(**data, n=n, seed=3)
    assert drawn.shape == (40, n)
    assert drawn.dtype == np.int32
    for user, row in enumerate(drawn):
        own = set(data["items"][data["offsets"][user] : data["offsets"][user + 1]].tolist())
        assert len(set(row.tolist())) == n
        assert row.min() >= 1
        assert row.max() <= 60
        assert not own & set(row.tolist()), "history, validation and test item never compete"
    assert np.array_equal(drawn, make_candidates(**data, n=n, seed=3))
    assert not np.array_equal(drawn, make_candidates(**data, n=n, seed=4))


@pytest.mark.parametrize("n", [10, 5])  # by a key for each item, and one by one
def test_candidates_are_uniform_over_the_unseen_items(n):
    data = small_dataset(users=1)
    unseen = sorted(set(range(1, 61)) - set(data["items"].tolist()))
    counts = np.zeros(61)
    for seed in range(2000):
        counts[make_candidates(**data, n=n, seed=seed)] += 1
    expected = 2000 * n / len(unseen)
    assert counts.sum() == counts[unseen].sum()
    assert np.abs(counts[unseen] - expected).max() < 5 * math.sqrt(expected)


def test_rows_whose_draws_do_not_last_are_drawn_by_keys(monkeypatch):
    data, left = small_dataset(), []
    reject = candidates._draw_and_reject
    monkeypatch.setattr(candidates, "_draw_and_reject", lambda *given: left.append(reject(*given)) or left[0])
    items = np.concatenate([np.arange(1, 60), data["items"]]).astype(np.int32)  # one user has met all items but one
    offsets = np.concatenate([[0], data["offsets"] + 59])
    drawn = make_candidates(items, offsets, 60, np.arange(41), np.append(1, data["target"]), n=1)
    assert drawn[0] == 60
    assert left[0].tolist() == [0]


def test_rows_may_be_any_users_in_any_order_and_a_target_beyond_the_history_is_not_drawn():
    data = small_dataset()
    data["user"], data["target"] = np.array([7, 3, 7]), np.array([1, 2, 60])
    for user, target, row in zip(data["user"], data["target"], make_candidates(**data, n=35), strict=True):
        own = data["items"][data["offsets"][user] : data["offsets"][user + 1]].tolist()
        assert not {*own, target} & set(row.tolist())


def test_too_small_a_catalogue_is_named():
    data = small_dataset()
    longest = np.diff(data["offsets"]).argmax()
    left = 60 - np.diff(data["offsets"]).max()
    assert make_candidates(**data, n=left).shape == (40, left)
    with pytest.raises(UserError, match=f"needs {left + 1} items .* user number {longest} has only {left} of .* 60 left"):
        make_candidates(**data, n=left + 1)


def test_enough_to_draw_from_is_what_can_be_drawn():
    data = random_dataset(users=40, n_items=30, longest=20)
    users = np.arange(40)
    left = 30 - max(len(set(data.items[first:last].tolist())) for first, last in pairwise(data.offsets))
    check_enough(data, users, left)
    target = data.items[data.offsets[1:] - 1]
    assert make_candidates(data.items, data.offsets, 30, users, target, left).shape == (40, left)
    for ask, called in (
        (check_enough, r"user 'u\d+'"),  # the user's own id
        (lambda *_: make_candidates(data.items, data.offsets, 30, users, target, left + 1), r"user number \d+"),
    ):
        with pytest.raises(UserError, match=f"needs {left + 1} items .* {called} has only {left} of .* 30 left"):
            ask(data, users, left + 1)


def test_stored_candidates_are_read_back_and_guarded(tmp_path):
    path, drawn = tmp_path / "candidates.npy", make_candidates(**small_dataset(), n=5)
    save_candidates(path, drawn, "split-a")
    stored, sha = load_candidates(path, "split-a")
    assert np.array_equal(stored, drawn)
    assert sha == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["candidates.npy", "candidates.npy.json"]
    with pytest.raises(UserError, match="candidates for the split split-a, not for split-b"):
        load_candidates(path, "split-b")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="altered"):
        load_candidates(path, "split-a")
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        load_candidates(path, "split-a")


# ---- a file of the user's own ----------------------------------------------------------------------------------------


@pytest.fixture
def held_out():
    """Users u0, u1 and u2, the last of whom has two held-out interactions, one item among them."""
    data = dataset(
        [[1, 2, 3, 4], [5, 6, 7, 8], [1, 5, 6, 9, 9]],
        n_items=12,
        split=[[TRAIN, TRAIN, VALID, TEST], [TRAIN, TRAIN, VALID, TEST], [TRAIN, TRAIN, VALID, TEST, TEST]],
    )
    return data, EvaluationRows(data, "test", 5)


def parquet(path, rows: list[tuple[str, str, list[str]]]):
    pd.DataFrame(rows, columns=["user_id", "item_id", "candidates"]).to_parquet(path)
    return path


GIVEN = [("u2", "9", ["1", "2"]), ("u0", "4", ["12", "11", "10"]), ("u1", "8", ["3", "3"]), ("u2", "9", ["7"])]


def test_a_table_in_any_order_with_lists_of_any_length(held_out, tmp_path):
    candidates, digest = read_candidates(parquet(tmp_path / "mine.parquet", GIVEN), *held_out)
    found = [sorted(row[row > 0].tolist()) for row in candidates]
    assert found == [[10, 11, 12], [3], [1, 2], [7]], "a repeated item counts once"
    assert digest == hashlib.sha256((tmp_path / "mine.parquet").read_bytes()).hexdigest()


@pytest.mark.parametrize("number", [int, float])
def test_numbers_serve_as_ids(held_out, tmp_path, number):
    table = pd.DataFrame(GIVEN, columns=["user_id", "item_id", "candidates"])
    table["item_id"] = table["item_id"].astype(number)
    table["candidates"] = table["candidates"].map(lambda items: [number(item) for item in items])
    table.to_parquet(tmp_path / "mine.parquet")
    same = read_candidates(parquet(tmp_path / "text.parquet", GIVEN), *held_out)[0]
    assert np.array_equal(read_candidates(tmp_path / "mine.parquet", *held_out)[0], same)


def test_users_may_be_numbers_too(held_out, tmp_path):
    data, _ = held_out
    data = replace(data, users=np.array(["0", "1", "2"], dtype=object))
    table = pd.DataFrame(GIVEN, columns=["user_id", "item_id", "candidates"])
    table.assign(user_id=[2.0, 0.0, 1.0, 2.0]).to_parquet(tmp_path / "mine.parquet")
    same = read_candidates(parquet(tmp_path / "text.parquet", GIVEN), *held_out)[0]
    assert np.array_equal(read_candidates(tmp_path / "mine.parquet", data, EvaluationRows(data, "test", 5))[0], same)


@pytest.mark.parametrize(
    ("wrong", "user", "rows"),
    [
        (["12", "11", "3", "7"], "u2", 4),
        ([12, 11, 3, 7], "u2", 4),
        ([["12"], ["11"], None, ["7"]], "u1", 1),
        ([["12"], ["11", None], ["3", None], ["7"]], "u0", 2),
    ],
)
def test_candidates_that_are_no_lists_are_refused(held_out, tmp_path, wrong, user, rows):
    path = tmp_path / "mine.parquet"
    parquet(path, [(*row[:2], items) for row, items in zip(GIVEN, wrong, strict=True)])
    with pytest.raises(UserError, match=rf"for user '{user}', or a gap .* \({rows} such rows\)\. Give each row a list"):
        read_candidates(path, *held_out)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*GIVEN, ("u7", "1", ["2"])], "is of other users: 'u7' is in it but not among those"),
        (GIVEN[:2] + GIVEN[3:], "is of other users: 'u1' is not in it but among those"),
        ([*GIVEN[:1], ("u0", "3", ["5"]), *GIVEN[2:]], "is of another split: user 'u0' and item '4'"),
        ([*GIVEN, ("u1", "8", ["2"])], "user 'u1' with item '8' stands in it twice and is held out once. Give one row"),
        ([*GIVEN, *GIVEN], "user 'u0' with item '4' stands in it twice and is held out once"),
        ([*GIVEN, *GIVEN[-1:]], "user 'u2' with item '9' stands in it 3 times and is held out twice"),
        (GIVEN[:3], "user 'u2' with item '9' stands in it once and is held out twice"),
        ([*GIVEN[:3], ("u2", "9", ["77"])], "names item '77', which is not in the data"),
        ([*GIVEN[:3], ("u2", "9", ["9"])], "has no candidate beside the held-out item for user 'u2'"),
        ([*GIVEN[:3], ("u2", "9", [])], "has no candidate beside the held-out item for user 'u2'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(held_out, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_candidates(parquet(tmp_path / "mine.parquet", rows), *held_out)


def test_an_index_of_pandas_is_a_column(held_out, tmp_path):
    path = tmp_path / "mine.parquet"
    expected = read_candidates(parquet(path, GIVEN), *held_out)[0]
    pd.read_parquet(path).set_index(["user_id", "item_id"]).to_parquet(path)
    assert np.array_equal(read_candidates(path, *held_out)[0], expected)


def test_a_table_without_the_columns_or_no_table_at_all(held_out, tmp_path):
    path = tmp_path / "mine.parquet"
    parquet(path, GIVEN)
    pd.read_parquet(path).drop(columns="item_id").to_parquet(path)
    with pytest.raises(UserError, match="cannot be read .*columns user_id, item_id"):
        read_candidates(path, *held_out)
    path.write_text("no parquet")
    with pytest.raises(UserError, match="cannot be read"):
        read_candidates(path, *held_out)


def test_an_array_of_this_split(held_out, tmp_path):
    data, rows = held_out
    drawn = np.array([[10, 11, 0], [3, 3, 8], [1, 2, 3], [7, 9, 9]], np.int64)
    save_candidates(tmp_path / "mine.npy", drawn, data.fingerprint)
    candidates, _ = read_candidates(tmp_path / "mine.npy", data, rows)
    assert [sorted(set(row.tolist()) - {0}) for row in candidates] == [[10, 11], [3, 8], [1, 2, 3], [7, 9]]
    save_candidates(tmp_path / "mine.npy", drawn, "another")
    with pytest.raises(UserError, match="holds candidates for the split another, not for .* made for this data set and split"):
        read_candidates(tmp_path / "mine.npy", data, rows)


@pytest.mark.parametrize("record", [None, "{}", "[]"])
def test_an_array_without_its_record_is_refused(held_out, tmp_path, record):
    np.save(tmp_path / "mine.npy", np.ones((4, 2), int))
    if record:
        (tmp_path / "mine.npy.json").write_text(record)
    with pytest.raises(UserError, match=r"mine\.npy needs its record mine\.npy\.json beside it.*, or to a parquet table"):
        read_candidates(tmp_path / "mine.npy", *held_out)
    with pytest.raises(UserError, match=r"yours\.npy is missing\. Set evaluation\.candidates to a file"):
        read_candidates(tmp_path / "yours.npy", *held_out)


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (np.ones((3, 2), int), r"is int64 \[3, 2\]. It must hold whole numbers, \[4, N\]"),
        (np.ones((4, 2)), r"is float64 \[4, 2\]"),
        (np.full((4, 2), 13), r"names items outside of 0\.\.12"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(held_out, tmp_path, drawn, message):
    save_candidates(tmp_path / "mine.npy", drawn, held_out[0].fingerprint)
    with pytest.raises(UserError, match=message):
        read_candidates(tmp_path / "mine.npy", *held_out)
