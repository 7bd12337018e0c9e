"""How good our students get beside other libraries' on an equal budget: `python benchmarks/quality.py [--peers]`.

Each subject of `students.py` trains the same model on the same sequences, on one thread of the CPU, and is measured by our
protocol: leave-one-out, the whole catalogue, ties counted half, HR@10 and NDCG@10 both with the read items masked and with
them competing. After each epoch it ranks the validation items. It stops when the student's own `trainer.patience` epochs
brought no better NDCG@10 (masked; ours ends as it does for users), or before the epoch that would exceed the budget of
processor time; the test figures are those after the best epoch. Ours is the command that users type, but that it learns from
the latest targets of each user alone, as the others do, and what `--ours` overrides. Each run is kept when it ends, in
`benchmarks/results/quality.json`, a row for each model, data set, subject, budget and settings, and a seed that is kept is not
run again but with `--again`; `--record FILE` rewrites their section in a Markdown file.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import students
import torch
from measure import rewrite_section, title, when
from students import BATCH, LENGTH, OTHERS, OURS, Ready, plan
from subjects import Peer, Subject

from lit_llmers.data.dataset import Dataset
from lit_llmers.data.sequences import EvaluationRows
from lit_llmers.environment import environment as machine_and_software
from lit_llmers.errors import UserError
from lit_llmers.evaluate import rank_all
from lit_llmers.files import read_json, write_json
from lit_llmers.metrics import ranking_metrics
from lit_llmers.models import load_model
from lit_llmers.stages import Stage

RESULTS = students.HERE / "results" / "quality.json"
EPOCHS = 2  # that a budget must last for
LEVELS = (0.8, 0.9, 0.95, 0.99)  # of the highest validation NDCG@10 of a contest
COLUMNS = ["model, data", "who", "seeds", "HR@10", "NDCG@10", "HR@10, seen kept", "NDCG@10, seen kept"]
COLUMNS += ["validation NDCG@10", "epochs", "CPU s to the best", "CPU s", "ended by"]
Row = dict[str, Any]


def main() -> None:
    """Train, print, write."""
    options = arguments()
    students.quiet()
    machine = machine_and_software()
    pairs = students.contests_of(options)
    if not options.report:
        run(pairs, machine, options)
    rows = [row for row in kept() if row["budget"] == options.budget]
    here = [row for row in rows if (row["model"], row["data"]) in pairs]
    if options.report:
        print("\n".join([header(COLUMNS), *map(line, here)]))
    print(f"\n{levels(here)}\n\nAll figures: {RESULTS}")
    if options.record:
        rewrite_section(Path(options.record), title("Other libraries", machine), body(rows, machine, options))


def run(pairs: list[tuple[str, str]], machine: dict[str, Any], options: argparse.Namespace) -> None:
    """Hold these contests, and show and keep each row when it is done."""
    print(header(COLUMNS), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for pair in pairs:
            plan(our_command(*pair, 0, folder, options))  # a mistake shows before anything runs
        ready = students.make_ready(options)
        for pair in pairs:
            for row in contest(*pair, ready, machine, folder, options):
                print(line(row), flush=True)


def arguments() -> argparse.Namespace:
    parser = students.parser_of(__doc__, list(BATCH))
    add = parser.add_argument
    add("--report", action="store_true", help="run nothing, but show and write what is kept")
    add("--who", nargs="+", metavar="NAME", help=f"these alone, of {OURS}, {', '.join(OTHERS)}")
    add("--budget", type=float, default=300.0, metavar="SECONDS", help="of processor time to train one run (default 300)")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default 0")
    add("--again", action="store_true", help="run what is kept, too")
    add("--patience", type=int, metavar="EPOCHS", help="of the others, 0 for no end (default: the student's own)")
    add("--every", type=int, default=1, metavar="EPOCHS", help="rank the others after each so many (default 1)")
    add("--search", nargs="+", default=[], metavar="KEY=VALUE,...", help="lr or reg for the others, chosen on validation")
    add("--ours", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of our command, a row of its own")
    options = students.settled(parser)
    if wrong := [each for each in options.ours if "=" not in each]:
        parser.error(f"--ours takes KEY=VALUE, not {' '.join(wrong)}")
    if unknown := set(options.who or []) - {OURS, *OTHERS}:
        parser.error(f"nobody is called {', '.join(sorted(unknown))}: {OURS}, {', '.join(OTHERS)}")
    if options.quick:
        options.budget = 10.0
    try:
        grid = [(key, [float(v) for v in values.split(",")]) for key, _, values in (e.partition("=") for e in options.search)]
    except ValueError:
        parser.error(f"--search takes numbers, such as lr=0.001,0.003: {' '.join(options.search)}")
    options.grid = [dict(zip(dict(grid), values, strict=True)) for values in itertools.product(*dict(grid).values())]
    return options


# ---- training ----------------------------------------------------------------------------------------------------------------


def contest(
    model: str, data: str, ready: dict[str, Ready], machine: Row, folder: Path, options: argparse.Namespace
) -> Iterator[Row]:
    """One model on one data set by everybody who has it: yields a JSON-able row of each, which is kept."""
    prepared, n_items = students.prepare(our_command(model, data, 0, folder, options))
    own_patience = _stage(plan(our_command(model, data, 0, folder, options)), "student").config.trainer.patience
    entrants = {OURS: Ready(Peer("ours.py", (model,)))} | {
        name: each for name, each in ready.items() if model in each.peer.models
    }
    common = {"model": model, "data": prepared, "items": n_items, "length": LENGTH, "batch": BATCH[model]}
    for who, each in entrants.items():
        if options.who and who not in options.who:
            continue
        patience = own_patience if who == OURS or options.patience is None else options.patience
        row: Row = {"model": model, "data": data, "who": who, "version": each.version, "budget": options.budget}
        row |= {
            "patience": patience,
            "every": options.every if who != OURS else 1,
            "settings": dict(each.split("=", 1) for each in options.ours) if who == OURS else {},
            "environment": machine,
            "failed": each.failed,
            "runs": [],
        }

        def start(seed: int, settings: dict[str, Any], who: str = who, each: Ready = each) -> Subject:
            own = Path(tempfile.mkdtemp(dir=folder))
            command = our_command(model, data, seed, folder, options)
            extra = {"seed": seed, "batches": None, "folder": str(own), "library": options.fast_loop, "command": command}
            print(f"{model}, {data}: {who} starts, seed {seed} {settings or ''}", file=sys.stderr)
            return Subject(each.python, each.peer.script, {**common, **extra, **settings}, own / "log")

        if not row["failed"]:
            batches = each.peer.part(model, data)
            row["failed"] = too_dear(start(0, {"batches": batches}), options.budget) if batches else ""
        if not row["failed"]:
            first = options.seeds[0]
            trials = [(s, train(start(first, s), first, patience, options)) for s in options.grid if who != OURS and s]
            settings, best = max(trials, key=lambda trial: trial[1].get("validation", 0.0), default=({}, None))
            row |= {"settings": settings or row["settings"], "searched": len(trials)}
            row["runs"] = [] if options.again else earlier_runs(row)
            for seed in [each for each in options.seeds if each not in {run["seed"] for run in row["runs"]}]:
                fresh = best if best and seed == first else train(start(seed, settings), seed, patience, options)
                if who == OURS and not fresh["failed"]:
                    fresh["test"] = our_test(plan(our_command(model, data, seed, folder, options)))
                row["runs"] = sorted([*row["runs"], fresh | {"git": machine["git"]}], key=lambda run: run["seed"])
                row["failed"] = row["failed"] or fresh["failed"]
                keep(row)
        keep(row)
        yield row


def earlier_runs(row: Row) -> list[Row]:
    """Those that are kept of the same subject under the same rules."""
    same = ("model", "data", "who", "version", "budget", "patience", "every", "settings")
    runs = next((old["runs"] for old in kept() if all(old[key] == row[key] for key in same)), [])
    return [run for run in runs if not run["failed"]]


def too_dear(subject: Subject, budget: float) -> str:
    """Why a subject that was asked for a part of an epoch is left out, empty if it is not."""
    cost = subject.first_epoch.cpu
    subject.close()
    if subject.failed or cost * EPOCHS <= budget:
        return subject.failed
    return f"left out: one epoch costs {cost:,.0f} CPU s, {cost / budget:.1f} of the budget"


def train(subject: Subject, seed: int, patience: int, options: argparse.Namespace) -> Row:
    """Train to the end of patience or budget.

    Returns:
        `epochs`: of each that was ranked after its `number`, from 1, the processor seconds `cpu` of training until its end, and
        `validation` NDCG@10; `best`: which of them; `validation`: its figure; `test`: HR@10 and NDCG@10 then, `masked` and
        `kept` (empty for ours, which ranks the test items at the end); `ended`: by what; `failed`: why it has none of these.
    """
    epochs: list[dict[str, float]] = []
    best, test, spent, cost, ended = 0, {}, 0.0, subject.first_epoch.cpu, ""
    ours = bool(subject.validation)
    try:
        for number in itertools.count(1):
            spent += cost
            last = spent + cost > options.budget
            if ours or last or number % options.every == 0:
                figures = subject.validation if ours else subject.rank("validation").get("masked")
                if not figures:
                    break
                epochs.append({"number": number, "cpu": spent, "validation": figures["NDCG@10"]})
                if len(epochs) == 1 or epochs[-1]["validation"] > epochs[best]["validation"]:
                    best = len(epochs) - 1
                    test = {} if ours else subject.rank("test")
                waited = number - epochs[best]["number"]
                over = subject.notes.get("last") if ours else 0 < patience <= waited  # ours may go on at a lower rate
                ended = "patience" if over else ""
            if subject.failed or ended or last:
                break
            cost = subject.epoch().cpu
        if ours:
            subject.finish()
    finally:
        subject.close()
    if subject.failed:
        return {"seed": seed, "failed": subject.failed}
    told = {"epochs": epochs, "best": best, "validation": epochs[best]["validation"], "test": test, "ended": ended or "budget"}
    return {"seed": seed, "failed": "", **told}


def our_command(model: str, data: str, seed: int, folder: Path, options: argparse.Namespace) -> list[str]:
    """The arguments of `python -m lit_llmers.fit`: the student as it is shipped, on the targets that the others have."""
    return [
        "recipe=student",
        f"student={model}",
        f"data={data}",
        *students.source(options),
        f"seeds=[{seed}]",
        f"run.dir={folder / 'runs'}",
        f"run.name={data}-{model}-{seed}",
        "logger=csv",
        "trainer.accelerator=cpu",
        f"sequences.targets_per_user={LENGTH}",
        "~stages.export",
        *options.ours,
    ]


def our_test(planned: list[Stage]) -> dict[str, dict[str, float]]:
    """What our run wrote of the test items, and the same with seen items competing, which takes another ranking."""
    fitted, evaluated = _stage(planned, "student"), _stage(planned, "evaluate")
    figures = read_json(evaluated.folder / "evaluation.json")["models"][0]["metrics"]["all"]
    dataset = Dataset.load(_stage(planned, "prepare").folder)
    rows = EvaluationRows(dataset, "test", fitted.config.sequences.max_length)
    everything = replace(evaluated.config, evaluation=replace(evaluated.config.evaluation, mask_history=False))
    ranks, _ = rank_all(load_model(fitted, dataset), rows, everything, None)
    kept = ranking_metrics(torch.from_numpy(ranks), (10,))
    return {kind: {name: each[name] for name in ("HR@10", "NDCG@10")} for kind, each in (("masked", figures), ("kept", kept))}


def _stage(planned: list[Stage], name: str) -> Stage:
    return next(stage for stage in planned if stage.name == name)


# ---- what is written ---------------------------------------------------------------------------------------------------------


def kept() -> list[Row]:
    """The rows of all runs so far."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []


