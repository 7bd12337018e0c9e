"""`python -m lit_llmers.compare students=[...] data=NAME seeds=[...]`: many runs of `lit_llmers.fit`, one table.

Every student, recipe, or both, is a run of its own under `<run.dir>/compare/<run.name>/`, in a process of its own: what is
done is skipped, what failed is named at the end and takes nothing else along, and no run's memory or caches change the
figures of the next.
"""

import ctypes
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llmers import fit, preemption, recipes
from lit_llmers.comparable import Asked, PlannedRun, labels, parse, planned_runs
from lit_llmers.errors import UserError, unknown

if TYPE_CHECKING:
    from lit_llmers.reporting.comparison import Comparison

TAIL = 8192  # bytes of a run's messages that are searched for its error

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
            "  run.name=NAME run.dir=FOLDER     where the results go (runs/compare/<name>; the name is else the data set's)",
            "",
            "The same command given again skips what is done, goes on where it was stopped, and retries what failed.",
        ]
    )


def compare(asked: Asked, arguments: Sequence[str]) -> dict[str, str]:
    """Run what is not done, write `compare.md`, `compare.csv` and `compare.png`, and print the table.

    Returns:
        the error of each run that failed, by label.
    """
    fit.quiet()
    from lit_llmers.locks import alone
    from lit_llmers.loggers import finish_loggers
    from lit_llmers.reporting.comparison_report import publish, summary_table, write_report
    from lit_llmers.stages import Run

    root, runs = planned_runs(asked)
    called = labels(runs)
    if asked.reference is not None and asked.reference not in called.values():
        raise unknown("reference", asked.reference, set(called.values()))
    failed: dict[str, str] = {}
    worked = not all(run.done for run in runs)
    with alone(root, deep=False):  # each run cleans its own folder, which somebody else may hold
        for number, run in enumerate(runs, start=1):
            where = f"[{number}/{len(runs)}] {run.label:<16}"
            if run.done:
                log.info("%s done before, skipped (%s)", where, run.folder)
                continue
            log.info("%s starts (%s)", where, run.folder)
            preemption.stop_if_asked()
            share(run, root)
            started = time.monotonic()
            error = start(run.arguments)
            if error:
                failed[run.label] = error
            log.info("%s %s after %.1f s", where, "failed" if error else "done", time.monotonic() - started)
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
    from lit_llmers.locks import RECORDS

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


def start(arguments: Sequence[str]) -> str | None:
    """Run `lit_llmers.fit` in a process of its own, with its messages passed on; return its error, None when it is done.

    What asks this process to stop asks that one, and this one stops after it.

    Raises:
        Stopped: the run was stopped.
    """
    command = [sys.executable, "-m", "lit_llmers.fit", *arguments]
    tail = b""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=_die_with_parent()) as process:
        assert process.stderr is not None
        with preemption.passing_on_to(process.pid):
            while chunk := os.read(process.stderr.fileno(), 65536):
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
                tail = (tail + chunk)[-TAIL:]
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


if __name__ == "__main__":
    preemption.listen()
    sys.exit(main(sys.argv[1:]))
