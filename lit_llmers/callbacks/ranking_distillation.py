"""Ranking distillation: the student learns from the teacher's list of best items for each target.

One callback for DLLM2Rec (RecSys 2024), RD (KDD 2018), RRD (CIKM 2020), DCD (CIKM 2021), UnKD (WSDM 2023) and the plain soft
top-K: they differ in the items drawn from the list, in their weights and in the loss.
"""

import math
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor

from lit_llmers.backbones import Backbone, CollaborativeBackbone
from lit_llmers.callbacks import ranking_samples as samples
from lit_llmers.callbacks.distillation import Distillation, Readers, Reduce, Term, check_share
from lit_llmers.callbacks.teacher_lists import RankingSource, lists_of, of_all, of_drawn, read_lists
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError, unknown
from lit_llmers.losses import ranking as losses
from lit_llmers.losses import ranking_weights as weighing
from lit_llmers.losses.scores import list_scores, shared_scores
from lit_llmers.students.output import StudentOutput

KEYS = ("teacher_items", "teacher_scores", "teacher_targets")
_OF_LIST = ("top", "rank", "discrepancy")
LOSSES: dict[str, tuple[str, ...]] = {  # and the samplers that they take
    "bce": _OF_LIST,
    "listwise": ("top", "rank"),
    "softmax": _OF_LIST,
    "pairwise": ("popularity",),
}
WEIGHTS = ("position", "confidence", "consistency", "discrepancy")
OF_STUDENT = {"consistency", "discrepancy"}  # weights that depend on how the student ranks
_SATURATED = 10  # from where on tanh is 1 in float32


