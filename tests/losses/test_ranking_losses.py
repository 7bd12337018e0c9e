"""Ranking losses against the official code's numbers, plain loops and finite differences; padding has no say."""

import math

import pytest
import torch
from torch.nn import functional as F

from lit_llmers.losses import ranking
from lit_llmers.losses import ranking_weights as weighing
from lit_llmers.losses.sampled import binary
from lit_llmers.losses.scores import list_scores, shared_scores

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
CLOSE_GRADIENT = {"rtol": 1e-7, "atol": 1e-9}


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul_(scale).requires_grad_()


def inputs(rows: int = 7, n_items: int = 20, dim: int = 5, k: int = 4):
    items = torch.randint(1, n_items + 1, (rows, k), generator=torch.Generator().manual_seed(9))
    return draw(rows, dim), draw(n_items + 1, dim, seed=1), items


# ---- ranks -------------------------------------------------------------------------------------------------------------


def test_ranks_estimated_from_all_items_are_the_ranks():
    user, table, items = inputs()
    scores = user @ table[1:].T
    exact = torch.stack([(scores > scores.gather(1, items[:, k : k + 1] - 1)).sum(1) for k in range(4)], 1)
    rank = ranking.estimated_rank(scores.gather(1, items - 1), scores, 21)  # (n - 1) * above / 20 drawn
    assert torch.equal(rank, exact.double())
    assert not rank.requires_grad


# ---- DLLM2Rec ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["case_a", "case_a_noalpha"])
def test_golden_dllm2rec(golden, case):
    z = golden(f"dllm2rec/{case}")
    k, alpha, beta = int(z["hp.K"]), z["hp.alpha"].item(), z["hp.beta"].item()
    scores = z["in.student_scores"].requires_grad_()
    items, teacher = z["in.teacher_candidates"][:, :k], -z["in.teacher_distances"][:, :k]
    listed = list_scores(scores, torch.eye(scores.shape[1], dtype=torch.float64), items)
    valid = torch.ones_like(items, dtype=torch.bool)
    rank = torch.stack([(scores > scores.gather(1, items[:, r : r + 1])).sum(1) for r in range(k)], 1).double()
    weights = {
        "position": weighing.position_weights(valid, z["hp.position_lambda"].item(), dtype=torch.float64),
        "confidence": weighing.confidence_weights(teacher, valid, raw=True),
        "consistency": weighing.consistency_weights(rank, k, valid),
    }
    factors = {name: z[f"hp.gamma_{name}"].item() for name in weights}
    for name, weight in weights.items():
        torch.testing.assert_close(weight, z[f"out.weight_{name}"], **CLOSE)
    weight = weighing.combine(weights, factors, "sum", True)
    torch.testing.assert_close(weight, z["out.weight"], **CLOSE)

    negative = scores.gather(1, z["in.negative"][:, None])
    distilled = ranking.list_bce(listed, weight, negative, official_negative_term=True).mean()
    positive = scores.gather(1, z["in.target"][:, None])
    total = binary(positive[:, 0], negative).mean()
    if alpha:
        frequency = torch.bincount(z["in.train_next_items"], minlength=scores.shape[1])
        share = ranking.propensity(frequency)
        torch.testing.assert_close(share, z["in.propensity"], **CLOSE)
        energy = ranking.log_energy(scores, torch.eye(len(share), dtype=torch.float64), share, beta)
        of_target = ranking.dros(positive, share[z["in.target"]][:, None], energy, beta)[:, 0]
        torch.testing.assert_close(of_target, z["out.dro_target_per_row"], **CLOSE)
        per_candidate = ranking.dros(listed, share[items], energy, beta)
        torch.testing.assert_close(per_candidate, z["out.kd_dro_per_candidate"], **CLOSE)
        by_row = ranking.weighted_dros(per_candidate, weight).mean()
        distilled = distilled + alpha * ranking.weighted_dros(per_candidate, weight, official_dros_mean=True).mean()
        total = total + alpha * of_target.mean()
        torch.testing.assert_close(by_row, (weight * z["out.kd_dro_per_candidate"]).sum(1).mean(), **CLOSE)
        assert abs(by_row - ranking.weighted_dros(per_candidate, weight, True).mean()) > 1e-4, "the slip is not the default"
    torch.testing.assert_close(distilled, z["out.kd_loss"], **CLOSE)
    total = total + z["hp.lam"] * distilled
    torch.testing.assert_close(total, z["out.total"], **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(total, scores)[0], z["grad.student_scores"], **CLOSE_GRADIENT)


