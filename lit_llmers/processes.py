"""The processes of one command: how many there are, which one this is, and starting those of a distributed stage.

A launcher (torchrun or srun) says it in the environment. Without one, a stage that needs several processes of this machine
is given them by `launch`, through PyTorch's own agent, the one behind torchrun. Nothing here imports torch before it is needed.
"""

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lit_llmers import preemption
from lit_llmers.errors import UserError
from lit_llmers.locks import LOCK

if TYPE_CHECKING:
    from lit_llmers.conf.schema import TrainerConfig

OUTCOMES = "LIT_LLMERS_OUTCOMES"  # folder in which processes that `launch` started say how they ended
HEARTBEAT = 15  # seconds between two signs of life of a process that others may wait for
PATIENCE = 600  # seconds without one, after which they give up
PAUSE = 0.3  # seconds between two looks
LAST_BREATH = 60  # seconds that a failed rank may take to end, where a library waits for the others

log = logging.getLogger(__name__)
_groups = 0  # process groups that this process was in
_agent: tuple[str, int] | None = None  # where torchrun's own store is


class Work(Protocol):
    """What is known here of a stage; see `lit_llmers.stages.Stage`."""

    @property
    def label(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def done(self) -> bool: ...
    @property
    def processes(self) -> int: ...
    @property
    def trainer(self) -> "TrainerConfig | None": ...


class RankFailed(Exception):
    """A process of a group died; the message names it and its error."""


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those that one command started.

    Attributes:
        rank: its number, 0 is the one that writes and speaks.
        local_rank: its number on its machine, and its device's.
        world: how many there are.
        nodes: on how many machines.
        launcher: `torchrun`, `srun`, or `none`.
    """

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    nodes: int = 1
    launcher: str = "none"

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "Processes":
        """What the launcher says. Inside of a Slurm job only what srun started counts: a batch script is one process.

        Raises:
            UserError: a launcher's variable is no number.
        """
        if "WORLD_SIZE" in environment and "RANK" in environment:  # torchrun, also inside of a Slurm job
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE")
            launcher = "torchrun"
        elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
            names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")
            launcher = "srun"
        else:
            return cls()
        defaults = ("0", "0", "1", "1")
        try:
            rank, local_rank, world, nodes = (int(environment.get(*pair)) for pair in zip(names, defaults, strict=True))
        except ValueError as error:
            raise UserError(f"The variables of {launcher} ({', '.join(names)}) must be whole numbers: {error}.") from error
        return cls(rank, local_rank, world, nodes, launcher)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def check(self, stages: Sequence[Work]) -> None:
        """Every stage must be for one process, or for exactly those that there are.

        Raises:
            UserError: one is not; it names both numbers.
        """
        for stage in stages:
            trainer = stage.trainer
            if trainer is None or trainer.processes == 1:
                continue
            wanted = f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes}"
            asked = f"Stage '{stage.label}' runs on {trainer.processes} processes ({wanted})"
            if self.world == 1 and trainer.num_nodes > 1:
                raise UserError(
                    f"{asked}, but one process was started by itself. Submit it with slurm/submit.sh, or start on every "
                    f"machine torchrun --nnodes={trainer.num_nodes} --nproc-per-node={trainer.devices} -m lit_llmers.fit ..."
                )
            if self.world > 1 and (trainer.processes, trainer.num_nodes) != (self.world, self.nodes):
                started = {"srun": f"--ntasks={self.world}", "torchrun": f"{self.world} processes"}[self.launcher]
                raise UserError(
                    f"{asked}, but {self.launcher} started {started} on {self.nodes} node{'s' * (self.nodes > 1)}. Make them "
                    f"agree: start {trainer.devices} on each of {trainer.num_nodes}, or set trainer.devices="
                    f"{self.world // self.nodes} trainer.num_nodes={self.nodes}."
                )

    def of(self, stage: Work) -> "Processes":
        """The processes that run a stage: all, or this one alone."""
        return self if stage.processes > 1 else Processes()

    def wait_for(self, stage: Work) -> None:
        """Wait until rank 0 has done a stage; see `wait`."""
        self.wait(stage.folder, lambda: stage.done, f"stage '{stage.label}'")

    def wait(self, folder: Path, there: Callable[[], bool], what: str) -> None:
        """Wait until something is in a stage's folder, as long as those that make it live.

        Raises:
            Stopped: this process was asked to stop.
            RankFailed: one of them gives no sign of life.
        """
        others = range(1, self.world) if self.first else [0]
        seen: dict[int, tuple[int | None, float]] = {}
        while not there():
            preemption.stop_if_asked()
            now = time.monotonic()
            for rank in others:
                changed = _changed(_sign(folder, rank))
                if rank not in seen or seen[rank][0] != changed:
                    seen[rank] = changed, now
                elif now - seen[rank][1] > PATIENCE:
                    raise RankFailed(
                        f"Rank {self.rank} of {self.world} waits for {what}; rank {rank} gave no sign of life in {PATIENCE} s. "
                        "Look at its messages. The same command goes on from here."
                    )
            time.sleep(PAUSE)

    @contextmanager
    def sign_of_life(self, folder: Path) -> Iterator[None]:
        """While this process works in a stage's folder, a file's time says so to the others."""
        if self.world == 1:
            yield
            return
        ended, sign = threading.Event(), _sign(folder, self.rank)

        def beat() -> None:
            while True:
                with suppress(OSError):
                    sign.touch()
                if ended.wait(HEARTBEAT):
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if not self.first:
                sign.unlink(missing_ok=True)

    @contextmanager
    def group(self) -> Iterator[None]:
        """A distributed stage, whoever forms its process group, which is gone when the stage ends.

        A second group of the same processes meets in a store of its own: in the first one's it would read what that left there,
        and wait for ever.
        """
        global _groups
        _groups += 1
        if _groups > 1:
            os.environ["MASTER_PORT"] = str(self._another_port())
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        yield
        import torch.distributed as dist

        if dist.is_initialized():
            deepspeed = sys.modules.get("deepspeed")  # which keeps groups of its own, of no use without this one
            (deepspeed.comm if deepspeed and deepspeed.comm.is_initialized() else dist).destroy_process_group()

    def _another_port(self) -> int:
        """A port of rank 0's machine for the store of the next group; the same in all processes."""
        if self.launcher == "srun":
            from lightning.fabric.plugins.environments import SLURMEnvironment

            return SLURMEnvironment(auto_requeue=False).main_port + 1
        import torch.distributed as dist

        global _agent
        _agent = _agent or (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        store = dist.TCPStore(*_agent, is_master=False, timeout=timedelta(seconds=PATIENCE))
        key = f"lit_llmers/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{_groups}"
        if self.first:
            with socket.socket() as free:
                free.bind(("", 0))
                store.set(key, str(free.getsockname()[1]))
        return int(store.get(key))

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Rank 0 does this before the others do."""
        if self.world > 1 and not self.first:
            self.meet()
        yield
        if self.world > 1 and self.first:
            self.meet()

    def meet(self) -> None:
        """Wait for one another; the group is formed at the first time. For stages that need nothing else of a group.

        Raises:
            Stopped: this process was asked to stop, and the others had stopped before they came.
            RuntimeError: the others do not come.
        """
        try:
            self._meet()
        except RuntimeError:
            preemption.stop_if_asked()
            raise

    def _meet(self) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            if self.launcher == "srun":
                from lightning.fabric.plugins.environments import SLURMEnvironment

                slurm = SLURMEnvironment(auto_requeue=False)
                os.environ |= {"MASTER_ADDR": slurm.main_address, "MASTER_PORT": str(slurm.main_port)}
            dist.init_process_group("gloo", rank=self.rank, world_size=self.world, timeout=timedelta(seconds=PATIENCE))
        dist.barrier()

    def total(self, *numbers: int) -> list[int]:
        """Each number's sum over the processes, which must have met and all call it."""
        if self.world == 1:
            return list(numbers)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(numbers)
        dist.all_reduce(sums)
        return sums.tolist()


def _sign(folder: Path, rank: int) -> Path:
    """The file that a process touches while it works in a folder: rank 0 its lock, which it holds."""
    return folder / (f".rank-{rank}.tmp" if rank else LOCK)


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


# ---- starting the processes of a stage -----------------------------------------------------------------------------------


def launch(name: str, count: int, arguments: Sequence[str]) -> None:
    """Run a stage, for all its seeds, by several processes of this machine, and wait for them.

    What asks this process to stop asks them too.

    Args:
        name: of the stage.
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
        threads = str(max(1, (os.cpu_count() or 1) // count))
        with _environment({OUTCOMES: folder, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}):
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


# ---- in a process that was started so ------------------------------------------------------------------------------------


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
    try:
        (Path(folder) / f"rank.{os.getpid()}").touch()
    except FileNotFoundError:  # it died meanwhile
        os._exit(1)


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
