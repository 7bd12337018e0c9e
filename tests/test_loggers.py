"""Metrics reach `metrics.jsonl` whatever happens; W&B is offline, one run per stage, and never stops a training."""

import json
from pathlib import Path

import pytest
import torch
from wandb_files import read_wandb

from lit_llmers.conf.schema import LoggerConfig
from lit_llmers.errors import UserError
from lit_llmers.journal import Journal, read_metrics
from lit_llmers.loggers import JsonlLogger, QuietWandbLogger, finish_loggers, log_images, log_table, make_loggers

WANDB = {"logger": {"kind": "wandb", "project": "lit_llmers"}}


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def warnings(caplog) -> list:
    return [record for record in caplog.records if record.name == "lit_llmers.loggers"]


def start(folder: Path, name: str = "student-seed0", config: dict | None = None) -> list:
    settings = {"settings": {"layers": 4}}
    return make_loggers(config or WANDB, folder, group="slmrec/default", name=name, run_id=f"{name}-abc", settings=settings)


# ---- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_lines_hold_plain_numbers_and_null_for_what_json_lacks(tmp_path):
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"loss": torch.tensor(0.5), "epoch": 1.0, "nan": float("nan"), "inf": torch.tensor(float("inf"))}, 3)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed although not closed
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert entry.pop("time") > 1.7e9
    assert entry == {"loss": 0.5, "epoch": 1, "nan": None, "inf": None, "step": 3}


def test_a_resumed_run_cuts_the_torn_line_and_the_later_value_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 2.0, "val/NDCG@10": 0.1}\n{"step": 30, "lo')
    assert [entry["step"] for entry in read_metrics(path)] == [10, 20]
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"loss": 2.5}, 20)
    logger.log_metrics({"loss": 3.0}, 30)
    entries = read_metrics(path)
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(10, 1.0), (20, 2.5), (30, 3.0)]
    assert entries[1]["val/NDCG@10"] == 0.1
    assert path.read_bytes().count(b"\n") == 4


