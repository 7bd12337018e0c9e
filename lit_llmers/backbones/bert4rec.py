"""BERT4Rec: Sun et al., "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from Transformer",
CIKM 2019 (arXiv 1904.06690)."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone, Batch
from lit_llmers.backbones.dropout import Dropout
from lit_llmers.backbones.items import item_embedding
from lit_llmers.errors import UserError

_EPS = 1e-6  # of every LayerNorm


class BERT4Rec(Backbone):
    """Bidirectional self-attention that learns to fill in hidden items (Cloze task) and reads out a hidden one at the end.

    In training some items of a row are hidden behind a vector of their own and predicted from both sides; sometimes it is
    the last item alone, which is the task at serving time (paper, section 3.6).

    We differ from the paper in four ways. The blocks normalise their input, and one norm follows the last, as in
    jaywonchung/BERT4Rec-VAE-Pytorch but for that last norm. The last state is the user vector: the projection of eq. 7 lost
    (one seed, validation NDCG@10 on ml-1m after 65 epochs: .137, and .142 without), and a bias of single items has no place
    where user and item vectors alone score. Matrices begin as Xavier has it, for the paper's deviation of .02 is small at
    width 64 (one seed, with that projection, ml-100k: .084, and .105 with Xavier). Each item is hidden by its own draw
    rather than a fixed number of a row.
    Dropout is on the embeddings and on each sub-layer's output, not on attention weights.
    Positions are counted from the right end, so the item to be predicted next always has the same one.

    Args:
        n_items: items in the catalogue, numbered from 1. Number `n_items + 1` stands for a hidden item in `items`.
        max_length: longest history; the item that follows it has a position too.
        dim: width of everything (D = d).
        layers: attention blocks.
        heads: attention heads; they divide `dim`.
        dropout: probability.
        ffn: width of the feed-forward layer as a multiple of `dim`.
        mask_prob: probability of an item to be hidden in training; one of a row always is.
        last_prob: share of the training rows in which the last item alone is hidden (in the official code 1 of 11).
        init_std: standard deviation of the initial item and position embeddings.

    Raises:
        UserError: `heads` does not divide `dim`, there is no layer, a probability is none, or a history is longer than
            `max_length`.
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        n_items: int,
        max_length: int,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.2,
        ffn: int = 4,
        mask_prob: float = 0.2,
        last_prob: float = 0.1,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"BERT4Rec's dim={dim} cannot be cut into heads={heads}. Choose heads that divide dim.")
        if layers < 1:
            raise UserError(f"BERT4Rec's layers is {layers}. It must be at least 1.")
        for name, value in {"mask_prob": mask_prob, "last_prob": last_prob}.items():
            if not 0 <= value <= 1:
                raise UserError(f"BERT4Rec's {name} is {value}. It must be a probability, from 0 to 1.")
        self.layers, self.width, self.dim, self.max_length = layers, dim, dim, max_length
        self.hidden_id, self.mask_prob, self.last_prob = n_items + 1, mask_prob, last_prob
        self.items = item_embedding(n_items, dim, init_std)
        self.hidden_item = nn.Parameter(torch.randn(dim) * init_std)
        self.positions = nn.Parameter(torch.randn(max_length + 1, dim) * init_std)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout, ffn) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def training_view(self, batch: Batch) -> Batch:
        """The Cloze task: rows with their last target, some items hidden, and those items as targets.

        From `items [B, L]` and `target` (`[B, L]` or `[B]`) to `items`, `mask`, `target`, all `[B, L+1]`; `target` is 0
        where nothing is hidden. The draws come from torch's global generator.
        """
        last = batch["target"].reshape(len(batch["items"]), -1)[:, -1:]
        items = torch.cat([batch["items"], last], 1)
        mask = F.pad(batch["mask"], (0, 1), value=True)
        dice = torch.rand(items.shape, device=items.device).masked_fill_(~mask, 2.0)
        hidden = (dice < self.mask_prob) | (dice == dice.amin(1, keepdim=True))
        at_end = torch.zeros_like(mask)
        at_end[:, -1] = True
        only_last = torch.rand(len(items), 1, device=items.device) < self.last_prob
        hidden = torch.where(only_last, at_end, hidden)
        return batch | {
            "items": items.masked_fill(hidden, self.hidden_id),
            "mask": mask,
            "target": items.masked_fill(~hidden, 0),
        }

    def mean_targets(self, lengths: np.ndarray, targets: float) -> float:
        items = lengths + 1  # with the last target
        hidden = self.mask_prob * items + (1 - self.mask_prob) ** items  # one where chance hides none
        return self.last_prob + (1 - self.last_prob) * float(hidden.mean())

    def embed(self, items: Tensor) -> Tensor:
        return self.items(items.masked_fill(items == self.hidden_id, 0))

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        if not every_position:  # what comes next is a hidden item after the last
            items, mask = F.pad(items, (0, 1), value=self.hidden_id), F.pad(mask, (0, 1), value=True)
            x = F.pad(x, (0, 0, 0, 1))
        length = items.shape[1]
        if length > self.max_length + 1:
            raise UserError(
                f"A history of {length - 1} items reached a BERT4Rec built for max_length={self.max_length}. "
                "Use the max_length that it was trained with."
            )
        hidden = items == self.hidden_id
        x = x + self.positions[self.max_length + 1 - length :]
        x = self.dropout(torch.addcmul(x, hidden[..., None].to(x.dtype), self.hidden_item))  # [B, L, D]
        # the last column is real but in rows without any item, whose softmax would be over nothing
        visible = F.pad(mask[:, :-1], (0, 1), value=True)[:, None, None]  # [B, 1, 1, L]
        states = [x]
        for block in self.blocks[:-1]:
            states.append(block(states[-1], visible))
        last: Block = self.blocks[-1]  # type: ignore[assignment]
        if not every_position:
            states.append(self.norm(last(states[-1], visible, last_only=True)))
            return [state[:, -1:] for state in states]
        if not self.training:
            return [*states, self.norm(last(states[-1], visible))]
        # The loss is at hidden items alone, so the other positions need no more than their part as keys; it saves a fifth
        # of a step's time. They hold zeros.
        kept = hidden.flatten().nonzero().squeeze(1)  # [K]
        read = self.norm(last(states[-1], visible, kept=kept))  # [K, D]
        return [*states, read.new_zeros(hidden.numel(), self.width).index_copy(0, kept, read).view_as(x)]

    def head(self, state: Tensor) -> Tensor:
        return state

    def item_table(self) -> Tensor:
        return self.items.weight


