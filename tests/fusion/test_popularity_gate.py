"""PAD's last two phases: concat and popularity_gate."""

import pytest
import torch
from official import PostNorm, assert_gradient, assert_value
from torch import Tensor
from torch.nn import functional as F

from lit_llmers.backbones.caser import Caser
from lit_llmers.backbones.gru4rec import GRU4Rec
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.errors import UserError
from lit_llmers.fusion.add_projected import AddProjected
from lit_llmers.fusion.concat import Concat
from lit_llmers.fusion.popularity_gate import PopularityGate, equal_mass_bins
from lit_llmers.fusion.text import Adapter

BLOCK = "transformer_encoder.transformer_blocks.{}"
NAMES = {
    "positions": "transformer_encoder.position_embedding",
    "norm": "transformer_encoder.layer_norm",
    "query": f"{BLOCK}.multi_head_attention.w_Q",
    "key": f"{BLOCK}.multi_head_attention.w_K",
    "value": f"{BLOCK}.multi_head_attention.w_V",
    "out": f"{BLOCK}.multi_head_attention.fc",
    "first": f"{BLOCK}.multi_head_attention.layer_norm",
    "up": f"{BLOCK}.feed_forward.w_1",
    "down": f"{BLOCK}.feed_forward.w_2",
    "second": f"{BLOCK}.feed_forward.layer_norm",
}


def encoder(z: dict[str, Tensor], table: str) -> PostNorm:
    rows, dim = z[f"param.{table}.weight"].shape
    shape = (z["in.log_mask"].shape[1], int(z["hp.blocks"]), int(z["hp.heads"]), 4 * dim)
    return PostNorm(rows - 1, dim, *shape, NAMES, eps=1e-6, activation=F.relu, biases=False)


def take_encoder(backbone: PostNorm, z: dict[str, Tensor], name: str, table: str | None = None) -> None:
    backbone.take(z, f"{name}.")
    if table:
        backbone.items.load_state_dict({"weight": z[f"param.{table}.weight"]})


def perceptron(adapter: Adapter, name: str) -> list[tuple[torch.nn.Module, str]]:
    """Our layers and their official names: they put dropout before and GELU after each but the first."""
    official = [f"{name}.fc", *(f"{name}.mlp_layers.mlp_layers.{1 + 3 * k}" for k in range(len(adapter.layers) - 1))]
    return list(zip(adapter.layers, official, strict=True))


def take(layers: list[tuple[torch.nn.Module, str]], z: dict[str, Tensor]) -> None:
    for layer, name in layers:
        layer.load_state_dict({kind: z[f"param.{name}.{kind}"] for kind in ("weight", "bias")})


def check(layers: list[tuple[torch.nn.Module, str]], z: dict[str, Tensor]) -> None:
    for layer, name in layers:
        for kind in ("weight", "bias"):
            assert_gradient(getattr(layer, kind), z[f"grad.param.{name}.{kind}"])


def binary(model: Concat | PopularityGate, z: dict[str, Tensor]) -> Tensor:
    """Their loss: position t predicts item t+1 against the negative of position t."""
    ids, real = z["in.item_ids"], z["in.log_mask"] > 0
    read = model.head(model(ids[:, :-1, 0], real, every_position=True)[-1])
    table = model.item_table()
    positive, negative = ((read * table[target]).sum(-1)[real] for target in (ids[:, 1:, 0], ids[:, :-1, 1]))
    return F.softplus(-positive).mean() + F.softplus(negative).mean()


def mk_mmd(x: Tensor, y: Tensor) -> Tensor:
    both, n = torch.cat([x, y]), len(x)
    squares = (both[:, None] - both[None]).square().sum(2)
    kernel = sum((-squares / (2 * 2.0**k * squares.detach().mean())).exp() for k in range(-3, 2))
    same = kernel[:n, :n] + kernel[n:, n:]
    return (same.sum() - same.diag().sum()) / (n * (n - 1)) - 2 * kernel[:n, n:].mean() + 2 / (n - 1)


# ---- concat ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
def test_official_alignment_phase(golden):
    """The alignment sees padding in their code, which is the perceptron of a zero vector there."""
    z = golden("pad/case_a_phase2")
    model = Concat(encoder(z, "other_embedding"), z["in.text_table"], layers=int(z["hp.text_mlp_layers"]) + 1).eval()
    layers = [*perceptron(model.text.adapter, "turn_dim1"), (model.fuse, "fc.mlp_layers.1")]
    take_encoder(model.inner, z, "user_enc_2", "other_embedding")
    take(layers, z)
    items = z["in.item_ids"].flatten()

    loss = binary(model, z)
    real = items > 0
    assert_value(model.text_table()[items[real]], z["out.text_embeddings"][real])
    assert_value(model.item_table()[items[real]], z["out.fused_embeddings"][real])
    padding = model.text.adapter(z["in.text_table"][:1])
    text = torch.cat([padding, model.text_table()[1:]])
    total = loss + z["hp.mmd_weight"] * mk_mmd(text[items], model.id_table()[items])
    assert_value(total, z["out.total"])
    total.backward()
    check(layers, z)
    model.inner.check(z, "user_enc_2.")
    ours, theirs = model.inner.items.weight.grad[1:], z["grad.param.other_embedding.weight"][1:]  # they give padding none
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_concat_starts_from_a_trained_model_and_names_another():
    trained, text = SASRec(10, 5, dim=8, init_std=0.3), torch.randn(11, 6)
    model = Concat(SASRec(10, 5, dim=8), text, start=trained).eval()
    assert all(torch.equal(value, model.inner.state_dict()[name]) for name, value in trained.state_dict().items())
    assert 0.25 < model.text_table()[1:].square().mean().sqrt() < 0.35
    with pytest.raises(UserError, match="'id' names trained another model: they differ in 'blocks.0.attention_norm.bias'"):
        Concat(SASRec(10, 5, dim=8), text, start=SASRec(10, 5, dim=4))
    with pytest.raises(UserError, match="would have no effect"):
        Concat(AddProjected(SASRec(10, 5, dim=8), text), text)


