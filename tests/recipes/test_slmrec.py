"""The main job from its first stage to its report, on tiny generated data and for a few steps on real data."""

import json
import logging
import re

import numpy as np
import pytest
from planned import assert_planned
from tiny import arguments, by_name, small

from lit_llmers import fit
from lit_llmers.data.dataset import Dataset

MODELS = {"teacher", "student", "control", "item_embeddings"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with two seeds; its folder and what it printed."""
    import contextlib
    import io

    folder, printed = tmp_path_factory.mktemp("slmrec"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert fit.main(["recipe=slmrec", *arguments(folder, "seeds=[0,1]")]) == 0
    return folder / "slmrec" / "default", printed.getvalue()


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluation(run) -> dict:
    return json.loads(next(run.glob("evaluate-*/evaluation.json")).read_text())


def test_every_stage_is_done_once_for_each_of_its_seeds(finished):
    run, _ = finished
    done = sorted(path.parent.name.rpartition("-")[0] for path in run.glob("*/DONE"))
    repeated = [f"{name}-seed{seed}" for name in ("control", "student") for seed in (0, 1)]
    assert done == sorted(["prepare", "item_embeddings", "text", "teacher", "signals", "evaluate", "export", *repeated])
    assert not list(run.rglob("*.tmp"))
    assert not list(run.rglob("last.ckpt")), "nothing goes on from there any more"


def test_the_run_folder_holds_what_the_readme_says(finished):
    run, printed = finished
    report = (run / "report.md").read_text()
    for name in MODELS:
        assert f"| {name} " in report
    for metric in ("HR@1", "HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR"):
        assert metric in report
    assert "not finished" not in report
    assert "generated" in report
    plots = re.findall(r"\((plots/.*?\.png)\)", report)
    assert len(plots) > 3
    assert {f"plots/{path.name}" for path in (run / "plots").iterdir()} == set(plots)
    assert {entry["stage"] for entry in lines_of(run / "metrics.jsonl")} >= MODELS
    assert (run / "config.yaml").read_text().startswith("recipe: slmrec")
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert f"Report: {run / 'report.md'}" in printed
    assert "student" in printed


def test_every_model_is_evaluated_on_every_user(finished):
    run, _ = finished
    result = evaluation(run)
    data = Dataset.load(next(run.glob("prepare-*")))
    assert {(model["name"], model["seed"]) for model in result["models"]} == {
        ("teacher", 0),
        ("item_embeddings", 0),
        *((name, seed) for name in ("student", "control") for seed in (0, 1)),
    }
    for model in result["models"]:
        assert model["metrics"]["all"]["users"] == data.n_users
    by_seed = {model["seed"]: model["metrics"] for model in result["models"] if model["name"] == "student"}
    assert by_seed[0] != by_seed[1], "two seeds give two students"


def test_losses_are_logged_by_term_and_only_the_student_is_distilled(finished):
    run, _ = finished
    for stage, terms in {"student-seed1": {"feature", "deep_supervision"}, "control-seed1": set(), "teacher": set()}.items():
        (folder,) = run.glob(f"{stage}-*")
        logged = {key for entry in lines_of(folder / "metrics.jsonl") for key in entry}
        assert {key.split("/")[1] for key in logged if key.startswith("loss/")} == {"task", *terms}
        assert {"loss", "val/NDCG@10", "val/HR@10"} <= logged


def test_the_control_is_the_student_without_distillation(finished):
    run, _ = finished
    settings = [
        json.loads((next(run.glob(f"{name}-seed0-*")) / "config.json").read_text())["settings"]
        for name in ("student", "control")
    ]
    assert settings[0] | {"callbacks": []} == settings[1]
    assert len(settings[0]["callbacks"]) == 2


def test_the_same_command_again_does_nothing(finished, caplog):
    run, _ = finished
    caplog.set_level(logging.INFO, logger="lit_llmers")
    stages = [path for path in run.rglob("*") if path.is_file() and path.parent != run and path.parent.name != "plots"]
    stamps = {path: path.stat().st_mtime_ns for path in stages}
    report = (run / "report.md").read_text()
    elsewhere = json.loads((run / "environment.json").read_text()) | {"cpu": "Another CPU", "date": "2026-01-01T00:00:00+00:00"}
    (run / "environment.json").write_text(json.dumps(elsewhere))
    assert fit.main(["recipe=slmrec", *arguments(run.parents[1], "seeds=[0,1]")]) == 0
    assert json.loads((run / "environment.json").read_text()) == elsewhere, "this machine has made nothing of it"
    messages = [record.getMessage() for record in caplog.records if record.name == "lit_llmers.running"]
    assert len(messages) == 11
    assert all("done before, skipped" in message for message in messages)
    assert {path: path.stat().st_mtime_ns for path in stages} == stamps
    undated = [line for line in (run / "report.md").read_text().splitlines() if "environment.json" not in line]
    assert undated == [line for line in report.splitlines() if "environment.json" not in line]


def test_a_changed_student_reuses_the_teacher(finished):
    run, _ = finished
    again = small(run.parents[1], "seeds=[0,1]", "stages.student.callbacks=[{deep_supervision:{blocks:2}}]")
    assert {stage.name for stage in again if not stage.done} == {"student", "evaluate", "export"}


@pytest.mark.parametrize("examples", ["last", "prefixes"])
def test_the_other_training_examples_run_as_well(tmp_path, examples):
    few = ["trainer.limit_train_batches=2", "trainer.max_epochs=1", f"sequences.examples={examples}"]
    assert fit.main(["recipe=slmrec", *arguments(tmp_path, *few, "stages.export.export=[safetensors]")]) == 0
    (folder,) = (tmp_path / "slmrec" / "default").glob("evaluate-*")
    assert {model["name"] for model in json.loads((folder / "evaluation.json").read_text())["models"]} == MODELS


@pytest.mark.parametrize("student", ["sasrec", "gru4rec"])
def test_another_student_is_distilled_from_the_same_teacher(finished, student):
    run, _ = finished
    settings = [f"student={student}", "student.model.layers=2", "student.model.dim=8", "trainer.max_epochs=3"]
    given = [a for a in arguments(run.parents[1], *settings, "stage=student") if "stages.student.model" not in a]
    assert fit.main(["recipe=slmrec", *given]) == 0
    folder = max(run.glob("student-seed0-*"), key=lambda path: path.stat().st_mtime)
    assert json.loads((folder / "config.json").read_text())["settings"]["fit"] == student
    feature = [entry["loss/feature"] for entry in lines_of(folder / "metrics.jsonl") if "loss/feature" in entry]
    assert feature[-1] < feature[0]
    teachers = list(run.glob("teacher-*"))
    assert len(teachers) == 1, "the teacher was not trained again"


def test_a_few_steps_on_real_data(tmp_path, real_data):
    few = ["trainer.limit_train_batches=2", "trainer.max_epochs=1", "trainer.log_every=1"]
    given = arguments(tmp_path, "data=ml-100k", f"data.root={real_data}", *few)
    assert fit.main(["recipe=slmrec", *given]) == 0
    run = tmp_path / "slmrec" / "default"
    report = (run / "report.md").read_text()
    assert "ml-100k" in report
    assert "943 users, 1,682 items, 100,000 interactions" in report
    assert "say nothing about real users" not in report
    result = evaluation(run)
    assert {model["name"] for model in result["models"]} == MODELS
    assert all(model["metrics"]["all"]["users"] == 943 for model in result["models"])
    assert all(np.isfinite(model["metrics"]["all"]["MRR"]) for model in result["models"])
    stages = by_name(small(tmp_path, "data=ml-100k", f"data.root={real_data}", *few))
    assert all(stage.done for stage in stages.values())
    assert_planned(list(stages.values()))
    assert (stages["export"].folder / "model.onnx").is_file()
