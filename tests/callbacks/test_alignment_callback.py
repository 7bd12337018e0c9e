"""Alignment by plain loops, what competes with what, and students that agree with their texts after training."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_embedding_distillation import fit
from tiny import by_name, losses, small
from torch import Tensor
from torch.nn import functional as F

from lit_llmers.backbones.bpr_mf import BPRMF
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.callbacks.alignment import Alignment
from lit_llmers.callbacks.alignment_term import COLDEST, Bank
from lit_llmers.errors import UserError
from lit_llmers.losses import task
from lit_llmers.losses.alignment import multi_kernel_mmd, soft_clip
from lit_llmers.running import run
from lit_llmers.students.collaborative import CollaborativeRecommender, TableOutput
from lit_llmers.students.output import StudentOutput
from lit_llmers.students.sequential import SequentialRecommender

RECIPE = """\
# Every way in which texts and other models' tables teach vectors, on the smallest students.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  text: {encode: tfidf, dim: 12, users: mean}
  collaborative: {fit: sasrec, model: {dim: 8, layers: 1}}
  sequential:
    fit: sasrec
    model: {dim: 8, layers: 1, dropout: 0.0}
    callbacks:
      - embedding_distillation: {from: text, kind: topology, experts: 3, weight: 0.1}
      - alignment: {from: collaborative, kind: soft_clip, temperature: 2.0, learn_temperature: true, projector: none,
                    weight: 0.1}
      - self_distillation: {from: text, neighbours: 3, weight: 0.1}
  graph:
    fit: lightgcn
    model: {dim: 8, layers: 2}
    loss: {kind: bpr, negatives: 1}
    callbacks:
      - alignment: {from: text, users: text, projector: mlp, weight: 0.1}
      - masked_reconstruction: {from: text, weight: 0.1}
"""

GENERATOR = torch.Generator().manual_seed(1)
TEXT, USERS = torch.randn(51, 6, generator=GENERATOR), torch.randn(60, 6, generator=GENERATOR)
TEXT[0] = 0
SEQUENCES = {"target": torch.tensor([[0, 3, 7], [5, 3, 9]])}
PAIRS = {
    "user": torch.tensor([2, 2, 40]),
    "target": torch.tensor([3, 7, 3]),
    "negatives": torch.tensor([[9, 11], [11, 3], [11, 20]]),
}


def sasrec(dim: int = 8) -> SequentialRecommender:
    torch.manual_seed(0)
    return SequentialRecommender(SASRec(50, 10, dim=dim, dropout=0.0), targets_per_row=2.5)


def collaborative(dim: int = 8) -> CollaborativeRecommender:
    torch.manual_seed(0)
    return CollaborativeRecommender(BPRMF(60, 50, dim=dim, init_std=0.5))


def term_of(student, dim: int = 6, **arguments):
    return Alignment(TEXT, **{"projector": "none", **arguments}).build(student(dim))


def output_of(dim: int = 6) -> StudentOutput:
    items = torch.randn(51, dim, generator=torch.Generator().manual_seed(3))
    return StudentOutput(torch.zeros(5, dim), items.requires_grad_())


def loops(anchor: Tensor, candidates: Tensor, index: list[int], competing: list[int], tau: float) -> float:
    """Mean over the rows of InfoNCE; every competitor is one candidate."""
    losses = []
    for i in index:
        cosines = {j: F.cosine_similarity(anchor[i], candidates[j], dim=0).item() / tau for j in competing}
        losses.append(math.log(sum(math.exp(value) for value in cosines.values())) - cosines[i])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("negatives", ["batch", "all"])
def test_info_nce_by_plain_loops_without_false_negatives(symmetric, negatives):
    output = output_of()
    term = term_of(sasrec, negatives=negatives, symmetric=symmetric, temperature=0.3)
    index, competing = [3, 7, 5, 3, 9], [3, 5, 7, 9] if negatives == "batch" else list(range(1, 51))
    expected = loops(output.items, TEXT, index, competing, 0.3)
    if symmetric:
        expected = (expected + loops(TEXT, output.items, index, competing, 0.3)) / 2
    assert term(output, SEQUENCES).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("negatives", ["batch", "all", "bank"])
def test_what_competes_gets_its_gradient_once_on_an_accelerator_too(monkeypatch, symmetric, negatives):
    """Which knows rows of one cotangent by their memory alone."""
    monkeypatch.setattr(task, "_is_uniform", lambda cotangent: cotangent.stride(0) == 0)
    monkeypatch.setattr(task, "_table_gradient", lambda *_: pytest.fail("made again"))
    output = output_of()
    term_of(sasrec, negatives=negatives, symmetric=symmetric, projector="linear")(output, SEQUENCES).backward()
    assert output.items.grad.abs().sum() > 0


def test_rlmrec_con_by_plain_loops():
    """All users compete; targets with the batch's targets and negatives with its negatives, each item once."""
    student = collaborative()
    term = Alignment(TEXT, USERS, projector="mlp", temperature=0.2).build(student)
    output = student({"user": PAIRS["user"]})
    mapped = [term.of_signal(signals) for signals in (TEXT, USERS)]
    expected = {
        "item": loops(output.items, mapped[0], [3, 7, 3], [3, 7], 0.2),
        "negative": loops(output.items, mapped[0], [9, 11, 11, 3, 11, 20], [3, 9, 11, 20], 0.2),
        "user": loops(output.users, mapped[1], [2, 2, 40], list(range(60)), 0.2),
    }
    assert term(output, PAIRS).item() == pytest.approx(sum(expected.values()), rel=1e-5)
    assert {key: value.item() for key, value in term.parts.items()} == pytest.approx(expected, rel=1e-5)


