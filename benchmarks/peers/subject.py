"""What all subjects of `benchmarks/students.py` share: the data, and the turns that they take.

A subject is a process that trains one model with one library, on settings that it gets as JSON in its only argument. It
says when its first training step is done, trains one epoch, and goes on with an epoch or an evaluation of all users for
each such word on its standard input. It says what each cost in one line of JSON on its standard output; whatever else it
prints goes to its standard error. Each library has an environment of its own, so nothing but numpy is needed here.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # libraries print


def settings() -> dict[str, Any]:
    """What to run.

    Keys: `model`; `data`, the folder of a prepared data set; `items`, the size of its catalogue; `folder`, an empty one to
    write to; `length` of a history; `batch`, rows of one; `batches` that stand for an epoch, null for a whole one;
    `started`, the time of the start; and what only some subjects need.
    """
    return json.loads(sys.argv[1])


def histories(folder: str) -> list[np.ndarray]:
    """Each user's items 1..n in order: the last is for the test, the one before for validation, the rest for training."""
    items, offsets = (np.load(Path(folder) / f"{name}.npy") for name in ("items", "offsets"))
    return np.split(items.astype(np.int64), offsets[1:-1])


def padded(rows: list[np.ndarray], length: int) -> np.ndarray:
    """The last `length` of each row with zeros on their left, `[R, length]`."""
    table = np.zeros((len(rows), length), np.int64)
    for line, row in zip(table, rows, strict=True):
        if len(row):
            line[-len(row) :] = row[-length:]
    return table


# ---- turns -----------------------------------------------------------------------------------------------------------------


class Clock:
    """Counts seconds of the processor and on the clock while it runs; a new one runs."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self.go()

    def go(self) -> None:
        self._start = time.process_time(), time.perf_counter()

    def stop(self) -> dict[str, float]:
        """What it has counted."""
        self.cpu += time.process_time() - self._start[0]
        self.wall += time.perf_counter() - self._start[1]
        return {"cpu": self.cpu, "wall": self.wall}


def say(**message: Any) -> None:
    """Tell the benchmark, with the peak of resident memory so far in MB."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # ru_maxrss would count our parent's, too
    _channel.write(json.dumps({"memory": int(peak[1]) // 1024 if peak else 0, **message}) + "\n")
    _channel.flush()


def announce_first_step() -> None:
    """Say when the first step of any PyTorch optimiser is done."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    said = False

    def first(*_: Any) -> None:
        nonlocal said
        if not said:
            said = True
            say(first_step=True)

    register_optimizer_step_post_hook(first)


def another_epoch() -> bool:
    """Wait for the next word; whether it asks for an epoch. The process ends with the words."""
    word = sys.stdin.readline().strip()
    if not word:
        os._exit(0)  # in the middle of a library's own loop
    return word == "epoch"


def epochs(train: Callable[[], object], share: float = 1.0, **also: Any) -> None:
    """Train as long as epochs are asked for, the first one unasked; `share` is the part of an epoch that one call is."""
    asked = True
    while asked:
        clock = Clock()
        train()
        say(share=share, **also, **clock.stop())
        asked = another_epoch()


def epoch_callback(base: type, share: float = 1.0) -> Any:
    """The same for a loop of Lightning's; `base` is its class Callback."""

    class Turns(base):  # type: ignore[misc]
        def on_train_epoch_start(self, *_: Any) -> None:
            self.clock = Clock()

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            say(share=share, **self.clock.stop())
            trainer.should_stop = not another_epoch()

    return Turns()


def evaluations(evaluate: Callable[[], float]) -> None:
    """Evaluate all users as often as it is asked for, once unasked; `evaluate` returns the hit rate at 10."""
    while True:
        clock = Clock()
        hit_rate = evaluate()
        say(hit_rate=float(hit_rate), **clock.stop())
        another_epoch()
