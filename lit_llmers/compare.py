"""`python -m lit_llmers.compare students=[...] data=NAME seeds=[...]`: many runs of `lit_llmers.fit`, one table.

Every student, recipe, or both, is a run of its own under `<run.dir>/compare/<run.name>/`, in a process of its own: what is
done is skipped, what failed is named at the end and takes nothing else along, and no run's memory or caches change the
figures of the next. With `jobs=N` the stages of all runs are N processes at a time.
"""

import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llmers import fit, jobs, preemption, recipes
from lit_llmers.comparable import Asked, PlannedRun, labels, parse, planned_runs
from lit_llmers.errors import UserError, unknown
from lit_llmers.jobs import Job

if TYPE_CHECKING:
    from lit_llmers.reporting.comparison import Comparison

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Compare and return the exit status.

    That is 0 when it is done, 1 when some runs failed, 2 for something in the command that the user can mend, 3 when it was
    stopped by SIGUSR1 and 143 when by SIGTERM.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    try:
        failed = compare(parse(arguments), arguments)
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    except preemption.Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    for label, reason in failed.items():
        print(f"\nerror: {label} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


def help_text() -> str:
    """Usage with all recipes and students."""
    listed = [f"  {name:<16} {recipes.title(path)}" for name, path in sorted(recipes.available().items())]
    return "\n".join(
        [
            "usage: python -m lit_llmers.compare students=[NAME,...] [seeds=[0,1,2]] [key=value ...]",
            "       python -m lit_llmers.compare recipes=[NAME,...] [students=[NAME,...]] [key=value ...]",
            "",
            f"students: {', '.join(recipes.options('student'))}",
            "",
            "recipes, each beside its control (with students: each recipe with each student):",
            *listed,
            "",
            "often used:",
            "  data=ml-1m seeds=[0,1,2]         as in lit_llmers.fit; every override holds for every run",
            "  trainer.max_epochs=N             at most N epochs in every training stage",
            "  reference=NAME                   what all are tested against; by default their control, else the best",
            "  jobs=N                           N stages at a time, each with its GPU or its share of the cores",
            "  run.name=NAME run.dir=FOLDER     where the results go (runs/compare/<name>; the name is else the data set's)",
            "",
            "The same command given again skips what is done, goes on where it was stopped, and retries what failed.",
        ]
    )


def compare(asked: Asked, arguments: Sequence[str]) -> dict[str, str]:
    """Run what is not done, write `report.md`, `compare.csv`, `compare.json` and `compare.png`, and print the table.

    Returns:
        the error of each run that failed, by label.
    """
    fit.quiet()
    from lit_llmers.loggers import finish_loggers
    from lit_llmers.processes.locks import alone
    from lit_llmers.reporting.comparison_report import publish, summary_table, write_report
    from lit_llmers.stages import Run

    root, runs = planned_runs(asked)
    called = labels(runs)
    if asked.reference is not None and asked.reference not in called.values():
        raise unknown("reference", asked.reference, set(called.values()))
    jobs.check(runs, asked.jobs)
    worked = not all(run.done for run in runs)
    with alone(root, deep=False):  # each run cleans its own folder, which somebody else may hold
        failed = run_all(runs, root, asked.jobs)
        comparison = gather(runs, called, asked.reference)
        if comparison is None:
            return failed
        about = [(run.label, run.folder, shlex.join(["python", "-m", "lit_llmers.fit", *run.arguments])) for run in runs]
        command = shlex.join(["python", "-m", "lit_llmers.compare", *arguments])
        report = write_report(root, comparison, about, failed, command, worked)
        loggers = Run(root, "compare", root.name, runs[0].stages[0].run.logger).loggers(root / "report", "compare", {})
        publish(root, comparison, loggers)
        finish_loggers(loggers)
    print(f"\n{summary_table(comparison)}\n\nReport: {report}")
    return failed


def run_all(runs: Sequence[PlannedRun], root: Path, number: int) -> dict[str, str]:
    """Do what is not done: run after run, or the stages of all, `number` at a time; the errors of those that failed.

    Raises:
        Stopped: this process or one of the runs was asked to stop.
    """
    failed: dict[str, str] = {}
    began: dict[str, float] = {}
    for run in runs:
        if run.done:
            log.info("%s done before, skipped (%s)", _place(run, runs), run.folder)
    todo = [run for run in runs if not run.done]
    working: dict[Future[str | None], tuple[int, Job]] = {}
    with jobs.InTurn() if number == 1 else ThreadPoolExecutor(number) as executor, preemption.together():
        while todo or working:
            for slot in sorted(set(range(number)) - {slot for slot, _ in working.values()}):
                preemption.stop_if_asked()
                job = _next(todo, root, [job for _, job in working.values()], whole=number == 1)
                if job is None:
                    break
                if began.setdefault(job.run.label, now := time.monotonic()) == now:
                    log.info("%s starts (%s)", _place(job.run, runs), job.run.folder)
                share, label = jobs.share_of_machine(slot, number), "" if number == 1 else f"{job.run.label:<16}"
                working[executor.submit(jobs.start, job.arguments, share, label)] = slot, job
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                _, job = working.pop(future)
                if error := future.result() or (None if job.done else jobs.UNDONE):
                    failed[job.run.label] = error
                if job.run in todo and (error or job.stage is None or job.run.done):
                    todo.remove(job.run)
                    seconds = time.monotonic() - began[job.run.label]
                    log.info("%s %s after %.1f s", _place(job.run, runs), "failed" if error else "done", seconds)
    return failed


def _next(todo: Sequence[PlannedRun], root: Path, busy: Sequence[Job], whole: bool) -> Job | None:
    """What to begin with: the first run that has not to wait for another one's stages, or a stage of it."""
    for run in todo:
        share(run, root)
        if job := Job(run) if whole else jobs.next_job(run, busy):
            return job
    return None


def _place(run: PlannedRun, runs: Sequence[PlannedRun]) -> str:
    return f"[{runs.index(run) + 1}/{len(runs)}] {run.label:<16}"


def gather(runs: Sequence[PlannedRun], called: dict[tuple[str, str], str], reference: str | None) -> "Comparison | None":
    """The models of the runs that are evaluated, each once, those that several runs share first; None without any."""
    from lit_llmers.reporting.comparison import Comparison, Contender

    evaluated = [run for run in runs if run.evaluated]
    found = [Contender(called[run.label, name], run.folder, name) for run in evaluated for name in run.models]
    rows = {contender.label: contender for contender in reversed(found)}  # the first run's of those that are alike
    often = [contender.label for contender in found]
    order = sorted(dict.fromkeys(often), key=lambda label: often.count(label) == 1)
    pairs = [(called[run.label, method], called[run.label, control]) for run in runs for method, control in run.pairs]
    distinct = list(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]))
    return Comparison([rows[label] for label in order], distinct, reference) if rows else None


def share(run: PlannedRun, root: Path) -> None:
    """Link the stages that other runs of this comparison have done, and encoded texts: the same name is the same content."""
    from lit_llmers.processes.locks import RECORDS

    for own in (run.folder / RECORDS).glob("*"):
        if own.is_symlink() and not own.exists():  # the record that it led to was removed
            own.unlink()
    for record in [whole.parent.resolve() for whole in root.glob(f"*/*/{RECORDS}/*/manifest.json")]:
        own = run.folder / RECORDS / record.name
        if not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            own.symlink_to(os.path.relpath(record, own.parent.resolve()), target_is_directory=True)
    for stage in run.stages:
        if stage.folder.is_symlink() and not stage.done:  # the folder that it led to was removed
            stage.folder.unlink()
        if not stage.folder.exists():
            twin = next((done.parent.resolve() for done in root.glob(f"*/*/{stage.folder.name}/DONE")), None)
            if twin is not None:
                stage.folder.parent.mkdir(parents=True, exist_ok=True)
                stage.folder.symlink_to(os.path.relpath(twin, stage.folder.parent.resolve()), target_is_directory=True)


if __name__ == "__main__":
    preemption.listen()
    sys.exit(main(sys.argv[1:]))