def test_golden_rlmrec_con_without_its_false_negatives(golden):
    """The callback on the official parameters is the official loss on each item of the batch once."""
    z = golden("rlmrec/case_a_con")
    items, users = (F.pad(z["in.item_semantic"], (0, 0, 1, 0)), z["in.user_semantic"])
    nodes = z["out.final_embeddings"]
    student = SimpleNamespace(backbone=BPRMF(7, 9, dim=6), reduce=lambda values, batch: values.mean())
    term = Alignment(items, users, projector="mlp", temperature=z["hp.kd_temperature"].item()).build(student).double()
    term.of_signal.load_state_dict({key[len("param.mlp.") :]: z[key] for key in z if key.startswith("param.mlp.")})
    torch.testing.assert_close(term.of_signal(users), z["out.mlp_users"], rtol=1e-9, atol=1e-10)
    output = TableOutput(nodes[:7], F.pad(nodes[7:], (0, 0, 1, 0)), z["in.users"])
    batch = {"user": z["in.users"], "target": z["in.items_pos"] + 1, "negatives": z["in.items_neg"][:, None] + 1}
    value = term(output, batch)
    once = {key: sorted(set((z[f"in.items_{key}"] + 1).tolist())) for key in ("pos", "neg")}
    mapped, tau = F.pad(z["out.mlp_items"], (0, 0, 1, 0)), z["hp.kd_temperature"].item()
    expected = loops(nodes[:7], z["out.mlp_users"], z["in.users"].tolist(), list(range(7)), tau)
    for key in ("pos", "neg"):
        expected += loops(output.items, mapped, (z[f"in.items_{key}"] + 1).tolist(), once[key], tau)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    official = z["out.kd_loss"].item() / z["hp.kd_weight"].item()
    assert value.item() < official, "its own false negatives raise the official loss"


@pytest.mark.parametrize("arguments", [{"negatives": "batch"}, {"negatives": "all", "symmetric": True}, {"negatives": "bank"}])
def test_one_without_a_signal_is_no_pair_and_no_negative(arguments):
    text, users = TEXT.clone(), USERS.clone()
    text[[7, 20, 49]], users[[2, 59]] = 0, 0
    student = collaborative(6)
    term = Alignment(text, users, projector="none", temperature=0.3, **arguments).build(student)
    output = student({"user": PAIRS["user"]})
    known, people = [i for i in range(1, 51) if text[i].any()], [i for i in range(60) if users[i].any()]
    expected = {}
    for name, index, share in (("item", [3, 3], 2 / 3), ("negative", [9, 11, 11, 3, 11], 5 / 6)):
        competing = known if arguments["negatives"] == "all" else sorted(set(index))
        if (name, arguments["negatives"]) == ("negative", "bank"):  # its own, and what the targets left there
            competing = [3, 9, 11]
        values = [loops(output.items, text, index, competing, 0.3), loops(text, output.items, index, competing, 0.3)]
        expected[name] = share * (sum(values) / 2 if arguments.get("symmetric") else values[0])
    values = [loops(output.users, users, [40], people, 0.3), loops(users, output.users, [40], people, 0.3)]
    expected["user"] = (sum(values) / 2 if arguments.get("symmetric") else values[0]) / 3
    term(output, PAIRS)
    assert {key: value.item() for key, value in term.parts.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["info_nce", "soft_clip", "mmd", "cosine"])
