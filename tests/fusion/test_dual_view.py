import pytest
import torch
from official import Blocks, Whole, assert_gradient, assert_gradients, assert_value
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.errors import UserError
from lit_llmers.fusion.dual_view import DualView


def with_golden_weights(z: dict[str, Tensor], backbone: Whole, **arguments) -> DualView:
    """The mask token n+1 is one more item here; its text is zero, as that of padding."""
    length, heads = z["in.seq"].shape[1], int(z["hp.num_heads_cross"])
    model = DualView(backbone, z["param.llm_item_emb.weight"], length, heads=heads, **arguments).eval()
    for attention in (model.to_collaborative, model.to_semantic):
        attention.scale = (model.inner.dim / heads) ** -0.5  # the official vectors come scaled, and with their positions
    with torch.no_grad():
        model.positions.zero_()
        backbone.items.weight.copy_(z["param.id_item_emb.weight"])
        for weight, name in named(model):
            weight.copy_(z[f"param.{name}"])
    return model


def named(model: DualView) -> list[tuple[nn.Parameter, str]]:
    """Our parameters beside the backbone's, and their official names."""
    modules = {"adapter.0": model.text.adapter.layers[0], "adapter.1": model.text.adapter.layers[1]}
    for ours, theirs in ((model.to_collaborative, "llm2id"), (model.to_semantic, "id2llm")):
        parts = {"q": ours.query, "k": ours.key, "v": ours.value, "output": ours.out}
        modules |= {f"{theirs}.linear_{name}": module for name, module in parts.items()}
    return [(weight, f"{theirs}.{kind}") for theirs, module in modules.items() for kind, weight in module.named_parameters()]


def features(model: DualView, items: Tensor) -> Tensor:
    """What the official code reads: scale and positions come before the cross attention."""
    views = model.embed(items).chunk(2, 2)
    placed = torch.cat([model.inner.place(view, items > 0) for view in views], 2)
    return model.head(model.read(placed, items, items > 0, every_position=True)[-1])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", ["sasrec", "bert4rec"])
def test_official_numbers_and_gradients(golden, case):
    z = golden(f"llm_esr/case_a_{case}")
    n_items = len(z["param.id_item_emb.weight"]) - 1
    backbone = Blocks(z, n_items, int(z["hp.num_heads_backbone"]), positions=False)
    model = with_golden_weights(z, backbone, official_no_causal_mask=True, accept_visible_labels=True)
    items = z["in.seq"]

    table = model.item_table()
    assert_value(model.text_table()[1:], z["out.adapter_table"][1:])
    read = features(model, items)
    assert_value(read[items > 0], z["out.features"][items > 0])
    user = read[:, -1]
    with torch.no_grad():
        near = features(model, z["in.sim_seq"].flatten(0, 1))[:, -1].unflatten(0, z["in.sim_seq"].shape[:2]).mean(1)
    assert_value(near, z["out.neighbour_target"])

    scored = z["in.pos"] > 0
    positive, negative = ((read * table[z[key]]).sum(-1)[scored] for key in ("in.pos", "in.neg"))
    base = F.softplus(-positive).mean() + F.softplus(negative).mean()
    assert_value(base, z["out.base_loss"])
    total = base + z["hp.alpha"] * F.mse_loss(user, near)
    assert_value(total, z["out.total"])
    total.backward()
    for weight, name in named(model):
        assert_gradient(weight, z[f"grad.param.{name}"])
    assert_gradients(backbone, z, "backbone.")
    assert_gradient(backbone.pos_emb.weight, z["grad.param.pos_emb.weight"])
    assert_gradient(backbone.items.weight, z["grad.param.id_item_emb.weight"])


@pytest.mark.usefixtures("double")
def test_official_numbers_of_cross_attention_before_a_gru(golden):
    """Their GRU also reads padding, which holds the text of nothing, so a row without padding is compared."""
    z = golden("llm_esr/case_a_gru4rec")

    class Gru(Whole):
        def __init__(self, n_items: int, dim: int) -> None:
            super().__init__(n_items, dim)
            self.seen: list[Tensor] = []
            self.gru = nn.GRU(dim, dim, bias=False, batch_first=True)
            self.gru.load_state_dict({name: z[f"param.backbone.gru.{name}"] for name in self.gru.state_dict()})

        def read(self, x, items, mask, every_position=False):
            self.seen.append(x)
            return [x, self.gru(x)[0]]

    backbone = Gru(len(z["param.id_item_emb.weight"]) - 1, int(z["hp.hidden"]))
    model = with_golden_weights(z, backbone, official_no_causal_mask=True, accept_visible_labels=True)
    items = z["in.seq"]
    full = (items > 0).all(1)
    assert full.any()
    states = model(items, items > 0, every_position=True)
    for ours, theirs in zip(backbone.seen, ("out.cross_id", "out.cross_llm"), strict=True):
        assert_value(ours[items > 0], z[theirs][items > 0])
    assert_value(model.head(states[-1])[full], z["out.features"][full])


@pytest.mark.parametrize(("official", "accepted"), [(False, False), (True, False), (True, True)])
def test_who_sees_the_future(official, accepted):
    """With the official mask a position changes with what follows it, and is not to be trained unless one accepts that."""
    text, items = torch.randn(11, 6), torch.randint(1, 11, (2, 5))
    later = items.clone()
    later[:, -1] = later[:, -1] % 10 + 1
    model = DualView(SASRec(10, 5, dim=8, init_std=0.5), text, 5, 4, 2, official, accepted).eval()
    refused = official and not accepted
    assert (model.reads_ahead, model.every_position) == (refused, not refused)
    if refused:
        assert model(items, items > 0)[-1].shape == (2, 1, 16)
        with pytest.raises(UserError, match="accept_visible_labels"):
            model(items, items > 0, every_position=True)
    else:
        before, after = (model(rows, rows > 0, every_position=True)[-1][:, :-1] for rows in (items, later))
        assert torch.allclose(before, after, atol=1e-6) != official


def test_an_item_reaches_the_backbone_in_the_coordinates_in_which_it_is_scored():
    """At the start, what the backbone reads of a single item is that item's row of the table, half by half, at its position."""
    model = DualView(SASRec(10, 5, dim=8, init_std=0.1), torch.randn(11, 6), 5)
    seen = []
    model.inner.read = lambda x, *_: seen.append(x) or [x]
    items = torch.randint(1, 11, (4, 1))
    model(items, items > 0)
    torch.testing.assert_close(torch.cat(seen, 2)[:, 0], model.item_table()[items[:, 0]] + model.positions[-1].repeat(2))


def test_wrong_heads_are_named():
    with pytest.raises(UserError, match="dim=8 into heads=3"):
        DualView(SASRec(10, 5, dim=8), torch.randn(11, 6), 5, heads=3)
