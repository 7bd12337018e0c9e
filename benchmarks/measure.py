"""Timing things in turns, and writing down what came of it."""

import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llmers.files import atomic_write

MET = {True: "yes", False: "**no**", None: ""}  # whether a goal is, in a table


@dataclass(frozen=True)
class Cost:
    """Seconds: `cpu` of the processor, over all threads of this process, and `wall` on the clock."""

    cpu: float
    wall: float

    def per(self, number: float) -> "Cost":
        return Cost(self.cpu / number, self.wall / number)


class Stopwatch:
    """Takes laps, each from a `start` to its `stop`."""

    def __init__(self) -> None:
        self.laps: list[Cost] = []

    def start(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        self.laps.append(Cost(time.process_time() - self._cpu, time.perf_counter() - self._wall))


def mean(costs: Sequence[Cost]) -> Cost:
    """The mean cost."""
    return Cost(statistics.fmean(cost.cpu for cost in costs), statistics.fmean(cost.wall for cost in costs))


def timed(action: Callable[[], object]) -> Cost:
    """What one call costs."""
    watch = Stopwatch()
    watch.start()
    action()
    watch.stop()
    return watch.laps[0]


def alternate(things: Mapping[str, Callable[[], Cost]], rounds: int, warm_up: int = 1) -> dict[str, list[Cost]]:
    """Run all things in turns, A B A B ..., `rounds` times after `warm_up` rounds that do not count."""
    costs: dict[str, list[Cost]] = {name: [] for name in things}
    for _ in range(warm_up + rounds):
        for name, thing in things.items():
            costs[name].append(thing())
    return {name: own[warm_up:] for name, own in costs.items()}


@dataclass(frozen=True)
class Comparison:
    """The ratio of two costs over the rounds.

    Attributes:
        what, examples: what was compared, and on which kind of training examples.
        goal: as people write it, such as `<= 1.10`; empty for a figure that is only informative.
        met: whether the median of the processor's ratio meets the goal; None without one.
        cpu, low, high: median of the rounds' processor-time ratios and their quartiles.
        wall: median of the wall-time ratios.
        absolute: the two medians in processor time, readable.
    """

    what: str
    examples: str
    goal: str
    met: bool | None
    cpu: float
    low: float
    high: float
    wall: float
    absolute: str

    @classmethod
    def of(cls, what: str, examples: str, goal: str, over: Sequence[Cost], under: Sequence[Cost], unit: str) -> "Comparison":
        """Compare the costs `over` with the costs `under`, round by round; `unit` is what one cost is for."""
        ratios = [a.cpu / b.cpu for a, b in zip(over, under, strict=True)]
        wall = statistics.median(a.wall / b.wall for a, b in zip(over, under, strict=True))
        low, cpu, high = statistics.quantiles(ratios, n=4, method="inclusive")
        medians = [1000 * statistics.median(cost.cpu for cost in costs) for costs in (over, under)]
        over_ms, under_ms = (f"{m:.3g}" if m < 100 else f"{m:,.0f}" for m in medians)
        absolute = f"{over_ms} / {under_ms} ms per {unit}"
        return cls(what, examples, goal, _meets(cpu, goal) if goal else None, cpu, low, high, wall, absolute)


def _meets(ratio: float, goal: str) -> bool:
    sign, bound = goal.split()
    return ratio <= float(bound) if sign == "<=" else ratio >= float(bound)


def table(comparisons: Iterable[Comparison]) -> str:
    """A Markdown table, one comparison in a row."""
    lines = [
        "| what | examples | ratio, processor time | quartiles | ratio, wall time | goal | met | processor time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        lines.append(
            f"| {c.what} | {c.examples} | {c.cpu:.3f} | {c.low:.3f} to {c.high:.3f} | {c.wall:.3f} | {c.goal} | {MET[c.met]} "
            f"| {c.absolute} |"
        )
    return "\n".join(lines)


def title(name: str, machine: Mapping[str, Any]) -> str:
    """The heading of a section about `name` on this machine."""
    return f"{name}, on {machine['cpu']}, {machine['cores']} cores, one thread"


def when(machine: Mapping[str, Any]) -> str:
    """Date and versions, a sentence."""
    git = machine["git"] or {"commit": "unknown", "dirty": False}
    changed = " with changes" * git["dirty"]
    return (
        f"{machine['date'][:10]}, commit {git['commit'][:7]}{changed}, PyTorch {machine['packages']['torch']}, "
        f"Python {machine['python']}."
    )


def rewrite_section(path: Path, heading: str, body: str) -> None:
    """Put `body` under the second-level `heading` of a Markdown file, in place of what stood there or at the end."""
    text = path.read_text() if path.is_file() else "# Benchmarks\n"
    section = f"## {heading}\n\n{body.strip()}\n"
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found:
        after = text[found.end() :]
        text = text[: found.start()] + section + (f"\n{after}" if after else "")
    else:
        text = f"{text.rstrip()}\n\n{section}"
    with atomic_write(path) as temporary:
        temporary.write_text(text)
