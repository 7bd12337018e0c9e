"""Sampled losses against values worked out with plain loops, their limits, and finite differences."""

import math

import pytest
import torch
from torch.nn import functional as F

from lit_llmers.losses.sampled import binary, bpr, gbce, own_softmax, sampled_softmax
from lit_llmers.losses.task import cross_entropy

PAIRWISE = {"binary": binary, "bpr": bpr, "gbce": lambda p, n: gbce(p, n, n_items=31, t=0.75), "softmax": own_softmax}


def inputs(rows=9, items=20, dim=6, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    user = torch.randn(rows, dim, dtype=torch.float64, generator=generator) * scale
    table = torch.randn(items + 1, dim, dtype=torch.float64, generator=generator)
    return user.requires_grad_(), table.requires_grad_(), torch.randint(1, items + 1, (rows,), generator=generator)


def scores(rows=7, k=5):
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(*shape, dtype=torch.float64, generator=generator).mul_(3) for shape in ((rows,), (rows, k))]
    return tuple(x.requires_grad_() for x in draw)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---- sampled softmax -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 300.0])  # 300: scores in the thousands, where exp alone would overflow
def test_all_items_as_negatives_with_uniform_q_are_the_full_cross_entropy(scale):
    user, table, target = inputs(scale=scale)
    log_q = torch.full((21,), -math.log(20), dtype=torch.float64)
    ours = sampled_softmax(user, table, target, torch.arange(1, 21), log_q)
    full = cross_entropy(user, table[1:], target - 1)
    torch.testing.assert_close(ours, full, rtol=1e-9, atol=1e-10)
    gradients = [torch.autograd.grad(loss.sum(), [user, table]) for loss in (ours, full)]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_sampled_softmax_equals_a_plain_loop_with_hits_and_repeats():
    user, table, target = inputs()
    q = torch.rand(21, dtype=torch.float64)
    q = q / q.sum()
    negatives = torch.tensor([3, 3, int(target[0]), 17, 8, int(target[4])])  # a repeat, and targets of two rows
    ours = sampled_softmax(user, table, target, negatives, q.log())
    for row, own in enumerate(target.tolist()):
        score = (table @ user[row]).tolist()
        rest = sum(math.exp(score[j]) / (6 * q[j].item()) for j in negatives.tolist() if j != own)
        assert ours[row].item() == pytest.approx(math.log(math.exp(score[own]) + rest) - score[own], rel=1e-12)


def test_the_denominator_is_unbiased_whatever_the_draw_is():
    user, table, target = inputs(rows=1)
    generator = torch.Generator().manual_seed(2)
    weight = torch.rand(20, dtype=torch.float64, generator=generator) + 0.1
    log_q = F.pad((weight / weight.sum()).log(), (1, 0), value=-torch.inf)
    own, drawn = table[target] @ user[0], torch.multinomial(weight, 200_000, replacement=True, generator=generator) + 1
    estimate = own + sampled_softmax(user, table, target, drawn, log_q)
    torch.testing.assert_close(estimate, (user @ table[1:].T).logsumexp(1), rtol=0, atol=0.01)


def test_a_row_whose_negatives_are_all_its_target_costs_nothing():
    user, table, _ = inputs(rows=2)
    loss = sampled_softmax(user, table, torch.tensor([4, 5]), torch.tensor([4, 4]), torch.zeros(21, dtype=torch.float64))
    gradient = torch.autograd.grad(loss.sum(), [user, table])
    assert loss[0] == 0
    assert loss[1] > 0
    assert all(x.isfinite().all() for x in gradient)
    assert (gradient[0][0] == 0).all()


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_sampled_softmax_is_in_full_precision_under_autocast(given):
    user, table, target = (x.detach() for x in inputs(dim=64))
    user, table, log_q = user.to(given), table.to(given), torch.randn(21).log_softmax(0)
    negatives = torch.arange(1, 21)
    exact = sampled_softmax(user.double(), table.double(), target, negatives, log_q.double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = sampled_softmax(user, table, target, negatives, log_q)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-4)


def test_sampled_softmax_gradients():
    user, table, target = inputs(rows=4)
    negatives, log_q = torch.tensor([1, 7, 7, int(target[0])]), torch.randn(21, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda u, w: sampled_softmax(u, w, target, negatives, log_q), (user, table))


# ---- one positive against k negatives --------------------------------------------------------------------------------


def test_values_worked_out_by_plain_loops():
    positive, negative = scores()
    power = 1 - 0.75 * (1 - 5 / 30)
    alpha = 5 / 30
    assert power == pytest.approx(alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)), "the paper's own form"
    for row in range(7):
        s, others = positive[row].item(), negative[row].tolist()
        misses = sum(math.log(1 - sigmoid(x)) for x in others)
        assert binary(positive, negative)[row].item() == pytest.approx(-(math.log(sigmoid(s)) + misses) / 6)
        expected = -(math.log(sigmoid(s) ** power) + misses) / 6
        assert gbce(positive, negative, 31, 0.75)[row].item() == pytest.approx(expected)
        expected = sum(-math.log(sigmoid(s - x)) for x in others) / 5
        assert bpr(positive, negative)[row].item() == pytest.approx(expected)
        expected = -math.log(math.exp(s) / (math.exp(s) + sum(map(math.exp, others))))
        assert own_softmax(positive, negative)[row].item() == pytest.approx(expected)


def test_gbce_lies_between_plain_and_fully_calibrated():
    positive, negative = scores()
    assert torch.equal(gbce(positive, negative, 31, 0.0), binary(positive, negative))
    full = -(F.logsigmoid(positive) * 5 / 30 + F.logsigmoid(-negative).sum(1)) / 6
    torch.testing.assert_close(gbce(positive, negative, 31, 1.0), full)
    assert torch.equal(gbce(positive, negative, 6, 1.0), binary(positive, negative)), "all items drawn: nothing to calibrate"
    assert torch.equal(gbce(positive, negative, 1, 1.0), binary(positive, negative))


@pytest.mark.parametrize("loss", PAIRWISE.values(), ids=PAIRWISE)
def test_lowest_where_the_positive_is_far_above_and_stable_at_large_scores(loss):
    positive, negative = torch.tensor([1e4, -1e4]), torch.tensor([[-1e4] * 3, [1e4] * 3])
    right, wrong = loss(positive, negative).tolist()
    assert right == 0
    assert math.isfinite(wrong)
    assert wrong > 1e3


def test_equal_scores_cost_log_two():
    level = torch.zeros(2), torch.zeros(2, 3)
    torch.testing.assert_close(binary(*level), torch.full((2,), math.log(2)))
    torch.testing.assert_close(bpr(torch.full((2,), 7.0), torch.full((2, 3), 7.0)), torch.full((2,), math.log(2)))
    torch.testing.assert_close(own_softmax(*level), torch.full((2,), math.log(4)))


@pytest.mark.parametrize("loss", PAIRWISE.values(), ids=PAIRWISE)
def test_gradients(loss):
    assert torch.autograd.gradcheck(loss, scores())
