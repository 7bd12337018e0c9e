"""Text and identity multiplied in the frequency domain: Xu et al., "Sequence-level Semantic Representation Fusion for
Recommender Systems" (TedRec), CIKM 2024."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone
from lit_llmers.errors import UserError
from lit_llmers.fusion import Fusion, Sources
from lit_llmers.fusion.text import TextView

_NOISE = 0.01  # least deviation of a gate's noise


class Frequency(Fusion):
    """`v = 2 (c1 sigmoid(w1 c1 + b1) + c2 sigmoid(w2 c2 + b2))` enters the backbone in place of the item vectors.

    With F the Fourier transform along the positions, h the item vectors of a history and t its text, `c1 = F^-1(F(h) * W)` is
    h under a learned filter and `c2 = F^-1(F(t) * F(h))` their circular convolution. The text comes from a mixture of experts,
    `t_l = sum over k of g_k(x) W_k (dropout(x) - b_kl)`, whose b are vectors of a position and whose gates g are a softmax,
    noisy in training. Items are scored by their identity alone, by cosine over a temperature.

    A circular convolution mixes all positions, so only the read-out position may be trained: examples=prefixes.

    Positions count from a history's first item for t and for c2's shift, so that `c2_k = sum over i + j = k of t_i h_j` and
    the last position has met all the text before it. A history that stands at the right end of a row is moved accordingly.

    We differ from the official code: padding is zero, so that its length makes no difference (there b makes text of padding);
    dropout and noise are drawn once for an item and step, not for each occurrence, so that the experts run once for each
    item; and no norm follows the sum of v and positions, for that is the backbone's. The experts start so that t has unit
    scale.
    The transforms are products with fixed matrices: at these lengths as fast as an FFT, and ONNX and bfloat16 have them.

    Args:
        items: `[n+1, D]` frozen text vectors.
        max_length: longest history, N.
        experts: K.
        dropout: probability, on the text vectors.
        cosine_temperature: items are scored by cosine over this; null: as the backbone does.

    Raises:
        UserError: the backbone is not causal, there is no expert, or a history is longer than `max_length`.
    """

    sources: ClassVar[Sources] = {"items": ("from", "items")}
    whole_rows: ClassVar[bool] = True
    reads_ahead: ClassVar[bool] = True
    cosine: Tensor
    sine: Tensor

    def __init__(
        self,
        backbone: Backbone,
        items: Tensor,
        max_length: int,
        experts: int = 8,
        dropout: float = 0.2,
        cosine_temperature: float | None = 0.07,
    ) -> None:
        super().__init__(backbone)
        if not backbone.causal:
            raise UserError("frequency trains the next item alone, and this student hides others. Use student=sasrec.")
        if cosine_temperature is not None and not cosine_temperature > 0:
            raise UserError(f"frequency's cosine_temperature is {cosine_temperature}. It must be positive, or null.")
        if experts < 1:
            raise UserError(f"frequency's experts is {experts}. It must be at least 1.")
        self.max_length, self.temperature, dim = max_length, cosine_temperature, self.dim
        mixture = Mixture(items.shape[-1], dim, experts, dropout)
        self.text = TextView(items, backbone, mixture)
        mixture.scale(self.text.sample())
        self.offset = nn.Parameter(torch.zeros(experts, max_length, items.shape[-1]))  # b
        frequencies = max_length // 2 + 1
        self.filter = nn.Parameter(torch.randn(2, frequencies, dim) * 0.02)  # W, real and imaginary
        self.gates = nn.ModuleList(nn.Linear(dim, 1) for _ in range(2))
        angle = 2 * math.pi / max_length * torch.outer(torch.arange(frequencies), torch.arange(max_length)).double()
        for name, matrix in {"cosine": angle.cos(), "sine": angle.sin()}.items():  # [N/2+1, N]
            self.register_buffer(name, (matrix / max_length**0.5).to(torch.get_default_dtype()), persistent=False)

    def embed(self, items: Tensor) -> Tensor:
        if items.shape[1] > self.max_length:
            raise UserError(
                f"A history of {items.shape[1]} items reached a fusion built for max_length={self.max_length}. "
                "Use the max_length that it was trained with."
            )
        return self.fuse(self.inner.embed(items), self.adapt(from_first(items))) * (items > 0)[..., None]

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        if every_position:
            raise UserError("frequency mixes all positions of a row: only the last is read. Use sequences.examples=prefixes.")
        return self.inner.read(x, items, mask)

    def adapt(self, items: Tensor) -> Tensor:
        """The text t of histories `[B, L]` that begin with their first item, `[B, L, d]`."""
        mixed, gates = self.text.rows(items, whole=False).split([self.dim, len(self.offset)], 2)  # [B, L, d], [B, L, K]
        weight = self.text.adapter.experts.weight.view(len(self.offset), self.dim, -1)  # type: ignore[union-attr, operator]
        shift = self.offset[:, : items.shape[1]] @ weight.transpose(1, 2)  # [K, L, d]
        return mixed - torch.einsum("blk,kld->bld", gates, shift)

    def fuse(self, identity: Tensor, text: Tensor) -> Tensor:
        """The fused vectors v `[B, L, d]` from h at the right end of N positions and t at their left end, both `[B, L, d]`."""
        length = identity.shape[1]
        t = torch.stack([self.cosine[:, :length] @ text, -self.sine[:, :length] @ text])  # [2, B, N/2+1, d]
        cosine, sine = (matrix[:, self.max_length - length :] for matrix in (self.cosine, self.sine))  # [N/2+1, L]
        h = torch.stack([cosine @ identity, -sine @ identity])
        twice = torch.full_like(cosine[:, :1], 2.0)  # the frequencies that stand for two
        twice[0] = 1
        if self.max_length % 2 == 0:
            twice[-1] = 1
        cosine, sine = (cosine * twice).T, (sine * twice).T  # [L, N/2+1]
        v = []
        for (a, b), gate in zip((self.filter, t), self.gates, strict=True):
            c = cosine @ (h[0] * a - h[1] * b) - sine @ (h[0] * b + h[1] * a)  # [B, L, d]
            v.append(c * torch.sigmoid(gate(c)))
        return 2 * (v[0] + v[1])

    def head(self, state: Tensor) -> Tensor:
        user = self.inner.head(state)
        return user if self.temperature is None else F.normalize(user, dim=-1) / self.temperature

    def item_table(self) -> Tensor:
        table = self.inner.item_table()
        return table if self.temperature is None else F.normalize(table, dim=-1)


def from_first(items: Tensor) -> Tensor:
    """Histories `[B, L]` with their padding, which stands before them, moved behind them.

    Item 0 inside a history is hidden (`callbacks.sequence_contrast`) and stays there; before the first item it is padding.
    """
    length = items.shape[1]
    padding = (items.cumsum(1) == 0).sum(1, keepdim=True)  # [B, 1]
    return F.pad(items, (0, length)).gather(1, torch.arange(length, device=items.device) + padding)


class Mixture(nn.Module):
    """`sum over k of g_k(x) W_k dropout(x)` and the gates `g = softmax(x V)` beside it, from `[N, D]` to `[N, d + K]`.

    In training `normal(0, softplus(x U) + .01)` is added to the gates' logits. V and U start at zero.
    """

    def __init__(self, inputs: int, outputs: int, experts: int, dropout: float) -> None:
        super().__init__()
        self.number = experts
        self.experts = nn.Linear(inputs, experts * outputs, bias=False)
        self.gate, self.noise = (nn.Parameter(torch.zeros(inputs, experts)) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.gate  # [N, K]
        if self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(x @ self.noise) + _NOISE)
        gates = logits.softmax(1)
        each = self.experts(self.dropout(x)).unflatten(1, (self.number, -1))  # [N, K, d]
        return torch.cat([torch.einsum("nk,nkd->nd", gates, each), gates], 1)

    @torch.no_grad()
    def scale(self, x: Tensor) -> None:
        """Make the text that `[N, D]` becomes of unit scale."""
        own = self.experts(x).unflatten(1, (self.number, -1)).mean(1)  # all gates are equal at the start
        self.experts.weight.div_(own.square().mean().sqrt().clamp(min=1e-12))
