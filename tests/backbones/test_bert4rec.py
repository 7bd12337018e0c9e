import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones.bert4rec import BERT4Rec
from lit_llmers.errors import UserError


class PortNorm(nn.Module):
    """jaywonchung's LayerNorm: the unbiased standard deviation, with epsilon added to it and not to the variance."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = (
            nn.Parameter(torch.empty(width).double()),
            nn.Parameter(torch.empty(width).double()),
            eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.bias


def test_official_values_and_gradients(golden):
    """jaywonchung/BERT4Rec-VAE-Pytorch with its own norm and GELU in place of the paper's; its output layer is here."""
    z = golden("backbone_bert4rec/case_a")
    table, tokens, labels = z["param.bert.embedding.token.weight"], z["in.tokens"], z["in.labels"]
    layers, length, eps = int(z["hp.blocks"]), tokens.shape[1], float(z["hp.layernorm_eps"])
    model = BERT4Rec(len(table) - 2, length - 1, table.shape[1], layers, int(z["hp.heads"]), dropout=0.0).double().eval()
    model.norm = nn.Identity()
    theirs: dict[str, list[str]] = {}
    for index, block in enumerate(model.blocks):
        prefix = f"bert.transformer_blocks.{index}."
        block.activation = nn.GELU("tanh")
        for name, norm in (("attention_norm", "input_sublayer.norm."), ("ffn_norm", "output_sublayer.norm.")):
            setattr(block, name, PortNorm(model.width, eps))
            theirs |= {
                f"blocks.{index}.{name}.weight": [f"{prefix}{norm}a_2"],
                f"blocks.{index}.{name}.bias": [f"{prefix}{norm}b_2"],
            }
        for kind in ("weight", "bias"):
            theirs[f"blocks.{index}.qkv.{kind}"] = [f"{prefix}attention.linear_layers.{part}.{kind}" for part in range(3)]
            theirs[f"blocks.{index}.out.{kind}"] = [f"{prefix}attention.output_linear.{kind}"]
            theirs[f"blocks.{index}.inner.{kind}"] = [f"{prefix}feed_forward.w_1.{kind}"]
            theirs[f"blocks.{index}.outer.{kind}"] = [f"{prefix}feed_forward.w_2.{kind}"]

    def ours(of: str) -> dict[str, Tensor]:
        tokens = z[f"{of}.bert.embedding.token.weight"]
        first = {
            "items.weight": tokens[:-1],
            "hidden_item": tokens[-1],
            "positions": z[f"{of}.bert.embedding.position.pe.weight"],
        }
        return first | {name: torch.cat([z[f"{of}.{part}"] for part in parts]) for name, parts in theirs.items()}

    model.load_state_dict(ours("param"))
    logits = F.linear(model(tokens, tokens > 0, every_position=True)[-1], z["param.out.weight"], z["param.out.bias"])
    torch.testing.assert_close(logits, z["out.logits"], rtol=1e-9, atol=1e-10)
    loss = F.cross_entropy(logits[labels > 0], labels[labels > 0])
    torch.testing.assert_close(loss, z["out.total"], rtol=1e-9, atol=1e-10)
    loss.backward()
    for name, gradient in ours("grad.param").items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-7, atol=1e-9)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """400 rows of 5 to 1 items and their targets, all different."""
    window = torch.arange(1, 2401).view(400, 6)
    items, target = window[:, :-1].clone(), window[:, 1:].clone()
    for row in range(400):
        items[row, : row % 5] = 0
        target[row, : row % 5] = 0
    return {"items": items, "mask": items > 0, "target": target, "row": torch.arange(400)}


