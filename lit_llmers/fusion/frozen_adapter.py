"""Items known by their text alone: Liu et al., "LLMEmb: Large Language Model Can Be a Good Embedding Generator for Sequential
Recommendation", AAAI 2025 (arXiv 2409.19925)."""

from typing import ClassVar

from torch import Tensor

from lit_llmers.backbones import Backbone
from lit_llmers.errors import UserError
from lit_llmers.fusion import Fusion, Sources
from lit_llmers.fusion.text import Adapter, TextView, drop_tables, item_scale


class FrozenAdapter(Fusion):
    """`e_i = adapter(t_i)`, read and scored, with t a frozen text table: LLMEmb's adapter `W2 (W1 t + b1) + b2`.

    Only the adapter and the backbone are trained; the backbone's own item table goes, unless `with_id` keeps it:
    `e_i = adapter(t_i) + E_i`, a recommender that reads text and identity, such as a teacher.
    The table is made once for a step, and once for an evaluation.

    We differ from the official code: each item has its own text, where there `numpy.insert(table, -1, 0)` gives the last item a
    zero vector; padding is zero, not the adapter of a zero vector; and the adapter starts so that its table is as large as the
    one it replaces, because text vectors come in any scale.

    Args:
        items: `[n+1, D]` frozen text vectors.
        layers: linear layers of the adapter.
        hidden: width between them; null takes half of D.
        activation: between layers, `none`, `gelu` or `relu`.
        activate_last: after the last layer too.
        dropout: probability, between layers.
        with_id: keep the backbone's own item vectors and add them.

    Raises:
        UserError: another fusion stands inside, which would be without effect.
    """

    sources: ClassVar[Sources] = {"items": ("from", "items")}

    def __init__(
        self,
        backbone: Backbone,
        items: Tensor,
        layers: int = 2,
        hidden: int | None = None,
        activation: str = "none",
        activate_last: bool = False,
        dropout: float = 0.0,
        with_id: bool = False,
    ) -> None:
        super().__init__(backbone)
        if isinstance(backbone, Fusion) and not with_id:
            raise UserError(
                "frozen_adapter replaces the item vectors, so what stands before it in 'fusion' would have no effect. Put it "
                "first, or give it with_id: true."
            )
        self.with_id = with_id
        adapter = Adapter(items.shape[-1], self.dim, layers, hidden, activation, activate_last, dropout)
        self.text = TextView(items, backbone, adapter)
        adapter.scale(self.text.sample(), item_scale(backbone))
        if not with_id:
            drop_tables(backbone)

    def embed(self, items: Tensor) -> Tensor:
        text = self.text.rows(items)
        return self.inner.embed(items) + text if self.with_id else text

    def item_table(self) -> Tensor:
        text = self.text.table()
        return self.inner.item_table() + text if self.with_id else text

    def serving_size(self) -> int:
        return self.inner.serving_size() if self.with_id else super().serving_size()  # a sum of tables is one

    def text_table(self) -> Tensor:
        """What text says of all items, `[n+1, d]`, trained: to be aligned with another table."""
        return self.text.table()

    def initialise(self, items: Tensor) -> None:
        if not self.with_id:
            raise UserError("frozen_adapter has no item table to start from 'initial'. Drop that key, or set with_id: true.")
        self.inner.initialise(items)
