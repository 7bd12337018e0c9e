"""What a comparison leaves: `report.md` with its plot, `compare.csv`, `compare.json`, and a table in W&B."""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llmers.environment import recorded
from lit_llmers.files import atomic_write
from lit_llmers.reporting import sections, tables
from lit_llmers.reporting.comparison import (
    Comparison,
    comparison_table,
    figures,
    notes,
    terminal_columns,
    training_table,
    write_record,
)
from lit_llmers.reporting.plots import write_comparison
from lit_llmers.reporting.verdict import leak_warnings, short_warnings

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


def write_report(
    root: Path,
    comparison: Comparison,
    runs: Sequence[tuple[str, Path, str]],
    failed: Mapping[str, str],
    command: str,
    worked: bool = True,
) -> Path:
    """Write `report.md`, `compare.png`, `compare.csv`, `compare.json` and `environment.json`.

    Args:
        root: the comparison's folder.
        runs: label, folder and command of every run, failed ones too.
        failed: the errors of those that failed, by label.
        command: the comparison's own.
        worked: whether a run was not done before; if all were, `environment.json` stays as it is.

    Returns:
        the path of `report.md`.
    """
    machine = recorded(root, worked)
    write_comparison(comparison, root / "compare.png")
    _write_csv(comparison, root / "compare.csv")
    write_record(comparison, root)
    stages = [stage for run in comparison.runs for stage in run.stages]
    parts = [
        f"# Comparison on {comparison.data['name']}" + (f" ({root.name})" if root.name != comparison.data["name"] else ""),
        sections.data_line(comparison),
        *leak_warnings(comparison.runs),
        *short_warnings(comparison.runs),
        _failures(failed),
        tables.markdown(*comparison_table(comparison)),
        "\n".join(f"- {note}" for note in [*notes(comparison), *sections.shared_times(stages)]),
        f"![{comparison.subject}](compare.png)",
        *_differences(comparison),
        "## Every metric",
        tables.main_table(comparison),
        *_groups(comparison),
        *_training(comparison),
        "## Size and speed",
        tables.cost_table(comparison),
        sections.protocol_section(comparison),
        sections.data_section(comparison),
        "## Runs",
        "\n".join(_run(root, *run) for run in runs),
        "## To do it again",
        f"```\n{command}\n```",
        sections.machine(machine),
    ]
    path = root / "report.md"
    with atomic_write(path) as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def summary_table(comparison: Comparison) -> str:
    """The table as plain text for the terminal, with the warnings."""
    found = [*leak_warnings(comparison.runs), *short_warnings(comparison.runs)]
    warnings = [each.replace("**", "").replace("> ", "") for each in found]
    return "\n\n".join([comparison.subject, tables.plain(*terminal_columns(*comparison_table(comparison))), *warnings])


def publish(root: Path, comparison: Comparison, loggers: "Iterable[Logger]") -> None:
    """Put the table and the plot into W&B, where one of `loggers` is for W&B."""
    from lit_llmers.loggers import log_images, log_table

    loggers = list(loggers)
    rows = figures(comparison)
    log_table(loggers, "compare/models", list(rows[0]), [list(row.values()) for row in rows])
    log_images(loggers, {"compare/plot": root / "compare.png"})


def _write_csv(comparison: Comparison, path: Path) -> None:
    rows = figures(comparison)
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _failures(failed: Mapping[str, str]) -> str:
    if not failed:
        return ""
    lines = [f"> - {label}: {error}" for label, error in failed.items()]
    head = "> **These runs failed; the same command tries them again.** What they had evaluated stands below all the same."
    return "\n".join([head, ">", *lines])


def _differences(comparison: Comparison) -> list[str]:
    if not comparison.comparisons:
        return []
    return [
        "## Differences",
        "The intervals are of each difference alone; only p (Holm) is corrected for the number of comparisons.",
        tables.gain_table(comparison),
    ]


def _groups(comparison: Comparison) -> list[str]:
    assert comparison.evaluation is not None
    parts = []
    for title, groups in (("Head and tail items", ("head", "tail")), ("Short and long histories", ("short", "long"))):
        definitions = "; ".join(f"*{group}*: {comparison.evaluation['groups'][group]}" for group in groups)
        parts += [f"### {title}", f"{definitions}.", tables.group_table(comparison, groups)]
    return parts


def _training(comparison: Comparison) -> list[str]:
    same, header, rows = training_table(comparison)
    parts = ["## Training settings"] if same or rows else []
    if rows:
        parts += [f"The models differ in {', '.join(f'`{key}`' for key in header[1:])}.", tables.markdown(header, rows)]
    return parts + ([f"The same for all: `{same}`."] if same else [])


def _run(root: Path, label: str, folder: Path, command: str) -> str:
    report = Path(os.path.relpath(folder, root)) / "report.md"
    return f"- [{label}]({report}): `{command}`"
