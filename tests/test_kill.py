"""kill -9 at any moment: the same command given again ends in the same results, and nothing half-written stays.

The processes are forked, which saves each the seconds of its imports; SIGKILL leaves them no more time to tidy up than any
other. Some die at a chosen file, just before or after it is renamed into place, which is where it hurts; others after a
random time.
"""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_same_run, ended, fork, results
from tiny import arguments

from lit_llmers import fit

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

    def run_to_the_kill() -> int:
        if kill:
            die_at(*kill)
        return fit.main(["recipe=slmrec", *arguments(folder, *FEW)])

    child = fork(run_to_the_kill)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = ended(child)
    return None if status < 0 else status


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert fit.main(["recipe=slmrec", *arguments(folder, *FEW)]) == 0
    return results(folder, *FEW)


def test_killed_at_many_files_and_run_to_the_end(whole, tmp_path):
    died = 0
    for kill in KILLS:
        status = run_in_a_process(tmp_path, kill)
        assert status in (0, None), kill
        died += status is None
    assert died > len(KILLS) - 4, "the files have other names now: hardly any process was killed"
    assert run_in_a_process(tmp_path, None) == 0
    assert_same_run(tmp_path, whole, died, *FEW)


def test_killed_at_random_times_and_run_to_the_end(whole, tmp_path):
    random = np.random.default_rng(0)
    for seconds in random.uniform(0.3, 2.5, 4):
        assert run_in_a_process(tmp_path, None, float(seconds)) in (0, None)
    assert run_in_a_process(tmp_path, None) == 0
    assert_same_run(tmp_path, whole, 4, *FEW)
