"""The processes of one command: how many there are, which one this is, and how they wait for one another.

A launcher says it in the environment: torchrun, srun, or `lit_llmers.processes.launching`. Nothing here imports torch before
it is needed.
"""

import logging
import os
import socket
import sys
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
from lit_llmers.processes.locks import LOCK

if TYPE_CHECKING:
    import torch

    from lit_llmers.conf.schema import TrainerConfig

HEARTBEAT = 15  # seconds between two signs of life of a process that others may wait for
PATIENCE = 600  # seconds without one, after which they give up
PAUSE = 0.3  # seconds between two looks

log = logging.getLogger(__name__)
_groups = 0  # process groups that this process was in
_agent: tuple[str, int] | None = None  # where torchrun's own store is


def device_of(trainer: "TrainerConfig | None", local_rank: int = 0) -> "torch.device":
    """The GPU of that number on this machine, or the CPU where there is none or the trainer says `cpu`."""
    import torch

    on_cpu = trainer is not None and trainer.accelerator == "cpu"
    return torch.device("cuda", local_rank) if torch.cuda.is_available() and not on_cpu else torch.device("cpu")


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
