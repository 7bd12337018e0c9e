"""SASRec: Kang & McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018 (arXiv 1808.09781)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone
from lit_llmers.backbones.dropout import Dropout
from lit_llmers.backbones.items import item_embedding
from lit_llmers.errors import UserError

_EPS = 1e-8  # of every LayerNorm, as in the official code


class SASRec(Backbone):
    """Causal self-attention over item and position embeddings; the item table also scores (paper, eq. 1-6).

    We differ from the paper as pmixer/SASRec.pytorch with `norm_first` does: queries, keys and values all come from the
    normed input, and the attention has an output projection. Padded keys are masked, as in the official code (kang205/SASRec)
    and not in pmixer's.
    Dropout is on the embeddings and on each sub-layer's output (paper, section 3.3). Both codes have it on attention weights in
    place of the attention's output, and a second time inside the feed-forward layer, after its first convolution.
    Positions are counted from the right end, so the last item always has the same one.

    Args:
        n_items: items in the catalogue, numbered from 1.
        max_length: longest history.
        dim: width of everything (D = d).
        layers: attention blocks.
        heads: attention heads; they divide `dim`.
        dropout: probability.
        ffn: width of the feed-forward layer as a multiple of `dim`.
        init_std: standard deviation of the initial item and position embeddings. Items enter scaled by `sqrt(dim)`.
        sparse: gradients and optimiser steps for the items of a batch and its negatives alone, however large the catalogue
            is: see `lit_llmers.optimizer.RowwiseAdamW`. For a loss that draws negatives.
        official_no_causal_mask: every position attends to the whole history, its future too, as in LLM-ESR's official code
            (models/SASRec.py, for the method and its baseline). Only the read-out position may then be trained.
        accept_visible_labels: with that, train on every position all the same, as there: a position sees its label.

    Raises:
        UserError: `heads` does not divide `dim`, there is no layer, a history is longer than `max_length`, or labels that are
            not accepted would be visible.
    """

    def __init__(
        self,
        n_items: int,
        max_length: int,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.2,
        ffn: int = 1,
        init_std: float = 0.02,
        sparse: bool = False,
        official_no_causal_mask: bool = False,
        accept_visible_labels: bool = False,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"SASRec's dim={dim} cannot be cut into heads={heads}. Choose heads that divide dim.")
        if layers < 1:
            raise UserError(f"SASRec's layers is {layers}. It must be at least 1.")
        self.layers, self.width, self.dim, self.max_length, self.sparse = layers, dim, dim, max_length, sparse
        self.past_only, self.sees_labels = not official_no_causal_mask, accept_visible_labels
        self.items = item_embedding(n_items, dim, init_std, sparse)
        self.positions = nn.Parameter(torch.randn(max_length, dim) * init_std)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout, ffn) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=_EPS)

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        length = x.shape[1]
        if length > self.max_length:
            raise UserError(
                f"A history of {length} items reached a SASRec built for max_length={self.max_length}. "
                "Use the max_length that it was trained with."
            )
        if every_position and not (self.past_only or self.sees_labels):
            raise UserError(
                "A SASRec with official_no_causal_mask shows each position what it is to predict. Use "
                "sequences.examples=prefixes, or accept_visible_labels=true to train so all the same."
            )
        x = x * self.dim**0.5 + self.positions[self.max_length - length :]
        x = self.dropout(x)  # [B, L, D]
        visible = _visible(mask, self.past_only)
        states = [x]
        for index, block in enumerate(self.blocks):
            if index == self.layers - 1 and not every_position:  # only the read-out position goes further
                x = block(x, visible, last_only=True)
            else:
                x = block(x, visible)
            states.append(x)
        states[-1] = self.norm(x)
        return states if every_position else [state[:, -1:] for state in states]

    def head(self, state: Tensor) -> Tensor:
        return state

    def item_table(self) -> Tensor:
        return self.items.weight


class Block(nn.Module):
    """`x + Dropout(attention(LN(x)))`, then `x + Dropout(feed-forward(LN(x)))`, on `[B, L, D]`."""

    def __init__(self, dim: int, heads: int, dropout: float, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim, eps=_EPS)
        self.qkv = _linear(dim, 3 * dim)
        self.out = _linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=_EPS)
        self.inner, self.outer = _linear(dim, ffn * dim), _linear(ffn * dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor, last_only: bool = False) -> Tensor:
        """Args: x `[B, L, D]`; visible `[B, 1, L, L]` bool; last_only: return the last position alone, `[B, 1, D]`."""
        batch, _, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).unflatten(2, (3, self.heads, dim // self.heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, heads, L, D/heads]
        if last_only:
            x, q, visible = x[:, -1:], q[:, :, -1:], visible[:, :, -1:]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = self.dropout.add(x, self.out(mixed.transpose(1, 2).reshape(batch, -1, dim)))
        return self.dropout.add(x, self.outer(F.relu(self.inner(self.ffn_norm(x)))))


def _visible(mask: Tensor, past_only: bool = True) -> Tensor:
    """Keys that a query sees, `[B, 1, L, L]`: real ones, up to itself if so; a padded query sees itself, lest it be NaN."""
    square = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device)
    return (mask[:, None, None, :] & (square.tril() if past_only else square)) | (square.tril() & square.triu())


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Linear layer with the official code's initialisation."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