def keep(row: Row) -> None:
    """Put a row in place of an older one of the same kind, or after all others."""
    same = ("model", "data", "who", "budget", "settings")
    others = [each for each in kept() if any(each[key] != row[key] for key in same)]
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {"rows": [*others, row]})


def header(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * 2}{'---:|' * (len(columns) - 2)}"


def line(row: Row) -> str:
    """A row of the Markdown table."""
    first = f"| {row['model']}, {row['data']} | {_name(row)} |"
    if row["failed"]:
        return f"{first} {row['failed']} |" + " |" * (len(COLUMNS) - 3)
    runs = row["runs"]
    cells = [str(len(runs))]
    cells += [spread([run["test"][kind][name] for run in runs]) for kind in ("masked", "kept") for name in ("HR@10", "NDCG@10")]
    cells += [spread([run["validation"] for run in runs])]
    cells += [_mean([run["epochs"][-1]["number"] for run in runs])]
    cells += [_mean([run["epochs"][at if at < 0 else run["best"]]["cpu"] for run in runs]) for at in (0, -1)]
    return f"{first} {' | '.join(cells)} | {', '.join(sorted({run['ended'] for run in runs}))} |"


def levels(rows: list[Row]) -> str:
    """A Markdown table of the processor seconds, median over the seeds, to shares of a contest's highest validation NDCG@10."""
    told = [row for row in rows if not row["failed"]]
    lines = [header(["model, data", "who", *(f"CPU s to {share:.0%}" for share in LEVELS)])]
    for row in told:
        rivals = [each for each in told if (each["model"], each["data"]) == (row["model"], row["data"])]
        highest = max(run["validation"] for each in rivals for run in each["runs"])
        cells = []
        for share in LEVELS:
            times = [
                next((epoch["cpu"] for epoch in run["epochs"] if epoch["validation"] >= share * highest), math.inf)
                for run in row["runs"]
            ]
            seconds = statistics.median(times)
            cells.append(f"{seconds:.3g}" if seconds < math.inf else "never")
        lines.append(f"| {row['model']}, {row['data']} ({highest:.4f}) | {_name(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def body(rows: list[Row], machine: dict[str, Any], options: argparse.Namespace) -> str:
    """The section of all runs on one budget."""
    order = {pair: number for number, pair in enumerate(itertools.product(BATCH, ["ml-100k", "ml-1m", "amazon-beauty"]))}
    rows = sorted(rows, key=lambda row: order.get((row["model"], row["data"]), len(order)))
    told = [run["git"] for row in rows for run in row["runs"]]
    commits = sorted({git["commit"][:7] + " with changes" * git["dirty"] if git else "unknown" for git in told})
    opening = (
        f"Written {when(machine)} The rows are of commit {', '.join(commits)}. "
        f"`python benchmarks/quality.py --budget {options.budget:.0f}`: so many CPU-seconds to train one run. "
        "What has one seed is a lead. Settings after a name were chosen on validation with the first seed."
    )
    reached = "Processor time until the validation NDCG@10 first comes to a share of the highest (in brackets):"
    return "\n".join([opening, "", header(COLUMNS), *map(line, rows), "", reached, "", levels(rows)])


def spread(values: list[float]) -> str:
    """Mean and, of several, standard deviation, without the zero before the point."""
    mean = f"{statistics.fmean(values):.4f}".removeprefix("0")
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}".replace("± 0", "± ")


def _mean(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if mean < 10 and mean % 1 else f"{mean:,.0f}"


def _name(row: Row) -> str:
    if row["who"] == OURS:
        return f"**{OURS}**" + "".join(f", `{key}={value}`" for key, value in row["settings"].items())
    return f"{row['who']} {row['version']}".strip() + "".join(f", {key} {value:g}" for key, value in row["settings"].items())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
