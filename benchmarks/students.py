"""Our students beside what else one could train with: `python benchmarks/students.py [--peers]`.

Each subject (our command, a plain PyTorch loop, the fastest loop known to us, and with `--peers` RePlay, RecTools, RecBole
and Cornac) trains the same model on the same sequences in a process of its own, on one thread of the CPU. The processes
take turns, an epoch each; the median over the rounds counts, of processor time. A table goes to the screen, all figures go
to `benchmarks/results/students.json`, and `--record FILE` rewrites their section in a Markdown file.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import argparse
import logging
import math
import statistics
import sys
import tempfile
import textwrap
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import MET, Comparison, Cost, alternate, rewrite_section, title, when
from subjects import Peer, Subject, Unavailable, environment

from lit_llmers import recipes
from lit_llmers.composing.resolving import resolve
from lit_llmers.data.dataset import TEST, VALID, Dataset
from lit_llmers.environment import environment as machine_and_software
from lit_llmers.errors import UserError
from lit_llmers.files import write_json
from lit_llmers.running import run
from lit_llmers.stages import Stage

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"  # a checkout's neighbour with data and the fastest loop
SETS = {"sasrec": ["ml-100k", "ml-1m", "amazon-beauty"], "bpr-mf": ["ml-100k", "ml-1m"]}  # of the other models: the first
ROUNDS = {"ml-1m": 3, "amazon-beauty": 3}  # of all other data: 7
TIMED = {"sasrec": 128, "gru4rec": 128, "bert4rec": 128, "lightgcn": 2048, "bpr-mf": 2048}
BATCH = TIMED | {"caser": 512, "srgnn": 100, "sgl": 2048}  # as the students have them; `quality.py` alone looks at these
LENGTH = 50
OURS, FASTEST = "lit_llmers", "the fastest loop"
EVALUATIONS = 2  # turns that count
OTHERS = {
    FASTEST: Peer("fastest.py", ("sasrec",), evaluates=False),
    "plain PyTorch": Peer("plain.py", tuple(TIMED)),
    "RePlay": Peer("with_replay.py", ("sasrec",), ("replay-rec==0.22.*", "lightning<2.7"), {"amazon-beauty": 5}),
    "RecTools": Peer(
        "with_rectools.py", ("sasrec", "bert4rec"), ("rectools[torch]==0.19.*",), {"ml-1m": 12, "amazon-beauty": 3}
    ),
    "RecBole": Peer(
        "with_recbole.py",
        ("sasrec", "gru4rec", "lightgcn", "bpr-mf", "caser", "srgnn", "sgl"),
        ("recbole==1.2.1", "setuptools<81", "numpy<2", "pandas<3", "scipy<1.13"),
        dict.fromkeys(("sasrec", "gru4rec", "caser", "srgnn", "sgl"), 20),
    ),
    "Cornac": Peer("with_cornac.py", ("bpr-mf",), ("cornac==3.*",)),
}
SIZES = {  # the plain loop's, where ours are others by default
    "bert4rec": ["model.ffn=1", "model.mask_prob=0.15", "model.last_prob=0.0"],
    "lightgcn": ["model.layers=2"],
    "bpr-mf": ["model.reg=0.0"],
}
QUICK = ["data.generator.users=600", "data.generator.items=200"]


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    quiet()
    started = time.monotonic()
    pairs = contests_of(options)
    contests = []
    with tempfile.TemporaryDirectory() as folder:
        for pair in pairs:
            plan(our_command(*pair, Path(folder), options))  # a mistake shows before anything runs
        ready = make_ready(options)
        for pair in pairs:
            contests.append(contest(*pair, ready, Path(folder), options))
            print(f"\n{table(contests[-1:])}\n", flush=True)
    machine = machine_and_software()
    text = body(contests, machine, options, (time.monotonic() - started) / 60)
    print(f"\n{title('Students', machine)}\n\n{text}\n")
    result = HERE / "results" / "students.json"
    result.parent.mkdir(exist_ok=True)
    write_json(result, {"environment": machine, "options": vars(options), "contests": contests})
    print(f"All figures: {result}")
    if options.record:
        rewrite_section(Path(options.record), title("Students", machine), text)


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, list(TIMED))
    parser.add_argument("--rounds", type=int, help="rounds that count (default 7, 3 for large data)")
    options = settled(parser)
    options.rounds = 2 if options.quick else options.rounds
    return options


def parser_of(what: str | None, models: list[str]) -> argparse.ArgumentParser:
    """The options that `quality.py` has, too, for these models."""
    parser = argparse.ArgumentParser(description=(what or "").partition("\n")[0])
    add = parser.add_argument
    add("--peers", action="store_true", help="RePlay, RecTools, RecBole and Cornac too; installs them where they are missing")
    add("--venvs", default=".bench/venvs", metavar="FOLDER", help="their virtual environments (default .bench/venvs)")
    add(
        "--fast-loop",
        default=str(SHARED / "peers" / "fast_lib.py"),
        metavar="FILE",
        help="the fastest loop, where there is one",
    )
    add("--data-root", default=str(SHARED / "data"), metavar="FOLDER", help="the data sets; without it, generated data")
    add("--data", nargs="+", metavar="NAME", help="for all models (default: each has its own)")
    add("--models", nargs="+", default=models, choices=models, help="default: all")
    add("--quick", action="store_true", help="little of it on little generated data: shows that it runs, no more")
    add("--record", metavar="FILE", help="Markdown file to write the table to")
    return parser


def settled(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked for, on generated data where there are no others."""
    options = parser.parse_args()
    if options.quick:
        options.record = None
    if options.quick or not Path(options.data_root).is_dir():
        options.data, options.data_root = ["demo"], None
    return options


