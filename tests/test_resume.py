"""A training that was killed after any batch goes on to the very same weights, bit for bit."""

import os
import shutil

import lightning as L
import pytest
import torch
from tiny import assert_equal_weights, by_name, small, weights

from lit_llmers import training as training_stage
from lit_llmers.errors import UserError
from lit_llmers.journal import read_metrics
from lit_llmers.running import run


class Killed(Exception):
    """Stands for kill -9: nothing of ours runs after it."""


class KillAfter(L.Callback):
    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_start(self, *_args) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


def interrupt(planned, name, batches, monkeypatch):
    """Run to the stage `name` and kill it after so many batches."""
    make_trainer, killed = training_stage.make_trainer, KillAfter(batches)
    with monkeypatch.context() as patch:
        patch.setattr(training_stage, "make_trainer", lambda stage, callbacks: make_trainer(stage, [*callbacks, killed]))
        with pytest.raises(Killed):
            run(planned, name)


def link(planned, whole, name):
    """What the stage `name` needs was done before, in another run."""
    for stage in planned:
        if stage.name == name:
            return stage
        stage.folder.parent.mkdir(parents=True, exist_ok=True)
        stage.folder.symlink_to(whole[stage.name].folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    planned = small(tmp_path_factory.mktemp("whole"))
    run(planned, "control")
    return by_name(planned)


@pytest.mark.parametrize("name", ["item_embeddings", "teacher", "student", "control"])
@pytest.mark.parametrize("batches", [1, 5, 10, 13, 20])  # ten batches are an epoch; a checkpoint comes every three
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, monkeypatch, name, batches):
    planned = small(tmp_path)
    stage = link(planned, uninterrupted, name)
    interrupt(planned, name, batches, monkeypatch)
    assert not stage.done
    assert (stage.folder / "last.ckpt").exists() == (batches >= 3)
    run(planned, name)
    assert_equal_weights(weights(stage), weights(uninterrupted[name]))
    ours, theirs = stage.summary, uninterrupted[name].summary
    assert (ours["best"], ours["epochs"]) == (theirs["best"], theirs["epochs"])


def test_killed_after_the_last_epoch_does_not_train_on(uninterrupted, tmp_path, monkeypatch):
    planned = small(tmp_path, "trainer.max_epochs=30", "trainer.patience=1")
    with monkeypatch.context() as patch:
        patch.setattr(training_stage, "count_parameters", lambda model: 1 / 0)  # dies when all is trained, before DONE
        with pytest.raises(ZeroDivisionError):
            run(planned, "item_embeddings")
    stage = by_name(planned)["item_embeddings"]
    before = weights(stage)
    epochs = torch.load(stage.folder / "last.ckpt", weights_only=True)["callbacks"]["Throughput"]["epochs"]
    run(planned, "item_embeddings")
    assert stage.summary["epochs"] == epochs < 30
    assert_equal_weights(weights(stage), before)


def test_checkpoint_of_another_model_is_refused(uninterrupted, tmp_path):
    planned = small(tmp_path)
    run(planned, "prepare")
    stage = by_name(planned)["item_embeddings"]
    stage.folder.mkdir()
    foreign = torch.load(uninterrupted["teacher"].folder / "best.ckpt", weights_only=True)
    torch.save(foreign, stage.folder / "last.ckpt")
    with pytest.raises(UserError, match="was written by stage .* it is the checkpoint of another model"):
        run(planned, "item_embeddings")


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.accumulate_grad_batches=2", "optimizer.schedule=cosine", "optimizer.warmup_steps=3"],
        ["trainer.accumulate_grad_batches=4", "trainer.limit_train_batches=7"],  # the epoch ends within an optimiser step
        [
            "signals.online=true",
            "stages.student.callbacks=[{feature_distillation:{from:signals,decay_epochs:2}},"
            "{deep_supervision:{blocks:2,share:0.5}}]",
        ],
    ],
    ids=["accumulate and schedule", "accumulate and limit", "online, decay and share"],
)
def test_the_same_with_other_settings(tmp_path, monkeypatch, settings):
    whole = by_name(small(tmp_path / "whole", *settings))
    run(list(whole.values()), "student")
    for batches in (5, 13):
        planned = small(tmp_path / str(batches), *settings)
        student = link(planned, whole, "student")
        interrupt(planned, "student", batches, monkeypatch)
        assert (student.folder / "last.ckpt").exists()
        run(planned, "student")
        assert_equal_weights(weights(student), weights(whole["student"]))
        assert student.summary["best"] == whole["student"].summary["best"]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("later", [0, 4])
