"""Plots as PNG files. Of a run: losses, validation, comparison, gain by popularity. Of many runs: levels and gains."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_llmers.files import atomic_write
from lit_llmers.reporting.comparison import Comparison
from lit_llmers.reporting.results import METRIC, Evaluated, Results, StageResult
from lit_llmers.reporting.significance import paired_test

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999933")  # Okabe and Ito, and olive
VALIDATION = f"val/{METRIC}"
CHANCE, GAIN, LOSS = "#888888", COLOURS[0], COLOURS[1]  # of a difference; models that stand beside it have their own colours
HIGHEST = 200  # per cent of relative gain that has a dot; what is above is said in words, at the axis's end
HEADROOM = 1.05  # of an axis over its highest dot, which its edge would cut
SMOOTHING = 40  # a curve is averaged over a window of 1/40 of its points
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "font.size": 10,
}


def write_plots(results: Results) -> dict[str, Path]:
    """Write every plot that the run has the numbers for to `<run>/plots`, and remove those of an earlier state.

    Returns:
        file by name; the names are the files' own, without ending.
    """
    folder = results.run / "plots"
    folder.mkdir(exist_ok=True)
    written: dict[str, Path] = {}
    with _style():
        for name, figure in _figures(results):
            written[name] = folder / f"{name}.png"
            _save(figure, written[name])
    for old in set(folder.glob("*.png")) - set(written.values()):
        old.unlink()
    return written


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the plot of a comparison: every model's level, and its paired difference to its reference."""
    with _style(), _figure(comparison, columns=2, height=1.0 + 0.36 * len(comparison.models)) as (figure, (left, right)):
        _contenders(comparison, left)
        _differences(comparison, right)
        _save(figure, path)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        yield


