"""Settings of the Trainer that a recipe or a user chooses."""

import pytest
from tiny import by_name, small

from lit_llmers.errors import UserError
from lit_llmers.journal import read_metrics
from lit_llmers.recipes import compose
from lit_llmers.resolving import resolve
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
