"""What each method's training costs over its control's: `python benchmarks/method_costs.py [--data-root FOLDER]`.

Every recipe that compares pairs is planned as a user would plan it; what its student reads is made by teachers that trained
for a few steps only, for what a step costs does not depend on what they know. Then the student and its control train in
turns in this process, on one thread of the CPU, on the same batches, a fresh Trainer each round; the median over the rounds
counts, of processor time. A table goes to the screen, and `--record FILE` rewrites its section in a Markdown file.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fits import FEW, Fit, quiet
from measure import MET, Comparison, Cost, alternate, rewrite_section, timed, title, when

from lit_llmers import recipes
from lit_llmers.composing.resolving import resolve
from lit_llmers.data.sequences import EvaluationRows
from lit_llmers.environment import environment
from lit_llmers.errors import UserError
from lit_llmers.evaluate import rank_all
from lit_llmers.models import count_parameters, load_dataset, load_model
from lit_llmers.running import run
from lit_llmers.stages import Stage

LEFT_OUT = ("slmrec", "bigrec")  # slmrec_costs.py has the first; the second's teacher writes, which takes long
WITH_INFERENCE = "dllm2rec"  # whose teacher and student are ranked with, too; the teachers of the other recipes are alike
GOAL = "<= 1.10"
WIDTH = 128
BARE = "bare"  # a stage beside the recipe's own: the student without callbacks


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    quiet()
    torch.set_num_threads(1)
    machine = environment()
    methods: list[Method] = []
    inference, failed = "", []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.recipes or with_pairs():
            print(f"{name}, {options.data}", file=sys.stderr)
            try:
                measured, users = measure(name, folder, options)
            except UserError as error:
                failed.append(f"{name} failed: {error}")
                continue
            methods += measured
            inference = inference or users
    text = body(methods, inference, failed, machine, options)
    heading = title(f"Methods on {options.data}", machine)
    print(f"\n## {heading}\n\n{text}")
    if options.record:
        rewrite_section(Path(options.record), heading, text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help=f"default: all with pairs but {', '.join(LEFT_OUT)}")
    parser.add_argument("--data-root", metavar="FOLDER", help="the data sets; without it, generated data")
    parser.add_argument("--data", metavar="NAME", help="default ml-1m where there is a folder of data sets, else demo")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--steps", type=int, default=6, help="steps in a round (default 6)")
    parser.add_argument("--quick", action="store_true", help="two rounds on little data: shows that it runs, no more")
    parser.add_argument("--record", metavar="FILE", help="Markdown file to write the table to")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.data, options.data_root = 2, 2, "demo", None
    options.data = options.data or ("ml-1m" if options.data_root else "demo")
    return options


def with_pairs() -> list[str]:
    """The recipes of methods: those that compare a student with its control."""
    return [name for name, path in recipes.available().items() if "\npairs:" in path.read_text() and name not in LEFT_OUT]


# ---- what is measured --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One pair of a recipe.

    Attributes:
        recipe, student, control: names of the recipe and of the two backbones.
        adds: what the student has and the control has not.
        step: the student's step over the control's, both per row of the control's batches.
        bare: the same ratio without callbacks, where the student has more than callbacks; None elsewhere.
        parameters: of student and control, as they serve.
    """

    recipe: str
    student: str
    control: str
    adds: str
    step: Comparison
    bare: float | None
    parameters: tuple[int, int]


def measure(recipe: str, folder: str, options: argparse.Namespace) -> tuple[list[Method], str]:
    """A recipe's pairs, and how fast teacher and student rank, where that is asked for."""
    planned, pairs = plan(recipe, folder, options)
    compared = {BARE, *(name for pair in pairs for name in pair)}
    fits = {name: ready(stage) for name, stage in planned.items() if name in compared}

    def training(fit: Fit) -> Callable[[], Cost]:
        return lambda: fit.steps(options.steps).per(fit.stage.config.trainer.batch_size)

    costs = alternate({name: training(fit) for name, fit in fits.items()}, options.rounds)
    methods = []
    for name, other in pairs:
        own, control = planned[name].config, planned[other].config
        per_step = {each: [cost.per(1 / control.trainer.batch_size) for cost in costs[each]] for each in costs}
        adds = [*["initial"][: own.initial is not None], *(term for term, _ in (*own.fusions, *own.terms))]
        cheap = own.terms and all(_is_cheap(term, arguments) for term, arguments in own.terms)
        bare = [a.cpu / b.cpu for a, b in zip(costs.get(BARE, []), costs[other], strict=False)]
        methods.append(
            Method(
                recipe,
                own.fit,
                control.fit if other == "control" else f"{control.fit} ({other})",
                ", ".join(adds),
                Comparison.of(recipe, "", GOAL if cheap else "", per_step[name], per_step[other], "step"),
                statistics.median(bare) if bare else None,
                tuple(count_parameters(fits[each].model)["total"] for each in (name, other)),  # type: ignore[arg-type]
            )
        )
    return methods, inference(planned, fits, options.rounds) if recipe == WITH_INFERENCE else ""


