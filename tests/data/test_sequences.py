"""Training and evaluation rows: worked out by hand, and against a plain loop over users."""

import numpy as np
import pytest
from tiny import dataset, random_dataset

from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.data.dataset import TEST, TRAIN, VALID, Dataset
from lit_llmers.data.sequences import EvaluationRows, TrainingRows
from lit_llmers.errors import UserError

LONG = [11, 12, 13, 14, 15, 16, 17, 18]  # trains on 11..16
NONE = [21, 22, 23]  # one training item: nothing precedes it
SHORT = [31, 32, 33, 34]  # trains on 31, 32


@pytest.fixture
def three() -> Dataset:
    return dataset([LONG, NONE, SHORT])


def read(rows: TrainingRows) -> list[tuple[int, list[int], list[int]]]:
    """Each row as user, what is read, and the target of the last (or of every) position."""
    items = rows.dataset.items
    out = []
    for user, start, stop in zip(rows.user, rows.start, rows.stop, strict=True):
        target = items[start + 1 : stop] if rows.every_position else items[stop - 1 : stop]
        out.append((int(user), items[start : stop - 1].tolist(), target.tolist()))
    return out


def rows_of(
    data: Dataset, examples: str, max_length: int, targets_per_user: int | None = None, context: int = 0
) -> TrainingRows:
    return TrainingRows(data, SequenceConfig(max_length, examples, targets_per_user, context))


def test_last_is_one_row_per_user(three):
    assert read(rows_of(three, "last", 3)) == [(0, [13, 14, 15], [16]), (2, [31], [32])]
    assert read(rows_of(three, "last", 50)) == [(0, [11, 12, 13, 14, 15], [16]), (2, [31], [32])]
    assert read(rows_of(three, "last", 3, 0)) == read(rows_of(three, "last", 3, 7)) == read(rows_of(three, "last", 3))


def test_prefixes_give_every_target_its_own_history(three):
    every = [
        (0, [11], [12]),
        (0, [11, 12], [13]),
        (0, [11, 12, 13], [14]),
        (0, [12, 13, 14], [15]),
        (0, [13, 14, 15], [16]),
        (2, [31], [32]),
    ]
    assert read(rows_of(three, "prefixes", 3, 0)) == every
    assert read(rows_of(three, "prefixes", 3)) == every[2:], "max_length targets by default"
    assert read(rows_of(three, "prefixes", 3, 2)) == every[3:]


def test_sequence_has_a_target_at_every_position(three):
    late, early = (0, [13, 14, 15], [14, 15, 16]), (0, [11, 12], [12, 13])
    short = (2, [31], [32])
    assert read(rows_of(three, "sequence", 3)) == [late, short]
    assert read(rows_of(three, "sequence", 3, 0)) == [early, late, short], "windows, the latest of them full"
    assert read(rows_of(three, "sequence", 3, 4)) == [(0, [12], [13]), late, short]
    assert read(rows_of(three, "sequence", 3, 2)) == [(0, [14, 15], [15, 16]), short]
    assert read(rows_of(three, "sequence", 5)) == [(0, [11, 12, 13, 14, 15], [12, 13, 14, 15, 16]), short]


def test_targets_are_numbered_row_by_row_in_order_of_time(three):
    assert rows_of(three, "prefixes", 3).target_offset.tolist() == [0, 1, 2, 3, 4]
    rows = rows_of(three, "sequence", 3, 0)
    assert rows.target_offset.tolist() == [0, 2, 5, 6]
    assert rows.targets == 6
    assert rows.lengths.tolist() == [2, 3, 1]


def test_context_is_read_before_the_first_target_of_a_row(three):
    rows = rows_of(three, "sequence", 3, 0, context=1)
    ends = zip(rows.user, rows.start, rows.stop, strict=True)
    spans = [(int(user), rows.dataset.items[start : stop - 1].tolist()) for user, start, stop in ends]
    assert spans == [(0, [11]), (0, [11, 12, 13]), (0, [13, 14, 15]), (2, [31])], "as much as the user has met"
    assert rows.target_offset.tolist() == [0, 1, 3, 5, 6], "two targets each"
    rows = rows_of(three, "sequence", 3, 2, context=2)
    assert (rows.start.tolist(), rows.stop.tolist()) == ([1, 2, 11], [5, 6, 13]), "it may lie before all targets of a user"
    with pytest.raises(UserError, match="context is 3. It must be 0 or more, and below sequences.max_length, which is 3"):
        SequenceConfig(3, context=3)
    with pytest.raises(UserError, match="context is -1"):
        SequenceConfig(3, context=-1)
    with pytest.raises(UserError, match="context=1 has no effect with sequences.examples=prefixes.*sequences.context.$"):
        SequenceConfig(3, "prefixes", context=1)


