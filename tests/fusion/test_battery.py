"""What every fusion owes the rest, around every backbone it takes; see tests/backbones/test_contract.py."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone
from lit_llmers.backbones.bert4rec import BERT4Rec
from lit_llmers.backbones.caser import Caser
from lit_llmers.backbones.gru4rec import GRU4Rec
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.conf.schema import LossConfig, OptimizerConfig
from lit_llmers.errors import UserError
from lit_llmers.fusion import Fusion
from lit_llmers.fusion.add_projected import AddProjected
from lit_llmers.fusion.concat import Concat
from lit_llmers.fusion.dual_view import DualView
from lit_llmers.fusion.frequency import Frequency
from lit_llmers.fusion.frozen_adapter import FrozenAdapter
from lit_llmers.fusion.popularity_gate import PopularityGate
from lit_llmers.onnx_graph import save_onnx, trace
from lit_llmers.serving import OnnxScorer, score_catalogue
from lit_llmers.students.sequential import SequentialRecommender

N_ITEMS, MAX_LENGTH, DIM, TEXT = 40, 12, 16, 24
BACKBONES = {
    "sasrec": lambda **own: SASRec(N_ITEMS, MAX_LENGTH, DIM, **{"layers": 2, "init_std": 0.5, **own}),
    "gru4rec": lambda **own: GRU4Rec(N_ITEMS, MAX_LENGTH, DIM, **{"layers": 2, "init_std": 1.0, **own}),
    "bert4rec": lambda **own: BERT4Rec(N_ITEMS, MAX_LENGTH, DIM, **{"layers": 2, "init_std": 0.3, **own}),
    "caser": lambda **own: Caser(N_ITEMS, MAX_LENGTH, DIM, **{"window": 4, "horizontal": 3, "init_std": 1.0, **own}),
}
POPULARITY = torch.arange(N_ITEMS + 1)
FUSIONS = {
    "frozen_adapter": FrozenAdapter,
    "with_id": lambda backbone, text: FrozenAdapter(backbone, text, layers=3, activation="gelu", with_id=True),
    "add_projected": lambda backbone, text: AddProjected(backbone, text, epsilon=0.5),
    "dual_view": lambda backbone, text: DualView(backbone, text, MAX_LENGTH),
    "frequency": lambda backbone, text: Frequency(backbone, text, MAX_LENGTH, experts=3, dropout=0.0),
    "concat": lambda backbone, text: Concat(backbone, text, layers=2, dropout=0.0),
    "popularity_gate": lambda backbone, text: PopularityGate(backbone, text, POPULARITY, layers=2, dropout=0.0),
}
PAIRS = [(fusion, name) for fusion in FUSIONS for name in BACKBONES if (fusion, name) != ("frequency", "bert4rec")]
EXPORTED = [(fusion, "sasrec") for fusion in FUSIONS] + [("popularity_gate", "gru4rec")]  # an export takes seconds
EXPORTED += [("dual_view", name) for name in ("gru4rec", "bert4rec", "caser")]
ADAPTED = [fusion for fusion in FUSIONS if fusion not in ("add_projected", "frequency")]  # text in the item table


def make(fusion: str, name: str, seed: int = 0, **own) -> Fusion:
    text = torch.randn(N_ITEMS + 1, TEXT, generator=torch.Generator().manual_seed(9))
    text[0] = 0
    torch.manual_seed(seed)
    model = FUSIONS[fusion](BACKBONES[name](**own), text)
    if fusion == "frequency":  # at the start filter and offset say little
        with torch.no_grad():
            model.filter.normal_()
            model.offset.normal_()
    return model.eval()


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def model(pair) -> Fusion:
    return make(*pair)


@pytest.fixture
def items() -> Tensor:
    """Five histories of 8, 5, 1, 0 and 8 items."""
    items = torch.randint(1, N_ITEMS + 1, (5, 8), generator=torch.Generator().manual_seed(1))
    items[1, :3], items[2, :7], items[3] = 0, 0, 0
    return items


def states_of(model: Backbone, items: Tensor) -> list[Tensor]:
    return model(items, items > 0, every_position=model.every_position)


def user_of(model: Backbone, items: Tensor) -> Tensor:
    return model.head(model(items, items > 0)[-1][:, 0])


def assert_same(left: list[Tensor], right: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- shapes, positions and padding -----------------------------------------------------------------------------------


def test_shapes(pair, model, items):
    last = model(items, items > 0)
    assert [state.shape for state in last] == [(5, 1, model.width)] * (model.layers + 1)
    assert model.head(last[-1]).shape == (5, 1, model.dim)
    assert model.embed(items).shape[:2] == (5, 8)
    assert not model.embed(items)[items == 0].any()
    assert model.item_table().shape == (N_ITEMS + 1, model.dim)
    assert not model.item_table()[0].any()
    assert model.every_position == (model.inner.every_position and pair[0] != "frequency")
    if model.every_position:
        assert model.head(states_of(model, items)[-1]).shape == (5, 8, model.dim)
    else:
        with pytest.raises(UserError, match="examples=prefixes"):
            model(items, items > 0, every_position=True)


def test_the_future_has_no_influence_and_the_past_has(pair, model, items):
    if not (model.every_position and model.causal):
        return
    full = items[[0, 4]]
    changed = full.clone()
    changed[:, 5] = changed[:, 5] % N_ITEMS + 1
    before, after = states_of(model, full), states_of(model, changed)
    assert_same([state[:, :5] for state in before], [state[:, :5] for state in after])
    assert (before[-1][:, 5:] - after[-1][:, 5:]).abs().amax(-1).min() > 1e-3
    assert_same(model(full, full > 0), [state[:, -1:] for state in before])


def test_every_item_within_reach_and_their_order_matter(model, items):
    row = items[:1]
    before = user_of(model, row)
    for back in range(1, 1 + getattr(model.inner, "window", 8)):
        changed = row.clone()
        changed[0, -back] = changed[0, -back] % N_ITEMS + 1
        assert (user_of(model, changed) - before).abs().max() > 1e-4
    assert (user_of(model, row[:, [0, 1, 2, 3, 5, 4, 6, 7]]) - before).abs().max() > 1e-4


def test_padding_has_no_influence(model, items):
    together = states_of(model, items)
    for row, length in ((0, 8), (1, 5), (2, 1)):
        positions = length if model.every_position else 1
        assert_same([state[row : row + 1, -positions:] for state in together], states_of(model, items[row : row + 1, -length:]))


def test_more_padding_changes_nothing(model, items):
    wider = F.pad(items[:3], (4, 0))
    assert_same(model(items[:3], items[:3] > 0), model(wider, wider > 0))


def test_a_row_of_padding_alone_makes_no_nan(model, items):
    model.train()
    loss = user_of(model, items).square().mean()
    for states in (model(items, items > 0), states_of(model, items)):
        assert all(torch.isfinite(state).all() for state in states)
        loss = loss + states[-1].square().mean()
    (loss + model.item_table().square().mean()).backward()
    weights = dict(model.named_parameters())
    without = {name for name, weight in weights.items() if weight.grad is None}
    assert without <= {"text.adapter.noise"}, "a parameter without gradient stops data-parallel training"
    assert all(torch.isfinite(weight.grad).all() for name, weight in weights.items() if name not in without)


@pytest.mark.parametrize("pair", [(fusion, "bert4rec") for fusion in FUSIONS if fusion != "frequency"], ids="-".join)
def test_what_is_hidden_adds_nothing_but_its_place(model, items):
    """BERT4Rec's hidden item after a row, in training, is read as what it appends itself when it serves."""
    hidden = F.pad(items, (0, 1), value=N_ITEMS + 1)
    assert not model.embed(hidden)[:, -1].any()
    at_end = model(hidden, hidden > 0, every_position=True)
    assert_same([state[:3, -1:] for state in at_end], [state[:3] for state in model(items, items > 0)])


