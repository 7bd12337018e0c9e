"""What every sequential backbone owes the rest, one battery for all: see lit_llmers/backbones/__init__.py."""

import inspect
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone
from lit_llmers.building import build_backbone, check, find
from lit_llmers.conf.schema import OptimizerConfig, SequenceConfig, build
from lit_llmers.conf.stages import FitStage
from lit_llmers.errors import UserError
from lit_llmers.onnx_graph import save_onnx, trace
from lit_llmers.recipes import compose
from lit_llmers.serving import OnnxScorer, score_catalogue
from lit_llmers.stages import plan
from lit_llmers.students.sequential import SequentialRecommender

N_ITEMS, MAX_LENGTH, DIM = 40, 12, 16
SIZES = {"vocab_size": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}


def llm(**config) -> tuple[str, dict]:
    base = {"name": "tiny", "config": SIZES | config | {"initializer_range": 0.2}}
    return "llm_decoder", {"base": base, "layers": 3, "train_items": True}


MODELS: dict[str, tuple[str, dict]] = {  # layers differ from their default and weights are large enough to tell models apart
    "sasrec": ("sasrec", {"dim": DIM, "layers": 3, "init_std": 0.5}),
    "gru4rec": ("gru4rec", {"dim": DIM, "layers": 2, "init_std": 1.0}),
    "bert4rec": ("bert4rec", {"dim": DIM, "layers": 3, "init_std": 0.3}),
    "caser": ("caser", {"dim": DIM, "window": 4, "horizontal": 3, "vertical": 2, "init_std": 1.0}),
    "srgnn": ("srgnn", {"dim": DIM, "layers": 2, "init_std": 0.5}),
    "llama": llm(model_type="llama", num_key_value_heads=2),
    "qwen3": llm(model_type="qwen3", num_key_value_heads=2, head_dim=8),
}
SMALL = ["sasrec", "gru4rec", "bert4rec", "caser", "srgnn"]  # of LLM decoders, tests/test_export.py exports several
EVERY = [name for name, (fit, _) in MODELS.items() if find("backbones", fit).every_position]
CAUSAL = [name for name in EVERY if find("backbones", MODELS[name][0]).causal]


def stage_of(name: str, **arguments) -> FitStage:
    fit, model = MODELS[name]
    examples = "sequence" if name in EVERY else "prefixes"
    items = ["table"] if fit == "llm_decoder" else []
    return FitStage(fit, model | arguments, items=items, sequences=SequenceConfig(MAX_LENGTH, examples))


