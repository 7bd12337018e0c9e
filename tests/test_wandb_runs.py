"""What W&B gets of a run that was stopped and went on: one run per stage, each step once, all of metrics.jsonl.

The client is W&B's own. Its server is a pretended one on this machine's loopback, or none.
"""

import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from pretend_wandb import PretendServer
from tiny import arguments, by_name, small
from wandb_files import read_wandb

from lit_llmers import fit
from lit_llmers.journal import read_metrics
from lit_llmers.loggers import STEP, WANDB_ID, finish_loggers
from lit_llmers.stages import Run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
FEW = ["logger=wandb", "stages.export.export=[safetensors]", "trainer.log_every=2"]
KILLS = [("last.ckpt", 6, "teacher"), ("DONE", 1, "student")]  # in its second epoch; when all is trained and logged


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch, tmp_path):
    import wandb

    wandb.teardown()  # its service does not survive a fork, and reads its settings once
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    yield
    wandb.teardown()


def run_and_kill(folder: Path, kill: tuple[str, int, str] | None) -> bool:
    """Run the recipe in a forked process, killed before it renames a file of a stage for the n-th time; was it?"""
    child = os.fork()
    if child == 0:
        try:
            if kill:
                die_at(*kill)
            status = fit.main(["recipe=slmrec", *arguments(folder, *FEW)])
        except BaseException:  # a forked pytest must never go on as pytest
            status = 70
        os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def die_at(name: str, times: int, stage: str) -> None:
    replace, left = os.replace, times

    def replace_or_die(source, target):
        nonlocal left
        left -= Path(target).name == name and Path(target).parent.name.startswith(stage)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die


def test_a_run_that_was_killed_and_went_on_is_complete_and_tells_no_step_twice(tmp_path):
    for kill in KILLS:
        assert run_and_kill(tmp_path, kill), f"nothing was killed at {kill}"
    assert not run_and_kill(tmp_path, None)
    assert not run_and_kill(tmp_path, None)  # all is done: the report alone is made again
    stages = by_name(small(tmp_path, *FEW))
    for name, stage in stages.items():
        told = read_wandb(stage.folder)  # one copy, or it fails
        name_of_all, _, own = told["id"].rpartition("-")
        assert name_of_all == f"slmrec-default-{stage.label}-{stage.fingerprint}"
        assert own == (stage.folder / WANDB_ID).read_text(), "the same before and after it was killed"
        assert (told["group"], told["job_type"], told["name"]) == ("slmrec/default", name, stage.label)
        logged = {entry.pop("step"): entry for entry in read_metrics(stage.folder / "metrics.jsonl")}
        steps = [row["_step"] for row in told["history"]]
        assert steps == sorted(set(steps)) == list(logged), "each step once, in order"
        for row in told["history"]:
            entry = logged[row["_step"]]
            assert row[STEP] == row["_step"]
            assert {key: row[key] for key in entry if key != "time"} == {k: v for k, v in entry.items() if k != "time"}
        assert bool(steps) == (stage.verb == "fit")
        for key, value in stage.summary.items():
            assert told["summary"][key] == (pytest.approx(value) if isinstance(value, float) else value), key
    report = read_wandb(stages["evaluate"].run.folder / "report")
    assert (report["job_type"], report["group"]) == ("report", "slmrec/default")
    assert report["summary"]["test/student/NDCG@10"] > 0
    assert "gain/student - control/tail/difference" in report["summary"]
    assert any(key.startswith("report/popularity-student-control") for row in report["history"] for key in row)
    copies = list(stages["evaluate"].run.folder.glob("*/wandb/*run-*"))
    assert len([copy for copy in copies if copy.is_dir() and not copy.is_symlink()]) == len(stages) + 1


CONFIG = {"kind": "wandb", "project": "lit_llmers"}


@pytest.fixture
def server(monkeypatch):
    """W&B, with somebody logged in: it is on this machine's loopback, and so is everything that is asked of it."""
    pretend = PretendServer()
    online(monkeypatch, pretend.url)
    yield pretend
    pretend.close()


def online(monkeypatch, url: str) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")


def log_steps(loggers: list, steps: range, sign: int = 1) -> None:
    for step in steps:
        for logger in loggers:
            logger.log_metrics({"loss": float(sign * step)}, step)


def test_a_run_goes_on_online_and_each_step_is_there_once(tmp_path, server):
    run = Run(tmp_path, "slmrec", "default", CONFIG)
    loggers = run.loggers(tmp_path / "student", "student", {})
    log_steps(loggers, range(0, 50, 10))
    finish_loggers(loggers)
    assert [row["_step"] for row in server.history] == [0, 10, 20, 30, 40]
    server.history = server.history[:3]  # it was cut off after step 20, and the checkpoint is of step 40
    loggers = run.loggers(tmp_path / "student", "student", {})
    assert loggers[1].experiment.settings.mode == "online"
    log_steps(loggers, range(40, 70, 10), sign=-1)
    finish_loggers(loggers, {"epochs": 2})
    steps = {row["_step"]: row["loss"] for row in server.history}
    assert steps == {0: 0, 10: 10, 20: 20, 30: 30, 40: -40, 50: -50, 60: -60}
    assert len(server.history) == len(steps)
    assert server.summary["epochs"] == 2