@pytest.mark.parametrize("examples", ["sequence", "prefixes"])
def test_the_cloze_task_hides_items_of_the_whole_row(batch, examples):
    whole = torch.cat([batch["items"], batch["target"][:, -1:]], 1)
    if examples == "prefixes":
        batch["target"] = batch["target"][:, -1]
    torch.manual_seed(0)
    model = BERT4Rec(3000, 5, dim=8, mask_prob=0.3, last_prob=0.25)
    view = model.training_view(batch)
    assert view["row"] is batch["row"]
    hidden = view["items"] == 3001
    assert torch.equal(view["mask"], whole > 0)
    assert torch.equal(view["items"].masked_fill(hidden, 0), whole.masked_fill(hidden, 0))
    assert torch.equal(view["target"], whole.masked_fill(~hidden, 0)), "targets are what is hidden"
    assert not (hidden & (whole == 0)).any()
    assert hidden.any(1).all(), "each row has something to learn"
    full = hidden[::5]  # 80 rows of six items: a quarter hides the last, of the others none is empty
    share = (full.float().mean() - 0.25 / 6) / 0.75
    expected = 0.3 + 0.7**6 / 6
    assert abs(share - expected) < 0.06
    again = model.training_view(batch)["items"]
    assert not torch.equal(view["items"], again)
    torch.manual_seed(0)
    BERT4Rec(3000, 5, dim=8)
    assert torch.equal(model.training_view(batch)["items"], view["items"]), "drawn from the global generator"


@pytest.mark.parametrize(("mask_prob", "last_prob"), [(0.2, 0.1), (0.0, 0.0), (1.0, 0.5), (0.3, 1.0)])
def test_the_mean_number_of_hidden_items_is_known_beforehand(batch, mask_prob, last_prob):
    torch.manual_seed(0)
    model = BERT4Rec(3000, 5, dim=8, mask_prob=mask_prob, last_prob=last_prob)
    hidden = torch.stack([(model.training_view(batch)["target"] > 0).sum() for _ in range(100)])
    expected = model.mean_targets(batch["mask"].sum(1).numpy(), targets=3.0)
    assert hidden.float().mean().item() / 400 == pytest.approx(expected, rel=0.01)


def test_at_the_ends_of_the_probabilities(batch):
    whole = torch.cat([batch["items"], batch["target"][:, -1:]], 1)
    last = BERT4Rec(3000, 5, dim=8, last_prob=1.0).training_view(batch)["target"]
    assert torch.equal(last, F.pad(whole[:, -1:], (5, 0))), "the task of serving, and nothing else"
    one = BERT4Rec(3000, 5, dim=8, mask_prob=0.0, last_prob=0.0).training_view(batch)["target"]
    assert ((one > 0).sum(1) == 1).all()
    assert (one[::5] > 0).any(0).all(), "any item of a row"
    everything = BERT4Rec(3000, 5, dim=8, mask_prob=1.0, last_prob=0.0).training_view(batch)["target"]
    assert torch.equal(everything, whole)


def make(**arguments) -> BERT4Rec:
    torch.manual_seed(0)
    return BERT4Rec(3000, 5, dim=8, layers=2, dropout=0.0, init_std=0.5, **arguments).double()


def test_training_reads_hidden_positions_alone_and_loses_nothing(batch):
    """Values and gradients are those of the whole computation."""
    results = []
    for model in (make().train(), make().eval()):
        torch.manual_seed(1)
        view = model.training_view(batch)
        states = model(view["items"], view["mask"], every_position=True)
        user = model.head(states[-1][view["target"] > 0])
        F.cross_entropy(user @ model.item_table()[1:].T, view["target"][view["target"] > 0] - 1).backward()
        results.append((user, states[:-1], {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1])


def test_the_next_item_is_a_hidden_one_at_the_end(batch):
    model = make().eval()
    items = F.pad(batch["items"], (0, 1), value=3001)
    every = model(items, items > 0, every_position=True)
    torch.testing.assert_close(model(batch["items"], batch["mask"]), [state[:, -1:] for state in every])


def test_both_sides_are_read():
    model = make().eval()
    items = torch.tensor([[3, 3001, 5, 6]])
    before = model(items, items > 0, every_position=True)[-1][:, 1]
    for position in (0, 2, 3):
        other = items.clone()
        other[0, position] += 10
        assert (model(other, other > 0, every_position=True)[-1][:, 1] - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 8, "heads": 3}, "heads=3"),
        ({"layers": 0}, "layers is 0"),
        ({"mask_prob": 1.5}, "mask_prob is 1.5"),
        ({"last_prob": -0.1}, "last_prob is -0.1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        BERT4Rec(10, 5, **arguments)


def test_a_longer_history_than_it_was_built_for_is_refused():
    items = torch.ones(1, 6, dtype=torch.long)
    with pytest.raises(UserError, match=r"6 items .* max_length=5"):
        BERT4Rec(10, 5)(items, items > 0)