def test_below_a_plateau_it_goes_on_at_the_lower_rate(tmp_path, monkeypatch, warmup, later):
    given = ["optimizer.schedule=plateau", "trainer.patience=1", "trainer.max_epochs=30", "student.optimizer.lr=0.3"]
    given += [f"optimizer.warmup_steps={warmup}", "student.model.dim=8", "trainer.limit_train_batches=10"]
    whole = by_name(small(tmp_path / "whole", *given, recipe="student"))
    run(list(whole.values()), "student")
    figures = [line["val/NDCG@10"] for line in read_metrics(whole["student"].folder / "metrics.jsonl") if "val/NDCG@10" in line]
    lowered = next(epoch for epoch, value in enumerate(figures) if epoch and value <= max(figures[:epoch])) + 1
    planned = small(tmp_path / "killed", *given, recipe="student")
    student = link(planned, whole, "student")
    interrupt(planned, "student", 10 * lowered + later, monkeypatch)
    rate = torch.load(student.folder / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"][0]["lr"]
    assert rate == pytest.approx(0.03), "it was killed after that"
    run(planned, "student")
    assert_equal_weights(weights(student), weights(whole["student"]))
    assert student.summary["best"] == whole["student"].summary["best"]
    assert student.summary["epochs"] == whole["student"].summary["epochs"] == len(figures)


def test_steps_in_the_rows_of_a_batch_alone_go_on_too(tmp_path, monkeypatch):
    given = ["student=sasrec", "student.loss.kind=sampled_softmax", "+student.model.sparse=true", "student.model.dim=8"]
    whole = by_name(small(tmp_path / "whole", *given, recipe="student"))
    run(list(whole.values()), "student")
    planned = small(tmp_path / "killed", *given, recipe="student")
    student = link(planned, whole, "student")
    interrupt(planned, "student", 13, monkeypatch)
    run(planned, "student")
    assert_equal_weights(weights(student), weights(whole["student"]))


@pytest.mark.parametrize("kept", [0, 100, 0.5], ids=["empty", "its head", "half"])
@pytest.mark.parametrize(
    ("file", "until", "stage"),
    [
        ("last.ckpt", "teacher", "teacher"),
        ("best.ckpt", "signals", "teacher"),
        ("item_table.npy", "teacher", "item_embeddings"),
    ],
)
def test_a_damaged_file_names_the_folder_to_remove(uninterrupted, tmp_path, monkeypatch, file, until, stage, kept):
    planned = small(tmp_path, "signals.dtype=float32")
    for each in planned[: [each.name for each in planned].index(until) + (file == "last.ckpt")]:
        shutil.copytree(uninterrupted[each.name].folder, each.folder)
    folder = by_name(planned)[stage].folder
    if file == "last.ckpt":
        shutil.rmtree(folder)
        interrupt(planned, stage, 5, monkeypatch)
    path = folder / file
    os.truncate(path, int(kept * path.stat().st_size) if kept == 0.5 else kept)
    with pytest.raises(
        UserError, match=rf"{file} cannot be read \(.+\)\. Remove the folder {folder} and give the same command"
    ):
        run(planned, until)
    shutil.rmtree(folder)
    run(planned, until)