def make(name: str, seed: int = 0, **arguments) -> Backbone:
    """The backbone with weights drawn from `seed`."""
    table = torch.randn(N_ITEMS + 1, DIM, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    offered = {"n_items": N_ITEMS, "max_length": MAX_LENGTH, "item_table": table}
    backbone = build_backbone(stage_of(name, **arguments), seed, offered)
    assert isinstance(backbone, Backbone)
    return backbone.eval()


def test_what_a_backbone_does_not_name_is_not_made():
    def fail() -> None:
        raise AssertionError("training_pairs were made")

    stage, made = FitStage("sasrec", {"dim": 8}), []
    build_backbone(stage, 0, {"n_items": 5, "max_length": 4, "training_pairs": fail})
    pairs = np.array([[0, 2], [1, 2]])
    popular = build_backbone(FitStage("popularity"), 0, {"n_items": 3, "training_pairs": lambda: made.append(1) or pairs})
    assert (popular.count.tolist(), made) == ([0, 0, 2, 0], [1])


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture
def backbone(name) -> Backbone:
    return make(name)


@pytest.fixture
def items() -> Tensor:
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


# ---- shapes, positions and padding -----------------------------------------------------------------------------------


def test_shapes(backbone, items):
    last = backbone(items, items > 0)
    assert [state.shape for state in last] == [(5, 1, backbone.width)] * (backbone.layers + 1)
    assert backbone.head(last[-1]).shape == (5, 1, backbone.dim)
    assert backbone.item_table().shape == (N_ITEMS + 1, backbone.dim)
    assert not backbone.item_table()[0].any()
    if backbone.every_position:
        every = states_of(backbone, items)
        assert [state.shape for state in every] == [(5, 8, backbone.width)] * (backbone.layers + 1)
        assert backbone.head(every[-1]).shape == (5, 8, backbone.dim)
    else:
        with pytest.raises(UserError, match="examples=prefixes"):
            backbone(items, items > 0, every_position=True)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_read_out_position_is_the_last_one(backbone, items):
    every, last = states_of(backbone, items), backbone(items, items > 0)
    assert_same(last, [state[:, -1:] for state in every])


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_has_no_influence_and_the_past_has(backbone, items):
    full = items[[0, 4]]
    changed = full.clone()
    changed[:, 5] = changed[:, 5] % N_ITEMS + 1
    before, after = states_of(backbone, full), states_of(backbone, changed)
    assert_same([state[:, :5] for state in before], [state[:, :5] for state in after])
    assert (before[-1][:, 5:] - after[-1][:, 5:]).abs().amax(-1).min() > 1e-3


def test_every_item_within_reach_and_their_order_matter(backbone, items):
    row = items[:1]
    before = user_of(backbone, row)
    for back in range(1, 1 + getattr(backbone, "window", 8)):
        changed = row.clone()
        changed[0, -back] = changed[0, -back] % N_ITEMS + 1
        assert (user_of(backbone, changed) - before).abs().max() > 1e-4
    assert (user_of(backbone, row[:, [0, 1, 2, 3, 5, 4, 6, 7]]) - before).abs().max() > 1e-4


def test_padding_has_no_influence(backbone, items):
    together = states_of(backbone, items)
    for row, length in ((0, 8), (1, 5), (2, 1)):
        positions = length if backbone.every_position else 1
        mine = [state[row : row + 1, -positions:] for state in together]
        assert_same(mine, states_of(backbone, items[row : row + 1, -length:]))


def test_more_padding_changes_nothing(backbone, items):
    items = items[:3]
    wider = F.pad(items, (4, 0))
    assert_same(backbone(items, items > 0), backbone(wider, wider > 0))


@pytest.mark.parametrize("name", ["gru4rec", "llama", "qwen3"])
def test_every_position_says_what_its_prefix_says(backbone, items):
    """SASRec is left out: its positions are counted from the end, so a prefix is not where it was in the whole row."""
    row = items[:1]
    every = states_of(backbone, row)
    for length in range(1, 9):
        assert_same([state[:, length - 1 : length] for state in every], backbone(row[:, :length], row[:, :length] > 0))


def test_a_row_of_padding_alone_makes_no_nan(backbone, items):
    backbone.train()
    loss = user_of(backbone, items).square().mean()
    for states in (backbone(items, items > 0), states_of(backbone, items)):
        assert all(torch.isfinite(state).all() for state in states)
        loss = loss + states[-1].square().mean()
    (loss + backbone.item_table().square().mean()).backward()
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in trainable(backbone).values())


# ---- precision, compilation, files -----------------------------------------------------------------------------------


