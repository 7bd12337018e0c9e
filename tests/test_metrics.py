"""Ranks and metrics against brute force, the official evaluators' numbers and an independent library."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_llmers.errors import UserError
from lit_llmers.metrics import (
    RankingMetrics,
    candidate_ranks,
    load_candidates,
    make_candidates,
    per_user_metric,
    ranking_metrics,
    save_candidates,
    target_ranks,
)


def as_vectors(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Users and items `1..n` whose product is exactly `scores` `[B, n]`: item vectors are columns, users one-hot."""
    table = torch.cat([torch.zeros(1, len(scores), dtype=torch.float64), scores.T])
    return torch.eye(len(scores), dtype=torch.float64), table


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


@pytest.mark.parametrize("chunk", [1, 64, 203, 1000])
def test_target_ranks_equal_brute_force_with_ties_and_history(tied, chunk):
    ranks = target_ranks(tied.user, tied.table, tied.target, tied.row, tied.item, chunk=chunk)
    assert ranks.dtype == torch.float32
    assert torch.equal(ranks, tied.expected)
    assert (ranks % 1 == 0.5).any(), "the example has no half ranks: it shows nothing about ties"


def test_history_matters_and_no_history_is_allowed(tied):
    free = target_ranks(tied.user, tied.table, tied.target)
    assert (free >= tied.expected).all()
    assert (free > tied.expected).any()
    empty = torch.empty(0, dtype=torch.long)
    assert torch.equal(target_ranks(tied.user, tied.table, tied.target, empty, empty), free)


def test_batches_do_not_change_the_ranks_of_a_real_valued_model():
    torch.manual_seed(1)
    user, table, target = torch.randn(300, 64), torch.randn(5001, 64), torch.randint(1, 5001, (300,))
    row, item = torch.arange(300).repeat_interleave(20), torch.randint(0, 5001, (6000,))
    whole = target_ranks(user, table, target, row, item)
    for size in (1, 7, 128):
        parts = []
        for start in range(0, 300, size):
            inside = (row >= start) & (row < start + size)
            part = slice(start, start + size)
            parts.append(target_ranks(user[part], table, target[part], row[inside] - start, item[inside]))
        assert torch.equal(torch.cat(parts), whole)


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
    for chunk in (1, 128):
        assert torch.equal(candidate_ranks(tied.user, tied.table, tied.target, everything, chunk), full)


def test_candidate_ranks_count_only_the_candidates(tied):
    candidates = torch.randint(1, len(tied.table), (len(tied.user), 9), generator=torch.Generator().manual_seed(0))
    scores = tied.user @ tied.table.T
    ranks = candidate_ranks(tied.user, tied.table, tied.target, candidates)
    for row, rank in enumerate(ranks.tolist()):
        own = scores[row, tied.target[row]]
        others = scores[row, [item for item in candidates[row] if item != tied.target[row]]]
        assert rank == (others > own).sum() + 0.5 * (others == own).sum()


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


def test_candidates_are_different_unseen_items_drawn_by_seed():
    data = small_dataset()
    drawn = make_candidates(**data, n=30, seed=3)
    assert drawn.shape == (40, 30)
    assert drawn.dtype == np.int32
    for user, row in enumerate(drawn):
        own = set(data["items"][data["offsets"][user] : data["offsets"][user + 1]].tolist())
        assert len(set(row.tolist())) == 30
        assert row.min() >= 1
        assert row.max() <= 60
        assert not own & set(row.tolist()), "history, validation and test item never compete"
    assert np.array_equal(drawn, make_candidates(**data, n=30, seed=3))
    assert not np.array_equal(drawn, make_candidates(**data, n=30, seed=4))


def test_candidates_are_uniform_over_the_unseen_items():
    data = small_dataset(users=1)
    unseen = sorted(set(range(1, 61)) - set(data["items"].tolist()))
    counts = np.zeros(61)
    for seed in range(2000):
        counts[make_candidates(**data, n=10, seed=seed)] += 1
    expected = 2000 * 10 / len(unseen)
    assert counts.sum() == counts[unseen].sum()
    assert np.abs(counts[unseen] - expected).max() < 5 * math.sqrt(expected)


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


