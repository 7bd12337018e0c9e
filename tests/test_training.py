"""Settings of the Trainer that a recipe or a user chooses."""

import lightning as L
import pytest
from tiny import by_name, small

from lit_llmers import training
from lit_llmers.composing.resolving import resolve
from lit_llmers.errors import UserError
from lit_llmers.journal import read_metrics
from lit_llmers.recipes import compose
from lit_llmers.running import run


def student(folder, *overrides):
    """The trained student of the smallest `recipe=student`."""
    planned = small(folder, *overrides, recipe="student")
    run(planned, "student")
    return by_name(planned)["student"]


def validated(stage):
    return [line["epoch"] for line in read_metrics(stage.folder / "metrics.jsonl") if "val/NDCG@10" in line]


def test_only_every_third_epoch_is_validated_and_can_be_chosen(tmp_path):
    stage = student(tmp_path, "trainer.validate_every=3", "trainer.max_epochs=7", "trainer.patience=0")
    assert validated(stage) == [2, 5]
    assert stage.summary["best"]["epoch"] in (2, 5)
    assert stage.summary["epochs"] == 7


def test_patience_counts_the_epochs_between_validations(tmp_path):
    stage = student(
        tmp_path, "trainer.validate_every=2", "trainer.max_epochs=40", "trainer.patience=4", "optimizer.lr=1e-12",
        "stages.student.optimizer.lr=1e-12",
    )  # fmt: skip
    seen = validated(stage)
    assert seen[-1] - stage.summary["best"]["epoch"] == 4


PLATEAU = ["student.optimizer.schedule=plateau", "trainer.max_epochs=40", "trainer.patience=2"]


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_plateau_is_left_once_at_a_tenth_of_the_rate(tmp_path, monkeypatch, warmup):
    seen: list[tuple[int, float]] = []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            seen.append((trainer.current_epoch, optimizer.param_groups[0]["lr"]))

    make_trainer = training.make_trainer
    monkeypatch.setattr(training, "make_trainer", lambda stage, callbacks: make_trainer(stage, [*callbacks, Rates()]))
    stage = student(tmp_path, *PLATEAU, "student.optimizer.lr=1e-12", f"optimizer.warmup_steps={warmup}")
    validation = [line["val/NDCG@10"] for line in read_metrics(stage.folder / "metrics.jsonl") if "val/NDCG@10" in line]
    assert validation == [validation[0]] * 5, "nothing is learned, so two epochs after the first the rate falls, and two later"
    rates = [1e-12 if epoch < 3 else 1e-13 for epoch, _ in seen]
    rates[:warmup] = [1e-12 * (step + 1) / warmup for step in range(warmup)]
    assert [rate for _, rate in seen] == pytest.approx(rates, rel=1e-6)
    assert stage.summary["best"]["epoch"] == 0
    assert stage.summary["best"]["lowered"] is True


@pytest.mark.parametrize("epochs", [3, 2])
def test_a_plateau_that_had_no_epoch_left_for_its_lower_rate_says_so(tmp_path, epochs):
    stage = student(tmp_path, *PLATEAU, "student.optimizer.lr=1e-12", f"trainer.max_epochs={epochs}")
    assert stage.summary["best"] == {"epoch": 0, "val/NDCG@10": stage.summary["best"]["val/NDCG@10"], "lowered": False}
    assert stage.summary["epochs"] == epochs


def test_a_plateau_counts_the_epochs_between_validations(tmp_path):
    stage = student(tmp_path, *PLATEAU, "student.optimizer.lr=1e-12", "trainer.validate_every=2")
    assert validated(stage) == [1, 3, 5]
    assert stage.summary["best"]["lowered"] is True


def test_a_plateau_wants_patience(tmp_path):
    with pytest.raises(UserError, match=r"optimizer.schedule=plateau lowers the learning rate when trainer.patience ends"):
        small(tmp_path, *PLATEAU, "trainer.patience=0", recipe="student")


def test_a_plateau_wants_validation(tmp_path):
    with pytest.raises(UserError, match=r"stages.NAME.optimizer.schedule=constant"):
        small(tmp_path, "optimizer.schedule=plateau", recipe="said")


def test_a_validation_that_never_comes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"trainer.validate_every=9 is more than trainer.max_epochs=3"):
        small(tmp_path, "trainer.validate_every=9", recipe="student")


def test_validate_every_names_another_artefact_and_compile_does_not():
    def fingerprint(*overrides):
        return by_name(resolve(compose("student", ["logger=csv", *overrides])))["student"].fingerprint

    assert fingerprint("trainer.validate_every=2") != fingerprint()
    assert fingerprint("trainer.compile=true") == fingerprint() == fingerprint("trainer.validate_every=1")


@pytest.mark.parametrize("name", ["sasrec", "bpr-mf"])
def test_compiled_training_has_the_same_losses(tmp_path, name):
    """Losses, not weights: a bias whose gradient is zero but for rounding is moved by Adam all the same."""
    settings = [f"student={name}", "trainer.max_epochs=2", "trainer.limit_train_batches=3"]
    settings += ["stages.student.model.dropout=0.0"] if name == "sasrec" else []
    losses = {}
    for compiled in ("false", "true"):
        stage = student(tmp_path / compiled, *settings, f"trainer.compile={compiled}")
        losses[compiled] = [line["loss"] for line in read_metrics(stage.folder / "metrics.jsonl") if "loss" in line]
    assert len(losses["true"]) == 6
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)
