"""How fast a model trains, validation and checkpoints not counted."""

import time
from typing import Any

import lightning as L


class Throughput(L.Callback):
    """Adds up epochs, rows and the seconds of the training steps, over restarts.

    A step is timed from its first hook to its last, on an accelerator until its work is queued and the loss was read.
    """

    def __init__(self) -> None:
        self.epochs, self.rows, self.seconds, self.started = 0, 0, 0.0, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.perf_counter() - self.started
        self.rows += len(batch["row"]) * trainer.world_size

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs += 1
        pl_module.log("rows_per_second", self.rows / max(self.seconds, 1e-9))

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "rows": self.rows, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs, self.rows, self.seconds = state_dict["epochs"], state_dict["rows"], state_dict["seconds"]