def plan(recipe: str, folder: str, options: argparse.Namespace) -> tuple[dict[str, Stage], list[list[str]]]:
    """The recipe's stages by name, and its pairs.

    What begins at a later epoch begins at once. Recipes share a folder: what several need is made once.
    """
    source = [f"data.root={options.data_root}"] if options.data_root else ["data.generator.users=600"] * options.quick
    few = [*FEW, "sequences.targets_per_user=50", "evaluation.users=200"]  # of long histories records take minutes each
    config = recipes.compose(recipe, [*few, f"data={options.data}", *source, f"run.dir={folder}"])
    entries, pairs = config["stages"], config["pairs"]
    for entry in entries.values():
        entry.get("trainer", {}).update(max_epochs=1)
    student = entries[pairs[0][0]]
    for term in student.get("callbacks", []):
        term.update({name: {**own, "start_epoch": 0} if "start_epoch" in own else own for name, own in term.items()})
    if student.get("callbacks") and (student.get("fusion") or student.get("initial")):
        entries[BARE] = {"like": pairs[0][0], "callbacks": []}
    return {stage.name: stage for stage in resolve({**config, "recipe": "methods"})}, pairs


def ready(stage: Stage) -> Fit:
    """A fit stage, once what it needs is done."""
    run(needs(stage), None)
    return Fit(stage)


def needs(stage: Stage) -> list[Stage]:
    """All stages that one needs, in run order."""
    return [each for need in stage.needs for each in (*needs(need), need)]


def _is_cheap(term: str, arguments: dict[str, Any]) -> bool:
    """Whether a loss term reads what is recorded, or compares the rows of a batch, so that `GOAL` is its goal."""
    if term == "alignment":
        return arguments.get("negatives", "batch") == "batch" and not arguments.get("users")  # these compete with all users
    return term in ("ranking_distillation", "response_distillation", "embedding_distillation")


def inference(planned: dict[str, Stage], fits: dict[str, Fit], rounds: int) -> str:
    """How many test users teacher, student and control rank in a second, and the student's speed over the teacher's."""
    teacher, dataset = planned["teacher"], load_dataset(planned["teacher"])
    models = {name: fits[name].model.eval() for name in ("student", "control")} | {"teacher": load_model(teacher, dataset)}
    rows = EvaluationRows(dataset, "test", teacher.config.sequences.max_length)

    def ranking(model: Any) -> Callable[[], Cost]:
        return lambda: timed(lambda: rank_all(model, rows, planned["evaluate"].config, None)).per(len(rows))

    costs = alternate({name: ranking(model) for name, model in models.items()}, rounds)
    speed = {name: f"{1 / statistics.median(cost.cpu for cost in own):,.0f}" for name, own in costs.items()}
    ratio = Comparison.of("", "", "", costs["teacher"], costs["student"], "user")
    return (
        f"Ranking all {len(rows):,} test users with {WITH_INFERENCE}'s models, users per second of processor time: teacher "
        f"{speed['teacher']}, student {speed['student']}, control {speed['control']}. The student ranks {ratio.cpu:.2f} times "
        f"as many as its teacher (quartiles {ratio.low:.2f} to {ratio.high:.2f}, by wall time {ratio.wall:.2f})."
    )


# ---- what is written ---------------------------------------------------------------------------------------------------


def body(methods: list[Method], inference: str, failed: list[str], machine: dict[str, Any], options: argparse.Namespace) -> str:
    """The section of this run."""
    command = "python benchmarks/method_costs.py" + " --data-root FOLDER" * bool(options.data_root)
    command += " --quick" if options.quick else f" --data {options.data} --rounds {options.rounds} --steps {options.steps}"
    columns = ["recipe", "student", "control", "it adds", "ratio, processor time", "quartiles", "ratio, wall time"]
    columns += ["goal", "met", "without callbacks", "processor time", "parameters at serving"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for m in methods:
        bare = "" if m.bare is None else f"{m.bare:.3f}"
        lines.append(
            f"| {m.recipe} | {m.student} | {m.control} | {m.adds} | {m.step.cpu:.3f} | {m.step.low:.3f} to {m.step.high:.3f} "
            f"| {m.step.wall:.3f} | {m.step.goal} | {MET[m.step.met]} | {bare} | {m.step.absolute} "
            f"| {m.parameters[0]:,} / {m.parameters[1]:,} |"
        )
    about = textwrap.fill(f"{when(machine)} `{command}`.", WIDTH)
    texts = [about, "\n".join(lines), textwrap.fill(inference, WIDTH), "\n".join(f"- {each}" for each in failed)]
    return "\n\n".join(text for text in texts if text)


if __name__ == "__main__":
    main()
