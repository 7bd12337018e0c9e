"""The sequential recommender: teacher, student and control alike.

An LLM that scores items is this module with an LLM decoder as its backbone, so that depth is the only difference between
a teacher and its student: one training step, one evaluation, one export.
"""

import torch
from torch import Tensor

from lit_llmers.backbones import Backbone
from lit_llmers.conf.schema import LossConfig, OptimizerConfig
from lit_llmers.data.loader import Batch
from lit_llmers.losses import sampled
from lit_llmers.losses.scores import list_scores
from lit_llmers.losses.task import cross_entropy
from lit_llmers.ranking import Catalogue
from lit_llmers.students.negatives import PopularityDraw, UnmetDraw, draw_uniform
from lit_llmers.students.output import StudentOutput
from lit_llmers.students.recommender import Recommender


class SequentialRecommender(Recommender):
    """Next-item prediction with a backbone that turns a history into a user vector.

    Sums over targets are divided by `rows x targets_per_row`, a constant of the data set, and not by the targets of the
    batch: so k micro-batches add up to exactly one batch, and a target weighs the same in a batch of short rows as in one of
    long rows.

    Args:
        backbone: see `lit_llmers.backbones`.
        optimizer: AdamW's settings.
        loss: the task's own loss.
        targets_per_row: mean number of targets in a row as the backbone trains on it.
        popularity: `[n+1]` training interactions of each item, which sampled softmax draws its negatives by.
        unmet: draws the negatives of `bce` and `bpr`.
        ks: cut-offs of the validation metrics.
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerConfig | None = None,
        loss: LossConfig | None = None,
        targets_per_row: float = 1.0,
        popularity: Tensor | None = None,
        unmet: UnmetDraw | None = None,
        ks: tuple[int, ...] = (5, 10, 20),
    ) -> None:
        super().__init__(backbone, optimizer, ks)
        self.loss = loss or LossConfig()
        self.targets_per_row = targets_per_row
        self.draw = None if popularity is None else PopularityDraw(popularity)
        self.unmet = unmet

    # ---- what the model says -------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, with_hidden: bool = False) -> StudentOutput:
        """Read a batch of histories and return user vectors at its targets."""
        target = batch["target"]
        every = target.dim() == 2
        states = self.backbone(batch["items"], batch["mask"], every)  # layers+1 x [B, P, D]
        if every:  # index_select: its gradient is far cheaper than that of a boolean mask
            scored = target.flatten().nonzero().squeeze(1)
            flat = [state.flatten(0, 1).index_select(0, scored) for state in (states if with_hidden else states[-1:])]
        else:
            flat = [state[:, -1] for state in states]
        hidden = tuple(flat) if with_hidden else None
        return StudentOutput(self.backbone.head(flat[-1]), self.item_table(), hidden, self.loss.kind == "cross_entropy")

    def encode(self, items: Tensor, mask: Tensor) -> Tensor:
        """User vectors `[B, d]` of the histories `[B, L]`."""
        return self.backbone.head(self.backbone(items, mask)[-1][:, -1])

    def item_table(self) -> Tensor:
        """`[n+1, d]`, row 0 is padding."""
        return self.backbone.item_table()

    def vectors(self, batch: Batch, tables: Catalogue) -> tuple[Tensor, Catalogue]:
        return self.encode(batch["items"], batch["mask"]), tables

    def score(self, user: Tensor, items: Tensor) -> Tensor:
        """Scores `[B, K]` of the items `[B, K]` for the users `[B, d]`."""
        return torch.einsum("bd,bkd->bk", user, self.item_table()[items])

    # ---- training ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(self.backbone.training_view(batch), batch_idx)

    def losses(self, output: StudentOutput, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As of any recommender; with a softmax, what terms want of a target's cross-entropy besides is its weight there."""
        if not output.softmax:
            return super().losses(output, batch)
        losses = {name: term(output, batch) for name, term in self.terms.items()}
        loss = sum(losses[name] * self.weights.get(name, 1.0) for name in losses)
        more = {name: term.counts_more for name, term in self.terms.items() if term.counts_more is not None}
        weight = 1 + sum(counts * self.weights.get(name, 1.0) for name, counts in more.items()) if more else None
        target = batch["target"]
        own = cross_entropy(output.user, output.items[1:], target[target > 0] - 1, weight)
        loss = loss + self.reduce(own, batch)
        own = own.detach() if weight is None else own.detach() / weight
        losses = {name: value.detach() for name, value in losses.items()} | {"task": self.reduce(own, batch)}
        return loss, losses | {name: losses[name] + self.reduce(counts * own, batch) for name, counts in more.items()}

    def task_loss(self, output: StudentOutput, batch: Batch) -> Tensor:
        return self.next_item_loss(output.user, batch)

    def next_item_loss(self, user: Tensor, batch: Batch, drawn: Tensor | None = None) -> Tensor:
        """The loss of predicting the batch's targets, reduced as all losses are: a scalar.

        Args:
            user: `[T, d]` user vectors, one for each target.
            drawn: `[K]` random targets that the loss is estimated from; `user` is then `[K, d]`.
        """
        place = batch["target"].flatten().nonzero().squeeze(1)  # [T]
        if drawn is None:
            return self.reduce(self._per_target(user, place, batch), batch)
        estimate = self.reduce(self._per_target(user, place[drawn], batch), batch)
        return estimate * (len(place) / len(drawn))

    def _per_target(self, user: Tensor, place: Tensor, batch: Batch) -> Tensor:
        """`[T, d]` user vectors and the places `[T]` of their targets in all of the batch's -> `[T]` losses."""
        target = batch["target"].flatten().index_select(0, place)  # 1..n
        table, kind, n_items = self.item_table(), self.loss.kind, len(self.item_table()) - 1
        if kind == "cross_entropy":
            return cross_entropy(user, table[1:], target - 1)
        if kind == "sampled_softmax":  # the same negatives for the whole batch, popular ones more often
            assert self.draw is not None
            drawn = self.draw(self.loss.negatives)
            return sampled.sampled_softmax(user, table, target, drawn, self.draw.log_q, self.backbone.sparse)
        if self.loss.unmet:
            assert self.unmet is not None
            columns = batch["target"].numel() // len(batch["target"])
            negatives = self.unmet(batch["user"].index_select(0, place // columns), self.loss.negatives)  # [T, K]
        else:  # the calibration of gbce is for negatives from all items
            negatives = draw_uniform(target, self.loss.negatives, n_items)
        scores = list_scores(user, table, torch.cat([target[:, None], negatives], 1), self.backbone.sparse)
        positive, negative = scores[:, 0], scores[:, 1:]  # [T], [T, K]
        if kind == "gbce":
            return sampled.gbce(positive, negative, n_items, self.loss.t)
        return sampled.binary(positive, negative) if kind == "bce" else sampled.bpr(positive, negative)

    def reduce(self, per_target: Tensor, batch: Batch) -> Tensor:
        """Mean over the targets of a typical batch: `sum [T] / (rows x targets_per_row)`."""
        return per_target.sum() / self._typical_targets(batch)

    def _typical_targets(self, batch: Batch, rows: int | None = None) -> float:
        return (rows or len(batch["target"])) * (self.targets_per_row if batch["target"].dim() == 2 else 1.0)

    def log_losses(self, losses: dict[str, Tensor], batch: Batch) -> None:
        """Log reduced losses as means over this batch's own targets, which are comparable from batch to batch."""
        if self.writes_log:
            targets = (batch["target"] > 0).sum()
            if "weight" in batch:
                own = targets.float() if batch["weight"] else torch.zeros_like(targets, dtype=torch.float32)
                targets = self.trainer.strategy.reduce(own, reduce_op="sum")
            factor = self._typical_targets(batch, batch.get("rows")) / max(1, int(targets))
            per_row = {name for name, term in self.terms.items() if not term.per_target}
            whose = {key: key.removeprefix("loss/").partition("/")[0] for key in losses}
            means = {key: value if whose[key] in per_row else value * factor for key, value in losses.items()}
            if "loss" in means:
                weighted = [self.weights.get(name, 1.0) * means[f"loss/{name}"] for name in self.terms]
                means["loss"] = sum(weighted, means["loss/task"])
            super().log_losses(means, batch)
