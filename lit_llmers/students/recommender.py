"""What every recommender shares: loss terms, optimiser, logging, validation and checkpoints."""

import math
from typing import Any

import lightning as L
from torch import Tensor, nn

from lit_llmers.conf.schema import OptimizerConfig
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError
from lit_llmers.metrics import RankingMetrics
from lit_llmers.optimizer import adamw
from lit_llmers.processes.averages import averages
from lit_llmers.ranking import Catalogue, candidate_ranks, target_ranks, top_items
from lit_llmers.students.output import StudentOutput


class Recommender(L.LightningModule):
    """A backbone in training: its loss is `task + sum of weight * term`, where callbacks put the terms into `distillation`.

    Subclasses say how a batch becomes a `StudentOutput` (`forward`), what the task's own loss is (`task_loss`), how losses of
    single targets become a scalar (`reduce`) and which vectors score the catalogue (`tables`, `vectors`).

    Args:
        backbone: see `lit_llmers.backbones`.
        optimizer: AdamW's settings.
        ks: cut-offs of the validation metrics.
    """

    def __init__(
        self, backbone: nn.Module, optimizer: OptimizerConfig | None = None, ks: tuple[int, ...] = (5, 10, 20)
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.optimizer = optimizer or OptimizerConfig()
        self.distillation = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self.ranking = RankingMetrics(ks)
        self.writes_log = True  # whether the step at hand is one that the loggers write
        self._tables: Any = None  # during a validation pass

    @property
    def terms(self) -> dict[str, Any]:
        """The loss terms by name."""
        return dict(self.distillation.items())

    # ---- what a subclass says ------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, with_hidden: bool = False) -> StudentOutput:
        """The batch as the loss terms see it."""
        raise NotImplementedError

    def task_loss(self, output: StudentOutput, batch: Batch) -> Tensor:
        """The task's own loss, a scalar."""
        raise NotImplementedError

    def reduce(self, per_target: Tensor, batch: Batch) -> Tensor:
        """From the losses `[T]` of a batch's targets to a scalar."""
        return per_target.mean()

    def item_table(self) -> Tensor | None:
        """The item vectors that others may read, `[n+1, d]`, row 0 is padding; None if there are none."""
        raise NotImplementedError

    def tables(self) -> Any:
        """What ranking needs whatever the batch is, made once for many batches."""
        table = self.item_table()
        return None if table is None else Catalogue(table)

    def vectors(self, batch: Batch, tables: Any) -> tuple[Tensor, Catalogue]:
        """User vectors `[B, d]` and the item vectors whose dot products with them rank the catalogue."""
        raise NotImplementedError

    # ---- training ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.writes_log = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with_hidden = any("hidden" in term.requires for term in self.terms.values())
        output = self(batch, with_hidden)
        loss, losses = self.losses(output, batch)
        # reading the loss makes an accelerator wait, so there it is looked at only when it is logged
        if (self.writes_log or loss.device.type == "cpu") and not math.isfinite(loss.item()):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            raise UserError(
                f"The loss is not finite at step {self.global_step} ({values}). Lower optimizer.lr, or use "
                "trainer.precision=32-true."
            )
        losses |= {f"{name}/{part}": value for name, term in self.terms.items() for part, value in term.parts.items()}
        self.log_losses({"loss": loss} | {f"loss/{name}": value for name, value in losses.items()}, batch)
        if self.writes_log:
            self.log_dict({f"{name}/{what}": at for name, term in self.terms.items() for what, at in term.learned.items()})
        return loss * batch["weight"] if "weight" in batch else loss

    def losses(self, output: StudentOutput, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and by name the task's own and the terms that it is the weighted sum of."""
        losses = {"task": self.task_loss(output, batch)}
        losses |= {name: term(output, batch) for name, term in self.terms.items()}
        return losses["task"] + sum(losses[name] * self.weights.get(name, 1.0) for name in self.terms), losses

    def log_losses(self, losses: dict[str, Tensor], batch: Batch) -> None:
        """Log losses at the steps that the loggers write: a metric that nobody reads costs Lightning 1 to 2 ms a step.

        Args:
            losses: means over the process's rows; what is logged are means over those of all processes.
        """
        if self.writes_log:
            if "weight" in batch:
                losses = {name: value * batch["weight"] for name, value in losses.items()}
            self.log_dict(averages(losses, batch, self))

    def configure_optimizers(self) -> Any:
        return adamw(self, self.optimizer)

    # ---- validation ----------------------------------------------------------------------------------------------------

    def ranks(self, batch: Batch, tables: Any = None, candidates: Tensor | None = None) -> Tensor:
        """0-based rank `[B]` of each row's target, ties counted half.

        Args:
            tables: what `tables()` gave; None makes them anew.
            candidates: `[B, N]` items that compete with the target; None is the whole catalogue but what was seen before.
        """
        user, items = self.vectors(batch, self.tables() if tables is None else tables)
        if candidates is not None:
            return candidate_ranks(user, items, batch["target"], candidates)
        return target_ranks(user, items, batch["target"], batch.get("seen_row"), batch.get("seen_item"))

    def top_items(self, batch: Batch, k: int, tables: Any = None) -> tuple[Tensor, Tensor]:
        """The k best items `[B, k]` of each row without those seen before, and their scores; 0 and -inf where a list ends."""
        user, items = self.vectors(batch, self.tables() if tables is None else tables)
        return top_items(user, items, k, batch.get("seen_row"), batch.get("seen_item"))

    def on_validation_epoch_start(self) -> None:
        self._tables = self.tables()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        ranks = self.ranks(batch, self._tables)
        if batch.get("weight", 1.0):
            self.ranking.update(ranks)

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in self.ranking.compute().items()})
        self.ranking.reset()
        self._tables = None

    # ---- checkpoints: what callbacks added and what is frozen stay out of the model's own weights ------------------------

    def _frozen(self) -> set[str]:
        """Names of the weights that do not train; what is tied has several."""
        named = self.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if not parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        extra = {name: state.pop(name) for name in list(state) if name.startswith("distillation.")}
        frozen = self._frozen()
        for name in frozen & set(state):  # rebuilt from its base or from another stage's artefact
            del state[name]
        checkpoint["distillation"] = extra

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not checkpoint["state_dict"]:  # a sharded strategy has put the weights in place
            return
        own, saved = self.state_dict(), checkpoint["state_dict"]
        frozen = self._frozen()
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
