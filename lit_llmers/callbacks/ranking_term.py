"""What ranking distillation computes at each step: the loss of the student's scores of the items in a teacher's list."""

import math
from typing import Any

import torch
from torch import Tensor

from lit_llmers.callbacks import ranking_samples as samples
from lit_llmers.callbacks.distillation import Reduce, Term
from lit_llmers.callbacks.teacher_lists import lists_of, of_all, of_drawn
from lit_llmers.data.loader import Batch
from lit_llmers.losses import ranking as losses
from lit_llmers.losses import ranking_weights as weighing
from lit_llmers.losses.scores import list_scores, shared_scores
from lit_llmers.students.output import StudentOutput

KEYS = ("teacher_items", "teacher_scores", "teacher_targets")
OF_STUDENT = {"consistency", "discrepancy"}  # weights that depend on how the student ranks
_SATURATED = 10  # from where on tanh is 1 in float32


class RankingTerm(Term):
    """The loss of the student's scores of listed items, see `RankingDistillation` for the settings.

    A batch of pairs, which has no rows that name what a user has met, brings it as `seen_row` and `seen_item`: the numbers of
    the lists `[P]` and the items `[P]`, see `reads_met`.

    Args:
        settings: the callback, a `RankingDistillation`, whose attributes are read.
        reduce: mean over the targets of a batch.

    Attributes:
        reads_met: whether it asks what users have met.
    """

    requires = frozenset(KEYS[:2])
    propensity: Tensor
    group_of: Tensor

    def __init__(self, settings: Any, reduce: Reduce) -> None:
        super().__init__()
        self.settings, self.reduce, self.epoch = settings, reduce, 0
        self.shares_softmax = settings.loss == "softmax" and settings.over == "catalogue" and settings.temperature == 1
        self.deepest = _deepest_rank(settings)
        self.reads_met = bool(self.deepest) or settings.draws_others
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
            met = samples.met_items(batch, drawn)
            other, lists.free = samples.draw_others(lists.items, met, others, len(lists.table) - 1)
            lists.others = shared_scores(lists.user, lists.table, other)
        if settings.sampler == "top":
            lists.cut(number)
        if "confidence" in settings.weights and not settings.raw_confidence:
            lists.distance = weighing.scaled_distance(lists.scores, lists.valid)  # before a draw, on which it must not depend
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
                weights[name] = weighing.confidence_weights(lists.scores, valid, settings.raw_confidence, lists.distance)
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
            own = (lists.user, lists.table, lists.items, lists.listed, lists.met)
            lists.rank = samples.student_ranks(*own, self.settings.rank_samples, self.deepest)
        return lists.rank


class _Lists:
    """The lists of some targets, on the way from all of the record to what was drawn: tensors are `[T, K]`, if not said."""

    listed: Tensor  # the student's scores
    others: Tensor | None = None  # [T, N] of items that stand under the list
    free: Tensor | None = None  # [T, N] which of them count
    met: samples.Met  # what does not compete, if the student's ranks are asked for
    target: Tensor | None = None  # [T], if the student's own cross-entropy of it serves the list too
    labels: Tensor  # then those of the list, without gradient
    distance: Tensor | None = None  # the teacher's, scaled, if items are weighed by it

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
        for name in ("items", "scores", "place", "distance", "listed", "rank"):
            if getattr(self, name, None) is not None:
                setattr(self, name, getattr(self, name).gather(1, place))
        self.valid = drawn


def _deepest_rank(settings: Any) -> int:
    """The student's rank from which on all ranks are alike to what reads them; 0: nothing does."""
    k = settings.ranking.k
    deepest = [settings.k or k] if "consistency" in settings.weights else [0]
    if "discrepancy" in settings.weights:
        deepest.append(k + math.ceil(_SATURATED / settings.mu))
    if settings.draws_by_student:
        deepest.append(k + math.ceil(_SATURATED / settings.epsilon))
    return max(deepest)
