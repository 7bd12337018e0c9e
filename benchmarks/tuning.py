"""What validation chooses: `python benchmarks/tuning.py recipe=NAME KEY=V1,V2,... [key=value ...] [--record FILE]`.

An override with several values, parted by commas and without brackets, is searched, several of them in all combinations:

    python benchmarks/tuning.py recipe=rrd data=amazon-beauty data.root=FOLDER text=minilm logger=csv \
      stages.student.callbacks.0.ranking_distillation.weight=0.001,0.01,0.03

The recipe runs up to its student (`--stage NAME`: up to another stage) for each setting, in one folder: what comes before is
done once. Nothing is evaluated, so no test item is looked at. The same command goes on where it was stopped.
"""

import argparse
import itertools
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from measure import rewrite_section, title, when

from lit_llmers import fit, recipes
from lit_llmers.composing.resolving import resolve
from lit_llmers.environment import environment

SEVERAL = re.compile(r"[^=\[\]{}]+=[^=\[\]{}]*,[^\[\]{}]*")


def main() -> int:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="as for lit_llmers.fit")
    parser.add_argument("--stage", default="student", metavar="NAME", help="whose validation counts (default student)")
    parser.add_argument("--record", metavar="FILE", help="Markdown file to write the table to")
    options = parser.parse_args()
    searched = [override for override in options.overrides if SEVERAL.fullmatch(override)]
    fixed = [override for override in options.overrides if override not in searched]
    keys = [override.partition("=")[0] for override in searched]
    values = [override.partition("=")[2].split(",") for override in searched]
    rows: list[tuple[list[str], list[dict[str, Any]]]] = []
    for setting in itertools.product(*values):
        chosen = [*fixed, *(f"{key}={value}" for key, value in zip(keys, setting, strict=True))]
        if status := fit.main([*chosen, f"stage={options.stage}"]):
            return status
        name, overrides = recipes.split(chosen)
        stages = [stage for stage in resolve(recipes.compose(name, overrides)) if stage.name == options.stage]
        if any("best" not in stage.summary for stage in stages):
            parser.error(f"stage '{options.stage}' is not validated, so nothing can be chosen by it: name one that trains")
        rows.append((list(setting), [stage.summary for stage in stages]))
        print(f"\n{table(keys, rows)}\n", flush=True)
    if options.record:
        command = f"`python benchmarks/tuning.py {' '.join(options.overrides)}`"
        about = title(f"Chosen on validation: {options.stage} of {recipes.split(fixed)[0]}", machine := environment())
        rewrite_section(Path(options.record), about, f"{when(machine)} {command}\n\n{table(keys, rows)}")
    return 0


def table(keys: list[str], rows: list[tuple[list[str], list[dict[str, Any]]]]) -> str:
    """A Markdown table, best first: means over the seeds."""
    lines = [f"| {' | '.join([*keys, 'seeds', 'validation NDCG@10', 'best epochs', 'minutes of training'])} |"]
    lines.append("|" + "---|" * len(keys) + "---:|" * 4)
    for setting, seeds in sorted(rows, key=lambda row: -_score(row[1])):
        spread = f" ± {statistics.stdev(_scores(seeds)):.4f}" if len(seeds) > 1 else ""
        epochs = ", ".join(str(seed["best"]["epoch"] + 1) for seed in seeds)
        minutes = statistics.mean(seed["train_seconds"] for seed in seeds) / 60
        lines.append(f"| {' | '.join(setting)} | {len(seeds)} | {_score(seeds):.4f}{spread} | {epochs} | {minutes:.1f} |")
    return "\n".join(lines)


def _scores(seeds: list[dict[str, Any]]) -> list[float]:
    return [seed["best"]["val/NDCG@10"] for seed in seeds]


def _score(seeds: list[dict[str, Any]]) -> float:
    return statistics.mean(_scores(seeds))


if __name__ == "__main__":
    sys.exit(main())
