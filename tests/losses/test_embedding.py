"""Embedding distillation against the official numbers of DE, Hint and HTD, and by plain loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from lit_llmers.losses.embedding import entity_topology, expert_weights, group_topology, gumbel_like, squared_distance

EXACT = {"rtol": 1e-9, "atol": 1e-10}
EXACT_GRADIENT = {"rtol": 1e-6, "atol": 1e-8}  # we leave out an epsilon inside a logarithm


def vectors(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def trained(z: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official parameters that got a gradient, by name."""
    return {key[len("param.") :]: z[key].requires_grad_() for key in z if f"grad.{key}" in z}


def assert_gradients(total: torch.Tensor, parameters: dict[str, torch.Tensor], z: dict[str, torch.Tensor]) -> None:
    ours = torch.autograd.grad(total, list(parameters.values()))
    for name, gradient in zip(parameters, ours, strict=True):
        torch.testing.assert_close(
            gradient, z[f"grad.param.{name}"], msg=lambda text, name=name: f"{name}: {text}", **EXACT_GRADIENT
        )


def expert(parameters: dict[str, torch.Tensor], name: str, student: torch.Tensor) -> torch.Tensor:
    inner = F.linear(student, parameters[f"{name}.0.weight"], parameters[f"{name}.0.bias"]).relu()
    return F.linear(inner, parameters[f"{name}.2.weight"], parameters[f"{name}.2.bias"])


def mixture(parameters, names: list[str], student, chosen) -> torch.Tensor:
    return torch.einsum("ne,end->nd", chosen, torch.stack([expert(parameters, name, student) for name in names]))


def test_golden_hint(golden):
    z = golden("hint_fitnets/case_a")
    parameters = trained(z)
    losses = {}
    for kind in ("user", "item"):
        ids = z[f"in.{kind}s"]
        student = expert(parameters, f"{kind}_experts.0.mlp", parameters[f"{kind}_emb.weight"][ids])
        losses[kind] = squared_distance(student, z[f"in.teacher_{kind}"][ids]).sum()
        torch.testing.assert_close(losses[kind], z[f"out.loss_{kind}"], **EXACT)
    total = losses["user"] + 0.5 * losses["item"]
    torch.testing.assert_close(total, z["out.total"], **EXACT)
    assert_gradients(total, parameters, z)


def test_golden_experts(golden):
    z = golden("de_rrd/case_a_de")
    parameters, temperature = trained(z), z["hp.temperature"].item()
    losses = {}
    for kind in ("user", "item"):
        ids = z[f"in.{kind}s"]
        teacher = z[f"in.teacher_{kind}"][ids]
        gate = (parameters[f"{kind}_selection_net.0.{part}"] for part in ("weight", "bias"))
        chosen = expert_weights(F.linear(teacher, *gate), z[f"in.gumbel_{kind}"], temperature)
        names = [f"{kind}_experts.{k}.mlp" for k in range(int(z["hp.n_experts"]))]
        student = mixture(parameters, names, parameters[f"{kind}_emb.weight"][ids], chosen)
        losses[kind] = squared_distance(student, teacher).sum()
        torch.testing.assert_close(losses[kind], z[f"out.loss_{kind}"], **EXACT)
    total = losses["user"] + 0.5 * losses["item"]
    assert_gradients(total, parameters, z)


