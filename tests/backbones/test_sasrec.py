import pytest
import torch
from torch.nn import functional as F

from lit_llmers.backbones.sasrec import SASRec, _visible
from lit_llmers.errors import UserError

OFFICIAL = {  # names of a block's layers in pmixer/SASRec.pytorch
    "attention_norm": "attention_layernorms.{}",
    "qkv": "attention_layers.{}.in_proj",
    "out": "attention_layers.{}.out_proj",
    "ffn_norm": "forward_layernorms.{}",
    "inner": "forward_layers.{}.conv1",
    "outer": "forward_layers.{}.conv2",
}


def official(z: dict[str, torch.Tensor], kind: str, layers: int) -> dict[str, torch.Tensor]:
    """The golden parameters (`kind` is `param`) or their gradients (`grad.param`) under our names."""
    state = {"items.weight": z[f"{kind}.item_emb.weight"], "positions": z[f"{kind}.pos_emb.weight"][1:]}
    for part in ("weight", "bias"):
        state[f"norm.{part}"] = z[f"{kind}.last_layernorm.{part}"]
        for block in range(layers):
            for name, theirs in OFFICIAL.items():
                joined = "_" if name == "qkv" else "."
                value = z[f"{kind}.{theirs.format(block)}{joined}{part}"]
                state[f"blocks.{block}.{name}.{part}"] = value.squeeze(-1) if "conv" in theirs else value
    return state


def with_official_weights(z: dict[str, torch.Tensor]) -> SASRec:
    layers, (n_items, dim) = int(z["hp.blocks"]), z["param.item_emb.weight"].shape
    model = SASRec(n_items - 1, z["in.seq"].shape[1], dim, layers, int(z["hp.heads"]), dropout=0.0).double()
    model.load_state_dict(official(z, "param", layers))
    return model


def test_official_numbers_where_no_row_is_padded(golden):
    """pmixer/SASRec.pytorch with `norm_first`; it lets padding be attended to, so padded rows differ."""
    z = golden("backbone_sasrec/case_a_prenorm")
    model, sequence = with_official_weights(z), z["in.seq"]
    full = (sequence > 0).all(1)
    assert full.sum() == 2
    features = model(sequence[full], sequence[full] > 0, every_position=True)[-1]
    torch.testing.assert_close(features, z["out.features"][full], rtol=1e-9, atol=1e-10)


def test_official_gradients_with_padding_that_is_read_as_there(golden):
    """There padding is a zero vector without a position, and attended to."""
    z = golden("backbone_sasrec/case_a_prenorm")
    model, sequence = with_official_weights(z), z["in.seq"]
    padding = (sequence == 0)[..., None]
    assert padding.any()
    x = model.embed(sequence) - padding * model.positions / model.dim**0.5
    features = model.read(x, sequence, torch.ones_like(sequence, dtype=torch.bool), every_position=True)[-1]
    torch.testing.assert_close(features, z["out.features"], rtol=1e-9, atol=1e-10)
    scored = z["in.pos"] > 0
    positive, negative = ((features * model.embed(z[key])).sum(-1)[scored] for key in ("in.pos", "in.neg"))
    total = F.softplus(-positive).mean() + F.softplus(negative).mean()
    torch.testing.assert_close(total, z["out.total"], rtol=1e-9, atol=1e-10)
    total.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    expected = official(z, "grad.param", int(z["hp.blocks"]))
    assert gradients.keys() == expected.keys()
    for name, theirs in expected.items():
        torch.testing.assert_close(
            gradients[name], theirs, rtol=1e-7, atol=1e-9, msg=lambda message, name=name: f"{name}: {message}"
        )


def test_initial_scale():
    torch.manual_seed(0)
    table = SASRec(1000, 5, dim=32, init_std=0.1).item_table()[1:]
    assert abs(table.std().item() - 0.1) < 0.002


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 8, "heads": 3}, "heads=3"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        SASRec(10, 5, **arguments)


def test_a_longer_history_than_it_was_built_for_is_refused():
    items = torch.ones(1, 6, dtype=torch.long)
    with pytest.raises(UserError, match=r"6 items .* max_length=5"):
        SASRec(10, 5)(items, items > 0)


@pytest.mark.parametrize(("official", "accepted"), [(False, False), (True, False), (True, True)])
def test_who_sees_the_future(official, accepted):
    torch.manual_seed(0)
    items = torch.randint(1, 11, (2, 5))
    later = items.clone()
    later[:, -1] = later[:, -1] % 10 + 1
    model = SASRec(10, 5, 8, official_no_causal_mask=official, accept_visible_labels=accepted, init_std=0.5).eval()
    if official and not accepted:
        assert model(items, items > 0)[-1].shape == (2, 1, 8)
        with pytest.raises(UserError, match="accept_visible_labels"):
            model(items, items > 0, every_position=True)
    else:
        before, after = (model(rows, rows > 0, every_position=True)[-1][:, :-1] for rows in (items, later))
        assert torch.allclose(before, after, atol=1e-6) != official


def test_who_sees_whom():
    """A padded query sees itself: where a softmax over nothing is NaN (ONNX), it would spread to all positions."""
    visible = _visible(torch.tensor([[False, False, True, True]]))[0, 0]
    assert visible.int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
