"""The chunked cross-entropy is the plain one, in value and gradient."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llmers.losses import task


def inputs(rows=37, items=50, dim=8, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    user = torch.randn(rows, dim, dtype=torch.float64, generator=generator) * scale
    table = torch.randn(items, dim, dtype=torch.float64, generator=generator)
    target = torch.randint(items, (rows,), generator=generator)
    return user.requires_grad_(), table.requires_grad_(), target


def on_meta():
    user, table, target = (x.detach().to("meta") for x in inputs())
    return user.requires_grad_(), table.requires_grad_(), target


@pytest.mark.parametrize("scale", [1.0, 300.0])  # 300: logits in the thousands, where exp alone would overflow
@pytest.mark.parametrize("cotangent", ["uniform", "by row"])
def test_equals_plain_cross_entropy(monkeypatch, scale, cotangent):
    monkeypatch.setattr(task, "_CHUNK", 10)  # several chunks, the last of them short
    user, table, target = inputs(scale=scale)
    weight = torch.full((37,), 0.3) if cotangent == "uniform" else torch.rand(37)
    ours = task.cross_entropy(user, table, target)
    plain = F.cross_entropy(user @ table.T, target, reduction="none")
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)
    gradients = torch.autograd.grad((weight * ours).sum(), [user, table])
    expected = torch.autograd.grad((weight * plain).sum(), [user, table])
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("cotangent", ["uniform", "by row"])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_weighted_rows_are_the_plain_ones_times_their_weight(monkeypatch, scale, cotangent):
    monkeypatch.setattr(task, "_CHUNK", 10)
    user, table, target = inputs(scale=scale)
    weight = torch.rand(37, dtype=torch.float64)
    weight[3] = 0
    upstream = torch.full((37,), 0.3) if cotangent == "uniform" else torch.rand(37)
    ours = task.cross_entropy(user, table, target, weight)
    plain = F.cross_entropy(user @ table.T, target, reduction="none") * weight
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)
    for got, want in zip(
        torch.autograd.grad((upstream * ours).sum(), [user, table]),
        torch.autograd.grad((upstream * plain).sum(), [user, table]),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(task.cross_entropy(user, table, target, weight), plain)


def test_a_weight_costs_the_table_s_gradient_once(monkeypatch):
    user, table, target = inputs()
    monkeypatch.setattr(task, "_table_gradient", lambda *_: pytest.fail("made again"))
    task.cross_entropy(user, table, target, torch.rand(37, dtype=torch.float64)).mean().backward()


def test_a_weight_may_be_wider_than_what_is_scored():
    user, table, target = inputs()
    user, table, weight = user.detach().bfloat16().requires_grad_(), table.detach().bfloat16(), torch.rand(37)
    loss = task.cross_entropy(user, table, target, weight)
    plain = F.cross_entropy(user.float() @ table.float().T, target, reduction="none") * weight
    torch.testing.assert_close(loss, plain)
    assert torch.autograd.grad(loss.sum(), user)[0].dtype == torch.bfloat16


def test_what_half_precision_cannot_sum():
    user, table = torch.tensor([[4.0, 0.0]]).half().requires_grad_(), torch.tensor([[4.0, 1.0], [0.0, 1.0]]).half()
    loss = task.cross_entropy(user, table, torch.tensor([1]))  # scores 16, whose exponential is 8.9 million, and 0
    torch.testing.assert_close(loss, torch.tensor([16.0]))
    assert torch.autograd.grad(loss.sum(), user)[0].tolist() == [[4.0, 0.0]]


def test_value_worked_out_by_hand():
    user, table = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [1.0, 0.0]])
    loss = task.cross_entropy(user, table, torch.tensor([1]))  # scores 0 and 1, target the second: log(1 + e^-1)
    torch.testing.assert_close(loss, torch.tensor([0.31326168]))


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor):
                self.entries = max(self.entries, each.numel())
        return made


@pytest.mark.parametrize("cotangent", ["uniform", "by row"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_more_than_a_chunk_of_logits_is_ever_in_memory_and_none_is_kept(monkeypatch, cotangent, weighted):
    monkeypatch.setattr(task, "_CHUNK", 10)
    kept: list[int] = []
    user, table, target = inputs(rows=95, items=60)
    weight = torch.rand(95, dtype=torch.float64) if weighted else None
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = task.cross_entropy(user, table, target, weight)
        (loss.sum() if cotangent == "uniform" else loss.square().sum()).backward()
    assert max(kept) == user.numel(), "the vectors and their gradients, 95 x 8 and 60 x 8"
    assert largest.entries <= max(10 * 60, user.numel())
    with torch.no_grad(), Largest() as largest:
        task.cross_entropy(user, table, target, weight)
    assert largest.entries <= 10 * 60


def test_frozen_table_gets_no_gradient_and_the_user_the_same():
    user, table, target = inputs()
    with_table = torch.autograd.grad(task.cross_entropy(user, table, target).sum(), user)[0]
    frozen = torch.autograd.grad(task.cross_entropy(user, table.detach(), target).sum(), user)[0]
    torch.testing.assert_close(frozen, with_table)


def test_without_gradient_the_same_value():
    user, table, target = inputs()
    with torch.no_grad():
        value = task.cross_entropy(user, table, target)
    torch.testing.assert_close(value, task.cross_entropy(user, table, target).detach())


@pytest.mark.parametrize("reduced", ["sum", "by row"])
def test_what_an_accelerator_computes_is_not_looked_at(reduced):
    """On the meta device there is nothing to look at."""
    user, table, target = on_meta()
    loss = task._ChunkedCrossEntropy.apply(user, table, target, torch.empty(37, device="meta"))
    (loss.sum() / 37 if reduced == "sum" else loss.square().sum()).backward()
    assert user.grad.shape == user.shape
    assert table.grad.shape == table.shape


def test_after_a_sum_an_accelerator_makes_the_table_s_gradient_once(monkeypatch):
    monkeypatch.setattr(task, "_table_gradient", lambda *_: pytest.fail("made again"))
    user, table, target = on_meta()
    (3 * task._ChunkedCrossEntropy.apply(user, table, target, None).sum() / 37 + 1).backward()