class Block(nn.Module):
    """`x + Dropout(attention(LN(x)))`, then `x + Dropout(feed-forward(LN(x)))` with GELU, on `[B, L, D]`."""

    def __init__(self, dim: int, heads: int, dropout: float, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim, eps=_EPS)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=_EPS)
        self.inner, self.outer = nn.Linear(dim, ffn * dim), nn.Linear(ffn * dim, dim)
        self.activation = nn.GELU()
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor, last_only: bool = False, kept: Tensor | None = None) -> Tensor:
        """Attend and feed forward.

        Args:
            x: `[B, L, D]`.
            visible: `[B, 1, 1, L]` bool, the keys that all queries of a row see.
            last_only: return the last position alone, `[B, 1, D]`.
            kept: return these positions `b * L + l` alone, `[K, D]`.
        """
        batch, _, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).unflatten(2, (3, self.heads, dim // self.heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, heads, L, D/heads]
        if last_only:
            x, q = x[:, -1:], q[:, :, -1:]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).reshape(batch, -1, dim)
        if kept is not None:
            x, mixed = x.flatten(0, 1).index_select(0, kept), mixed.flatten(0, 1).index_select(0, kept)
        x = self.dropout.add(x, self.out(mixed))
        return self.dropout.add(x, self.outer(self.activation(self.inner(self.ffn_norm(x)))))
