"""Mixed precision trains every kind of student, with gradients clipped as `trainer.gradient_clip_val` is by default."""

import pytest
from tiny import by_name, small

from lit_llmers import recipes
from lit_llmers.errors import UserError
from lit_llmers.resolving import resolve
from lit_llmers.running import run


@pytest.mark.parametrize("student", ["sasrec", "gru4rec", "bert4rec", "caser", "srgnn", "lightgcn"])
def test_a_student_trains_in_bf16_mixed_with_clipped_gradients(tmp_path, student):
    given = [f"student={student}", "student.model.dim=16", "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0"]
    planned = small(tmp_path, *given, "trainer.max_epochs=1", recipe="student")
    run(planned, "student")
    assert by_name(planned)["student"].summary["best"]["val/NDCG@10"] >= 0


def test_sgl_trains_in_bf16_true(tmp_path):
    planned = small(tmp_path, "student=sgl", "trainer.precision=bf16-true", "trainer.max_epochs=1", recipe="student")
    run(planned, "student")
    assert by_name(planned)["student"].summary["best"]["val/NDCG@10"] >= 0


@pytest.mark.parametrize("given", ["trainer.precision=16-true", "student.trainer.precision=16-true"])
def test_weights_in_float16_whose_moments_vanish_are_refused(given):
    with pytest.raises(UserError, match=r"precision is 16-true.*16-mixed or bf16-true"):
        resolve(recipes.compose("student", [given]))
