"""Hint, DE and HTD as callbacks: the official numbers through the modules, and students that come to be like their teachers."""

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from tiny import random_dataset
from torch import Tensor, nn

from lit_llmers.backbones.bpr_mf import BPRMF
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.callbacks.embedding_distillation import (
    DRAWN,
    EmbeddingDistillation,
    Experts,
    Hint,
    Topology,
    distinct,
    drawn,
    item_sets,
    number_of_targets,
    two_layers,
)
from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.data.loader import SequenceDataModule
from lit_llmers.data.pairs import PairDataModule
from lit_llmers.errors import UserError
from lit_llmers.losses.embedding import expert_weights
from lit_llmers.students.collaborative import CollaborativeRecommender
from lit_llmers.students.output import StudentOutput
from lit_llmers.students.sequential import SequentialRecommender

TEXT = torch.randn(51, 6, generator=torch.Generator().manual_seed(1))
TEXT[0] = 0


def sasrec(dim: int = 8) -> SequentialRecommender:
    torch.manual_seed(0)
    return SequentialRecommender(SASRec(50, 10, dim=dim, dropout=0.0), targets_per_row=4.0)


def output_of(items: Tensor, targets: int) -> StudentOutput:
    return StudentOutput(torch.zeros(targets, items.shape[1]), items)


def fit(student: L.LightningModule, callback: L.Callback, epochs: int = 2, watch: L.Callback | None = None) -> L.Trainer:
    data = random_dataset(users=60, n_items=50)
    if isinstance(student, CollaborativeRecommender):
        module: L.LightningDataModule = PairDataModule(data, 32, 2, True, seed=0)
    else:
        module = SequenceDataModule(data, SequenceConfig(max_length=10), 16, True, seed=0)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback, *([watch] if watch else [])],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(student, datamodule=module)
    return trainer


def official(experts: Experts, z: dict[str, Tensor], gate: str, expert: str) -> None:
    """Copy the official parameters of one side."""
    number = len(experts.bias)
    names = [expert.format(k) for k in range(number)]
    with torch.no_grad():
        experts.gate.weight.copy_(z[f"param.{gate}.weight"])
        experts.gate.bias.copy_(z[f"param.{gate}.bias"])
        experts.inner.weight.copy_(torch.cat([z[f"param.{name}.0.weight"] for name in names]))
        experts.inner.bias.copy_(torch.cat([z[f"param.{name}.0.bias"] for name in names]))
        experts.outer.copy_(torch.cat([z[f"param.{name}.2.weight"].T for name in names]))
        experts.bias.copy_(torch.stack([z[f"param.{name}.2.bias"] for name in names]))


def assert_official_gradients(experts: Experts, z: dict[str, Tensor], scale: float, gate: str, expert: str) -> None:
    names = [expert.format(k) for k in range(len(experts.bias))]
    for ours, theirs in (
        (experts.gate.weight.grad, z[f"grad.param.{gate}.weight"]),
        (experts.inner.weight.grad, torch.cat([z[f"grad.param.{name}.0.weight"] for name in names])),
        (experts.outer.grad, torch.cat([z[f"grad.param.{name}.2.weight"].T for name in names])),
        (experts.bias.grad, torch.stack([z[f"grad.param.{name}.2.bias"] for name in names])),
    ):
        torch.testing.assert_close(ours * scale, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["user", "item"])
def test_golden_experts_side_by_side(golden, kind):
    z = golden("de_rrd/case_a_de")
    ids = z[f"in.{kind}s"]
    student, teacher = z[f"param.{kind}_emb.weight"][ids], z[f"in.teacher_{kind}"][ids]
    experts = Experts(student.shape[1], teacher.shape[1], int(z["hp.n_experts"])).double()
    names = {"gate": f"{kind}_selection_net.0", "expert": f"{kind}_experts.{{}}.mlp"}
    official(experts, z, **names)
    chosen = expert_weights(experts.gate(teacher), z[f"in.gumbel_{kind}"], z["hp.temperature"].item())
    loss = experts.distance(student, teacher, chosen).sum()
    torch.testing.assert_close(loss, z[f"out.loss_{kind}"], rtol=1e-9, atol=1e-10)
    loss.backward()
    assert_official_gradients(experts, z, {"user": 1.0, "item": 0.5}[kind], **names)


def test_golden_hint_is_the_map_of_the_callback(golden):
    z = golden("hint_fitnets/case_a")
    ids = z["in.items"]
    student, teacher = z["param.item_emb.weight"][ids], z["in.teacher_item"][ids]
    hint = Hint(two_layers(student.shape[1], teacher.shape[1])).double()
    hint.load_state_dict({f"map.{key[-8:].lstrip('p.')}": z[key] for key in z if key.startswith("param.item_experts.0.mlp")})
    torch.testing.assert_close(hint(student, teacher).sum(), z["out.loss_item"], rtol=1e-9, atol=1e-10)


