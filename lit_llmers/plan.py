"""`python -m lit_llmers.plan recipe=NAME [override ...] [gpu=NAME]`: what a run will take, before anything is queued."""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lit_llmers import recipes
from lit_llmers.errors import UserError

if TYPE_CHECKING:
    from lit_llmers.planning.estimate import Estimate
    from lit_llmers.stages import Stage

GPU, UTILISATION = "h100-80gb", 0.4


def main(arguments: Sequence[str]) -> int:
    """Print the plan and return the exit status: 0 done, 2 something in the command that the user can mend."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    try:
        asked = parse(arguments)
        found = plan(asked)
        if "--json" in arguments:
            print(json.dumps(found, indent=1))
        else:
            from lit_llmers.planning.tables import readable

            print(readable(found))
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    return 0


def help_text() -> str:
    """Usage, with the cards that have a name."""
    from lit_llmers.planning.cards import CARDS

    return "\n".join(
        [
            "usage: python -m lit_llmers.plan recipe=NAME [key=value ...] [gpu=NAME] [utilisation=0.4] [price=P] [--json]",
            "",
            "What a run will take, stage by stage, before anything is queued or downloaded: parameters, memory of each",
            "process and whether it fits the card, time, energy, cost and disk. Overrides are those of lit_llmers.fit.",
            "",
            f"  gpu=NAME             the card of each process; {GPU} unless said: {', '.join(CARDS)}",
            f"  utilisation=SHARE    of the card's peak that a large model reaches; {UTILISATION} unless said",
            "  price=P              of a GPU for an hour, in any currency",
            "  sizes=[U,N,I]        users, items and interactions of data that are not here",
            "  --json               for programs; all sizes in bytes",
            "",
            f"recipes: {', '.join(sorted(recipes.available()))}",
        ]
    )


# ---- what is asked -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; `overrides` are the recipe's."""

    recipe: str
    overrides: list[str]
    gpu: str = GPU
    utilisation: float = UTILISATION
    price: float | None = None
    sizes: tuple[int, int, int] | None = None


def parse(arguments: Sequence[str]) -> Asked:
    """Read the command line; overrides are checked where they are composed.

    Raises:
        UserError: no recipe, or a value that is none.
    """
    name, others = recipes.split(arguments)
    own: dict[str, Any] = {}
    overrides = []
    for argument in others:
        key, _, value = argument.partition("=")
        if key == "gpu":
            own[key] = value
        elif key == "utilisation":
            own[key] = _positive(argument, value, most=1.0)
        elif key == "price":
            own[key] = _positive(argument, value)
        elif key == "sizes":
            from lit_llmers.planning.data import parse_sizes

            own[key] = parse_sizes(value)
        elif argument != "--json":
            overrides.append(argument)
    return Asked(recipe=name, overrides=overrides, **own)


def _positive(argument: str, value: str, most: float | None = None) -> float:
    limit = "" if most is None else f" and at most {most:g}"
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number <= (most or float("inf")):
        raise UserError(f"{argument}: it must be a number above 0{limit}.")
    return number


# ---- the plan ----------------------------------------------------------------------------------------------------------------


def plan(asked: Asked) -> dict[str, Any]:
    """The plan, JSON-able: see `_described` for what it says of a stage.

    Raises:
        UserError: an unknown card, or what `lit_llmers.fit` would refuse too.
    """
    from lit_llmers.planning.cards import card

    gpu = card(asked.gpu)
    config = recipes.compose(asked.recipe, asked.overrides)
    from lit_llmers.composing.resolving import resolve
    from lit_llmers.running import select

    planned = resolve(config)
    asked_for = select(planned, config["stage"], config["only"])
    grouped = {stage.name: [each for each in planned if each.name == stage.name] for stage in asked_for}
    from lit_llmers.planning.data import known_data
    from lit_llmers.planning.estimate import Estimator
    from lit_llmers.planning.rehearsal import pretending

    known = next((known_data(stage, asked.sizes) for stage in planned if stage.verb == "prepare"), None)
    with warnings.catch_warnings(), pretending():
        warnings.simplefilter("ignore")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        estimate = _of_nothing if known is None else Estimator(known, gpu, asked.utilisation)
        described = [_described(each, estimate(each[0]), asked) for each in grouped.values()]
    data = None
    if known is not None:
        sizes = {"users": known.dataset.n_users, "items": known.dataset.n_items, "interactions": len(known.dataset.items)}
        data = {"origin": known.origin, "exact": known.exact, **sizes}
    return {
        "recipe": config["recipe"],
        "run": {"name": config["run"]["name"], "folder": str(planned[0].run.folder)},
        "gpu": {"name": asked.gpu, **asdict(gpu)},
        "utilisation": asked.utilisation,
        "price": asked.price,
        "data": data,
        "stages": described,
        "totals": _totals(described),
    }


