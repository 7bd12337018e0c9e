"""Ranking distillation: the student learns from the teacher's list of best items for each target.

One callback for DLLM2Rec (RecSys 2024), RD (KDD 2018), RRD (CIKM 2020), DCD (CIKM 2021), UnKD (WSDM 2023) and the plain soft
top-K: they differ in the items drawn from the list, in their weights and in the loss.
"""

import logging
import math
from typing import Any, ClassVar, Protocol

import lightning as L
import torch
from torch import Tensor

from lit_llmers.backbones import Backbone, CollaborativeBackbone
from lit_llmers.callbacks.distillation import Distillation, Readers, check_share
from lit_llmers.callbacks.ranking_term import KEYS, OF_STUDENT, RankingTerm
from lit_llmers.callbacks.teacher_lists import RankingSource, of_drawn, read_lists
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError, unknown
from lit_llmers.losses.ranking_weights import FLOOR, below_floor

log = logging.getLogger(__name__)
_OF_LIST = ("top", "rank", "discrepancy")
LOSSES: dict[str, tuple[str, ...]] = {  # and the samplers that they take
    "bce": _OF_LIST,
    "listwise": ("top", "rank"),
    "softmax": _OF_LIST,
    "pairwise": ("popularity",),
}
WEIGHTS = ("position", "confidence", "consistency", "discrepancy")


class SeenSource(Protocol):
    """Where it is known what users have met in training."""

    def seen(self, users: Tensor) -> Batch:
        """`seen_row` `[P]`, places in the users `[N]` in order, and `seen_item` `[P]`."""
        ...


