"""Backbones as the official code of the fused methods has them, where ours are others: the golden numbers come from these.

Parameters have their official names, so that a golden file's `param.*` load as they are. Dropout is off.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone

Golden = dict[str, Tensor]


def load(module: nn.Module, z: Golden, prefix: str = "") -> None:
    """Give a module its golden parameters, all whose name starts with `prefix`."""
    start = f"param.{prefix}"
    theirs = {key.removeprefix(start): value for key, value in z.items() if key.startswith(start)}
    assert not module.load_state_dict(theirs, strict=False).unexpected_keys


def assert_gradients(module: nn.Module, z: Golden, prefix: str = "") -> None:
    """Compare the gradients of all parameters of a module with official names."""
    compared = 0
    for name, weight in module.named_parameters():
        theirs = z.get(f"grad.param.{prefix}{name}")
        if theirs is not None:
            assert_gradient(weight, theirs)
            compared += 1
    assert compared


def assert_gradient(weight: Tensor, theirs: Tensor) -> None:
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, theirs, rtol=1e-7, atol=1e-9)


def assert_value(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


class Whole(Backbone):
    """A backbone with an item table, whose user vector is its last state, read at every position."""

    layers = 1

    def __init__(self, n_items: int, dim: int) -> None:
        super().__init__()
        self.width = self.dim = dim
        self.items = nn.Embedding(n_items + 1, dim)

    def head(self, state: Tensor) -> Tensor:
        return state

    def item_table(self) -> Tensor:
        return self.items.weight


class Blocks(Whole):
    """SASRec of LLM-ESR and LLMEmb: queries are normed, keys and values are not; every position sees the whole row.

    Without `positions` what it reads has them already.
    """

    def __init__(self, z: Golden, n_items: int, heads: int, positions: bool) -> None:
        dim, number = len(z["param.backbone.last_layernorm.weight"]), int(z["hp.blocks"])
        super().__init__(n_items, dim)
        self.positions = positions
        self.pos_emb = nn.Embedding.from_pretrained(z["param.pos_emb.weight"].clone(), freeze=False)
        eps = float(z.get("hp.layernorm_eps_backbone", 1e-8))
        self.attention_layernorms = nn.ModuleList(nn.LayerNorm(dim, eps=eps) for _ in range(number))
        self.attention_layers = nn.ModuleList(nn.MultiheadAttention(dim, heads) for _ in range(number))
        self.forward_layernorms = nn.ModuleList(nn.LayerNorm(dim, eps=eps) for _ in range(number))
        self.forward_layers = nn.ModuleList(
            nn.ModuleDict({"conv1": nn.Conv1d(dim, dim, 1), "conv2": nn.Conv1d(dim, dim, 1)}) for _ in range(number)
        )
        self.last_layernorm = nn.LayerNorm(dim, eps=eps)
        load(self, z, "backbone.")

    def place(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * self.dim**0.5 + self.pos_emb(mask.cumsum(1) * mask)

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        real = mask[..., None]
        x = (self.place(x, mask) if self.positions else x) * real
        layers = zip(
            self.attention_layernorms, self.attention_layers, self.forward_layernorms, self.forward_layers, strict=True
        )
        for norm, attention, second, forward in layers:
            over = x.transpose(0, 1)
            q = norm(over)
            x = second(q + attention(q, over, over)[0]).transpose(0, 1)
            inner = forward["conv1"](x.transpose(1, 2)).relu()
            x = (x + forward["conv2"](inner).transpose(1, 2)) * real
        return [x, self.last_layernorm(x)]


class PostNorm(Whole):
    """Causal post-norm transformer over `LN(x + positions)`: of PAD's official code, and of RecBole in TedRec's."""

    def __init__(self, n_items: int, dim: int, length: int, layers: int, heads: int, inner: int, names: dict[str, str], **norm):
        super().__init__(n_items, dim)
        self.heads, self.number, self.names = heads, layers, names
        shapes = {"query": (dim, dim), "key": (dim, dim), "value": (dim, dim), "out": (dim, dim)}
        shapes |= {"up": (inner, dim), "down": (dim, inner)}
        self.eps, self.activation = norm["eps"], norm["activation"]
        self.weights = nn.ParameterDict()
        self.add("positions.weight", length, dim)
        for name in ("norm.weight", "norm.bias"):
            self.add(name, dim)
        for layer in range(layers):
            for name, shape in shapes.items():
                self.add(f"{layer}.{name}.weight", *shape)
                if norm["biases"] or name in ("up", "down"):
                    self.add(f"{layer}.{name}.bias", shape[0])
            for name in ("first", "second"):
                self.add(f"{layer}.{name}.weight", dim)
                self.add(f"{layer}.{name}.bias", dim)

    def add(self, name: str, *shape: int) -> None:
        self.weights[self.plain(name)] = nn.Parameter(torch.zeros(shape))

    def plain(self, name: str) -> str:
        return name.replace(".", "_")

    def official(self) -> dict[str, nn.Parameter]:
        """Official names of all weights but the item table."""
        out = {}
        for name, weight in self.weights.items():
            part, kind = name.rsplit("_", 1)
            layer, _, part = part.rpartition("_")
            out[f"{self.names[part].format(layer)}.{kind}"] = weight
        return out

    def take(self, z: Golden, prefix: str) -> None:
        with torch.no_grad():
            for name, weight in self.official().items():
                weight.copy_(z[f"param.{prefix}{name}"])

    def check(self, z: Golden, prefix: str) -> None:
        for name, weight in self.official().items():
            assert_gradient(weight, z[f"grad.param.{prefix}{name}"])

    def _linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.plain(f"{name}.bias")
        return F.linear(x, self.weights[self.plain(f"{name}.weight")], self.weights.get(bias))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.weights[self.plain(f"{name}.{kind}")] for kind in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        batch, length, dim = x.shape
        x = self._norm("norm", x + self.weights["positions_weight"][:length])
        hidden = torch.where(mask[:, None, None] & torch.ones(length, length).tril().bool(), 0.0, -1e9)
        for layer in range(self.number):
            q, k, v = (
                self._linear(f"{layer}.{name}", x).view(batch, length, self.heads, -1).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            weight = (q @ k.transpose(2, 3) / (dim / self.heads) ** 0.5 + hidden).softmax(-1)
            mixed = self._linear(f"{layer}.out", (weight @ v).transpose(1, 2).flatten(2))
            x = self._norm(f"{layer}.first", x + mixed)
            x = self._norm(
                f"{layer}.second", x + self._linear(f"{layer}.down", self.activation(self._linear(f"{layer}.up", x)))
            )
        return [x, x]