def test_the_negative_term_is_log_one_minus_sigmoid_unless_asked():
    listed, negative, weight = draw(3, 4), draw(3, 2, seed=1), draw(3, 4, seed=2).detach().abs()
    for official in (False, True):
        loss = ranking.list_bce(listed, weight, negative, official_negative_term=official)
        for t in range(3):
            miss = [1 - x if official else -x for x in negative[t].tolist()]
            miss = sum(-math.log(1 / (1 + math.exp(-x))) for x in miss) / 2
            pairs = zip(weight[t].tolist(), listed[t].tolist(), strict=True)
            assert loss[t].item() == pytest.approx(sum(w * (math.log(1 + math.exp(-s)) + miss) for w, s in pairs))


def test_distances_are_scaled_from_best_to_worst():
    scores = torch.tensor([[-100.0, -110.0, -140.0, 0.0], [-3.0, -3.0, 9.0, 9.0], [5.0, 5.0, 5.0, 5.0]])
    valid = torch.tensor([[True, True, True, False], [True, True, False, False], [False] * 4])
    inf = torch.inf
    expected = torch.tensor([[0.0, 0.25, 1.0, inf], [0.0, 0.0, inf, inf], [inf] * 4])
    torch.testing.assert_close(weighing.scaled_distance(scores.requires_grad_(), valid), expected)


