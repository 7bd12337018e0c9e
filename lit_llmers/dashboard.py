"""`python -m lit_llmers.dashboard recipe=NAME [override ...]`: the W&B dashboard of a recipe's runs, as code.

It is made from the plan of the recipe, so it can be made before anything has run. Every panel shows what a stage of the plan
logs, or what the report puts into its summary.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llmers import recipes
from lit_llmers.errors import UserError

if TYPE_CHECKING:
    from lit_llmers.stages import Stage

log = logging.getLogger("lit_llmers.dashboard")  # as a program this file is __main__
FILE = "dashboard.json"  # in the run's folder: the view as W&B keeps it
ANSWER = 10  # seconds that W&B may take to say who is logged in
BY_STAGE: dict[str, Any] = {"groupby": "JobType", "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}  # over the seeds


def main(arguments: Sequence[str]) -> int:
    """Make the dashboard and return the exit status: 0 done, 2 something that the user can mend."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    try:
        print(dashboard(recipes.compose(*recipes.split(arguments))))
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    return 0


def help_text() -> str:
    return "\n".join(
        [
            "usage: python -m lit_llmers.dashboard recipe=NAME [key=value ...]",
            "",
            "A W&B workspace for the runs of a recipe: losses, validation, teacher, student and control side by side,",
            "throughput, memory, test metrics and the gain by popularity. Give it the overrides that lit_llmers.fit gets.",
            "",
            "  run.name=NAME run.dir=FOLDER     the run whose stages it shows (runs/<recipe>/<name>)",
            "  logger.project=NAME              W&B's project; WANDB_ENTITY is whose it is",
            "",
            f"Logged in to W&B it makes the workspace, or changes the one that it made before. Else it writes {FILE} into",
            "the run's folder. It needs: pip install 'lit-llmers[dashboard]'",
        ]
    )


def dashboard(config: dict[str, Any]) -> str:
    """Make the workspace of a composed recipe where W&B can be reached, and write its JSON; return what was done.

    Raises:
        UserError: the recipe is wrong or logs elsewhere, or a package is missing.
    """
    if config["logger"]["kind"] != "wandb":
        raise UserError(f"logger={config['logger']['kind']} does not log to W&B. Leave it out, or use logger=wandb.")
    from lit_llmers.composing.resolving import resolve
    from lit_llmers.files import read_json
    from lit_llmers.loggers import wandb_mode

    stages = resolve(config)
    path = stages[0].run.folder / FILE
    before = read_json(path) if path.is_file() else {}
    try:
        import wandb

        workspace = build(stages, config["pairs"], os.environ.get("WANDB_ENTITY") or before.get("entity", ""))
    except ImportError as error:
        raise UserError(f"A dashboard needs the package {error.name}: pip install 'lit-llmers[dashboard]'.") from error
    if (before.get("entity"), before.get("project")) == (workspace.entity, workspace.project):
        workspace._internal_name, workspace._internal_id = before["name"], before["id"]
    online = wandb_mode(wandb) == "online"
    url, refused = _save(workspace) if online else ("", "nobody is logged in to it: wandb login")
    write(workspace, path)
    if not (path.parent / "run.json").is_file():
        log.info("There is no run in %s yet: the dashboard is empty until lit_llmers.fit runs there.", path.parent)
    if url:
        return f"Dashboard: {url}\nIts JSON: {path}"
    return f"Dashboard: {path}\nW&B does not have it ({refused}). The same command, given again, makes it there."


def _save(workspace: Any) -> tuple[str, str]:
    """Make the workspace in W&B, or change the one that was made; return its address, or none and what W&B has against it."""
    import wandb

    try:
        workspace.entity = workspace.entity or wandb.Api(timeout=ANSWER).default_entity
        return workspace.save().url, ""
    except Exception as error:  # whatever W&B raises
        return "", next(iter(str(error).splitlines()), "") or type(error).__name__


def write(workspace: Any, path: Path) -> None:
    """Write the workspace as W&B keeps it: the same plan gives the same file.

    Raises:
        UserError: the folder may not be written.
    """
    from lit_llmers.files import write_json

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Choose another folder with run.dir=FOLDER.") from error


# ---- what it shows ---------------------------------------------------------------------------------------------------


