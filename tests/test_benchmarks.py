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
from lit_llmers.data.dataset import TEST
from lit_llmers.models import load_dataset, load_model

ENSEMBLES = Path(__file__).parent.parent / "benchmarks" / "ensembles.py"
ASKED = ("seeds=[0,1]", "student=lightgcn", "~stages.export")


@pytest.fixture(scope="module")
def added_up(tmp_path_factory) -> tuple[Path, dict[str, list[float]]]:
    """A run's folder, and validation and test NDCG@10 of one seed and of two, as the benchmark prints them."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, ENSEMBLES, "--stage", "student", "recipe=student", *arguments(folder, *ASKED, recipe="student")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return folder, {row[0]: [float(cell.split(" ")[0]) for cell in row[2:]] for row in rows if row[0].isdecimal()}


def test_one_seed_has_the_figures_of_its_own_training_and_report(added_up):
    folder, found = added_up
    stages = small(folder, *ASKED, recipe="student")
    best = [stage.summary["best"]["val/NDCG@10"] for stage in stages if stage.name == "student"]
    assert len(best) == 2
    assert found["1"][0] == pytest.approx(mean(best), abs=5e-5)
    assert fit.main(["recipe=student", *arguments(folder, *ASKED, recipe="student")]) == 0
    (evaluation,) = folder.rglob("evaluation.json")
    reported = [model["metrics"]["all"]["NDCG@10"] for model in json.loads(evaluation.read_text())["models"]]
    assert found["1"][1] == pytest.approx(mean(reported), abs=5e-5)


def test_two_seeds_rank_by_the_sum_of_their_scores(added_up):
    folder, found = added_up
    stages = [stage for stage in small(folder, *ASKED, recipe="student") if stage.name == "student"]
    dataset = load_dataset(stages[0])
    with torch.inference_mode():
        scores = sum(model.backbone()[0] @ model.backbone()[1].T for model in (load_model(s, dataset) for s in stages))
    gains = []
    for user, (start, stop) in enumerate(pairwise(dataset.offsets)):
        *met, target = dataset.items[start:stop].tolist()
        if dataset.split[stop - 1] != TEST:
            continue
        own, rivals = scores[user, target], scores[user, sorted(set(range(1, dataset.n_items + 1)) - {*met, target})]
        rank = float((rivals > own).sum() + 0.5 * (rivals == own).sum())
        gains.append(1 / math.log2(rank + 2) if rank < 10 else 0.0)
    assert found["2"][1] == pytest.approx(mean(gains), abs=5e-5)
