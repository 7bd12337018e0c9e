"""Starting the processes of a distributed stage on this machine, and what each of them owes the one that started it.

It is done through PyTorch's own agent, the one behind torchrun, which is imported when it is needed.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_llmers import preemption
from lit_llmers.environment import threads
from lit_llmers.errors import UserError
from lit_llmers.processes import Processes, RankFailed

OUTCOMES = "LIT_LLMERS_OUTCOMES"  # folder in which processes that `launch` started say how they ended
LAUNCHER = "LIT_LLMERS_LAUNCHER"  # the number of the one that started them
LAST_BREATH = 60  # seconds that a failed rank may take to end, where a library waits for the others


def launch(name: str, count: int, arguments: Sequence[str]) -> None:
    """Run a stage by several processes of this machine, and wait for them.

    What asks this process to stop asks them too.

    Args:
        name: of the stage, for all its seeds, or its label, for one.
        count: of the processes.
        arguments: of the `lit_llmers.fit` that runs the whole recipe.

    Raises:
        Stopped: they stopped in good order.
        UserError: as one of them says.
        RankFailed: one of them died.
    """
    given = [argument for argument in arguments if argument.partition("=")[0] not in ("stage", "only")]
    command = ["-m", "lit_llmers.fit", *given, f"only={name}"]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder)
        with _environment({OUTCOMES: folder, LAUNCHER: str(os.getpid()), **threads(count)}):
            agent = _Agent(count, command)
            agent.start()
            _attend(agent, outcomes)
        if agent.error is not None:
            _explain(agent.error, name, count, outcomes)


class _Agent(threading.Thread):
    """PyTorch's elastic agent, beside the main thread, which is left to receive signals.

    Attributes:
        error: with which the agent ended.
    """

    def __init__(self, count: int, command: list[str]) -> None:
        super().__init__(daemon=True)
        self.count, self.command = count, command
        self.error: BaseException | None = None

    def run(self) -> None:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        for noisy in ("torch.distributed.elastic", "torch.distributed.launcher"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        here = "127.0.0.1"
        config = LaunchConfig(
            1, 1, self.count, rdzv_backend="c10d", rdzv_endpoint=f"{here}:0", local_addr=here, max_restarts=0,
            run_id=f"{os.getpid()}-{time.time_ns()}",
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)(*self.command)
        except BaseException as error:  # to be explained by the main thread
            self.error = error


def _attend(agent: _Agent, outcomes: Path) -> None:
    """Wait for the agent, and pass on to its processes what asks this one to stop."""
    told: set[int] = set()
    interrupts = 0
    while agent.is_alive():
        try:
            agent.join(0.1)
            if (asked := preemption.asked()) is not None:
                new = _listening(outcomes) - told  # one that does not listen yet is told when it does
                preemption.pass_on(new, asked)
                told |= new
        except KeyboardInterrupt:
            interrupts += 1
            preemption.pass_on(_listening(outcomes), signal.SIGINT if interrupts == 1 else signal.SIGKILL)
    if interrupts:
        raise KeyboardInterrupt


def _listening(outcomes: Path) -> set[int]:
    return {int(path.suffix[1:]) for path in outcomes.glob("rank.*")}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _explain(error: BaseException, name: str, count: int, outcomes: Path) -> None:
    """Raise what the first process that failed says, or what is known of its death."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not isinstance(error, ChildFailedError):
        raise error
    said = {int(path.stem): json.loads(path.read_text()) for path in outcomes.glob("*.json")}
    failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
    when = {
        rank: (failure.timestamp, failures[rank] > 0, said.get(rank, {}).get("time", 0))
        for rank, failure in error.failures.items()
    }
    real = sorted((rank for rank, status in failures.items() if preemption.by_status(status) is None), key=when.__getitem__)
    if not real:
        raise preemption.Stopped(next(filter(None, map(preemption.by_status, failures.values()))))
    rank = real[0]
    status, outcome = failures[rank], said.get(rank)
    if status == 2 and outcome is not None:
        alike = all(each["error"] == outcome["error"] for each in said.values() if each["status"] == 2)
        raise UserError(outcome["error"] if alike else f"rank {rank} of {count}: {outcome['error']}")
    if outcome is not None:
        how = f"failed: {outcome['error']} (its traceback is above)"
    elif status < 0:
        how = f"was killed by {signal.Signals(-status).name}"
        how += ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
    else:
        how = f"ended with exit status {status}"
    raise RankFailed(f"Stage '{name}': rank {rank} of {count} {how}. The same command goes on from the last checkpoint.")


# ---- in a process that was started so --------------------------------------------------------------------------------


def conducted() -> bool:
    """Whether this process was started by `launch`, which speaks for it."""
    return OUTCOMES in os.environ


def as_program(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main` with the command line and exit with its status.

    A failed rank does end, also where a library would wait at the exit for the others.
    """
    _report_for_duty()
    status = 1
    try:
        status = main(sys.argv[1:])
    finally:
        if status and os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
            timer = threading.Timer(LAST_BREATH, os._exit, [status])
            timer.daemon = True
            timer.start()
    sys.exit(status)


def _report_for_duty() -> None:
    """Tell the process that started this one that signals are heard here, and do not outlive it."""
    folder = os.environ.get(OUTCOMES)
    if folder is None:
        return
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != int(os.environ[LAUNCHER]):  # it died before the system knew whose death to look for
        os._exit(1)
    (Path(folder) / f"rank.{os.getpid()}").touch()


def report_failure(status: int, error: str) -> bool:
    """Leave word of a failure for the process that started this one; returns whether there is one."""
    folder = os.environ.get(OUTCOMES)
    if folder is None:
        return False
    with suppress(OSError):
        path = Path(folder) / f"{Processes.here().rank}.json"
        path.with_suffix(".tmp").write_text(json.dumps({"status": status, "error": error, "time": time.time()}))
        path.with_suffix(".tmp").replace(path)
    return True
