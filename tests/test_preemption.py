"""SIGTERM and SIGUSR1 at any moment: the process stops where it can go on, says so, and loses nothing, no line of its log."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from runs import assert_same_run, ended, fork, logged, results, strays
from tiny import arguments, assert_equal_weights, by_name, small, weights

from lit_llmers import comparable, compare, fit, jobs, preemption
from lit_llmers.callbacks.preemption import leave_signals_alone
from lit_llmers.data.loader import EvaluationBatches, SequenceDataModule
from lit_llmers.files import write_json
from lit_llmers.journal import read_journal, read_metrics
from lit_llmers.running import run
from lit_llmers.stages import Stage

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
FEW = ["signals.shard_rows=300", "stages.export.export=[safetensors]"]
STATUS = {signal.SIGUSR1: 3, signal.SIGTERM: 143}


@pytest.fixture
def asked(monkeypatch):
    """Ask this process to stop, without a signal."""
    return lambda by: monkeypatch.setattr(preemption, "_asked", by)


# ---- the whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nobody stops ends in, and the seconds that it takes on this machine."""
    folder, started = tmp_path_factory.mktemp("whole"), time.monotonic()
    assert fit.main(["recipe=slmrec", *arguments(folder, *FEW)]) == 0
    return results(folder, *FEW), time.monotonic() - started


def start(folder: Path, *more: str) -> int:
    """The recipe in a forked process, which spares it the imports, with the signals heard as the command hears them."""

    def listen_and_run() -> int:
        preemption.listen()
        return fit.main(["recipe=slmrec", *arguments(folder, *FEW, *more)])

    return fork(listen_and_run)


