"""Ranking metrics from the rank of one target per row: HR@k, NDCG@k, MRR, Recall@k; and how much of a catalogue is shown.

A row is one held-out interaction, predicted from all that its user did before it. HR, NDCG and MRR are means over rows, so a
user with many held-out interactions weighs more. Recall@k is a mean over users, of the share of a user's rows that are hits:
where every user has one row it is HR@k and is left out. Ranks are those of `lit_llmers.ranking`, ties counted half.
"""

from typing import Any

import torch
import torchmetrics
from torch import Tensor

from lit_llmers.errors import UserError, unknown

KS = (1, 5, 10, 20)


def ranking_metrics(ranks: Tensor, ks: tuple[int, ...] = KS, user: Tensor | None = None) -> dict[str, float]:
    """Mean HR@k and NDCG@k for each k, and MRR without cut-off, of 0-based ranks `[B]`.

    Args:
        user: `[B]` whose row each is; with it Recall@k is there too, if a user has several rows.

    Raises:
        UserError: there are no ranks.
    """
    if len(ranks) == 0:
        raise UserError("There are no rows to evaluate. Look at the split: every user needs a held-out interaction.")
    names = [f"HR@{k}" for k in ks] + [f"NDCG@{k}" for k in ks] + ["MRR"]
    metrics = {name: per_user_metric(ranks, name).mean().item() for name in names}
    if user is not None:
        _, code, rows = user.unique(return_inverse=True, return_counts=True)
        if len(rows) < len(user):
            hits = {
                k: torch.zeros(len(rows), dtype=torch.double).index_add_(0, code, per_user_metric(ranks, f"HR@{k}")) for k in ks
            }
            metrics |= {f"Recall@{k}": (hits[k] / rows).mean().item() for k in ks}
    return metrics


def per_user_metric(ranks: Tensor, name: str) -> Tensor:
    """One metric for every row: `[B]` float64.

    With r the 0-based rank: HR@k is 1 where r + 1 <= k, NDCG@k is 1 / log2(r + 2) there (one relevant item, so the
    ideal DCG is 1), MRR is 1 / (r + 1). Half a place beyond the cut-off is a miss, so ties never flatter.

    Raises:
        UserError: an unknown metric.
    """
    position = ranks.double() + 1
    kind, _, cut = name.partition("@")
    if name == "MRR":
        return 1 / position
    if kind not in ("HR", "NDCG") or not cut.isdigit() or int(cut) < 1:
        raise unknown("metric", name, [f"{kind}@{k}" for kind in ("HR", "NDCG") for k in KS] + ["MRR"])
    gain = torch.ones_like(position) if kind == "HR" else 1 / torch.log2(position + 1)
    return gain * (position <= int(cut))


class RankingMetrics(torchmetrics.Metric):
    """Collects 0-based ranks over batches and processes; `compute` gives `ranking_metrics` of them all."""

    full_state_update = False
    ranks: list[Tensor]

    def __init__(self, ks: tuple[int, ...] = KS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks = tuple(ks)
        self.add_state("ranks", default=[], dist_reduce_fx="cat")

    def update(self, ranks: Tensor) -> None:
        """Add the ranks `[B]` of a batch."""
        self.ranks.append(ranks.detach().float())

    def compute(self) -> dict[str, float]:
        """Metrics of all ranks so far.

        Raises:
            UserError: no rank was added.
        """
        ranks = self.ranks if isinstance(self.ranks, Tensor) else torch.cat([torch.empty(0), *(r.cpu() for r in self.ranks)])
        return ranking_metrics(ranks, self.ks)


class Coverage:
    """The share of the catalogue that stands in at least one row's k best items: coverage@k.

    Args:
        n_items: size of the catalogue.
        ks: cut-offs.
    """

    def __init__(self, n_items: int, ks: tuple[int, ...] = KS) -> None:
        self.ks = ks
        self.shown = torch.zeros(len(ks), n_items + 1, dtype=torch.bool)

    def update(self, top: Tensor) -> None:
        """Add lists `[B, max(ks)]` of item indices, best first; 0 is no item."""
        for shown, k in zip(self.shown, self.ks, strict=True):
            shown[top[:, :k].cpu()] = True

    def compute(self) -> dict[str, float]:
        """`coverage@k` for each k, in [0, 1]."""
        return {f"coverage@{k}": shown[1:].float().mean().item() for shown, k in zip(self.shown, self.ks, strict=True)}