def test_bfloat16_is_close_to_float32(backbone, items):
    exact = user_of(backbone, items)
    rough = user_of(backbone.bfloat16(), items)
    assert rough.dtype == torch.bfloat16
    assert torch.isfinite(rough).all()
    assert torch.cosine_similarity(rough.float(), exact, dim=-1)[[0, 1, 2, 4]].min() > 0.99


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_autocast_trains(backbone, items):
    """As `trainer.precision=bf16-mixed` runs it: weights and gradients stay in float32."""
    backbone.train()
    batch = {"items": items[[0, 1, 4]], "mask": items[[0, 1, 4]] > 0, "target": items[[0, 1, 4]]}
    view = backbone.training_view(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        user = backbone.head(backbone(view["items"], view["mask"], backbone.every_position)[-1])
    user.float().square().sum().backward()
    gradients = [weight.grad for weight in trainable(backbone).values() if weight.grad is not None]
    assert gradients
    assert all(gradient.dtype == torch.float32 and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", SMALL)
def test_compiled_equals_eager(name, items):
    """The graphs of a training step and of the read-out, at any size; what a code generator makes of them is its own part."""
    backbone = make(name, dropout=0.0, **({} if name == "caser" else {"layers": 2})).double()
    compiled = torch.compile(backbone, backend="eager", dynamic=True)
    for rows, training in ((items[:3], True), (items[[0, 1, 2, 4], 1:], True), (items, False)):
        backbone.train(training)
        batch = {"items": rows, "mask": rows > 0, "target": rows}
        view = backbone.training_view(batch) if training else batch
        results = []
        for model in (backbone, compiled):
            backbone.zero_grad()
            states = model(view["items"], view["mask"], backbone.every_position and training)
            sum((state + state.square()).sum() for state in states).backward()
            results.append([*states, *(weight.grad for weight in trainable(backbone).values() if weight.grad is not None)])
        assert_same(results[1], results[0], tolerance=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_onnx_scores_as_pytorch_does_at_any_size(backbone, tmp_path):
    model = SequentialRecommender(backbone).eval()
    random = np.random.default_rng(0)
    batches = []
    for rows, length in [(1, 1), (1, MAX_LENGTH), (7, 2), (3, MAX_LENGTH - 1), (2, MAX_LENGTH)]:
        histories = random.integers(1, N_ITEMS + 1, (rows, length))
        for row in range(1, rows):
            histories[row, : random.integers(0, length)] = 0
        batches.append(histories)
    with torch.inference_mode():
        expected = [score_catalogue(model, torch.from_numpy(rows), torch.from_numpy(rows > 0)).numpy() for rows in batches]

    def check(path) -> float:
        scorer = OnnxScorer(path)
        differences = [scorer(rows)[:, 1:] - scores[:, 1:] for rows, scores in zip(batches, expected, strict=True)]
        return max(float(np.abs(difference).max()) for difference in differences)

    assert save_onnx(trace(model, MAX_LENGTH), tmp_path, check) < 1e-4


def test_weights_come_back_from_a_file(name, items, tmp_path):
    source, other = make(name), make(name, seed=1)
    with pytest.raises(AssertionError):
        assert_same(source(items, items > 0), other(items, items > 0))
    torch.save(source.state_dict(), tmp_path / "weights")
    other.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    assert_same(source(items, items > 0), other(items, items > 0), tolerance=0)
    assert torch.equal(source.item_table(), other.item_table())


def test_settings_come_back_from_a_file(name, items):
    """What a run's folder and an export keep of a model is enough to build it again, and wrong settings are named."""
    stage = stage_of(name)
    check(stage, "stages.student")
    again = build(FitStage, json.loads(json.dumps(asdict(stage))), "stages.student")
    assert again == stage
    offered = {"n_items": N_ITEMS, "max_length": MAX_LENGTH, "item_table": torch.zeros(N_ITEMS + 1, DIM)}
    rebuilt = build_backbone(again, 1, offered).eval()
    source = make(name)
    rebuilt.load_state_dict(source.state_dict())
    assert_same(rebuilt(items, items > 0), source(items, items > 0), tolerance=0)
    with pytest.raises(UserError, match="stages.student.model.drop"):
        check(stage_of(name, drop=0.1), "stages.student")


@pytest.mark.parametrize("student", SMALL)
def test_the_option_file_of_a_student_fits_it(student):
    """Checked as a run would, and all that a backbone lets choose by number stands there for the reader."""
    stage = next(stage for stage in plan(compose("student", [f"student={student}", "logger=csv"])) if stage.name == "student")
    parameters = inspect.signature(find("backbones", stage.config.fit)).parameters.values()
    numbers = {each.name for each in parameters if isinstance(each.default, int | float) and not isinstance(each.default, bool)}
    assert set(stage.config.model) >= numbers


# ---- learning --------------------------------------------------------------------------------------------------------


def test_the_initial_table_is_the_given_one_without_its_padding_row(backbone, items):
    table = torch.randn(N_ITEMS + 1, DIM)
    backbone.initialise(table)
    assert torch.equal(backbone.item_table()[1:], table[1:])
    assert torch.equal(backbone.embed(items[:1]), table[items[:1]])
    assert not backbone.item_table()[0].any()
    assert not backbone.embed(items[3:4]).any()
    with pytest.raises(UserError, match=rf"items is \[{N_ITEMS}, {DIM}\].*\[{N_ITEMS + 1}, {DIM}\]"):
        backbone.initialise(table[1:])


def test_the_padding_row_stays_zero_in_training(backbone, items):
    adam = torch.optim.AdamW(trainable(backbone).values(), lr=0.1, weight_decay=0.1)
    before = backbone.item_table().detach().clone()
    for _ in range(2):
        adam.zero_grad()
        F.cross_entropy(user_of(backbone, items) @ backbone.item_table()[1:].T, items[:, 0]).backward()
        adam.step()
    assert (backbone.item_table() - before)[1:].abs().amax(1).min() > 0
    assert not backbone.item_table()[0].any()


def test_ten_users_can_be_learnt_by_heart(name):
    """Histories of 3 to 10 items in no order: in the end each next item ranks first, and little loss is left.

    BERT4Rec learns what serves at the last position alone, for the Cloze task hides another part of a row each time.
    """
    random = np.random.default_rng(0)
    whole = np.zeros((10, 11), np.int64)
    for row, length in enumerate([4, 5, 6, 7, 8, 9, 10, 11, 11, 11]):
        whole[row, -length:] = random.choice(N_ITEMS, length, replace=False) + 1
    items, following = torch.from_numpy(whole[:, :-1]), torch.from_numpy(whole[:, 1:])
    target = following.masked_fill(items == 0, 0) if name in EVERY else following[:, -1]
    batch = {"items": items, "mask": items > 0, "target": target}
    own = {"init_std": 0.1} if name in SMALL else {}
    own |= {"last_prob": 1.0} if name == "bert4rec" else {}
    backbone = make(name, dropout=0.0, **own)
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
    assert loss < 0.1
    assert ranks.tolist() == [0.0] * 10