def test_topology_is_balanced_with_its_assignment():
    torch.manual_seed(0)
    experts = Experts(3, 6, 4)
    student, teacher = torch.randn(9, 3), torch.randn(9, 6)

    def value(balance: float) -> Tensor:
        torch.manual_seed(1)
        return Topology(experts, balance)(student, teacher)

    assignment = value(0.0)
    torch.manual_seed(1)
    torch.testing.assert_close(assignment, experts(student, teacher))
    torch.testing.assert_close(value(0.3), 0.3 * value(1.0) + 0.7 * value(0.0))


def test_the_gate_of_a_topology_learns_under_autocast():
    """What autocast has cast without a gradient it may hand out again with none: the gate is asked once, and gets one."""
    torch.manual_seed(0)
    experts, asked = Experts(3, 6, 4), []
    experts.gate.register_forward_hook(lambda module, given, logits: asked.append(logits.requires_grad))
    with torch.autocast("cpu", torch.bfloat16):
        loss = Topology(experts, 0.5)(torch.randn(9, 3), torch.randn(9, 6)).mean()
    loss.backward()
    assert asked == [True]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in experts.gate.parameters())


def test_a_hint_weighs_items_by_their_targets():
    term = EmbeddingDistillation(TEXT, map="none", share=1.0).build(sasrec(6))
    items = torch.randn(51, 6)
    batch = {"target": torch.tensor([[0, 3, 3], [5, 3, 9]])}
    expected = sum((items[i] - TEXT[i]).square().sum() for i in (3, 3, 5, 3, 9)) / (2 * 4.0)  # rows x targets per row
    torch.testing.assert_close(term(output_of(items, 5), batch), expected)


def test_negatives_of_a_pair_weigh_as_much_as_its_target():
    student = CollaborativeRecommender(BPRMF(10, 50, dim=6))
    term = EmbeddingDistillation(TEXT, map="none").build(student)
    items = torch.randn(51, 6)
    batch = {"target": torch.tensor([3, 5]), "negatives": torch.tensor([[7, 8], [9, 7]])}
    distance = (items - TEXT).square().sum(1)
    expected = (distance[[3, 5]].mean() + distance[[7, 8, 9, 7]].mean()) / 2
    torch.testing.assert_close(term(output_of(items, 2), batch), expected)


@pytest.mark.parametrize("kind", ["hint", "experts", "topology"])
@pytest.mark.parametrize("make", [sasrec, lambda: CollaborativeRecommender(BPRMF(60, 50, dim=8))])
def test_an_item_without_a_vector_adds_nothing(kind, make):
    """Beside those that have one; and where none has, there is no loss at all."""
    text = TEXT.clone()
    text[[3, 7]] = 0
    term = EmbeddingDistillation(text, kind=kind, share=1.0).build(make())
    items = torch.randn(51, 8, requires_grad=True)

    def value(*target: int) -> Tensor:
        torch.manual_seed(0)
        batch = {"target": torch.tensor(target)} | ({} if make is sasrec else {"negatives": torch.tensor([[3], [7]])})
        return term(output_of(items, len(target)), batch)

    torch.testing.assert_close(value(5, 3, 9, 7), value(5, 9) / 2)
    nothing = value(3, 7)
    assert nothing.item() == 0
    nothing.backward()
    assert not items.grad.any()


def test_topology_counts_an_item_once():
    term = EmbeddingDistillation(TEXT, kind="topology", share=1.0).build(sasrec())
    items = torch.randn(51, 8)
    values = []
    for target in ([[3, 5, 9, 4]], [[9, 4, 5, 3]], [[3, 3, 5, 9, 4, 4, 9, 3]]):
        torch.manual_seed(0)
        values.append(term(output_of(items, len(target[0])), {"target": torch.tensor(target)}) / len(target[0]))
    assert values[0] == values[1] == values[2]


