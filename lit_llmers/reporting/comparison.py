"""Models of several runs beside each other: one table, with each against its reference."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_llmers.conf.schema import LOSS_READERS
from lit_llmers.errors import UserError
from lit_llmers.files import read_json, write_json
from lit_llmers.reporting.results import METRIC, Evaluated, Results
from lit_llmers.reporting.significance import holm, spread
from lit_llmers.reporting.tables import NONE, Rows, average, count, duration, metric_names, metric_rows, p_value, relative_gain
from lit_llmers.stages import OFTEN, PLACE

GAIN = ("difference", "relative", "low", "high", "relative_low", "relative_high", "p", "holm")
COLUMNS = (("all", "HR@10"), ("all", METRIC), ("head", METRIC), ("tail", METRIC))  # of the table; all others are in the CSV
RECORD = "compare.json"  # of which models a folder's comparison is


@dataclass(frozen=True)
class Contender:
    """A row of the comparison: the model that the run in `run` calls `name`."""

    label: str
    run: Path
    name: str


class Comparison(Evaluated):
    """Models of several runs, which were ranked on the same test rows.

    Args:
        contenders: the rows.
        pairs: labels of methods and their controls. Without any, the rows go from the best to the worst.
        reference: the label that all are compared with; None takes each method's control, or without pairs the best.

    Attributes:
        runs: those that the rows are of.
        reference: who all are compared with; None where each method has its control.

    Raises:
        UserError: a model is not evaluated, or the runs were not evaluated on the same rows in the same way.
    """

    def __init__(
        self, contenders: Sequence[Contender], pairs: Sequence[tuple[str, str]] = (), reference: str | None = None
    ) -> None:
        runs = {each.run: Results(each.run) for each in contenders}
        for each in contenders:
            if each.name not in runs[each.run].models:
                raise UserError(f"The run in {each.run} has not evaluated '{each.name}'. Give the comparison's command again.")
        first = next(iter(runs.values()))
        assert first.evaluation
        for run in runs.values():
            assert run.evaluation
            if run.evaluation["protocol"] != first.evaluation["protocol"]:
                raise UserError(
                    f"{run.run} and {first.run} were not evaluated on the same rows in the same way, so they cannot be "
                    "compared. Remove the older of the two folders and give the same command again."
                )
        rows = [_of(runs[each.run], each) for each in contenders]
        if not pairs:
            rows.sort(key=lambda seeds: -spread([model["metrics"]["all"][METRIC] for model in seeds])[0])
        models = [model for seeds in rows for model in seeds]
        super().__init__(first.data, first.evaluation | {"models": models}, first.folder)
        self.runs, self.contenders, self.pairs = list(runs.values()), list(contenders), list(pairs)
        self.evaluations = [runs[each.run].folder.name for each in contenders]
        self.best_is_reference = reference is None and not pairs
        self.reference = next(iter(self.models)) if self.best_is_reference else reference

    @property
    def subject(self) -> str:
        assert self.evaluation is not None
        protocol = self.evaluation["protocol"]
        against = "whole catalogue" if protocol["name"] == "full" else protocol["name"]
        seeds = max(map(len, self.models.values()))
        sample = f"{protocol['sample']:,} sampled of " if protocol.get("sample") else ""
        return (
            f"{super().subject}: {protocol['split']}, {against}, history {protocol['history']}, "
            f"{sample}{protocol['users']:,} users, {seeds} seed{'s' if seeds > 1 else ''}"
        )

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """All with the reference, or each method with its control."""
        if self.reference:
            pairs = [(name, self.reference) for name in self.models if name != self.reference]
        else:
            pairs = self.pairs
        return [pair for pair in pairs if pair[0] in self.models and pair[1] in self.models]

    @cached_property
    def gains(self) -> dict[tuple[str, str], dict[str, Any] | None]:
        """`compare` for each of `comparisons`, with `holm`, p corrected for their number."""
        gains = super().gains
        tested = {pair: gain for pair, gain in gains.items() if gain}
        corrected = holm([gain["p"] for gain in tested.values()])
        return gains | {pair: {**gain, "holm": p} for (pair, gain), p in zip(tested.items(), corrected, strict=True)}

    def gain(self, name: str) -> tuple[str | None, dict[str, Any] | None]:
        """The (first) reference of a model, and how it compares."""
        return next(((second, gain) for (first, second), gain in self.gains.items() if first == name), (None, None))

    @property
    def opponent(self) -> str:
        """Who the models are compared with, for the head of a column."""
        return self.reference or "its control"


def _of(run: Results, contender: Contender) -> list[dict[str, Any]]:
    """The contender's evaluated models, one for each seed, under its label and with the full paths of their ranks."""
    return [
        model | {"name": contender.label, "ranks": str((run.folder / model["ranks"]).resolve())}
        for model in run.models[contender.name]
    ]


