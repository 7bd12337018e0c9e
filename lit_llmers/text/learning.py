"""Training inside an encode stage: without validation, to the last epoch, from the last checkpoint if there is one."""

import logging
import math
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor

from lit_llmers.callbacks.resume import LastCheckpoint, SeedEachStep
from lit_llmers.callbacks.throughput import Throughput
from lit_llmers.data.loader import Batch, TrainingBatches
from lit_llmers.errors import UserError
from lit_llmers.loggers import finish_loggers
from lit_llmers.optimizer import adamw
from lit_llmers.processes.averages import averages
from lit_llmers.stages import Stage
from lit_llmers.training import make_trainer

log = logging.getLogger(__name__)


class Learner(L.LightningModule):
    """What is trained; a subclass says what its loss is. Checkpoints leave out what is frozen."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.optimizer, self.label = stage.config.optimizer, stage.label
        self.losses: list[float] = []  # of the epoch, as far as they were read

    def loss(self, batch: Batch) -> Tensor:
        """A scalar; with several processes, one whose mean over them is the loss."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        written = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        whole = averages({"loss": loss}, batch, self) if written else {}
        alone = "weight" not in batch and loss.device.type == "cpu"
        if written or alone:  # reading it makes an accelerator wait
            self.losses.append(whole.get("loss", loss).item())
            if not math.isfinite(self.losses[-1]):
                raise UserError(
                    f"The loss is not finite at step {self.global_step}. Lower optimizer.lr, or use trainer.precision=32-true."
                )
        if written:
            self.log_dict(whole)
        return loss

    def on_train_epoch_end(self) -> None:
        if self.losses and self.trainer.is_global_zero:
            log.info("%-24s epoch %2d  loss %.3f", self.label, self.current_epoch + 1, np.mean(self.losses))
        self.losses = []

    def configure_optimizers(self) -> Any:
        return adamw(self, self.optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, parameter in self.named_parameters(remove_duplicate=False):  # a tied head has two names
            if not parameter.requires_grad:
                checkpoint["state_dict"].pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]


def learn(stage: Stage, learner: Learner, batches: TrainingBatches) -> Throughput:
    """Train to the last epoch; the learner is left on the CPU."""
    last = LastCheckpoint(stage.folder / "last.ckpt", stage.fingerprint, stage.config.trainer)
    throughput = Throughput()
    trainer = make_trainer(stage, [SeedEachStep(stage.seed), throughput, last])
    batches.rank, batches.world = trainer.global_rank, trainer.world_size
    learner.train()  # pretrained models come without their dropout
    trainer.fit(learner, train_dataloaders=batches, ckpt_path=last.found(), weights_only=True)
    finish_loggers(trainer.loggers)
    learner.cpu().eval()
    return throughput
