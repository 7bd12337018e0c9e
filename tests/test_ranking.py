"""Ranks and top lists against brute force, whatever the batch, the blocks and the place of an item."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_llmers import ranking
from lit_llmers.errors import UserError
from lit_llmers.ranking import Catalogue, candidate_ranks, target_ranks, top_items


def brute_force(scores: np.ndarray, target: int, excluded: set[int]) -> float:
    """Rank of item `target` (1-based, `scores[i-1]`) by a plain loop; ties count half."""
    rank = 0.0
    for item, score in enumerate(scores, start=1):
        if item == target or item in excluded:
            continue
        rank += 1.0 if score > scores[target - 1] else 0.5 if score == scores[target - 1] else 0.0
    return rank


@pytest.fixture(scope="module")
def tied():
    """Small whole numbers: the product is exact and ties abound. In half of the rows the target is seen."""
    rng = np.random.default_rng(0)
    rows, n, d = 203, 57, 3
    user, table = rng.integers(-2, 3, (rows, d)), rng.integers(-2, 3, (n + 1, d))
    table[0] = 0
    target = rng.integers(1, n + 1, rows)
    seen = [set(rng.choice(np.arange(1, n + 1), rng.integers(0, 30), replace=False).tolist()) for _ in range(rows)]
    for row in range(0, rows, 2):
        seen[row].add(int(target[row]))
    scores = user @ table[1:].T
    expected = [brute_force(scores[row], target[row], seen[row]) for row in range(rows)]
    pairs = torch.tensor([(row, item) for row in range(rows) for item in sorted(seen[row])])
    pairs = pairs[torch.from_numpy(rng.permutation(len(pairs)))]
    return SimpleNamespace(
        user=torch.from_numpy(user).float(),
        table=torch.from_numpy(table).float(),
        target=torch.from_numpy(target),
        row=pairs[:, 0],
        item=pairs[:, 1],
        expected=torch.tensor(expected),
    )


# ---- full ranking --------------------------------------------------------------------------------------------------


@pytest.fixture
def blocks(monkeypatch):
    """Make products of so many users and items."""

    def set_blocks(users: int, items: int) -> None:
        monkeypatch.setattr(ranking, "_BLOCK", {"cpu": (users, items), "other": (users, items)})

    return set_blocks


@pytest.mark.parametrize(("users", "items", "tile"), [(128, 12288, 192), (1, 16, 16), (64, 16, 8), (203, 58, 58), (9, 57, 57)])
def test_target_ranks_equal_brute_force_with_ties_and_history(tied, blocks, monkeypatch, users, items, tile):
    blocks(users, items)
    monkeypatch.setattr(ranking, "_TILE", tile)
    ranks = target_ranks(tied.user, tied.table, tied.target, tied.row, tied.item)
    assert ranks.dtype == torch.float32
    assert torch.equal(ranks, tied.expected)
    assert (ranks % 1 == 0.5).any(), "the example has no half ranks: it shows nothing about ties"


def test_history_matters_and_no_history_is_allowed(tied):
    free = target_ranks(tied.user, tied.table, tied.target)
    assert (free >= tied.expected).all()
    assert (free > tied.expected).any()
    empty = torch.empty(0, dtype=torch.long)
    assert torch.equal(target_ranks(tied.user, tied.table, tied.target, empty, empty), free)


def in_batches(size, user, items, target, row, item):
    parts = []
    for start in range(0, len(user), size):
        inside, part = (row >= start) & (row < start + size), slice(start, start + size)
        parts.append(target_ranks(user[part], items, target[part], row[inside] - start, item[inside]))
    return torch.cat(parts)


def test_batches_do_not_change_the_ranks_of_a_real_valued_model():
    torch.manual_seed(1)
    user, table, target = torch.randn(300, 64), torch.randn(5001, 64), torch.randint(1, 5001, (300,))
    row, item = torch.arange(300).repeat_interleave(20), torch.randint(0, 5001, (6000,))
    whole = target_ranks(user, table, target, row, item)
    for size in (1, 7, 64):
        assert torch.equal(in_batches(size, user, table, target, row, item), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nor_do_they_where_rounding_alone_tells_items_apart(blocks, dtype):
    """Items are permutations of one vector, so that all scores would be equal, did the order of a sum not matter."""
    torch.manual_seed(2)
    scale, vector = torch.rand(200, 1, dtype=dtype) + 0.5, torch.randn(50, dtype=dtype)
    user, table = scale.expand(-1, 50).contiguous(), torch.stack([vector[torch.randperm(50)] for _ in range(1001)])
    target, nothing = torch.randint(1, 1001, (200,)), torch.empty(0, dtype=torch.long)
    whole = target_ranks(user, table, target)
    assert len(whole.unique()) > 10, "the example shows nothing: rounding makes no difference"
    for size in (1, 7, 64):
        assert torch.equal(in_batches(size, user, table, target, nothing, nothing), whole)
    blocks(128, 192)
    assert torch.equal(target_ranks(user, table, target), whole), "nor does the size of a block"
    order = torch.randperm(1000) + 1
    shuffled, place = torch.cat([table[:1], table[order]]), torch.empty(1001, dtype=torch.long)
    place[order] = torch.arange(1, 1001)
    assert torch.equal(target_ranks(user, shuffled, place[target]), whole), "nor does an item's place"


@pytest.mark.parametrize("items", [12288, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [3, 64, 333])
def test_items_with_equal_vectors_tie_wherever_they_stand(blocks, items, dtype, dim):
    blocks(128, items)
    torch.manual_seed(3)
    user, table = torch.randn(40, dim, dtype=dtype), torch.randn(701, dim, dtype=dtype)
    twins = torch.tensor([1, 2, 191, 192, 193, 384, 500, 697, 698, 699, 700])
    table[twins] = table[5].clone()
    ranks = torch.stack([target_ranks(user, table, twin.expand(40)) for twin in [*twins, torch.tensor(5)]])
    assert (ranks == ranks[0]).all()
    others = torch.ones(701, dtype=torch.bool)
    others[torch.cat([twins, torch.tensor([0, 5])])] = False
    alone = torch.cat([table[:1], table[others], table[5:6]])
    above = target_ranks(user, alone, torch.tensor(len(alone) - 1).expand(40))
    assert torch.equal(ranks[0], above + 0.5 * len(twins))


def test_a_catalogue_made_once_serves_many_batches_and_its_buffer_does_not_grow(tied):
    catalogue = Catalogue(tied.table)
    for _ in range(2):
        assert torch.equal(target_ranks(tied.user, catalogue, tied.target, tied.row, tied.item), tied.expected)
    assert Catalogue(torch.zeros(100_001, 1)).buffer.numel() == Catalogue(torch.zeros(400_001, 1)).buffer.numel() < 2**21


def test_the_padding_item_never_competes():
    table = torch.tensor([[9.0], [1.0], [2.0]])
    assert target_ranks(torch.ones(1, 1), table, torch.tensor([2])).tolist() == [0]
    zero = torch.tensor([0])
    assert target_ranks(torch.ones(1, 1), table, torch.tensor([1]), zero, zero).tolist() == [1]


def test_a_model_that_scores_all_items_alike_lands_in_the_middle():
    ranks = target_ranks(torch.ones(4, 2), torch.ones(102, 2), torch.tensor([1, 2, 50, 101]))
    assert ranks.tolist() == [50.0] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_ranked_in_float32(dtype):
    user = torch.tensor([[1.0, 1.0]], dtype=dtype)
    table = torch.tensor([[0, 0], [256, 0.25], [256, 0]], dtype=dtype)  # 256.25 rounds to 256 in both dtypes
    assert target_ranks(user, table, torch.tensor([2])).tolist() == [1.0]


@pytest.mark.parametrize("items", [12288, 192])
def test_nor_does_autocast_coarsen_it(blocks, items):
    blocks(128, items)
    torch.manual_seed(7)
    user, table, target = torch.randn(50, 16), torch.randn(901, 16), torch.randint(1, 901, (50,))
    plain, top = target_ranks(user, table, target), top_items(user, table, 10)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(target_ranks(user, table, target), plain)
        assert torch.equal(top_items(user, table, 10)[0], top)
        torch.testing.assert_close(candidate_ranks(user, table, target, torch.arange(901).expand(50, -1)), plain)


def test_ranking_leaves_its_inputs_alone_and_needs_no_gradient(tied):
    user, table = tied.user.clone().requires_grad_(), tied.table.clone()
    assert not target_ranks(user, table, tied.target, tied.row, tied.item).requires_grad
    assert torch.equal(table, tied.table)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("where", ["user", "item"])
def test_a_diverged_model_is_refused(where, value):
    user, table = torch.full((3, 2), 1e10), torch.full((5, 2), 1e10)
    (user if where == "user" else table)[2, 1] = value
    expected = "scores" if value == 1e30 else f"{where} vectors"
    for rank in (target_ranks, lambda *args: candidate_ranks(*args, torch.tensor([[1, 2]] * 3))):
        with pytest.raises(UserError, match=f"{expected} that are NaN"):
            rank(user, table, torch.tensor([1, 2, 3]))


def test_indices_out_of_range_are_refused():
    user, table, one = torch.ones(2, 1), torch.ones(4, 1), torch.tensor([1, 1])
    for target in ([0, 1], [1, 4]):
        with pytest.raises(ValueError, match="target"):
            target_ranks(user, table, torch.tensor(target))
    with pytest.raises(ValueError, match="seen item"):
        target_ranks(user, table, one, torch.tensor([0]), torch.tensor([4]))
    with pytest.raises(ValueError, match="seen row"):
        target_ranks(user, table, one, torch.tensor([2]), torch.tensor([1]))
    with pytest.raises(ValueError, match="candidate"):
        candidate_ranks(user, table, one, torch.tensor([[2], [4]]))


def test_no_rows_have_no_ranks():
    assert target_ranks(torch.empty(0, 4), torch.ones(3, 4), torch.empty(0, dtype=torch.long)).shape == (0,)


# ---- candidates ----------------------------------------------------------------------------------------------------


def test_candidate_ranks_over_the_whole_catalogue_equal_full_ranks(tied):
    everything = torch.arange(len(tied.table)).expand(len(tied.user), -1)  # with the padding and the target
    full = target_ranks(tied.user, tied.table, tied.target)
    assert torch.equal(candidate_ranks(tied.user, tied.table, tied.target, everything), full)


def test_candidates_with_equal_vectors_tie_wherever_they_stand():
    torch.manual_seed(4)
    user, table = torch.randn(30, 50), torch.randn(2, 50)[[0] + [1] * 101]
    for number in (2, 9, 100):
        candidates = torch.arange(2, 2 + number).expand(30, -1)
        assert torch.equal(
            candidate_ranks(user, table, torch.ones(30, dtype=torch.long), candidates), torch.full((30,), number / 2)
        )


def test_candidate_ranks_count_only_the_candidates(tied):
    candidates = torch.randint(1, len(tied.table), (len(tied.user), 9), generator=torch.Generator().manual_seed(0))
    scores = tied.user @ tied.table.T
    ranks = candidate_ranks(tied.user, tied.table, tied.target, candidates)
    for row, rank in enumerate(ranks.tolist()):
        own = scores[row, tied.target[row]]
        others = scores[row, [item for item in candidates[row] if item != tied.target[row]]]
        assert rank == (others > own).sum() + 0.5 * (others == own).sum()


# ---- top lists -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("users", "items"), [(128, 12288), (5, 192), (64, 384)])
def test_top_items_equal_a_full_sort_without_the_history(blocks, users, items):
    blocks(users, items)
    torch.manual_seed(5)
    user, table = torch.randn(70, 8), torch.randn(801, 8)
    row, item = torch.arange(70).repeat_interleave(30), torch.randint(0, 801, (2100,))
    top, best = top_items(user, table, 20, row, item)
    scores = (user @ table.T).index_put_((row, item), torch.tensor(-torch.inf))
    scores[:, 0] = -torch.inf
    assert torch.equal(top, scores.argsort(1, descending=True)[:, :20])
    torch.testing.assert_close(best, scores.gather(1, top))
    assert torch.equal(torch.cat([top_items(u, table, 20)[0] for u in user.split(7)]), top_items(user, table, 20)[0])


def test_a_list_longer_than_the_catalogue_ends_in_zeros():
    user, table = torch.ones(2, 1), torch.tensor([[9.0], [1.0], [3.0], [2.0]])
    assert top_items(user, table, 5)[0].tolist() == [[2, 3, 1, 0, 0]] * 2
    assert top_items(user, table, 2, torch.tensor([0, 0]), torch.tensor([2, 3]))[0].tolist() == [[1, 0], [2, 3]]


def test_ranks_agree_with_the_place_in_the_top_list():
    torch.manual_seed(6)
    user, table = torch.randn(50, 8), torch.randn(301, 8)
    row, item = torch.arange(50).repeat_interleave(9), torch.randint(1, 301, (450,))
    for place in (0, 3, 19):
        top = top_items(user, table, 20, row, item)[0][:, place]
        assert (target_ranks(user, table, top, row, item) == place).all()
