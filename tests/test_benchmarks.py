"""Benchmarks that make claims about quality, on what a run's own report says."""

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
import torch
from tiny import arguments, small

from lit_llmers import fit
from lit_llmers.backbones import CollaborativeBackbone
from lit_llmers.data.dataset import TEST, Dataset
from lit_llmers.models import load_dataset, load_model

ENSEMBLES = Path(__file__).parent.parent / "benchmarks" / "ensembles.py"
TUNING = ENSEMBLES.with_name("tuning.py")
ASKED = ("seeds=[0,1]", "~stages.export")
LENGTH = 8


@pytest.fixture(scope="module", params=["lightgcn", "sasrec"])
def added_up(tmp_path_factory, request) -> tuple[Path, list[str], dict[str, list[float]]]:
    """A run's folder, its settings, and validation and test NDCG@10 of one seed and of two, as the benchmark prints them."""
    folder, asked = tmp_path_factory.mktemp("runs"), [*ASKED, f"student={request.param}"]
    command = [sys.executable, ENSEMBLES, "--stage", "student", "recipe=student", *arguments(folder, *asked, recipe="student")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return folder, asked, {row[0]: [float(cell.split(" ")[0]) for cell in row[2:]] for row in rows if row[0].isdecimal()}


def test_one_seed_has_the_figures_of_its_own_training_and_report(added_up):
    folder, asked, found = added_up
    stages = small(folder, *asked, recipe="student")
    best = [stage.summary["best"]["val/NDCG@10"] for stage in stages if stage.name == "student"]
    assert len(best) == 2
    assert found["1"][0] == pytest.approx(mean(best), abs=5e-5)
    assert fit.main(["recipe=student", *arguments(folder, *asked, recipe="student")]) == 0
    (evaluation,) = folder.rglob("evaluation.json")
    reported = [model["metrics"]["all"]["NDCG@10"] for model in json.loads(evaluation.read_text())["models"]]
    assert found["1"][1] == pytest.approx(mean(reported), abs=5e-5)


def of_all_users(backbone, dataset: Dataset) -> torch.Tensor:
    """Scores `[U, n+1]` by what each user met before the last item."""
    if isinstance(backbone, CollaborativeBackbone):
        users, items = backbone()
        return users @ items.T
    histories = torch.zeros(len(dataset.users), LENGTH, dtype=torch.int64)
    for user, (start, stop) in enumerate(pairwise(dataset.offsets)):
        known = torch.from_numpy(dataset.items[start : stop - 1].astype("int64"))[-LENGTH:]
        histories[user, LENGTH - len(known) :] = known
    return backbone.head(backbone(histories, histories > 0)[-1][:, -1]) @ backbone.item_table().T


def test_two_seeds_rank_by_the_sum_of_their_scores(added_up):
    folder, asked, found = added_up
    stages = [stage for stage in small(folder, *asked, recipe="student") if stage.name == "student"]
    dataset = load_dataset(stages[0])
    with torch.inference_mode():
        scores = sum(of_all_users(load_model(stage, dataset).backbone, dataset) for stage in stages)
    gains = []
    for user, (start, stop) in enumerate(pairwise(dataset.offsets)):
        *met, target = dataset.items[start:stop].tolist()
        if dataset.split[stop - 1] != TEST:
            continue
        own, rivals = scores[user, target], scores[user, sorted(set(range(1, dataset.n_items + 1)) - {*met, target})]
        rank = float((rivals > own).sum() + 0.5 * (rivals == own).sum())
        gains.append(1 / math.log2(rank + 2) if rank < 10 else 0.0)
    assert found["2"][1] == pytest.approx(mean(gains), abs=5e-5)


@pytest.mark.parametrize("name", ["large_record", "slmrec_gap"])
def test_a_question_for_help_is_answered_and_writes_nothing(tmp_path, name):
    script = ENSEMBLES.with_name(f"{name}.py")
    asked = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert f"python benchmarks/{name}.py" in " ".join(asked.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_seeds_of_what_is_counted_are_refused(tmp_path):
    given = arguments(tmp_path, "seeds=[0,1]", "student=popularity", recipe="student")
    command = [sys.executable, ENSEMBLES, "--stage", "student", "recipe=student", *given]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "error: stage 'student' counts and is not trained, so all its seeds are one model." in ended.stderr


def test_a_search_counts_epochs_from_one_as_progress_does(tmp_path):
    given = arguments(tmp_path, "trainer.max_epochs=1", "student=sasrec", "student.model.dropout=.1,.2", recipe="student")
    command = [sys.executable, TUNING, "recipe=student", *given]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[-2:]]
    assert sorted(row[0] for row in rows) == [".1", ".2"]
    assert [row[3] for row in rows] == ["1", "1"]
