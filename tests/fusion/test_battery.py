"""The battery (see tests/battery.py) for every fusion around every backbone it takes, and what is asked of a fusion alone."""

import copy
import gc
import pickle
import weakref

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
    user_of,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones.bert4rec import BERT4Rec
from lit_llmers.backbones.caser import Caser
from lit_llmers.backbones.gru4rec import GRU4Rec
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.conf.schema import LossConfig
from lit_llmers.data.pairs import UnmetItems
from lit_llmers.fusion import Fusion
from lit_llmers.fusion.add_projected import AddProjected
from lit_llmers.fusion.concat import Concat
from lit_llmers.fusion.dual_view import DualView
from lit_llmers.fusion.frequency import Frequency
from lit_llmers.fusion.frozen_adapter import FrozenAdapter
from lit_llmers.fusion.popularity_gate import PopularityGate
from lit_llmers.serving import OnnxScorer, score_catalogue
from lit_llmers.serving.onnx_graph import save_onnx, trace
from lit_llmers.students.negatives import UnmetDraw
from lit_llmers.students.sequential import SequentialRecommender

TEXT = 24  # width
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
CAUSAL = [(fusion, name) for fusion, name in PAIRS if fusion != "frequency" and name in ("sasrec", "gru4rec")]
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
def backbone(pair) -> Fusion:
    return make(*pair)


@pytest.fixture
def other(pair) -> Fusion:
    return make(*pair, seed=1)


@pytest.fixture
def items() -> Tensor:
    return histories()


class TestBattery(Battery):
    """Every fusion around every backbone."""


@pytest.mark.parametrize("pair", CAUSAL, ids="-".join)
class TestCausalBattery(CausalBattery):
    """Every fusion that leaves the positions apart, around every backbone that trains on them."""


def test_every_position_is_read_where_the_backbone_inside_does(pair, backbone):
    assert backbone.every_position == (backbone.inner.every_position and pair[0] != "frequency")
    assert (backbone.every_position and backbone.causal) == (pair in CAUSAL)


def test_what_serves_counts_each_table_once_and_not_what_it_is_made_of():
    """`e = adapter(t)` or `W [E | t]` serves as one table, whatever wrote it; two views are two, three towers three."""
    table = (N_ITEMS + 1) * DIM
    plain = BACKBONES["sasrec"]().serving_size()
    assert plain == sum(parameter.numel() for parameter in BACKBONES["sasrec"]().parameters())
    size = {fusion: make(fusion, "sasrec").serving_size() for fusion in FUSIONS}
    assert size["frozen_adapter"] == size["with_id"] == size["concat"] == plain
    assert size["add_projected"] == plain + table
    attention = 2 * (4 * DIM**2 + DIM)
    assert size["dual_view"] == plain + table + attention + (MAX_LENGTH + 1) * DIM
    assert size["popularity_gate"] == 3 * plain + 3 * 11
    frequency = make("frequency", "sasrec")
    own = [frequency.offset, frequency.filter, *frequency.gates.parameters()]
    assert size["frequency"] == plain + table + (N_ITEMS + 1) * 3 + sum(parameter.numel() for parameter in own)


@pytest.mark.parametrize("pair", [(fusion, "bert4rec") for fusion in FUSIONS if fusion != "frequency"], ids="-".join)
def test_what_is_hidden_adds_nothing_but_its_place(backbone, items):
    """BERT4Rec's hidden item after a row, in training, is read as what it appends itself when it serves."""
    hidden = F.pad(items, (0, 1), value=N_ITEMS + 1)
    assert not backbone.embed(hidden)[:, -1].any()
    at_end = backbone(hidden, hidden > 0, every_position=True)
    assert_same([state[:3, -1:] for state in at_end], [state[:3] for state in backbone(items, items > 0)])


# ---- compilation and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [(fusion, "sasrec") for fusion in FUSIONS], ids="-".join)
def test_compiled_equals_eager(pair, items):
    check_compiled_equals_eager(make(*pair, dropout=0.0), items, noisy=pair[0] == "frequency")


@pytest.mark.parametrize("fusion", [Concat, FrozenAdapter, PopularityGate])
def test_a_compiled_step_reads_the_table_that_scores(fusion, items):
    """With the dropout that was drawn once for both: eager's numbers follow from one table."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    own = {"popularity": POPULARITY} if fusion is PopularityGate else {}
    model = fusion(BACKBONES["sasrec"](dropout=0.0), torch.randn(N_ITEMS + 1, TEXT), layers=3, dropout=0.5, **own).double()
    results = []
    for student in (model, torch.compile(model, backend="eager", dynamic=True)):
        torch.manual_seed(1)
        model.zero_grad()
        made = [*student(items, items > 0, True), model.item_table()]
        sum(each.square().sum() for each in made).backward()
        results.append([*made, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    assert_same(*results, tolerance=1e-9)


@pytest.mark.parametrize("pair", EXPORTED, ids="-".join)
def test_onnx_scores_as_pytorch_does_at_any_size(pair, tmp_path):
    check_onnx_scores_as_pytorch_does(make(*pair, **({} if pair[1] == "caser" else {"layers": 1})), tmp_path)


@pytest.mark.parametrize("fusion", ["frozen_adapter", "popularity_gate"])
def test_a_settled_model_is_served_without_its_text(fusion, tmp_path):
    student = SequentialRecommender(make(fusion, "sasrec", layers=1)).eval()
    items = torch.tensor([[0, 3, 9], [1, 2, 3]])
    with torch.no_grad():
        expected = score_catalogue(student, MAX_LENGTH, items, items > 0)
        for module in student.modules():
            if hasattr(module, "settle"):
                module.settle()
        torch.testing.assert_close(score_catalogue(student, MAX_LENGTH, items, items > 0), expected)
    program = trace(student, MAX_LENGTH)
    shapes = [tuple(value.shape) for value in program.model.graph.initializers.values()]
    assert (N_ITEMS + 1, DIM) in shapes
    assert not any(TEXT in shape for shape in shapes)
    difference = save_onnx(
        program, tmp_path, lambda path: np.abs(OnnxScorer(path)(items.numpy()) - expected.numpy())[:, 1:].max()
    )
    assert difference < 1e-4


def test_the_text_is_no_part_of_the_weights(backbone):
    """It is another stage's."""
    assert not any(value.shape == (N_ITEMS + 1, TEXT) for value in backbone.state_dict().values())


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
    own = {"init_std": 0.1, "dropout": 0.0}
    own |= {"bert4rec": {"last_prob": 1.0}, "caser": {"fc_activation": "tanh"}}.get(pair[1], {})
    check_learns_by_heart(make(*pair, **own), loss_left=0.2)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kind", ["bce", "sampled_softmax"])
def test_losses_on_sampled_negatives_train_it_too(fusion, kind, items):
    model = make(fusion, "sasrec").train()
    unmet = UnmetDraw.of(UnmetItems(np.array([[0, 1], [1, 2]]), np.arange(2), N_ITEMS))
    student = SequentialRecommender(model, None, LossConfig(kind, negatives=4), 1.0, POPULARITY, unmet)
    user = torch.tensor([0, 1, 1])
    batch = {"user": user, "items": items[:3], "mask": items[:3] > 0, "target": items[[4, 0, 1], -1]}
    loss = student.task_loss(student(batch), batch)
    loss.backward()
    assert torch.isfinite(loss)


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
