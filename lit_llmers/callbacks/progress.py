"""Progress that a person can read: a bar on a terminal, a line per epoch everywhere else."""

import logging
import sys
from typing import Any

import lightning as L
import torch
from tqdm import tqdm

SHOWN = ("HR@10", "NDCG@10", "loss")  # of the validation figures, those that there are

log = logging.getLogger(__name__)


class Progress(L.Callback):
    """One bar per stage with epoch, loss and validation figure; in a log file, one line per validation.

    The line's loss is the mean over the epoch's batches, those before an interruption too, which are then the first process's
    for all. They are added up where they are, so no step waits for its loss.

    Args:
        title: name of the stage.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None
        self.total, self.batches = torch.zeros(()), 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.total, self.batches = torch.zeros((), device=pl_module.device), 0
        if trainer.is_global_zero and sys.stderr.isatty():
            epoch = f"{self.title} {trainer.current_epoch + 1}/{trainer.max_epochs}"
            batches = int(trainer.num_training_batches)
            self.bar = tqdm(total=batches, desc=epoch, leave=False, unit="batch", dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].float() * trainer.accumulate_grad_batches  # by which Lightning has divided it
        self.total, self.batches = self.total + loss, self.batches + 1
        if self.bar is not None:
            self.bar.update(batch_idx + 1 - self.bar.n)
            if batch_idx % 10 == 0:
                self.bar.set_postfix(loss=f"{float(loss):.3f}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = self._mean_loss(trainer)
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if trainer.is_global_zero:
            trained = f"epoch {trainer.current_epoch + 1:2d}  " if trainer.state.fn == "fit" else ""
            trained += "" if loss is None else f"loss {loss:.3f}  "
            shown = {name: figures[f"val/{name}"] for name in SHOWN if f"val/{name}" in figures}
            valid = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            log.info("%-24s %svalid %s", self.title, trained, valid)

    def _mean_loss(self, trainer: L.Trainer) -> float | None:
        """The epoch's mean over the batches of all processes, which must all call it; None where nothing was trained."""
        if not self.batches:
            return None
        mean = (self.total / self.batches).to(trainer.strategy.root_device)  # what a checkpoint gave back is on the CPU
        return float(trainer.strategy.reduce(mean, reduce_op="mean"))

    def state_dict(self) -> dict[str, Any]:
        return {"total": float(self.total), "batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.batches = torch.tensor(state_dict["total"]), state_dict["batches"]
