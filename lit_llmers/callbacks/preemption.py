"""Stopping a training where it can go on from, when the process is asked to."""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn

from lit_llmers import preemption
from lit_llmers.callbacks.resume import LastCheckpoint, save
from lit_llmers.loggers import QuietWandbLogger

SIGNALS = (None, *preemption.STATUS)  # by number of importance: one that does not requeue wins


class StopWhenAsked(L.Callback):
    """Looks at every optimiser step whether a process was asked to stop, saves `last.ckpt` and leaves with `Stopped`.

    The processes agree by a maximum over one number, on the host, so that an accelerator need not be waited for. They leave
    at the start of the next batch or epoch, when what was logged with the step is written. A validation may take long, so
    they look before each of its batches too; it is begun anew when training goes on.

    Args:
        last: the callback that writes `last.ckpt`; it must come before this one.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last
        self.by: Any = None
        self.group: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            self.group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        within = done < trainer.num_training_batches  # what the last batch ends, the end of the epoch saves
        if done % trainer.accumulate_grad_batches == 0 and within and self._agreed():
            save(trainer, self.last.path)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._agreed():
            progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            for counts in (progress.total, progress.current):  # as within the first batch, which is where Lightning goes on
                counts.ready = counts.started = 1
                counts.processed = counts.completed = 0
            save(trainer, self.last.path)
            self._leave(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._agreed()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._leave(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave(trainer)

    def _agreed(self) -> bool:
        """Whether any process was asked to stop; the same in all of them."""
        asked = SIGNALS.index(preemption.asked())
        if self.group is not None:
            highest = torch.tensor([asked], dtype=torch.int32)
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
            asked = int(highest)
        self.by = SIGNALS[asked]
        return asked > 0

    def _leave(self, trainer: L.Trainer) -> None:
        if self.by is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, QuietWandbLogger):
                logger.attempt(logger.experiment.mark_preempting)  # W&B then shows it as preempted, not as failed
        raise preemption.Stopped(self.by)


def leave_signals_alone(trainer: L.Trainer) -> None:
    """Keep Lightning's own handlers out: they speak to the other processes from inside of a handler, where that may hang.

    With them goes its look, before every batch, for a signal that rank 0 may have received.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