def write_record(comparison: Comparison, root: Path) -> None:
    """Write `compare.json`, from which `read_comparison` makes the comparison again; its paths are relative to `root`."""
    models = [
        {"label": each.label, "run": os.path.relpath(each.run, root), "name": each.name, "evaluation": evaluation}
        for each, evaluation in zip(comparison.contenders, comparison.evaluations, strict=True)
    ]
    reference = None if comparison.best_is_reference else comparison.reference
    write_json(root / RECORD, {"models": models, "pairs": comparison.pairs, "reference": reference})


def read_comparison(root: str | Path) -> Comparison:
    """The comparison that `lit_llmers.compare` left in a folder, with every model's ranks.

    Raises:
        UserError: there is none in that folder, or a run of it is gone, not evaluated, or now that of other settings.
    """
    root = Path(root).expanduser()
    if not (root / RECORD).is_file():
        raise UserError(
            f"There is no comparison in {root}: {RECORD} is missing. Give a folder that `python -m lit_llmers.compare` made, "
            "as runs/compare/NAME; in one of an older version the same command writes it, and runs nothing that is done."
        )
    record = read_json(root / RECORD)
    contenders = [Contender(each["label"], root / each["run"], each["name"]) for each in record["models"]]
    comparison = Comparison(contenders, [(method, control) for method, control in record["pairs"]], record["reference"])
    for each, evaluation in zip(record["models"], comparison.evaluations, strict=True):
        if each.get("evaluation") != evaluation:
            raise UserError(
                f"The run in {root / each['run']} is not what it was when {root / RECORD} was written: now it has "
                f"{evaluation}. Give the comparison's command again."
            )
    return comparison


