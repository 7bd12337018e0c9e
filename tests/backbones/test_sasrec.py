import pytest
import torch

from lit_llmers.backbones.sasrec import SASRec, _visible
from lit_llmers.errors import UserError


def test_official_numbers_where_no_row_is_padded(golden):
    """pmixer/SASRec.pytorch with `norm_first`; it lets padding be attended to, so padded rows differ."""
    z = golden("backbone_sasrec/case_a_prenorm")
    table, sequence = z["param.item_emb.weight"], z["in.seq"]
    layers, length = int(z["hp.blocks"]), sequence.shape[1]
    model = SASRec(len(table) - 1, length, table.shape[1], layers, int(z["hp.heads"]), dropout=0.0).double()
    state = {"items.weight": table, "positions": z["param.pos_emb.weight"][1:]}
    state |= {f"norm.{kind}": z[f"param.last_layernorm.{kind}"] for kind in ("weight", "bias")}
    for block in range(layers):
        for kind in ("weight", "bias"):
            official = {
                "attention_norm": f"attention_layernorms.{block}.{kind}",
                "qkv": f"attention_layers.{block}.in_proj_{kind}",
                "out": f"attention_layers.{block}.out_proj.{kind}",
                "ffn_norm": f"forward_layernorms.{block}.{kind}",
                "inner": f"forward_layers.{block}.conv1.{kind}",
                "outer": f"forward_layers.{block}.conv2.{kind}",
            }
            for name, theirs in official.items():
                value = z[f"param.{theirs}"]
                state[f"blocks.{block}.{name}.{kind}"] = value.squeeze(-1) if "conv" in theirs else value
    model.load_state_dict(state)

    full = (sequence > 0).all(1)
    assert full.sum() == 2
    features = model(sequence[full], sequence[full] > 0, every_position=True)[-1]
    torch.testing.assert_close(features, z["out.features"][full], rtol=1e-9, atol=1e-10)


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
