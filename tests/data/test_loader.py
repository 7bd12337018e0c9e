"""Batches hold what the rows say, in an order that (seed, epoch) alone decides; a loader goes on where it stood."""

from itertools import chain

import numpy as np
import pytest
import torch
from tiny import dataset, random_dataset

from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.loader import EvaluationBatches, OrderedBatches, TrainingBatches
from lit_llmers.data.sequences import EvaluationRows, TrainingRows

MODES = ["last", "prefixes", "sequence", "sequence after context"]


@pytest.fixture(scope="module")
def unique() -> Dataset:
    """No item occurs twice, so that an item names its place."""
    lengths = np.random.default_rng(0).integers(3, 15, 60)
    stops = np.cumsum(lengths)
    return dataset([list(range(stop - length + 1, stop + 1)) for length, stop in zip(lengths, stops, strict=True)])


def rows_of(data: Dataset, examples: str = "prefixes", max_length: int = 4, limit: int | None = 0) -> TrainingRows:
    kind, _, after = examples.partition(" ")
    return TrainingRows(data, SequenceConfig(max_length, kind, limit, context=max_length // 2 if after else 0))


def numbered(rows: TrainingRows) -> dict[int, int]:
    """The target of each number, counted row by row."""
    items = rows.dataset.items.tolist()
    spans = zip(rows.stop.tolist(), np.diff(rows.target_offset).tolist(), strict=True)
    return dict(enumerate(chain.from_iterable(items[stop - count : stop] for stop, count in spans)))


def same(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(ours, theirs, strict=True)
    )


def test_a_batch_worked_out_by_hand():
    data = dataset([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10]])
    rows = rows_of(data, "sequence")
    batch = TrainingBatches(rows, 2, seed=0).collate(np.array([1, 0]))
    expected = {
        "row": [1, 0],
        "user": [1, 0],
        "items": [[0, 0, 7], [1, 2, 3]],
        "mask": [[False, False, True], [True, True, True]],
        "target": [[0, 0, 8], [2, 3, 4]],
        "target_row": [3, 0, 1, 2],
    }
    assert {key: value.tolist() for key, value in batch.items()} == expected
    assert all(batch[key].dtype == torch.int64 for key in batch if key != "mask")
    assert TrainingBatches(rows_of(data, "last"), 2, seed=0).collate(np.array([1, 0]))["target"].tolist() == [8, 4]


@pytest.mark.parametrize("examples", MODES)
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_every_target_comes_once_under_its_number(unique, examples, batch_size):
    rows = rows_of(unique, examples)
    wanted = numbered(rows)
    seen: dict[int, int] = {}
    place = {item: at for at, item in enumerate(unique.items.tolist())}
    for batch in TrainingBatches(rows, batch_size, seed=3):
        real = batch["target"] > 0
        targets, numbers = batch["target"][real].tolist(), batch["target_row"].tolist()
        assert len(targets) == len(numbers)
        assert not seen.keys() & set(numbers)
        seen |= dict(zip(numbers, targets, strict=True))
        # each target follows what its row has read up to there
        before = batch["items"][real] if rows.every_position else batch["items"][:, -1]
        assert [place[t] for t in targets] == [place[i] + 1 for i in before.tolist()]
    assert seen == wanted
    assert len(wanted) == rows.targets


@pytest.mark.parametrize("examples", MODES)
def test_padding_is_on_the_left_and_no_wider_than_needed(unique, examples):
    for batch in TrainingBatches(rows_of(unique, examples), 7, seed=0):
        items, mask = batch["items"], batch["mask"]
        assert torch.equal(mask, items > 0)
        assert (mask[:, 1:] >= mask[:, :-1]).all()
        assert mask[:, 0].any(), "as wide as the longest row"
        assert mask[:, -1].all()
        lengths = torch.from_numpy(rows_of(unique, examples).lengths[batch["row"].numpy()])
        assert torch.equal(mask.sum(1), lengths)


def test_rows_of_like_length_share_a_batch():
    rows = rows_of(random_dataset(users=400, longest=40), max_length=40)
    batches = list(TrainingBatches(rows, 32, seed=0))
    padded = sum((~batch["mask"]).sum().item() for batch in batches)
    real = sum(batch["mask"].sum().item() for batch in batches)
    assert padded < 0.1 * real
    shuffled = np.random.default_rng(0).permutation(len(rows))
    chunks = [rows.lengths[shuffled[i : i + 32]] for i in range(0, len(rows), 32)]
    assert sum((chunk.max() - chunk).sum() for chunk in chunks) > 0.5 * real, "the example shows nothing"
    widths = [batch["items"].shape[1] for batch in batches]
    assert widths != sorted(widths), "batches come in random order, not by length"


def test_held_out_rows_of_like_length_share_a_batch():
    rows = EvaluationRows(random_dataset(users=400, longest=40), "test", 40)
    batches = list(EvaluationBatches(rows, 32))
    assert sorted(torch.cat([batch["row"] for batch in batches]).tolist()) == list(range(400))
    padded, real = (sum(int((batch["mask"] == there).sum()) for batch in batches) for there in (False, True))
    assert padded < 0.1 * real
    as_they_come = [rows.lengths[i : i + 32] for i in range(0, 400, 32)]
    assert sum((lengths.max() - lengths).sum() for lengths in as_they_come) > 0.5 * real, "the example shows nothing"


@pytest.mark.parametrize("examples", MODES)
def test_a_batch_larger_than_the_data_holds_all_of_it(unique, examples):
    rows, held_out = rows_of(unique, examples), EvaluationRows(unique, "valid", 4)
    for batches, number in ((TrainingBatches(rows, 10_000, seed=0), len(rows)), (EvaluationBatches(held_out, 10_000), 60)):
        (batch,) = batches
        assert len(batches) == 1
        assert sorted(batch["row"].tolist()) == list(range(number))


def test_the_order_is_decided_by_seed_and_epoch(unique):
    rows = rows_of(unique)

    def order(seed: int, epoch: int) -> list[int]:
        loader = TrainingBatches(rows, 8, seed)
        loader.set_epoch(epoch)
        return torch.cat([batch["row"] for batch in loader]).tolist()

    assert order(0, 2) == order(0, 2)
    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(each) for each in orders}) == 6
    assert all(sorted(each) == list(range(len(rows))) for each in orders)