def _save(figure: "Figure", path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _figures(results: Results) -> Iterator[tuple[str, "Figure"]]:
    if results.models:
        with _figure(results, height=0.8 + 0.5 * len(results.models)) as (figure, axes):
            _comparison(results, axes)
            yield "comparison", figure
    for method, control in results.pairs:
        gains = _gains(results, method, control)
        if gains:
            with _figure(results, columns=2) as (figure, (left, right)):
                _levels(results, gains, method, control, left)
                _gain(gains, method, control, right)
                _left_out(results, method, figure)
                yield f"popularity-{method}-{control}", figure
    if any(VALIDATION in entry for stages in results.fits.values() for stage in stages for entry in stage.metrics):
        with _figure(results) as (figure, axes):
            _validation(results, axes)
            yield "validation", figure
    for name, stages in results.fits.items():
        if any("loss" in entry for stage in stages for entry in stage.metrics):
            with _figure(results) as (figure, axes):
                _losses(name, stages, axes)
                yield f"losses-{name}", figure


@contextmanager
def _figure(results: Evaluated, columns: int = 1, height: float = 4.0) -> Iterator[tuple["Figure", Any]]:
    """A figure and its axes; a subtitle says what data it is of, and that it is generated where it is."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=(5.6 * columns + 2.0 * (columns == 1), height + 0.4), layout="constrained"
    )
    figure.suptitle(results.subject, fontsize=9, color="#555555", x=0.01, ha="left")
    try:
        yield figure, axes
    finally:
        pyplot.close(figure)


# ---- training -------------------------------------------------------------------------------------------------------


def _losses(name: str, stages: list[StageResult], axes: "Axes") -> None:
    """Every loss term over the steps: the first seed strong, the others thin, and one step alone a dot."""
    keys = {key for stage in stages for entry in stage.metrics for key in entry if _is_loss(key)}
    if keys == {"loss", "loss/task"}:
        keys = {"loss"}  # the two are one curve
    ends: list[float] = []
    for number, term in enumerate(sorted(keys)):  # the total first, then each term before its parts
        colour = "black" if term == "loss" else COLOURS[(number - 1) % len(COLOURS)]
        for index, stage in enumerate(stages):
            points = [(entry["step"], entry[term]) for entry in stage.metrics if entry.get(term) is not None]
            if not points:
                continue
            steps, values = np.array(points, dtype=float).T
            window = max(1, len(values) // SMOOTHING)
            smooth = _rolling_mean(values, window)
            ends += [smooth[0], smooth[-1]]
            strong = {"linewidth": 1.6, "label": _term(term), "linestyle": "-" if number <= len(COLOURS) else "--"}
            look = {"linewidth": 0.8, "alpha": 0.35} if index else strong
            axes.plot(steps, smooth, color=colour, marker="o" if len(steps) == 1 else "", **look)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    if ends and min(ends) > 0 and max(ends) > 20 * min(ends):
        _logarithmic(axes)
    seeds = f"; first of {len(stages)} seeds strong" if len(stages) > 1 else ""
    several = len(keys) > 1
    title = f"Training loss of {name}{' by term' if several else ''} (moving average{seeds})"
    weights = "; terms before their weights" if several else ""
    axes.set(title=title, xlabel="optimiser step", ylabel=f"loss, mean over targets{weights}")
    if several:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _logarithmic(axes: "Axes") -> None:
    """A logarithmic y axis with plain numbers: 0.6 and not 6 x 10^-1. Which of the minor ticks have one stays Matplotlib's."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(Plain())


def _colour(results: Results, name: str) -> str:
    """A model's colour, the same in every plot."""
    return COLOURS[list(results.fits).index(name) % len(COLOURS)]


def _is_loss(key: str) -> bool:
    return key == "loss" or key.startswith("loss/")


def _term(key: str) -> str:
    return "total" if key == "loss" else key.removeprefix("loss/").replace("/", ": ").replace("_", " ")


def _rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` points, over fewer at the ends: `[n]`."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _validation(results: Results, axes: "Axes") -> None:
    """The validation metric over the epochs: seeds thin, their mean strong, the best epoch of the mean marked."""
    for name, stages in results.fits.items():
        colour = _colour(results, name)
        curves = [{e["epoch"] + 1: e[VALIDATION] for e in stage.metrics if e.get(VALIDATION) is not None} for stage in stages]
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        if len(curves) > 1:
            for curve in curves:
                axes.plot(list(curve), list(curve.values()), color=colour, linewidth=0.8, alpha=0.4)
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        mean = [float(np.mean([curve[epoch] for curve in curves])) for epoch in shared]
        seeds = f" (mean of {len(curves)} seeds)" if len(curves) > 1 else ""
        axes.plot(shared, mean, color=colour, linewidth=1.8, label=f"{name}{seeds}")
        best = int(np.argmax(mean))
        axes.plot(shared[best], mean[best], "o", color=colour, markersize=5)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_ylim(bottom=0)
    axes.set(title=f"Validation {METRIC} of every model (dot: best epoch)", xlabel="epoch", ylabel=f"validation {METRIC}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


# ---- test -----------------------------------------------------------------------------------------------------------


def _comparison(results: Results, axes: "Axes") -> None:
    """One bar for each model: mean over seeds and users, 95 % bootstrap interval over users, a dot for each seed."""
    names = list(results.models)
    for place, name in enumerate(names):
        rows = results.per_row(name)
        level, low, high = _level(rows, results.user)
        axes.barh(place, level, height=0.6, color=_colour(results, name), alpha=0.75)
        if low < high:
            axes.errorbar(level, place, xerr=[[level - low], [high - level]], color="black", capsize=4, linewidth=1.2)
        if len(rows) > 1:
            axes.plot([row.mean() for row in rows], [place + 0.18] * len(rows), "o", color="black", markersize=3)
        axes.annotate(f"{level:.4f}", (high, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    dots = "; dot: one seed" if max(map(len, results.models.values())) > 1 else ""
    axes.set(title=f"Test {METRIC} (whisker: 95 % interval over users{dots})", xlabel=f"test {METRIC}")


def _level(rows: list[np.ndarray], user: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds and rows of `[n]` for each seed, and the 95 % bootstrap interval over users; a point for one user."""
    mean = np.mean(rows, axis=0)
    if np.ptp(user) == 0:
        return (float(mean.mean()),) * 3
    interval = paired_test(mean, np.zeros_like(mean), user=user)
    level, low, high = (float(interval[key] or 0.0) for key in ("difference", "low", "high"))
    return level, low, high


def _gains(results: Results, method: str, control: str) -> list[dict[str, Any]]:
    """For every popularity group with at least two users: its name, rows, both levels and the gain."""
    out = []
    ours, theirs = np.mean(results.per_row(method), axis=0), np.mean(results.per_row(control), axis=0)
    for index, group in enumerate(results.models[method][0]["popularity"]):
        inside = results.groups["popularity"] == index
        gain = results.compare(method, control, inside)
        if gain:
            levels = {"ours": float(ours[inside].mean()), "theirs": float(theirs[inside].mean())}
            out.append({"group": group["group"], "rows": int(inside.sum()), **levels, **gain})
    return out


def _left_out(results: Results, method: str, figure: "Figure") -> None:
    """Say below the axes which popularity groups of test users `_gains` passes over; one without a user is not missed."""
    groups = results.models[method][0]["popularity"]
    users = [np.unique(results.user[results.groups["popularity"] == index]).size for index in range(len(groups))]
    names = [group["group"] for group, number in zip(groups, users, strict=True) if number == 1]
    if names:
        each = " each" if len(names) > 1 else ""
        text = f"Not shown: {', '.join(names)} (one user{each}, and an interval takes two)"
        figure.supxlabel(text, fontsize=8, color="#555555", x=0.01, ha="left")


def _labels(gains: list[dict[str, Any]], axes: "Axes") -> None:
    axes.set_xticks(range(len(gains)), [f"{gain['group']}\nn={gain['rows']}" for gain in gains], fontsize=8)
    axes.set_xlim(-0.6, len(gains) - 0.4)  # so that a group stands at one place in both plots, with a gain or without
    axes.set_xlabel("training interactions of the target item (n: test interactions)")
    axes.grid(axis="x", visible=False)


def _levels(results: Results, gains: list[dict[str, Any]], method: str, control: str, axes: "Axes") -> None:
    places = np.arange(len(gains))
    axes.bar(places - 0.2, [gain["ours"] for gain in gains], width=0.38, color=_colour(results, method), label=method)
    axes.bar(places + 0.2, [gain["theirs"] for gain in gains], width=0.38, color=_colour(results, control), label=control)
    _labels(gains, axes)
    axes.set(title=f"Test {METRIC} by popularity of the target", ylabel=f"test {METRIC}")
    axes.legend()


def _gain(gains: list[dict[str, Any]], method: str, control: str, axes: "Axes") -> None:
    """Relative gain with its interval, one beyond the axis in words; groups in which the control never hits have none.

    Where it hits so rarely that the interval has no bounds, the gain is a hollow dot, and beyond the axis a hollow triangle.
    """
    for place, gain in enumerate(gains):
        if gain["relative"] is None:
            axes.annotate(f"{control}\nis 0", (place, 0), ha="center", va="bottom", fontsize=8, color="#666666")
            continue
        middle, colour, beyond = 100 * gain["relative"], CHANCE, "△"
        if gain["relative_low"] is not None:
            low, high = (100 * gain[key] for key in ("relative_low", "relative_high"))
            colour, beyond = GAIN if low > 0 else LOSS if high < 0 else CHANCE, "▲"
            error = [[middle - low], [high - middle]]
            axes.errorbar(place, middle, yerr=error, fmt="o", color=colour, capsize=4, linewidth=1.6)
        elif middle <= HIGHEST:
            axes.plot(place, middle, "o", color=colour, markerfacecolor="white")
        if middle > HIGHEST:
            words = f"{beyond}\n{middle:+.0f} %"
            ground = {"color": "white", "pad": 1}
            end = (place, HEADROOM * HIGHEST)
            axes.annotate(words, end, ha="center", va="top", fontsize=8, color=colour, bbox=ground)
    axes.axhline(0, color="black", linewidth=0.8)
    low, high = axes.get_ylim()
    if any(gain["relative"] is not None and 100 * gain["relative"] > HIGHEST for gain in gains):
        high = HEADROOM * HIGHEST  # where the words stand
    low, high = max(low, -110), min(high, HEADROOM * HIGHEST)
    if any(gain["relative"] is None for gain in gains):
        high = max(high, -0.16 * low)  # room for their words above the line at 0
    axes.set_ylim(low, high)
    _labels(gains, axes)
    hollow = any(gain["relative"] is not None and gain["relative_low"] is None for gain in gains)
    rare = ";\nhollow: too few hits for one" if hollow else ""
    title = f"Gain of {method} over {control}\n(95 % bootstrap over users; grey: contains 0{rare})"
    axes.set(title=title, ylabel=f"relative gain in {METRIC} [%]")


# ---- many runs ------------------------------------------------------------------------------------------------------


def _contenders(comparison: Comparison, axes: "Axes") -> None:
    """A dot for each model's mean, a line for its interval over users, a ring for each seed; references in black."""
    references = {second for _, second in comparison.comparisons}
    for place, name in enumerate(comparison.models):
        rows = comparison.per_row(name)
        level, low, high = _level(rows, comparison.user)
        colour = "black" if name in references else COLOURS[0]
        axes.plot([low, high], [place, place], color=colour, linewidth=1.6, solid_capstyle="round")
        axes.plot(level, place, "o", color=colour, markersize=7)
        if len(rows) > 1:
            means = [row.mean() for row in rows]
            axes.plot(means, [place + 0.22] * len(means), "o", color=colour, markersize=3.5, markerfacecolor="white")
        axes.annotate(f"{level:.4f}", (high, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    _places(comparison, axes)
    axes.set_yticks(range(len(comparison.models)), list(comparison.models))
    axes.margins(x=0.18)
    rings = "; rings: seeds" if max(map(len, comparison.models.values())) > 1 else ""
    axes.set(title=f"Test {METRIC}\n(line: 95 % interval over users{rings})", xlabel=f"test {METRIC}")


def _differences(comparison: Comparison, axes: "Axes") -> None:
    """The relative difference of each model to its reference, with its paired interval; grey where it may be chance."""
    references = {second for _, second in comparison.comparisons}
    for place, name in enumerate(comparison.models):
        against, gain = comparison.gain(name)
        if against is None or gain is None:
            if name in references:
                axes.plot(0, place, "o", color="black", markersize=7)
        elif gain["relative"] is None:
            axes.annotate(f"{against} is 0", (0, place), ha="center", va="center", fontsize=8, color="#666666")
        else:
            middle = 100 * gain["relative"]
            colour = CHANCE if gain["holm"] >= 0.05 else GAIN if middle > 0 else LOSS
            if gain["relative_low"] is not None:  # or the reference hits too rarely for bounds
                ends = [100 * gain[key] for key in ("relative_low", "relative_high")]
                axes.plot(ends, [place, place], color=colour, linewidth=1.6, solid_capstyle="round")
            axes.plot(middle, place, "o", color=colour, markersize=7)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.08)
    _places(comparison, axes)
    axes.set_yticks(range(len(comparison.models)), [""] * len(comparison.models))
    axes.tick_params(axis="y", length=0)
    title = f"Against {comparison.opponent}\n(paired 95 % interval over users; grey: p ≥ 0.05 after Holm)"
    axes.set(title=title, xlabel=f"relative difference in {METRIC} [%]")


def _places(comparison: Comparison, axes: "Axes") -> None:
    """One line for each model, the first on top."""
    axes.set_ylim(len(comparison.models) - 0.4, -0.6)
    axes.grid(axis="y", linestyle=":")