class RankingDistillation(Distillation):
    """The student ranks as the teacher does, for each target: `weight * mean over targets of the loss of its list`.

    The methods, by what they set: DLLM2Rec `loss: bce, negatives: 1, weights: {position, confidence, consistency}`; RD
    `loss: bce, weights: {position, discrepancy}, combine: product`; RRD `loss: listwise` (its authors later found the plain
    first k better than `sampler: rank`); DCD that with `underestimated` and `overestimated`; UnKD `loss: pairwise`; and
    `loss: softmax` is the plain soft top-K. RD's form has no negatives, for its student's own loss holds scores down. A softmax
    over items does not see a common shift of all scores, and a shift meets that form whatever the list says: beside it RD is
    `loss: softmax, over: catalogue`, in which an item of the list costs what the target costs.

    What is different here, because a teacher's record is a list of K items and not a ranking of the catalogue. DCD draws
    from the list alone, as public ports of it do; its item side is left out, as is every item-side ranking, for a
    sequential student has no ranking of users. UnKD's groups are those of the items in the list, of which a list may hold few
    unpopular ones: record long lists for it. Draws are made anew at each step, where the papers draw once an epoch or once at
    all. RD's random items are the same for all targets of a step, and 16 neighbouring targets share their items off the list.

    What was met, which the teacher's list has not. The ranks of a student that reads histories leave out the items before the
    target in its row; what is further back competes (DLLM2Rec's code has the history in both). In a GRU4Rec of amazon-beauty
    3 items of a history stand above a listed one, all of them in the row; of ml-1m 31, and 9 of them in the row of 50. What it
    draws off the list is besides none of the row's later items. A collaborative student learns from pairs, which have no
    order: its ranks leave out, and it draws none of, all training items of the user, as in a list that is `per: user`. To
    look them up takes the longer the more there are: on ml-1m, with 400 of a pair's user, 14 of the 98 ms of RRD's step with a
    LightGCN (lists of 2,048 of 8,192 pairs, one core).

    Args:
        ranking: the teacher's lists.
        popularity: `[n+1]` training interactions of each item, read by `dros` and `loss: pairwise`.
        histories: tells what the users of a collaborative student have met.
        loss: `bce`, `listwise` (relaxed, RRD's), `pairwise` (UnKD's) or `softmax`.
        k: items that a step takes of each list; null is all of it, as always for `pairwise`.
        sampler: which k: the `top`; by `rank`, p ~ e^(-r / rank_temperature); by `discrepancy`, p ~ tanh(epsilon (r_S - r_T))
            where that is positive (DCD's draw, for `bce` and `softmax`). `pairwise` has `popularity`, the only one it can.
        weights: of `bce` and `softmax`: factors of `position`, `confidence`, `consistency`, `discrepancy`. Without any they
            are 1 / k for each item with `bce`, and with `softmax`, whose labels they are, the teacher's softmax, which wants
            logits: of a teacher with distances (BIGRec) take `confidence`, which scales them, over the first k of a list with
            the sampler `top` and over all that is recorded of it with another.
        combine: `sum` (DLLM2Rec) or `product` (RD) of the weights.
        normalise: whether a list's weights sum to 1; null: with `sum` yes, with `product` no.
        negatives: of `bce`: items that were not met, to be scored low. With the sampler `top` they are none of the list's
            first k, and with another none of it at all.
        uninteresting: of `listwise`: items under the list, none of which is on the recorded list, also where a step takes its
            first k alone, and none was met; 0 leaves the correction alone.
        underestimated, overestimated: of `listwise`: DCD's correction, a second list-wise loss of equal weight. So many items
            of the list that the student ranks lower than the teacher, drawn by discrepancy, above so many that it ranks higher.
        pairs, groups, group_power: of `pairwise`: pairs for each target, popularity groups, and how much more of the pairs
            unpopular groups get (UnKD's `lamda`).
        temperature: of `softmax`.
        over: of `softmax`: the student's is over the `list` or the `catalogue`. The latter is the softmax of a student that is
            trained by cross-entropy, which then serves both; with another temperature or loss it costs as much again.
        steepness: of `position` (lambda).
        mu: of `discrepancy` weights.
        epsilon: of the discrepancy sampler.
        rank_temperature: of the rank sampler and of pairs (UnKD: 20).
        rank_samples: random items that the student's ranks are estimated from. They are n / rank_samples apart, which is too
            coarse for `consistency`; null gives the exact ranks, from the scores of the whole catalogue. 100 are coarse too
            for `underestimated` and the sampler `discrepancy`: ranks among 12,101 items come in steps of 121 beside a teacher's
            of 0 to 99, so that one random item above a listed one makes it underestimated, and none overestimated. Of a GRU4Rec
            on amazon-beauty 78 % of the listed items are on their right side by 100, 92 % by 1,000, 96 % by 3,000.
        start_epoch: first epoch of the weights that depend on the student, `consistency` and `discrepancy`.
        raw_confidence: the official e^(-d), of distances that are not scaled; see `losses.ranking_weights.confidence_weights`.
            Where distances are above 18 throughout, it has all items of a list weigh alike, and a warning says so.
        dros: factor of a distributionally robust loss of the listed items beside `bce` (DLLM2Rec's alpha), which reads all
            scores.
        dros_target: factor of the same loss of the target itself. `weight` multiplies it, as all of the term, where DLLM2Rec's
            lambda_d does not: dros / weight gives it the factor alpha.
        dros_beta, dros_power: its radius, and the power of its propensities.
        official_negative_term, official_dros_mean: slips of DLLM2Rec's official code, to reproduce its figures with; see
            `losses.ranking.list_bce` and `weighted_dros`. The latter takes one process, which has all targets of a batch.
        share: of a batch's targets that each step computes the loss on, drawn at random; the loss stays unbiased.
        weight, decay_epochs: see `Distillation`.

    Raises:
        UserError: a name or a value that is none of these, or a setting that the loss does not read.
    """

    name = "ranking"
    fits = (Backbone, CollaborativeBackbone)
    sources: ClassVar[dict[str, tuple[str, str]]] = {"ranking": ("from", "ranking")}
    readers: ClassVar[Readers] = (
        ("loss: bce", lambda own: own.loss == "bce", ("negatives", "dros")),
        ("loss: bce or softmax", lambda own: own.loss in ("bce", "softmax"), ("weights",)),
        ("loss: softmax", lambda own: own.loss == "softmax", ("temperature", "over")),
        ("loss: listwise", lambda own: own.loss == "listwise", ("uninteresting", "underestimated", "overestimated")),
        ("loss: pairwise", lambda own: own.loss == "pairwise", ("pairs", "groups", "group_power")),
        ("loss: bce, listwise or softmax", lambda own: own.loss != "pairwise", ("k",)),
        ("weights", lambda own: bool(own.weights), ("combine", "normalise")),
        ("the weight position", lambda own: "position" in own.weights, ("steepness",)),
        ("the weight confidence", lambda own: "confidence" in own.weights, ("raw_confidence",)),
        ("the weight discrepancy", lambda own: "discrepancy" in own.weights, ("mu",)),
        ("the weights consistency and discrepancy", lambda own: own.weighs_by_student, ("start_epoch",)),
        ("sampler: rank and loss: pairwise", lambda own: own.sampler in ("rank", "popularity"), ("rank_temperature",)),
        ("sampler: discrepancy and underestimated", lambda own: own.draws_by_student, ("epsilon",)),
        (
            "sampler: discrepancy, underestimated, and the weights consistency and discrepancy",
            lambda own: own.draws_by_student or own.weighs_by_student,
            ("rank_samples",),
        ),
        ("negatives", lambda own: own.negatives > 0, ("official_negative_term",)),
        ("dros", lambda own: own.dros > 0, ("dros_target", "dros_beta", "dros_power", "official_dros_mean")),
    )

    def __init__(
        self,
        ranking: RankingSource,
        popularity: Tensor | None = None,
        histories: SeenSource | None = None,
        loss: str = "bce",
        k: int | None = None,
        sampler: str | None = None,
        weights: dict | None = None,
        combine: str = "sum",
        normalise: bool | None = None,
        negatives: int = 0,
        uninteresting: int = 40,
        underestimated: int = 0,
        overestimated: int = 0,
        pairs: int = 30,
        groups: int = 2,
        group_power: float = 0.0,
        temperature: float = 1.0,
        over: str = "list",
        steepness: float = 1.0,
        mu: float = 0.1,
        epsilon: float = 0.1,
        rank_temperature: float = 10.0,
        rank_samples: int | None = 100,
        start_epoch: int = 0,
        raw_confidence: bool = False,
        dros: float = 0.0,
        dros_target: float = 0.0,
        dros_beta: float = 1.0,
        dros_power: float = 0.05,
        official_negative_term: bool = False,
        official_dros_mean: bool = False,
        share: float = 1.0,
        weight: float = 1.0,
        decay_epochs: int = 0,
    ) -> None:
        super().__init__(weight, decay_epochs)
        self.ranking, self.popularity = ranking, None if popularity is None else torch.as_tensor(popularity)
        self.histories = histories
        self.loss, self.k, self.weights, self.combine = loss, k, dict(weights or {}), combine
        self.normalise, self.negatives, self.uninteresting = normalise, negatives, uninteresting
        self.underestimated, self.overestimated = underestimated, overestimated
        self.pairs, self.groups, self.group_power = pairs, groups, group_power
        self.temperature, self.over, self.steepness, self.mu, self.epsilon = temperature, over, steepness, mu, epsilon
        self.rank_temperature, self.rank_samples, self.start_epoch = rank_temperature, rank_samples, start_epoch
        self.raw_confidence, self.dros, self.dros_target = raw_confidence, dros, dros_target
        self.dros_beta, self.dros_power = dros_beta, dros_power
        self.official_negative_term, self.official_dros_mean = official_negative_term, official_dros_mean
        self.share = share
        self._looked = False  # at the teacher's scores
        _choice("loss", loss, LOSSES)
        self.sampler = LOSSES[loss][0] if sampler is None else sampler
        self._check()

    def _check(self) -> None:
        _choice("sampler", self.sampler, (*_OF_LIST, "popularity"))
        _choice("combine", self.combine, ("sum", "product"))
        _choice("over", self.over, ("list", "catalogue"))
        if self.sampler not in LOSSES[self.loss]:
            raise UserError(
                f"ranking_distillation: sampler {self.sampler} does not fit loss {self.loss}. Choose "
                f"{' or '.join(LOSSES[self.loss])}" + ("." if self.loss == "pairwise" else ", or loss: pairwise.")
            )
        for name, factor in self.weights.items():
            _choice("weight", name, WEIGHTS)
            if isinstance(factor, bool) or not isinstance(factor, int | float) or factor <= 0:
                raise UserError(f"ranking_distillation: weights.{name} is {factor}. It must be a number above 0, or left out.")
        if self.loss == "listwise" and bool(self.underestimated) != bool(self.overestimated):
            raise UserError(
                "ranking_distillation: underestimated stand above overestimated. Set both to 1 or more, or neither."
            )
        if self.loss == "listwise" and not self.uninteresting + self.underestimated:
            raise UserError("ranking_distillation: uninteresting is 0, so nothing stands under the list. Set it to 1 or more.")
        least = {
            "k": 1,
            "negatives": 0,
            "uninteresting": 0,
            "underestimated": 0,
            "overestimated": 0,
            "pairs": 1,
            "groups": 1,
            "start_epoch": 0,
        }
        for key, low in (least | {"rank_samples": 1, "dros": 0, "dros_target": 0, "group_power": 0}).items():
            value = getattr(self, key)
            if value is not None and value < low:
                raise UserError(f"ranking_distillation: {key} is {value}. It must be at least {low}.")
        for key in ("temperature", "steepness", "mu", "epsilon", "rank_temperature", "dros_beta", "dros_power"):
            if not getattr(self, key) > 0:
                raise UserError(f"ranking_distillation: {key} is {getattr(self, key)}. It must be positive.")
        check_share("ranking_distillation", self.share)
        self.check_read()

    @classmethod
    def compares_rows(cls, arguments: dict[str, Any]) -> bool:
        return bool(arguments.get("official_dros_mean"))  # of the weights of all targets of a batch

    @property
    def weighs_by_student(self) -> bool:
        """Whether a weight depends on how the student ranks."""
        return not OF_STUDENT.isdisjoint(self.weights)

    @property
    def draws_by_student(self) -> bool:
        """Whether a draw depends on how the student ranks."""
        return self.sampler == "discrepancy" or self.underestimated > 0

    @property
    def draws_others(self) -> bool:
        """Whether items off the list are drawn."""
        return (self.negatives if self.loss == "bce" else self.loss == "listwise" and self.uninteresting) > 0

    def build(self, student: Any) -> RankingTerm:
        if self.k is not None and self.k > self.ranking.k:
            raise UserError(
                f"ranking_distillation: k is {self.k}, but the teacher's lists have {self.ranking.k} items. Lower k, or "
                "record longer lists (k of the record stage)."
            )
        return RankingTerm(self, student.reduce)

    def _set_weight(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super()._set_weight(trainer, pl_module)
        pl_module.distillation[self.name].epoch = trainer.current_epoch  # type: ignore[index, union-attr]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        whole = self.k is None or self.sampler != "top" or self.loss == "listwise"  # which stands above what is on no list
        read_lists(self.ranking, batch, KEYS, self.share, None if whole else self.k, pl_module.device)
        if self.raw_confidence and not self._looked and trainer is not None and trainer.is_global_zero:
            self._looked = True
            self._warn_of_distances(*(batch[key] for key in KEYS[:2]))
        if "items" not in batch and pl_module.distillation[self.name].reads_met:  # type: ignore[index, union-attr]
            assert self.histories is not None
            seen = self.histories.seen(of_drawn(batch["user"], batch.get(KEYS[2])))
            batch |= {key: values.to(pl_module.device, non_blocking=True) for key, values in seen.items()}

    def _warn_of_distances(self, items: Tensor, scores: Tensor) -> None:
        """Say that raw confidence tells nothing apart where it does not, in most of these lists `[T, K]`."""
        lists, below = int((items > 0).any(1).sum()), int(below_floor(scores, items > 0).sum())
        if below > lists / 2:
            log.warning(
                "ranking_distillation: raw_confidence has all items of a list weigh alike in %d of the first %d lists. Their "
                "scores are all below %.0f, as large distances are, and e^score less than the 1e-8 that is added to it. Leave "
                "raw_confidence out: a list's scores are scaled to 0..1 first then",
                below,
                lists,
                math.log(FLOOR),
            )


def _choice(what: str, name: str, known: Any) -> None:
    if name not in known:
        raise unknown(f"{what} (ranking_distillation.{what})", name, known)
