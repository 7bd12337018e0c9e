"""How fast a model trains, validation and checkpoints not counted, and how much memory that takes."""

import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

GB = 1e9
PROCESS = Path("/proc/self")  # on Linux


class Throughput(L.Callback):
    """Adds up epochs, rows, targets and the seconds of the training steps, over restarts, and logs the peak of the memory.

    A step is timed from its first hook to its last, on an accelerator until its work is queued and the loss was read. A row has
    as many targets as items are predicted from it: a window many, a prefix, a pair or a text one. So of students that are
    trained on different rows the targets compare.

    Logs at the end of every epoch: `rows_per_second` and `targets_per_second`, of all processes, and `peak_memory_gb` (10^9
    bytes), of this process since the training started, validation included: allocated on a GPU, else resident.

    Attributes:
        targets: of several processes as if each had as many as this one; None where an older version's checkpoint, from which
            the training went on, had not counted them.
    """

    def __init__(self) -> None:
        self.epochs, self.rows, self.seconds, self.started = 0, 0, 0.0, 0.0
        self.targets: float | None = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        start_peak(pl_module.device)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.perf_counter() - self.started
        own = len(batch["row"])
        rows = batch.get("rows", own)
        self.rows += rows
        if self.targets is not None:
            self.targets += len(batch.get("target_row", batch["row"])) * rows / own

    @property
    def speed(self) -> dict[str, float]:
        """Rows and, where they are known, targets per second."""
        counted = {"rows_per_second": self.rows, "targets_per_second": self.targets}
        return {name: number / max(self.seconds, 1e-9) for name, number in counted.items() if number is not None}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs += 1
        pl_module.log_dict(self.speed)
        if (peak := peak_memory(pl_module.device)) is not None:
            pl_module.log("peak_memory_gb", peak / GB)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "rows": self.rows, "targets": self.targets, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs, self.rows, self.seconds = state_dict["epochs"], state_dict["rows"], state_dict["seconds"]
        self.targets = state_dict.get("targets")


def start_peak(device: torch.device) -> None:
    """Forget the peak so far: earlier stages of the same process had their own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            (PROCESS / "clear_refs").write_text("5")  # the peak of the resident set, see proc(5)
        except OSError:
            return  # not Linux, or a container that forbids it: the peak is then the process's


def peak_memory(device: torch.device) -> int | None:
    """Bytes that were in use at most: allocated on a GPU, else resident on the host; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
