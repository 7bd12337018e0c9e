"""The line of an epoch tells of that epoch."""

import logging
import re

import pytest
from test_resume import interrupt
from tiny import by_name, losses, small

from lit_llmers.running import run


def epochs_said(caplog) -> list[tuple[int, float]]:
    """Epoch and loss of every line of the student's."""
    found = [re.match(r"student-seed0 +epoch +(\d+)  loss ([\d.]+)  valid HR@10", each.getMessage()) for each in caplog.records]
    return [(int(match[1]), float(match[2])) for match in found if match]


@pytest.mark.parametrize("student", ["sasrec", "bert4rec"])
def test_the_line_s_loss_is_for_each_target_as_the_logged_one_is(tmp_path, caplog, student):
    """Both are means over targets, one over the epoch's and one batch by batch: of hidden items where those are the targets."""
    caplog.set_level(logging.INFO, logger="lit_llmers")
    planned = small(tmp_path, f"student={student}", "student.trainer.max_epochs=4", "trainer.patience=0", recipe="student")
    run(planned, "student")
    logged = losses(by_name(planned)["student"], "loss")
    said = [loss for _, loss in epochs_said(caplog)]
    assert sum(said) / len(said) == pytest.approx(sum(logged) / len(logged), rel=0.05)


@pytest.mark.parametrize(("accumulate", "close"), [(1, 2e-4), (2, 0.05)])  # of two micro-batches the second is logged
def test_an_epoch_s_loss_is_the_mean_of_its_own_batches_however_rarely_it_is_logged(tmp_path, caplog, accumulate, close):
    caplog.set_level(logging.INFO, logger="lit_llmers")
    given = [
        "sequences.examples=last",
        f"trainer.accumulate_grad_batches={accumulate}",
        "trainer.limit_train_batches=6",
        "trainer.patience=0",
    ]
    planned = small(tmp_path / "often", *given, recipe="student")
    run(planned, "student")
    said = epochs_said(caplog)
    assert [epoch for epoch, _ in said] == [1, 2, 3]
    logged = losses(by_name(planned)["student"], "loss")
    steps = 6 // accumulate
    for epoch, loss in said:
        assert loss == pytest.approx(sum(logged[steps * (epoch - 1) : steps * epoch]) / steps, rel=close)

    caplog.clear()
    run(small(tmp_path / "rarely", *given, "trainer.log_every=100", recipe="student"), "student")
    assert epochs_said(caplog) == said


@pytest.mark.parametrize("batches", [3, 5, 9, 10, 13])  # ten batches are an epoch; a checkpoint comes every three
def test_an_epoch_that_was_interrupted_has_the_loss_of_all_its_batches(tmp_path, caplog, monkeypatch, batches):
    caplog.set_level(logging.INFO, logger="lit_llmers")
    run(small(tmp_path / "whole", "student=sasrec", recipe="student"), "student")
    whole = epochs_said(caplog)

    caplog.clear()
    planned = small(tmp_path / "killed", "student=sasrec", recipe="student")
    interrupt(planned, "student", batches, monkeypatch)
    run(planned, "student")
    assert dict(epochs_said(caplog)) == dict(whole)
