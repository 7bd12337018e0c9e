"""The sequential recommender: teacher, student and control alike.

An LLM that scores items is this module with an LLM decoder as its backbone, so that depth is the only difference between
a teacher and its student: one training step, one evaluation, one export.
"""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_llmers.backbones import Backbone
from lit_llmers.conf.schema import OptimizerConfig
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError
from lit_llmers.losses.task import cross_entropy
from lit_llmers.metrics import RankingMetrics, target_ranks
from lit_llmers.students.output import StudentOutput


class SequentialRecommender(L.LightningModule):
    """Next-item prediction with a backbone that turns a history into a user vector.

    The loss is `task + sum of weight * term`, where the task is the cross-entropy over all items at every target and the
    terms are put into `distillation` by callbacks in their `setup`. Sums over targets are divided by `rows x
    targets_per_row`, a constant of the data set, and not by the targets of the batch: so k micro-batches add up to exactly
    one batch, and a target weighs the same in a batch of short rows as in one of long rows.

    Args:
        backbone: see `lit_llmers.backbones`.
        optimizer: AdamW's settings.
        targets_per_row: mean number of targets in a training row.
        ks: cut-offs of the validation metrics.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerConfig | None = None,
        targets_per_row: float = 1.0,
        ks: tuple[int, ...] = (5, 10, 20),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.optimizer = optimizer or OptimizerConfig()
        self.targets_per_row = targets_per_row
        self.distillation = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self.ranking = RankingMetrics(ks)

    @property
    def terms(self) -> dict[str, Any]:
        """The loss terms by name."""
        return dict(self.distillation.items())

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
        return StudentOutput(self.backbone.head(flat[-1]), tuple(flat) if with_hidden else None)

    def encode(self, items: Tensor, mask: Tensor) -> Tensor:
        """User vectors `[B, d]` of the histories `[B, L]`."""
        return self.backbone.head(self.backbone(items, mask)[-1][:, -1])

    def item_table(self) -> Tensor:
        """`[n+1, d]`, row 0 is padding."""
        return self.backbone.item_table()

    def score(self, user: Tensor, items: Tensor) -> Tensor:
        """Scores `[B, K]` of the items `[B, K]` for the users `[B, d]`."""
        return torch.einsum("bd,bkd->bk", user, self.item_table()[items])

    # ---- training ------------------------------------------------------------------------------------------------------

    def task_loss(self, user: Tensor, batch: Batch, drawn: Tensor | None = None) -> Tensor:
        """Cross-entropy of the batch's targets, reduced as all losses are: a scalar.

        Args:
            user: `[T, d]` user vectors, one for each target.
            drawn: `[K]` random targets that the loss is estimated from; `user` is then `[K, d]`.
        """
        target = batch["target"]
        target = target[target > 0] - 1  # [T]
        if drawn is None:
            return self.reduce(cross_entropy(user, self.item_table()[1:], target), batch)
        estimate = self.reduce(cross_entropy(user, self.item_table()[1:], target[drawn]), batch)
        return estimate * (len(target) / len(drawn))

    def reduce(self, per_target: Tensor, batch: Batch) -> Tensor:
        """Mean over the targets of a typical batch: `sum [T] / (rows x targets_per_row)`."""
        return per_target.sum() / self._typical_targets(batch)

    def _typical_targets(self, batch: Batch) -> float:
        return len(batch["target"]) * (self.targets_per_row if batch["target"].dim() == 2 else 1.0)

    def log_losses(self, losses: dict[str, Tensor], batch: Batch) -> None:
        """Log reduced losses as means over this batch's own targets, which are comparable from batch to batch."""
        factor = self._typical_targets(batch) / len(batch["target_row"])
        self.log_dict({name: value.detach() * factor for name, value in losses.items()})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with_hidden = any("hidden" in term.requires for term in self.terms.values())
        output = self(batch, with_hidden)
        losses = {"task": self.task_loss(output.user, batch)}
        for name, term in self.terms.items():
            losses[name] = term(output, batch)
        loss = torch.stack([self.weights.get(name, 1.0) * value for name, value in losses.items()]).sum()
        if not math.isfinite(loss.item()):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            raise UserError(
                f"The loss is not finite at step {self.global_step} ({values}). Lower optimizer.lr, or use "
                "trainer.precision=32-true."
            )
        self.log_losses({"loss": loss} | {f"loss/{name}": value for name, value in losses.items()}, batch)
        return loss

    def configure_optimizers(self) -> Any:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        adam = torch.optim.AdamW(trainable, lr=self.optimizer.lr, weight_decay=self.optimizer.weight_decay, fused=True)
        warmup = self.optimizer.warmup_steps

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if self.optimizer.schedule == "constant" or step == warmup:
                return 1.0
            per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
            steps = per_epoch * (self.trainer.max_epochs or 1)  # known only now: asking earlier would set the loader up
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(adam, factor)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- validation ----------------------------------------------------------------------------------------------------

    def ranks(self, batch: Batch, table: Tensor | None = None) -> Tensor:
        """0-based rank `[B]` of each row's target among all items not seen before."""
        user = self.encode(batch["items"], batch["mask"])
        table = self.item_table() if table is None else table
        return target_ranks(user, table, batch["target"], batch.get("seen_row"), batch.get("seen_item"))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.ranking.update(self.ranks(batch))

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in self.ranking.compute().items()})
        self.ranking.reset()

    # ---- checkpoints: what callbacks added and what is frozen stay out of the model's own weights ------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        extra = {name: state.pop(name) for name in list(state) if name.startswith("distillation.")}
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        for name in frozen & set(state):  # rebuilt from its base or from another stage's artefact
            del state[name]
        checkpoint["distillation"] = extra

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, saved = self.state_dict(), checkpoint["state_dict"]
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        extra = checkpoint.get("distillation", {})
        expected = {name for name in own if not name.startswith("distillation.")} - frozen
        wrong = sorted(name for name in expected & set(saved) if own[name].shape != saved[name].shape)
        missing, surplus = sorted(expected - set(saved)), sorted(set(saved) - set(own))
        if wrong or missing or surplus:
            difference = (missing or surplus or wrong)[0]
            raise UserError(
                f"The checkpoint is of another model: {len(missing)} tensors missing, {len(surplus)} unknown, {len(wrong)} of "
                f"another shape, the first of them '{difference}'. Remove the stage's folder to train it anew."
            )
        checkpoint["state_dict"] = (
            saved | {name: own[name] for name in frozen} | {name: value for name, value in extra.items() if name in own}
        )