def test_scaled_confidence_tells_large_distances_apart_where_the_official_one_cannot():
    scores, valid = -torch.tensor([[30.0, 31.0, 34.0], [30.0, 31.0, 34.0]]), torch.ones(2, 3, dtype=torch.bool)
    raw, scaled = (weighing.confidence_weights(scores, valid, raw=raw) for raw in (True, False))
    torch.testing.assert_close(raw, torch.full((2, 3), 1 / 3), rtol=1e-4, atol=0)
    want = torch.exp(-torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(scaled, (want / want.sum()).expand(2, 3))
    torch.testing.assert_close(weighing.confidence_weights(scores * 5 + 900, valid), scaled)  # whatever the unit
    assert weighing.confidence_weights(torch.full((1, 3), 200.0), valid[:1], raw=True).isfinite().all()
    torch.testing.assert_close(weighing.confidence_weights(torch.zeros(1, 3), valid[:1]), torch.full((1, 3), 1 / 3))


def test_drawn_items_keep_the_distances_of_the_list_that_they_are_from():
    scores, valid = -torch.tensor([[30.0, 31.0, 34.0, 38.0]]), torch.ones(1, 4, dtype=torch.bool)
    distance, place = weighing.scaled_distance(scores, valid), torch.tensor([[0, 2, 0]])
    drawn = torch.tensor([[True, True, False]])
    weight = weighing.confidence_weights(scores.gather(1, place), drawn, distance=distance.gather(1, place))
    want = torch.exp(-torch.tensor([[0.0, 0.5, torch.inf]]))
    torch.testing.assert_close(weight, want / want.sum())
    whole = weighing.confidence_weights(scores, valid)
    assert torch.equal(weighing.confidence_weights(scores, valid, distance=distance), whole)


def test_lists_of_which_raw_confidence_says_nothing():
    scores = torch.tensor([[-19.0, -30.0], [-18.0, -30.0], [-500.0, 3.0], [-500.0, 3.0], [-19.0, -19.0]])
    valid = torch.tensor([[True, True], [True, True], [True, True], [True, False], [False, False]])
    below = weighing.below_floor(scores, valid)
    assert below.tolist() == [True, False, False, True, False]
    weight = weighing.confidence_weights(torch.tensor([[-40.0, -45.0]]), valid[:1], raw=True)
    assert torch.equal(weight, torch.full((1, 2), 0.5))


def test_places_far_down_a_list_weigh_something():
    valid, place = torch.tensor([[True, True, False], [False, False, False]]), torch.tensor([[140, 120, 0], [1, 2, 3]])
    expected = torch.tensor([[math.exp(-20.0), 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(weighing.position_weights(valid, 1.0, place), expected)


def test_dros_equals_a_plain_loop_also_where_the_item_is_nearly_all_of_the_sum():
    scores, share = (
        torch.tensor([[3.0, -1.0, 0.5], [9.0, 0.0, 0.0]], dtype=torch.float64),
        torch.tensor([0.5, 0.7, 0.6]).double(),
    )
    energy = ranking.log_energy(scores, torch.eye(3, dtype=torch.float64), share, beta=2.0)
    loss = ranking.dros(scores, share.expand(2, 3), energy, beta=2.0)
    for t in range(2):
        for c in range(3):
            parts = [math.exp(share[j] * (scores[t, j] - int(j == c)) ** 2 / 2) for j in range(3)]
            assert loss[t, c].item() == pytest.approx(math.log(sum(parts)), rel=1e-9)
    large = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    energy = ranking.log_energy(large, torch.eye(3), share.float())
    loss = ranking.dros(large, share.float().expand(1, 3), energy)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), large)[0].isfinite().all()


# ---- RD ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["case_a_static", "case_a_dynamic"])
def test_golden_rd(golden, case):
    z = golden(f"rd/{case}")
    names = ("target", "negative", "candidate")
    target, negative, listed = (z[f"in.{name}_scores"].requires_grad_() for name in names)
    valid = torch.ones_like(listed, dtype=torch.bool)
    weights = {"position": weighing.position_weights(valid, z["hp.lam"].item(), dtype=torch.float64)}
    torch.testing.assert_close(weights["position"][:1], z["out.weight_static"], **CLOSE)
    if z["hp.dynamic"]:
        rank = ranking.estimated_rank(listed, z["in.dynamic_scores"], int(z["hp.n_items"]))
        weights["discrepancy"] = weighing.discrepancy_weights(rank, torch.arange(listed.shape[1]), z["hp.mu"].item())
        torch.testing.assert_close(weights["discrepancy"], z["out.weight_dynamic"], **CLOSE)
    weight = weighing.combine(weights, dict.fromkeys(weights, 1.0), "product", bool(z["hp.renormalize"]))
    torch.testing.assert_close(weight, z["out.weight"].expand_as(weight), **CLOSE)
    regular = (F.softplus(-target).sum(1) + F.softplus(negative).sum(1)).mean()
    torch.testing.assert_close(regular, z["out.regular_loss"], **CLOSE)
    total = regular + z["hp.alpha"] * ranking.list_bce(listed, weight).mean()
    torch.testing.assert_close(total, z["out.total"], **CLOSE)
    for name, gradient in zip(names, torch.autograd.grad(total, [target, negative, listed]), strict=True):
        torch.testing.assert_close(gradient, z[f"grad.{name}_scores"], **CLOSE_GRADIENT)


def test_golden_rd_as_unkd_ported_it(golden):
    z = golden("rd/case_a_unkd")
    user, table = z["in.student_user"].requires_grad_(), z["in.student_item"].requires_grad_()
    rows = z["in.users"]
    listed, drawn = (list_scores(user[rows], table, z[f"in.{name}"][rows]) for name in ("teacher_topk", "dynamic_items"))
    place = torch.arange(listed.shape[1]).expand_as(listed)
    rank = ranking.estimated_rank(listed, drawn, len(table)) + 1  # the port's own; its ranks of the teacher start at 0 too
    weights = {
        "position": weighing.position_weights(torch.ones_like(listed, dtype=torch.bool), z["hp.lam"].item(), place),
        "discrepancy": weighing.discrepancy_weights(rank, place, z["hp.mu"].item()),
    }
    weight = weighing.combine(weights, dict.fromkeys(weights, 1.0), "product", True)
    torch.testing.assert_close(weight, z["out.weight"], rtol=1e-6, atol=1e-7)  # it adds an epsilon
    total = ranking.list_bce(listed, weight).mean() / listed.shape[1]
    torch.testing.assert_close(total, z["out.total"], rtol=1e-6, atol=1e-8)
    for name, gradient in zip(("user", "item"), torch.autograd.grad(total, [user, table]), strict=True):
        torch.testing.assert_close(gradient, z[f"grad.student_{name}"], rtol=1e-6, atol=1e-8)


# ---- RRD, UnKD and the soft top-K --------------------------------------------------------------------------------------


def test_golden_rrd(golden):
    z = golden("de_rrd/case_a_rrd")
    listed, others = z["in.interesting_scores"].requires_grad_(), z["in.uninteresting_scores"].requires_grad_()
    total = ranking.relaxed_listwise(listed, others).sum()
    torch.testing.assert_close(total, z["out.total"], **CLOSE)
    for name, gradient in zip(("interesting", "uninteresting"), torch.autograd.grad(total, [listed, others]), strict=True):
        torch.testing.assert_close(gradient, z[f"grad.{name}_scores"], **CLOSE_GRADIENT)
    z = golden("de_rrd/case_a_rrd_unkd")  # the port takes sigmoids of the scores and a mean
    listed, others = z["in.interesting_scores"].requires_grad_(), z["in.uninteresting_scores"].requires_grad_()
    total = ranking.relaxed_listwise(listed.sigmoid(), others.sigmoid()).mean()
    torch.testing.assert_close(total, z["out.total"], **CLOSE)
    for name, gradient in zip(("interesting", "uninteresting"), torch.autograd.grad(total, [listed, others]), strict=True):
        torch.testing.assert_close(gradient, z[f"grad.{name}_scores"], **CLOSE_GRADIENT)


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_listwise_with_gaps_equals_logsumexp_without_them(scale):
    listed, others = draw(2, 4, scale=scale), draw(2, 5, seed=1, scale=scale)
    valid, free = torch.tensor([[True] * 3 + [False], [False] * 4]), torch.tensor([[True, False, True, True, False]] * 2)
    loss = ranking.relaxed_listwise(listed, others, valid, free)
    kept = others[0][free[0]]
    expected = sum(torch.cat([listed[0, k:3], kept]).logsumexp(0) - listed[0, k] for k in range(3))
    torch.testing.assert_close(loss, torch.stack([expected, torch.zeros_like(expected)]))
    got, want = torch.autograd.grad(loss.sum(), [listed, others]), torch.autograd.grad(expected, [listed, others])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_listwise_is_stable_at_extreme_scores():
    listed = torch.tensor([[3e4, 2e4, -5e4], [0.0, 0.0, 0.0]], requires_grad=True)
    others = torch.tensor([[-1e4], [4e4]], requires_grad=True)
    loss = ranking.relaxed_listwise(listed, others)
    assert loss.isfinite().all()
    assert loss[1] > 2000
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss.sum(), [listed, others]))


