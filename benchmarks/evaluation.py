"""What ranking costs beside the matrix product that it needs: `python benchmarks/evaluation.py [--rounds 9] [--record FILE]`.

Vectors are random, 64 wide; each user has met nine items, which do not compete. Every figure is a ratio of two things that
ran in turns in this process, on one thread of the CPU; the median over the rounds counts, of processor time. The product
alone is the fastest of what was tried: with 64, 128 or 256 users at a time, over the whole catalogue or in the blocks that
ranking takes, into memory that is kept. Peak memory is that of processes of their own.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Comparison, alternate, rewrite_section, table, timed, title, when
from torch import Tensor

from lit_llmers.environment import environment
from lit_llmers.ranking import Catalogue, target_ranks, top_items

WIDTH, SEEN, BATCH = 64, 9, 512
CATALOGUES = {1_682: 943, 3_706: 6_040, 12_101: 22_363, 100_000: 2_048, 1_000_000: 512}  # items: users, the first as real sets
PEAK = """
import sys, torch
sys.path.insert(0, {folder!r})
torch.set_num_threads(1)
import evaluation
evaluation.Subject(200, 200).{what}()
before = evaluation.peak()
subject = evaluation.Subject({items}, {users})
made = evaluation.peak()
subject.{what}()
print(made - before, evaluation.peak() - made)
"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (default 9)")
    parser.add_argument("--quick", action="store_true", help="the small catalogues in two rounds: shows that it runs, no more")
    parser.add_argument("--record", metavar="FILE", help="Markdown file whose section on this machine is rewritten")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = dict(list(CATALOGUES.items())[:2]) if options.quick else CATALOGUES
    rounds = 2 if options.quick else options.rounds
    figures = table([line for items, users in sizes.items() for line in Subject(items, users).compared(rounds)])
    machine = environment()
    body = f"{when(machine)} `python benchmarks/evaluation.py --rounds {rounds}`.\n\n{figures}\n\n{memory(list(sizes))}"
    heading = title("Ranking", machine)
    print(f"## {heading}\n\n{body}")
    if options.record:
        rewrite_section(Path(options.record), heading, body)


class Subject:
    """Random users and items, and what can be done with them."""

    def __init__(self, items: int, users: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.items, self.users = items, users
        self.user = torch.randn(users, WIDTH, generator=draw)
        self.table = torch.randn(items + 1, WIDTH, generator=draw)
        self.target = torch.randint(1, items + 1, (users,), generator=draw)
        self.seen_row = torch.arange(users).repeat_interleave(SEEN)
        self.seen_item = torch.randint(1, items + 1, (users * SEEN,), generator=draw)
        self.catalogue = Catalogue(self.table)

    def product(self, step: int, width: int) -> Callable[[], None]:
        """Scores of `step` users for `width` items at a time, and nothing else."""
        buffer = torch.empty(step * width)

        def multiply() -> None:
            for users in self.user.split(step):
                for block in self.table.split(width):
                    torch.mm(users, block.T, out=buffer[: len(users) * len(block)].view(len(users), -1))

        return multiply

    def rank(self) -> None:
        """Every user's rank, in batches, with the catalogue made anew as at each validation."""
        catalogue = Catalogue(self.table)
        self._batches(lambda user, row, item, rows: target_ranks(user, catalogue, self.target[rows], row, item))

    def top(self) -> None:
        """Every user's twenty best items."""
        catalogue = Catalogue(self.table)
        self._batches(lambda user, row, item, rows: top_items(user, catalogue, 20, row, item)[0])

    def _batches(self, action: Callable[[Tensor, Tensor, Tensor, slice], Tensor]) -> None:
        for start in range(0, self.users, BATCH):
            rows, seen = slice(start, start + BATCH), slice(start * SEEN, (start + BATCH) * SEEN)
            action(self.user[rows], self.seen_row[seen] - start, self.seen_item[seen], rows)

    def compared(self, rounds: int) -> list[Comparison]:
        """Ranks and lists against the product alone."""
        shapes = [(step, width) for step in (64, 128, 256) for width in {self.items + 1, self.catalogue.items}]
        if self.items > 200_000:  # a whole row of such a catalogue takes gigabytes, and twice the time
            shapes = [(step, self.catalogue.items) for step in (64, 128, 256)]
        products = {f"product {step} x {width}": self.product(step, width) for step, width in shapes}
        things = products | {"rank": self.rank, "top": self.top}
        costs = alternate({name: lambda thing=thing: timed(thing) for name, thing in things.items()}, rounds)
        alone = min((costs[name] for name in products), key=lambda laps: statistics.median(lap.cpu for lap in laps))
        per = self.users / 1000
        goal = "<= 1.20" if self.items == 12_101 else ""
        what = {"rank": ("rank / product alone", goal), "top": ("20 best items / product alone", "")}
        return [
            Comparison.of(
                text, f"{self.items:,} items", bound, *([c.per(per) for c in x] for x in (costs[name], alone)), "1,000 users"
            )
            for name, (text, bound) in what.items()
        ]


def memory(sizes: list[int]) -> str:
    """What ranking adds to the peak of a process that holds the vectors, for catalogues and numbers of users."""
    lines = ["| items | users | vectors and catalogue, MB | ranks add, MB | lists add, MB |", "|---:|---:|---:|---:|---:|"]
    for items in sizes:
        for users in (BATCH, 4 * BATCH):
            peaks = [_peak(items, users, what) for what in ("rank", "top")]
            lines.append(f"| {items:,} | {users:,} | {peaks[0][0]:.0f} | {peaks[0][1]:.0f} | {peaks[1][1]:.0f} |")
    return "\n".join(lines)


def _peak(items: int, users: int, what: str) -> tuple[float, float]:
    code = PEAK.format(folder=str(Path(__file__).parent), items=items, users=users, what=what)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return float(out[0]), float(out[1])


def peak() -> float:
    """The most memory that this process has held so far, in MB (what getrusage says may be its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
