"""Training that can be killed at any moment and goes on as if nothing had happened."""

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_llmers.errors import UserError
from lit_llmers.files import atomic_write

log = logging.getLogger(__name__)


def save(trainer: L.Trainer, path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    with atomic_write(path) as temporary:
        trainer.save_checkpoint(temporary, weights_only=False)  # with optimiser and loops


class SeedEachStep(L.Callback):
    """Draws every step's randomness (dropout) from (seed, epoch, batch, rank), so there is no random state to save."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        key = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        seed = hash(key) & 0x7FFF_FFFF_FFFF_FFFF
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.3 ms for devices that are not there
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)


class LastCheckpoint(L.Callback):
    """Writes `last.ckpt`: every so many batches at an optimiser step, and at the end of every epoch.

    Args:
        path: the checkpoint to write and to go on from.
        fingerprint: of the stage; a checkpoint that bears another one is refused.
        every_n_batches: batches lost at most.
    """

    def __init__(self, path: Path, fingerprint: str, every_n_batches: int) -> None:
        self.path, self.fingerprint, self.every = path, fingerprint, every_n_batches

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        due = done % self.every < trainer.accumulate_grad_batches and done >= self.every
        at_step = done % trainer.accumulate_grad_batches == 0
        if due and at_step and done < trainer.num_training_batches:
            save(trainer, self.path)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        save(trainer, self.path)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["stage"] = self.fingerprint

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("stage") != self.fingerprint:
            raise UserError(
                f"{self.path} was written by stage {checkpoint.get('stage', 'unknown')}, not by {self.fingerprint}: it is the "
                "checkpoint of another model. Remove the folder to train this stage anew."
            )


class BestCheckpoint(L.Callback):
    """Keeps the weights of the best validation epoch in `best.ckpt` and stops when `patience` epochs bring nothing better.

    Args:
        path: the checkpoint to write.
        monitor: a logged validation metric, the higher the better.
        patience: epochs without improvement before training stops; 0 trains to the last epoch.
    """

    def __init__(self, path: Path, monitor: str, patience: int) -> None:
        self.path, self.monitor, self.patience = path, monitor, patience
        self.score, self.epoch, self.waited = -math.inf, -1, 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        score = float(trainer.callback_metrics[self.monitor])
        if score > self.score:
            self.score, self.epoch, self.waited = score, trainer.current_epoch, 0
            save(trainer, self.path)
        else:
            self.waited += 1
        trainer.should_stop = trainer.should_stop or self._exhausted

    @property
    def _exhausted(self) -> bool:
        return 0 < self.patience <= self.waited

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "epoch": self.epoch, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.epoch, self.waited = state_dict["score"], state_dict["epoch"], state_dict["waited"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["callbacks"].get(self.state_key)
        if state is not None and 0 < self.patience <= state["waited"]:
            trainer.should_stop = True  # killed after the last epoch, before the stage was marked done
