import pytest
import torch
from official import Blocks, assert_gradient, assert_gradients, assert_value
from torch.nn import functional as F

from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.errors import UserError
from lit_llmers.fusion.add_projected import AddProjected
from lit_llmers.fusion.frozen_adapter import FrozenAdapter


@pytest.mark.usefixtures("double")
def test_official_numbers_and_gradients(golden):
    """With their table, in which the last item has no text: the adapter of a zero vector."""
    z = golden("llmemb/case_a_student")
    items, n_items = z["in.seq"], len(z["in.llm_table"])
    backbone = Blocks(z, n_items, int(z["hp.heads"]), positions=True)
    model = FrozenAdapter(backbone, z["out.table_used_inside"][: n_items + 1]).eval()
    adapter = list(enumerate(model.text.adapter.layers))
    for number, layer in adapter:
        layer.load_state_dict({kind: z[f"param.adapter.{number}.{kind}"] for kind in ("weight", "bias")})

    read = model(items, items > 0, every_position=True)[-1]
    table = model.item_table()
    assert_value(table[1:], z["out.adapter_table"][1:-1])
    assert not table[0].any()
    assert_value(read[items > 0], z["out.features"][items > 0])

    scored = z["in.pos"] > 0
    positive, negative = ((read * table[z[key]]).sum(-1)[scored] for key in ("in.pos", "in.neg"))
    ours, anchor = table[z["in.pos"][scored]], z["in.collaborative_table"][z["in.pos"][scored] - 1]
    logits = anchor @ ours.T / z["hp.tau"]
    soft = (z["hp.tau"] / 2 * (anchor @ anchor.T + ours @ ours.T)).softmax(1)
    align = (F.cross_entropy(logits, soft) + F.cross_entropy(logits.T, soft.T)) / 2
    assert_value(align, z["out.align_loss"])
    total = F.softplus(-positive).mean() + F.softplus(negative).mean() + z["hp.alpha"] * align
    assert_value(total, z["out.total"])
    total.backward()
    for number, layer in adapter:
        for kind in ("weight", "bias"):
            assert_gradient(getattr(layer, kind), z[f"grad.param.adapter.{number}.{kind}"])
    assert_gradients(backbone, z, "backbone.")
    assert_gradient(backbone.pos_emb.weight, z["grad.param.pos_emb.weight"])


def test_without_id_the_items_own_table_goes_and_with_it_it_is_added():
    text = torch.randn(11, 6)
    text[0] = 0
    plain = FrozenAdapter(SASRec(10, 5, dim=8), text)
    assert "inner.items.weight" not in plain.state_dict()
    with pytest.raises(UserError, match="with_id: true"):
        plain.initialise(torch.zeros(11, 8))
    both = FrozenAdapter(SASRec(10, 5, dim=8), text, with_id=True)
    assert torch.equal(both.item_table(), both.inner.item_table() + both.text_table())
    own = torch.randn(11, 8)
    both.initialise(own)
    own[0] = 0
    assert torch.equal(both.item_table(), own + both.text_table())
    items = torch.tensor([[0, 3, 10]])
    assert torch.equal(both.embed(items), (own + both.text_table())[items])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("arguments", [{}, {"layers": 5, "activation": "gelu", "activate_last": True}])
def test_it_starts_as_large_as_what_it_replaces(scale, arguments):
    """Items without a text say nothing about the size."""
    torch.manual_seed(0)
    text = scale * torch.randn(501, 24)
    text[:200] = 0
    model = FrozenAdapter(SASRec(500, 5, dim=32, init_std=0.05), text, **arguments)
    assert 0.045 < model.item_table()[200:].square().mean().sqrt() < 0.055


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match="activation.*'gelo'"):
        FrozenAdapter(SASRec(10, 5, dim=8), torch.zeros(11, 6), activation="gelo")
    with pytest.raises(UserError, match="layers is 0"):
        FrozenAdapter(SASRec(10, 5, dim=8), torch.zeros(11, 6), layers=0)
    inner = AddProjected(SASRec(10, 5, dim=8), torch.zeros(11, 6))
    with pytest.raises(UserError, match="Put it first"):
        FrozenAdapter(inner, torch.zeros(11, 6))
    FrozenAdapter(inner, torch.zeros(11, 6), with_id=True)
