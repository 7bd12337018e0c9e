"""The tables of a run's report, in Markdown, and the one for the terminal."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lit_llmers.reporting.results import METRIC, Evaluated, Results
from lit_llmers.reporting.significance import spread

Rows = list[list[str]]
NONE = "-"


def markdown(header: Sequence[str], rows: Rows) -> str:
    """A Markdown table: first column left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def plain(header: Sequence[str], rows: Rows) -> str:
    """A table for the terminal: first column left, the others right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def metric_names(results: Evaluated) -> list[str]:
    """HR@k for every k, NDCG@k for every k but 1, where it is HR@1, and MRR; Recall@k and coverage@10 where they are known."""
    assert results.evaluation is not None
    ks = results.evaluation["ks"]
    known = results.evaluation["models"][0]["metrics"]["all"]
    more = [name for name in (*(f"Recall@{k}" for k in ks), "coverage@10") if name in known]
    return [f"HR@{k}" for k in ks] + [f"NDCG@{k}" for k in ks if k > 1] + ["MRR", *more]


def main_table(results: Evaluated) -> str:
    """Every metric of every model: mean and standard deviation over seeds, the best mean bold."""
    names = metric_names(results)
    return markdown(["model", "seeds", *names], metric_rows(results, [("all", name) for name in names]))


def group_table(results: Evaluated, groups: Sequence[str]) -> str:
    """Some metrics on groups of the test users; coverage where it is known."""
    assert results.evaluation is not None
    known = results.evaluation["models"][0]["metrics"][groups[0]]
    metrics = ["HR@10", METRIC, *(["coverage@10"] if "coverage@10" in known else [])]
    columns = [(group, metric) for group in groups for metric in metrics]
    header = ["model", "seeds", *(f"{metric} {group}" for group, metric in columns)]
    return markdown(header, metric_rows(results, columns))


def metric_rows(results: Evaluated, columns: Sequence[tuple[str, str]]) -> Rows:
    """Model, number of seeds and, for each column, a (group, metric), mean and standard deviation, the best mean bold."""
    rows = [[name, str(len(models))] for name, models in results.models.items()]
    for group, metric in columns:
        found = [results.values(name, lambda model: model["metrics"][group].get(metric)) for name in results.models]  # noqa: B023
        means = [spread(values)[0] if values else None for values in found]
        best = max((mean for mean in means if mean is not None), default=None)
        for row, values, mean in zip(rows, found, means, strict=True):
            cell = with_spread(values)
            row.append(f"**{cell}**" if mean and mean == best and len(rows) > 1 else cell)
    return rows


def with_spread(values: list[float]) -> str:
    """Mean and standard deviation, `0.0557 ± 0.0008`; the one value there is, or a dash for none."""
    if not values:
        return NONE
    mean, deviation = spread(values)
    return f"{mean:.4f}" + (f" ± {deviation:.4f}" if deviation is not None else "")


def gain_table(results: Evaluated) -> str:
    """Every comparison that matters: difference, relative, interval over users, p, and the difference of each seed."""
    corrected = any("holm" in gain for gain in results.gains.values() if gain)
    tests = ["p", "p (Holm)"] if corrected else ["p"]
    header = ["comparison", f"{METRIC} difference", "relative", "95 % interval", *tests, "by seed"]
    rows = []
    for (first, second), gain in results.gains.items():
        if gain is None:
            rows.append([f"{first} against {second}", *[NONE] * (len(header) - 1)])
            continue
        seeds = ", ".join(f"{difference:+.4f}" for difference in gain["by_seed"])
        interval = f"[{gain['low']:+.4f}, {gain['high']:+.4f}]"
        rows.append(
            [
                f"{first} against {second}",
                f"{gain['difference']:+.4f}",
                relative_gain(gain),
                interval,
                *(p_value(gain[key]) for key in (["p", "holm"] if corrected else ["p"])),
                seeds,
            ]
        )
    return markdown(header, rows)


def cost_table(results: Evaluated) -> str:
    """Size and speed of every model, means over seeds; no speed of training where nothing was trained."""
    header = [
        "model",
        "layers",
        "width",
        "parameters at serving",
        "parameters trained",
        "epochs",
        "training",
        "training targets/s",
        "inference users/s",
    ]
    rows = []
    for name in results.models:
        seconds = average(results, name, "training", "seconds")
        speed = training_speed(results, name)
        rows.append(
            [
                name,
                count(average(results, name, "parameters", "layers")),
                count(average(results, name, "parameters", "width")),
                count(average(results, name, "parameters", "total")),
                count(average(results, name, "parameters", "trainable")),
                f"{average(results, name, 'training', 'epochs'):.0f}",
                duration(seconds),
                count(speed) if speed else NONE,
                count(average(results, name, "inference", "users_per_second")),
            ]
        )
    return markdown(header, rows)


def ratio_table(results: Results) -> str:
    """Each method against its teacher: parameters, training speed, inference speed; beside what the paper reports."""
    paper = results.about.get("paper") or {}
    header = ["method : teacher", "share of the parameters", "layers", "training speed", "inference speed"]
    rows = []
    for method in dict.fromkeys(method for method, _ in results.pairs):
        if results.teacher is None:
            continue
        both = (method, results.teacher)
        total, layers = ([average(results, name, "parameters", key) for name in both] for key in ("total", "layers"))
        training = [training_speed(results, name) for name in both]
        inference = [average(results, name, "inference", "users_per_second") for name in both]
        rows.append(
            [
                f"{method} : {results.teacher}, this run",
                f"{100 * total[0] / total[1]:.0f} %" if total[1] else NONE,
                f"{layers[0]:.0f} : {layers[1]:.0f}",
                *(f"{ours / theirs:.1f} x" if ours and theirs else NONE for ours, theirs in (training, inference)),
            ]
        )
    if rows and paper:
        rows.append(["the paper", *(str(paper.get(key, NONE)) for key in ("parameters", "layers", "training", "inference"))])
    return markdown(header, rows) if rows else ""


def stage_table(results: Results) -> str:
    """Every stage: state, time and folder, and its device where several machines took part."""
    several = len({stage.device for stage in results.stages if stage.done}) > 1
    rows = [
        [
            stage.name,
            str(stage.seed),
            stage.verb,
            duration(stage.seconds) if stage.done else "not done",
            f"`{stage.folder.name}`",
            commit(stage.git) if stage.git else NONE,
            *[stage.device or NONE][:several],
        ]
        for stage in results.stages
    ]
    return markdown(["stage", "seed", "does", "time", "folder", "commit", *["device"][:several]], rows)


def encode_table(results: Results) -> str:
    """Every encode stage that is done: who has no vector, and how fast texts were read; a dash where none were read here."""
    header = ["stage", "seed", "encoder", "items", "items without a vector", "users", "users without a vector"]
    rows = []
    for stage in results.stages:
        if stage.verb != "encode" or not stage.done:
            continue
        found = stage.summary
        tables = [
            count(found[key]) if key in found else NONE for key in ("items", "without_text", "users", "users_without_vector")
        ]
        work = [count(found[key]) if found.get(key) else NONE for key in ("texts", "tokens", "tokens_per_second")]
        rows.append([stage.name, str(stage.seed), found.get("model", "TF-IDF"), *tables, *work, stage.device or NONE])
    return markdown([*header, "texts", "tokens", "tokens/s", "device"], rows) if rows else ""


def said_table(results: Results) -> str:
    """Every stage that asked a language model for titles: how many it said, how often one of the catalogue, and how fast."""
    header = ["stage", "seed", "titles asked for", "of the catalogue", "tokens read/s", "tokens said/s", "device"]
    rows = []
    for stage in results.stages:
        if "said_is_a_title" in (said := stage.summary):
            exact = f"{100 * said['said_is_a_title']:.0f} %"
            speeds = [count(said[key]) if key in said else NONE for key in ("prompt_tokens_per_second", "tokens_per_second")]
            rows.append([stage.name, str(stage.seed), count(said["generated_titles"]), exact, *speeds, stage.device or NONE])
    return markdown(header, rows) if rows else ""


def commit(git: dict[str, Any]) -> str:
    """A checkout's commit, and whether it had changes of its own."""
    return f"`{git['commit'][:12]}`{' with local changes' if git['dirty'] else ''}"


