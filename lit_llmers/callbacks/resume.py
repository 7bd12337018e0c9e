"""Training that can be killed at any moment and goes on as if nothing had happened."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_llmers.conf.schema import TrainerConfig
from lit_llmers.errors import UserError
from lit_llmers.files import atomic_write, previous, read_json, readable, recover, replace_folder, writable
from lit_llmers.optimizer import lower_rate
from lit_llmers.processes import Processes
from lit_llmers.processes.strategies import whole_state

ABOUT = "about.json"  # in a checkpoint's folder: what it was written by
LOWERED = 0.1  # learning rate after a plateau, in that before

log = logging.getLogger(__name__)


def save(trainer: L.Trainer, path: Path) -> None:
    """Write a checkpoint, with optimiser and loops, whole or not at all: a file, or under a sharded strategy a folder.

    All processes must call it.
    """
    if getattr(trainer.strategy, "in_folders", False):
        temporary = path.with_name(trainer.strategy.broadcast(f".{path.name}.{os.getpid()}.tmp"))
        with writable(path):
            trainer.save_checkpoint(temporary, weights_only=False)
            if trainer.is_global_zero:
                last = next(each for each in trainer.callbacks if isinstance(each, LastCheckpoint))  # type: ignore[attr-defined]
                (temporary / ABOUT).write_text(json.dumps(last.about))
                replace_folder(temporary, path)
        trainer.strategy.barrier()
    elif trainer.is_global_zero:
        with atomic_write(path) as temporary:
            trainer.save_checkpoint(temporary, weights_only=False)
    else:
        trainer.save_checkpoint(path, weights_only=False)  # the first process alone writes


def save_weights(trainer: L.Trainer, path: Path) -> None:
    """Write the trained weights of a sharded model as one file such as `save` writes for one process.

    All processes must call it.

    Raises:
        RuntimeError: a tensor would be saved without its content.
    """
    state = whole_state(trainer)
    if trainer.is_global_zero:
        checkpoint = {"state_dict": state, "epoch": trainer.current_epoch, "global_step": trainer.global_step}
        empty = [name for name, value in state.items() if not value.numel()]
        if empty:
            raise RuntimeError(f"{len(empty)} tensors of {path} have no content, the first of them '{empty[0]}'.")
        trainer.lightning_module.on_save_checkpoint(checkpoint)
        with atomic_write(path) as temporary:
            torch.save(checkpoint, temporary)
    trainer.strategy.barrier()


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
        settings: of the stage's trainer: how often to write; and a checkpoint of another strategy, or of another number of
            processes, is refused.
    """

    def __init__(self, path: Path, fingerprint: str, settings: TrainerConfig) -> None:
        self.path, self.fingerprint, self.every = path, fingerprint, settings.checkpoint_every
        self.about: dict[str, Any] = {"stage": fingerprint, "strategy": settings.strategy, "world": settings.processes}

    def found(self) -> str | None:
        """The checkpoint to go on from, if there is one.

        Raises:
            UserError: it is damaged, or another strategy, another number of processes or another stage wrote it.
        """
        here = Processes.here() if self.about["world"] > 1 else Processes()
        if here.first:
            recover(self.path)
        else:
            here.wait(self.path.parent, lambda: not previous(self.path).exists(), f"the recovery of {self.path}")
        if self.path.is_dir():
            self._check(read_json(self.path / ABOUT))
        elif self.path.is_file():
            with readable(self.path, self.path.parent):
                about = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            self._check(about)
        return str(self.path) if self.path.exists() else None

    def _check(self, about: dict[str, Any]) -> None:
        if about.get("stage") != self.fingerprint:
            raise UserError(
                f"{self.path} was written by stage {about.get('stage', 'unknown')}, not by {self.fingerprint}: it is the "
                "checkpoint of another model. Remove the folder to train this stage anew."
            )
        strategy, world = about.get("strategy", "auto"), about.get("world", 1)
        if (strategy, world) != (self.about["strategy"], self.about["world"]):
            raise UserError(
                f"{self.path} was written with trainer.strategy={strategy} on {world} processes and cannot be read with "
                f"trainer.strategy={self.about['strategy']} on {self.about['world']}: every process has its own part of it, or "
                "its own random numbers. Go on as it was begun, or remove the file or folder to train this stage anew."
            )

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
        checkpoint |= self.about


class BestCheckpoint(L.Callback):
    """Keeps the weights of the best validation epoch in `best.ckpt` and stops when `patience` epochs bring nothing better.

    It is a file under every strategy: shards are put together each time, so there is nothing left to do when training ends.

    Args:
        path: the checkpoint to write.
        title: name of the stage, in messages.
        monitor: a logged validation metric, the higher the better.
        patience: epochs without improvement before training stops; 0 trains to the last epoch. Where not every epoch is
            validated, those between two validations count.
        plateau: instead of stopping the first time, go on at a tenth of the learning rate. (Lightning's own scheduler for that
            steps when `last.ckpt` is already written, and has a patience of its own.)
    """

    def __init__(self, path: Path, title: str, monitor: str, patience: int, plateau: bool = False) -> None:
        self.path, self.title, self.monitor, self.patience = path, title, monitor, patience
        self.score, self.epoch, self.waited = -math.inf, -1, 0
        self.plateau = self.to_lower = plateau

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        score = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))  # one decision for all processes
        if score > self.score:
            self.score, self.epoch, self.waited = score, trainer.current_epoch, 0
            (save_weights if getattr(trainer.strategy, "in_folders", False) else save)(trainer, self.path)
        else:
            self.waited += trainer.check_val_every_n_epoch or 1
        if self._exhausted and self.to_lower and trainer.current_epoch + 1 < (trainer.max_epochs or math.inf):
            self.to_lower, self.waited = False, 0
            lower_rate(trainer, LOWERED)
            if trainer.is_global_zero:
                log.info("%-24s waited %d epochs: the learning rate is %g of what it was", self.title, self.patience, LOWERED)
        trainer.should_stop = trainer.should_stop or self._exhausted

    @property
    def _exhausted(self) -> bool:
        return 0 < self.patience <= self.waited

    @property
    def summary(self) -> dict[str, Any]:
        """Of the best epoch `epoch` and what it reached, by the metric's name; `lowered`: if a plateau's end was trained."""
        return {"epoch": self.epoch, self.monitor: self.score} | ({"lowered": not self.to_lower} if self.plateau else {})

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "epoch": self.epoch, "waited": self.waited, "to_lower": self.to_lower}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.epoch, self.waited = state_dict["score"], state_dict["epoch"], state_dict["waited"]
        self.to_lower = state_dict.get("to_lower", False)  # an older version had no plateau

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["callbacks"].get(self.state_key)
        if state is not None and 0 < self.patience <= state["waited"]:
            trainer.should_stop = True  # killed after the last epoch, before the stage was marked done
