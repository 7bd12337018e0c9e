"""A plan as text for a terminal."""

from typing import Any

from lit_llmers.planning.cards import KERNEL, USABLE

GIB = 2**30
MEMORY = ("weights", "gradients", "optimizer", "gathered", "activations", "buffers", "validation", "host", "peak")
STAGES = (
    "stage",
    "runs",
    "processes",
    "parameters",
    "trained",
    "item table",
    "GiB each",
    "fits",
    "steps",
    "FLOP",
    "hours",
    "kWh",
)


def readable(plan: dict[str, Any]) -> str:
    """The plan's tables, totals and verdicts."""
    priced, stages = plan["price"] is not None, plan["stages"]
    lines = [
        *_heading(plan),
        "",
        *_table([*STAGES, *["cost"] * priced, "disk"], [_row(stage, priced) for stage in stages]),
        "",
        "Memory of each process in GiB. The peak is what is held, and the largest of what comes and goes: activations with",
        "buffers, or validation. On the right, activations with layers recomputed (gradient checkpointing) and without.",
        *_table(["stage", *MEMORY, "recomputed", "kept whole"], [_memory(stage) for stage in stages if stage["memory"]]),
        "",
        _total(plan["totals"], priced),
        "",
        *[line for stage in stages for line in _said(stage)],
        f"Time: matrix products at the card's peak times the utilisation, {KERNEL * 1e6:g} microseconds for each operation at",
        "least; to the last epoch, though early stopping saves some. Energy at full power. Sending gradients and reading data",
        f"are not in it. A card is taken to be full at {USABLE:.0%}.",
    ]
    return "\n".join(lines)


def _heading(plan: dict[str, Any]) -> list[str]:
    gpu, data = plan["gpu"], plan["data"]
    card = f"{gpu['memory']:g} GiB, {gpu['half']:g} TFLOP/s in half precision, {gpu['watts']} W; {gpu['source']}"
    price = "" if plan["price"] is None else f", {plan['price']:g} per GPU-hour"
    known = "unknown"
    if data is not None:
        sizes = [f"{data[key]:,} {key}" for key in ("users", "items", "interactions")]
        known = f"{', '.join(sizes)} ({data['origin']})"
    return [f"{plan['recipe']} on {gpu['name']} ({card}), utilisation {plan['utilisation']:g}{price}", f"data: {known}"]


def _total(totals: dict[str, Any], priced: bool) -> str:
    parts = [
        f"{_number(totals['hours'])} hours one after the other",
        f"{_number(totals['gpu_hours'])} GPU-hours",
        f"{_number(totals['energy_kwh'])} kWh",
        *([f"cost {_number(totals['cost'])}"] if priced else []),
        f"{_bytes(totals['disk'])} on disk",
    ]
    without = f"; without {', '.join(totals['unknown'])}" if totals["unknown"] else ""
    return f"Total: {', '.join(parts)}{without}"


def _said(stage: dict[str, Any]) -> list[str]:
    lines = [stage["verdict"]] if stage["verdict"] else []
    lines += [f"{stage['name']}: {note}." for note in stage["notes"]]
    return [*lines, ""] if stage["verdict"] else lines


def _row(stage: dict[str, Any], priced: bool) -> list[str]:
    count, memory = stage["parameters"] or {}, stage["memory"]
    several = f"{stage['num_nodes']}x{stage['devices']} {stage['strategy']}"
    steps = "-" if stage["steps"] is None else f"{stage['epochs']} x {stage['steps']:,}"
    seeds = len(stage["seeds"])
    return [
        stage["name"],
        "done" if stage["done"] else stage["verb"] + (f" x{seeds}" if seeds > 1 else ""),
        "1" if stage["processes"] == 1 else several,
        _count(count.get("total")),
        _count(count.get("trainable")),
        _count(count.get("item_table")),
        "-" if memory is None else f"{memory['peak'] / GIB:.2f}",
        {None: "-", True: "yes", False: "NO"}[stage["fits"]],
        steps,
        "-" if stage["flops"] is None else f"{stage['flops']:.1e}",
        _number(stage["hours"]),
        _number(stage["energy_kwh"]),
        *([_number(stage["cost"])] if priced else []),
        _bytes(None if stage["disk"] is None else stage["disk"]["kept"]),
    ]


def _memory(stage: dict[str, Any]) -> list[str]:
    memory = stage["memory"]
    parts = [memory[part] for part in MEMORY] + [memory.get(f"activations_{way}") for way in ("checkpointed", "plain")]
    return [stage["name"], *["-" if part is None else f"{part / GIB:.3f}" if part else "0" for part in parts]]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *[cell.rjust(width) for cell, width in others]]).rstrip()

    return [line(head), *[line(row) for row in rows]]


def _count(number: int | None) -> str:
    if not number:
        return "-"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _bytes(number: int | None) -> str:
    if number is None:
        return "-"
    return f"{number / GIB:.2f} GiB" if number >= 0.1 * GIB else f"{number / 2**20:.1f} MiB"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else "<0.001"