def dealt(index: list[int], world: int) -> list[list[int]]:
    """The rows of a batch as cards to so many players."""
    hands: list[list[int]] = [[] for _ in range(world)]
    for place, row in enumerate(index):
        hands[place % world].append(row)
    return hands


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch_size", [8, 1000])
def test_processes_share_every_batch_of_one(unique, world, batch_size):
    rows = rows_of(unique)
    one = list(TrainingBatches(rows, batch_size, 0))
    ranks = [list(TrainingBatches(rows, batch_size, 0, rank, world)) for rank in range(world)]
    assert all(len(batches) == len(one) for batches in ranks)
    assert batch_size == 1000 or len(rows) % batch_size % world, "the example has no uneven batch"
    for whole, *parts in zip(one, *ranks, strict=True):
        assert [part["row"].tolist() for part in parts] == dealt(whole["row"].tolist(), world)
        assert all(part["rows"] == len(whole["row"]) for part in parts)
        assert "rows" not in whole
        assert "weight" not in whole


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_mean_of_weighted_means_is_that_of_the_batch(unique, world):
    rows = rows_of(unique)
    value = torch.rand(len(rows), dtype=torch.double)
    ranks = [TrainingBatches(rows, 8, 0, rank, world) for rank in range(world)]
    for whole, *parts in zip(TrainingBatches(rows, 8, 0), *ranks, strict=True):
        mean = sum(part["weight"] * value[part["row"]].mean() for part in parts) / world
        torch.testing.assert_close(mean, value[whole["row"]].mean())


def test_who_has_no_row_of_a_batch_reads_one_that_counts_nothing(unique):
    rows = rows_of(unique)
    for rank in range(4):
        batches = list(TrainingBatches(rows, len(rows) - 2, 0, rank, 4))  # the second batch has two rows
        (small,) = [batch for batch in batches if batch["rows"] == 2]
        assert len(small["row"]) == 1
        assert small["weight"] == (2.0 if rank < 2 else 0.0)


@pytest.mark.parametrize("world", [2, 3])
def test_a_process_goes_on_with_its_part_of_the_next_batch(unique, world):
    rows = rows_of(unique)
    whole = list(TrainingBatches(rows, 40, 5, 1, world))
    loader = TrainingBatches(rows, 40, 5, 1, world)
    batches = iter(loader)
    first = [next(batches), next(batches)]
    resumed = TrainingBatches(rows, 40, 5, 1, world)
    resumed.load_state_dict(loader.state_dict())
    rest = list(resumed)
    assert [batch["row"].tolist() for batch in [*first, *rest]] == [batch["row"].tolist() for batch in whole]