class RankingTerm(Term):
    """The loss of the student's scores of listed items, see `RankingDistillation` for the settings.

    Args:
        settings: the callback.
        reduce: mean over the targets of a batch.
    """

    requires = frozenset(KEYS[:2])
    propensity: Tensor
    group_of: Tensor

    def __init__(self, settings: "RankingDistillation", reduce: Reduce) -> None:
        super().__init__()
        self.settings, self.reduce, self.epoch = settings, reduce, 0
        self.shares_softmax = settings.loss == "softmax" and settings.over == "catalogue" and settings.temperature == 1
        self.deepest = _deepest_rank(settings)
        popularity = settings.popularity
        if settings.dros:
            assert popularity is not None
            shares = losses.propensity(popularity[1:], settings.dros_power).float()
            self.register_buffer("propensity", torch.cat([shares.new_zeros(1), shares]), persistent=False)
        if settings.loss == "pairwise":
            assert popularity is not None
            group_of = samples.popularity_groups(popularity, settings.groups)
            self.register_buffer("group_of", group_of, persistent=False)
            self.quotas = samples.group_quotas(popularity, group_of, settings.pairs, settings.group_power)

    def forward(self, output: StudentOutput, batch: Batch) -> Tensor:
        targets = len(output.user)
        drawn, user, items, scores = lists_of(output, batch, KEYS)
        lists = _Lists(user, output.items, items, scores)
        if self.deepest:
            lists.met = samples.met_before(batch, drawn)
        if self.shares_softmax and output.softmax:
            target = batch["target"]
            lists.target = of_drawn(target[target > 0], drawn)
        loss = getattr(self, f"_{self.settings.loss}")(lists, batch, drawn)  # [T]
        parts = {name: of_all(part.detach(), drawn, targets) for name, part in lists.parts.items()}
        self.parts = {name: self.reduce(part, batch) for name, part in parts.items()}
        self.counts_more = None if lists.target is None else of_all(lists.labels.sum(1), drawn, targets)
        return self.reduce(of_all(loss, drawn, targets), batch)

    # ---- losses, one value per target ------------------------------------------------------------------------------------

    def _bce(self, lists: "_Lists", batch: Batch, drawn: Tensor | None) -> Tensor:
        self._choose(lists, batch, drawn, self.settings.negatives)
        weight = self._weights(lists)
        loss = losses.list_bce(lists.listed, weight, lists.others, lists.free, self.settings.official_negative_term)
        if not self.settings.dros:
            return loss
        beta, table = self.settings.dros_beta, lists.table.to(lists.listed.dtype)
        shares = self.propensity.to(lists.listed.dtype)
        energy = losses.log_energy(lists.user.to(table.dtype), table[1:], shares[1:], beta)
        robust = losses.dros(lists.listed, shares[lists.items], energy, beta)
        robust = losses.weighted_dros(robust, weight, self.settings.official_dros_mean)
        lists.parts = {"bce": loss, "dros": robust}
        loss = loss + self.settings.dros * robust
        if not self.settings.dros_target:
            return loss
        target = of_drawn(batch["target"][batch["target"] > 0], drawn)[:, None]
        score = list_scores(lists.user, lists.table, target).to(lists.listed.dtype)
        lists.parts["dros_target"] = losses.dros(score, shares[target], energy, beta)[:, 0]
        return loss + self.settings.dros_target * lists.parts["dros_target"]

    def _listwise(self, lists: "_Lists", batch: Batch, drawn: Tensor | None) -> Tensor:
        correction = self._correction(lists) if self.settings.underestimated else None
        if not self.settings.uninteresting:
            assert correction is not None
            return correction
        self._choose(lists, batch, drawn, self.settings.uninteresting)
        assert lists.others is not None
        listed = losses.relaxed_listwise(lists.listed, lists.others, lists.valid, lists.free)
        if correction is None:
            return listed
        lists.parts = {"listed": listed, "correction": correction}
        return listed + correction

    def _correction(self, lists: "_Lists") -> Tensor:
        """DCD's: what the student ranks too low, in the teacher's order, above what it ranks too high."""
        lists.score()
        rank, epsilon = self._ranks(lists), self.settings.epsilon
        low = samples.discrepancy_log_weight(rank, lists.place, epsilon)
        high = samples.discrepancy_log_weight(-rank, -lists.place, epsilon)
        better, real = samples.draw_places(low, lists.valid, self.settings.underestimated)
        worse, free = samples.draw_places(high, lists.valid, self.settings.overestimated)
        return losses.relaxed_listwise(lists.listed.gather(1, better), lists.listed.gather(1, worse), real, free)

    def _softmax(self, lists: "_Lists", batch: Batch, drawn: Tensor | None) -> Tensor:
        self._choose(lists, batch, drawn, 0)
        temperature = self.settings.temperature
        if self.settings.weights:
            labels = self._weights(lists)
        else:
            labels = losses.soft_targets(lists.scores, lists.valid, temperature).to(lists.listed.dtype)
        if self.settings.over == "list":
            return losses.soft_top_k(lists.listed, labels, lists.valid, temperature)
        if lists.target is None:
            return losses.soft_top_k_of_all(lists.user, lists.table, lists.items, lists.listed, labels, temperature)
        lists.labels = labels
        return losses.soft_top_k_beside(lists.user, lists.table, lists.target, lists.listed, labels)

    def _pairwise(self, lists: "_Lists", batch: Batch, drawn: Tensor | None) -> Tensor:
        lists.score()
        group = self.group_of[lists.items]
        better, worse, real = samples.draw_pairs(group, self.quotas, self.settings.rank_temperature)
        return losses.pairwise(lists.listed.gather(1, better), lists.listed.gather(1, worse), real)

    # ---- items and weights -----------------------------------------------------------------------------------------------

    def _choose(self, lists: "_Lists", batch: Batch, drawn: Tensor | None, others: int) -> None:
        """Draw from the lists and score what was drawn, and so many other items."""
        settings, device = self.settings, lists.items.device
        number = settings.k or lists.items.shape[1]
        if others:
            taken = torch.cat([lists.items, samples.met_items(batch, drawn)], 1)
            other, lists.free = samples.draw_others(taken, others, len(lists.table) - 1)
            lists.others = shared_scores(lists.user, lists.table, other)
        if settings.sampler == "top":
            lists.cut(number)
        if settings.sampler == "rank":
            log_weight = samples.rank_log_weight(lists.items.shape[1], settings.rank_temperature, device)
            lists.keep(*samples.draw_places(log_weight, lists.valid, number))
        lists.score()
        if settings.sampler == "discrepancy":
            low = samples.discrepancy_log_weight(self._ranks(lists), lists.place, settings.epsilon)
            lists.keep(*samples.draw_places(low, lists.valid, number))

    def _weights(self, lists: "_Lists") -> Tensor:
        settings, valid = self.settings, lists.valid
        weights: dict[str, Tensor] = {}
        for name in settings.weights:
            if name in OF_STUDENT and self.epoch < settings.start_epoch:
                continue
            if name == "position":
                weights[name] = weighing.position_weights(valid, settings.steepness, lists.place, lists.listed.dtype)
            elif name == "confidence":
                weights[name] = weighing.confidence_weights(lists.scores, valid, settings.raw_confidence)
            elif name == "consistency":
                weights[name] = weighing.consistency_weights(self._ranks(lists), settings.k or valid.shape[1], valid)
            else:
                weights[name] = weighing.discrepancy_weights(self._ranks(lists), lists.place, settings.mu) * valid
        if not weights:
            return weighing.combine({"": valid.to(lists.listed.dtype)}, {"": 1.0}, "sum", True)
        normalise = settings.combine == "sum" if settings.normalise is None else settings.normalise
        return weighing.combine(weights, settings.weights, settings.combine, normalise)

    def _ranks(self, lists: "_Lists") -> Tensor:
        if lists.rank is None:
            own = (lists.user, lists.table, lists.items, lists.listed)
            lists.rank = samples.student_ranks(*own, self.settings.rank_samples, self.deepest, lists.met)
        return lists.rank


