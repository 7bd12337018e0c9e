"""The battery (see tests/battery.py) for every sequential backbone, and what is asked of a plain one alone."""

import inspect
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from battery import (
    DIM,
    MAX_LENGTH,
    N_ITEMS,
    Battery,
    CausalBattery,
    assert_same,
    check_compiled_equals_eager,
    check_learns_by_heart,
    check_onnx_scores_as_pytorch_does,
    histories,
    states_of,
    trainable,
    user_of,
)
from torch import Tensor
from torch.nn import functional as F

from lit_llmers.backbones import Backbone
from lit_llmers.building import build_backbone, find
from lit_llmers.composing.checks import check
from lit_llmers.composing.resolving import resolve
from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.conf.stages import FitStage
from lit_llmers.conf.typed import build
from lit_llmers.errors import UserError
from lit_llmers.recipes import compose, options

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
CAUSAL = ["sasrec", "gru4rec", "llama", "qwen3"]
EVERY = [name for name, (fit, _) in MODELS.items() if find("backbones", fit).every_position]


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


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "bert4rec", "srgnn"])
def test_a_stack_without_layers_is_refused(name):
    with pytest.raises(UserError, match="layers is 0. It must be at least 1"):
        make(name, layers=0)


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
def other(name) -> Backbone:
    return make(name, seed=1)


@pytest.fixture
def items() -> Tensor:
    return histories()


class TestBattery(Battery):
    """Every backbone."""


@pytest.mark.parametrize("name", CAUSAL)
class TestCausalBattery(CausalBattery):
    """Those that train on every position of a row."""


def test_who_reads_every_position_and_sees_only_the_past(backbone, name):
    assert (backbone.every_position and backbone.causal) == (name in CAUSAL)


# ---- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gru4rec", "llama", "qwen3"])
def test_every_position_says_what_its_prefix_says(backbone, items):
    """SASRec is left out: its positions are counted from the end, so a prefix is not where it was in the whole row."""
    row = items[:1]
    every = states_of(backbone, row)
    for length in range(1, 9):
        assert_same([state[:, length - 1 : length] for state in every], backbone(row[:, :length], row[:, :length] > 0))


# ---- compilation and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_compiled_equals_eager(name, items):
    check_compiled_equals_eager(make(name, dropout=0.0, **({} if name == "caser" else {"layers": 2})), items)


@pytest.mark.parametrize("name", SMALL)
def test_onnx_scores_as_pytorch_does_at_any_size(backbone, tmp_path):
    check_onnx_scores_as_pytorch_does(backbone, tmp_path)


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


@pytest.mark.parametrize("student", sorted(set(options("student")) - {"llm"}))
def test_the_option_file_of_a_student_fits_it(student):
    """Checked as a run would; it comes back from a file, and all that a backbone lets choose by number is there to be read."""
    stage = next(
        stage for stage in resolve(compose("student", [f"student={student}", "logger=csv"])) if stage.name == "student"
    )
    assert build(FitStage, json.loads(json.dumps(asdict(stage.config))), "stages.student") == stage.config
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
    own = {"init_std": 0.1} if name in SMALL else {}
    own |= {"last_prob": 1.0} if name == "bert4rec" else {}
    check_learns_by_heart(make(name, dropout=0.0, **own), loss_left=0.1)