def contests_of(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The models, each with each of its data sets."""
    return [(model, data) for model in options.models for data in options.data or SETS.get(model, ["ml-100k"])]


# ---- what is measured --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """A peer with the Python that runs it, or with the reason why none does."""

    peer: Peer
    python: str = sys.executable
    version: str = ""
    failed: str = ""


def make_ready(options: argparse.Namespace) -> dict[str, Ready]:
    """The peers that were asked for, by name."""
    ready = {}
    for name, peer in OTHERS.items():
        wanted = Path(options.fast_loop).is_file() if name == FASTEST else options.peers or not peer.requires
        if not wanted or not set(peer.models) & set(options.models):
            continue
        try:
            ready[name] = Ready(peer, *environment(peer, name, Path(options.venvs)))
        except Unavailable as reason:
            ready[name] = Ready(peer, failed=str(reason))
    return ready


def contest(model: str, data: str, ready: dict[str, Ready], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One model on one data set by everybody who has it: a JSON-able account, ours in its first row."""
    command = our_command(model, data, folder, options)
    prepared, n_items = prepare(command)
    task = {"model": model, "data": prepared, "items": n_items, "length": LENGTH, "batch": BATCH[model], "seed": 0}
    entrants = {OURS: Ready(Peer("ours.py", (model,), evaluates=False))} | {
        name: each for name, each in ready.items() if model in each.peer.models
    }
    subjects: dict[str, Subject] = {}
    try:
        for name, each in entrants.items():
            if each.failed:
                continue
            print(f"{model}, {data}: {name} starts", file=sys.stderr)
            own = folder / f"{model}-{data}-{name}".replace(" ", "-")
            own.mkdir()
            extra = {
                "batches": each.peer.part(model, data),
                "folder": str(own),
                "library": options.fast_loop,
                "command": command,
            }
            subjects[name] = Subject(each.python, each.peer.script, task | extra, own / "log")
        rounds = options.rounds or ROUNDS.get(data, 7)
        print(f"{model}, {data}: {rounds} rounds", file=sys.stderr)
        epochs = alternate({name: subject.epoch for name, subject in subjects.items()}, rounds, warm_up=0)
        asked = {name: subject.evaluate for name, subject in subjects.items() if entrants[name].peer.evaluates}
        evaluations = alternate(asked, EVALUATIONS)
    finally:
        for subject in subjects.values():
            subject.close()
    rows = [
        account(name, each, subjects.get(name), epochs.get(name, []), evaluations.get(name, []))
        for name, each in entrants.items()
    ]
    return {"model": model, "data": data, "rows": rows, "comparisons": [asdict(each) for each in comparisons(rows)]}


def our_command(model: str, data: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """The arguments of `python -m lit_llmers.fit` for the same sizes and the same work as the plain loop's."""
    stage = [
        *SIZES.get(model, []),
        f"trainer.batch_size={BATCH[model]}",
        "trainer.max_epochs=1000",
        "trainer.patience=0",
        "trainer.gradient_clip_val=null",
        "optimizer.lr=0.001",
        "optimizer.weight_decay=0.0",
        "optimizer.schedule=constant",
        "optimizer.warmup_steps=0",
    ]
    return [
        "recipe=student",
        f"student={model}",
        f"data={data}",
        *source(options),
        f"run.dir={folder / 'runs'}",
        f"run.name={data}",
        "logger=csv",
        "trainer.accelerator=cpu",
        f"sequences.max_length={LENGTH}",
        f"sequences.targets_per_user={LENGTH}",  # the others learn from the latest so many alone
        "evaluation.mask_history=false",
        *(f"stages.student.{setting}" for setting in stage),
        "stage=student",
    ]


def source(options: argparse.Namespace) -> list[str]:
    """Where the data are."""
    return [f"data.root={options.data_root}"] if options.data_root else QUICK * options.quick


def plan(command: list[str]) -> list[Stage]:
    """The stages of a command."""
    return resolve(recipes.compose("student", command[1:]))


def prepare(command: list[str]) -> tuple[str, int]:
    """Run the `prepare` stage of a command.

    Returns:
        The folder of the data set, and the number of items.

    Raises:
        UserError: it is not cut leave-one-out.
    """
    planned = plan(command)
    run(planned, "prepare")
    dataset = Dataset.load(planned[0].folder)
    for part in (VALID, TEST):
        if (np.add.reduceat(dataset.split == part, dataset.offsets[:-1], dtype=np.int64) != 1).any():
            raise UserError(f"{dataset.info['name']} is not cut leave-one-out, and the peers' scripts know nothing else.")
    return str(planned[0].folder), dataset.n_items


# ---- what is written ---------------------------------------------------------------------------------------------------


def account(name: str, ready: Ready, subject: Subject | None, epochs: list[Cost], evaluations: list[Cost]) -> dict[str, Any]:
    """What came of one subject."""
    told: dict[str, Any] = {"who": name, "version": ready.version, "failed": ready.failed}
    if subject is None:
        return told
    return {
        **told,
        "failed": subject.failed,
        "epochs": [asdict(cost) for cost in epochs],
        "evaluations": [asdict(cost) for cost in evaluations or subject.evaluations[1:]],
        "share": subject.share,
        "memory": subject.memory,
        "first_step": subject.first_step,
        **subject.notes,
    }


def comparisons(rows: list[dict[str, Any]]) -> list[Comparison]:
    """How many times as fast ours is as each of the others."""
    ours, *others = rows
    found = []
    for row in others:
        if not (ours["failed"] or row["failed"]):
            goal = ">= 0.9" if row["who"] == FASTEST else ">= 1"
            over, under = ([Cost(**cost) for cost in each["epochs"]] for each in (row, ours))
            found.append(Comparison.of(row["who"], "", goal, over, under, "epoch"))
    return found


def table(contests: list[dict[str, Any]]) -> str:
    """A Markdown table, ours on top of its peers, the faster of these before the slower."""
    columns = ["model, data", "who", "epoch, CPU s", "ours is faster by", "quartiles", "goal", "met"]
    columns += ["evaluation, CPU s", "memory, MB", "first step, s"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for each in contests:
        compared = {comparison["what"]: Comparison(**comparison) for comparison in each["comparisons"]}
        ours, *others = each["rows"]
        for row in [ours, *sorted(others, key=lambda row: compared[row["who"]].cpu if row["who"] in compared else math.inf)]:
            who = f"**{row['who']}**" if row is ours else f"{row['who']} {row['version']}".strip()
            first = f"| {each['model']}, {each['data']} | {who} |"
            if row["failed"]:
                lines.append(f"{first} {row['failed']} |" + " |" * (len(columns) - 3))
                continue
            versus = " | | | |"
            if c := compared.get(row["who"]):
                versus = f" {c.cpu:.2f} | {c.low:.2f} to {c.high:.2f} | {c.goal} | {MET[c.met]} |"
            about = "~" if row["share"] < 1 else ""
            lines.append(
                f"{first} {about}{median(row['epochs'])} |{versus} {median(row['evaluations'])} | {row['memory']:,} "
                f"| {row['first_step']:.1f} |"
            )
    return "\n".join(lines)


def median(costs: list[dict[str, float]]) -> str:
    """Of processor time, readable."""
    if not costs:
        return ""
    seconds = statistics.median(cost["cpu"] for cost in costs)
    return f"{seconds:.3f}" if seconds < 1 else f"{seconds:.2f}" if seconds < 100 else f"{seconds:,.0f}"


def body(contests: list[dict[str, Any]], machine: dict[str, Any], options: argparse.Namespace, minutes: float) -> str:
    """The section of this run."""
    command = "python benchmarks/students.py" + " --peers" * options.peers + " --quick" * options.quick
    command += f" --rounds {options.rounds}" if options.rounds and not options.quick else ""
    command += f" --data {' '.join(options.data)}" if options.data and not options.quick else ""
    command += f" --models {' '.join(options.models)}" if options.models != list(TIMED) else ""
    lines = [f"{when(machine)} `{command}`, {minutes:.0f} minutes."]
    for each in contests:
        ours, *others = each["rows"]
        if ours["failed"]:
            continue
        epoch, evaluation = (statistics.median(cost["cpu"] for cost in ours[what]) for what in ("epochs", "evaluations"))
        variant = "".join(f"; the fastest loop is its variant '{row['variant']}'" for row in others if "variant" in row)
        seconds = ", ".join(f"{name} after {value:.1f} s" for name, value in ours["after"].items())
        about = f"{len(ours['epochs'])} rounds; our evaluation takes {evaluation / epoch:.3f} of our epoch{variant}; {seconds}"
        lines.append(textwrap.fill(f"- {each['model']} on {each['data']}: {about}.", 128, subsequent_indent="  "))
    return "\n".join([lines[0], "", table(contests), "", *lines[1:]])


def quiet() -> None:
    """Leave the screen to the table."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
