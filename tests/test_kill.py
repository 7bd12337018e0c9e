"""kill -9 at any moment: the same command given again ends in the same results, and nothing half-written stays.

The processes are forked, which saves each the seconds of its imports; SIGKILL leaves them no more time to tidy up than any
other. Some die at a chosen file, just before or after it is renamed into place, which is where it hurts; others after a
random time.
"""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import arguments, by_name, small, weights

from lit_llmers import fit
from lit_llmers.journal import read_metrics

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
FEW = ["signals.shard_rows=300", "stages.export.export=[safetensors]"]
KILLS = [  # file that is renamed into place, which time, and whether the process dies before or after
    ("run.json", 1, "before"),
    ("split.npy", 1, "before"),
    ("dataset.json", 1, "after"),
    ("best.ckpt", 2, "before"),
    ("last.ckpt", 2, "after"),
    ("DONE", 1, "before"),
    ("item_table.npy", 1, "after"),
    ("shard-00001.npy", 1, "after"),
    ("shard-00003.npy", 1, "before"),
    ("manifest.json", 1, "before"),
    ("DONE", 2, "after"),
    ("last.ckpt", 4, "before"),
    ("best.ckpt", 1, "after"),
    ("ranks-student-seed0.npy", 1, "before"),
    ("evaluation.json", 1, "after"),
    ("model.safetensors", 1, "before"),
    ("report.md", 1, "before"),
]


def run_in_a_process(folder: Path, kill: tuple[str, int, str] | None, seconds: float | None = None) -> int | None:
    """Run the recipe in a forked process until it ends or is killed; return its exit status, None when it was killed."""
    child = os.fork()
    if child == 0:
        try:
            if kill:
                die_at(*kill)
            status = fit.main(["recipe=slmrec", *arguments(folder, *FEW)])
        except BaseException:  # a forked pytest must never go on as pytest
            status = 70
        os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def die_at(name: str, times: int, moment: str) -> None:
    replace, left = os.replace, times

    def replace_or_die(source, target):
        nonlocal left
        left -= Path(target).name == name
        if left == 0 and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_or_die


def results(folder: Path) -> dict:
    """All that a run worked out, timings left out."""
    stages = by_name(small(folder, *FEW))
    assert all(stage.done for stage in stages.values())
    evaluated = json.loads((stages["evaluate"].folder / "evaluation.json").read_text())
    fits = [stage for stage in stages.values() if stage.verb == "fit"]
    return {
        "losses": {stage.name: logged(stage, "loss") for stage in fits},
        "protocol": evaluated["protocol"],
        "models": [{key: m[key] for key in ("name", "seed", "metrics", "popularity")} for m in evaluated["models"]],
        "ranks": [np.load(stages["evaluate"].folder / m["ranks"]).tolist() for m in evaluated["models"]],
        "weights": {stage.name: weights(stage) for stage in fits},
        "tables": {stage.name: (stage.folder / "item_table.npy").read_bytes() for stage in [*fits, stages["text"]]},
        "shards": {path.name: path.read_bytes() for path in stages["signals"].folder.rglob("*.npy")},
        "validation": {stage.name: logged(stage, "val/") for stage in fits},
        "export": (stages["export"].folder / "model.safetensors").read_bytes(),
        "best": {stage.name: stage.summary["best"] for stage in fits},
        "epochs": {stage.name: stage.summary["epochs"] for stage in fits},
    }


def logged(stage, prefix: str) -> dict[int, dict]:
    """What a stage logged at each step under this prefix."""
    entries = {entry["step"]: entry for entry in read_metrics(stage.folder / "metrics.jsonl")}
    named = {step: {k: v for k, v in entry.items() if k.startswith(prefix)} for step, entry in entries.items()}
    return {step: entry for step, entry in named.items() if entry}


def assert_same(ours, theirs, where: str = "") -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{where}/{key}")
    elif isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_run(folder: Path, whole: dict, kills: int) -> None:
    ours = results(folder)
    for name, steps in whole["losses"].items():
        # a step is logged after the checkpoint that it may end with, so a kill may lose that line, and no other
        lost = steps.keys() - ours["losses"][name].keys()
        assert len(lost) <= kills, name
        assert ours["losses"][name] == {step: entry for step, entry in steps.items() if step not in lost}, name
    assert_same(ours | {"losses": None}, whole | {"losses": None})
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert fit.main(["recipe=slmrec", *arguments(folder, *FEW)]) == 0
    return results(folder)


def test_killed_at_many_files_and_run_to_the_end(whole, tmp_path):
    died = 0
    for kill in KILLS:
        status = run_in_a_process(tmp_path, kill)
        assert status in (0, None), kill
        died += status is None
    assert died > len(KILLS) - 4, "the files have other names now: hardly any process was killed"
    assert run_in_a_process(tmp_path, None) == 0
    assert_same_run(tmp_path, whole, died)


def test_killed_at_random_times_and_run_to_the_end(whole, tmp_path):
    random = np.random.default_rng(0)
    for seconds in random.uniform(0.3, 2.5, 4):
        assert run_in_a_process(tmp_path, None, float(seconds)) in (0, None)
    assert run_in_a_process(tmp_path, None) == 0
    assert_same_run(tmp_path, whole, 4)
