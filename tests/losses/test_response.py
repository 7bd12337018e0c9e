"""Response losses against the official code's numbers, plain sums and finite differences."""

import math

import pytest
import torch

from lit_llmers.losses.response import kl, soft_bce, soft_labels
from lit_llmers.losses.scores import list_scores


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul_(2).requires_grad_()


def test_golden_cd(golden):
    z = golden("cd/case_a")
    user, table, rows = z["in.student_user"].requires_grad_(), z["in.student_item"].requires_grad_(), z["in.users"]
    items = z["in.sampled_items"][rows]
    teacher = list_scores(z["in.teacher_user"][rows], z["in.teacher_item"], items)
    label = soft_labels(teacher, z["hp.t1"].item(), z["hp.t2"].item())
    torch.testing.assert_close(label, z["out.soft_label"], rtol=1e-9, atol=1e-10)
    total = soft_bce(list_scores(user[rows], table, items), label).mean()
    torch.testing.assert_close(total, z["out.total"], rtol=1e-9, atol=1e-10)
    for name, gradient in zip(("user", "item"), torch.autograd.grad(total, [user, table]), strict=True):
        torch.testing.assert_close(gradient, z[f"grad.student_{name}"], rtol=1e-7, atol=1e-9)


def test_values_equal_plain_sums_and_fillers_do_not_count():
    student, teacher = draw(3, 4), draw(3, 4, seed=1)
    valid = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    label = soft_labels(teacher, 2.0, 0.3)
    bce, divergence = soft_bce(student, label, valid), kl(student, teacher, 2.0, valid)
    for t, k in enumerate((4, 2)):
        q = [1 / (1 + math.exp(-(x + 0.3) / 2)) for x in teacher[t, :k]]
        p = [1 / (1 + math.exp(-x)) for x in student[t, :k]]
        expected = -sum(a * math.log(b) + (1 - a) * math.log(1 - b) for a, b in zip(q, p, strict=True)) / k
        assert bce[t].item() == pytest.approx(expected)
        q, p = (torch.softmax(x[t, :k] / 2, 0) for x in (teacher, student))
        assert divergence[t].item() == pytest.approx(4 * (q * (q / p).log()).sum().item())
    assert bce[2] == 0
    assert divergence[2] == 0
    for loss in (bce, divergence):
        gradient = torch.autograd.grad(loss.sum(), student, retain_graph=True)[0]
        assert (gradient[~valid] == 0).all()
        assert gradient[0].abs().sum() > 0
        assert torch.autograd.grad(loss.sum(), teacher, retain_graph=True, allow_unused=True)[0] is None


def test_kl_is_zero_where_only_a_constant_differs():
    teacher = draw(3, 5)
    student = (teacher + 3).detach().requires_grad_()
    loss = kl(student, teacher, 1.7)
    torch.testing.assert_close(loss, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.autograd.grad(loss.sum(), student)[0].abs().max() < 1e-12


def test_stable_at_saturated_scores():
    student = torch.tensor([[500.0, -500.0]], requires_grad=True)
    loss = soft_bce(student, torch.tensor([[0.0, 1.0]]))
    assert loss.item() == pytest.approx(500)
    assert torch.autograd.grad(loss.sum(), student)[0].tolist() == [[0.5, -0.5]], "there is a way back"


def test_gradients():
    student, label, teacher = draw(3, 4), torch.rand(3, 4, dtype=torch.float64), draw(3, 4, seed=1).detach()
    assert torch.autograd.gradcheck(lambda s: soft_bce(s, label), (student,))
    assert torch.autograd.gradcheck(lambda s: kl(s, teacher, 1.3), (student,))
