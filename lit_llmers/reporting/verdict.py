"""What a run shows, in sentences: does each method beat its control, and had its teacher anything to teach."""

from collections.abc import Sequence

from lit_llmers.reporting.results import METRIC, Results
from lit_llmers.reporting.tables import p_value, percent

NOTHING_TO_TEACH = (
    "Where a teacher is no better than the undistilled control, a gain of the student need not be the teacher's knowledge "
    "passed on, and a loss is no surprise. Make the teacher better (more depth or width, item text, more "
    "training examples or data); docs/measured.md, and for SLMRec docs/slmrec.md, say where methods paid."
)


def verdict(results: Results) -> str:
    """One or two sentences for each method: does it beat its control, by how much, and is that more than noise."""
    return "\n\n".join(_verdict(results, method, control) for method, control in results.pairs)


def _verdict(results: Results, method: str, control: str) -> str:
    gain = results.compare(method, control)
    if gain is None:
        one = "one user alone was evaluated" if len(set(results.user)) < 2 else "they were not evaluated with the same seeds"
        return f"{method} and {control} cannot be compared: {one}."
    within = gain["low"] <= 0 <= gain["high"]
    what = "is within noise of" if within else "beats" if gain["difference"] > 0 else "loses to"
    ours, theirs = (sum(row.mean() for row in rows) / len(rows) for rows in map(results.per_row, (method, control)))
    relative = "" if gain["relative"] is None else f": {percent(gain['relative'])}"
    text = (
        f"**{method} {what} {control}{relative} in test {METRIC}** "
        f"({ours:.4f} against {theirs:.4f}; difference {gain['difference']:+.4f}, 95 % interval "
        f"[{gain['low']:+.4f}, {gain['high']:+.4f}] over users, p {_equals(p_value(gain['p']))})."
    )
    by_seed = gain["by_seed"]
    if len(by_seed) == 1:
        return f"{text} One seed only: how far training anew would move this is not known."
    text += f" Over {len(by_seed)} seeds the difference goes from {min(by_seed):+.4f} to {max(by_seed):+.4f}"
    return text + (", and its sign changes." if min(by_seed) < 0 < max(by_seed) else ".")


def teacher_warnings(results: Results) -> list[str]:
    """A warning, as a Markdown quotation, for every control that the teacher does not clearly beat; the first says why."""
    out: list[str] = []
    controls = list(dict.fromkeys(control for _, control in results.pairs))
    for control in controls:
        gain = results.compare(results.teacher, control) if results.teacher and results.teacher != control else None
        if gain is None or gain["low"] > 0:
            continue
        worse = "is worse than" if gain["high"] < 0 else "does not clearly beat"
        warning = (
            f"> **WARNING: the teacher {worse} {'the control' if len(controls) == 1 else control}.** "
            f"{results.teacher} against {control}: {gain['difference']:+.4f} {METRIC} ({percent(gain['relative'])}, "
            f"95 % interval [{gain['low']:+.4f}, {gain['high']:+.4f}], p {_equals(p_value(gain['p']))})."
        )
        out.append(warning if out else f"{warning} {NOTHING_TO_TEACH}")
    return out


def short_warnings(runs: Sequence[Results]) -> list[str]:
    """A warning, as a Markdown quotation, if trainings ended at `trainer.max_epochs` while their validation still rose.

    Of several runs those are named whose training it is; one that they share is named once.
    """
    found: dict[tuple[str, ...], str] = {}
    high = ""
    for run in runs:
        for name, stages in run.fits.items():
            if short := [stage for stage in stages if stage.cut_short]:
                if any(stage.summary["best"].get("lowered") is False for stage in short):
                    high = ", or before the lower rate of optimizer.schedule=plateau"
                epochs = " or ".join(str(number) for number in sorted({stage.summary["epochs"] for stage in short}))
                seeds = f", {len(short)} of {len(stages)} seeds" if len(short) < len(stages) else ""
                of = f"{run.about['recipe']}/{run.about['run']}: " if len(runs) > 1 else ""
                found.setdefault(tuple(stage.folder.name for stage in short), f"{of}{name} ({epochs}{seeds})")
    if not found:
        return []
    return [
        f"> **WARNING: training may have been stopped too early.** trainer.max_epochs ended {', '.join(found.values())} in the "
        f"best epoch{high}. More epochs may change these figures and the verdict: raise trainer.max_epochs."
    ]


def leak_warnings(runs: Sequence[Results]) -> list[str]:
    """A warning, as a Markdown quotation, that epochs were chosen on test, and for stages that read betraying texts.

    Of several runs those are named whose stage it is; a stage that reads the same in all of them is one warning.
    """
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for run in runs:
        for stage in run.stages:
            if leaking := stage.summary.get("leaking"):
                found.setdefault((stage.name, tuple(leaking)), []).append(f"{run.about['recipe']}/{run.about['run']}")
    out = []
    if any((run.evaluation or {}).get("protocol", {}).get("selected_on") == "test" for run in runs):
        out.append(
            "> **WARNING: epochs were chosen on the test items** (evaluation.official_select_on_test), as in some official "
            "codes: these figures are too high, and comparable with none but figures chosen so."
        )
    for (name, texts), places in found.items():
        of = f" of {', '.join(dict.fromkeys(places))}" if len(runs) > 1 else ""
        out.append(
            f"> **WARNING: held-out items may have been seen.** Stage '{name}'{of} reads "
            f"{', '.join(f'`{text}`' for text in texts)}, which may have been written from users' interactions without regard "
            "to this split: test figures of every model that reads this stage may be too high and prove nothing."
        )
    return out


def _equals(p: str) -> str:
    return p if p.startswith("<") else f"= {p}"
