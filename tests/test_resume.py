"""A training that was killed after any batch goes on to the very same weights, bit for bit."""

import lightning as L
import pytest
import torch

from lit_llmers import recipes
from lit_llmers import training as training_stage
from lit_llmers.errors import UserError
from lit_llmers.stages import plan, run

SMALL = [
    "logger=csv",
    "data.generator.users=150",
    "data.generator.items=100",
    "data.generator.longest=20",
    "sequences.max_length=8",
    "trainer.batch_size=16",
    "trainer.max_epochs=3",
    "trainer.patience=2",
    "trainer.checkpoint_every=3",
    "stages.item_embeddings.model.dim=8",
    "teacher.config.hidden_size=16",
    "teacher.config.intermediate_size=16",
    "teacher.config.num_attention_heads=2",
    "teacher.config.num_key_value_heads=2",
    "stages.teacher.model.layers=4",
    "stages.student.model.layers=2",
    "stages.signals.blocks=2",
    "stages.student.callbacks=[{feature_distillation:{from:signals}},{deep_supervision:{blocks:2}}]",
    "stages.teacher.model.dropout=0.1",
    "stages.student.model.dropout=0.1",
]


class Killed(Exception):
    """Stands for kill -9: nothing of ours runs after it."""


class KillAfter(L.Callback):
    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_start(self, *_args) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


def stages(folder, *overrides):
    return plan(recipes.compose("slmrec", [*SMALL, f"run.dir={folder}", *overrides]))


def weights(stage):
    return torch.load(stage.folder / "best.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    planned = stages(tmp_path_factory.mktemp("whole"))
    run(planned, "control")
    return {stage.name: stage for stage in planned}


@pytest.mark.parametrize("name", ["item_embeddings", "teacher", "student", "control"])
@pytest.mark.parametrize("batches", [1, 5, 10, 13, 20])  # ten batches are an epoch; a checkpoint comes every three
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, monkeypatch, name, batches):
    planned = stages(tmp_path)
    for stage in planned:  # what the killed stage needs was done before
        if stage.name == name:
            break
        stage.folder.parent.mkdir(parents=True, exist_ok=True)
        stage.folder.symlink_to(uninterrupted[stage.name].folder)
    make_trainer = training_stage.make_trainer
    killed = KillAfter(batches)
    with monkeypatch.context() as patch:
        patch.setattr(
            training_stage, "make_trainer", lambda stage, callbacks: make_trainer(stage, [*callbacks, killed])
        )
        with pytest.raises(Killed):
            run(planned, name)
    assert not stage.done
    assert (stage.folder / "last.ckpt").exists() == (batches >= 3)
    run(planned, name)
    resumed, whole = weights(stage), weights(uninterrupted[name])
    assert resumed.keys() == whole.keys()
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key
    ours, theirs = stage.summary, uninterrupted[name].summary
    assert (ours["best"], ours["epochs"]) == (theirs["best"], theirs["epochs"])


def test_killed_after_the_last_epoch_does_not_train_on(uninterrupted, tmp_path, monkeypatch):
    planned = stages(tmp_path, "trainer.max_epochs=30", "trainer.patience=1")
    with monkeypatch.context() as patch:
        patch.setattr(training_stage, "count_parameters", lambda model: 1 / 0)  # dies when all is trained, before DONE
        with pytest.raises(ZeroDivisionError):
            run(planned, "item_embeddings")
    stage = next(stage for stage in planned if stage.name == "item_embeddings")
    before = weights(stage)
    epochs = torch.load(stage.folder / "last.ckpt", weights_only=True)["callbacks"]["Throughput"]["epochs"]
    run(planned, "item_embeddings")
    assert stage.summary["epochs"] == epochs < 30
    assert all(torch.equal(value, before[key]) for key, value in weights(stage).items())


def test_checkpoint_of_another_model_is_refused(uninterrupted, tmp_path):
    planned = stages(tmp_path)
    run(planned, "prepare")
    stage = next(stage for stage in planned if stage.name == "item_embeddings")
    stage.folder.mkdir()
    foreign = torch.load(uninterrupted["teacher"].folder / "best.ckpt", weights_only=True)
    torch.save(foreign, stage.folder / "last.ckpt")
    with pytest.raises(UserError, match="is of another model"):
        run(planned, "item_embeddings")