def build(stages: "list[Stage]", pairs: list[list[str]], entity: str) -> Any:
    """The workspace for the runs of these stages, a `wandb_workspaces.workspaces.Workspace`; no server is asked."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    run = stages[0].run
    group = f"{run.recipe}/{run.name}"
    workspace: Any = ws.Workspace(
        entity=entity,
        project=run.logger["project"],
        name=group,
        sections=[section for section in _sections(stages, pairs) if section.panels],
        runset_settings=ws.RunsetSettings(
            filters=[expr.Metric("Group") == group],
            groupby=[expr.Metric("JobType")],
            pinned_columns=["run:displayName", "summary:val/NDCG@10", "summary:targets_per_second", "summary:peak_memory_gb"],
        ),
    )
    for section in workspace.sections:
        for panel in section.panels:  # the same dashboard has the same ids, in place of random ones
            panel._id = sha256(f"{group}/{section.name}/{_title(panel)}".encode()).hexdigest()[:12]
    return workspace


def _title(panel: Any) -> str:
    return getattr(panel, "title", None) or panel.table_name


def _sections(stages: "list[Stage]", pairs: list[list[str]]) -> Iterator[Any]:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    from lit_llmers.reporting.results import METRIC
    from lit_llmers.reporting.summary import gain_key, metric_key

    def over_steps(title: str, *metrics: str, x: str = "trainer/global_step", **settings: Any) -> Any:
        return wr.LinePlot(title=title, x=x, y=list(metrics), **BY_STAGE, **settings)

    def by_stage(title: str, metric: str) -> Any:
        return wr.BarPlot(title=title, metrics=[metric], **BY_STAGE)

    def of_report(title: str, metrics: list[str]) -> Any:
        return wr.BarPlot(title=title, metrics=list(metrics))

    trained = [stage for stage in stages if _trains(stage)]
    ranked = [stage for stage in trained if stage.verb == "fit" or getattr(stage.config, "validate", "") == "ranking"]
    spoken = [stage for stage in trained if stage.verb == "tune" and stage not in ranked]
    evaluated = list(dict.fromkeys(name for stage in stages if stage.verb == "evaluate" for name in stage.config.of))
    compared = [(method, control) for method, control in pairs if {method, control} <= set(evaluated)]

    validation = [over_steps(f"Validation {name}", f"val/{name}") for name in ("HR@10", "MRR") if ranked]
    validation += [over_steps("Validation loss of the language model", "val/loss")] if spoken else []
    side = [over_steps("Validation NDCG@10 by epoch", "val/NDCG@10", x="epoch")] if ranked else []
    side += [of_report(f"Test {METRIC}", [metric_key(name, METRIC) for name in evaluated])] if evaluated else []
    yield ws.Section(name="Teacher, student and control", panels=side, is_open=True, pinned=True)
    yield ws.Section(name="Validation", panels=validation, is_open=True)
    losses = [over_steps("Loss", "loss")] if trained else []
    losses += [over_steps(f"Loss: {term}", f"loss/{term}") for term in _terms(stages)]
    yield ws.Section(name="Loss terms", panels=losses, is_open=True)
    for section, title, metric in (
        ("Throughput", "Training targets per second", "targets_per_second"),
        ("Memory", "Peak memory of a process [GB]", "peak_memory_gb"),
    ):
        panels = [over_steps(title, metric), by_stage(f"{title}, by stage", metric)] if trained else []
        yield ws.Section(name=section, panels=panels)
    popularity = []
    for method, control in compared:
        gains = [gain_key(method, control, "difference", group) for group in ("head", "tail")]
        popularity += [
            of_report(f"{METRIC} gained by {method} over {control}, head and tail", gains),
            wr.MediaBrowser(title=f"{method} over {control}", media_keys=[f"report/popularity-{method}-{control}"]),
        ]
    popularity += [
        of_report(f"Test {METRIC}, {group}", [metric_key(name, METRIC, group) for name in evaluated])
        for group in ("head", "tail")
        if evaluated
    ]
    yield ws.Section(name="Gain by popularity", panels=popularity, is_open=True)
    test = [
        of_report(f"Test {name}", [metric_key(model, name) for model in evaluated]) for name in ("HR@10", "MRR") if evaluated
    ]
    test += [of_report(f"{METRIC} gained", [gain_key(*pair, "difference") for pair in compared])] if compared else []
    test += [wr.WeavePanelSummaryTable(table_name="report/models")] if evaluated else []
    yield ws.Section(name="Test", panels=test, is_open=True)


def _trains(stage: "Stage") -> bool:
    """Whether a stage takes training steps, and so logs them."""
    from lit_llmers.backbones import CountingBackbone
    from lit_llmers.building import find

    if stage.verb == "fit":
        return not issubclass(find("backbones", stage.config.fit), CountingBackbone)
    return stage.verb == "tune" or (stage.verb == "encode" and stage.config.trainer is not None)


def _terms(stages: "list[Stage]") -> list[str]:
    """The names under which the stages log the terms of their losses."""
    from lit_llmers.building import find

    fits = [stage for stage in stages if stage.verb == "fit" and _trains(stage)]
    own = [find("callbacks", term).name for stage in fits for term, _ in stage.config.terms]
    return list(dict.fromkeys(["task", *own] if fits else []))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
