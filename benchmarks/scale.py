"""What a large data set costs: `python benchmarks/scale.py FOLDER [--sizes 1 10] [--record FILE]`.

Two data sets are generated in FOLDER: a million interactions of 100,000 users with 50,000 items, and ten times all of that.
Our own command prepares each, trains a few steps of SASRec with a sampled softmax and `model.sparse`, and evaluates a
sample of the users, every stage in a process of its own, on one thread of the CPU. Peak memory is what the kernel counted
for that process; costs are processor time. What an interaction costs is the difference to a start that finds the data
prepared. What a step costs is the difference between two trainings that differ in their number of steps alone, what a user
costs the difference between two evaluations of differently many users.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import argparse
import multiprocessing
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import rewrite_section, title, when

from lit_llmers.environment import environment

MILLION, USERS, ITEMS = 1_000_000, 100_000, 50_000  # per million interactions
SHORTEST, ZIPF = 5, 0.8  # interactions of the shortest user; exponent of the items' popularity
STEPS, RANKED = (20, 100), (512, 2560)  # training steps and evaluated users of the two runs whose difference counts
GOAL = 8 * 2**30  # bytes


def main() -> None:
    """Generate, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the data and the runs are kept, about 3 GB")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10], help="millions of interactions (default 1 10)")
    parser.add_argument("--record", metavar="FILE", help="Markdown file whose section on this machine is rewritten")
    options = parser.parse_args()
    lines = [line for size in options.sizes for line in measured(options.folder, size)]
    machine = environment()
    command = f"python benchmarks/scale.py FOLDER --sizes {' '.join(map(str, options.sizes))}"
    body = f"{when(machine)} `{command}`.\n\n{table(lines)}"
    print(f"\n## {title('Scale', machine)}\n\n{body}")
    if options.record:
        rewrite_section(Path(options.record), title("Scale", machine), body)


# ---- data ------------------------------------------------------------------------------------------------------------


def generate(folder: Path, size: int, seed: int = 0) -> None:
    """Write `interactions.parquet` and `items.parquet` for `size` million interactions, a million at a time.

    Items are drawn by Zipf's law, numbered in random order; users have `SHORTEST` interactions and more, log-normally
    many. The rows of a million are in the order of their times, so a user's are far apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    n_items = size * ITEMS
    number = random.permutation(n_items)  # an item's place in the catalogue by its place in popularity
    below = np.cumsum(np.arange(1, n_items + 1) ** -ZIPF)
    items = pa.table({"item_id": _ids("i", np.arange(n_items)), "title": _ids("Item ", np.arange(n_items))})
    pq.write_table(items, folder / "items.parquet")
    schema = pa.schema({"user_id": pa.string(), "item_id": pa.string(), "timestamp": pa.int64()})
    with pq.ParquetWriter(folder / "interactions.parquet.tmp", schema) as writer:
        for block in range(size):
            share = random.lognormal(size=USERS)
            count = SHORTEST + random.multinomial(MILLION - SHORTEST * USERS, share / share.sum())
            user = random.permutation(np.repeat(np.arange(USERS), count)) + block * USERS
            item = number[np.searchsorted(below, random.random(MILLION) * below[-1])]
            time = block * MILLION + np.arange(MILLION)
            writer.write_table(pa.table([_ids("u", user), _ids("i", item), pa.array(time)], schema))
    (folder / "interactions.parquet.tmp").rename(folder / "interactions.parquet")  # only now is all there


def _ids(prefix: str, number: np.ndarray) -> pa.Array:
    return pa.array(np.char.add(prefix, np.char.zfill(number.astype("U8"), 8)))


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Used:
    """What one process used: processor seconds, and its peak of resident memory in bytes."""

    cpu: float
    peak: int


@dataclass(frozen=True)
class Line:
    """One stage at one size: `cost` in processor time is `cost` seconds per `unit`, beside `fixed` seconds once."""

    size: int
    stage: str
    peak: int
    cost: float
    unit: str
    fixed: float


def measured(folder: Path, size: int) -> list[Line]:
    """The three stages at one size. Data generated before are taken again, runs are not."""
    data, runs = folder / f"{size}m", folder / f"{size}m" / "runs"
    if not (data / "interactions.parquet").is_file():  # in a process of its own, for a child inherits its parent's peak
        process = multiprocessing.get_context("spawn").Process(target=generate, args=(data, size))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
    subprocess.run(["rm", "-rf", str(runs)], check=True)
    prepare, again = (run(data, runs, "prepare", STEPS[0], RANKED[0]) for _ in range(2))  # the second finds it done
    fit = [run(data, runs, "student", steps, RANKED[0]) for steps in STEPS]
    run(data, runs, "student", STEPS[0], RANKED[1])  # validated on more users, it is another artefact
    evaluate = [run(data, runs, "evaluate", STEPS[0], users) for users in RANKED]
    rows = size * MILLION
    step, user = ((b.cpu - a.cpu) / (m - n) for (a, b), (n, m) in ((fit, STEPS), (evaluate, RANKED)))
    return [
        Line(size, "prepare", prepare.peak, (prepare.cpu - again.cpu) / rows, "interaction", again.cpu),
        Line(size, "fit", max(used.peak for used in fit), step, "step of 128 rows", fit[0].cpu - STEPS[0] * step),
        Line(size, "evaluate", max(u.peak for u in evaluate), user, "user", evaluate[0].cpu - RANKED[0] * user),
    ]


def run(data: Path, runs: Path, stage: str, steps: int, users: int) -> Used:
    """Our command up to `stage`, of which only the last is not done yet."""
    command = [
        *(sys.executable, "-m", "lit_llmers.fit", "recipe=student", "student=sasrec", "data=local", f"data.path={data}"),
        *("student.loss.kind=sampled_softmax", "+student.model.sparse=true"),
        *("trainer.max_epochs=1", f"trainer.limit_train_batches={steps}"),
        *(f"evaluation.users={users}", "logger=csv", "~stages.export", f"run.dir={runs}", f"stage={stage}"),
    ]
    print(f"{stage}: {steps} steps, {users} users", file=sys.stderr, flush=True)
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return Used(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def table(lines: list[Line]) -> str:
    """A Markdown table, one line for each size and stage."""
    rows = [
        "| interactions | stage | peak memory, GB | within 8 GB | processor time | per | once, s |",
        "|---:|---|---:|---|---:|---|---:|",
    ]
    for line in lines:
        met = "yes" if line.peak <= GOAL else "**no**"
        cost = f"{1e6 * line.cost:.2f} us" if line.cost < 1e-3 else f"{1e3 * line.cost:.1f} ms"
        size = f"{line.size * MILLION:,}"
        rows.append(f"| {size} | {line.stage} | {line.peak / 2**30:.2f} | {met} | {cost} | {line.unit} | {line.fixed:.1f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