def plain(data: Dataset, examples: str, max_length: int, targets_per_user: int | None, context: int = 0) -> set[tuple]:
    """Every (user, target's place, history) by the definition, one user after the other."""
    limit = max_length if targets_per_user is None else targets_per_user
    out = set()
    for user in range(data.n_users):
        own = [at for at in range(data.offsets[user], data.offsets[user + 1]) if data.split[at] == TRAIN]
        targets = own[1:]
        if examples == "last":
            targets = targets[-1:]
        elif limit:
            targets = targets[-limit:]
        for number, at in enumerate(reversed(targets)):
            reach = max_length
            if examples == "sequence":  # a window's positions see back to its first item
                size = max_length - context
                window = targets[::-1][number // size * size :][:size]
                reach = at - (window[-1] - 1 - context)
            first = max(own[0], at - reach)
            out.add((user, at, tuple(range(first, at))))
    return out


@pytest.mark.parametrize("targets_per_user", [None, 0, 1, 3, 5])
@pytest.mark.parametrize("max_length", [1, 3, 4, 50])
@pytest.mark.parametrize(
    ("examples", "context"), [("last", 0), ("prefixes", 0), ("sequence", 0), ("sequence", 1), ("sequence", 3)]
)
def test_rows_equal_a_plain_loop(examples, context, max_length, targets_per_user):
    context = min(context, max_length - 1)
    data = random_dataset(users=40, longest=17)
    rows = rows_of(data, examples, max_length, targets_per_user, context)
    found = []
    for user, start, stop, count in zip(rows.user, rows.start, rows.stop, np.diff(rows.target_offset), strict=True):
        found += [(user, at, tuple(range(start, at))) for at in range(stop - count, stop)]
    assert len(found) == len(set(found)) == rows.targets
    assert set(found) == plain(data, examples, max_length, targets_per_user, context)
    assert rows.places(np.arange(rows.targets))[1].tolist() == [at for _, at, _ in found]
    assert (rows.lengths >= 1).all()
    assert rows.lengths.max() <= max_length


def test_nothing_held_out_is_read_or_predicted():
    data = random_dataset()
    for examples in ("last", "prefixes", "sequence"):
        rows = rows_of(data, examples, 5, 0)
        touched = np.concatenate([np.arange(a, b) for a, b in zip(rows.start, rows.stop, strict=True)])
        assert (data.split[touched] == TRAIN).all()


def test_prefixes_and_sequence_predict_the_same_targets():
    data = random_dataset()
    for limit, context in ((None, 0), (0, 0), (4, 0), (None, 1), (0, 3), (4, 2)):
        ends = rows_of(data, "prefixes", 4, limit).stop - 1
        rows = rows_of(data, "sequence", 4, limit, context)
        count = np.diff(rows.target_offset)
        places = np.concatenate([np.arange(b - n, b) for b, n in zip(rows.stop, count, strict=True)])
        assert ends.tolist() == places.tolist(), "and number them alike"
        assert rows.places(np.arange(rows.targets))[1].tolist() == places.tolist()
        assert rows.fingerprint == rows_of(data, "prefixes", 4, limit).fingerprint


def test_a_fingerprint_names_data_and_targets(three):
    base = rows_of(three, "prefixes", 3).fingerprint
    assert rows_of(dataset([LONG, NONE, SHORT]), "prefixes", 3).fingerprint == base
    assert rows_of(three, "sequence", 4, 3).fingerprint == base
    others = [rows_of(three, "last", 3), rows_of(three, "prefixes", 4), rows_of(three, "prefixes", 3, 2)]
    others.append(rows_of(dataset([LONG, NONE, [31, 32, 34, 33]]), "prefixes", 3))
    assert len({base, *(rows.fingerprint for rows in others)}) == 5


def test_no_user_with_two_training_items_is_an_error():
    data = dataset([NONE])
    with pytest.raises(UserError, match=r"no user has two training.* Take more data, or .*student=bpr-mf") as error:
        rows_of(data, "prefixes", 3)
    assert "k_core" not in str(error.value), "which is no filter here"
    data.info["k_core"] = 5
    with pytest.raises(UserError, match=r"Lower data.k_core \(it is 5\), take more data, or"):
        rows_of(data, "prefixes", 3)


def test_leave_one_out_evaluates_once_per_user_on_all_that_came_before(three):
    test = EvaluationRows(three, "test", 3)
    assert test.target.tolist() == [18, 23, 34]
    assert test.user.tolist() == [0, 1, 2]
    assert test.lengths.tolist() == [3, 2, 3], "the model reads the last max_length"
    assert test.history_length.tolist() == [7, 2, 3], "the history is uncut, validation item included"
    valid = EvaluationRows(three, "valid", 3)
    assert valid.target.tolist() == [17, 22, 33]
    assert valid.history_length.tolist() == [6, 1, 2]


def test_a_given_split_evaluates_every_held_out_interaction():
    data = dataset(
        [[1, 2, 3, 4, 5], [6, 7, 8], [9, 1]],
        split=[[TRAIN, TRAIN, TEST, TEST, TEST], [TRAIN, VALID, VALID], [TRAIN, TRAIN]],
    )
    test = EvaluationRows(data, "test", 3)
    assert test.user.tolist() == [0, 0, 0]
    assert test.target.tolist() == [3, 4, 5]
    assert [data.items[a:b].tolist() for a, b in zip(test.start, test.at, strict=True)] == [
        [1, 2],
        [1, 2, 3],
        [2, 3, 4],
    ]
    assert EvaluationRows(data, "valid", 3).target.tolist() == [7, 8]
    assert read(rows_of(data, "prefixes", 3, 0)) == [(0, [1], [2]), (2, [9], [1])]


def test_a_sample_keeps_all_rows_of_some_users_and_a_larger_one_keeps_these_too():
    data = dataset([[1, 2, 3, 4, 5], *[[6, 7, 8, 9, 1]] * 30], split=[[TRAIN, VALID, VALID, TEST, TEST]] * 31)
    parts = {n: [EvaluationRows(data, part, 3, n) for part in ("valid", "test")] for n in (7, 20, 99, None)}
    for number, (valid, test) in parts.items():
        assert valid.user.tolist() == test.user.tolist(), "of the same users"
        assert len(test) == 2 * min(number or 31, 31)
        assert (data.offsets[test.user] + [3, 4] * (len(test) // 2)).tolist() == test.at.tolist()
    assert set(parts[7][1].user) < set(parts[20][1].user) != set(range(20))


def test_an_empty_part_is_named(three):
    data = dataset([[1, 2, 3]], split=[[TRAIN, TRAIN, TEST]])
    with pytest.raises(UserError, match="The valid part of by hand is empty"):
        EvaluationRows(data, "valid", 3)
