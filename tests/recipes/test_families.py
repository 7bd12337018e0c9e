"""Every method's recipe from beginning to end, at its smallest: it trains, reports beside its control, and exports."""

import json
import math

import numpy as np
import pytest
from planned import assert_planned
from tiny import COMMON, by_name

from lit_llmers import recipes
from lit_llmers.building import find
from lit_llmers.composing.resolving import resolve
from lit_llmers.fit import main
from lit_llmers.journal import read_metrics
from lit_llmers.serving import load_exported
from lit_llmers.stages import Stage

SMALL = {  # of recipes that hold more than students
    "bigrec": ["stages.teacher.samples=64", "stages.lists.k=10"],
    "said": ["stages.said.dim=16", "student.model.dim=16"],
    "alpharec": ["stages.student.model.dim=16"],
}
RANKED = ("cd", "dcd", "dllm2rec", "rd", "rrd", "soft-top-k", "unkd")
METHODS = sorted(set(recipes.available()) - {"slmrec", "student"})


CROSSED = [("dllm2rec", "caser", "caser"), ("rlmrec-con", "bpr-mf", "bpr_mf"), ("llm-esr", "gru4rec", "gru4rec")]


def overrides(name: str, folder) -> list[str]:
    given = [each for each in COMMON if not each.startswith("trainer.max_epochs")]
    given += [f"run.dir={folder}", "trainer.max_epochs=1", "stages.export.export=[safetensors]", *SMALL.get(name, [])]
    if name not in ("bigrec", "said"):
        given += ["text.dim=48", "student.model.dim=16"]
    if "stages.teacher.model.dim" in recipes.find(name).read_text() or name in (*RANKED, "hint", "htd"):
        given += ["stages.teacher.model.dim=24", "stages.teacher.model.layers=1"]
    if name in RANKED:
        given += ["stages.lists.k=60"]
    return given


def assert_reported(name: str, stages: dict[str, Stage]) -> None:
    """The figures of this run's models stand in its report, and student and control rank differently."""
    report = (stages["prepare"].run.folder / "report.md").read_text()
    assert report.startswith(f"# {name} on demo (default)\n")
    folder = stages["evaluate"].folder
    models = {model["name"]: model for model in json.loads((folder / "evaluation.json").read_text())["models"]}
    assert set(models) == set(stages["evaluate"].config.of)
    table = report.partition("## Results on the test users")[2].partition("\n### ")[0].replace("**", "")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    shown = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    for model, made in models.items():
        for metric in ("HR@10", "NDCG@10", "MRR"):
            assert shown[model][metric] == f"{made['metrics']['all'][metric]:.4f}", (model, metric)
    assert "| student against control |" in report
    student, control = (np.load(folder / models[model]["ranks"]) for model in ("student", "control"))
    assert (student != control).any(), "what the method adds changes nothing"


def assert_added(stages: dict[str, Stage]) -> None:
    """Every term of the student's loss was computed, and none of them in its control."""
    terms = {find("callbacks", part).name for part, _ in stages["student"].config.terms}
    for stage, expected in (("student", terms), ("control", set())):
        entries = read_metrics(stages[stage].folder / "metrics.jsonl")
        logged = {key.split("/")[1]: value for entry in entries for key, value in entry.items() if key.startswith("loss/")}
        assert logged.keys() == {"task", *expected}
        assert all(map(math.isfinite, logged.values()))


def run_whole(name: str, given: list[str]) -> dict[str, Stage]:
    """Run a method's recipe and check all that it leaves; returns its stages."""
    assert main([f"recipe={name}", *given]) == 0
    stages = by_name(resolve(recipes.compose(name, given)))
    assert all(stage.done for stage in stages.values())
    assert_planned(list(stages.values()))
    assert_reported(name, stages)
    assert_added(stages)
    student = load_exported(stages["export"].folder)
    assert student is not None
    described = json.loads((stages["export"].folder / "config.json").read_text())
    assert [entry["name"] for entry in described.get("fusion", [])] == [name for name, _ in stages["student"].config.fusions]
    return stages


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_from_data_to_export(name, tmp_path):
    run_whole(name, overrides(name, tmp_path))


@pytest.mark.parametrize(("name", "student", "backbone"), CROSSED)
def test_a_method_teaches_a_student_that_is_not_its_own(name, student, backbone, tmp_path):
    assert by_name(resolve(recipes.compose(name, [])))["student"].config.fit != backbone
    stages = run_whole(name, [*overrides(name, tmp_path), f"student={student}", "trainer.limit_train_batches=40"])
    assert stages["student"].config.fit == stages["control"].config.fit == backbone


def test_a_method_of_two_papers_parts_is_one_yaml(tmp_path):
    given = overrides("dllm2rec", tmp_path)
    recipe = str(recipes.PACKAGE.parent / "docs" / "dual-view-ranked.yaml")
    given = [each for each in given if "export" not in each]
    assert main([f"recipe={recipe}", *given]) == 0
    stages = by_name(resolve(recipes.compose(recipe, given)))
    assert [name for name, _ in stages["student"].config.terms] == ["self_distillation", "ranking_distillation"]
    assert (stages["prepare"].run.folder / "report.md").is_file()
