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
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llmers import fit, preemption, recipes
from lit_llmers.errors import UserError, unknown

if TYPE_CHECKING:
    from lit_llmers.reporting.comparison import Comparison
    from lit_llmers.stages import Stage

ELSEWHERE = {  # arguments of `lit_llmers.fit` that have no place here, and what to do instead
    "recipe": "Here it is recipes=[NAME, ...].",
    "stage": "A run that stops at a stage has nothing to compare. Leave it out.",
    "only": "One stage alone has nothing to compare. Leave it out.",
}
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


# ---- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; `students` is empty where each recipe keeps its own."""

    recipes: list[str]
    students: list[str]
    reference: str | None
    overrides: list[str]


def parse(arguments: Sequence[str]) -> Asked:
    """Read the command line; names are checked here, overrides where they are composed.

    Raises:
        UserError: an unknown, missing or repeated name, or a list that is none.
    """
    given: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ELSEWHERE:
            raise UserError(f"'{argument}' belongs to lit_llmers.fit. {ELSEWHERE[key]}")
        if key in ("recipes", "students", "reference"):
            given[key] = value
        else:
            overrides.append(argument)
        if key == "seeds" and not all(seed.isdigit() for seed in _list(key, value)):
            raise UserError(f"seeds={value}: seeds are whole numbers from 0, as seeds=[0,1,2].")
    if not given.keys() & {"recipes", "students"}:
        raise UserError("Nothing to compare. Give students=[NAME,...] or recipes=[NAME,...]; --help lists them.")
    students = _list("students", given["students"]) if "students" in given else []
    for name in students:
        if name not in recipes.options("student"):
            raise unknown("student", name, recipes.options("student"))
    if students and any(override.startswith("student=") for override in overrides):
        raise UserError("Give either student=NAME, for all recipes, or students=[NAME,...], not both.")
    names = _list("recipes", given["recipes"]) if "recipes" in given else ["student"]
    for name in names:
        recipes.find(name)
    return Asked(names, students, given.get("reference"), overrides)


def _list(key: str, text: str) -> list[str]:
    examples = {"students": "sasrec,gru4rec", "recipes": "slmrec", "seeds": "0,1,2"}
    if not re.fullmatch(r"\[.*\]", text):
        raise UserError(f"{key}={text} is not a list. Write {key}=[{examples[key]}], without blanks or in quotes.")
    names = [name.strip() for name in text[1:-1].split(",")]
    if not all(names):
        raise UserError(f"{key}={text} {'is empty' if names == [''] else 'has an empty place'}. Write {key}=[{examples[key]}].")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{key}={text} names {name} twice.")
    return names


# ---- from there to runs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedRun:
    """One run of `lit_llmers.fit`.

    Attributes:
        label: what the table calls the run's main model.
        arguments: of `lit_llmers.fit`.
        given_pairs: the recipe's `pairs`.
    """

    label: str
    arguments: list[str]
    stages: "list[Stage]"
    given_pairs: list[tuple[str, str]]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Methods and their controls, as far as both are evaluated."""
        return [pair for pair in self.given_pairs if set(pair) <= set(self.evaluation.config.of)]

    @property
    def folder(self) -> Path:
        return self.stages[0].run.folder

    @property
    def evaluation(self) -> "Stage":
        """Its last evaluate stage."""
        return next(stage for stage in reversed(self.stages) if stage.verb == "evaluate")

    @property
    def models(self) -> list[str]:
        """The evaluated models that are compared: methods and controls, or without those all."""
        return list(dict.fromkeys(name for pair in self.pairs for name in pair)) or list(self.evaluation.config.of)

    @property
    def main(self) -> str | None:
        """The model that the run is about, if it is one."""
        candidates = {method for method, _ in self.pairs} or set(self.models)
        return next(iter(candidates)) if len(candidates) == 1 else None

    def identity(self, name: str) -> tuple[str, ...]:
        """The fingerprints of a model's trainings: equal for models that two runs train alike."""
        return tuple(stage.fingerprint for stage in self.stages if stage.name == name)

    @property
    def described(self) -> bool:
        """Whether `run.json` in the folder is of these very stages, and not of an earlier command's."""
        from lit_llmers.files import read_json
        from lit_llmers.stages import describe

        path = self.folder / "run.json"
        return path.is_file() and read_json(path)["stages"] == describe(self.stages)

    @property
    def evaluated(self) -> bool:
        return self.described and self.evaluation.done

    @property
    def done(self) -> bool:
        return self.described and all(stage.done for stage in self.stages) and (self.folder / "report.md").is_file()


