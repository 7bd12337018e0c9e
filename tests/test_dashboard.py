"""The dashboard shows what runs really log, is the same each time, and asks no server that nobody is logged in to."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tiny import arguments

from lit_llmers import dashboard, fit
from lit_llmers.journal import read_metrics
from lit_llmers.reporting.results import Results
from lit_llmers.reporting.summary import figures

pytest.importorskip("wandb_workspaces", reason="the extra 'dashboard' is not installed")
SMALL = {
    "slmrec": [],
    "bigrec": ["stages.teacher.samples=64", "stages.teacher.trainer.max_epochs=1", "stages.lists.k=10"],
}


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


def given(name: str, folder: Path) -> list[str]:
    few = [f"recipe={name}", "trainer.max_epochs=2", "stages.export.export=[safetensors]", *SMALL[name]]
    return [*few, *(each for each in arguments(folder, recipe=name) if each.partition("=")[0] not in ("trainer.max_epochs",))]


@pytest.fixture(scope="module", params=SMALL)
def finished(request, tmp_path_factory) -> tuple[list[str], Path]:
    """The arguments of a small run that is done, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    command = given(request.param, folder)
    assert fit.main(command) == 0
    return [each for each in command if not each.startswith("logger")], folder / request.param / "default"


def panels(path: Path) -> list[dict[str, Any]]:
    sections = json.loads(path.read_text())["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        "Teacher, student and control",
        "Validation",
        "Loss terms",
        "Throughput",
        "Memory",
        "Gain by popularity",
        "Test",
    ]
    return [panel for section in sections for panel in section["panels"]]


def test_every_panel_shows_what_the_run_logged(finished, capsys, caplog):
    command, run = finished
    with caplog.at_level(logging.INFO):
        assert dashboard.main(command) == 0
    assert "There is no run" not in caplog.text
    assert "nobody is logged in" in capsys.readouterr().out
    results = Results(run)
    logged = {key for path in run.glob("*/metrics.jsonl") for entry in read_metrics(path) for key in entry}
    logged |= {"trainer/global_step"}
    shown = panels(run / "dashboard.json")
    for panel in shown:
        config = panel["config"]
        if panel["viewType"] == "Media Browser":
            assert {key.removeprefix("report/") for key in config["mediaKeys"]} <= {p.stem for p in (run / "plots").iterdir()}
        elif panel["viewType"] == "Weave":
            assert '"report/models"' in json.dumps(config)
        elif panel["viewType"] == "Run History Line Plot":
            assert config["metrics"]
            assert {*config["metrics"], config["xAxis"]} <= logged, config["chartTitle"]
        else:
            assert config["metrics"]
            assert set(config["metrics"]) <= logged | set(figures(results)), config["chartTitle"]
    told = {metric for panel in shown for metric in panel["config"].get("metrics", [])}
    terms = {key for key in logged if key.startswith("loss") and key.count("/") < 2}
    assert {*terms, "val/NDCG@10", "targets_per_second", "peak_memory_gb"} <= told


def test_the_same_plan_gives_the_same_file(finished):
    command, run = finished
    dashboard.main(command)
    before = (run / "dashboard.json").read_bytes()
    assert dashboard.main(command) == 0
    assert (run / "dashboard.json").read_bytes() == before
    ids = [panel["__id__"] for panel in panels(run / "dashboard.json")]
    assert len(set(ids)) == len(ids)
    section = json.loads(before)["spec"]["section"]["runSets"][0]
    assert section["filters"]["filters"][0]["value"] == f"{run.parent.name}/default"
    assert section["grouping"] == [{"section": "run", "name": "jobType"}]


def test_it_can_be_made_before_anything_ran_and_read_back(tmp_path, caplog):
    from wandb_workspaces.workspaces import internal

    with caplog.at_level(logging.INFO):
        assert dashboard.main(["recipe=pad", f"run.dir={tmp_path}", "seeds=[0,1]"]) == 0
    assert f"There is no run in {tmp_path / 'pad' / 'default'} yet" in caplog.text, "as where its name is mistyped"
    view = internal.View.model_validate_json((tmp_path / "pad" / "default" / "dashboard.json").read_text())
    assert view.display_name == "pad/default"
    assert "loss/alignment" in {
        m for panel in panels(tmp_path / "pad" / "default" / "dashboard.json") for m in panel["config"].get("metrics", [])
    }


def test_logged_in_the_workspace_is_made_once_and_then_changed(tmp_path, monkeypatch, capsys):
    """The server's part is made up: it names a new view and changes one that has an id."""
    import wandb
    from wandb_workspaces.workspaces import interface, internal

    taken = []

    def upsert(view):
        taken.append((view.entity, view.id))
        return {"upsertView": {"view": {"name": view.name, "id": view.id or f"id-{len(taken)}"}}}

    class Api:
        default_entity = "me"

        def __init__(self, **_):
            pass

    monkeypatch.setattr("lit_llmers.loggers.wandb_mode", lambda _: "online")
    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.example")
    monkeypatch.setattr(internal, "upsert_view2", upsert)
    for _ in range(2):
        assert dashboard.main(["recipe=student", f"run.dir={tmp_path}"]) == 0
    assert taken == [("me", ""), ("me", "id-1")]
    assert "Dashboard: https://wandb.example/me/lit_llmers?nw=" in capsys.readouterr().out
    monkeypatch.setattr(internal, "upsert_view2", lambda view: 1 / 0)
    assert dashboard.main(["recipe=student", f"run.dir={tmp_path}"]) == 0
    assert "W&B does not have it (division by zero)" in capsys.readouterr().out
    kept = json.loads((tmp_path / "student" / "default" / "dashboard.json").read_text())
    assert (kept["entity"], kept["id"]) == ("me", "id-1"), "and the next time it is changed again"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["student=sasrec"], "No recipe given"),
        (["recipe=slmrek"], "Did you mean 'slmrec'"),
        (["recipe=slmrec", "logger=csv"], "logger=csv does not log to W&B"),
        (["recipe=slmrec", "run.dir=/proc/nowhere"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_said(command, message, capsys):
    assert dashboard.main(command) == 2
    assert message in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert dashboard.main(["recipe=student", f"run.dir={tmp_path}"]) == 2
    assert "pip install 'lit-llmers[dashboard]'" in capsys.readouterr().err
    assert dashboard.main(["--help"]) == 0
    assert "usage: python -m lit_llmers.dashboard" in capsys.readouterr().out
