"""A run's results as single figures by name: what the summary of its W&B report holds, and a dashboard shows."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lit_llmers.reporting.results import METRIC, Results
from lit_llmers.reporting.tables import metric_names

GROUPS = ("head", "tail", "short", "long")  # of the test users, see `evaluation.json`


def metric_key(model: str, metric: str, group: str = "") -> str:
    """The name of a model's test metric, its mean over the seeds; of a group of the users or of all."""
    return "/".join(part for part in ("test", model, group, metric) if part)


def gain_key(model: str, reference: str, figure: str, group: str = "") -> str:
    """The name of a figure of a model's gain over another in `METRIC`."""
    return "/".join(part for part in ("gain", f"{model} - {reference}", group, figure) if part)


def figures(results: Results) -> dict[str, Any]:
    """The test metrics of every model, and what every compared model gains over its reference, all users and by group.

    Gains by group are for the methods over their controls: `head` and `tail` items, short and long histories, and
    `popularity A-B`, targets with so many training interactions. A group without test users is left out.
    """
    found: dict[str, Any] = {}
    for name in results.models:
        for metric in metric_names(results):
            found[metric_key(name, metric)] = _mean(results, name, lambda model: model["metrics"]["all"][metric])  # noqa: B023
        for group in GROUPS:
            if (level := _mean(results, name, _in_group(group))) is not None:
                found[metric_key(name, METRIC, group)] = level
    for (name, reference), gain in results.gains.items():
        found |= {gain_key(name, reference, figure): value for figure, value in (gain or {}).items()}
    for name, reference in results.pairs:
        places = enumerate(results.models[name][0]["popularity"])
        groups = {group: _in_group(group) for group in GROUPS}
        groups |= {f"popularity {entry['group']}": _in_bin(place) for place, entry in places}
        for group, value in groups.items():
            ours, theirs = _mean(results, name, value), _mean(results, reference, value)
            if ours is not None and theirs is not None:
                found[gain_key(name, reference, "difference", group)] = ours - theirs
                found |= {gain_key(name, reference, "relative", group): ours / theirs - 1} if theirs else {}
    return found


def _in_group(group: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda model: model["metrics"][group].get(METRIC)


def _in_bin(place: int) -> Callable[[dict[str, Any]], float | None]:
    return lambda model: model["popularity"][place].get(METRIC)


def _mean(results: Results, name: str, value: Callable[[dict[str, Any]], float | None]) -> float | None:
    values = results.values(name, value)
    return float(np.mean(values)) if values else None
