"""Metrics worked out by hand, the official evaluators' numbers and an independent library."""

import math

import numpy as np
import pytest
import torch

from lit_llmers.errors import UserError
from lit_llmers.metrics import Coverage, RankingMetrics, per_user_metric, ranking_metrics
from lit_llmers.ranking import candidate_ranks, target_ranks


def as_vectors(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Users and items `1..n` whose product is exactly `scores` `[B, n]`: item vectors are columns, users one-hot."""
    table = torch.cat([torch.zeros(1, len(scores), dtype=torch.float64), scores.T])
    return torch.eye(len(scores), dtype=torch.float64), table


# ---- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_of_given_ranks():
    metrics = ranking_metrics(torch.tensor([0.0, 1.0, 4.0, 9.0, 9.5, 100.0]), ks=(1, 5, 10))
    assert metrics["HR@1"] == pytest.approx(1 / 6)
    assert metrics["HR@5"] == pytest.approx(3 / 6)
    assert metrics["HR@10"] == pytest.approx(4 / 6), "half a place beyond the cut-off is a miss"
    assert metrics["NDCG@10"] == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(6) + 1 / math.log2(11)) / 6)
    assert metrics["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 10 + 1 / 10.5 + 1 / 101) / 6)
    assert set(metrics) == {"HR@1", "HR@5", "HR@10", "NDCG@1", "NDCG@5", "NDCG@10", "MRR"}


def test_recall_is_a_mean_over_users_and_hit_rate_one_over_interactions():
    ranks, user = torch.tensor([0.0, 9.0, 30.0, 4.0]), torch.tensor([3, 3, 3, 8])
    metrics = ranking_metrics(ranks, ks=(5, 10), user=user)
    assert metrics["HR@5"] == 2 / 4
    assert metrics["Recall@5"] == pytest.approx((1 / 3 + 1) / 2)
    assert metrics["HR@10"] == 3 / 4
    assert metrics["Recall@10"] == pytest.approx((2 / 3 + 1) / 2)


def test_recall_is_left_out_where_it_is_the_hit_rate():
    ranks = torch.arange(10).float()
    assert ranking_metrics(ranks, user=torch.arange(10)) == ranking_metrics(ranks)


def test_coverage_worked_out_by_hand():
    coverage = Coverage(n_items=8, ks=(1, 3))
    assert coverage.compute() == {"coverage@1": 0, "coverage@3": 0}
    coverage.update(torch.tensor([[1, 2, 3], [1, 4, 0]]))
    coverage.update(torch.tensor([[2, 1, 4]]))
    assert coverage.compute() == {"coverage@1": 2 / 8, "coverage@3": 4 / 8}, "no item (0) covers nothing"


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


@pytest.fixture
def rivals():
    """Random whole-number scores full of ties, histories that do not compete, and several targets for a user.

    Returns users, item table, and for each row: its user, its target and the other items that compete with it.
    """
    rng = np.random.default_rng(5)
    users, n_items, dim = 25, 80, 3
    user = rng.integers(-2, 3, (users, dim)).astype(np.float32)
    table = rng.integers(-2, 3, (n_items + 1, dim)).astype(np.float32)
    seen = [set(rng.choice(n_items, rng.integers(0, 30), replace=False) + 1) for _ in range(users)]
    rows = []
    for who in range(users):
        free = sorted(set(range(1, n_items + 1)) - seen[who])
        for target in rng.choice(free, rng.integers(1, 5), replace=False):
            rows.append((who, int(target), [item for item in free if item != target]))
    return user, table, rows


def test_ir_measures_brackets_every_rank_with_ties_and_history(rivals):
    """Its best case and its worst case, with the target above or below its equals: ours is the middle."""
    ir_measures = pytest.importorskip("ir_measures")
    user, table, rows = rivals
    scores = user @ table.T
    who, target = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    qrels = {str(i): {str(row[1]): 1} for i, row in enumerate(rows)}
    positions = []
    for nudge in (0.5, -0.5):
        run = {
            str(i): {str(j): float(scores[u, j]) for j in others} | {str(t): float(scores[u, t]) + nudge}
            for i, (u, t, others) in enumerate(rows)
        }
        found = {m.query_id: 1 / m.value for m in ir_measures.iter_calc([ir_measures.RR], qrels, run)}
        positions.append(torch.tensor([found[str(i)] for i in range(len(rows))]))
    assert (positions[0] != positions[1]).any(), "the example has no ties"
    hidden = [(i, j) for i, (_, t, others) in enumerate(rows) for j in range(81) if j != t and j not in set(others)]
    ranks = target_ranks(torch.from_numpy(user)[who], torch.from_numpy(table), target, *torch.tensor(hidden).T)
    torch.testing.assert_close(ranks.double() + 1, sum(positions).double() / 2, rtol=0, atol=1e-4)


def test_ir_measures_agrees_on_recall_with_several_targets_for_a_user(rivals):
    ir_measures = pytest.importorskip("ir_measures")
    user, table, rows = rivals
    scores = user @ table.T + 1e-3 * np.random.default_rng(6).permuted(np.tile(np.arange(81.0), (25, 1)), axis=1)  # no ties
    who, target = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    vectors, items = as_vectors(torch.from_numpy(scores[:, 1:]))
    hidden = [(i, j) for i, (_, t, others) in enumerate(rows) for j in range(81) if j != t and j not in set(others)]
    ranks = target_ranks(vectors[who], items, target, *torch.tensor(hidden).T)
    ours = ranking_metrics(ranks, (5, 20), who)
    qrels = {str(u): {str(t): 1 for v, t, _ in rows if v == u} for u in range(25)}
    run = {str(u): {str(j): float(scores[u, j]) for j in [t, *others]} for u, t, others in rows}
    theirs = ir_measures.calc_aggregate([ir_measures.R @ 5, ir_measures.R @ 20], qrels, run)
    for k in (5, 20):
        assert ours[f"Recall@{k}"] == pytest.approx(theirs[ir_measures.R @ k], abs=1e-9)


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