def test_a_loader_goes_on_from_every_position(unique):
    rows = rows_of(unique)
    whole = TrainingBatches(rows, 40, seed=5)
    expected = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        expected += list(whole)
    per_epoch = len(whole)
    assert per_epoch > 3
    for stopped in range(2 * per_epoch + 1):
        loader, batches = TrainingBatches(rows, 40, seed=5), []
        for epoch in range(3):
            loader.set_epoch(epoch)
            for batch in loader:
                if len(batches) == stopped:
                    break
                batches.append(batch)
                state = loader.state_dict()
            if len(batches) == stopped:
                break
        if not stopped:
            state = loader.state_dict() | {"position": 0}
        resumed = TrainingBatches(rows, 40, seed=5)
        resumed.load_state_dict(state)
        for epoch in range(state["epoch"], 3):
            resumed.set_epoch(epoch)
            batches += list(resumed)
        assert same(batches, expected), stopped


def test_the_state_after_the_last_batch_is_the_next_epochs_first():
    loader = TrainingBatches(rows_of(random_dataset()), 16, seed=0)
    assert loader.state_dict() == {"epoch": 0, "position": 0}
    for number, _ in enumerate(loader, start=1):
        assert loader.state_dict() == (
            {"epoch": 0, "position": number} if number < len(loader) else {"epoch": 1, "position": 0}
        )
    assert number == len(loader)


def test_set_epoch_leaves_the_epoch_at_hand_alone():
    loader = TrainingBatches(rows_of(random_dataset()), 16, seed=0)
    loader.load_state_dict({"epoch": 2, "position": 3})
    loader.set_epoch(2)
    assert loader.state_dict() == {"epoch": 2, "position": 3}
    loader.set_epoch(3)
    assert loader.state_dict() == {"epoch": 3, "position": 0}


@pytest.mark.parametrize("examples", MODES)
def test_ordered_batches_cover_a_range_of_targets(unique, examples):
    rows = rows_of(unique, examples)
    wanted = numbered(rows)
    everything = list(OrderedBatches(rows, 9))
    assert len(everything) == len(OrderedBatches(rows, 9))
    assert sorted(torch.cat([batch["row"] for batch in everything]).tolist()) == list(range(len(rows)))
    for start, stop in [(0, 1), (0, rows.targets), (3, 11), (rows.targets - 1, rows.targets), (10, 40)]:
        batches = list(OrderedBatches(rows, 9, range(start, stop)))
        numbers = torch.cat([batch["target_row"] for batch in batches]).tolist()
        targets = torch.cat([batch["target"][batch["target"] > 0] for batch in batches]).tolist()
        assert len(numbers) == len(set(numbers))
        assert set(range(start, stop)) <= set(numbers)
        assert all(wanted[number] == target for number, target in zip(numbers, targets, strict=True))
        longest = rows.lengths.max() if rows.every_position else 1
        assert len(numbers) < stop - start + 2 * longest, "only rows that share the range are read"


@pytest.mark.parametrize("spare_target", [True, False])
@pytest.mark.parametrize("part", ["valid", "test"])
def test_evaluation_batches_mask_the_whole_history_but_not_a_target_that_is_spared(part, spare_target):
    data = random_dataset(users=50, n_items=12, longest=20)
    rows = EvaluationRows(data, part, max_length=3)
    repeated = 0
    seen_rows = []
    for batch in EvaluationBatches(rows, 8, spare_target=spare_target):
        pairs = set(zip(batch["seen_row"].tolist(), batch["seen_item"].tolist(), strict=True))
        expected = set()
        for place, row in enumerate(batch["row"].tolist()):
            user, at = rows.user[row], rows.at[row]
            history = data.items[data.offsets[user] : at].tolist()
            target = int(data.items[at])
            repeated += target in history
            expected |= {(place, item) for item in history if not (spare_target and item == target)}
            assert batch["user"][place] == user
            assert batch["target"][place] == target
            assert batch["items"][place][batch["mask"][place]].tolist() == history[-3:]
        assert pairs == expected
        seen_rows += batch["row"].tolist()
    assert repeated > 0, "the example has no repeated target"
    assert sorted(seen_rows) == list(range(len(rows)))
    assert "seen_row" not in next(iter(EvaluationBatches(rows, 8, mask_history=False)))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_validate_every_row_once_in_equally_many_batches(world):
    rows = EvaluationRows(random_dataset(users=50), "test", max_length=5)
    ranks = [list(EvaluationBatches(rows, 4, rank=rank, world=world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {13}
    seen = [batch["row"] for batches in ranks for batch in batches if batch.get("weight", 1.0)]
    assert sorted(torch.cat(seen).tolist()) == list(range(50))
