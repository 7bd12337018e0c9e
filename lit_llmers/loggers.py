"""Where metrics go: always to `metrics.jsonl` in the stage's folder, and beside it to W&B, TensorBoard or CSV.

W&B is never in the way: it asks nothing, works offline when nobody is logged in, and when it fails, one warning says so
and training goes on. Nothing is lost by that, for everything it would show is in `metrics.jsonl` and the report.

A stage is one W&B run however often it is stopped: what W&B lacks of the steps before is told to it from `metrics.jsonl`, and
a step that is trained again is not told twice. The same stage trained in another folder, or anew, is another run.
"""

import importlib.util
import logging
import math
import netrc
import os
import re
import secrets
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_llmers.errors import UserError
from lit_llmers.files import atomic_write
from lit_llmers.journal import Journal, read_metrics

__all__ = [
    "JsonlLogger",
    "QuietWandbLogger",
    "finish_loggers",
    "log_images",
    "log_summary",
    "log_table",
    "make_loggers",
    "read_metrics",
]

LIMITS = {  # seconds that W&B's server may keep a stage waiting: for an answer, and for what is left to upload at its end
    "init_timeout": 15,
    "finish_timeout": 60,
}
STEP = "trainer/global_step"  # as Lightning names it
WANDB_ID = "wandb-id"  # file of a stage's folder, and of a report's

log = logging.getLogger(__name__)


class JsonlLogger(Logger):
    """Appends every logged step to `metrics.jsonl` in the stage's folder: step, epoch, Unix time and the metrics."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.journal = Journal(Path(folder) / "metrics.jsonl")

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.journal.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the stage's folder holds its settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line.

        Raises:
            UserError: the disk is full or the file may not be written.
        """
        epoch = {"epoch": int(metrics["epoch"])} if "epoch" in metrics else {}
        self.journal.append({**metrics, **epoch, "step": int(step or 0), "time": round(time.time(), 3)})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.journal.close()


class QuietWandbLogger(WandbLogger):
    """Lightning's WandbLogger around a run of ours, which training survives: its first failure is its last.

    Args:
        earlier: what the stage logged before it was stopped, in order of the steps; W&B may have some of it or nothing.
    """

    def __init__(self, run: Any, project: str, save_dir: Path, earlier: list[dict[str, Any]]) -> None:
        super().__init__(experiment=run, project=project, save_dir=str(save_dir), log_model=False)
        self.earlier = earlier
        self.failed = False

    def attempt(self, action: Callable[[], Any]) -> None:
        """Do something with W&B, or warn once and do nothing with it any more."""
        if self.failed:
            return
        try:
            action()
        except Exception as error:  # W&B raises much that its documents do not name, its service's errors among them
            self.failed = True
            _warn("stopped taking metrics", error)

    def catch_up(self, until: float = math.inf) -> None:
        """Log what the stage had logged for the steps before `until`."""
        earlier, self.earlier = self.earlier, []
        for entry in earlier:
            if entry["step"] < until:
                values = {key: math.nan if value is None else value for key, value in entry.items()}
                self._log({key: value for key, value in values.items() if key not in ("step", "time")}, entry["step"])

    def _log(self, metrics: Mapping[str, Any], step: int) -> None:
        if step >= self.experiment.starting_step:  # W&B has those before it, when it goes on in a run
            self.experiment.log({**metrics, STEP: step}, step=step)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        def log_all() -> None:
            if step is None:  # images and tables
                self.experiment.log(dict(metrics))
            else:
                self.catch_up(step)
                self._log(metrics, step)
                if step == self.experiment.starting_step - 1:  # an epoch's validation has the step of its last batch
                    self.experiment.log({**metrics, STEP: step}, commit=False)

        self.attempt(log_all)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        self.attempt(lambda: super(QuietWandbLogger, self).log_hyperparams(params))


def make_loggers(
    config: Mapping[str, Any], stage_folder: Path, *, group: str, name: str, run_id: str, settings: Mapping[str, Any]
) -> list[Logger]:
    """The loggers of one stage, `JsonlLogger` first.

    Args:
        config: the composed recipe; its `logger` has `kind` (wandb, tensorboard, csv) and, for W&B, `project`.
        stage_folder: where all of them write.
        group: recipe and run name; W&B shows the stages of a run together.
        name: the stage, with `-seed<k>` where it is repeated; without that it is W&B's job type.
        run_id: what W&B calls the run; the folder's own random digits, made once, are put behind it.
        settings: the stage's settings, for W&B's config.

    Raises:
        UserError: TensorBoard is wanted and not installed.
    """
    kind = config["logger"]["kind"]
    folder = Path(stage_folder)
    loggers: list[Logger] = [JsonlLogger(folder)]
    if kind == "csv":
        loggers.append(CSVLogger(folder, name="csv", version=_next_version(folder / "csv")))
    elif kind == "tensorboard":
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError("logger=tensorboard needs TensorBoard: pip install tensorboard. Or choose logger=csv.")
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    elif getattr(rank_zero_only, "rank", 0) == 0:  # one W&B run per stage, not one per process
        project = str(config["logger"].get("project", "lit_llmers"))
        wandb_logger = _start_wandb(project, folder, group, name, run_id, settings)
        loggers += [wandb_logger] if wandb_logger else []
    return loggers