def test_a_batch_without_any_signal_has_no_loss(kind):
    text = TEXT.clone()
    text[: 51 if kind == "mmd" else 30] = 0  # of all items, where uniform ones are looked at too
    output = output_of(8)
    loss = Alignment(text, kind=kind).build(sasrec())(output, SEQUENCES)
    assert loss.item() == 0
    loss.backward()
    assert not output.items.grad.any()


def test_soft_clip_and_cosine_are_of_the_items_of_the_batch():
    output, ids = output_of(), [3, 5, 7, 9]
    student, text = output.items[ids], TEXT[ids]
    share = torch.tensor([2, 1, 1, 1]) / 5
    cos = 1 - F.cosine_similarity(student, text)
    clip = soft_clip(text, student, temperature=2.0).dot(share)  # x and y as the official codes have them
    torch.testing.assert_close(term_of(sasrec, kind="soft_clip", temperature=2.0)(output, SEQUENCES), clip)
    torch.testing.assert_close(term_of(sasrec, kind="cosine")(output, SEQUENCES), cos.dot(share))


@pytest.mark.parametrize("share", [None, 0.5])
def test_mmd_is_of_targets_and_of_as_many_items_of_the_whole_catalogue(share):
    output, popular = output_of(), torch.randint(1, 6, (40, 5), generator=torch.Generator().manual_seed(2))
    term, met, number = term_of(sasrec, kind="mmd", share=share), torch.zeros(51), []
    torch.manual_seed(0)
    for _ in range(60):
        output.items.grad = None
        term(output, {"target": popular[:, :1]}).backward()
        met += output.items.grad.any(1)
        number.append(int(output.items.grad[6:].any(1).sum()))
    assert (met[1:] > 0).all(), "items that are no one's target too"
    assert met[0] == 0
    assert met[6:].mean() == pytest.approx(60 * (1 - (49 / 50) ** (40 * (share or 1))), rel=0.1)
    assert max(number) <= 40


def test_mmd_of_pairs_is_of_the_targets_and_of_the_negatives():
    output, term = collaborative(6)({"user": PAIRS["user"]}), term_of(collaborative, kind="mmd")
    expected = {
        name: multi_kernel_mmd(output.items[ids], TEXT[ids]).item()
        for name, ids in {"item": [3, 7], "negative": [3, 9, 11, 20]}.items()
    }
    term(output, PAIRS)
    assert {key: value.item() for key, value in term.parts.items()} == pytest.approx(expected, rel=1e-5)


def test_llmemb_s_anchor_is_constant_and_its_targets_are_not():
    """The student's vectors get the gradient that passes through the soft targets too."""
    output, ids = output_of(), [3, 5, 7, 9]
    term_of(sasrec, kind="soft_clip", temperature=2.0)(output, SEQUENCES).backward()
    leaf = output.items.detach()[ids].requires_grad_()
    soft_clip(TEXT[ids], leaf, temperature=2.0).dot(torch.tensor([2, 1, 1, 1]) / 5).backward()
    torch.testing.assert_close(output.items.grad[ids], leaf.grad)
    assert output.items.grad.any(1).nonzero().squeeze(1).tolist() == ids


@pytest.mark.parametrize("project", ["signal", "student"])
@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_what_the_projector_maps(project, projector):
    student = sasrec(8)
    term = Alignment(TEXT, projector=projector, project=project).build(student)
    layers = [module for module in term.modules() if isinstance(module, torch.nn.Linear)]
    ends = layers[0].in_features, layers[-1].out_features
    assert ends == ((6, 8) if project == "signal" else (8, 6))
    assert len(layers) == (1 if projector == "linear" else 2)
    output = output_of(8)
    term(output, SEQUENCES).backward()
    assert output.items.grad.any()
    assert all(parameter.grad.any() for parameter in term.parameters())


