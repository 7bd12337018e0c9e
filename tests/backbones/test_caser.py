import pytest
import torch

from lit_llmers.backbones.caser import Caser
from lit_llmers.errors import UserError


def test_official_values_and_gradients(golden):
    """graytowne/caser_pytorch, whose user vectors and item biases stand in the test: its W' is [ours, the users']."""
    z = golden("backbone_caser/case_a")
    items, users, wanted = z["in.seq"], z["in.users"], z["in.items"]
    table, weight = z["param.item_embeddings.weight"], z["param.W2.weight"]
    (n, dim), window = table.shape, items.shape[1]
    model = Caser(n - 1, window, dim, window, int(z["hp.nh"]), int(z["hp.nv"]), dropout=0.0).double()
    theirs = {"items.weight": "item_embeddings.weight"}
    for kind in ("weight", "bias"):
        theirs |= {f"dense.{kind}": f"fc1.{kind}", f"vertical.{kind}": f"conv_v.{kind}"}
        theirs |= {f"horizontal.{height}.{kind}": f"conv_h.{height}.{kind}" for height in range(window)}

    def ours(name: str, value: torch.Tensor) -> torch.Tensor:
        if name == "vertical.weight":  # [filters, 1, window, 1]
            return value[:, 0, :, 0]
        return value[:, 0].transpose(1, 2) if value.dim() == 4 else value  # [filters, 1, height, d] -> [filters, d, height]

    state = {name: ours(name, z[f"param.{their}"]) for name, their in theirs.items()}
    model.load_state_dict(state | {"candidates.weight": weight[:, :dim]})

    user = model.head(model(items, items > 0)[-1][:, 0])
    vectors = torch.cat([user, z["param.user_embeddings.weight"][users]], 1)
    rows = torch.cat([model.item_table(), weight[:, dim:]], 1)[wanted]
    scores = torch.einsum("bd,btd->bt", vectors, rows) + z["param.b2.weight"][wanted, 0]
    torch.testing.assert_close(scores, z["out.scores"], rtol=1e-9, atol=1e-10)
    (scores * z["in.upstream"]).sum().backward()
    expected = {name: ours(name, z[f"grad.param.{their}"]) for name, their in theirs.items()}
    expected["candidates.weight"] = z["grad.param.W2.weight"][:, :dim]
    expected["items.weight"][0] = 0  # theirs is trained, ours stays
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-9)


def test_items_before_the_window_are_not_read():
    torch.manual_seed(0)
    model = Caser(20, 8, dim=8, window=3, init_std=1.0).eval()
    items = torch.randint(1, 21, (4, 8))
    other = torch.cat([items[:, :5] % 20 + 1, items[:, 5:]], 1)
    torch.testing.assert_close(model(items, items > 0)[-1], model(other, other > 0)[-1], rtol=0, atol=0)
    assert not torch.equal(model(items, items > 0)[-1], model(items.roll(1, 1), items > 0)[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"conv_activation": "gelu"}, "conv_activation.*'gelu'"),
        ({"fc_activation": "Relu"}, "fc_activation.*Did you mean 'relu'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        Caser(10, 5, **arguments)
