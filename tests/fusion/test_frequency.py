import pytest
import torch
from official import PostNorm, assert_gradient, assert_value
from torch.nn import functional as F

from lit_llmers.backbones.bert4rec import BERT4Rec
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.errors import UserError
from lit_llmers.fusion.frequency import Frequency

NAMES = {  # RecBole's
    "positions": "position_embedding",
    "norm": "LayerNorm",
    "query": "trm_encoder.layer.{}.multi_head_attention.query",
    "key": "trm_encoder.layer.{}.multi_head_attention.key",
    "value": "trm_encoder.layer.{}.multi_head_attention.value",
    "out": "trm_encoder.layer.{}.multi_head_attention.dense",
    "first": "trm_encoder.layer.{}.multi_head_attention.LayerNorm",
    "up": "trm_encoder.layer.{}.feed_forward.dense_1",
    "down": "trm_encoder.layer.{}.feed_forward.dense_2",
    "second": "trm_encoder.layer.{}.feed_forward.LayerNorm",
}


@pytest.mark.usefixtures("double")
def test_official_numbers_and_gradients(golden):
    """Their padding takes part: it has text (of the experts' offsets) and is a candidate. So it is item 1 here."""
    z = golden("tedrec/case_a")
    items, experts, rows = z["in.item_seq"] + 1, int(z["hp.experts"]), torch.arange(len(z["in.item_seq"]))
    n_items, dim = z["param.item_embedding.weight"].shape
    inner = len(z["param.trm_encoder.layer.0.feed_forward.dense_1.bias"])
    shape = (items.shape[1], int(z["hp.layers"]), int(z["hp.heads"]), inner)
    backbone = PostNorm(n_items, dim, *shape, NAMES, eps=float(z["hp.layer_norm_eps"]), activation=F.gelu, biases=True)
    temperature = float(z["hp.temperature"])
    model = Frequency(backbone, F.pad(z["in.text_table"], (0, 0, 1, 0)), items.shape[1], experts, 0.0, temperature).eval()
    backbone.take(z, "")
    mixture = model.text.adapter
    names = [f"moe_adaptor.experts.{k}" for k in range(experts)]
    with torch.no_grad():
        backbone.items.weight.copy_(F.pad(z["param.item_embedding.weight"], (0, 0, 1, 0)))
        mixture.experts.weight.copy_(torch.cat([z[f"param.{name}.lin.weight"] for name in names]))
        mixture.gate.copy_(z["param.moe_adaptor.w_gate"])
        model.offset.copy_(torch.cat([z[f"param.{name}.bias"] for name in names]))
        model.filter.copy_(z["param.complex_weight"][0].permute(2, 0, 1))
    for gate, name in zip(model.gates, ("item_gating", "fusion_gating"), strict=True):
        gate.load_state_dict({kind: z[f"param.{name}.{kind}"] for kind in ("weight", "bias")})

    assert_value(model.adapt(items), z["out.text_adapted"])
    x = model.embed(items)
    assert_value(x, z["out.fused"])
    states = model.read(x, items, items > 1)[-1][rows, z["in.item_seq_len"] - 1]
    assert_value(states, z["out.user_embedding"])
    scores = model.head(states) @ model.item_table()[1:].T
    assert_value(scores * temperature, z["out.cosine_scores"])
    total = F.cross_entropy(scores, z["in.target"])
    assert_value(total, z["out.total"])

    total.backward()
    backbone.check(z, "")
    torch.testing.assert_close(model.filter.grad.permute(1, 2, 0)[None], z["grad.param.complex_weight"], rtol=1e-7, atol=1e-9)
    assert_gradient(mixture.gate, z["grad.param.moe_adaptor.w_gate"])
    for k, name in enumerate(names):
        theirs = z[f"grad.param.{name}.bias"][0], z[f"grad.param.{name}.lin.weight"]
        ours = model.offset.grad[k], mixture.experts.weight.grad.view(experts, dim, -1)[k]
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    for gate, name in zip(model.gates, ("item_gating", "fusion_gating"), strict=True):
        assert_gradient(gate.weight, z[f"grad.param.{name}.weight"])
        assert_gradient(gate.bias, z[f"grad.param.{name}.bias"])


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_fused_as_an_fft_does(length):
    torch.manual_seed(0)
    model = Frequency(SASRec(10, length, dim=4, heads=1), torch.randn(11, 6), length)
    identity, text = torch.randn(2, 3, length, 4)
    h, t = (torch.fft.rfft(x, dim=1, norm="ortho") for x in (identity, text))
    c = [torch.fft.irfft(h * w, n=length, dim=1, norm="ortho") for w in (torch.complex(*model.filter), t)]
    v = sum(2 * each * torch.sigmoid(gate(each)) for each, gate in zip(c, model.gates, strict=True))
    torch.testing.assert_close(model.fuse(identity, text), v, rtol=1e-5, atol=1e-5)


