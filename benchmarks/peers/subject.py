"""What all subjects of `benchmarks/students.py` and `benchmarks/quality.py` share: data, ranks, and the turns that they take.

A subject is a process that trains one model with one library, on settings that it gets as JSON in its only argument. It
says when its first training step is done, trains one epoch, and goes on with what each word on its standard input asks for:
`epoch`; `validation` or `test`, to rank that item of every user in the whole catalogue; `evaluate`, which ends the training,
to do what the library itself does to evaluate all users. It says what each cost, and how good the ranks were, in one line of
JSON on its standard output; whatever else it prints goes to its standard error. Each library has an environment of its own,
so nothing but numpy is needed here.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

CUT = {"validation": 2, "test": 1}  # the items at a history's end that are not read when one of them is ranked
KINDS = {"validation": ("masked",), "test": ("masked", "kept")}
CHUNK = 1024  # users whose scores are made at a time
Scores = Callable[[list[np.ndarray]], Iterable[np.ndarray]]  # all users' histories -> scores [B, n+1] of B users, and the next

_channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # libraries print


def settings() -> dict[str, Any]:
    """What to run.

    Keys: `model`; `data`, the folder of a prepared data set; `items`, the size of its catalogue; `folder`, an empty one to
    write to; `length` of a history; `batch`, rows of one; `batches` that stand for an epoch, null for a whole one;
    `seed`; `started`, the time of the start; `lr` and `reg` where another than the subject's own is wanted; and what only
    some subjects need.
    """
    return json.loads(sys.argv[1])


@cache
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


# ---- ranks -----------------------------------------------------------------------------------------------------------------


def ranks(scores: Scores, part: str, kinds: Iterable[str]) -> dict[str, np.ndarray]:
    """Where the validation or the test item of each user stands among all items 1..n: 0 is best, ties count half.

    Args:
        scores: gets what may be read of every user, and yields matrices that are overwritten. -inf stands for an item that
            the library does not know; column 0 is not read.
        part: `validation` or `test`.
        kinds: `kept`: all items compete; `masked`: those that were read do not, but the target does even if it was.

    Raises:
        ValueError: a score of a target is NaN.
    """
    cut = CUT[part]
    users = histories(settings()["data"])
    read = [history[:-cut] for history in users]
    target = np.array([history[-cut] for history in users])
    places: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    start = 0
    for table in scores(read):
        some = slice(start, start + len(table))
        start += len(table)
        rows, wanted = np.arange(len(table)), target[some]
        own = table[rows, wanted][:, None]
        if np.isnan(own).any():
            raise ValueError("the model gives NaN: its training diverged")
        table[:, 0] = np.nan  # neither above the target nor level with it
        for kind in sorted(kinds):  # kept before masked
            if kind == "masked":
                table[np.repeat(rows, [len(items) for items in read[some]]), np.concatenate(read[some])] = np.nan
                table[rows, wanted] = own[:, 0]
            level = np.count_nonzero(table == own, axis=1) - 1
            places[kind].append(np.count_nonzero(table > own, axis=1) + level / 2)
    return {kind: np.concatenate(found) for kind, found in places.items()}


def metrics(places: np.ndarray) -> dict[str, float]:
    """HR@10 and NDCG@10 of 0-based ranks; half a place beyond the tenth is a miss."""
    hit = places <= 9
    return {"HR@10": float(hit.mean()), "NDCG@10": float((hit / np.log2(places + 2)).mean())}


# ---- turns -----------------------------------------------------------------------------------------------------------------


class Clock:
    """Counts seconds of the processor and on the clock while it runs; a new one runs. What a GPU was given is waited for."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self.go()

    def go(self) -> None:
        synchronise()
        self._start = time.process_time(), time.perf_counter()

    def stop(self) -> dict[str, float]:
        """What it has counted."""
        synchronise()
        self.cpu += time.process_time() - self._start[0]
        self.wall += time.perf_counter() - self._start[1]
        return {"cpu": self.cpu, "wall": self.wall}


def synchronise() -> None:
    """Wait for the GPU, where one is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


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


def another_epoch(scores: Scores | None = None) -> bool:
    """Rank as long as the next word asks for it; whether it then asks for an epoch. The process ends with the words."""
    while (word := sys.stdin.readline().strip()) in CUT:
        assert scores is not None
        clock = Clock()
        found = {kind: metrics(places) for kind, places in ranks(scores, word, KINDS[word]).items()}
        say(**found, **clock.stop())
    if not word:
        os._exit(0)  # in the middle of a library's own loop
    return word == "epoch"


def epochs(train: Callable[[], object], scores: Scores, share: float = 1.0, **also: Any) -> None:
    """Train as long as epochs are asked for, the first one unasked; `share` is the part of an epoch that one call is."""
    asked = True
    while asked:
        clock = Clock()
        train()
        say(share=share, **also, **clock.stop())
        asked = another_epoch(scores)


def epoch_callback(base: type, scores: Scores, share: float = 1.0) -> Any:
    """The same for a loop of Lightning's; `base` is its class Callback."""

    class Turns(base):  # type: ignore[misc]
        def on_train_epoch_start(self, *_: Any) -> None:
            self.clock = Clock()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            say(share=share, **self.clock.stop())
            trainer.should_stop = not another_epoch(scores)
            module.train()  # ranking left it in evaluation mode

    return Turns()


def evaluations(evaluate: Callable[[], object]) -> None:
    """Evaluate all users as often as it is asked for, once unasked."""
    while True:
        clock = Clock()
        evaluate()
        say(**clock.stop())
        another_epoch()
