"""Two views of a history: Liu et al., "LLM-ESR: Large Language Models Enhancement for Long-tailed Sequential Recommendation",
NeurIPS 2024 (arXiv 2405.20646)."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone
from lit_llmers.errors import UserError
from lit_llmers.fusion import Fusion, Sources
from lit_llmers.fusion.text import Adapter, TextView, item_scale


class DualView(Fusion):
    """A semantic and a collaborative view of each item, which attend to each other and are read by one shared backbone.

    `e_se = W2 (W1 t + b1) + b2` is a view of the frozen text t, `e_co` the backbone's own vector. With S_se and S_co the
    sequences of a history, `S'_co = attention(S_se, S_co, S_co)` and `S'_se = attention(S_co, S_se, S_se)`; the user is
    `u = [f(S'_co) | f(S'_se)]`, the item `[e_co | e_se]`, and the score their dot product.

    In the official code nothing hides the future: the cross attention masks padding alone, and SASRec's causal mask is off,
    while the loss asks at each position for the next item. So the label is visible in training. Here both are causal.
    `official_no_causal_mask` takes the mask off the cross attention (the backbone keeps its own): then only the read-out
    position may be trained, with examples=prefixes, unless `accept_visible_labels` says that labels may be seen.

    An item enters the cross attention scaled by sqrt(d) and with its position, as in the official SASRec and BERT4Rec: without
    them attention starts as a plain mean of the history, forgets its order, and stays so. The official GRU4Rec has neither;
    here it has both, as every backbone. We differ from the official code further: the positions are the fusion's own, counted
    from the right end, as large as items (there they are not scaled by sqrt(d), so far smaller), and the backbone adds its own
    after; its dropout comes after too; a hidden item (BERT4Rec's) takes no part; e_se starts as large as e_co; and attention
    starts with the identity as its value and output layers, where the official code draws them at random.
    Nothing of an item passes by the attention, so with random layers the backbone reads other coordinates than those it scores
    in: on half of amazon-pantry validation NDCG@10 was 17 % lower with torch's own (3 seeds), and lower still with the official
    code's Xavier draw (2 seeds).

    Args:
        items: `[n+1, D]` frozen text vectors.
        max_length: longest history.
        hidden: width between the adapter's two layers; null takes half of D.
        heads: of the cross attention; they divide the backbone's dim.
        official_no_causal_mask: every position attends to the whole history, its future too.
        accept_visible_labels: with that, train on every position all the same.

    Raises:
        UserError: `heads` does not divide dim, or labels that are not accepted would be visible.
    """

    widens = 2
    sources: ClassVar[Sources] = {"items": ("from", "items")}

    def __init__(
        self,
        backbone: Backbone,
        items: Tensor,
        max_length: int,
        hidden: int | None = None,
        heads: int = 2,
        official_no_causal_mask: bool = False,
        accept_visible_labels: bool = False,
    ) -> None:
        super().__init__(backbone)
        dim = backbone.dim
        if dim % heads:
            raise UserError(f"dual_view cannot cut the student's dim={dim} into heads={heads}. Choose heads that divide dim.")
        self.width, self.dim = self.widens * backbone.width, self.widens * dim
        self.past_only = backbone.causal and not official_no_causal_mask
        self.reads_ahead = official_no_causal_mask and not accept_visible_labels  # type: ignore[misc]
        adapter = Adapter(items.shape[-1], dim, hidden=hidden)
        self.text = TextView(items, backbone, adapter)
        size = item_scale(backbone)
        adapter.scale(self.text.sample(), size)
        self.positions = nn.Parameter(torch.randn(max_length + 1, dim) * size)  # one more for an item that is to be filled in
        self.n_items = len(items) - 1
        self.to_collaborative, self.to_semantic = CrossAttention(dim, heads), CrossAttention(dim, heads)

    def embed(self, items: Tensor) -> Tensor:
        return torch.cat([self.inner.embed(items), self.text.rows(items)], 2)  # [B, L, 2d]

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        if every_position and self.reads_ahead:
            raise UserError(
                "dual_view with official_no_causal_mask shows each position what it is to predict. Use "
                "sequences.examples=prefixes, or accept_visible_labels: true to train so all the same."
            )
        end = len(self.positions) - (not self.causal and not every_position)  # BERT4Rec's next item is still to come
        collaborative, semantic = (part + self.positions[end - x.shape[1] : end] for part in x.chunk(2, 2))  # [B, L, d] each
        real = (mask & (items <= self.n_items))[..., None]  # [B, L, 1]
        length = torch.ones_like(mask[0]).diag()  # [L, L]
        visible = real.transpose(1, 2)
        if self.past_only:
            visible = visible & torch.ones_like(length).tril()
        visible = (visible | length)[:, None]  # [B, 1, L, L]; what is no item sees itself, lest it be NaN
        views = (
            self.to_collaborative(semantic, collaborative, visible),
            self.to_semantic(collaborative, semantic, visible),
        )
        read = [self.inner.read(view * real, items, mask, every_position) for view in views]
        return [torch.cat(states, 2) for states in zip(*read, strict=True)]  # layers+1 x [B, P, 2D]

    def head(self, state: Tensor) -> Tensor:
        return torch.cat([self.inner.head(half) for half in state.chunk(2, -1)], -1)

    def item_table(self) -> Tensor:
        return torch.cat([self.inner.item_table(), self.text.table()], 1)

    def text_table(self) -> Tensor:
        """The semantic view of all items, `[n+1, d]`: to be aligned with `id_table` (the official option `item_reg`)."""
        return self.text.table()

    def id_table(self) -> Tensor:
        """The collaborative view of all items, `[n+1, d]`."""
        return self.inner.item_table()


class CrossAttention(nn.Module):
    """Heads of `softmax(d Q K^T / sqrt(width of a head)) V` without residual or norm; only the output layer has a bias.

    It starts as an average of what is asked, in its own coordinates.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = dim * (dim / heads) ** -0.5  # as of queries and keys of items that are sqrt(d) as large, see DualView
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        nn.init.eye_(self.value.weight)
        nn.init.eye_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, asking: Tensor, asked: Tensor, visible: Tensor) -> Tensor:
        """Args: asking and asked `[B, L, d]`; visible `[B, 1, L, L]` bool. Returns `[B, L, d]`."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, d/heads]
            for layer, x in ((self.query, asking), (self.key, asked), (self.value, asked))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale)
        return self.out(mixed.transpose(1, 2).flatten(2))
