"""A subject: our training by the command that users type, with loggers, progress bar and checkpoints.

An epoch is everything from its start to its end but the validation pass, which ranks all users and is told beside it. So
are the seconds from the start of the process after which all is imported, the model is made, and the Trainer has begun.
"""

import sys
import time
from typing import Any

import lightning as L
import subject

from lit_llmers import fit, training

make_trainer = training.make_trainer
task = subject.settings()
after: dict[str, float] = {}


def reached(name: str) -> None:
    """Note when something was reached for the first time."""
    after.setdefault(name, time.time() - task["started"])


class Opening(L.Callback):
    """The first callback."""

    def on_train_epoch_start(self, *_: Any) -> None:
        reached("Trainer begun")
        self.epoch = subject.Clock()

    def on_validation_start(self, *_: Any) -> None:
        self.epoch.stop()
        self.validation = subject.Clock()

    def on_validation_end(self, *_: Any) -> None:
        self.validation.stop()
        self.epoch.go()


class Closing(L.Callback):
    """The last callback."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        validation = self.opening.validation
        figures = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in ("HR@10", "NDCG@10")}
        evaluation = {"cpu": validation.cpu, "wall": validation.wall, "figures": figures}
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        subject.say(evaluation=evaluation, last=last, share=1.0, after=after, **self.opening.epoch.stop())
        trainer.should_stop = not subject.another_epoch() or trainer.should_stop


def timed_trainer(stage: Any, callbacks: list[L.Callback]) -> L.Trainer:
    """The trainer of a stage, between two more callbacks."""
    reached("model made")
    opening = Opening()
    return make_trainer(stage, [opening, *callbacks, Closing(opening)])


if __name__ == "__main__":
    reached("imported")
    subject.announce_first_step()
    training.make_trainer = timed_trainer
    sys.exit(fit.main(task["command"]))
