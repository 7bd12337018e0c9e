"""`python -m lit_llmers.fit recipe=NAME [override ...]`: compose a recipe, check it, run its stages, write the report."""

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_llmers import recipes
from lit_llmers.allocator import keep_memory
from lit_llmers.errors import UserError


def main(arguments: Sequence[str]) -> int:
    """Run a recipe and return the exit status: 0 done, 2 something that the user can mend."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    keep_memory()
    try:
        name = _recipe_name(arguments)
        config = recipes.compose(name, [a for a in arguments if not a.startswith("recipe=") and a != "--config"])
        if "--config" in arguments:
            from omegaconf import OmegaConf

            print(OmegaConf.to_yaml(config))
            return 0
        fit(config, arguments)
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def fit(config: dict[str, Any], arguments: Sequence[str]) -> None:
    """Run a composed recipe: its stages in order, then the report."""
    quiet()
    from lit_llmers.loggers import finish_loggers
    from lit_llmers.report import publish, summary_table, write_report
    from lit_llmers.stages import alone, plan, run

    stages = plan(config)
    folder = stages[0].run.folder
    with alone(folder):
        describe_run(folder, config, arguments, stages)
        run(stages, config["stage"])
        describe_run(folder, config, arguments, stages)  # the data are prepared now
        report = write_report(folder)
        loggers = stages[0].run.loggers(folder / "report", "report", config)
        publish(folder, loggers)
        finish_loggers(loggers)
    print(summary_table(folder))
    print(f"\nReport: {report}")


def help_text() -> str:
    """Usage with all recipes and the names that each option group takes."""
    listed = [f"  {name:<16} {recipes.title(path)}" for name, path in sorted(recipes.available().items())]
    groups = [f"  {group + '=':<10} {', '.join(recipes.options(group))}" for group in recipes.GROUPS]
    return "\n".join(
        [
            "usage: python -m lit_llmers.fit recipe=NAME [key=value ...]",
            "",
            "recipes:",
            *listed,
            "",
            "options, one name each:",
            *groups,
            "",
            "often used:",
            "  data=ml-1m data.root=FOLDER      a named data set that lies in FOLDER",
            "  data=local data.path=FOLDER      your own interactions.parquet and items.parquet",
            "  seeds=[0,1,2]                    repeat the student and its control, with a paired test",
            "  stage=NAME                       stop after this stage",
            "  trainer.max_epochs=N             at most N epochs in every training stage",
            "  scale=paper                      the settings of the paper, for a cluster",
            "  run.name=NAME run.dir=FOLDER     where the results go (runs/<recipe>/<name>)",
            "  --config                         print the composed configuration and stop",
            "",
            "The same command given again goes on where the run was stopped.",
        ]
    )


def _recipe_name(arguments: Sequence[str]) -> str:
    names = [argument.partition("=")[2] for argument in arguments if argument.startswith("recipe=")]
    if not names:
        raise UserError(f"No recipe given. Add recipe=NAME with one of: {', '.join(sorted(recipes.available()))}.")
    return names[-1]


def describe_run(folder: Path, config: dict[str, Any], arguments: Sequence[str], stages: list[Any]) -> None:
    """Write `config.yaml`, `environment.json` and `run.json`, what the report is made from."""
    from omegaconf import OmegaConf

    from lit_llmers.environment import environment
    from lit_llmers.files import atomic_write, write_json
    from lit_llmers.stages import describe

    with atomic_write(folder / "config.yaml") as temporary:
        temporary.write_text(OmegaConf.to_yaml(config))
    write_json(folder / "environment.json", environment())
    prepared = next((stage for stage in stages if stage.verb == "prepare" and stage.done), None)
    write_json(
        folder / "run.json",
        {
            "recipe": config["recipe"],
            "run": config["run"]["name"],
            "command": shlex.join(["python", "-m", "lit_llmers.fit", *arguments]),
            "data": prepared.summary if prepared else {},
            "stages": describe(stages),
            "pairs": config["pairs"],
            "paper": config.get("paper"),
            "teacher": next((stage.config.of for stage in stages if stage.verb == "record"), None),
        },
    )


def quiet() -> None:
    """Keep libraries from talking over the progress lines; their errors still come through."""
    import warnings

    import lightning  # noqa: F401  (sets its loggers up when it is imported)

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="lightning|torch|transformers")
    for noisy in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "httpx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