def test_reading_tells_damage_from_absence(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_full_disk_is_an_error_and_leaves_whole_lines(tmp_path):
    class Full:
        """Takes `room` bytes, then no more."""

        def __init__(self, file, room):
            self.file, self.room = file, room

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            part = data[: self.room]
            self.room -= len(part)
            return self.file.write(part)

    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append({"step": 1, "loss": 0.5})
    journal._file = Full(journal._file, 7)
    with pytest.raises(UserError, match="No space left on device"):
        journal.append({"step": 2, "loss": 0.25})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def test_an_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        JsonlLogger(tmp_path / "file").log_metrics({"loss": 1.0}, 1)


# ---- W&B ------------------------------------------------------------------------------------------------------------


def test_each_stage_is_one_offline_run_in_the_same_group(tmp_path, capfd):
    from matplotlib.image import imsave

    imsave(tmp_path / "plot.png", torch.rand(4, 4, 3).numpy())
    for name in ("teacher", "student-seed0"):
        loggers = start(tmp_path / name, name)
        assert [type(logger) for logger in loggers] == [JsonlLogger, QuietWandbLogger]
        for logger in loggers:
            logger.log_metrics({"loss": torch.tensor(0.5).item(), "epoch": 0}, 10)
            logger.log_metrics({"loss": 0.25, "epoch": 1}, 20)
        log_images(loggers, {"plots/losses": tmp_path / "plot.png"})
        log_table(loggers, "comparison", ["model", "NDCG@10"], [["student", 0.1]])
        finish_loggers(loggers, {"epochs": 2})
    teacher, student = read_wandb(tmp_path / "teacher"), read_wandb(tmp_path / "student-seed0")
    assert teacher["id"].startswith("teacher-abc-")
    assert student["id"].startswith("student-seed0-abc-")
    assert teacher["group"] == student["group"] == "slmrec/default"
    assert (teacher["job_type"], student["job_type"], student["name"]) == ("teacher", "student", "student-seed0")
    assert student["project"] == "lit_llmers"
    assert student["config"]["settings"] == {"layers": 4}
    assert [row["loss"] for row in student["history"] if "loss" in row] == [0.5, 0.25]
    assert [row["trainer/global_step"] for row in student["history"] if "loss" in row] == [10, 20]
    assert any(key.startswith("plots/losses") for row in student["history"] for key in row)
    assert any(key.startswith("comparison") for row in student["history"] for key in row)
    assert student["summary"]["epochs"] == 2
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""  # nothing between a person and the progress bar
    assert len(read_metrics(tmp_path / "student-seed0" / "metrics.jsonl")) == 2


@pytest.mark.parametrize("failure", ["CommError", "UsageError", "ConnectionResetError", "ValueError"])
def test_wandb_failing_at_the_start_leaves_jsonl(tmp_path, monkeypatch, caplog, failure):
    import wandb

    error = getattr(wandb.errors, failure, None) or {"ValueError": ValueError}.get(failure, ConnectionResetError)

    def fail(**_):
        raise error("the server is down")

    monkeypatch.setattr(wandb, "init", fail)
    loggers = start(tmp_path)
    assert [type(logger) for logger in loggers] == [JsonlLogger]
    assert "the server is down" in caplog.text
    assert len(warnings(caplog)) == 1
    finish_loggers(loggers, {"epochs": 2})


def test_wandb_failing_in_the_middle_is_one_warning(tmp_path, monkeypatch, caplog):
    loggers = start(tmp_path)
    run = loggers[1].experiment

    def fail(*_, **__):
        raise ConnectionResetError("Connection lost")

    with monkeypatch.context() as broken:
        broken.setattr(type(run), "log", fail)
        for step in (1, 2, 3):
            for logger in loggers:
                logger.log_metrics({"loss": 1.0}, step)
        log_table(loggers, "comparison", ["model"], [["student"]])
        finish_loggers(loggers, {"epochs": 2})
    assert len(warnings(caplog)) == 1
    assert "Connection lost" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    loggers = start(tmp_path / "next", "next")  # and the next stage has a run of its own
    finish_loggers(loggers)
    assert read_wandb(tmp_path / "next")["id"].startswith("next-abc-")


def test_online_that_cannot_be_reached_goes_on_offline(tmp_path, monkeypatch, caplog):
    import wandb

    modes, init = [], wandb.init
    monkeypatch.setenv("WANDB_MODE", "online")  # what is set here, the fixture takes back
    monkeypatch.setattr("lit_llmers.loggers.wandb_mode", lambda _: "online")

    def unreachable(**arguments):
        modes.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("timed out")
        return init(**arguments)

    monkeypatch.setattr(wandb, "init", unreachable)
    loggers = start(tmp_path)
    finish_loggers(loggers)
    assert modes == ["online", "offline"]
    assert read_wandb(tmp_path)["id"].startswith("student-seed0-abc-")
    assert "timed out" in caplog.text


def testwandb_mode_is_respected(tmp_path, monkeypatch):
    import wandb

    wandb.teardown()  # its settings are read from the environment once
    monkeypatch.setenv("WANDB_MODE", "disabled")
    loggers = start(tmp_path)
    loggers[1].log_metrics({"loss": 1.0}, 1)
    finish_loggers(loggers)
    assert not (tmp_path / "wandb").exists()
    wandb.teardown()


def test_a_login_is_found_without_asking(tmp_path, monkeypatch):
    import wandb

    from lit_llmers.loggers import wandb_mode

    wandb.teardown()
    assert wandb_mode(wandb) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password none\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(wandb) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")  # credentials for another server do not count
    wandb.teardown()
    assert wandb_mode(wandb) == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    assert wandb_mode(wandb) == "offline"


def test_a_mode_that_there_is_not_is_named(monkeypatch):
    import wandb

    from lit_llmers.loggers import wandb_mode

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "foo")
    with pytest.raises(UserError, match=r"W&B refuses WANDB_MODE or the like \(.*'offline'.*\)\. Correct or unset it"):
        wandb_mode(wandb)
    wandb.teardown()


# ---- the others -----------------------------------------------------------------------------------------------------


def test_csv_keeps_the_parts_of_a_resumed_stage(tmp_path):
    for step in (1, 2):
        loggers = start(tmp_path, config={"logger": {"kind": "csv"}})
        for logger in loggers:
            logger.log_metrics({"loss": 0.5}, step)
            logger.save()
        finish_loggers(loggers)
    parts = sorted((tmp_path / "csv").glob("*/metrics.csv"))
    assert [part.read_text().split() for part in parts] == [["loss,step", "0.5,1"], ["loss,step", "0.5,2"]]


def test_what_is_missing_or_unknown_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Did you mean 'wandb'"):
        LoggerConfig(kind="wanddb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        start(tmp_path, config={"logger": {"kind": "tensorboard"}})
