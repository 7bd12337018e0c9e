"""Mixed precision trains every kind of student, with gradients clipped as `trainer.gradient_clip_val` is by default."""

import numpy as np
import pytest
import torch
from tiny import by_name, losses, small, weights

from lit_llmers import recipes
from lit_llmers.composing.resolving import resolve
from lit_llmers.errors import UserError
from lit_llmers.running import run
from lit_llmers.stages import Stage
from lit_llmers.students.recommender import Recommender


@pytest.fixture
def autocast(monkeypatch) -> set[torch.dtype | None]:
    """What the steps were computed under; None is the precision of the weights."""
    seen, plain = set(), Recommender.training_step

    def watched(*given):
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return plain(*given)

    monkeypatch.setattr(Recommender, "training_step", watched)
    return seen


def assert_learned(stage: Stage, dtype: torch.dtype) -> None:
    """The loss fell within the epoch, and the weights are numbers of this type."""
    course = losses(stage, "loss/task")
    third = len(course) // 3
    assert third > 5
    assert np.isfinite(course).all()
    assert np.mean(course[-third:]) < 0.998 * np.mean(course[:third])
    kept = weights(stage).values()
    assert {weight.dtype for weight in kept} == {dtype}
    assert all(weight.isfinite().all() for weight in kept)


@pytest.mark.parametrize("student", ["sasrec", "gru4rec", "bert4rec", "caser", "srgnn", "lightgcn"])
def test_a_student_trains_in_bf16_mixed_with_clipped_gradients(tmp_path, student, autocast):
    given = [f"student={student}", "student.model.dim=16", "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0"]
    planned = small(tmp_path, *given, "student.optimizer.lr=0.01", "trainer.max_epochs=1", recipe="student")
    run(planned, "student")
    assert_learned(by_name(planned)["student"], torch.float32)
    assert autocast == {torch.bfloat16}


def test_sgl_trains_in_bf16_true(tmp_path, autocast):
    given = ["student=sgl", "trainer.precision=bf16-true", "student.optimizer.lr=0.01"]
    planned = small(tmp_path, *given, "trainer.max_epochs=1", recipe="student")
    run(planned, "student")
    assert_learned(by_name(planned)["student"], torch.bfloat16)
    assert autocast == {None}


@pytest.mark.parametrize("given", ["trainer.precision=16-true", "student.trainer.precision=16-true"])
def test_weights_in_float16_whose_moments_vanish_are_refused(given):
    with pytest.raises(UserError, match=r"precision is 16-true.*16-mixed or bf16-true"):
        resolve(recipes.compose("student", [given]))
