"""Wrappers that put what text says about items into a sequential backbone: between its embedding and its reading of rows.

Each file holds one way, a class named after it, which takes the backbone first and is a backbone itself: it trains, exports
and serves as the one inside, with any student of the task. A stage names them in `fusion`, in the order in which they wrap.
"""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lit_llmers.backbones import Backbone, Batch
from lit_llmers.fusion.text import TextView

Sources = dict[str, tuple[str, str]]


class Fusion(Backbone):
    """A backbone around another; it does as the inner one does, but for what a subclass overrides.

    Attributes:
        inner: the backbone inside.
        widens: how many times as wide its vectors are as those of the backbone inside.
        sources: which constructor arguments are made by other stages: argument -> (key in the recipe that names the stage,
            kind of artefact), see `lit_llmers.building`.
        whole_rows: whether it needs a backbone that hides no items of the rows that it trains on.
        reads_ahead: whether a position sees what comes after it, so that only the read-out position may be trained.
    """

    widens: ClassVar[int] = 1
    sources: ClassVar[Sources] = {}
    whole_rows: ClassVar[bool] = False
    reads_ahead: ClassVar[bool] = False

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.inner = backbone
        self.layers, self.width, self.dim = backbone.layers, backbone.width, backbone.dim

    @property
    def every_position(self) -> bool:  # type: ignore[override]
        return self.inner.every_position and not self.reads_ahead

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.inner.causal

    def embed(self, items: Tensor) -> Tensor:
        return self.inner.embed(items)

    def read(self, x: Tensor, items: Tensor, mask: Tensor, every_position: bool = False) -> list[Tensor]:
        return self.inner.read(x, items, mask, every_position)

    def head(self, state: Tensor) -> Tensor:
        return self.inner.head(state)

    def item_table(self) -> Tensor:
        return self.inner.item_table()

    def training_view(self, batch: Batch) -> Batch:
        return self.inner.training_view(batch)

    def mean_targets(self, lengths: np.ndarray, targets: float) -> float:
        return self.inner.mean_targets(lengths, targets)

    def settle(self) -> None:
        """The weights change no more: what is made of them alone may be kept."""

    def serving_size(self) -> int:
        """Numbers that serving holds: those of the backbone inside, a table for each view of text, and what else is its own."""
        own = {id(parameter): parameter.numel() for parameter in self.parameters()}
        views = [child for child in self.children() if isinstance(child, TextView)]
        for part in (self.inner, *views):
            for parameter in part.parameters():
                own.pop(id(parameter), None)
        with torch.no_grad():
            return self.inner.serving_size() + sum(own.values()) + sum(view.table().numel() for view in views)

    def initialise(self, items: Tensor) -> None:
        self.inner.initialise(items)
