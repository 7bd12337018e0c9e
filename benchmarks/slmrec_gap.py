"""When does SLMRec pay? Its gain over the control as a function of how much better the teacher is than that control.

    python benchmarks/slmrec_gap.py data=amazon-beauty data.root=FOLDER 'seeds=[0,1,2]' [points=default,ids,...]

Runs the recipe once for every point (a named list of overrides; stages that points share are trained once, and the same
command goes on where it was stopped) and writes `docs/slmrec-<data>.md` and `.png`: a row and a dot for each point.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from lit_llmers import recipes
from lit_llmers.errors import UserError, unknown
from lit_llmers.files import atomic_write


def feature(weight: float = 1.0, decay: int = 10) -> str:
    """Feature distillation with the paper's two weights times `weight`, in YAML."""
    return f"{{feature_distillation: {{from: signals, cosine: 1.0, l2: 0.1, weight: {weight}, decay_epochs: {decay}}}}}"


def deep(blocks: int = 4, decay: int = 10) -> str:
    """Deep supervision of this many blocks, in YAML."""
    return f"{{deep_supervision: {{blocks: {blocks}, weight: 1.0, share: 0.1, decay_epochs: {decay}}}}}"


POINTS: dict[str, tuple[str, list[str]]] = {
    "default": ("the recipe: teacher of 8 layers with item text, student of 4", []),
    "constant": (
        "the paper's constant weights",
        [f"stages.student.callbacks=[{feature(decay=0)}, {deep(decay=0)}]"],
    ),
    "feature-only": ("without deep supervision", [f"stages.student.callbacks=[{feature()}]"]),
    "deep-only": ("deep supervision alone, no teacher", [f"stages.student.callbacks=[{deep()}]"]),
    "weak": (
        "feature distillation alone, a tenth of its weight, constant",
        [f"stages.student.callbacks=[{feature(0.1, decay=0)}]"],
    ),
    "ids": ("teacher reads ids alone, as in the paper", ["stages.teacher.items=[item_embeddings]"]),
    "no-dropout": (
        "no dropout in teacher, student and control",
        ["stages.teacher.model.dropout=0.0", "student.model.dropout=0.0"],
    ),
    "ids-no-dropout": (
        "ids alone and no dropout",
        ["stages.teacher.items=[item_embeddings]", "stages.teacher.model.dropout=0.0", "student.model.dropout=0.0"],
    ),
    "shallow": (
        "student of 2 layers, 2 blocks",
        [
            "stages.signals.blocks=2",
            "student.model.layers=2",
            f"stages.student.callbacks=[{feature()}, {deep(2)}]",
        ],
    ),
    "wide": (
        "teacher of twice the width, with projectors",
        [
            "stages.teacher.model.base.config.hidden_size=128",
            "stages.teacher.model.base.config.intermediate_size=256",
            "stages.teacher.model.base.config.num_attention_heads=8",
            "stages.teacher.model.base.config.num_key_value_heads=8",
        ],
    ),
    "text-student": ("student and control read the text too", ["stages.student.items=[item_embeddings,text]"]),
}


def main(arguments: list[str]) -> int:
    """Run the points and write the record."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\npoints: {', '.join(POINTS)}")
        return 0
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    chosen = [a.partition("=")[2].split(",") for a in arguments if a.startswith("points=")]
    overrides = ["logger=csv", *(a for a in arguments if not a.startswith("points="))]
    names = chosen[-1] if chosen else list(POINTS)
    try:
        rows = [measure(name, overrides) for name in names]
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    data = rows[0]["data"]
    write_record(data, rows, arguments)
    return 0


def measure(name: str, overrides: list[str]) -> dict[str, Any]:
    """Run one point and return its figures."""
    from lit_llmers.composing.resolving import resolve
    from lit_llmers.fit import describe_run, quiet
    from lit_llmers.processes.locks import alone
    from lit_llmers.reporting.results import Results
    from lit_llmers.running import run

    if name not in POINTS:
        raise unknown("point", name, POINTS)
    quiet()
    config = recipes.compose("slmrec", [*overrides, *POINTS[name][1]])
    config["run"]["name"] = f"gap-{config['data']['name']}"
    stages = resolve(config)
    folder = stages[0].run.folder
    worked = not all(stage.done for stage in stages)
    with alone(folder, deep=False):
        run(stages, "evaluate")
        describe_run(folder, config, overrides, stages, worked)
    results = Results(folder)
    figures = {
        model: [sum(row.mean() for row in results.per_row(model)) / len(results.models[model])]
        for model in ("teacher", "student", "control", "item_embeddings")
    }
    return {
        "name": name,
        "data": config["data"]["name"],
        "seeds": len(results.models["student"]),
        "figures": {model: float(values[0]) for model, values in figures.items()},
        "gap": results.compare("teacher", "control"),
        "gain": results.compare("student", "control"),
    }


def write_record(data: str, rows: list[dict[str, Any]], arguments: list[str]) -> None:
    """Write the table and the plot of one data set."""
    docs = Path(__file__).resolve().parent.parent / "docs"
    _plot(data, rows, docs / f"slmrec-{data}.png")
    lines = [
        f"# SLMRec on {data}: gain of the student as a function of the teacher's lead",
        "",
        f"`python benchmarks/slmrec_gap.py {' '.join(arguments)}`",
        "",
        f"Test NDCG@10, whole catalogue, history masked, selection on validation. Seeds of student and control: "
        f"{rows[0]['seeds']}, of the teacher: 1. Percentages are relative to the control; brackets: 95 % paired bootstrap "
        "over users, after averaging over seeds.",
        "",
        "| point | SASRec | teacher | control | student | teacher over control | student over control | by seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figure = row["figures"]
        seeds = ", ".join(f"{100 * value / figure['control']:+.1f} %" for value in row["gain"]["by_seed"])
        lines.append(
            f"| {POINTS[row['name']][0]} | {figure['item_embeddings']:.4f} | {figure['teacher']:.4f} | "
            f"{figure['control']:.4f} | {figure['student']:.4f} | {_relative(row, 'gap')} | {_relative(row, 'gain')} | "
            f"{seeds} |"
        )
    lines += ["", f"![gain against gap](slmrec-{data}.png)", ""]
    with atomic_write(docs / f"slmrec-{data}.md") as temporary:
        temporary.write_text("\n".join(lines))
    print("\n".join(lines))


def _percent(row: dict[str, Any], what: str) -> tuple[float, float, float]:
    """Relative difference and its interval, in percent of the control."""
    control = row["figures"]["control"]
    return tuple(100 * row[what][key] / control for key in ("difference", "low", "high"))  # type: ignore[return-value]


def _relative(row: dict[str, Any], what: str) -> str:
    middle, low, high = _percent(row, what)
    return f"{middle:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _plot(data: str, rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for row, marker in zip(rows, "osD^vP*Xdp", strict=False):
        gap, gain = _percent(row, "gap"), _percent(row, "gain")
        axes.errorbar(
            gap[0],
            gain[0],
            xerr=[[gap[0] - gap[1]], [gap[2] - gap[0]]],
            yerr=[[gain[0] - gain[1]], [gain[2] - gain[0]]],
            fmt=marker,
            markersize=7,
            capsize=3,
            label=POINTS[row["name"]][0],
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(
        xlabel="teacher over control, % of test NDCG@10",
        ylabel="student over control, % of test NDCG@10",
        title=f"SLMRec on {data}: what the student gains as the teacher leads\n(bars: 95 % over users)",
    )
    axes.legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
