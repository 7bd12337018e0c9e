"""From a comparison's command line to the runs of `lit_llmers.fit` that it is made of: composed, named, and comparable."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llmers import recipes
from lit_llmers.composing.overrides import quoted
from lit_llmers.conf.schema import RunConfig
from lit_llmers.conf.typed import build
from lit_llmers.errors import UserError, unknown

if TYPE_CHECKING:
    from lit_llmers.stages import Stage

ELSEWHERE = {  # arguments of `lit_llmers.fit` that have no place here, and what to do instead
    "recipe": "Here it is recipes=[NAME, ...].",
    "stage": "A run that stops at a stage has nothing to compare. Leave it out.",
    "only": "One stage alone has nothing to compare. Leave it out.",
}


# ---- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; `students` is empty where each recipe keeps its own.

    Attributes:
        jobs: how many stages may be at work at once.
    """

    recipes: list[str]
    students: list[str]
    reference: str | None
    overrides: list[str]
    jobs: int = 1


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
        if key in ("recipes", "students", "reference", "jobs"):
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
    jobs = given.get("jobs", "1")
    if not jobs.isdecimal() or int(jobs) < 1:
        raise UserError(f"jobs={jobs}: it is how many stages are at work at once, a whole number from 1, as jobs=2.")
    return Asked(names, students, given.get("reference"), overrides, int(jobs))


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
        from lit_llmers.fit import EARLIER

        report = self.folder / "report.md"
        whole = report.is_file() and not report.read_text().startswith(EARLIER)
        return whole and self.described and all(stage.done for stage in self.stages)


def planned_runs(asked: Asked) -> tuple[Path, list[PlannedRun]]:
    """Compose and check every run before any starts; return the comparison's folder and its runs.

    What an override chooses is for the recipes that have it (`text=minilm`, `stages.lists.per=user`: not for `student`); if
    none has, it is refused.

    Raises:
        UserError: whatever `lit_llmers.fit` would refuse, and runs that cannot be compared.
    """
    from lit_llmers.composing.resolving import resolve

    own = tuple(f"{key}=" for key in ("run.name", "run.dir"))
    has = {recipe: recipes.chooses(recipe) for recipe in asked.recipes}
    known = set().union(*has.values())
    root: Path | None = None
    runs: list[PlannedRun] = []
    for recipe, student in product(asked.recipes, asked.students or [""]):  # "": the recipe's own student
        given = [f"student={student}"] if student else []
        name = student or "default"
        recipe_name = Path(recipe).stem  # of a recipe given by path
        label = recipe_name if not student else student if len(asked.recipes) == 1 else f"{recipe_name}/{student}"
        overrides = [o for o in asked.overrides if (chosen := recipes.chosen_by(o)) in has[recipe] or chosen not in known]
        try:
            config = recipes.compose(recipe, [*given, *overrides])
            root = root or _root(config, asked.overrides)
            config["run"] = {"dir": str(root), "name": name}
            planned = resolve(config)
        except UserError as error:
            raise UserError(f"{label}: {error}") from error
        for verb in ("prepare", "evaluate"):
            if not any(stage.verb == verb for stage in planned):
                raise UserError(f"Recipe '{recipe}' has no {verb} stage, so it leaves nothing to compare.")
        passed_on = [override for override in overrides if not override.startswith(own)]
        arguments = [f"recipe={recipe}", *given, *passed_on, f"run.dir={quoted(str(root))}", f"run.name={name}"]
        if label in [run.label for run in runs]:
            raise UserError(f"Two recipes are called '{label}'. Rename one of the files, for it names the folder too.")
        runs.append(PlannedRun(label, arguments, planned, [(method, control) for method, control in config["pairs"]]))
        _check_same_task(runs[0], runs[-1])
    assert root is not None
    return root, runs


def _root(config: dict[str, Any], overrides: Sequence[str]) -> Path:
    """The comparison's folder: named by `run.name`, or else after the data."""
    named = any(override.startswith("run.name=") for override in overrides)
    run = build(RunConfig, config["run"], "run")
    return run.root / "compare" / (run.name if named else str(config["data"]["name"]))


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

    A run's main model has the run's label and the others `label/name`. A model that several runs train alike is one row: it is
    called after the run that it is the main model of, or else by its name alone, or with its backbone's where others have that
    name too; as one of its runs calls it where a run has that label.
    """
    alike: dict[tuple[str, ...], list[tuple[PlannedRun, str]]] = {}
    for run in runs:
        for name in run.models:
            alike.setdefault(run.identity(name), []).append((run, name))
    names = [places[0][1] for places in alike.values() if all(own != run.main for run, own in places)]
    kinds = [_kind(*places[0]) for places in alike.values()]
    runs_called = {run.label for run in runs}
    out: dict[tuple[str, str], str] = {}
    for places in alike.values():
        first, name = places[0]
        kind = _kind(first, name)
        label = next((run.label for run, own in places if own == run.main), None)
        if label is None and len(places) > 1 and kinds.count(kind) == 1:
            label = name if names.count(name) == 1 else kind
            label = None if label in runs_called else label
        out |= {(run.label, own): label or f"{first.label}/{name}" for run, own in places}
    return out


def _kind(run: PlannedRun, name: str) -> str:
    """A model's backbone and name, as `gru4rec/control`."""
    stage = next(stage for stage in run.stages if stage.name == name)
    return f"{getattr(stage.config, 'fit', stage.verb)}/{name}"
