"""What `prepare` dropped, in words."""

from collections.abc import Mapping
from typing import Any

UNMET = "items_without_interactions"
FILTERS = ("min_rating", "min_interactions", "k_core", "users without", "items without")  # parts of reasons, as applied


def dropped_lines(dropped: Mapping[str, Any]) -> list[str]:
    """A line for each reason to drop something, in the order in which they are applied; a JSON file keeps none.

    Args:
        dropped: of a data set's `info`. Its `items_without_interactions` has besides the items that nobody ever met those that
            the filters took the last interaction from; these stand at their filter alone.
    """
    filters = {reason: counts for reason, counts in dropped.items() if reason != UNMET}
    unmet = dropped.get(UNMET, 0) - sum(counts["items"] for counts in filters.values())
    lines = [f"Dropped, items that nobody has met: {unmet:,}."] if unmet else []
    for reason in sorted(filters, key=_place):
        counts = ", ".join(f"{filters[reason][what]:,} {what}" for what in ("users", "items", "interactions"))
        lines.append(f"Dropped, {reason}: {counts}.")
    return lines


def _place(reason: str) -> int:
    return next((place for place, part in enumerate(FILTERS) if part in reason), len(FILTERS))
