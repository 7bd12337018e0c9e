"""`python -m lit_llmers.report run=DIR`: a run's report, `report.md`, with its tables and plots.

Everything in it is worked out from what the stages left on disk, so it can be written at any time, also of a run that
is not finished, and again.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llmers.errors import UserError, nearest
from lit_llmers.files import atomic_write, read_json
from lit_llmers.processes.locks import alone
from lit_llmers.reporting import sections, tables
from lit_llmers.reporting.plots import write_plots
from lit_llmers.reporting.results import METRIC, Results
from lit_llmers.reporting.summary import figures
from lit_llmers.reporting.verdict import leak_warnings, short_warnings, teacher_warnings, verdict

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

USAGE = """usage: python -m lit_llmers.report run=DIR

Writes a run's report.md with its tables and plots again, from what its stages left in DIR, such as runs/slmrec/default; the
run need not be finished."""
PATIENCE = 60  # seconds that it waits for a run that writes its own report
CAPTIONS = {
    "comparison": "Every model on the test users",
    "popularity": "Where the gain comes from: by how often the target was seen in training",
    "validation": "Validation over the epochs",
    "losses": "Loss terms",
}


def write_report(results: Results) -> Path:
    """Write `report.md`, `plots/*.png` and the merged `metrics.jsonl` of a run whose folder is held; the path of the report."""
    plots = write_plots(results)
    parts = [_title(results), sections.data_line(results), *leak_warnings([results]), _state(results)]
    if results.models:
        parts += [verdict(results), *teacher_warnings(results), *short_warnings([results]), _results(results), _cost(results)]
    elif any(stage.done for stage in results.stages if stage.verb in ("fit", "tune")):
        parts += ["## Training so far", tables.training_table(results), *short_warnings([results])]
    parts += [_plots(plots), sections.protocol_section(results), sections.data_section(results), _text(results)]
    parts.append(_reproducibility(results))
    path = results.run / "report.md"
    with atomic_write(path) as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    _merge_metrics(results)
    return path


def summary_table(results: Results) -> str:
    """The results of a run as plain text for the terminal, with the verdict."""
    parts = [tables.terminal_table(results)]
    if results.generated:
        parts.append(f"The data set {results.data['name']} is generated: the figures say nothing about real users.")
    if note := sections.sampled_note(results):
        parts.append(note)
    parts += leak_warnings([results])
    if results.models:
        parts += [verdict(results), *teacher_warnings(results)]
    parts += short_warnings([results])
    return "\n\n".join(part.replace("**", "").replace("> ", "") for part in parts if part)


def publish(results: Results, loggers: "Iterable[Logger]") -> None:
    """Put the report's plots, its main table and its figures into W&B, where one of `loggers` is for W&B."""
    from lit_llmers.loggers import log_images, log_summary, log_table

    loggers = list(loggers)
    log_images(loggers, {f"report/{path.stem}": path for path in sorted((results.run / "plots").glob("*.png"))})
    if results.models:
        names = tables.metric_names(results)
        rows = [
            [model["name"], model["seed"], *(model["metrics"]["all"][name] for name in names)]
            for models in results.models.values()
            for model in models
        ]
        log_table(loggers, "report/models", ["model", "seed", *names], rows)
        log_summary(loggers, figures(results))


# ---- the head of the report ------------------------------------------------------------------------------------------


def _title(results: Results) -> str:
    return f"# {results.about['recipe']} on {results.data.get('name', 'data not yet prepared')} ({results.about['run']})"


def _state(results: Results) -> str:
    missing = [f"{stage.name} (seed {stage.seed})" for stage in results.stages if not stage.done]
    if not missing:
        return ""
    return f"**This run is not finished.** Not done: {', '.join(missing)}. The same command goes on from here."


# ---- results ---------------------------------------------------------------------------------------------------------


def _results(results: Results) -> str:
    assert results.evaluation is not None
    note = sections.sampled_note(results)
    parts = [
        "## Results on the test users",
        " ".join(filter(None, ["Means over seeds with their standard deviation; the best of a column is bold.", note])),
        tables.main_table(results),
    ]
    if results.comparisons:
        parts += [
            "### Gains",
            f"Paired over the same users, {METRIC} averaged over the seeds first. The interval is a bootstrap over "
            "users, p is of the paired t-test; both speak of other users, not of training anew, which the differences "
            "by seed show.",
            tables.gain_table(results),
        ]
    users = {group: figures["users"] for group, figures in results.evaluation["models"][0]["metrics"].items()}
    for title, groups in (("Head and tail items", ("head", "tail")), ("Short and long histories", ("short", "long"))):
        definitions = [f"*{group}*: {results.evaluation['groups'][group]} ({users[group]:,} users)" for group in groups]
        parts += [f"### {title}", "; ".join(definitions) + ".", tables.group_table(results, groups)]
    return "\n\n".join(parts)


def _cost(results: Results) -> str:
    measured = " ".join(["Measured in this run, on the machine named below.", *sections.shared_times(results.stages)])
    parts = ["## Size and speed", measured, tables.cost_table(results)]
    ratios = tables.ratio_table(results)
    if ratios:
        parts.append(ratios)
        note = (results.about.get("paper") or {}).get("note")
        parts += [str(note).strip()] if note else []
    return "\n\n".join(parts)


def _plots(plots: dict[str, Path]) -> str:
    if not plots:
        return ""
    lines = []
    for name, path in plots.items():
        kind, _, rest = name.partition("-")
        lines.append(f"![{CAPTIONS[kind]}{': ' + rest if rest else ''}]({path.parent.name}/{path.name})")
    return "\n\n".join(["## Plots", *lines])


# ---- how it was done -------------------------------------------------------------------------------------------------


def _text(results: Results) -> str:
    parts = []
    if encoded := tables.encode_table(results):
        parts += ["Texts and tokens are those that a stage read itself, not those that it found encoded.", encoded]
    if said := tables.said_table(results):
        parts += ["What was said after a history is a title of the catalogue, or stands for those nearest to it.", said]
    return "\n\n".join(["## Text", *parts]) if parts else ""


def _reproducibility(results: Results) -> str:
    parts = ["## To do it again", f"```\n{results.about['command']}\n```"]
    path = results.run / "environment.json"
    if path.is_file():
        parts.append(sections.machine(read_json(path)))
    total = tables.duration(sum(stage.seconds or 0 for stage in results.stages))
    parts.append(f"`config.yaml` holds every setting. The stages took {total}:")
    return "\n\n".join([*parts, tables.stage_table(results)])


def _merge_metrics(results: Results) -> None:
    """All stages' metrics in one `metrics.jsonl`, each line with its stage and seed."""
    with atomic_write(results.run / "metrics.jsonl") as temporary, open(temporary, "w") as file:
        for stage in results.stages:
            for entry in stage.metrics:
                file.write(json.dumps({"stage": stage.name, "seed": stage.seed, **entry}) + "\n")


def main(arguments: Sequence[str]) -> int:
    """Write the report of the run that `run=DIR` names; return the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        given = dict(argument.partition("=")[::2] for argument in arguments)
        for key in given:
            if key != "run":
                raise UserError(f"Unknown argument '{key}'.{nearest(key, ['run'])} Usage: python -m lit_llmers.report run=DIR")
        if not given.get("run"):
            raise UserError("No run given. Usage: python -m lit_llmers.report run=DIR, as run=runs/RECIPE/NAME")
        results = Results(Path(given["run"]))
        with alone(results.run, patience=PATIENCE, deep=False):
            path = write_report(results)
        print(f"{summary_table(results)}\n\nReport: {path}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