def test_golden_unkd_pairs(golden):
    z = golden("unkd/case_a")
    user, table, rows = z["in.student_user"].requires_grad_(), z["in.student_item"].requires_grad_(), z["in.users"]
    better, worse = (list_scores(user[rows], table, z[f"in.{name}_items"][rows]) for name in ("better", "worse"))
    total = ranking.pairwise(better, worse).mean()
    torch.testing.assert_close(total, z["out.total"], rtol=1e-8, atol=1e-9)  # its code adds 1e-10 inside the logarithm
    for name, gradient in zip(("user", "item"), torch.autograd.grad(total, [user, table]), strict=True):
        torch.testing.assert_close(gradient, z[f"grad.student_{name}"], **CLOSE_GRADIENT)


def test_pairs_that_do_not_count():
    better, worse = draw(2, 3), draw(2, 3, seed=1)
    loss = ranking.pairwise(better, worse, torch.tensor([[True, False, True], [False] * 3]))
    assert loss[0].item() == pytest.approx(sum(F.softplus(worse[0, p] - better[0, p]).item() for p in (0, 2)) / 2)
    assert loss[1] == 0


def test_soft_top_k_equals_plain_sums_and_is_least_at_the_teacher():
    listed, teacher = draw(3, 4), draw(3, 4, seed=1)
    valid = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    labels = ranking.soft_targets(teacher, valid, 2.0)
    loss = ranking.soft_top_k(listed, labels, valid, temperature=2.0)
    for t, k in enumerate((4, 2, 0)):
        p, q = (torch.softmax(x[t, :k] / 2, 0) for x in (teacher, listed))
        assert loss[t].item() == pytest.approx(-(p * q.log()).sum().item())
    at_teacher = ranking.soft_top_k(teacher.detach().clone().requires_grad_() + 7, labels, valid, 2.0)
    assert (at_teacher <= loss + 1e-12).all()


def test_soft_top_k_of_all_equals_plain_sums():
    user, table, items = inputs()
    items[1, 2:] = 0
    items[4] = 0
    teacher, valid = draw(7, 4, seed=3), items > 0
    listed = list_scores(user, table, items)
    labels = ranking.soft_targets(teacher, valid, 0.5)
    loss = ranking.soft_top_k_of_all(user, table, items, listed, labels, 0.5)
    full = (user @ table[1:].T / 0.5).log_softmax(1)
    plain = torch.zeros(7, dtype=torch.float64)
    for t in range(7):
        k = int(valid[t].sum())
        plain[t] = -(torch.softmax(teacher[t, :k].detach() / 0.5, 0) * full[t, items[t, :k] - 1]).sum()
    torch.testing.assert_close(loss, plain)
    for got, want in zip(*(torch.autograd.grad(x.sum(), [user, table]) for x in (loss, plain)), strict=True):
        torch.testing.assert_close(got, want)


