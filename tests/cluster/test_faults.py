"""Kills at random times over all stages, and process groups that are stopped, lose a process, and go on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TORCHRUN, alive, start, until, workers
from runs import assert_same_run, ended, fork, logged, results, strays
from tiny import arguments, assert_equal_weights, by_name, small, weights

from lit_llmers import fit, preemption
from lit_llmers.running import run
from lit_llmers.signals import SignalReader
from lit_llmers.stages import Stage

# ---- thirty kills ------------------------------------------------------------------------------------------------------

KILLS = 30
REAL = 7  # of them hit a command of its own, imports included; the others a forked process, which has imported
FEW = ["signals.shard_rows=300", "stages.export.export=[safetensors]", "trainer.max_epochs=2"]
ORDERLY = {signal.SIGUSR1: {3, -signal.SIGUSR1}, signal.SIGTERM: {143, -signal.SIGTERM}}  # or before it could listen


def command(folder: Path) -> list[str]:
    return ["recipe=slmrec", *arguments(folder, *FEW)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nobody kills ends in, and the seconds that it takes on this machine."""
    folder, started = tmp_path_factory.mktemp("whole"), time.monotonic()
    assert fit.main(command(folder)) == 0
    return results(folder, *FEW), time.monotonic() - started


def forked(folder: Path) -> int:
    def listen_and_run() -> int:
        preemption.listen()
        with open(os.devnull, "w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
            return fit.main(command(folder))

    return fork(listen_and_run)


def struck(folder: Path, by: signal.Signals, seconds: float, real: bool) -> tuple[int, str | None]:
    """Start the command, strike after so long, and return its exit status and the stage that it was in."""
    if real:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        program = [sys.executable, "-m", "lit_llmers.fit", *command(folder)]
        process = subprocess.Popen(program, **quiet)  # type: ignore[call-overload]
        child, wait = process.pid, process.wait
    else:
        child = forked(folder)
        wait = lambda: ended(child)  # noqa: E731
    time.sleep(seconds)
    at_work = [path.parent.name.partition("-")[0] for path in folder.glob("slmrec/default/*/.lock")]
    os.kill(child, by)
    return wait(), at_work[0] if at_work else None


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_thirty_kills_change_nothing(whole, tmp_path):
    expected, seconds = whole
    random, kinds = np.random.default_rng(5), (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
    real = set(random.choice(KILLS, REAL, replace=False).tolist())
    number, struck_in, at, slower = 0, 0, set(), 1.0
    folder = tmp_path / "0"
    struck_at: dict[Path, int] = {folder: 0}
    while number < KILLS:
        by = kinds[number % 3]
        longest = slower * seconds / (2 if number in real else 5)  # the imports take a good part of it
        status, stage = struck(folder, by, random.uniform(0.05, longest), number in real)
        slower = 1.0 if stage or status == 0 else min(1.5 * slower, 8.0)  # than when the seconds were taken
        if status == 0:  # it was done before: the next kills hit a run of their own
            assert_same_run(folder, expected, struck_at[folder], *FEW)
            folder = tmp_path / str(number)
            struck_at[folder] = 0
            continue
        assert status in ({-signal.SIGKILL} if by is signal.SIGKILL else ORDERLY[by])
        number += 1
        struck_in += stage is not None
        struck_at[folder] += by is signal.SIGKILL  # only these may lose a line of the log
        at |= {stage}
    assert ended(forked(folder)) == 0
    assert_same_run(folder, expected, struck_at[folder], *FEW)
    assert struck_in > KILLS / 3
    assert len(at - {None}) > 3, "they hit too few stages"


# ---- two processes -----------------------------------------------------------------------------------------------------

TWO = [
    "stages.teacher.trainer={strategy: ddp, devices: 2, accelerator: cpu, max_epochs: 30, patience: 0}",
    "signals.dtype=float32",
]


def launch(folder: Path, *launcher: str) -> subprocess.Popen[str]:
    """The recipe up to its record, in a session of its own."""
    return start("recipe=slmrec", *arguments(folder, *TWO), "stage=signals", launcher=launcher)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, Stage]:
    """By two processes that torchrun starts: they walk all stages, and form a group for the teacher and one for the record."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = launch(folder, *TORCHRUN)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert said.count("prepare                  starts") == 1, "rank 0 alone does what is for one process"
    return by_name(small(folder, *TWO))


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory) -> dict[str, Stage]:
    """The same command in a plain shell: stopped in good order, then bereft of a process, then brought to its end."""
    folder = tmp_path_factory.mktemp("disturbed")
    process = launch(folder)
    until(process, r"teacher +epoch +2 ")
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 3, said
    assert said.strip().endswith("Stopped by SIGUSR1. The same command goes on from here.")
    assert said.count("Stopped by") == 1
    stages = by_name(small(folder, *TWO))
    assert (stages["teacher"].folder / "last.ckpt").exists()
    assert not [path for path in strays(folder) if not path.endswith("last.ckpt")]

    process = launch(folder)
    until(process, r"teacher +epoch")
    group = workers(process)
    assert len(group) == 2
    os.kill(group[1], signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1, said
    assert "error: Stage 'teacher': rank 1 of 2 was killed by SIGKILL, as the system does when memory runs out." in said
    assert not [pid for pid in group if alive(pid)], "a dead rank ends all"

    process = launch(folder)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return stages


def test_a_group_that_was_stopped_and_lost_a_process_goes_on_exactly(undisturbed, disturbed):
    ours, theirs = disturbed["teacher"], undisturbed["teacher"]
    assert_equal_weights(weights(ours), weights(theirs))
    assert (ours.summary["best"], ours.summary["epochs"]) == (theirs.summary["best"], theirs.summary["epochs"])
    losses = [logged(stage, "loss") for stage in (ours, theirs)]
    assert len(losses[1].keys() - losses[0].keys()) <= 1, "the kill may lose a line, the signal none"
    assert losses[0].items() <= losses[1].items()
    assert not strays(ours.run.folder)


def test_both_processes_record_and_it_is_one_record(undisturbed, disturbed):
    records = [SignalReader(stages["signals"].folder / "block_states") for stages in (undisturbed, disturbed)]
    rows = torch.arange(len(records[0]))
    assert len(records[0].spec.shards) > 4, "so that each has its share"
    assert torch.equal(records[0][rows], records[1][rows])
    assert undisturbed["signals"].summary["rows"] == len(rows)
    assert undisturbed["signals"].summary["bytes"] > 4 * records[0][rows].numel()


def test_one_process_goes_on_with_the_record_of_two(disturbed, tmp_path):
    """It keeps what is there, and makes what is missing as they would have."""
    stage = disturbed["signals"]
    whole = SignalReader(stage.folder / "block_states")
    rows = torch.arange(len(whole))
    before = whole[rows]
    alone = by_name(small(tmp_path, "stages.teacher.trainer={max_epochs: 30, patience: 0}", "signals.dtype=float32"))
    assert alone["signals"].folder.name == stage.folder.name, "the number of processes renames nothing"
    for need in ("prepare", "item_embeddings", "text", "teacher"):
        alone[need].folder.parent.mkdir(parents=True, exist_ok=True)
        alone[need].folder.symlink_to(disturbed[need].folder)
    shutil.copytree(stage.folder, alone["signals"].folder)
    (alone["signals"].folder / "DONE").unlink()
    for name in ("manifest.json", "shard-00001.npy", "shard-00004.json"):
        (alone["signals"].folder / "block_states" / name).unlink()
    run(list(alone.values()), "signals")
    torch.testing.assert_close(SignalReader(alone["signals"].folder / "block_states")[rows], before, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="a kernel's favour")
def test_a_killed_command_leaves_no_process_behind(undisturbed, tmp_path):
    for name in ("prepare", "item_embeddings", "text"):
        stage = by_name(small(tmp_path, *TWO))[name]
        stage.folder.parent.mkdir(parents=True, exist_ok=True)
        stage.folder.symlink_to(undisturbed[name].folder)
    process = launch(tmp_path)
    until(process, r"teacher +starts")
    group = workers(process)
    process.kill()
    process.communicate(timeout=60)
    until_then = time.monotonic() + 20
    while any(map(alive, group)):
        assert time.monotonic() < until_then, "its processes outlived it"
        time.sleep(0.1)