def test_concat_has_one_item_table():
    """Caser has two, of which the one that it only reads goes."""
    model = Concat(Caser(10, 5, dim=8), torch.randn(11, 6))
    assert [name for name in model.state_dict() if name.endswith((".items.weight", ".candidates.weight"))] == [
        "inner.candidates.weight"
    ]
    initial = torch.randn(11, 8)
    initial[0] = 0
    before = model.item_table()
    model.initialise(initial)
    assert torch.equal(model.id_table(), initial)
    assert not torch.allclose(model.item_table(), before)


# ---- popularity_gate -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
def test_official_last_phase(golden):
    z = golden("pad/case_a_phase3")
    text, n_items = z["in.text_table"], len(z["in.item_bin"]) - 1
    backbone, layers = encoder(z, "id_embedding"), int(z["hp.text_mlp_layers"]) + 1
    model = PopularityGate(backbone, text, torch.ones(n_items + 1), layers=layers).eval()
    encoders = {"user_encoder": model.inner, "user_enc_2": model.aligned.inner, "user_enc_3": model.text.inner}
    for (name, tower), table in zip(encoders.items(), ("id_embedding", "other_embedding", None), strict=True):
        take_encoder(tower, z, name, table)
    linear = perceptron(model.aligned.text.adapter, "turn_dim1") + perceptron(model.text.text.adapter, "turn_dim3")
    linear.append((model.aligned.fuse, "fc.mlp_layers.1"))
    take(linear, z)
    model.bin = z["in.item_bin"]
    with torch.no_grad():
        model.gate.copy_(torch.stack([z[f"param.{name}"] for name in ("alpha", "alpha2", "alpha3")]))

    total = binary(model, z)
    assert_value(total, z["out.total"])
    total.backward()
    for row, name in enumerate(("alpha", "alpha2", "alpha3")):
        torch.testing.assert_close(model.gate.grad[row], z[f"grad.param.{name}"], rtol=1e-7, atol=1e-9)
    check(linear, z)
    for name, tower in encoders.items():
        tower.check(z, f"{name}.")
    assert_gradient(model.inner.items.weight, z["grad.param.id_embedding.weight"])
    assert_gradient(model.aligned.inner.items.weight, z["grad.param.other_embedding.weight"])


def test_score_is_the_gated_sum_of_towers():
    torch.manual_seed(0)
    popularity = torch.tensor([0, 60, 20, 10, 6, 4])
    model = PopularityGate(GRU4Rec(5, 4, dim=8), torch.randn(6, 3), popularity).eval()
    items = torch.tensor([[0, 2, 5, 1]])
    scores = model.head(model(items, items > 0)[-1])[0, 0] @ model.item_table()[1:].T
    one_by_one = [tower.head(tower(items, items > 0)[-1])[0, 0] @ tower.item_table()[1:].T for tower in model.towers]
    gates = model.gates()[:, model.bin[1:]]
    torch.testing.assert_close(scores, sum(gate * score for gate, score in zip(gates, one_by_one, strict=True)))
    torch.testing.assert_close(gates.sum(0), torch.ones(5))
    assert (gates[1] < 0.05).all(), "the aligned tower starts nearly shut, as in the official code"


def test_bins_hold_equally_many_interactions():
    popularity = torch.tensor([99, 5, 40, 1, 10, 0, 4, 20, 20])  # row 0 is padding
    assert equal_mass_bins(popularity, 5).tolist() == [0, 5, 1, 5, 5, 5, 5, 3, 4]
    many = torch.randint(1, 100, (10_001,))
    mass = torch.zeros(11).index_add(0, equal_mass_bins(many, 10), many.float())[1:]
    assert (mass / mass.sum() - 0.1).abs().max() < 0.001
    assert equal_mass_bins(torch.zeros(4, dtype=torch.int64), 10).tolist() == [0, 1, 1, 1]


def test_towers_start_from_trained_models():
    torch.manual_seed(0)
    text, popularity = torch.randn(11, 6), torch.arange(11)
    start = SASRec(10, 5, dim=8)
    aligned = Concat(SASRec(10, 5, dim=8), text, layers=2)
    model = PopularityGate(SASRec(10, 5, dim=8), text, popularity, start, aligned, layers=2)
    for tower, trained in ((model.inner, start), (model.aligned, aligned)):
        assert all(torch.equal(value, tower.state_dict()[name]) for name, value in trained.state_dict().items())
        assert not {weight.data_ptr() for weight in tower.parameters()} & {weight.data_ptr() for weight in trained.parameters()}
    assert model.text.text.source is model.aligned.text.source
    assert "bin" in model.state_dict(), "a served model has no training counts"


def test_wrong_arguments_are_named():
    text, popularity = torch.randn(11, 6), torch.arange(11)
    with pytest.raises(UserError, match="stand alone in 'fusion'"):
        PopularityGate(AddProjected(SASRec(10, 5, dim=8), text), text, popularity)
    with pytest.raises(UserError, match="'aligned' names trained another model: they differ in 'text.adapter.layers.2"):
        PopularityGate(SASRec(10, 5, dim=8), text, popularity, aligned=Concat(SASRec(10, 5, dim=8), text, layers=2))
    for bins in (0, -1):
        with pytest.raises(UserError, match=f"bins is {bins}. It must be at least 1"):
            PopularityGate(SASRec(10, 5, dim=8), text, popularity, bins=bins)
