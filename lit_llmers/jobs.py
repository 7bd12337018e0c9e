"""What a comparison has `lit_llmers.fit` do, in processes of their own: one after the other, or several at once."""

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from lit_llmers import preemption
from lit_llmers.comparable import PlannedRun
from lit_llmers.environment import JOBS, threads
from lit_llmers.errors import UserError
from lit_llmers.stages import Stage

LAST = ("evaluate", "export")  # which take seconds, as a process takes to start: one does them all, and the report
UNDONE = "it ended well without what it was to do: its recipe or its data were changed meanwhile. Give the same command again."
TAIL = 8192  # bytes of a command's messages that are searched for its error


@dataclass(frozen=True)
class Job:
    """A piece of a run: one stage for one seed, or, where `stage` is None, all that is not done, and the report."""

    run: PlannedRun
    stage: Stage | None = None

    @property
    def name(self) -> str:
        """Equal for jobs that would make the same thing: stages of the same name have the same content."""
        return str(self.run.folder) if self.stage is None else self.stage.folder.name

    @property
    def done(self) -> bool:
        return self.run.done if self.stage is None else self.stage.done

    @property
    def arguments(self) -> list[str]:
        return [*self.run.arguments, *([] if self.stage is None else [f"only={self.stage.label}"])]


def next_job(run: PlannedRun, busy: Collection[Job]) -> Job | None:
    """The first stage of a run that can begin, all the rest once its models are made, or None as long as it has to wait.

    Args:
        busy: the jobs that are at work. What another run makes is waited for, and so is any encoding of texts: the next
            one may want the same vectors, only otherwise reduced.
    """
    names = {job.name for job in busy}
    encoding = any(job.stage is not None and _encodes(job.stage) for job in busy)
    todo = [stage for stage in run.stages if not stage.done]
    if all(stage.verb in LAST for stage in todo):
        return None if (rest := Job(run)).name in names else rest
    can = [stage for stage in todo if stage.folder.name not in names and all(need.done for need in stage.needs)]
    return next((Job(run, stage) for stage in can if stage.verb not in LAST and not (encoding and _encodes(stage))), None)


def _encodes(stage: Stage) -> bool:
    """Whether it reads texts by a model as it is: what that makes of them serves other stages too."""
    return stage.verb == "encode" and not stage.config.trains


def check(runs: Sequence[PlannedRun], number: int) -> None:
    """Several at once must be single processes.

    Raises:
        UserError: a stage is for a group of processes.
    """
    for stage in (stage for run in runs for stage in run.stages):
        if number > 1 and stage.processes > 1:
            raise UserError(
                f"jobs={number} trains that many models at once, each by one process, but stage '{stage.name}' is for "
                f"{stage.processes} processes (trainer.devices, trainer.num_nodes). Leave jobs out, or trainer.devices."
            )


def share_of_machine(slot: int, number: int) -> dict[str, str]:
    """The environment of job `slot` of `number` that are at work at once: its GPU, and its share of the processor's cores."""
    import torch

    if number == 1:
        return {}
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(i) for i in range(torch.cuda.device_count())] if named is None else [d for d in named.split(",") if d]
    own = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
    return threads(number) | own | {JOBS: str(number)}


class InTurn(Executor):
    """Does at once, in this thread, what it is given."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **settings: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **settings))
        return future


def start(arguments: Sequence[str], environment: dict[str, str] | None = None, label: str = "") -> str | None:
    """Run `lit_llmers.fit` in a process of its own, with its messages passed on; return its error, None when it is done.

    What asks this process to stop asks that one, and this one stops after it.

    Args:
        environment: variables that are set for it.
        label: stands before each line that it says.

    Raises:
        Stopped: the run was stopped.
    """
    command = [sys.executable, "-m", "lit_llmers.fit", *arguments]
    variables = {**os.environ, **(environment or {})}
    tail = b""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=variables, preexec_fn=_die_with_parent()
    ) as process:
        assert process.stderr is not None
        with preemption.passing_on_to(process.pid):
            pieces = iter(partial(os.read, process.stderr.fileno(), 65536), b"") if not label else process.stderr
            for piece in pieces:
                sys.stderr.buffer.write(f"{label} ".encode() + piece if label else piece)
                sys.stderr.flush()
                tail = (tail + piece)[-TAIL:]
    if (by := preemption.by_status(process.returncode)) is not None:
        raise preemption.Stopped(by)
    return _error(process.returncode, tail.decode(errors="replace")) if process.returncode else None


def _die_with_parent() -> Callable[[], Any] | None:
    """Has Linux kill a run whose comparison was killed, so that the same command finds nobody at work."""
    if sys.platform != "linux":
        return None
    set_death_signal = 1  # PR_SET_PDEATHSIG
    return partial(ctypes.CDLL(None).prctl, set_death_signal, signal.SIGKILL)


def _error(status: int, messages: str) -> str:
    """The line that says why a run failed."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")
    lines = [line.strip() for line in re.split(r"[\r\n]+", messages) if line.strip()]
    marked = [line for line in lines if re.match(r"error: " if status == 2 else r"[\w.]*(Error|Exception)\b", line)]
    return next(reversed(marked or lines), f"exit status {status}, without a word").removeprefix("error: ")
