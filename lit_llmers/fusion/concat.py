"""Identity and text in one item vector: Wang et al., "Pre-train, Align, and Disentangle: Empowering Sequential Recommendation
with Large Language Models" (PAD), SIGIR 2025 (arXiv 2412.04107), the alignment phase."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone
from lit_llmers.backbones.items import copy_table
from lit_llmers.errors import UserError
from lit_llmers.fusion import Fusion, Sources
from lit_llmers.fusion.text import Adapter, Kept, TextView, copy_weights, drop_tables, item_scale


class Concat(Fusion):
    """`e_i = GELU(W dropout([E_i | t_i]) + b)`, read and scored, with t a perceptron over frozen text.

    In PAD's second phase this trains with an alignment of `text_table`, the t of all items, and `id_table`, their E, by MK-MMD;
    `id` names the stage of the first phase, whose weights the backbone and E start from.
    We differ from the official code: padding is zero; dropout is drawn once for an item and reading of a batch; and t starts as
    large as E.
    Of a backbone with two item tables (Caser) the one that scores is E, and the other goes.

    Args:
        items: `[n+1, D]` frozen text vectors.
        start: the trained backbone to start from; None starts from random numbers.
        layers: of the perceptron, a linear layer to d and GELU each.
        dropout: probability, on the input of every layer but the first.

    Raises:
        UserError: another fusion stands inside, or `start` is another model.
    """

    sources: ClassVar[Sources] = {"items": ("from", "items"), "start": ("id", "model")}

    def __init__(
        self, backbone: Backbone, items: Tensor, start: Backbone | None = None, layers: int = 5, dropout: float = 0.1
    ) -> None:
        super().__init__(backbone)
        if isinstance(backbone, Fusion):
            raise UserError(
                "concat fuses a student's own item table, so what stands before it in 'fusion' would have no effect."
            )
        if start is not None:
            copy_weights(backbone, start, "id")
        adapter = Adapter(items.shape[-1], self.dim, layers, self.dim, "gelu", activate_last=True, dropout=dropout)
        self.text = TextView(items, backbone, adapter)
        adapter.scale(self.text.sample(), item_scale(backbone))
        drop_tables(backbone, keep=self.id_table())
        self.fuse, self.dropout = nn.Linear(2 * self.dim, self.dim), nn.Dropout(dropout)
        nn.init.xavier_normal_(self.fuse.weight)
        nn.init.zeros_(self.fuse.bias)
        self._kept = Kept()

    def train(self, mode: bool = True) -> "Concat":
        self._kept.clear()
        return super().train(mode)

    def embed(self, items: Tensor) -> Tensor:
        self.text.table(anew=True)
        table = self._table(anew=True)
        return F.embedding(items.masked_fill(items >= len(table), 0), table)

    def item_table(self) -> Tensor:
        return self._table()

    @torch.compiler.disable
    def _table(self, anew: bool = False) -> Tensor:
        weights = [self.id_table(), *self.text.parameters(), *self.fuse.parameters()]
        return self._kept.get(self._fused, weights, anew)

    def _fused(self) -> Tensor:
        both = torch.cat([self.id_table(), self.text_table()], 1)[1:]  # [n, 2d]
        return F.pad(F.gelu(self.fuse(self.dropout(both))).to(both.dtype), (0, 0, 1, 0))

    def settle(self) -> None:
        """From now on the item table is a constant, as in a model that is served."""
        self._kept.settle(self._fused())

    def serving_size(self) -> int:
        return self.inner.serving_size()  # the fused table takes the place of the inner one, and is as large

    def text_table(self) -> Tensor:
        """What text says of all items, `[n+1, d]`: to be aligned with `id_table`."""
        return self.text.table()

    def id_table(self) -> Tensor:
        """The backbone's own vectors of all items, `[n+1, d]`."""
        return self.inner.item_table()

    def initialise(self, items: Tensor) -> None:
        self._kept.clear()
        copy_table(self.id_table(), items)
