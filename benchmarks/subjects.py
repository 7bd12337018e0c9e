"""What `students.py` and `quality.py` run: subjects, each a process of its own, and libraries each in an own environment."""

import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import Cost

HERE = Path(__file__).parent
PYTHON = (3, 11)  # the newest that all of them install on
NOTHING = Cost(float("nan"), float("nan"))
ANSWERS = ("cpu", "wall", "first_step", "kept", "masked")  # all else that a subject says is a note


@dataclass(frozen=True)
class Peer:
    """Something else to train with.

    Attributes:
        script: in `benchmarks/peers`.
        models: those that it has.
        requires: what pip installs into its environment, the library first; empty: it runs in ours.
        parts: batches that stand for an epoch, for some models or data, where a whole one would take too long.
        evaluates: whether it can be asked to; ours does it after each epoch unasked.
    """

    script: str
    models: tuple[str, ...]
    requires: tuple[str, ...] = ()
    parts: dict[str, int] = field(default_factory=dict)
    evaluates: bool = True

    def part(self, model: str, data: str) -> int | None:
        """Batches that stand for an epoch of this model on these data, None for a whole one."""
        return self.parts.get(model, self.parts.get(data))


class Unavailable(Exception):
    """A peer cannot be run; the message says why."""


def environment(peer: Peer, name: str, folder: Path) -> tuple[str, str]:
    """Make a peer's virtual environment unless it is there.

    Returns:
        Its Python, and the version of the library.

    Raises:
        Unavailable: no fitting Python, or pip failed.
    """
    if not peer.requires:
        return sys.executable, ""
    place = folder.resolve() / name.lower()
    python, marker = place / "bin" / "python", place / ".ready"
    pinned = re.search(r"^torch==\S+", (HERE.parent / "constraints.txt").read_text(), re.MULTILINE)
    wanted = [*peer.requires, *([pinned[0]] if pinned else [])]
    if not marker.is_file() or marker.read_text().split() != wanted:
        base = sys.executable if sys.version_info[:2] == PYTHON else shutil.which("python{}.{}".format(*PYTHON))
        if base is None:
            raise Unavailable("Python {}.{} was not found".format(*PYTHON))
        print(f"Installing {name} into {place}", file=sys.stderr)
        for command in ([base, "-m", "venv", str(place)], [str(python), "-m", "pip", "install", "--quiet", *wanted]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
                raise Unavailable(f"it does not install: {said[-1] if said else shlex.join(command)}")
        marker.write_text("\n".join(wanted))
    library = re.split(r"[\[=<>]", peer.requires[0])[0]
    code = f"from importlib.metadata import version; print(version({library!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return str(python), done.stdout.strip()


class Subject:
    """A process that trains an epoch, ranks or evaluates all users when it is asked to (`peers/subject.py` is its side).

    It sees a terminal on its standard error, so that a progress bar is drawn as for a person. When it dies, `failed` says
    how, and every cost from then on is `NOTHING`.

    Attributes:
        first_step: seconds from its start to the end of its first training step.
        memory: peak of its resident memory in MB.
        share: part of an epoch that it trains at a time; costs are those of a whole one all the same.
        first_epoch: what the first epoch cost, which it trains unasked.
        evaluations: costs of the evaluations that came with epochs, where they do.
        validation: the figures of the latest of these.
        notes: what else it said last.
    """

    def __init__(self, python: str, script: str, task: dict[str, Any], log: Path) -> None:
        self.log, self.failed = log, ""
        self.first_step, self.memory, self.share = float("nan"), 0, 1.0
        self.evaluations: list[Cost] = []
        self.validation: dict[str, float] = {}
        self.notes: dict[str, Any] = {}
        screen, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [python, HERE / "peers" / script, json.dumps({**task, "started": time.time()})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=terminal,
            text=True,
        )
        os.close(terminal)
        self.reader = threading.Thread(target=_drain, args=(screen, log), daemon=True)
        self.reader.start()
        if self._answer():
            self.first_step = time.perf_counter() - started
        self.first_epoch = self._epoch()

    def epoch(self) -> Cost:
        """Train an epoch."""
        self._ask("epoch")
        return self._epoch()

    def evaluate(self) -> Cost:
        """Evaluate all users as the library does; no epoch can follow."""
        self._ask("evaluate")
        return self._cost()

    def rank(self, part: str) -> dict[str, dict[str, float]]:
        """HR@10 and NDCG@10 of all users' `validation` or `test` items: `masked`, of `test` also `kept`; empty if it died."""
        self._ask(part)
        answer = self._answer()
        return {kind: answer[kind] for kind in ("masked", "kept") if kind in answer}

    def finish(self) -> None:
        """End the training, and wait until it has done what comes after."""
        self._ask("stop")
        if not self.failed and self.process.wait():
            self.failed = self._last_words()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _ask(self, word: str) -> None:
        if not self.failed:
            assert self.process.stdin is not None
            with suppress(BrokenPipeError):  # it has died, and there will be no answer
                self.process.stdin.write(f"{word}\n")
                self.process.stdin.flush()

    def _epoch(self) -> Cost:
        cost = self._cost()
        evaluation = self.notes.pop("evaluation", None)
        if evaluation:
            self.validation = evaluation.pop("figures")
            self.evaluations.append(Cost(**evaluation))
        self.share = self.notes.pop("share", self.share)
        return cost.per(self.share)

    def _cost(self) -> Cost:
        answer = self._answer()
        return Cost(answer.pop("cpu"), answer.pop("wall")) if answer else NOTHING

    def _answer(self) -> dict[str, Any]:
        """The next message, empty when there is none any more."""
        assert self.process.stdout is not None
        line = "" if self.failed else self.process.stdout.readline()
        if not line:
            self.failed = self.failed or self._last_words()
            return {}
        answer: dict[str, Any] = json.loads(line)
        self.memory = answer.pop("memory")
        self.notes.update({key: value for key, value in answer.items() if key not in ANSWERS})
        return answer

    def _last_words(self) -> str:
        status = self.process.wait()
        self.reader.join(timeout=5)
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"it ended with status {status}: {lines[-1] if lines else 'no message'}"


def _drain(screen: int, log: Path) -> None:
    """Copy what is written on a terminal to a file until its last writer is gone."""
    with open(log, "wb", buffering=0) as file:
        with suppress(OSError):  # so Linux says that the writer is gone
            while text := os.read(screen, 65536):
                file.write(text)
        os.close(screen)
