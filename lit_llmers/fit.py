"""`python -m lit_llmers.fit recipe=NAME [override ...]`: compose a recipe, check it, run its stages, write the report."""

from lit_llmers import preemption

if __name__ == "__main__":
    preemption.listen()  # before anything that takes time is imported

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
from lit_llmers.processes import Processes, RankFailed, launching

log = logging.getLogger("lit_llmers.fit")  # as a program this file is __main__
EARLIER = "> **Of earlier settings**: a later command changed `config.yaml` and has not come to its end."  # a report that waits
PATIENCE = 600  # seconds that a process waits while another one of the same run writes the report


def main(arguments: Sequence[str]) -> int:
    """Run a recipe and return the exit status.

    That is 0 when it is done, 2 for something that the user can mend, 1 when a process of a group died, 3 when it was
    stopped by SIGUSR1, 130 when by Ctrl-C and 143 when by SIGTERM: it then goes on when the same command is given again.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    keep_memory()
    try:
        here = Processes.here()
        logging.basicConfig(format="%(message)s", level=logging.INFO if here.first else logging.ERROR, stream=sys.stderr)
        name, overrides = recipes.split(arguments)
        config = recipes.compose(name, [override for override in overrides if override != "--config"])
        if "--config" in arguments:
            from omegaconf import OmegaConf

            from lit_llmers.composing.resolving import check_sections

            check_sections(config)
            print(OmegaConf.to_yaml(config))
            return 0
        fit(config, arguments, here)
    except UserError as error:
        return _failed(2, str(error))
    except RankFailed as error:
        return _failed(1, str(error))
    except preemption.Stopped as stopped:
        if not launching.conducted():
            print(f"\n{stopped}", file=sys.stderr)
        return stopped.status
    except (KeyboardInterrupt, SystemExit) as error:
        if not isinstance(error if isinstance(error, KeyboardInterrupt) else error.__context__, KeyboardInterrupt):
            raise
        if not launching.conducted():
            print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    except Exception as error:
        launching.report_failure(1, f"{type(error).__name__}: {error}")
        raise
    return 0


def _failed(status: int, message: str) -> int:
    """Say what is wrong, once for all processes of a group where somebody collects what they say."""
    if not launching.report_failure(status, message):
        here = Processes.here()
        rank = "" if here.world == 1 else f" (rank {here.rank} of {here.world})"
        print(f"\nerror{rank}: {message}", file=sys.stderr)
    return status


def fit(config: dict[str, Any], arguments: Sequence[str], here: Processes) -> None:
    """Run a composed recipe: its stages in order, or one alone, then the report."""
    from lit_llmers.composing.resolving import check_sections, resolve

    check_sections(config)
    quiet()
    preemption.stop_if_asked()
    from lit_llmers.processes.locks import alone, sweep
    from lit_llmers.processes.requeue import refuse_changed_settings
    from lit_llmers.report import summary_table
    from lit_llmers.reporting.results import Results
    from lit_llmers.running import check_needs_done, run, select

    stages, only = resolve(config), config["only"]
    preemption.stop_if_asked()
    folder = stages[0].run.folder
    selected = select(stages, config["stage"], only)
    here.check([stage for stage in selected if not stage.done])
    if only is not None:
        check_needs_done(selected, only)
        refuse_changed_settings(selected)
    worked = not all(stage.done for stage in selected)
    if here.first:
        with alone(folder, patience=PATIENCE, deep=False):
            describe_run(folder, config, arguments, stages, worked)
        sweep(folder)
    run(stages, config["stage"], only, arguments)
    reported = [stage for stage in stages if stage.verb == "evaluate"]
    if not here.first or (only is not None and not all(stage.done for stage in reported)):
        return  # the stage that the report is about comes later
    with alone(folder, patience=PATIENCE, deep=False):
        describe_run(folder, config, arguments, stages, worked)  # the data are prepared now
        results = Results(folder)
        report = report_run(results, stages[0].run, config)
    if not launching.conducted():
        print(summary_table(results))
        print(f"\nReport: {report}")


def report_run(results: Any, run: Any, config: dict[str, Any]) -> Path:
    """Write the report and show it in W&B; return its path."""
    from lit_llmers.loggers import finish_loggers
    from lit_llmers.report import publish, write_report

    report = write_report(results)
    loggers = run.loggers(run.folder / "report", "report", config)
    publish(results, loggers)
    finish_loggers(loggers)
    return report


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
            "  only=NAME                        this stage alone (NAME-seed1: for one seed); what it needs must be done",
            "  trainer.max_epochs=N             at most N epochs in every training stage",
            "  stages.NAME.trainer.max_epochs=N in this one, whatever is said of all",
            "  scale=paper                      the settings of the paper, for a cluster",
            "  run.name=NAME run.dir=FOLDER     where the results go (runs/<recipe>/<name>)",
            "  --config                         print the composed configuration and stop",
            "",
            "The same command given again goes on where the run was stopped.",
        ]
    )


def describe_run(folder: Path, config: dict[str, Any], arguments: Sequence[str], stages: list[Any], worked: bool) -> None:
    """Write `config.yaml`, `environment.json` and `run.json`, what the report is made from.

    Args:
        worked: whether this command has stages to run; if not, `environment.json` stays as it is.
    """
    from omegaconf import OmegaConf

    from lit_llmers.environment import recorded
    from lit_llmers.files import atomic_write, read_json, write_json
    from lit_llmers.stages import describe

    described = describe(stages)
    if (folder / "run.json").exists():
        earlier = {each["folder"] for each in read_json(folder / "run.json")["stages"] if each["verb"] == "evaluate"}
        other = earlier - {each["folder"] for each in described}
        if any((folder / name / "DONE").exists() for name in other):
            log.info("%s holds the report of other settings, which this one's will replace; run.name=OTHER keeps both.", folder)
            _mark_as_earlier(folder / "report.md")
    with atomic_write(folder / "config.yaml") as temporary:
        temporary.write_text(OmegaConf.to_yaml(config))
    recorded(folder, worked)
    prepared = next((stage for stage in stages if stage.verb == "prepare" and stage.done), None)
    whole = [argument for argument in arguments if not argument.startswith(("stage=", "only="))]
    write_json(
        folder / "run.json",
        {
            "recipe": config["recipe"],
            "run": config["run"]["name"],
            "command": shlex.join(["python", "-m", "lit_llmers.fit", *whole]),  # what makes the run, not a stage of it
            "data": prepared.summary if prepared else {},
            "stages": described,
            "pairs": config["pairs"],
            "paper": config.get("paper"),
            "teacher": next((stage.config.of for stage in stages if stage.verb == "record"), None),
        },
    )


def _mark_as_earlier(report: Path) -> None:
    """Say in a report that what lies beside it is of other settings, for the command that will replace it may fail."""
    from lit_llmers.files import atomic_write

    if report.is_file() and not (text := report.read_text()).startswith(EARLIER):
        with atomic_write(report) as temporary:
            temporary.write_text(f"{EARLIER}\n\n{text}")


def quiet() -> None:
    """Keep libraries from talking over the progress lines; their errors still come through."""
    import warnings

    import torch  # noqa: F401  (by itself, as the two take seconds each)

    preemption.stop_if_asked()
    import lightning  # noqa: F401  (sets its loggers up when it is imported)

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="lightning|torch|transformers")
    for noisy in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "httpx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


if __name__ == "__main__":
    launching.as_program(main)