def test_golden_topology_of_the_original_code(golden):
    z = golden("htd/case_a")
    parameters, groups = trained(z), int(z["hp.K"])
    assignment, student, teacher, group = 0.0, [], [], []
    for side, kind in enumerate(("user", "item")):
        ids = z[f"in.{kind}s"]
        teacher.append(z[f"in.teacher_{kind}"][ids])
        student.append(parameters[f"{kind}_emb.weight"][ids])
        logits = F.linear(teacher[-1], *(parameters[f"{kind}_v.0.{part}"] for part in ("weight", "bias")))
        group.append(logits.argmax(1) + side * groups)
        assert torch.equal(group[-1], z[f"out.group_{kind}"])
        chosen = expert_weights(logits, z[f"in.gumbel_{kind}"], z["hp.temperature"].item())
        names = [f"{kind}_f.{k}.net" for k in range(groups)]
        assignment = assignment + squared_distance(mixture(parameters, names, student[-1], chosen), teacher[-1]).sum()
    torch.testing.assert_close(assignment, z["out.ga_loss"], **EXACT)
    rows = torch.cat(student), torch.cat(teacher), torch.cat(group)
    topology = (entity_topology(*rows) + group_topology(*rows)).sum()
    torch.testing.assert_close(topology, z["out.td_loss"], **EXACT)
    total = z["hp.alpha"] * topology + (1 - z["hp.alpha"]) * assignment
    torch.testing.assert_close(total, z["out.total"], **EXACT)
    assert_gradients(total, parameters, z)


def test_topology_by_plain_loops():
    student, teacher = vectors((7, 3), (7, 5))
    group = torch.tensor([4, 0, 4, 4, 9, 0, 9])

    def cos(x: torch.Tensor, y: torch.Tensor) -> float:
        return (x @ y / x.norm() / y.norm()).item()

    members = {g: (group == g).nonzero().squeeze(1) for g in (0, 4, 9)}
    entities, groups = entity_topology(student, teacher, group), group_topology(student, teacher, group)
    for i in range(7):
        same = [j for j in range(7) if group[j] == group[i] and cos(teacher[i], teacher[j]) > 0]
        expected = sum((cos(student[i], student[j]) - cos(teacher[i], teacher[j])) ** 2 for j in same)
        assert entities[i].item() == pytest.approx(expected)
        means = [(student[m].mean(0), teacher[m].mean(0)) for m in members.values()]
        assert groups[i].item() == pytest.approx(sum((cos(s, student[i]) - cos(t, teacher[i])) ** 2 for s, t in means))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [entity_topology, group_topology])
def test_topologies_are_in_full_precision_under_autocast(loss, given):
    teacher, noise = (x.detach() for x in vectors((128, 64), (128, 64)))
    student, teacher = ((teacher + 0.05 * noise).to(given).requires_grad_(), teacher.to(given))
    group = torch.arange(128) % 5
    exact = loss(student.double(), teacher.double(), group)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher, group)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-7)
    gradients = [torch.autograd.grad(each.sum(), student)[0].double() for each in (value, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-4 if given == torch.float32 else 0.01, atol=1e-5)


def test_equal_topologies_cost_nothing():
    teacher = vectors((6, 4))[0].detach()
    turned = 3 * teacher @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    group = torch.tensor([0, 0, 1, 1, 1, 2])
    for loss in (entity_topology, group_topology):
        torch.testing.assert_close(loss(turned, teacher, group), torch.zeros(6, dtype=torch.float64))


def test_gradients_reach_the_student_alone():
    student, teacher = vectors((5, 3), (5, 4))
    same_width = vectors((5, 4))[0]
    group = torch.tensor([0, 1, 0, 1, 1])
    for loss in (entity_topology(student, teacher, group), group_topology(student, teacher, group)):
        loss.sum().backward()
    squared_distance(same_width, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda s: entity_topology(s, teacher, group), student)
    torch.testing.assert_close(same_width.grad, 2 * (same_width - teacher).detach())


def test_a_cold_choice_is_the_gumbel_maximum_and_follows_the_gate():
    logits = torch.tensor([2.0, 0.0, 1.0]).expand(20000, 3)
    torch.manual_seed(0)
    noise = gumbel_like(logits)
    chosen = expert_weights(logits, noise, 1e-10)
    assert torch.equal(chosen.argmax(1), (logits + noise).argmax(1))
    assert chosen.isfinite().all()
    assert chosen.amax(1).mean() > 0.999
    torch.testing.assert_close(chosen.mean(0), logits[0].softmax(0), atol=0.01, rtol=0)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.05)
    warm = expert_weights(logits, noise, 1e10)
    torch.testing.assert_close(warm, torch.full_like(warm, 1 / 3))
