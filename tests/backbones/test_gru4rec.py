import torch
from torch.nn import functional as F

from lit_llmers.backbones.gru4rec import GRU4Rec


def test_official_numbers(golden):
    """RecBole's GRU4Rec. Its states are wider (10) than its items (8): the same in one width with zeros in the rest."""
    z = golden("backbone_gru4rec/case_a")
    table, right_padded, lengths = z["param.item_embedding.weight"], z["in.item_seq"], z["in.item_seq_len"]
    width = int(z["hp.hidden"])
    rest = width - table.shape[1]
    assert int(z["hp.layers"]) == 1
    model = GRU4Rec(len(table) - 1, right_padded.shape[1], dim=width, layers=1, dropout=0.0).double()
    model.load_state_dict(
        {
            "items.weight": F.pad(table, (0, rest)),
            "grus.0.weight_ih_l0": F.pad(z["param.gru_layers.weight_ih_l0"], (0, rest)),
            "grus.0.weight_hh_l0": z["param.gru_layers.weight_hh_l0"],
            "dense.weight": F.pad(z["param.dense.weight"], (0, 0, 0, rest)),
            "dense.bias": F.pad(z["param.dense.bias"], (0, rest)),
        }
    )
    items = torch.stack([row.roll(len(row) - int(length)) for row, length in zip(right_padded, lengths, strict=True)])
    user = model.head(model(items, items > 0)[-1][:, 0])
    torch.testing.assert_close(user[:, : table.shape[1]], z["out.user_embedding"], rtol=1e-9, atol=1e-10)
    scores = user @ model.item_table().T
    torch.testing.assert_close(scores[:, 1:], z["out.logits"][:, 1:], rtol=1e-9, atol=1e-10)

    total = F.cross_entropy(scores, z["in.target"])  # there padding is an item of the softmax
    torch.testing.assert_close(total, z["out.total"], rtol=1e-9, atol=1e-10)
    total.backward()
    dim = table.shape[1]
    ours = {
        "item_embedding.weight": model.items.weight.grad[:, :dim],
        "gru_layers.weight_ih_l0": model.grus[0].weight_ih_l0.grad[:, :dim],
        "gru_layers.weight_hh_l0": model.grus[0].weight_hh_l0.grad,
        "dense.weight": model.dense.weight.grad[:dim],
        "dense.bias": model.dense.bias.grad[:dim],
    }
    assert {f"grad.param.{name}" for name in ours} == {name for name in z if name.startswith("grad.")}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, z[f"grad.param.{name}"], rtol=1e-7, atol=1e-9)


def test_stacked_states_are_those_of_torch_gru():
    """Hidden states per layer come from single-layer GRUs; stacked they are one GRU of that depth."""
    torch.manual_seed(0)
    model = GRU4Rec(20, 6, dim=8, layers=2, init_std=1.0).eval()
    stacked = torch.nn.GRU(8, 8, num_layers=2, bias=False, batch_first=True)
    for layer, gru in enumerate(model.grus):
        for kind in ("ih", "hh"):
            getattr(stacked, f"weight_{kind}_l{layer}").data.copy_(getattr(gru, f"weight_{kind}_l0"))
    items = torch.randint(1, 21, (3, 6))
    expected, _ = stacked(model.items(items))
    torch.testing.assert_close(model(items, items > 0, every_position=True)[-1], expected)
