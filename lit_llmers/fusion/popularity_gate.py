"""Three experts, weighed by how often an item is met: Wang et al., "Pre-train, Align, and Disentangle: Empowering Sequential
Recommendation with Large Language Models" (PAD), SIGIR 2025 (arXiv 2412.04107), the last phase."""

from copy import deepcopy
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_llmers.backbones import Backbone
from lit_llmers.errors import UserError
from lit_llmers.fusion import Fusion, Sources
from lit_llmers.fusion.concat import Concat
from lit_llmers.fusion.frozen_adapter import FrozenAdapter
from lit_llmers.fusion.text import copy_weights


class PopularityGate(Fusion):
    """`s_i = sum over m of g_m(bin of i) <u_m, e_m,i>` with a tower m of identity, of both (aligned), and of text alone.

    Each tower is a backbone of its own: the first is the one inside, the second a `concat`, the third a `frozen_adapter` with
    the same perceptron. The gates `g_m(b) = sigmoid(a_m[b]) / sum of sigmoid(a[b])` are trained for each of 10 bins of
    items, where bin 1 holds the most popular and each bin as many training interactions as the next. The sum is one dot
    product of `[u_1 | u_2 | u_3]` and `[g_1 e_1 | g_2 e_2 | g_3 e_3]`.

    Args:
        items: `[n+1, D]` frozen text vectors.
        popularity: `[n+1]` training interactions of each item.
        start: the trained backbone of the first tower; None starts it from random numbers, as the third always does.
        aligned: the trained `concat` of the second.
        layers, dropout: of the perceptrons, see `Concat`.
        bins: of popularity.

    Raises:
        UserError: another fusion stands inside, a trained model is another, or there is no bin.
    """

    widens = 3
    sources: ClassVar[Sources] = {"items": ("from", "items"), "start": ("id", "model"), "aligned": ("aligned", "model")}
    bin: Tensor

    def __init__(
        self,
        backbone: Backbone,
        items: Tensor,
        popularity: Tensor,
        start: Backbone | None = None,
        aligned: Backbone | None = None,
        layers: int = 5,
        dropout: float = 0.1,
        bins: int = 10,
    ) -> None:
        super().__init__(backbone)
        if isinstance(backbone, Fusion):
            raise UserError("popularity_gate makes its own text towers around a plain student. Let it stand alone in 'fusion'.")
        if bins < 1:
            raise UserError(f"popularity_gate's bins is {bins}. It must be at least 1.")
        self.text = FrozenAdapter(deepcopy(backbone), items, layers, self.dim, "gelu", True, dropout)
        self.aligned = Concat(deepcopy(backbone), items, None, layers, dropout)
        self.text.text.source = self.aligned.text.source  # one table in memory
        for tower, trained, key in ((self.inner, start, "id"), (self.aligned, aligned, "aligned")):
            if trained is not None:
                copy_weights(tower, trained, key)
        self.each = backbone.dim
        self.width, self.dim = self.widens * backbone.width, self.widens * backbone.dim
        self.register_buffer("bin", equal_mass_bins(popularity, bins))
        slope = torch.linspace(0, 1, bins + 1)
        self.gate = nn.Parameter(torch.stack([1 - slope, -4 - slope, slope]))  # a, [3, bins + 1]; bin 0 is padding's

    @property
    def towers(self) -> tuple[Backbone, Backbone, Backbone]:
        return self.inner, self.aligned, self.text

    def embed(self, items: Tensor) -> Tensor:
        return torch.cat([tower.embed(items) for tower in self.towers], 2)  # [B, L, 3d]

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        parts = zip(self.towers, x.split(self.each, 2), strict=True)
        read = [tower.read(part, items, mask, every_position) for tower, part in parts]
        return [torch.cat(states, 2) for states in zip(*read, strict=True)]  # layers+1 x [B, P, 3D]

    def head(self, state: Tensor) -> Tensor:
        return torch.cat([tower.head(part) for tower, part in zip(self.towers, state.chunk(3, -1), strict=True)], -1)

    def item_table(self) -> Tensor:
        gates = self.gates()[:, self.bin]  # [3, n+1]
        return torch.cat([gate[:, None] * tower.item_table() for gate, tower in zip(gates, self.towers, strict=True)], 1)

    def serving_size(self) -> int:
        return sum(tower.serving_size() for tower in self.towers) + self.gate.numel()

    def gates(self) -> Tensor:
        """Weights of the towers in each bin, `[3, bins + 1]`."""
        open_ = self.gate.sigmoid()
        return open_ / open_.sum(0)


def equal_mass_bins(popularity: Tensor, bins: int) -> Tensor:
    """Bin 1..bins of each item, `[n+1]` int64, with 0 for padding: as many interactions in each, the most popular in bin 1.

    An item belongs where the interactions of all more popular ones end; equally popular ones count by their number.

    Args:
        popularity: `[n+1]` interactions of each item.
    """
    order = popularity[1:].argsort(descending=True, stable=True)
    count = popularity[1:][order].to(torch.int64)
    before = count.cumsum(0) - count  # [n]
    place = (before * bins).div(count.sum().clamp(min=1), rounding_mode="floor").clamp(max=bins - 1) + 1
    return torch.zeros(len(popularity), dtype=torch.int64).index_put((order + 1,), place)