def test_text_meets_what_stands_before_it_wherever_the_row_ends():
    """`c2_k = sum over i + j = k of t_i h_j` on a history's own positions, so the last one has all of its text."""
    torch.manual_seed(0)
    model = Frequency(SASRec(10, 8, dim=4, heads=1), torch.randn(11, 6), 8, dropout=0.0).eval()
    with torch.no_grad():
        model.filter.zero_()  # c1 = 0
    history = torch.tensor([[3, 1, 4]])
    h, t = model.inner.embed(history)[0], model.adapt(history)[0]
    c2 = torch.stack([sum(t[i] * h[k - i] for i in range(k + 1)) for k in range(3)]) / 8**0.5  # the transforms are orthonormal
    expected = 2 * c2 * torch.sigmoid(model.gates[1](c2))
    for padding in range(6):
        row = torch.cat([torch.zeros(1, padding, dtype=torch.long), history], 1)
        torch.testing.assert_close(model.embed(row)[0, padding:], expected, rtol=1e-5, atol=1e-6)


def test_a_hidden_item_leaves_the_others_where_they_are():
    """Sequence contrast hides items inside a history, as item 0: what stands before them is no padding."""
    torch.manual_seed(0)
    model = Frequency(SASRec(10, 8, dim=4, heads=1), torch.randn(11, 6), 8, dropout=0.0).eval()
    with torch.no_grad():
        model.filter.zero_()  # c1 = 0
        model.offset.normal_()  # text depends on where it stands
    whole, hidden = torch.tensor([[3, 1, 4]]), torch.tensor([[3, 0, 4]])
    h, t = model.inner.embed(hidden)[0], model.adapt(whole)[0]
    c2 = (t[0] * h[2] + t[2] * h[0]) / 8**0.5  # at the last place; the hidden item has neither text nor identity
    expected = 2 * c2 * torch.sigmoid(model.gates[1](c2))
    for padding in range(6):
        row = torch.cat([torch.zeros(1, padding, dtype=torch.long), hidden], 1)
        torch.testing.assert_close(model.embed(row)[0, -1], expected, rtol=1e-5, atol=1e-6)


def test_scores_are_cosines_or_what_the_backbone_has():
    items = torch.tensor([[3, 7, 10]])
    for temperature, scale in ((0.07, 1 / 0.07), (None, None)):
        model = Frequency(SASRec(10, 3, dim=8), torch.randn(11, 6), 3, cosine_temperature=temperature).eval()
        user, table = model.head(model(items, items > 0)[-1])[0, 0], model.item_table()
        if scale is None:
            assert torch.equal(table, model.inner.item_table())
        else:
            torch.testing.assert_close(user.norm(), torch.tensor(scale))
            torch.testing.assert_close(table[1:].norm(dim=1), torch.ones(10))


def test_gates_are_noisy_in_training_alone():
    model = Frequency(SASRec(10, 3, dim=8), torch.randn(11, 6), 3, dropout=0.0)
    mixture, x = model.text.adapter, torch.randn(5, 6)
    assert not torch.equal(mixture(x), mixture(x))
    model.eval()
    assert torch.equal(mixture(x), mixture(x))
    torch.testing.assert_close(mixture(x)[:, 8:], torch.full((5, 8), 1 / 8))


def test_wrong_use_is_named():
    with pytest.raises(UserError, match="student=sasrec"):
        Frequency(BERT4Rec(10, 5, dim=8), torch.randn(11, 6), 5)
    with pytest.raises(UserError, match="cosine_temperature is 0"):
        Frequency(SASRec(10, 5, dim=8), torch.randn(11, 6), 5, cosine_temperature=0)
    with pytest.raises(UserError, match="experts is 0. It must be at least 1"):
        Frequency(SASRec(10, 5, dim=8), torch.randn(11, 6), 5, experts=0)
    with pytest.raises(UserError, match=r"4 items .* max_length=3"):
        Frequency(SASRec(10, 5, dim=8), torch.randn(11, 6), 3).embed(torch.ones(1, 4, dtype=torch.long))