def test_k_micro_batches_equal_one_batch():
    term = EmbeddingDistillation(TEXT, share=1.0).build(sasrec())
    items, target = torch.randn(51, 8), torch.randint(0, 51, (8, 6))
    whole = term(output_of(items, 0), {"target": target})
    parts = [term(output_of(items, 0), {"target": part}) for part in target.split(2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize("kind", ["hint", "experts"])
def test_a_share_estimates_the_same(kind):
    student, items = sasrec(), torch.randn(51, 8)
    batch = {"target": torch.randint(0, 51, (40, 8))}
    torch.manual_seed(0)
    whole = EmbeddingDistillation(TEXT, kind=kind, share=1.0).build(student)
    part = EmbeddingDistillation(TEXT, kind=kind, share=0.25).build(student)
    part.load_state_dict(whole.state_dict())
    with torch.no_grad():
        means = [np.mean([term(output_of(items, 0), batch).item() for _ in range(200)]) for term in (whole, part)]
    assert means[1] == pytest.approx(means[0], rel=0.03)


def test_targets_are_counted_without_a_look_at_them():
    output = output_of(torch.empty(5, 2, device="meta"), 3)
    assert number_of_targets(output, {"target": torch.empty(2, 4, device="meta")}) == 3
    assert number_of_targets(output, {"target": torch.empty(7, device="meta")}) == 7


def test_what_a_step_looks_at():
    target = torch.arange(1, 1001).view(10, 100)
    known = torch.ones(1001).bool()
    known[[0, 2, 4]] = False
    (whole, share), *_ = item_sets({"target": target}, known)
    assert torch.equal(whole, target[known[target]])
    assert share == 0.998
    part = drawn(whole, None, DRAWN)
    assert len(part) == len(part.unique()) == DRAWN
    assert len(drawn(whole, 0.1, DRAWN)) == 100
    assert torch.equal(drawn(whole, 1.0, DRAWN), whole)
    few = item_sets({"target": torch.tensor([4, 5]), "negatives": torch.ones(2, 3).long()}, known)
    assert [(len(drawn(each, None, DRAWN)), share) for each, share in few] == [(1, 0.5), (6, 1.0)]
    ids, share = distinct(torch.tensor([7, 2, 7, 7]), 9)
    assert (ids.tolist(), share.tolist()) == ([2, 7], [0.25, 0.75])


@pytest.mark.parametrize("kind", ["hint", "experts", "topology"])
@pytest.mark.parametrize("make", [sasrec, lambda: CollaborativeRecommender(BPRMF(60, 50, dim=8))])
def test_training_brings_the_student_nearer_and_reaches_the_maps(kind, make):
    student = make()
    of_experts = {} if kind == "hint" else {"experts": 3, "final_temperature": 0.1}
    callback = EmbeddingDistillation(TEXT, kind=kind, weight=5.0, **of_experts)
    term = callback.build(student)
    before = [parameter.detach().clone() for parameter in term.parameters()]
    student.distillation["embedding"] = term
    student.optimizer = SimpleNamespace(lr=0.05, weight_decay=0.0, warmup_steps=0, schedule="constant")
    batch = {"target": torch.arange(1, 51)}

    def value() -> float:
        torch.manual_seed(0)
        return term(output_of(student.item_table().detach(), 50), batch).item()

    initial = value()
    fit(student, callback, epochs=4)
    assert value() < 0.8 * initial
    assert all(not torch.equal(old, new) for old, new in zip(before, term.parameters(), strict=True)), "the optimiser has them"
    assert not student.item_table()[0].any()


def test_the_choice_cools_down():
    callback = EmbeddingDistillation(TEXT, kind="topology", temperature=1.0, final_temperature=1e-10)
    student = sasrec()
    student.distillation["embedding"] = callback.build(student)
    experts = student.distillation["embedding"].distance.experts
    seen = []
    for epoch in (0, 5, 9):
        callback._set_weight(SimpleNamespace(current_epoch=epoch, max_epochs=10), student)
        seen.append(experts.temperature)
    assert seen == pytest.approx([1.0, 1e-5, 1e-9])
    assert experts(torch.randn(5, 8), TEXT[1:6]).isfinite().all()


def test_the_record_of_the_teacher_and_the_maps_are_no_part_of_the_model():
    student = sasrec()
    trainer = fit(student, EmbeddingDistillation(TEXT, map="mlp"))
    names = {name for name, _ in student.named_parameters() if name.startswith("distillation")}
    assert len(names) == 4
    assert not [name for name in student.state_dict() if name.endswith("embedding.items")], "the signals are not saved"
    checkpoint = {"state_dict": dict(student.state_dict())}
    student.on_save_checkpoint(checkpoint)
    assert set(checkpoint["distillation"]) == names
    assert not [name for name in checkpoint["state_dict"] if "distillation" in name]
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == len(list(student.parameters()))


def test_half_precision_is_finite():
    term = EmbeddingDistillation(TEXT, kind="topology").build(sasrec())
    with torch.autocast("cpu", torch.bfloat16):
        loss = term(output_of(torch.randn(51, 8, requires_grad=True), 4), {"target": torch.tensor([[1, 2, 3, 4]])})
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "fitnet"}, "embedding_distillation.kind.*'fitnet'"),
        ({"map": "experts"}, "embedding_distillation.map.*'experts'"),
        ({"experts": 0}, "experts is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"final_temperature": -1.0}, "final_temperature is -1"),
        ({"balance": 2.0}, "balance is 2"),
        ({"share": 0.0}, "embedding_distillation: share is 0.0. It must be above 0 and at most 1, or null"),
        ({"kind": "experts", "map": "mlp"}, "map=mlp has no effect: it belongs to kind: hint"),
        ({"experts": 3}, "experts=3 has no effect: it belongs to kind: experts or topology"),
        ({"temperature": 2.0}, "temperature=2.0 has no effect"),
        ({"balance": 0.9}, "balance=0.9 has no effect: it belongs to kind: topology"),
        ({"kind": "experts", "balance": 0.9}, "balance=0.9 has no effect"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        EmbeddingDistillation(TEXT, **arguments)


def test_vectors_of_other_widths_need_a_map():
    with pytest.raises(UserError, match="student's have 8 numbers and the teacher's 6.*map=linear"):
        EmbeddingDistillation(TEXT, map="none").build(sasrec())
    assert isinstance(EmbeddingDistillation(TEXT).build(sasrec()).distance.map, nn.Linear)