def _of_nothing(stage: "Stage") -> "Estimate":
    from lit_llmers.planning.estimate import Estimate

    return Estimate(notes=["unknown until prepare ran, or with sizes=[USERS,ITEMS,INTERACTIONS]"])


def _described(seeds: "list[Stage]", estimate: "Estimate", asked: Asked) -> dict[str, Any]:
    """One stage of the recipe: hours, energy, cost, FLOP and disk of all its seeds; memory in bytes, of each process."""
    from lit_llmers.planning.cards import card
    from lit_llmers.planning.verdict import fits, verdict

    stage, number, gpu = seeds[0], len(seeds), card(asked.gpu)
    trainer, on_gpu = stage.trainer, accelerated(stage)
    hours = None if estimate.seconds is None or not on_gpu else number * estimate.seconds / 3600
    gpu_hours = None if hours is None else hours * stage.processes
    return {
        "name": stage.name,
        "verb": stage.verb,
        "seeds": [each.seed for each in seeds],
        "repeated": stage.repeated,
        "folders": [each.folder.name for each in seeds],
        "needs": list(dict.fromkeys(need.name for need in stage.needs)),
        "processes": stage.processes,
        "devices": 1 if trainer is None else trainer.devices,
        "num_nodes": 1 if trainer is None else trainer.num_nodes,
        "strategy": "auto" if trainer is None else trainer.strategy,
        "accelerated": on_gpu,
        "done": all(each.done for each in seeds),
        "parameters": estimate.parameters,
        "memory": estimate.memory,
        "fits": fits(estimate, gpu) if on_gpu else None,
        "disk": None if estimate.disk is None else {key: number * value for key, value in estimate.disk.items()},
        "rows": estimate.rows,
        "steps": estimate.steps,
        "epochs": estimate.epochs,
        "flops": None if estimate.flops is None else number * estimate.flops,
        "hours": hours,
        "gpu_hours": gpu_hours,
        "energy_kwh": None if gpu_hours is None else gpu_hours * gpu.watts / 1000,
        "cost": None if gpu_hours is None or asked.price is None else gpu_hours * asked.price,
        "notes": estimate.notes,
        "verdict": verdict(stage, estimate, gpu, asked.gpu) if on_gpu else None,
    }


def _totals(described: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the stages that are not done; `unknown` are those on a GPU whose hours are not in it."""
    left = [stage for stage in described if not stage["done"]]
    sums: dict[str, Any] = {
        key: sum(stage[key] for stage in left if stage[key] is not None)
        for key in ("hours", "gpu_hours", "energy_kwh", "cost", "flops")
    }
    sums["disk"] = sum(stage["disk"]["kept"] for stage in described if stage["disk"] is not None)
    sums["unknown"] = [stage["name"] for stage in left if stage["accelerated"] and stage["hours"] is None]
    return sums


def accelerated(stage: "Stage") -> bool:
    """Whether the stage would use a GPU if there were one."""
    if stage.trainer is not None and stage.trainer.accelerator == "cpu":
        return False
    if stage.verb == "encode":
        return bool(stage.config.encode != "tfidf")
    if stage.verb == "evaluate":
        return any(accelerated(need) for need in stage.needs)
    if stage.verb not in ("fit", "tune", "record") or (stage.verb == "record" and stage.config.online):
        return False
    if stage.verb == "fit":
        from lit_llmers.backbones import CountingBackbone
        from lit_llmers.building import find

        return not issubclass(find("backbones", stage.config.fit), CountingBackbone)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
