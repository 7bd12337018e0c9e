"""Pairs come once an epoch, negatives are what a user has not met, and a loader goes on where it stood."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny import dataset, random_dataset

from lit_llmers.data.dataset import TRAIN, VALID
from lit_llmers.data.pairs import PairBatches, PairDataModule, PairRows, UnmetItems
from lit_llmers.errors import UserError


@pytest.fixture(scope="module")
def rows() -> PairRows:
    return PairRows(random_dataset(users=40, n_items=30))


def same(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(ours, theirs, strict=True)
    )


def test_a_batch_worked_out_by_hand():
    """Users 0 and 1 have one item left each, so their negatives are known."""
    split = [[TRAIN] * 3 + [VALID], [TRAIN] * 4 + [VALID]]
    rows = PairRows(dataset([[1, 2, 3, 4], [2, 2, 4, 1, 3]], 4, split))
    batch = PairBatches(rows, 3, negatives=2, seed=0).collate(np.array([6, 0, 4]))
    expected = {
        "row": [0, 4, 6],
        "user": [0, 1, 1],
        "target": [1, 2, 1],
        "negatives": [[4, 4], [3, 3], [3, 3]],
        "target_row": [0, 4, 6],
    }
    assert {key: value.tolist() for key, value in batch.items()} == expected
    assert all(value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize("batch_size", [1, 7, 10_000])
def test_every_pair_comes_once_with_negatives_that_the_user_never_met(rows, batch_size):
    pairs = rows.dataset.training_pairs
    met = {tuple(pair) for pair in pairs.tolist()}
    seen = []
    for batch in PairBatches(rows, batch_size, negatives=3, seed=1):
        assert batch["negatives"].shape == (len(batch["row"]), 3)
        assert pairs[batch["row"].numpy()].tolist() == torch.stack([batch["user"], batch["target"]], 1).tolist()
        assert (batch["user"][1:] >= batch["user"][:-1]).all()
        drawn = zip(batch["user"].repeat_interleave(3).tolist(), batch["negatives"].flatten().tolist(), strict=True)
        assert not met & set(drawn)
        assert batch["negatives"].min() >= 1
        assert batch["negatives"].max() <= rows.dataset.n_items
        seen += batch["row"].tolist()
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize("met", [[], [1, 20], list(range(5, 18)), [*range(1, 12), *range(13, 21)]])
def test_negatives_are_uniform(met):
    """Over the items left, whether the user has met none, few, most, or all but one; beside another user."""
    pairs = np.array([[0, item] for item in met] + [[1, item] for item in range(1, 20)])
    unmet = UnmetItems(pairs, np.array(["a", "b"]), 20)
    left = sorted(set(range(1, 21)) - set(met))
    drawn = unmet.draw(np.zeros(20_000, np.int64), 2, np.random.default_rng(0))
    count = np.bincount(drawn.flatten(), minlength=21)
    assert count[left].sum() == 40_000
    assert chisquare(count[left]).pvalue > 1e-3 if len(left) > 1 else count[left[0]] == 40_000


def test_the_table_of_bits_only_saves_searches():
    """With every look at it answering "perhaps", the draws stay the same."""
    data = random_dataset(users=40, n_items=30)
    user = np.repeat(np.arange(40), 50)
    unmet = UnmetItems(data.training_pairs, data.users, 30)
    suspects = np.count_nonzero(unmet._perhaps_met(user * 31 + 1 + np.arange(len(user)) % 30))
    expected = unmet.draw(user, 2, np.random.default_rng(0))
    unmet.bits[:] = 255
    assert np.array_equal(unmet.draw(user, 2, np.random.default_rng(0)), expected)
    assert suspects < 0.5 * len(user)


def test_a_user_who_has_everything_is_named():
    with pytest.raises(UserError, match=r"User 'u1' has met all 3 items.*k_core"):
        PairRows(dataset([[1, 2, 2, 3, 1], [1, 2, 3, 3, 2]], 3, [[TRAIN] * 3 + [VALID] * 2, [TRAIN] * 4 + [VALID]]))


def test_no_training_pair_is_an_error():
    with pytest.raises(UserError, match="no training example"):
        PairRows(dataset([[1, 2]], 3, [[VALID, VALID]]))


def test_order_and_negatives_are_decided_by_seed_and_epoch(rows):
    def epoch(seed: int, number: int) -> list:
        loader = PairBatches(rows, 50, 1, seed)
        loader.set_epoch(number)
        return list(loader)

    assert same(epoch(0, 2), epoch(0, 2))
    kinds = [epoch(seed, number) for seed in (0, 1) for number in (0, 1, 2)]
    for key in ("row", "negatives"):
        assert len({tuple(torch.cat([batch[key].flatten() for batch in kind]).tolist()) for kind in kinds}) == 6
    assert not torch.equal(kinds[0][0]["negatives"], kinds[0][1]["negatives"])


def test_negatives_are_not_drawn_by_the_numbers_that_order_the_pairs(rows, monkeypatch):
    starts = []
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: starts.append(real(seed).random()) or real(seed))
    batches = list(PairBatches(rows, 50, 1, seed=3))
    assert len(starts) == 1 + len(batches) > 3
    assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_every_batch_of_one_with_its_negatives(rows, world):
    one = list(PairBatches(rows, 48, 2, 0))
    ranks = [list(PairBatches(rows, 48, 2, 0, rank, world)) for rank in range(world)]
    for whole, *parts in zip(one, *ranks, strict=True):
        for rank, part in enumerate(parts):
            assert all(torch.equal(part[key], value[rank::world]) for key, value in whole.items())
            assert part["rows"] == len(whole["row"])
            assert part["weight"] == len(part["row"]) * world / len(whole["row"])


def test_a_loader_goes_on_from_every_position(rows):
    whole = PairBatches(rows, 100, 2, seed=5)
    expected = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        expected += list(whole)
    per_epoch = len(whole)
    assert per_epoch > 2
    for position in range(1, 2 * per_epoch):
        first = PairBatches(rows, 100, 2, seed=5)
        first.set_epoch(position // per_epoch)
        for _, _ in zip(range(position % per_epoch), first, strict=False):
            pass
        state = first.state_dict()
        second = PairBatches(rows, 100, 2, seed=5)
        second.load_state_dict(state)
        second.set_epoch(position // per_epoch)
        assert same(list(second), expected[position : (position // per_epoch + 1) * per_epoch])


def test_the_module_serves_pairs_and_validation_rows():
    data = random_dataset(users=40, n_items=30)
    module = PairDataModule(data, batch_size=64, negatives=2, mask_history=True, seed=0)
    batch = next(iter(module.train_dataloader()))
    assert batch["negatives"].shape == (64, 2)
    validation = list(module.val_dataloader())
    assert sum(len(batch["user"]) for batch in validation) == 40
    assert "seen_item" in validation[0]
    assert validation[0]["items"].shape[1] == 1, "histories are not read"