def test_a_validation_that_was_stopped_is_told_when_it_is_made_again(tmp_path, server):
    run = Run(tmp_path, "slmrec", "default", CONFIG)
    loggers = run.loggers(tmp_path / "student", "student", {})
    log_steps(loggers, range(9, 29, 10))
    finish_loggers(loggers)
    loggers = run.loggers(tmp_path / "student", "student", {})
    for logger in loggers:
        logger.log_metrics({"val/NDCG@10": 0.5}, 19)
    log_steps(loggers, range(29, 49, 10))
    finish_loggers(loggers)
    assert [row[STEP] for row in server.history] == [9, 19, 19, 29, 39]
    assert [row[STEP] for row in server.history if "val/NDCG@10" in row] == [19]


@pytest.mark.parametrize("label", ["student", "report"])
def test_the_same_training_in_another_folder_or_anew_is_another_run(tmp_path, label):
    """A colleague's in the same project, or one whose folder was removed, would drop its steps in a run that has them."""

    def trained(folder: Path) -> str:
        loggers = Run(folder, "slmrec", "default", CONFIG).loggers(folder / label, label, {}, "0123456789ab")
        log_steps(loggers, range(3))
        finish_loggers(loggers)
        told = read_wandb(folder / label)
        assert [row["loss"] for row in told["history"]] == [0, 1, 2]
        return told["id"]

    mine, colleague = tmp_path / "mine", tmp_path / "colleague"
    first = trained(mine)
    loggers = Run(mine, "slmrec", "default", CONFIG).loggers(mine / label, label, {}, "0123456789ab")
    finish_loggers(loggers)
    assert read_wandb(mine / label)["id"] == first, "it goes on"
    shutil.rmtree(mine)
    assert len({first, trained(mine), trained(colleague)}) == 3


def test_a_network_that_goes_away_holds_no_stage_up(tmp_path, server, monkeypatch):
    monkeypatch.setattr("lit_llmers.loggers.LIMITS", {"init_timeout": 15, "finish_timeout": 2})
    loggers = Run(tmp_path, "slmrec", "default", CONFIG).loggers(tmp_path / "student", "student", {})
    log_steps(loggers, range(3))
    server.reachable.clear()
    log_steps(loggers, range(3, 6))
    started = time.monotonic()
    finish_loggers(loggers, {"epochs": 1})
    assert time.monotonic() - started < 10
    assert len(read_metrics(tmp_path / "student" / "metrics.jsonl")) == 6


def test_a_service_that_dies_costs_its_stage_one_warning_and_the_next_has_another(tmp_path, caplog):
    run = Run(tmp_path, "slmrec", "default", CONFIG)
    loggers = run.loggers(tmp_path / "teacher", "teacher", {})
    log_steps(loggers, range(2))
    kill_services()
    log_steps(loggers, range(2, 5))
    finish_loggers(loggers, {"epochs": 1})
    assert len([record for record in caplog.records if record.name == "lit_llmers.loggers"]) == 1
    loggers = run.loggers(tmp_path / "student", "student", {})
    log_steps(loggers, range(2))
    finish_loggers(loggers)
    assert len(read_wandb(tmp_path / "student")["history"]) == 2
    loggers = run.loggers(tmp_path / "teacher", "teacher", {})  # it is given again
    finish_loggers(loggers, {"epochs": 1})
    assert [row["loss"] for row in read_wandb(tmp_path / "teacher")["history"]] == [0, 1, 2, 3, 4]


def test_a_service_that_dies_between_two_stages_costs_nothing(tmp_path, caplog):
    run = Run(tmp_path, "slmrec", "default", CONFIG)
    finish_loggers(run.loggers(tmp_path / "teacher", "teacher", {}))
    kill_services()
    loggers = run.loggers(tmp_path / "student", "student", {})
    log_steps(loggers, range(2))
    finish_loggers(loggers)
    assert len(read_wandb(tmp_path / "student")["history"]) == 2
    assert "lit_llmers.loggers" not in {record.name for record in caplog.records}


def kill_services() -> None:
    services = [path for path in Path("/proc").glob("[0-9]*/stat") if is_service(path)]
    assert services
    for path in services:
        os.kill(int(path.parent.name), signal.SIGKILL)


def is_service(stat: Path) -> bool:
    """Whether a process is W&B's, and ours."""
    try:
        name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
    except OSError:
        return False
    return "wandb-core" in name and int(rest.split()[1]) == os.getpid()


def test_the_first_process_alone_has_a_run(tmp_path, monkeypatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    loggers = Run(tmp_path, "slmrec", "default", {"kind": "wandb"}).loggers(tmp_path / "student", "student", {})
    loggers[0].log_metrics({"loss": 1.0}, 1)
    assert len(loggers) == 1
    assert not list((tmp_path / "student").iterdir())


@pytest.mark.parametrize("host", ["nobody listens", "never answers"])
def test_a_key_and_no_network_is_offline_within_the_limit(tmp_path, monkeypatch, caplog, host):
    monkeypatch.setattr("lit_llmers.loggers.LIMITS", {"init_timeout": 2, "finish_timeout": 5})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if host == "never answers":
            listener.listen(64)
        online(monkeypatch, f"http://127.0.0.1:{listener.getsockname()[1]}")
        loggers = Run(tmp_path, "slmrec", "default", CONFIG).loggers(tmp_path / "student", "student", {})
        log_steps(loggers, range(1, 2))
        finish_loggers(loggers, {"epochs": 1})
    told = read_wandb(tmp_path / "student")
    assert [row["loss"] for row in told["history"]] == [1]
    assert told["summary"]["epochs"] == 1
    assert "could not be reached, going on offline" in caplog.text
    assert os.environ["WANDB_MODE"] == "offline", "the later stages do not wait again"
    assert len(list((tmp_path / "student" / "wandb").glob("*run-*"))) == 1, "the attempt left nothing"