def comparison_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Header and rows of the table: quality, head and tail, against the reference, and cost."""
    titles = [metric if group == "all" else f"{metric} {group}" for group, metric in COLUMNS]
    against = f"against {comparison.opponent}"
    header = ["model", "seeds", *titles, against, "p (Holm)", "training", "parameters", "users/s"]
    rows = metric_rows(comparison, COLUMNS)
    for row, name in zip(rows, comparison.models, strict=True):
        _, gain = comparison.gain(name)
        compared = [relative_gain(gain), p_value(gain["holm"])] if gain else [NONE, NONE]
        row += [
            *(["reference", NONE] if name == comparison.reference else compared),
            duration(average(comparison, name, "training", "seconds")),
            count(average(comparison, name, "parameters", "total")),
            count(average(comparison, name, "inference", "users_per_second")),
        ]
    return header, rows


def terminal_columns(header: list[str], rows: Rows) -> tuple[list[str], Rows]:
    """The same for the terminal: without emphasis, seeds, the spread on head and tail, and the intervals."""
    kept = [column for column, title in enumerate(header) if title != "seeds"]
    narrow = [column for column, title in enumerate(header) if title.endswith((" head", " tail"))]

    def cell(column: int, text: str) -> str:
        text = text.replace("**", "").partition(" [")[0]
        return text.partition(" ±")[0] if column in narrow else text

    return [header[column] for column in kept], [[cell(column, row[column]) for column in kept] for row in rows]


def figures(comparison: Comparison) -> list[dict[str, Any]]:
    """Every figure of every model, unrounded, one flat mapping per model with the same keys in the same order."""
    assert comparison.evaluation is not None
    groups = list(comparison.evaluation["models"][0]["metrics"])
    out = []
    for name, models in comparison.models.items():
        row: dict[str, Any] = {"model": name, "seeds": len(models)}
        for group in groups:
            for metric in metric_names(comparison):
                if not any(metric in model["metrics"][group] for models in comparison.models.values() for model in models):
                    continue
                found = comparison.values(name, lambda model: model["metrics"][group].get(metric))  # noqa: B023
                title = metric if group == "all" else f"{metric} {group}"
                row[title], row[f"{title} sd"] = spread(found) if found else (None, None)
        against, gain = comparison.gain(name)
        row["against"] = against
        row |= {key: (gain or {}).get(key) for key in GAIN}
        row["training seconds"] = average(comparison, name, "training", "seconds")
        row["epochs"] = average(comparison, name, "training", "epochs")
        row["parameters"] = average(comparison, name, "parameters", "total")
        row["users per second"] = average(comparison, name, "inference", "users_per_second")
        out.append(row)
    return out


def training_table(comparison: Comparison) -> tuple[str, list[str], Rows]:
    """What each model is, on what rows and for how long it trained: what is the same for all, and a table of what is not."""
    found: dict[str, dict[str, str]] = {}
    runs = {run.run: run for run in comparison.runs}
    contenders = {each.label: each for each in comparison.contenders}
    for each in (contenders[label] for label in comparison.models):
        fit = runs[each.run].fits[each.name][0]
        if fit.summary.get("epochs"):  # what is counted is not trained
            settings = read_json(fit.folder / "config.json")["settings"]
            loss = {key: value for key, value in settings.get("loss", {}).items() if _is_read(key, settings["loss"]["kind"])}
            found[each.label] = {key: _flow(own) for key, own in (("model", settings.get("model")), ("loss", loss)) if own}
            found[each.label] |= {
                f"{part}.{key}": "null" if value is None else str(value)
                for part in ("sequences", "optimizer", "trainer")
                for key, value in settings.get(part, {}).items()
                if f"{part}.{key}" not in PLACE | OFTEN
            }
    keys = list(dict.fromkeys(key for settings in found.values() for key in settings))
    values = {key: [settings.get(key, NONE) for settings in found.values()] for key in keys}
    differ = [key for key in keys if len(set(values[key])) > 1]
    same = ", ".join(f"{key}={values[key][0]}" for key in keys if key not in differ)
    rows = [[label, *(values[key][place] for key in differ)] for place, label in enumerate(found)]
    return same, ["model", *differ], rows if differ else []


def _is_read(key: str, kind: str) -> bool:
    """Whether a loss of that kind reads that setting of its own."""
    return kind in LOSS_READERS.get(key, (kind,))


def _flow(settings: dict[str, Any]) -> str:
    """Settings in a cell, as YAML writes them in a line."""
    return f"{{{', '.join(f'{key}: {value}' for key, value in settings.items())}}}"


def notes(comparison: Comparison) -> list[str]:
    """How to read the table, in sentences."""
    assert comparison.evaluation is not None
    seeds = max(map(len, comparison.models.values()))
    groups = comparison.evaluation["groups"]
    tests = sum(gain is not None for gain in comparison.gains.values())
    lines = [
        "Means over seeds with their standard deviation; the best of a column is bold."
        if seeds > 1
        else "One seed only: how far training anew would move these figures is not known.",
        f"*head*: {groups['head']}; *tail*: {groups['tail']}.",
    ]
    if tests:
        lines.append(
            f"Against {comparison.opponent}: relative difference in {METRIC}, with its 95 % bootstrap interval over users. p: "
            f"paired t-test over the same users, {METRIC} averaged over the seeds first, corrected for {tests} "
            f"comparison{'s' if tests > 1 else ''} by Holm's method; it speaks of other users, not of training anew."
        )
    if comparison.best_is_reference and tests:
        lines.append(
            f"{comparison.reference} is the reference because it is the best on these very users, which flatters it a "
            "little; reference=NAME names one beforehand."
        )
    lines.append(
        "training: time in this model's own training steps, without loading, validation, and what is trained before it (a "
        "teacher, earlier phases). parameters: what serves, the item table included. users/s: encoding and ranking the test "
        "users on this machine."
    )
    return lines
