"""What every sequential backbone owes the rest, plain or with fusions around it: see lit_llmers/backbones/__init__.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone
from lit_llmers.conf.schema import OptimizerConfig
from lit_llmers.errors import UserError
from lit_llmers.serving import OnnxScorer, score_catalogue
from lit_llmers.serving.onnx_graph import save_onnx, trace
from lit_llmers.serving.served import innermost
from lit_llmers.students.sequential import SequentialRecommender

N_ITEMS, MAX_LENGTH, DIM = 40, 12, 16


def histories() -> Tensor:
    """Five histories of 8, 5, 1, 0 and 8 items."""
    items = torch.randint(1, N_ITEMS + 1, (5, 8), generator=torch.Generator().manual_seed(1))
    items[1, :3], items[2, :7], items[3] = 0, 0, 0
    return items


def states_of(backbone: Backbone, items: Tensor) -> list[Tensor]:
    """Hidden states `[B, P, D]` at as many positions as the backbone can read."""
    return backbone(items, items > 0, every_position=backbone.every_position)


def user_of(backbone: Backbone, items: Tensor) -> Tensor:
    """User vectors `[B, d]`."""
    return backbone.head(backbone(items, items > 0)[-1][:, 0])


def trainable(backbone: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def assert_same(left: list[Tensor], right: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Battery:
    """Tests of the fixtures `backbone`, `other` (the same from another seed) and `items`, as `histories` makes them."""

    # ---- shapes, positions and padding -------------------------------------------------------------------------------

    def test_shapes(self, backbone, items):
        last = backbone(items, items > 0)
        assert [state.shape for state in last] == [(5, 1, backbone.width)] * (backbone.layers + 1)
        assert backbone.head(last[-1]).shape == (5, 1, backbone.dim)
        assert backbone.embed(items).shape[:2] == (5, 8)
        assert not backbone.embed(items)[items == 0].any()
        assert backbone.item_table().shape == (N_ITEMS + 1, backbone.dim)
        assert not backbone.item_table()[0].any()
        if backbone.every_position:
            every = states_of(backbone, items)
            assert [state.shape for state in every] == [(5, 8, backbone.width)] * (backbone.layers + 1)
            assert backbone.head(every[-1]).shape == (5, 8, backbone.dim)
        else:
            with pytest.raises(UserError, match="examples=prefixes"):
                backbone(items, items > 0, every_position=True)

    def test_every_item_within_reach_and_their_order_matter(self, backbone, items):
        row = items[:1]
        before = user_of(backbone, row)
        for back in range(1, 1 + getattr(innermost(backbone), "window", 8)):
            changed = row.clone()
            changed[0, -back] = changed[0, -back] % N_ITEMS + 1
            assert (user_of(backbone, changed) - before).abs().max() > 1e-4
        assert (user_of(backbone, row[:, [0, 1, 2, 3, 5, 4, 6, 7]]) - before).abs().max() > 1e-4

    def test_padding_has_no_influence(self, backbone, items):
        together = states_of(backbone, items)
        for row, length in ((0, 8), (1, 5), (2, 1)):
            positions = length if backbone.every_position else 1
            mine = [state[row : row + 1, -positions:] for state in together]
            assert_same(mine, states_of(backbone, items[row : row + 1, -length:]))

    def test_more_padding_changes_nothing(self, backbone, items):
        wider = F.pad(items[:3], (4, 0))
        assert_same(backbone(items[:3], items[:3] > 0), backbone(wider, wider > 0))

    def test_a_row_of_padding_alone_makes_no_nan(self, backbone, items):
        backbone.train()
        loss = user_of(backbone, items).square().mean()
        for states in (backbone(items, items > 0), states_of(backbone, items)):
            assert all(torch.isfinite(state).all() for state in states)
            loss = loss + states[-1].square().mean()
        (loss + backbone.item_table().square().mean()).backward()
        weights = trainable(backbone)
        without = {name for name, weight in weights.items() if weight.grad is None}
        assert without <= {"text.adapter.noise"}, "a parameter without gradient stops data-parallel training"
        assert all(torch.isfinite(weight.grad).all() for name, weight in weights.items() if name not in without)

    # ---- precision and files -----------------------------------------------------------------------------------------

    def test_bfloat16_is_close_to_float32(self, backbone, items):
        exact, table = user_of(backbone, items), backbone.item_table().clone()
        rough = user_of(backbone.bfloat16(), items)
        assert rough.dtype == backbone.item_table().dtype == torch.bfloat16
        assert torch.isfinite(rough).all()
        assert torch.cosine_similarity(rough.float(), exact, dim=-1)[[0, 1, 2, 4]].min() > 0.98
        assert torch.cosine_similarity(backbone.item_table().float()[1:], table[1:], dim=-1).min() > 0.99

    def test_bfloat16_autocast_trains(self, backbone, items):
        """As `trainer.precision=bf16-mixed` runs it: weights, gradients and the item table stay in float32."""
        backbone.train()
        rows = items[[0, 1, 4]]
        view = backbone.training_view({"items": rows, "mask": rows > 0, "target": rows})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            user = backbone.head(backbone(view["items"], view["mask"], backbone.every_position)[-1])
            table = backbone.item_table()
        assert table.dtype == torch.float32
        (user.float().square().sum() + table.square().sum()).backward()
        gradients = [weight.grad for weight in trainable(backbone).values() if weight.grad is not None]
        assert gradients
        assert all(gradient.dtype == torch.float32 and torch.isfinite(gradient).all() for gradient in gradients)

    def test_weights_come_back_from_a_file(self, backbone, other, items, tmp_path):
        with pytest.raises(AssertionError):
            assert_same(backbone(items, items > 0), other(items, items > 0))
        torch.save(backbone.state_dict(), tmp_path / "weights")
        other.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
        assert_same(backbone(items, items > 0), other(items, items > 0), tolerance=0)
        assert torch.equal(backbone.item_table(), other.item_table())


class CausalBattery:
    """Of those whose every position can be read and has seen nothing after it; each file says which they are."""

    def test_the_future_has_no_influence_and_the_past_has(self, backbone, items):
        full = items[[0, 4]]
        changed = full.clone()
        changed[:, 5] = changed[:, 5] % N_ITEMS + 1
        before, after = states_of(backbone, full), states_of(backbone, changed)
        assert_same([state[:, :5] for state in before], [state[:, :5] for state in after])
        assert (before[-1][:, 5:] - after[-1][:, 5:]).abs().amax(-1).min() > 1e-3

    def test_the_read_out_position_is_the_last_one(self, backbone, items):
        assert_same(backbone(items, items > 0), [state[:, -1:] for state in states_of(backbone, items)])


# ---- what costs seconds: each file says for which models --------------------------------------------------------------


def check_compiled_equals_eager(backbone: Backbone, items: Tensor, noisy: bool = False) -> None:
    """The graphs of a training step and of the read-out, at any size; what a code generator makes of them is its own part.

    Args:
        backbone: without dropout.
        noisy: its training draws numbers, of which the two draw others: its steps are taken as in evaluation.
    """
    torch._dynamo.reset()  # after so many compilations of one function it would run as it is
    backbone = backbone.double()
    compiled = torch.compile(backbone, backend="eager", dynamic=True)
    for rows, training in ((items[:3], True), (items[[0, 1, 2, 4], 1:], True), (items, False)):
        backbone.train(training and not noisy)
        batch = {"items": rows, "mask": rows > 0, "target": rows}
        view = backbone.training_view(batch) if training else batch
        results = []
        for model in (backbone, compiled):
            backbone.zero_grad()
            states = model(view["items"], view["mask"], backbone.every_position and training)
            (sum((state + state.square()).sum() for state in states) + backbone.item_table().square().sum()).backward()
            results.append([*states, *(weight.grad for weight in trainable(backbone).values() if weight.grad is not None)])
        assert_same(results[1], results[0], tolerance=1e-9)


def check_onnx_scores_as_pytorch_does(backbone: Backbone, folder: Path) -> None:
    """At any number of histories of any length: of those that are too long both read the latest items alone."""
    model = SequentialRecommender(backbone).eval()
    random = np.random.default_rng(0)
    batches = []
    for rows, length in [(1, 1), (1, MAX_LENGTH), (7, 2), *((3, MAX_LENGTH + more) for more in (-1, 0, 1, 2, 2 * MAX_LENGTH))]:
        drawn = random.integers(1, N_ITEMS + 1, (rows, length))
        for row in range(1, rows):
            drawn[row, : random.integers(0, length)] = 0
        batches.append(drawn)
    with torch.inference_mode():
        asked = [torch.from_numpy(rows) for rows in batches]
        whole = [score_catalogue(model, MAX_LENGTH, rows, rows > 0).numpy() for rows in asked]
        latest = [rows[:, -MAX_LENGTH:] for rows in asked]
        expected = [(model.encode(rows, rows > 0) @ model.item_table().T).numpy() for rows in latest]
    for got, scores in zip(whole, expected, strict=True):
        np.testing.assert_array_equal(got[:, 1:], scores[:, 1:])

    def check(path: Path) -> float:
        scorer = OnnxScorer(path)
        differences = [scorer(rows)[:, 1:] - scores[:, 1:] for rows, scores in zip(batches, expected, strict=True)]
        return max(float(np.abs(difference).max()) for difference in differences)

    assert save_onnx(trace(model, MAX_LENGTH), folder, check) < 1e-4


def check_learns_by_heart(backbone: Backbone, loss_left: float) -> None:
    """Histories of 3 to 10 items in no order, of ten users: in the end each next item ranks first, and little loss is left.

    BERT4Rec is to learn what serves at the last position alone (`last_prob=1`): the Cloze task hides other parts each time.
    """
    random = np.random.default_rng(0)
    whole = np.zeros((10, 11), np.int64)
    for row, length in enumerate([4, 5, 6, 7, 8, 9, 10, 11, 11, 11]):
        whole[row, -length:] = random.choice(N_ITEMS, length, replace=False) + 1
    items, following = torch.from_numpy(whole[:, :-1]), torch.from_numpy(whole[:, 1:])
    target = following.masked_fill(items == 0, 0) if backbone.every_position else following[:, -1]
    batch = {"items": items, "mask": items > 0, "target": target}
    student = SequentialRecommender(backbone, OptimizerConfig(lr=1e-2), targets_per_row=1.0)
    adam = student.configure_optimizers()
    student.train()
    torch.manual_seed(0)
    for _ in range(150):
        adam.zero_grad()
        view = backbone.training_view(batch)
        (student.task_loss(student(view), view) / (view["target"] > 0).sum() * len(items)).backward()
        adam.step()
    student.eval()
    with torch.no_grad():
        user = student.encode(items, items > 0)
        loss = F.cross_entropy(user @ student.item_table()[1:].T, following[:, -1] - 1)
        ranks = student.ranks({"items": items, "mask": items > 0, "target": following[:, -1]})
    assert loss < loss_left
    assert ranks.tolist() == [0.0] * 10
    assert not student.item_table()[0].any()