# ---- what holds for all ------------------------------------------------------------------------------------------------


def of_list(listed, teacher, valid):
    """Every loss of a list, `[T]`, and every weight."""
    rank = ranking.estimated_rank(listed, torch.linspace(-2, 2, 9, dtype=torch.float64).expand(len(listed), 9), 30)
    place = torch.arange(listed.shape[1]).expand_as(valid)
    weights = {
        "position": weighing.position_weights(valid, 2.0),
        "confidence": weighing.confidence_weights(teacher, valid),
        "raw": weighing.confidence_weights(teacher, valid, raw=True),
        "consistency": weighing.consistency_weights(rank, 20, valid),
        "discrepancy": weighing.discrepancy_weights(rank, place, 0.1) * valid,
    }
    factors = dict.fromkeys(weights, 0.5)
    summed = weighing.combine(weights, factors, "sum", True)
    energy = torch.full((len(listed),), 9.0, dtype=torch.float64)
    return weights | {
        "bce": ranking.list_bce(listed, summed, listed[:, :1]),
        "product": ranking.list_bce(listed, weighing.combine(weights, factors, "product", False)),
        "dros": ranking.weighted_dros(ranking.dros(listed, torch.full_like(listed, 0.6), energy), summed),
        "listwise": ranking.relaxed_listwise(listed, listed[:, :1] - 1, valid),
        "softmax": ranking.soft_top_k(listed, ranking.soft_targets(teacher, valid, 2.0), valid, 2.0),
    }


def test_a_list_that_is_filled_up_is_as_good_as_a_short_one():
    listed, teacher = draw(5, 6), draw(5, 6, seed=1).detach().sort(1, descending=True).values
    valid = torch.arange(6).expand(5, 6) < 4
    short = of_list(listed[:, :4], teacher[:, :4], valid[:, :4])
    for filler in (0.0, 1e4, -1e4):
        filled, said = (x.masked_fill(~valid, filler) for x in (listed, teacher))
        for name, value in of_list(filled, said, valid).items():
            torch.testing.assert_close(value[:, :4] if value.dim() == 2 else value, short[name], msg=name)
            if value.dim() == 2:
                assert (value[:, 4:] == 0).all(), name
            else:
                gradient = torch.autograd.grad(value.sum(), listed, retain_graph=True)[0]
                assert (gradient[:, 4:] == 0).all(), name


def test_an_empty_list_costs_nothing():
    listed = draw(2, 3)
    for name, value in of_list(listed, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)).items():
        assert (value == 0).all(), name
        if value.requires_grad:
            assert (torch.autograd.grad(value.sum(), listed, retain_graph=True)[0] == 0).all(), name


def test_gradient_reaches_the_student_alone():
    listed, teacher = draw(3, 4), draw(3, 4, seed=1)
    for name, value in of_list(listed, teacher, torch.ones(3, 4, dtype=torch.bool)).items():
        if name in ("bce", "product", "dros", "listwise", "softmax"):
            got = torch.autograd.grad(value.sum(), [listed, teacher], retain_graph=True, allow_unused=True)
            assert got[0].abs().sum() > 0, name
            assert got[1] is None, name
        else:
            assert not value.requires_grad, name


def test_gradients():
    user, table, items = inputs(rows=3, n_items=6)
    valid, weight = items > 2, draw(3, 4, seed=3).detach().abs()
    checks = {
        "scores": lambda u, w: list_scores(u, w, items),
        "bce": lambda u, w: ranking.list_bce(list_scores(u, w, items), weight, shared_scores(u, w, items[:2])),
        "listwise": lambda u, w: ranking.relaxed_listwise(list_scores(u, w, items), shared_scores(u, w, items[:1]), valid),
        "softmax": lambda u, w: ranking.soft_top_k(list_scores(u, w, items), weight * valid, valid, 2.0),
        "all": lambda u, w: ranking.soft_top_k_of_all(u, w, items, list_scores(u, w, items), weight, 2.0),
        "dros": lambda u, w: ranking.dros(
            list_scores(u, w, items), weight, ranking.log_energy(u, w[1:], torch.full((6,), 0.7).double())
        ),
    }
    for name, check in checks.items():
        assert torch.autograd.gradcheck(check, (user, table)), name