def test_stopped_at_random_times_and_run_to_the_end(whole, tmp_path):
    (expected, seconds), random, stops = whole, np.random.default_rng(1), 0
    for number in range(12):
        by = (signal.SIGUSR1, signal.SIGTERM)[number % 2]
        child = start(tmp_path)
        time.sleep(random.uniform(0.03, 0.15) * seconds)
        os.kill(child, by)
        status = ended(child)
        assert status in (0, STATUS[by], -by), "the last where it came before the process could listen"
        assert not [path for path in strays(tmp_path) if not path.endswith("last.ckpt")]
        if status == 0:
            break
        stops += status > 0
    assert stops > 4, "hardly ever was it stopped"
    assert ended(start(tmp_path)) == 0
    assert_same_run(tmp_path, expected, 0, *FEW)
    for stage in small(tmp_path, *FEW):
        if stage.verb == "fit":
            lines = [line for line in (stage.folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
            assert len(lines) == len(read_losses(stage)), f"{stage.name} trained a step twice"


def read_losses(stage) -> list[float]:
    return [entry["loss"] for entry in read_metrics(stage.folder / "metrics.jsonl") if "loss" in entry]


# ---- where a training stops --------------------------------------------------------------------------------------------


class AskAt(L.Callback):
    """A signal that comes within a batch, or within a batch of a validation, counted from where training began this time."""

    def __init__(self, batch: int, validating: bool) -> None:
        self.left, self.validating = batch, validating

    def on_train_batch_start(self, *_args) -> None:
        self._count(not self.validating)

    def on_validation_batch_end(self, *_args) -> None:
        self._count(self.validating)

    def _count(self, counts: bool) -> None:
        self.left -= counts
        if self.left < 0:
            preemption._asked = signal.SIGUSR1


@pytest.fixture
def interrupted(monkeypatch, asked):
    """Run to a stage's end, or to the signal: then it returns the optimiser steps that `last.ckpt` holds."""
    from lit_llmers import training

    make = training.make_trainer

    def interrupted(planned, name: str, batch: int, validating: bool = False) -> int | None:
        asked(None)
        with monkeypatch.context() as patch:
            patch.setattr(
                training, "make_trainer", lambda stage, callbacks: make(stage, [AskAt(batch, validating), *callbacks])
            )
            try:
                run(planned, name)
            except preemption.Stopped:
                return torch.load(by_name(planned)[name].folder / "last.ckpt", weights_only=True)["global_step"]
            finally:
                preemption._asked = None
        return None

    return interrupted


@pytest.mark.parametrize(
    ("settings", "batch", "step"),
    [
        ([], 0, 1),
        ([], 4, 5),
        ([], 9, 10),  # the last batch of the first epoch
        (["trainer.accumulate_grad_batches=4"], 0, 1),  # three batches more, so that no gradient is lost
        (["trainer.accumulate_grad_batches=4"], 4, 2),
        (["trainer.accumulate_grad_batches=4"], 8, 3),  # the epoch ends within a step
    ],
)
def test_it_stops_after_the_optimiser_step_at_hand_and_goes_on_exactly(tmp_path, interrupted, settings, batch, step):
    whole, planned = (small(tmp_path / name, "trainer.max_epochs=2", *settings) for name in ("whole", "stopped"))
    run(whole, "item_embeddings")
    assert interrupted(planned, "item_embeddings", batch) == step
    run(planned, "item_embeddings")
    ours, theirs = by_name(planned)["item_embeddings"], by_name(whole)["item_embeddings"]
    assert_equal_weights(weights(ours), weights(theirs))
    assert (ours.summary["best"], ours.summary["epochs"]) == (theirs.summary["best"], theirs.summary["epochs"])
    assert read_losses(ours) == read_losses(theirs)


@pytest.mark.parametrize(
    ("settings", "batch", "step"),
    [
        ([], 0, 10),
        ([], 2, 10),
        ([], 10, 20),  # of the second epoch, as there are eight
        (["trainer.max_epochs=4", "trainer.validate_every=2", "trainer.accumulate_grad_batches=4"], 0, 6),
        (["trainer.max_epochs=3", "trainer.patience=1", "optimizer.lr=0.3"], 10, 20),  # the second is no better: the end
    ],
)
def test_a_validation_is_left_and_begun_anew(tmp_path, monkeypatch, interrupted, settings, batch, step):
    monkeypatch.setattr("lit_llmers.data.loader.SequenceDataModule.val_dataloader", small_batches)
    whole, planned = (small(tmp_path / name, "trainer.max_epochs=2", *settings) for name in ("whole", "stopped"))
    run(whole, "item_embeddings")
    assert interrupted(planned, "item_embeddings", batch, validating=True) == step
    ours, theirs = by_name(planned)["item_embeddings"], by_name(whole)["item_embeddings"]
    assert len(logged(ours, "val/")) == (step == 20), "nothing is said of a validation that was left"
    run(planned, "item_embeddings")
    assert_equal_weights(weights(ours), weights(theirs))
    for name in ("best", "epochs"):
        assert ours.summary[name] == theirs.summary[name]
    assert written(ours) == written(theirs), "each step and each validation is there once"


def written(stage: Stage) -> list[dict]:
    """Every line of a loss or of a validation, in order, without times."""
    lines = [entry for entry in read_journal(stage.folder / "metrics.jsonl") if {"loss", "val/MRR"} & set(entry)]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def small_batches(data: SequenceDataModule) -> EvaluationBatches:
    """Eight batches of a validation."""
    return EvaluationBatches(data.validation, -(-len(data.validation) // 8), data.mask_history)


def test_asked_between_two_stages_the_next_one_is_not_begun(tmp_path, asked):
    planned = small(tmp_path, "trainer.max_epochs=1")
    run(planned, "item_embeddings")
    asked(signal.SIGTERM)
    with pytest.raises(preemption.Stopped):
        run(planned, "text")
    assert not by_name(planned)["text"].folder.exists()


def test_a_record_that_is_asked_to_stop_keeps_the_shard_that_is_whole(tmp_path, monkeypatch, asked):
    from lit_llmers import record

    planned = small(tmp_path, "trainer.max_epochs=1", "signals.shard_rows=300")
    run(planned, "teacher")
    states = record.block_states

    def ask(*args):
        asked(signal.SIGTERM)
        return states(*args)

    with monkeypatch.context() as patch:
        patch.setattr(record, "block_states", ask)
        with pytest.raises(preemption.Stopped):
            run(planned, "signals")
    folder = by_name(planned)["signals"].folder
    assert [path.name for path in folder.rglob("shard-*.npy")] == ["shard-00000.npy"]
    asked(None)
    run(planned, "signals")
    assert by_name(planned)["signals"].done


def test_lightning_registers_no_handlers_of_its_own():
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    leave_signals_alone(trainer)
    before = signal.getsignal(signal.SIGTERM)
    trainer._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before
    assert hasattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"), "another version of Lightning asks elsewhere"


# ---- the commands ------------------------------------------------------------------------------------------------------


def command(module: str, *given: str) -> subprocess.Popen:
    program = [sys.executable, "-m", f"lit_llmers.{module}", *given]
    return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("by", STATUS, ids=lambda by: by.name)
def test_asked_while_it_imports_it_ends_soon_and_has_written_nothing(tmp_path, by):
    process = command("fit", "recipe=slmrec", *arguments(tmp_path))
    maps = Path(f"/proc/{process.pid}/maps")
    while maps.exists() and "libtorch" not in maps.read_text():  # within the import of torch
        time.sleep(0.01)
    process.send_signal(by)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == STATUS[by]
    assert said.strip() == f"Stopped by {by.name}. The same command goes on from here."
    assert not list(tmp_path.iterdir())


def test_the_first_line_of_the_command_listens():
    """Before anything else is imported that takes time."""
    lines = Path(fit.__file__).read_text().splitlines()
    code = [line for line in lines[1:] if line]
    assert code[:3] == [
        "from lit_llmers import preemption",
        'if __name__ == "__main__":',
        "    preemption.listen()  # before anything that takes time is imported",
    ]
    heavy = "import sys; before = set(sys.modules); import lit_llmers.preemption; print(len(set(sys.modules) - before))"
    assert int(subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout) < 40


def test_a_comparison_passes_it_on_and_ends(tmp_path):
    long = arguments(tmp_path, "~stages.export", "trainer.max_epochs=200", "trainer.patience=0", recipe="student")
    process = command("compare", "students=[sasrec,gru4rec]", *long)
    said = ""
    for line in process.stderr:
        said += line
        if "student-seed0            epoch  2" in line:
            process.send_signal(signal.SIGTERM)
            break
    said += process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    assert said.count("Stopped by SIGTERM. The same command goes on from here.") == 2, "the run's word and the comparison's"
    assert "gru4rec" not in said, "no other run is started"
    assert "failed" not in said
    assert not [path for path in strays(tmp_path) if not path.endswith("last.ckpt")]
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] > 10


@pytest.mark.parametrize(
    ("ask", "ends"),
    [
        (lambda begun: preemption._ask(signal.SIGTERM, None), preemption.Stopped),  # as the handler does
        (lambda begun: begun[0].send_signal(signal.SIGTERM), preemption.Stopped),
        (lambda begun: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt),
    ],
    ids=["the comparison", "one of its runs", "Ctrl-C that it alone gets"],
)
def test_who_is_asked_to_stop_takes_all_along_that_are_at_work(tmp_path, monkeypatch, capfd, ask, ends):
    real, begun = subprocess.Popen, []
    waits = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); print('at work', file=sys.stderr)"

    def stand_in(command, **kwargs):
        begun.append(real([sys.executable, "-u", "-c", f"{waits}; signal.alarm(20); signal.pause()"], **kwargs))
        return begun[-1]

    monkeypatch.setattr(jobs.subprocess, "Popen", stand_in)
    monkeypatch.setattr(preemption, "_asked", None)
    given = ["students=[sasrec,gru4rec]", "jobs=2", *arguments(tmp_path, recipe="student")]
    root, runs = comparable.planned_runs(comparable.parse(given))
    (runs[0].stages[0].folder / "DONE").parent.mkdir(parents=True)
    write_json(runs[0].stages[0].folder / "DONE", {"seconds": 1.0, "summary": {}})  # so both can train
    said = ""

    def wait_and_ask():
        nonlocal said
        while said.count("at work") < 2:
            time.sleep(0.05)
            said += capfd.readouterr().err
        ask(begun)

    asking = threading.Thread(target=wait_and_ask)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
    try:
        asking.start()
        with pytest.raises(ends):
            compare.run_all(runs, root, 2)
        asking.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [process.returncode for process in begun] == [143, 143]
    assert [f"{name:<16} at work" in said for name in ("sasrec", "gru4rec")] == [True, True]


@pytest.mark.parametrize("by", STATUS, ids=lambda by: by.name)
def test_a_run_that_was_stopped_by_itself_stops_the_comparison(monkeypatch, by):
    stopped = subprocess.Popen  # a run that ends as a stopped one does

    def ends(command, **kwargs):
        return stopped([sys.executable, "-c", f"raise SystemExit({STATUS[by]})"], **kwargs)

    monkeypatch.setattr(jobs.subprocess, "Popen", ends)
    with pytest.raises(preemption.Stopped, match=by.name):
        jobs.start(["recipe=slmrec"])


@pytest.mark.parametrize(
    ("status", "by"), [(3, signal.SIGUSR1), (143, signal.SIGTERM), (-10, signal.SIGUSR1), (-15, signal.SIGTERM)]
)
def test_exit_statuses_of_stopped_processes(status, by):
    assert preemption.by_status(status) is by
    assert preemption.by_status(1) is preemption.by_status(-9) is preemption.by_status(0) is None


def test_a_child_that_starts_after_the_signal_is_asked_too(asked):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        asked(signal.SIGTERM)
        with preemption.passing_on_to(child.pid):
            assert child.wait(10) == -signal.SIGTERM
