"""LLM-ESR's self-distillation: who is whose neighbour, which vector is drawn to what, and training on top of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_embedding_distillation import fit
from torch import Tensor
from torch.nn import functional as F

from lit_llmers.backbones.bert4rec import BERT4Rec
from lit_llmers.backbones.caser import Caser
from lit_llmers.backbones.gru4rec import GRU4Rec
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.callbacks import self_distillation
from lit_llmers.callbacks.self_distillation import (
    ITEMS,
    MASK,
    PICKED,
    SelfDistillation,
    SelfDistillationTerm,
    last_targets,
    nearest_users,
)
from lit_llmers.errors import UserError
from lit_llmers.losses.alignment import soft_clip
from lit_llmers.students.output import StudentOutput
from lit_llmers.students.sequential import SequentialRecommender

USERS = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))


class Histories:
    """Left-padded rows that name their user: user u has the items `u % 50 + 1` and on, u % 4 of them."""

    def __init__(self) -> None:
        self.asked: list[int | None] = []

    def inputs(self, users: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
        self.asked.append(length)
        count = (users % 4)[:, None]
        place = torch.arange(3) - 3 + count
        items = torch.where(place >= 0, (users[:, None] + place) % 50 + 1, 0)
        return items, items > 0


def student_of(make=SASRec, dim: int = 8) -> SequentialRecommender:
    torch.manual_seed(0)
    return SequentialRecommender(make(50, 10, dim=dim, dropout=0.0), targets_per_row=4.0)


def output_of(user: Tensor) -> StudentOutput:
    return StudentOutput(user, torch.zeros(51, user.shape[1]))


@pytest.mark.parametrize("chunk", [7, 1024])
def test_neighbours_by_brute_force(monkeypatch, chunk):
    monkeypatch.setattr(self_distillation, "_CHUNK", chunk)
    found = nearest_users(USERS, 5)
    text = USERS.numpy().astype(float)
    unit = text / np.linalg.norm(text, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    np.testing.assert_array_equal(found.numpy(), np.argsort(-cosine, axis=1)[:, :5])


def test_a_user_is_left_out_by_number_and_not_by_rank():
    twins = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    found = nearest_users(twins, 2)
    assert all(user not in row for user, row in enumerate(found.tolist()))
    assert {tuple(sorted(row)) for row in found[:3].tolist()} == {(1, 2), (0, 2), (0, 1)}


def test_users_without_text_have_no_neighbours_and_are_nobody_s():
    users = torch.tensor([[1.0, 0], [0, 0], [1, 1], [0, 0]])
    assert nearest_users(users, 9).tolist() == [[2, -1, -1], [-1, -1, -1], [0, -1, -1], [-1, -1, -1]]


def test_the_last_target_of_each_row():
    assert last_targets(torch.tensor([[0, 4, 5], [0, 0, 6], [7, 8, 9], [3, 0, 2]])).tolist() == [1, 2, 5, 7]
    assert last_targets(torch.tensor([4, 5])).tolist() == [0, 1]


def prepared(student: SequentialRecommender, **arguments) -> tuple[SelfDistillation, SelfDistillationTerm]:
    callback = SelfDistillation(USERS, Histories(), **arguments)
    return callback, callback.build(student)


@pytest.mark.parametrize("arguments", [{"kind": "mse"}, {"kind": "soft_clip", "temperature": 1.5}])
def test_value_by_plain_loops(arguments):
    student = student_of()
    callback, term = prepared(student, neighbours=3, **arguments)
    target = torch.tensor([[0, 4, 5], [0, 0, 6], [7, 8, 9]])
    batch = {"user": torch.tensor([8, 21, 2]), "target": target}
    batch |= callback.retrieve(batch)
    user = torch.randn(6, 8, requires_grad=True)
    loss = term(output_of(user), batch)
    found, means = nearest_users(USERS, 3), []
    for u in batch["user"].tolist():
        rows = [Histories().inputs(torch.tensor([n])) for n in found[u].tolist() if n % 4]  # user 4k has no history
        means.append(torch.cat([student.encode(*row) for row in rows]).mean(0))
    own, teacher = user[[1, 2, 5]], torch.stack(means).detach()
    expected = F.mse_loss(own, teacher) if arguments["kind"] == "mse" else soft_clip(own, teacher, temperature=1.5).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert user.grad.any(1).tolist() == [False, True, True, False, False, True], "the last target of each row alone"
    assert all(parameter.grad is None for parameter in student.parameters()), "what the neighbours say is constant"


@pytest.mark.parametrize("case", ["case_a_sasrec", "case_a_gru4rec", "case_a_bert4rec", "case_a_sasrec_cl_reg"])
def test_golden_align_loss(golden, case):
    """On the official user vectors and those of the neighbours, which the official code averages."""
    z = golden(f"llm_esr/{case}")
    user, teacher = z["out.user_embedding"], z["out.neighbour_target"]
    rows, neighbours = len(user), z["in.sim_seq"].shape[1]
    said = teacher[:, None] + torch.randn(rows, neighbours, teacher.shape[1], dtype=torch.float64)
    said += (teacher - said.mean(1))[:, None]  # any vectors with this mean

    def encode(items: Tensor, mask: Tensor) -> Tensor:
        return said.flatten(0, 1)

    term = SelfDistillationTerm(encode, "soft_clip" if "cl_reg" in case else "mse", 1.0)
    batch = {"target": torch.ones(rows, dtype=torch.int64), PICKED: torch.arange(rows)}
    batch |= {ITEMS: z["in.sim_seq"], MASK: torch.ones_like(z["in.sim_seq"], dtype=torch.bool)}
    torch.testing.assert_close(term(output_of(user), batch), z["out.align_loss"], rtol=1e-9, atol=1e-10)


def test_rows_whose_neighbours_have_no_history_are_left_out():
    users = torch.zeros(60, 3)
    users[[1, 4]] = torch.tensor([1.0, 0, 0])  # 4 has no training item
    users[[2, 3]] = torch.tensor([0.0, 1, 0])
    callback = SelfDistillation(users, Histories(), neighbours=1)
    student = student_of()
    term = callback.build(student)
    batch = {"user": torch.tensor([1, 2, 50, 3]), "target": torch.tensor([5, 6, 7, 8])}
    batch |= callback.retrieve(batch)
    assert batch[PICKED].tolist() == [1, 3]
    user = torch.randn(4, 8, requires_grad=True)
    term(output_of(user), batch).backward()
    assert user.grad.any(1).tolist() == [False, True, False, True]
    nobody = {"user": torch.tensor([50, 1]), "target": torch.tensor([5, 6])}
    user = torch.randn(2, 8, requires_grad=True)
    loss = term(output_of(user), nobody | callback.retrieve(nobody))
    loss.backward()
    assert loss.item() == 0
    assert not user.grad.any()


def test_neighbours_are_the_nearest_or_drawn_among_more():
    batch = {"user": torch.arange(60), "target": torch.ones(60).long()}
    callback, _ = prepared(student_of(), neighbours=2)
    assert torch.equal(callback.retrieve(batch)[ITEMS], callback.retrieve(batch)[ITEMS])
    callback, _ = prepared(student_of(), neighbours=2, among=6, length=3)
    drawn = [callback.retrieve(batch) for _ in range(40)]
    assert {each[ITEMS].shape[1] for each in drawn} == {2}
    assert set(callback.histories.asked) == {3}
    first = [tuple(each[ITEMS][0, :, -1].tolist()) for each in drawn]
    allowed = {0 if user % 4 == 0 else (user + user % 4 - 1) % 50 + 1 for user in nearest_users(USERS, 6)[0].tolist()}
    assert 3 <= len(set(sum(first, ()))) <= 7
    assert set(sum(first, ())) <= allowed
    callback, _ = prepared(student_of(), share=0.25)
    assert 10 <= len(callback.retrieve(batch)[PICKED]) <= 15


@pytest.mark.parametrize("make", [SASRec, GRU4Rec])
def test_training_draws_users_to_their_neighbours_and_leaves_no_parameters(make):
    final = []
    for weight in (0.0, 20.0):
        student = student_of(make)
        student.optimizer = SimpleNamespace(lr=0.01, weight_decay=0.0, warmup_steps=0, schedule="constant")
        callback = SelfDistillation(USERS, Histories(), neighbours=3, weight=weight)
        fit(student, callback, epochs=4)
        term = student.distillation["self_distillation"]
        assert not term.state_dict()
        items, mask = Histories().inputs(torch.arange(60))
        has = mask.any(1).nonzero().squeeze(1)
        batch = {"user": has, "target": torch.ones(len(has)).long()}
        with torch.no_grad():
            own = student.eval().encode(items[has], mask[has])
            final.append(term(output_of(own), batch | callback.retrieve(batch)).item() / own.square().mean().item())
    assert final[1] < 0.7 * final[0]


def test_a_student_that_reads_one_position_fits_and_one_that_hides_items_does_not():
    student = student_of(Caser)
    callback, term = prepared(student, neighbours=2)
    batch = {"user": torch.arange(1, 5), "target": torch.ones(4).long()}
    assert term(output_of(torch.randn(4, 8)), batch | callback.retrieve(batch)).isfinite()
    with pytest.raises(UserError, match="BERT4Rec.*causal"):
        SelfDistillation(USERS, Histories()).build(SimpleNamespace(backbone=BERT4Rec(50, 10, dim=8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "kl"}, "self_distillation.kind.*'kl'"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"neighbours": 5, "among": 3}, "among is 3"),
        ({"length": 0}, "length is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": 2.0}, "temperature=2.0 has no effect: it belongs to kind: soft_clip"),
        ({"share": 0.0}, r"self_distillation: share is 0.0. It must be above 0 and at most 1\."),
        ({"users": USERS[:1]}, "only one user"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        SelfDistillation(**{"users": USERS, "histories": Histories(), **arguments})
