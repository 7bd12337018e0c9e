"""SASRec through torch.compile in bfloat16, on the GPU where there is one: `python benchmarks/compiled.py`.

Ours is the command that users type, with `trainer.compile=true trainer.precision=bf16-mixed`; beside it trains the plain loop
of `students.py`, compiled and in bfloat16 too. Each is a process of its own, and they take turns, an epoch each, after one that
does not count, in which they compile. Seconds are those on the clock, all work on the GPU done. The share of the peak is the
plain loop's floating-point operations in products, padding included, over our seconds, in those that a product of two large
bfloat16 matrices does here. `--record FILE` rewrites their section in a Markdown file.
"""

# ruff: noqa: E402

import os

visible = os.environ.get("CUDA_VISIBLE_DEVICES")

import argparse
import statistics
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import students  # hides GPUs, for what it measures is for the CPU
import torch
from measure import MET, Comparison, Cost, alternate, rewrite_section, title, when
from subjects import Subject

from lit_llmers.environment import environment
from lit_llmers.errors import UserError

if visible is None:
    os.environ.pop("CUDA_VISIBLE_DEVICES")
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = visible

MODEL = "sasrec"
SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices whose product says what the peak is
COMPILED = ["trainer.accelerator=auto", "trainer.precision=bf16-mixed", "trainer.compile=true"]


@dataclass(frozen=True)
class Line:
    """One data set: how our epoch compares with the plain loop's, and what share of the peak ours reaches."""

    data: str
    step: Comparison
    ours: float
    plain: float
    share: float


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data-root", default=str(students.SHARED / "data"), metavar="FOLDER", help="without it, generated data")
    add("--data", nargs="+", metavar="NAME", help=f"default {', '.join(students.SETS[MODEL])}")
    add("--rounds", type=int, default=5, help="rounds that count (default 5)")
    add("--quick", action="store_true", help="little of it on little generated data: shows that it runs, no more")
    add("--record", metavar="FILE", help="Markdown file to write the table to")
    options = students.settled(parser)
    options.rounds = 2 if options.quick else options.rounds
    students.quiet()
    machine = environment()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    best = peak(device)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for data in options.data or students.SETS[MODEL]:
            lines.append(measure(data, Path(folder), best, options))
    heading = title("Compiled", machine)
    side = SIDE[device]
    command = "python benchmarks/compiled.py" + (" --quick" if options.quick else f" --rounds {options.rounds}")
    about = (
        f"{when(machine)} `{command}`, {name_of(device)}, where a product of two bfloat16 matrices of {side:,} x {side:,} does "
        f"{best / 1e12:.3g} TFLOP/s."
    )
    text = f"{textwrap.fill(about, 128)}\n\n{table(lines)}"
    print(f"\n## {heading}\n\n{text}")
    if options.record:
        rewrite_section(Path(options.record), heading, text)


def name_of(device: str) -> str:
    """What a reader knows the device by."""
    return torch.cuda.get_device_name() if device == "cuda" else "one thread of the CPU"


def peak(device: str) -> float:
    """Floating-point operations in a second of a product of two bfloat16 matrices, the best of several."""
    torch.set_num_threads(1)
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)


def measure(data: str, folder: Path, best: float, options: argparse.Namespace) -> Line:
    """One data set by both."""
    own = students.our_command(MODEL, data, folder, options)
    command = [*(each for each in own[:-1] if not each.startswith("trainer.accelerator=")), *COMPILED, own[-1]]
    prepared, n_items = students.prepare(command)
    task = {"model": MODEL, "data": prepared, "items": n_items, "length": students.LENGTH, "batch": students.BATCH[MODEL]}
    subjects = {}
    try:
        for name, script in (("ours", "ours.py"), ("plain", "plain.py")):
            print(f"{data}: {name} starts", file=sys.stderr)
            extra = {"seed": 0, "command": command, "compiled": True, "folder": str(folder)}
            subjects[name] = Subject(sys.executable, script, task | extra, folder / f"{data}-{name}.log")
        costs = alternate({name: subject.epoch for name, subject in subjects.items()}, options.rounds, warm_up=0)
    finally:
        for subject in subjects.values():
            subject.close()
    if failed := "; ".join(f"{name}: {subject.failed}" for name, subject in subjects.items() if subject.failed):
        raise UserError(f"{data} failed, {failed}")
    clock = {name: [Cost(cost.wall, cost.wall) for cost in each] for name, each in costs.items()}
    ours, plain = (statistics.median(cost.wall for cost in clock[name]) for name in ("ours", "plain"))
    step = Comparison.of(data, "", ">= 1", clock["plain"], clock["ours"], "epoch")
    return Line(data, step, ours, plain, subjects["plain"].notes["flop"] / ours / best)


def table(lines: list[Line]) -> str:
    """A Markdown table, a data set in a row."""
    rows = ["| data | our epoch, s | the plain loop's, s | ours is faster by | quartiles | goal | met | share of the peak |"]
    rows.append("|---" * 8 + "|")
    for line in lines:
        rows.append(
            f"| {line.data} | {line.ours:.3g} | {line.plain:.3g} | {line.step.cpu:.2f} | {line.step.low:.2f} to "
            f"{line.step.high:.2f} | {line.step.goal} | {MET[line.step.met]} | {100 * line.share:.2g} % |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