def test_the_bank_holds_each_item_once_as_it_was_last():
    bank = Bank(4, 2)
    rows = torch.arange(20.0).view(10, 2)
    assert bank.exchange(torch.tensor([1, 2]), rows[:2]).shape == (0, 2)
    assert torch.equal(bank.exchange(torch.tensor([3, 2]), rows[2:4]), rows[:1])
    assert bank.ids.tolist() == [3, 2, 1, 0]
    assert torch.equal(bank.vectors[:3], rows[[2, 3, 0]])
    assert torch.equal(bank.exchange(torch.tensor([5, 6]), rows[4:6]), rows[[2, 3, 0]])
    assert bank.ids.tolist() == [5, 6, 3, 2], "the oldest leaves"
    bank.exchange(torch.tensor([1, 2, 3, 4, 5]), rows[:5])
    assert bank.ids.tolist() == [1, 2, 3, 4]
    assert torch.equal(bank.exchange(torch.tensor([4]), rows[:1]), rows[:3])
    assert bank.ids.tolist() == [4, 1, 2, 3]


@pytest.mark.parametrize("symmetric", [False, True])
def test_items_compete_with_those_of_earlier_batches(symmetric):
    output = output_of()
    term = term_of(sasrec, negatives="bank", bank=10, temperature=0.3, symmetric=symmetric)
    term(output, {"target": torch.tensor([[9, 20, 30]])})
    value = term(output, SEQUENCES)
    index, competing = [3, 7, 5, 3, 9], [3, 5, 7, 9, 20, 30]
    expected = loops(output.items, TEXT, index, competing, 0.3)
    if symmetric:
        expected = (expected + loops(TEXT, output.items, index, competing, 0.3)) / 2
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert not output.items.grad[[20, 30]].any(), "what is in the bank is past"


def test_a_temperature_is_learned_and_stays_positive():
    term = term_of(sasrec, learn_temperature=True, temperature=0.5)
    fixed = term_of(sasrec, temperature=0.5)
    output = output_of()
    torch.testing.assert_close(term(output, SEQUENCES), fixed(output, SEQUENCES))
    term(output, SEQUENCES).backward()
    assert term.log_temperature.grad.item() != 0
    assert term.learned["temperature"].item() == pytest.approx(0.5)
    with torch.no_grad():
        term.log_temperature.fill_(-50.0)
    assert term(output, SEQUENCES).isfinite()
    assert term.log_temperature.exp().item() == pytest.approx(COLDEST)
    assert not list(fixed.parameters())


KINDS = [
    {"kind": "info_nce"},
    {"kind": "info_nce", "negatives": "all", "symmetric": True},
    {"kind": "info_nce", "negatives": "bank", "bank": 20, "learn_temperature": True},
    {"kind": "soft_clip", "temperature": 1.0},
    {"kind": "mmd"},
    {"kind": "cosine"},
]


@pytest.mark.parametrize("arguments", KINDS, ids=lambda given: "-".join(map(str, given.values())))
@pytest.mark.parametrize("make", [sasrec, collaborative])
def test_training_aligns_and_reaches_the_projector(make, arguments):
    student = make()
    callback = Alignment(TEXT, USERS if make is collaborative else None, projector="mlp", weight=3.0, **arguments)
    term = callback.build(student)
    before = {name: parameter.detach().clone() for name, parameter in term.named_parameters()}
    student.distillation["alignment"] = term
    student.optimizer = SimpleNamespace(lr=0.02, weight_decay=0.0, warmup_steps=0, schedule="constant")
    probe = {"target": torch.arange(1, 51)}
    if make is collaborative:
        probe |= {"user": torch.arange(10), "negatives": torch.arange(1, 51)[:, None]}

    def value() -> float:
        with torch.no_grad():
            users, items = student.backbone() if make is collaborative else (None, student.item_table())
            output = TableOutput(users, items, probe["user"]) if make is collaborative else StudentOutput(items, items)
            return (term(output, probe) / (50 / 2.5 if make is sasrec else 1)).item()

    initial = value()
    fit(student, callback, epochs=6)
    assert value() < 0.9 * initial
    for name, parameter in term.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} is trained"


