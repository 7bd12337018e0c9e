"""Runs stages in order: skips what is done, goes on in what is not, alone or by a group of processes."""

import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

from lit_llmers.environment import device, environment, jobs
from lit_llmers.errors import UserError, unknown
from lit_llmers.files import previous, read_json, remove, sha256, write_json
from lit_llmers.preemption import stop_if_asked
from lit_llmers.processes import Processes
from lit_llmers.processes.launching import launch
from lit_llmers.processes.locks import LOCK, Busy, alone
from lit_llmers.stages import MODULES, TABLE, USER_TABLE, Stage

LAST = "last.ckpt"
PATIENCE = 60  # seconds that a stage waits for whoever holds its folder: a sibling job that sweeps it, for one
SPENT = "seconds.json"
EVERY = 15  # seconds between two times that it is written
LEFT = (LAST, previous(Path(LAST)).name, SPENT, LOCK)  # by a process that was killed after its stage was done

log = logging.getLogger(__name__)


def run(stages: list[Stage], until: str | None, only: str | None = None, arguments: Sequence[str] = ()) -> list[Stage]:
    """Run the stages in order, those that are done excepted.

    Args:
        until: name of the stage to stop after.
        only: name of the stage to run alone, for all its seeds, or its label, for one; what it needs must be done.
        arguments: of the command, which processes are started with for a stage that needs several.

    Returns:
        the stages that are done now.

    Raises:
        UserError: there is no such stage, or it is for another number of processes than there are.
        Stopped: the process was asked to stop, and the command goes on from here when it is given again.
    """
    selected = select(stages, until, only)
    here = Processes.here()
    todo = [stage for stage in selected if not stage.done]
    here.check(todo)
    check_machine(todo)
    for stage in selected:
        stop_if_asked()
        if stage.done:
            log.info("%-24s done before, skipped (%s)", stage.label, stage.folder.name)
            if here.first and any((stage.folder / left).exists() for left in LEFT):  # killed between `DONE` and the end
                with suppress(Busy), alone(stage.folder):
                    _tidy(stage)
        elif stage.processes > here.world:
            log.info("%-24s on %d processes", stage.name, stage.processes)
            launch(only or stage.name, stage.processes, arguments)
        elif stage.processes == 1 and not here.first:
            here.wait_for(stage)
        else:
            with alone(stage.folder, patience=PATIENCE) if here.first else nullcontext():
                _run_one(stage, here)
        if stage.verb == "prepare" and here.first:
            check_on_data(stages)
    return selected


def check_on_data(stages: list[Stage]) -> None:
    """What the data decide about a record and the evaluation is checked once they are prepared, and not after all training."""
    for stage in stages:
        if stage.verb in ("evaluate", "record") and not stage.done:
            importlib.import_module(MODULES[stage.verb]).check(stage)


def check_machine(stages: list[Stage]) -> None:
    """Every stage's accelerator and strategy must be ones that this machine can run; see `lit_llmers.processes.strategies`."""
    settings = [stage.trainer for stage in stages if stage.trainer is not None]
    if settings:
        from lit_llmers.processes import strategies

        for trainer in settings:
            strategies.check_machine(trainer)


def select(stages: list[Stage], until: str | None, only: str | None = None) -> list[Stage]:
    """The stages that `run` runs or finds done."""
    names = list(dict.fromkeys(stage.name for stage in stages))
    labels = {stage.label for stage in stages}
    if until is not None and only is not None:
        raise UserError(f"stage={until} stops after a stage and only={only} runs one alone. Leave one of them out.")
    for name, known in ((until, set(names)), (only, labels.union(names))):
        if name is not None and name not in known:
            raise unknown("stage", name, names)
    if only is not None:
        return [stage for stage in stages if only in (stage.name, stage.label)]
    return stages if until is None else [stage for stage in stages if names.index(stage.name) <= names.index(until)]


def check_needs_done(selected: list[Stage], only: str) -> None:
    """What stages that are run alone read must be there.

    Args:
        only: how they were asked for.

    Raises:
        UserError: a stage that one of them needs is not done.
    """
    for stage in selected:
        missing = [need for need in stage.needs if not need.done]
        if missing and not stage.done:
            labels = ", ".join(need.label for need in missing)
            raise UserError(
                f"Stage '{stage.label}' (only={only}) needs {labels}: not done in {stage.run.folder} with these "
                f"settings. Run only={missing[0].label} first, or leave only={only} out."
            )


def _run_one(stage: Stage, here: Processes) -> None:
    """Run a stage by this process, or by each of a group."""
    if stage.done:  # by another command, before this one had the lock
        return
    for need in stage.needs:
        need.check_own()
    if here.first:
        begun = (stage.folder / "config.json").is_file()
        log.info("%-24s %s (%s)", stage.label, "goes on" if begun else "starts", stage.folder.name)
        settings = {"stage": stage.name, "verb": stage.verb, "seed": stage.seed, "settings": asdict(stage.config)}
        write_json(stage.folder / "config.json", settings)
    with here.sign_of_life(stage.folder), _counted(stage.folder) if here.first else nullcontext(lambda: 0.0) as spent:
        module = importlib.import_module(MODULES[stage.verb])
        with here.group() if stage.processes > 1 else nullcontext():
            summary = module.run(stage)
        if not here.first:
            here.wait_for(stage)
            return
    seconds = spent()
    if stage.verb not in ("fit", "tune"):  # which log while they train
        from lit_llmers.loggers import finish_loggers

        finish_loggers(stage.loggers(), {"seconds": seconds, **summary})
    machine = environment()
    about = {"git": machine["git"], "device": device(machine), "jobs": jobs()}
    tables = {name: sha256(path) for name in (TABLE, USER_TABLE) if (path := stage.folder / name).is_file()}
    about["fingerprint"] = stage.fingerprint
    write_json(stage.folder / "DONE", {"seconds": seconds, "summary": summary, "sha256": tables, **about})
    _tidy(stage)
    log.info("%-24s done in %.1f s", stage.label, seconds)


@contextmanager
def _counted(folder: Path) -> Iterator[Callable[[], float]]:
    """While a stage runs, keep in its folder the seconds that all its starts took; a killed one loses `EVERY` at most.

    Yields:
        how many they are now.
    """
    path = folder / SPENT
    before, started, ended = read_json(path) if path.is_file() else 0.0, time.monotonic(), threading.Event()

    def spent() -> float:
        return before + time.monotonic() - started

    def keep() -> None:
        while not ended.wait(EVERY):
            with suppress(UserError, OSError):  # a full disk is the stage's to tell
                write_json(path, spent())

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield spent
    finally:
        ended.set()
        thread.join()
        with suppress(UserError, OSError):
            write_json(path, spent())


def _tidy(stage: Stage) -> None:
    """Remove what is of no more use once the stage is done: the checkpoint, and the count of seconds."""
    for path in (last := stage.folder / LAST, previous(last), stage.folder / SPENT):
        remove(path)