def training_table(results: Results) -> str:
    """What the trainings reported, for a run that was not evaluated."""
    rows = []
    for name, stages in results.fits.items():
        for stage in stages:
            score = stage.summary.get("best", {}).get(f"val/{METRIC}")
            best = NONE if score is None else f"{score:.4f}"
            rows.append([name, str(stage.seed), str(stage.summary.get("epochs", NONE)), best])
    return markdown(["model", "seed", "epochs", f"best validation {METRIC}"], rows)


def terminal_table(results: Results) -> str:
    """The short table at the end of a run."""
    if not results.models:
        return plain(
            ["stage", "seed", "time"],
            [[stage.name, str(stage.seed), duration(stage.seconds) if stage.done else "not done"] for stage in results.stages],
        )
    rows = []
    for name in results.models:
        metrics = [with_spread(results.values(name, _metric(metric))) for metric in ("HR@10", METRIC, "MRR")]
        sizes = [count(average(results, name, "parameters", key)) for key in ("layers", "total")]
        rows.append([name, *sizes, *metrics, count(average(results, name, "inference", "users_per_second"))])
    return plain(["model", "layers", "parameters", "HR@10", METRIC, "MRR", "users/s"], rows)


def _metric(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda model: model["metrics"]["all"].get(name)


def average(results: Evaluated, name: str, part: str, key: str) -> float:
    """A figure of a model's `parameters`, `training` or `inference`, mean over its seeds."""
    return float(np.average(results.values(name, lambda model: model[part][key])))


def training_speed(results: Evaluated, name: str) -> float | None:
    """Training targets per second of a model, mean over its seeds; None where an older version did not count them."""
    found = results.values(name, lambda model: model["training"].get("targets_per_second"))
    return float(np.mean(found)) if found else None


def percent(share: float | None) -> str:
    """A signed share, `+4.2 %`."""
    return NONE if share is None else f"{100 * share:+.1f} %"


def relative_gain(gain: dict[str, Any]) -> str:
    """A gain with its 95 % interval, both as shares of the other's mean: `+4.2 % [+1.0, +7.4]`."""
    interval = [gain[key] for key in ("relative_low", "relative_high")]
    bounds = "" if None in interval else " [" + ", ".join(f"{100 * share:+.1f}" for share in interval) + "]"
    return percent(gain["relative"]) + bounds


def p_value(p: float | None) -> str:
    """A p-value without false precision."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(number: float) -> str:
    """A number for the eye: `12`, `3,400`, `1.24 M`, `6.74 B`."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds for the eye: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