def plan(asked: Asked) -> tuple[Path, list[PlannedRun]]:
    """Compose and check every run before any starts; return the comparison's folder and its runs.

    Raises:
        UserError: whatever `lit_llmers.fit` would refuse, and runs that cannot be compared.
    """
    from lit_llmers.resolving import resolve

    own = tuple(f"{key}=" for key in ("run.name", "run.dir"))
    passed_on = [override for override in asked.overrides if not override.startswith(own)]
    root: Path | None = None
    runs: list[PlannedRun] = []
    for recipe, student in product(asked.recipes, asked.students or [""]):  # "": the recipe's own student
        chosen = [f"student={student}"] if student else []
        name = student or "default"
        recipe_name = Path(recipe).stem  # of a recipe given by path
        label = recipe_name if not student else student if len(asked.recipes) == 1 else f"{recipe_name}/{student}"
        try:
            config = recipes.compose(recipe, [*chosen, *asked.overrides])
            root = root or _root(config, asked.overrides)
            config["run"] = {"dir": str(root), "name": name}
            planned = resolve(config)
        except UserError as error:
            raise UserError(f"{label}: {error}") from error
        for verb in ("prepare", "evaluate"):
            if not any(stage.verb == verb for stage in planned):
                raise UserError(f"Recipe '{recipe}' has no {verb} stage, so it leaves nothing to compare.")
        arguments = [f"recipe={recipe}", *chosen, *passed_on, f"run.dir={_quoted(str(root))}", f"run.name={name}"]
        if label in [run.label for run in runs]:
            raise UserError(f"Two recipes are called '{label}'. Rename one of the files, for it names the folder too.")
        runs.append(PlannedRun(label, arguments, planned, [(method, control) for method, control in config["pairs"]]))
        _check_same_task(runs[0], runs[-1])
    assert root is not None
    return root, runs


def _root(config: dict[str, Any], overrides: Sequence[str]) -> Path:
    """The comparison's folder: named by `run.name`, or else after the data."""
    named = any(override.startswith("run.name=") for override in overrides)
    return Path(config["run"]["dir"]) / "compare" / str(config["run"]["name"] if named else config["data"]["name"])


def _quoted(text: str) -> str:
    """A text in Hydra's grammar, in quotes where it needs them."""
    return text if re.fullmatch(r"[\w./-]+", text) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _check_same_task(first: PlannedRun, other: PlannedRun) -> None:
    """Two runs must rank the same test rows in the same way."""
    ours, theirs = _task(first), _task(other)
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"'{first.label}' and '{other.label}' cannot be compared: {key} is {ours.get(key)} in one and "
                f"{theirs.get(key)} in the other. Give {key}=... to set it for both."
            )


def _task(run: PlannedRun) -> dict[str, Any]:
    prepare = next(stage for stage in run.stages if stage.verb == "prepare")
    data = {f"data.{key}": value for key, value in asdict(prepare.config).items()}
    how = {f"evaluation.{key}": value for key, value in asdict(run.evaluation.config.evaluation).items()}
    return data | {key: value for key, value in how.items() if key != "evaluation.batch_size"}


def labels(runs: Sequence[PlannedRun]) -> dict[tuple[str, str], str]:
    """What the table calls each model, by run and by the run's name for it.

    A run's main model has the run's label and the others `label/name`. A model that several runs train alike is one row:
    it is called after the run that it is the main model of, or else by its name alone.
    """
    alike: dict[tuple[str, ...], list[tuple[PlannedRun, str]]] = {}
    for run in runs:
        for name in run.models:
            alike.setdefault(run.identity(name), []).append((run, name))
    shared = [places[0][1] for places in alike.values() if len(places) > 1]
    out: dict[tuple[str, str], str] = {}
    for places in alike.values():
        first, name = places[0]
        label = next((run.label for run, own in places if own == run.main), None)
        if label is None:
            label = name if len(places) > 1 and shared.count(name) == 1 else f"{first.label}/{name}"
        out |= {(run.label, own): label for run, own in places}
    return out


# ---- running ---------------------------------------------------------------------------------------------------------


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

    root, runs = plan(asked)
    called = labels(runs)
    if asked.reference is not None and asked.reference not in called.values():
        raise unknown("reference", asked.reference, set(called.values()))
    failed: dict[str, str] = {}
    with alone(root):
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
        report = write_report(root, comparison, about, failed, command)
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

    for record in [whole.parent.resolve() for whole in root.glob(f"*/*/{RECORDS}/*/manifest.json")]:
        own = run.folder / RECORDS / record.name
        if not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            own.unlink(missing_ok=True)
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