class _Lists:
    """The lists of some targets, on the way from all of the record to what was drawn: tensors are `[T, K]`, if not said."""

    listed: Tensor  # the student's scores
    others: Tensor | None = None  # [T, N] of items that stand under the list
    free: Tensor | None = None  # [T, N] which of them count
    met: Tensor | None = None  # [T, L] items of its row before each target, if the student's ranks are asked for
    target: Tensor | None = None  # [T], if the student's own cross-entropy of it serves the list too
    labels: Tensor  # then those of the list, without gradient

    def __init__(self, user: Tensor, table: Tensor, items: Tensor, scores: Tensor) -> None:
        self.user, self.table, self.items, self.scores = user, table, items, scores
        self.valid = items > 0
        self.place = torch.arange(items.shape[1], device=items.device).expand_as(items)
        self.rank: Tensor | None = None
        self.parts: dict[str, Tensor] = {}

    def score(self) -> None:
        """Ask the student, once."""
        if not hasattr(self, "listed"):
            self.listed = list_scores(self.user, self.table, self.items)

    def cut(self, number: int) -> None:
        """Only the first so many."""
        if number < self.items.shape[1]:
            self.keep(self.place[:, :number], self.valid[:, :number])

    def keep(self, place: Tensor, drawn: Tensor) -> None:
        """Only these places `[T, k]`, as far as they were drawn."""
        for name in ("items", "scores", "place", "listed", "rank"):
            if getattr(self, name, None) is not None:
                setattr(self, name, getattr(self, name).gather(1, place))
        self.valid = drawn


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
    The student's ranks leave out the items before the target in its row; what is further back competes, unlike in the
    teacher's list (DLLM2Rec's code has the history in both). In a GRU4Rec of amazon-beauty 3 items of a history stand above a
    listed one, all of them in the row; of ml-1m 31, and 9 of them in the row of 50.

    Args:
        ranking: the teacher's lists.
        popularity: `[n+1]` training interactions of each item, read by `dros` and `loss: pairwise`.
        loss: `bce`, `listwise` (relaxed, RRD's), `pairwise` (UnKD's) or `softmax`.
        k: items that a step takes of each list; null is all of it, as always for `pairwise`.
        sampler: which k: the `top`; by `rank`, p ~ e^(-r / rank_temperature); by `discrepancy`, p ~ tanh(epsilon (r_S - r_T))
            where that is positive (DCD's draw, for `bce` and `softmax`). `pairwise` has `popularity`, the only one it can.
        weights: of `bce` and `softmax`: factors of `position`, `confidence`, `consistency`, `discrepancy`. Without any they
            are 1 / k for each item with `bce`, and with `softmax`, whose labels they are, the teacher's softmax, which wants
            logits: of a teacher with distances (BIGRec) take `confidence`, which scales them.
        combine: `sum` (DLLM2Rec) or `product` (RD) of the weights.
        normalise: whether a list's weights sum to 1; null: with `sum` yes, with `product` no.
        negatives: of `bce`: items off the list, and not in the row, to be scored low.
        uninteresting: of `listwise`: such items under the list; 0 leaves the correction alone.
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
        dros: factor of a distributionally robust loss of the listed items beside `bce` (DLLM2Rec's alpha), which reads all
            scores.
        dros_target: factor of the same loss of the target itself. `weight` multiplies it, as all of the term, where DLLM2Rec's
            lambda_d does not: dros / weight gives it the factor alpha.
        dros_beta, dros_power: its radius, and the power of its propensities.
        official_negative_term, official_dros_mean: slips of DLLM2Rec's official code, to reproduce its figures with; see
            `losses.ranking.list_bce` and `weighted_dros`.
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

    @property
    def weighs_by_student(self) -> bool:
        """Whether a weight depends on how the student ranks."""
        return not OF_STUDENT.isdisjoint(self.weights)

    @property
    def draws_by_student(self) -> bool:
        """Whether a draw depends on how the student ranks."""
        return self.sampler == "discrepancy" or self.underestimated > 0

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
        whole = self.k is None or self.sampler != "top" or self.underestimated
        read_lists(self.ranking, batch, KEYS, self.share, None if whole else self.k, pl_module.device)


def _deepest_rank(settings: RankingDistillation) -> int:
    """The student's rank from which on all ranks are alike to what reads them; 0: nothing does."""
    k = settings.ranking.k
    deepest = [settings.k or k] if "consistency" in settings.weights else [0]
    if "discrepancy" in settings.weights:
        deepest.append(k + math.ceil(_SATURATED / settings.mu))
    if settings.draws_by_student:
        deepest.append(k + math.ceil(_SATURATED / settings.epsilon))
    return max(deepest)


def _choice(what: str, name: str, known: Any) -> None:
    if name not in known:
        raise unknown(f"{what} (ranking_distillation.{what})", name, known)
