"""The recommender without training: what it knows was counted when its backbone was built."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_llmers.backbones import CountingBackbone
from lit_llmers.data.loader import Batch
from lit_llmers.ranking import Catalogue
from lit_llmers.students.recommender import Recommender

_CHUNK = 128  # rows whose scores of the catalogue are in memory at once


class CountingRecommender(Recommender):
    """Ranks the catalogue by the scores of a counting backbone.

    Args:
        backbone: see `lit_llmers.backbones`.
        ks: cut-offs of the validation metrics.
    """

    backbone: CountingBackbone

    def __init__(self, backbone: CountingBackbone, ks: tuple[int, ...] = (5, 10, 20)) -> None:
        super().__init__(backbone, ks=ks)

    def item_table(self) -> None:
        """There are no item vectors."""

    def vectors(self, batch: Batch, tables: None) -> tuple[Tensor, Catalogue]:
        """Row b's user is the b-th unit vector, an item's vector its scores for all rows, so their products are the scores."""
        scores = self.backbone.scores(batch["items"], batch["mask"])
        return torch.eye(len(scores), dtype=scores.dtype, device=scores.device), Catalogue(scores.T)

    def ranks(self, batch: Batch, tables: None = None, candidates: Tensor | None = None) -> Tensor:
        """As in every recommender, some rows at a time."""
        parts, rank = list(_parts(batch)), super().ranks
        own = [None] * len(parts) if candidates is None else candidates.split(_CHUNK)
        return torch.cat([rank(part, None, competing) for part, competing in zip(parts, own, strict=True)])

    def top_items(self, batch: Batch, k: int, tables: None = None) -> tuple[Tensor, Tensor]:
        """As in every recommender, some rows at a time."""
        top = super().top_items
        items, scores = zip(*(top(part, k) for part in _parts(batch)), strict=True)
        return torch.cat(items), torch.cat(scores)


def _parts(batch: Batch) -> Iterator[Batch]:
    """The batch in pieces of `_CHUNK` rows."""
    for start in range(0, len(batch["target"]), _CHUNK):
        cut = {key: batch[key][start : start + _CHUNK] for key in ("items", "mask", "target")}
        if "seen_row" in batch:
            inside = (batch["seen_row"] >= start) & (batch["seen_row"] < start + _CHUNK)
            cut |= {"seen_row": batch["seen_row"][inside] - start, "seen_item": batch["seen_item"][inside]}
        yield cut