# ---- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_of_given_ranks():
    metrics = ranking_metrics(torch.tensor([0.0, 1.0, 4.0, 9.0, 9.5, 100.0]), ks=(1, 5, 10))
    assert metrics["HR@1"] == pytest.approx(1 / 6)
    assert metrics["HR@5"] == pytest.approx(3 / 6)
    assert metrics["HR@10"] == pytest.approx(4 / 6), "half a place beyond the cut-off is a miss"
    assert metrics["NDCG@10"] == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(6) + 1 / math.log2(11)) / 6)
    assert metrics["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 10 + 1 / 10.5 + 1 / 101) / 6)
    assert set(metrics) == {"HR@1", "HR@5", "HR@10", "NDCG@1", "NDCG@5", "NDCG@10", "MRR"}


@pytest.mark.parametrize("name", ["HR", "NDCG@x", "MRR@10", "AUC@5", "HR@0"])
def test_unknown_metric(name):
    with pytest.raises(UserError, match="Unknown metric"):
        per_user_metric(torch.zeros(1), name)


def test_the_metric_object_collects_batches_and_starts_anew():
    ranks = torch.arange(50).float() / 2
    metric = RankingMetrics(ks=(5, 20))
    with pytest.raises(UserError, match="no rows to evaluate"):
        metric.compute()
    for part in ranks.split(7):
        metric.update(part)
    assert metric.compute() == ranking_metrics(ranks, (5, 20))
    metric.reset()
    metric.update(torch.zeros(2))
    assert metric.compute()["MRR"] == 1


def test_the_metric_object_concatenates_what_other_processes_saw():
    metric = RankingMetrics(
        dist_sync_fn=lambda mine, group: [mine, mine + 3], distributed_available_fn=lambda: True, sync_on_compute=True
    )
    metric.update(torch.tensor([0.0, 1.0]))
    assert metric.compute() == ranking_metrics(torch.tensor([0.0, 1.0, 3.0, 4.0]))


# ---- against others ------------------------------------------------------------------------------------------------


def test_golden_full_ranking_with_history(golden):
    z = golden("metrics/case_a_topk")
    user, table = as_vectors(z["in.scores"])
    seen_row, seen_item = z["in.history_mask"].nonzero(as_tuple=True)
    ranks = target_ranks(user, table, z["in.truth"][:, 0] + 1, seen_row, seen_item + 1)
    best, worst = z["out.target_rank_optimistic"], z["out.target_rank_pessimistic"]
    assert torch.equal(ranks.double(), (best + worst) / 2)
    ks = tuple(z["hp.Ks"].tolist())
    for side, given in (("optimistic", best), ("pessimistic", worst), ("expected", ranks)):  # there are no ties
        metrics = ranking_metrics(given, ks)
        assert [metrics[f"HR@{k}"] for k in ks] == pytest.approx(z[f"out.hr_{side}"].tolist(), rel=1e-9)
        assert [metrics[f"NDCG@{k}"] for k in ks] == pytest.approx(z[f"out.ndcg_{side}"].tolist(), rel=1e-9)
        assert metrics["MRR"] == pytest.approx(z[f"out.mrr_full_{side}"].item(), rel=1e-9)


def test_golden_slmrec_and_llm_esr_evaluators_on_sampled_candidates(golden):
    z = golden("metrics/case_a_official_evaluators")
    scores = z["in.sampled_scores"]  # the positive first
    user, table = as_vectors(scores)
    candidates = torch.arange(2, scores.shape[1] + 1).expand(len(scores), -1)
    ranks = candidate_ranks(user, table, torch.ones(len(scores), dtype=torch.long), candidates)
    metrics = ranking_metrics(ranks)
    names = ["HR@1", "NDCG@1", "HR@5", "NDCG@5", "HR@10", "NDCG@10", "MRR"]
    official = z["out.slmrec_H1_N1_H5_N5_H10_N10_MRR"].tolist()
    assert [metrics[name] for name in names] == pytest.approx(official, rel=1e-9)
    assert torch.equal(ranks.double(), z["out.llmesr_ranks"])
    assert metrics["NDCG@10"] == pytest.approx(z["out.llmesr_ndcg10"].item(), rel=1e-9)
    assert metrics["HR@10"] == pytest.approx(z["out.llmesr_hr10"].item(), rel=1e-9)


def test_golden_dllm2rec_evaluator_on_the_full_catalogue(golden):
    z = golden("metrics/case_a_official_evaluators")
    user, table = as_vectors(z["in.full_scores"])
    ks = tuple(z["hp.Ks"].tolist())
    metrics = ranking_metrics(target_ranks(user, table, z["in.target"] + 1), ks)
    assert [metrics[f"HR@{k}"] for k in ks] == pytest.approx(z["out.dllm2rec_hr"].tolist(), rel=1e-9)
    assert [metrics[f"NDCG@{k}"] for k in ks] == pytest.approx(z["out.dllm2rec_ndcg"].tolist(), rel=1e-9)


def test_ir_measures_agrees_on_scores_without_ties():
    ir_measures = pytest.importorskip("ir_measures")
    rng = np.random.default_rng(5)
    scores = rng.permuted(np.tile(np.arange(80.0), (25, 1)), axis=1)
    target = rng.integers(1, 81, 25)
    user, table = as_vectors(torch.from_numpy(scores))
    ranks = target_ranks(user, table, torch.from_numpy(target))
    qrels = {str(row): {str(item): 1} for row, item in enumerate(target)}
    run = {str(row): {str(item): scores[row, item - 1] for item in range(1, 81)} for row in range(25)}
    wanted = {"HR@10": "Success@10", "NDCG@10": "nDCG@10", "NDCG@20": "nDCG@20", "MRR": "RR"}
    measures = {name: ir_measures.parse_measure(text) for name, text in wanted.items()}
    theirs = ir_measures.calc_aggregate(list(measures.values()), qrels, run)
    ours = ranking_metrics(ranks)
    for name, measure in measures.items():
        assert ours[name] == pytest.approx(theirs[measure], abs=1e-6), name