def _next_version(folder: Path) -> str:
    """A new folder for each time the stage goes on: CSVLogger would empty an old one."""
    return f"part-{len(list(folder.glob('part-*')))}"


def _start_wandb(
    project: str, folder: Path, group: str, name: str, run_id: str, settings: Mapping[str, Any]
) -> QuietWandbLogger | None:
    """Start the stage's run: online if somebody is logged in and the server answers, else offline, else not at all."""
    os.environ.setdefault("WANDB_SILENT", "true")  # wandb then neither prints nor prompts
    earlier = read_metrics(folder / "metrics.jsonl")
    limits: dict[str, Any] = {key: seconds for key, seconds in LIMITS.items() if f"WANDB_{key.upper()}" not in os.environ}
    try:
        import wandb

        arguments: dict[str, Any] = {
            "mode": wandb_mode(wandb),
            "project": project,
            "group": group,
            "name": name,
            "job_type": re.sub(r"-seed\d+$", "", name),
            "id": re.sub(r"[/\\#?%:]", "-", f"{run_id}-{_own_digits(folder)}")[-128:],
            "resume": "allow",
            "dir": str(folder),
            "config": dict(settings),
            "settings": wandb.Settings(silent=True, console="off", **limits),
        }
        with suppress(Exception):  # the run of a stage that failed; it has had its warning
            wandb.finish()
        try:
            run = wandb.init(**arguments)
        except Exception as error:  # no server, or W&B's own service is dead: a new service, and no server, may do
            if arguments["mode"] == "online" and isinstance(error, (wandb.errors.Error, OSError)):
                _warn("could not be reached, going on offline", error)
                arguments["mode"] = "offline"
                os.environ["WANDB_MODE"] = "offline"  # the later stages of this command need not wait for it again
            with suppress(Exception):
                wandb.teardown()  # the old service holds on to the id
            run = wandb.init(**arguments)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        if arguments["mode"] != "disabled":
            _remove_copies(folder, run)
    except ImportError as error:
        _warn("is not installed", error)
        return None
    except Exception as error:  # see QuietWandbLogger.attempt
        _warn("does not work here", error)
        return None
    return QuietWandbLogger(run, project, folder, earlier)


def _own_digits(folder: Path) -> str:
    """Random digits that stay with a folder: whatever is trained in another, by whomever, is no continuation of this run."""
    path = folder / WANDB_ID
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(secrets.token_hex(4))  # which no seed touches
    return path.read_text()


def _remove_copies(folder: Path, run: Any) -> None:
    """Remove what W&B wrote in the stage's folder before it was stopped: it will all be in the new copy.

    Two copies of one run would be uploaded one over the other.
    """
    for copy in (folder / "wandb").glob("*run-*"):
        if copy != Path(run.settings.sync_dir):
            shutil.rmtree(copy, ignore_errors=True)


def wandb_mode(wandb: Any) -> str:
    """`WANDB_MODE` where it is set, else online if there are credentials, else offline.

    Raises:
        UserError: W&B does not take what the environment says.
    """
    try:
        known = wandb.setup().settings
    except ValueError as error:
        reason = " ".join(str(error).partition(" [type=")[0].split())  # pydantic's
        raise UserError(f"W&B refuses WANDB_MODE or the like ({reason}). Correct or unset it.") from error
    if known.mode in ("disabled", "offline", "dryrun"):
        return "offline" if known.mode == "dryrun" else known.mode
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or known.api_key:
        return "online"
    hosts = {urlsplit(str(known.base_url)).netloc, *([] if os.environ.get("WANDB_BASE_URL") else ["api.wandb.ai"])}
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return "offline"
    return "online" if any(logins.authenticators(host) for host in hosts) else "offline"


def _warn(what: str, error: Exception) -> None:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    log.warning("W&B %s (%s). Nothing is lost: metrics.jsonl and the report hold everything.", what, reason)


# ---- results, beside the metrics of the training --------------------------------------------------------------------


def _wandb_loggers(loggers: Iterable[Logger]) -> list[QuietWandbLogger]:
    return [logger for logger in loggers if isinstance(logger, QuietWandbLogger)]


def log_summary(loggers: Iterable[Logger], summary: Mapping[str, Any]) -> None:
    """Put a stage's results into the summary of its W&B run."""
    for logger in _wandb_loggers(loggers):
        logger.attempt(partial(logger.experiment.summary.update, dict(summary)))


def log_images(loggers: Iterable[Logger], images: Mapping[str, Path]) -> None:
    """Put image files into the W&B run, by name."""
    for logger in _wandb_loggers(loggers):
        for name, path in images.items():
            logger.attempt(partial(logger.log_image, name, [str(path)]))


def log_table(loggers: Iterable[Logger], name: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Put a table into the W&B run."""
    for logger in _wandb_loggers(loggers):
        logger.attempt(partial(logger.log_table, name, columns=columns, data=rows))


def finish_loggers(loggers: Iterable[Logger], summary: Mapping[str, Any] | None = None) -> None:
    """End a stage's loggers, with its results in W&B's summary, so that the next stage gets a run of its own."""
    loggers = list(loggers)
    for wandb_logger in _wandb_loggers(loggers):
        wandb_logger.attempt(wandb_logger.catch_up)
    if summary:
        log_summary(loggers, summary)
    for logger in loggers:
        logger.finalize("success")
    for wandb_logger in _wandb_loggers(loggers):
        wandb_logger.attempt(wandb_logger.experiment.finish)