def test_checkpoints_keep_the_bank_apart_and_not_the_texts():
    student = sasrec()
    fit(student, Alignment(TEXT, negatives="bank", bank=20))
    checkpoint = {"state_dict": dict(student.state_dict())}
    student.on_save_checkpoint(checkpoint)
    extra = {name.rpartition("alignment.")[2] for name in checkpoint["distillation"]}
    assert extra == {"of_signal.weight", "of_signal.bias", "banks.0.ids", "banks.0.vectors"}
    assert not [name for name in checkpoint["state_dict"] if "distillation" in name]
    assert student.distillation["alignment"].banks[0].ids.all(), "the bank was filled"


def test_half_precision_and_one_item_are_finite():
    for arguments in KINDS:
        term = Alignment(TEXT, **arguments).build(sasrec())
        with torch.autocast("cpu", torch.bfloat16):
            loss = term(output_of(8), SEQUENCES)
        loss.backward()
        assert loss.isfinite()
        assert term(output_of(8), {"target": torch.tensor([4])}).isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "clip"}, "alignment.kind.*'clip'"),
        ({"negatives": "none"}, "alignment.negatives.*'none'"),
        ({"projector": "conv"}, "alignment.projector.*'conv'"),
        ({"project": "both"}, "alignment.project.*'both'"),
        ({"kind": "mmd", "negatives": "all"}, "negatives=all has no effect: it belongs to kind: info_nce"),
        ({"kind": "soft_clip", "symmetric": True}, "symmetric=True has no effect: it belongs to kind: info_nce"),
        ({"kind": "cosine", "learn_temperature": True}, "learn_temperature=True .* kind: info_nce or soft_clip"),
        ({"kind": "mmd", "temperature": 0.5}, "temperature=0.5 .* kind: info_nce or soft_clip"),
        ({"bank": 20}, "bank=20 has no effect: it belongs to negatives: bank. Leave it out, or set it to 4096"),
        ({"projector": "none", "project": "student"}, "project=student has no effect: it belongs to projector: linear or mlp"),
        ({"learn_temperature": True, "temperature": 0.001}, "temperature is 0.001"),
        ({"bank": 0}, "bank is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"share": 1.5}, "alignment: share is 1.5. It must be above 0 and at most 1, or null"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        Alignment(TEXT, **arguments)


def test_widths_must_fit():
    with pytest.raises(UserError, match="student's have 8 numbers and the signals 6.*projector=linear"):
        Alignment(TEXT, projector="none").build(sasrec())
    with pytest.raises(UserError, match="items' signals have 6 numbers and the users' 4"):
        Alignment(TEXT, USERS[:, :4]).build(collaborative())


def test_from_yaml_all_terms_are_in_the_loss_and_in_no_checkpoint(tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    planned = small(tmp_path, recipe=str(tmp_path / "mine.yaml"))
    run(planned, None)
    stages = by_name(planned)
    for name, terms in {
        "sequential": ("embedding", "alignment", "self_distillation"),
        "graph": ("alignment", "masked_reconstruction"),
    }.items():
        parts = [losses(stages[name], f"loss/{term}") for term in terms]
        sums = [task + 0.1 * sum(rest) for task, *rest in zip(losses(stages[name], "loss/task"), *parts, strict=True)]
        assert losses(stages[name], "loss") == pytest.approx(sums, rel=1e-4)
        assert all(min(values) > 0 for values in parts)
        own = [values for part in ("item", "negative", "user") if (values := losses(stages[name], f"loss/alignment/{part}"))]
        summed = [sum(values) for values in zip(*own, strict=True)]
        assert losses(stages[name], "loss/alignment") == pytest.approx(summed, rel=1e-4)
        state = torch.load(stages[name].folder / "best.ckpt", weights_only=True)["state_dict"]
        assert not [key for key in state if not key.startswith("backbone.")]
    learned = losses(stages["sequential"], "alignment/temperature")
    assert learned == pytest.approx([2.0] * len(learned), rel=0.2)
    assert len(set(learned)) > 1
