"""Fit stages under the stopwatch: what the benchmarks of training share."""

import logging
import warnings
from typing import Any

import lightning as L
from measure import Cost, Stopwatch, mean

from lit_llmers import training
from lit_llmers.allocator import keep_memory
from lit_llmers.building import RECORDS, build_callbacks, references
from lit_llmers.callbacks.resume import SeedEachStep
from lit_llmers.models import build_model, data_module, load_dataset, load_sources, offers
from lit_llmers.record import open_signals
from lit_llmers.stages import Stage

WARM_UP = 2  # steps at the start of every round that do not count
FEW = ["logger=csv", "trainer.max_epochs=1", "trainer.limit_train_batches=5"]  # cost does not depend on knowledge
QUICK = ["data.generator.users=600", "data.generator.items=200"]


class Fit:
    """A fit stage, ready to train for a while again and again, from its first batch on."""

    def __init__(self, stage: Stage) -> None:
        config, dataset = stage.config, load_dataset(stage)
        keep_memory()  # as a fit does
        self.stage = stage
        self.data: Any = data_module(stage, dataset)
        L.seed_everything(stage.seed, verbose=False)
        self.model = build_model(stage, dataset)
        records = [reference for reference in references(config) if reference.kind in RECORDS]
        read = {each.argument: open_signals(stage.need(each.stage), self.data.rows) for each in records}
        self.terms = build_callbacks(config, read | load_sources(stage, dataset, "callbacks"), offers(stage, dataset))
        stage.folder.mkdir(parents=True, exist_ok=True)

    def steps(self, number: int) -> Cost:
        """The mean step, from its first hook (the signals are read there) to its last; in as many epochs as it takes."""
        watch = Stopwatch()
        trainer = self._trainer([StepStart(watch), SeedEachStep(self.stage.seed), *self.terms, StepStop(watch)])
        trainer.limit_val_batches, trainer.fit_loop.max_epochs = 0, -1
        trainer.fit_loop.epoch_loop.max_steps = number + WARM_UP
        trainer.fit(self.model, datamodule=self.data)
        return mean(watch.laps[WARM_UP:])

    def epoch(self) -> tuple[Cost, Cost]:
        """One whole epoch and the validation pass after it, batches made and metrics computed."""
        watch = EpochWatch()
        self._trainer([SeedEachStep(self.stage.seed), *self.terms, watch]).fit(self.model, datamodule=self.data)
        return watch.training.laps[0], watch.validation.laps[0]

    def _trainer(self, callbacks: list[L.Callback]) -> L.Trainer:
        trainer = training.make_trainer(self.stage, callbacks)
        trainer.limit_train_batches = 1.0
        return trainer


class StepStart(L.Callback):
    """Must be the first callback."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_batch_start(self, *_: Any) -> None:
        self.watch.start()


class StepStop(L.Callback):
    """Must be the last callback."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_batch_end(self, *_: Any) -> None:
        self.watch.stop()


class EpochWatch(L.Callback):
    """Times the training part of an epoch and its validation pass apart."""

    def __init__(self) -> None:
        self.training, self.validation = Stopwatch(), Stopwatch()

    def on_train_epoch_start(self, *_: Any) -> None:
        self.training.start()

    def on_validation_start(self, *_: Any) -> None:
        self.training.stop()
        self.validation.start()

    def on_validation_end(self, *_: Any) -> None:
        self.validation.stop()


def quiet() -> None:
    """Leave the screen to the table."""
    warnings.filterwarnings("ignore", module="lightning|torch|transformers")
    for noisy in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