# ---- precision, compilation, files -----------------------------------------------------------------------------------


def test_bfloat16_is_close_to_float32(model, items):
    exact, table = user_of(model, items), model.item_table()
    model.bfloat16()
    rough = user_of(model, items)
    assert rough.dtype == model.item_table().dtype == torch.bfloat16
    assert torch.isfinite(rough).all()
    assert torch.cosine_similarity(rough.float(), exact, dim=-1)[[0, 1, 2, 4]].min() > 0.98
    assert torch.cosine_similarity(model.item_table().float()[1:], table[1:], dim=-1).min() > 0.99


def test_bfloat16_autocast_trains(model, items):
    """As `trainer.precision=bf16-mixed` runs it: weights, gradients and the item table stay in float32."""
    model.train()
    rows = items[[0, 1, 4]]
    view = model.training_view({"items": rows, "mask": rows > 0, "target": rows})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        user = model.head(model(view["items"], view["mask"], model.every_position)[-1])
        table = model.item_table()
    assert table.dtype == torch.float32
    (user.float().square().sum() + table.square().sum()).backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(gradient.dtype == torch.float32 and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("pair", [(fusion, "sasrec") for fusion in FUSIONS], ids="-".join)
def test_compiled_equals_eager(pair, items):
    model = make(*pair, dropout=0.0).double()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for rows in (items[:3], items[[0, 1, 2, 4], 1:]):
        results = []
        for each in (model, compiled):
            model.zero_grad()
            states = each(rows, rows > 0, model.every_position)
            (sum((state + state.square()).sum() for state in states) + model.item_table().square().sum()).backward()
            results.append([*states, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
        assert_same(results[1], results[0], tolerance=1e-9)


@pytest.mark.parametrize("pair", EXPORTED, ids="-".join)
def test_onnx_scores_as_pytorch_does_at_any_size(pair, tmp_path):
    student = SequentialRecommender(make(*pair, **({} if pair[1] == "caser" else {"layers": 1}))).eval()
    random = np.random.default_rng(0)
    batches = []
    for rows, length in [(1, 1), (1, MAX_LENGTH), (7, 2), (3, MAX_LENGTH - 1), (2, MAX_LENGTH)]:
        histories = random.integers(1, N_ITEMS + 1, (rows, length))
        for row in range(1, rows):
            histories[row, : random.integers(0, length)] = 0
        batches.append(histories)
    with torch.inference_mode():
        expected = [score_catalogue(student, torch.from_numpy(rows), torch.from_numpy(rows > 0)).numpy() for rows in batches]

    def check(path) -> float:
        scorer = OnnxScorer(path)
        pairs = zip(batches, expected, strict=True)
        return max(float(np.abs(scorer(rows)[:, 1:] - scores[:, 1:]).max()) for rows, scores in pairs)

    assert save_onnx(trace(student, MAX_LENGTH), tmp_path, check) < 1e-4


@pytest.mark.parametrize("fusion", ["frozen_adapter", "popularity_gate"])
def test_a_settled_model_is_served_without_its_text(fusion, tmp_path):
    student = SequentialRecommender(make(fusion, "sasrec", layers=1)).eval()
    items = torch.tensor([[0, 3, 9], [1, 2, 3]])
    with torch.no_grad():
        expected = score_catalogue(student, items, items > 0)
        for module in student.modules():
            if hasattr(module, "settle"):
                module.settle()
        torch.testing.assert_close(score_catalogue(student, items, items > 0), expected)
    program = trace(student, MAX_LENGTH)
    shapes = [tuple(value.shape) for value in program.model.graph.initializers.values()]
    assert (N_ITEMS + 1, DIM) in shapes
    assert not any(TEXT in shape for shape in shapes)
    difference = save_onnx(
        program, tmp_path, lambda path: np.abs(OnnxScorer(path)(items.numpy()) - expected.numpy())[:, 1:].max()
    )
    assert difference < 1e-4


def test_weights_come_back_from_a_file(pair, items, tmp_path):
    source, other = make(*pair), make(*pair, seed=1)
    assert not any(value.shape == (N_ITEMS + 1, TEXT) for value in source.state_dict().values()), "the text is another stage's"
    with pytest.raises(AssertionError):
        assert_same(source(items, items > 0), other(items, items > 0))
    torch.save(source.state_dict(), tmp_path / "weights")
    other.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    assert_same(source(items, items > 0), other(items, items > 0), tolerance=0)
    assert torch.equal(source.item_table(), other.item_table())


# ---- one table for a step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ADAPTED)
def test_a_step_makes_its_table_once_and_the_next_step_another(fusion, items):
    model = make(fusion, "sasrec", dropout=0.0).train()
    made = []
    for view in [module for module in model.modules() if type(module).__name__ == "TextView"]:
        view.adapter.register_forward_hook(lambda *_: made.append(1))
    towers, expected = 2 if fusion == "popularity_gate" else 1, []
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)  # which does not count a weight's versions
    for _ in range(2):
        adam.zero_grad()
        user = user_of(model, items)
        tables = [model.item_table() for _ in range(3)]
        F.cross_entropy(user @ tables[0][1:].T, items[:, -1].clamp(min=1) - 1).backward()
        adam.step()
        expected.append(tables[0].detach().clone())
    assert len(made) == 2 * towers
    assert not torch.equal(*expected)
    model.eval()
    with torch.inference_mode():
        for _ in range(3):
            user_of(model, items)
            evaluated = model.item_table()
    assert len(made) == 3 * towers
    assert not torch.equal(evaluated, expected[-1])
    assert torch.equal(model.item_table(), copy.deepcopy(model).item_table())
    model.load_state_dict(make(fusion, "sasrec", seed=1).state_dict())
    assert torch.equal(model.item_table(), make(fusion, "sasrec", seed=1).item_table())


@pytest.mark.parametrize("fusion", ADAPTED)
def test_two_passes_have_two_graphs(fusion, items):
    """Two forward passes before two backward calls, and gradients accumulated over micro-batches without a step."""
    model, results = make(fusion, "sasrec", dropout=0.0).train(), []

    def loss(rows: Tensor) -> Tensor:
        return user_of(model, rows).sum() + model.item_table().square().sum()

    for order in ("both first", "one by one"):
        model.zero_grad()
        losses = (loss(rows) for rows in (items[:3], items[4:]))
        for each in list(losses) if order == "both first" else losses:
            each.backward()
        results.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    assert_same(*results, tolerance=0)


@pytest.mark.parametrize("fusion", ADAPTED)
def test_a_kept_table_is_no_part_of_copies_and_dies_with_its_model(fusion, items):
    model = make(fusion, "sasrec").train()
    user_of(model, items)
    table = weakref.ref(model.item_table())
    assert torch.equal(copy.deepcopy(model).eval().item_table(), pickle.loads(pickle.dumps(model.eval())).item_table())
    model.train()
    user_of(model, items)
    table = weakref.ref(model.text_table() if hasattr(model, "text_table") else model.text.text_table())
    assert table() is not None
    del model
    gc.collect()
    assert table() is None


# ---- learning --------------------------------------------------------------------------------------------------------


def test_ten_users_can_be_learnt_by_heart(pair):
    """Histories of 3 to 10 items in no order: in the end each next item ranks first, and little loss is left."""
    fusion, name = pair
    random = np.random.default_rng(0)
    whole = np.zeros((10, 11), np.int64)
    for row, length in enumerate([4, 5, 6, 7, 8, 9, 10, 11, 11, 11]):
        whole[row, -length:] = random.choice(N_ITEMS, length, replace=False) + 1
    items, following = torch.from_numpy(whole[:, :-1]), torch.from_numpy(whole[:, 1:])
    own = {"init_std": 0.1, "dropout": 0.0}
    own |= {"bert4rec": {"last_prob": 1.0}, "caser": {"fc_activation": "tanh"}}.get(name, {})
    model = make(fusion, name, **own)
    target = following.masked_fill(items == 0, 0) if model.every_position else following[:, -1]
    batch = {"items": items, "mask": items > 0, "target": target}
    student = SequentialRecommender(model, OptimizerConfig(lr=1e-2), targets_per_row=1.0)
    adam = student.configure_optimizers()
    student.train()
    torch.manual_seed(0)
    for _ in range(150):
        adam.zero_grad()
        view = model.training_view(batch)
        (student.task_loss(student(view), view) / (view["target"] > 0).sum() * len(items)).backward()
        adam.step()
    student.eval()
    with torch.no_grad():
        user = student.encode(items, items > 0)
        loss = F.cross_entropy(user @ student.item_table()[1:].T, following[:, -1] - 1)
        ranks = student.ranks({"items": items, "mask": items > 0, "target": following[:, -1]})
    assert loss < 0.2
    assert ranks.tolist() == [0.0] * 10
    assert not student.item_table()[0].any()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kind", ["bce", "sampled_softmax"])
def test_losses_on_sampled_negatives_train_it_too(fusion, kind, items):
    model = make(fusion, "sasrec").train()
    student = SequentialRecommender(model, loss=LossConfig(kind, negatives=4), popularity=POPULARITY)
    batch = {"items": items[:3], "mask": items[:3] > 0, "target": items[[4, 0, 1], -1]}
    loss = student.task_loss(student(batch), batch)
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_text_of_another_number_of_items_is_named(fusion):
    with pytest.raises(UserError, match=r"text vectors are \[40, 24\].*40 items need \[41, D\].*'from'"):
        FUSIONS[fusion](SASRec(N_ITEMS, MAX_LENGTH, DIM), torch.zeros(N_ITEMS, TEXT))


def test_a_chain_of_fusions_is_a_backbone(items):
    """A teacher that reads text and identity, and text besides at its input."""
    text = torch.randn(N_ITEMS + 1, TEXT)
    inner = FrozenAdapter(SASRec(N_ITEMS, MAX_LENGTH, DIM), text, with_id=True)
    for model in (
        AddProjected(inner, text),
        DualView(inner, text, MAX_LENGTH),
        Frequency(AddProjected(inner, text), text, MAX_LENGTH),
    ):
        assert isinstance(model, nn.Module)
        user = user_of(model.eval(), items)
        assert user.shape == (5, model.dim)
        assert model.item_table().shape == (N_ITEMS + 1, model.dim)
