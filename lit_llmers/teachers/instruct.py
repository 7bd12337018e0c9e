"""Instruction tuning on titles: a causal language model learns to say which item a user chooses next.

BIGRec: "A Bi-Step Grounding Paradigm for Large Language Models in Recommendation Systems", Bao et al., arXiv 2308.08434, its
first step: cross-entropy of the next item's title after a prompt with the titles before it.
"""

import math
from typing import Any

import lightning as L
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lit_llmers.conf.instruction import TuneStage
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError
from lit_llmers.metrics import RankingMetrics
from lit_llmers.optimizer import adamw
from lit_llmers.processes.averages import averages, part_of_mean
from lit_llmers.teachers.grounding import GroundedRecommender
from lit_llmers.teachers.instructions import IGNORED
from lit_llmers.teachers.language_model import read


class InstructedModel(L.LightningModule):
    """Trains a causal language model to answer a prompt with a title: cross-entropy, mean over the tokens of a batch.

    Of several processes it is the mean over the tokens of all.

    Args:
        model: of Hugging Face, or PEFT's wrapper around one.
        config: of the stage.
        ranker: ranks the validation items, for `validate: ranking`.
    """

    def __init__(self, model: Any, config: TuneStage, ranker: GroundedRecommender | None = None) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.ranker = (ranker,)  # it holds this model: no submodule of it
        self.mean_loss, self.ranking = MeanMetric(), RankingMetrics((5, 10, 20))
        self.tables: Any = None  # during a validation pass

    def token_losses(self, batch: Batch) -> Tensor:
        """The loss of every token to be said, `[T]` float32; only positions from which one is said go through the head."""
        labels = batch["labels"]  # [B, R], of the last R tokens
        logits = read(self.model, batch["tokens"], batch["mask"], logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
        learnt = labels != IGNORED
        return F.cross_entropy(logits[learnt].float(), labels[learnt], reduction="none")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = part_of_mean(self.token_losses(batch), batch, self)
        written = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if (written or loss.device.type == "cpu") and not math.isfinite(loss.item()):
            raise UserError(
                f"The loss is not finite at step {self.global_step}. Lower optimizer.lr, or use trainer.precision=32-true."
            )
        if written:
            self.log_dict(averages({"loss": loss}, batch, self))
        return loss

    def configure_optimizers(self) -> Any:
        return adamw(self, self.config.optimizer)

    # ---- validation ------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        if self.ranker[0] is not None:
            self.tables = self.ranker[0].tables()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.ranker[0] is not None:
            ranks = self.ranker[0].ranks(batch, self.tables)
            if batch.get("weight", 1.0):
                self.ranking.update(ranks)
        else:
            losses = self.token_losses(batch)
            if batch.get("weight", 1.0):
                self.mean_loss.update(losses)

    def on_validation_epoch_end(self) -> None:
        if self.ranker[0] is not None:
            self.log_dict({f"val/{name}": value for name, value in self.ranking.compute().items()})
            self.ranking.reset()
            self.ranker[0].forget()
            self.tables = None
        else:
            loss = self.mean_loss.compute()
            self.log_dict({"val/loss": loss, "val/log_likelihood": -loss})
            self.mean_loss.reset()

    # ---- checkpoints: what is frozen is loaded from the base ----------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, parameter in self.named_parameters(remove_duplicate=False):  # a tied head has two names
            if not parameter.requires_grad:
                checkpoint["state_dict"].pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]
