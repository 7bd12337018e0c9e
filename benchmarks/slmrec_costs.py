"""What distillation, recording and evaluation cost: `python benchmarks/slmrec_costs.py [--data-root FOLDER]`.

Every figure is a ratio of two things that ran in turns in this process, on one thread of the CPU; the median over the
rounds counts, of processor time, with wall time beside it. The models are the recipe's own, trained for a few steps only:
what they cost does not depend on what they know. A table goes to the screen, all figures to `benchmarks/results`, and
`--record FILE` rewrites the section of each measured set and this machine in a Markdown file.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fits import FEW, QUICK, Fit, quiet
from measure import Comparison, Cost, alternate, rewrite_section, table, timed, title, when

from lit_llmers import recipes, record
from lit_llmers.composing.resolving import resolve
from lit_llmers.data.loader import EvaluationBatches
from lit_llmers.data.sequences import EvaluationRows, TrainingRows
from lit_llmers.environment import environment
from lit_llmers.files import write_json
from lit_llmers.models import load_dataset, load_model
from lit_llmers.running import run
from lit_llmers.stages import Stage

HERE = Path(__file__).parent
EXAMPLES = ("sequence", "last")
STEPS = {"demo": 20, "ml-1m": 6, "amazon-beauty": 12}  # in a round

Planned = dict[str, Stage]


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    quiet()
    torch.set_num_threads(1)
    machine = environment()
    sets: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ["demo", "ml-1m", "amazon-beauty"] if options.data_root else ["demo"]:
            sets[name] = measure_set(name, Path(folder) / name, options)
            print(f"\n{title(name, machine)}\n\n{body(sets[name], machine, options)}\n", flush=True)
        large = large_record(Path(folder) / "large")
    print(f"{title('A record larger than memory', machine)}\n\n{large_body(large, machine)}\n")
    result = HERE / "results" / f"slmrec_costs-{machine['date'].replace(':', '')[:17]}.json"
    result.parent.mkdir(exist_ok=True)
    write_json(result, {"environment": machine, "options": vars(options), "sets": sets, "large_record": large})
    print(f"All figures: {result}")
    if options.record:
        for name, measured in sets.items():
            rewrite_section(Path(options.record), title(name, machine), body(measured, machine, options))
        rewrite_section(Path(options.record), title("A record larger than memory", machine), large_body(large, machine))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default 7)")
    parser.add_argument("--data-root", help="folder with ml-1m and amazon-beauty, which are then measured too")
    parser.add_argument("--quick", action="store_true", help="few rounds on little data: shows that it runs, no more")
    parser.add_argument("--record", metavar="FILE", help="Markdown file to write the tables to")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
    return options


# ---- what is measured --------------------------------------------------------------------------------------------------


def measure_set(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All comparisons on one data set, for each kind of training examples."""
    comparisons: list[Comparison] = []
    for examples in EXAMPLES:
        print(f"{name}, examples={examples}", file=sys.stderr)
        planned = prepare(name, examples, folder / examples, options)
        steps = 4 if options.quick else STEPS[name]
        comparisons += step_costs(planned, examples, steps, options.rounds)
        comparisons += recording_costs(planned, examples, options.rounds)
        comparisons += evaluation_costs(planned, examples, options.rounds)
    dataset = load_dataset(planned["student"])
    return {
        "users": dataset.n_users,
        "items": dataset.n_items,
        "interactions": len(dataset.items),
        "generated": dataset.info["generated"],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


def prepare(name: str, examples: str, folder: Path, options: argparse.Namespace) -> Planned:
    """The recipe's stages by name, run up to the record, with the student's parts as stages of their own."""
    source = [f"data={name}"] + ([f"data.root={options.data_root}"] if name != "demo" else QUICK * options.quick)
    config = recipes.compose("slmrec", [*FEW, *source, f"sequences.examples={examples}", f"run.dir={folder}"])
    terms: list[dict[str, Any]] = config["stages"]["student"]["callbacks"]
    whole = [{key: {**values, "share": 1.0} if "share" in values else values for key, values in t.items()} for t in terms]
    variants = {
        "feature": [term for term in terms if "feature_distillation" in term],
        "deep": [term for term in terms if "deep_supervision" in term],
        "whole": whole,
    }
    for variant, callbacks in variants.items():
        config["stages"][variant] = {"like": "student", "callbacks": callbacks}
    planned = resolve(config)
    run(planned, "signals")
    return {stage.name: stage for stage in planned}


def step_costs(planned: Planned, examples: str, steps: int, rounds: int) -> list[Comparison]:
    """A training step of the student and of its parts against the control's, on the same batches."""
    fits = {name: Fit(planned[name]) for name in ("control", "student", "feature", "deep", "whole")}

    def training(fit: Fit) -> Callable[[], Cost]:
        return lambda: fit.steps(steps)

    costs = alternate({name: training(fit) for name, fit in fits.items()}, rounds)
    share = next(term["deep_supervision"].get("share", 1.0) for term in planned["deep"].config.callbacks)
    named = {
        "student": ("student's step / control's", "<= 1.10"),
        "feature": ("feature distillation alone / control's", "<= 1.10"),
        "deep": (f"deep supervision alone, of {100 * share:g}% of the targets / control's", "<= 1.10"),
        "whole": ("student's step, deep supervision of all targets / control's", ""),
    }
    return [Comparison.of(what, examples, goal, costs[name], costs["control"], "step") for name, (what, goal) in named.items()]


def recording_costs(planned: Planned, examples: str, rounds: int) -> list[Comparison]:
    """Speed of the record stage against the teacher's evaluation, both with the loading of the teacher."""
    teacher, signals = planned["teacher"], planned["signals"]
    dataset = load_dataset(teacher)
    training, test = (
        TrainingRows(dataset, teacher.config.sequences),
        EvaluationRows(dataset, "test", teacher.config.sequences.max_length),
    )

    def recording() -> Cost:
        shutil.rmtree(signals.folder / signals.config.record)
        return timed(lambda: record.run(signals)).per(len(training))

    @torch.inference_mode()
    def rank() -> None:
        model = load_model(teacher, dataset)
        tables = model.tables()
        for batch in EvaluationBatches(test, signals.config.batch_size, teacher.config.mask_history):
            model.ranks(batch, tables)

    costs = alternate({"evaluating": lambda: timed(rank).per(len(test)), "recording": recording}, rounds)
    what = "histories recorded per second / evaluated per second, teacher"
    return [Comparison.of(what, examples, ">= 1", costs["evaluating"], costs["recording"], "history")]


def evaluation_costs(planned: Planned, examples: str, rounds: int) -> list[Comparison]:
    """The validation pass over all users inside training against the training epoch that comes before it."""
    fit = Fit(planned["student"])
    epochs = [fit.epoch() for _ in range(rounds)]
    validations, trainings = [validation for _, validation in epochs], [training for training, _ in epochs]
    what = "evaluation of all users / training epoch, student"
    return [Comparison.of(what, examples, "<= 0.2", validations, trainings, "pass")]


def large_record(folder: Path) -> dict[str, Any]:
    """Write and read a record in a process that may not have it in memory."""
    command = [sys.executable, str(HERE / "large_record.py"), str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(folder)
    return json.loads(done.stdout)


# ---- what is written ---------------------------------------------------------------------------------------------------


def body(measured: dict[str, Any], machine: dict[str, Any], options: argparse.Namespace) -> str:
    """The section of one data set."""
    generated = "generated; " if measured["generated"] else ""
    command = "python benchmarks/slmrec_costs.py" + " --data-root FOLDER" * bool(options.data_root)
    command += f" --rounds {options.rounds}" + " --quick" * options.quick
    return "\n\n".join(
        [
            f"{generated}{measured['users']:,} users, {measured['items']:,} items, {measured['interactions']:,} "
            f"interactions. {when(machine)} `{command}`: {options.rounds} rounds.",
            table(Comparison(**comparison) for comparison in measured["comparisons"]),
        ]
    )


def large_body(large: dict[str, Any], machine: dict[str, Any]) -> str:
    """The section of the large record."""
    row = large["bytes"] / large["rows"]
    million = 1e6 * row
    shape = " x ".join(str(size) for size in large["shape"])
    return "\n".join(
        [
            f"{when(machine)} `python benchmarks/large_record.py FOLDER`: written in shards, read back in random order.",
            "",
            "| | |",
            "|---|---|",
            f"| record | {large['rows']:,} rows x {shape} fp16, {large['bytes'] / 1e6:.0f} MB |",
            f"| private memory that the kernel allowed | {large['limit_bytes'] / 1e6:.0f} MB |",
            f"| private memory in use, Python and PyTorch included | {large['private_bytes'] / 1e6:.0f} MB |",
            f"| peak resident memory, with pages of the mapped files | {large['resident_bytes'] / 1e6:.0f} MB |",
            f"| written, checksums included | {large['written_rows_per_second']:,.0f} rows/s |",
            f"| read, {large['bytes'] / 1e6:.0f} MB being in the page cache | {large['read_rows_per_second']:,.0f} rows/s |",
            f"| 1,000,000 such rows | {million:,.0f} bytes on disk, the same private memory, "
            f"{1e6 / large['written_rows_per_second']:.0f} s to write |",
        ]
    )


if __name__ == "__main__":
    main()
