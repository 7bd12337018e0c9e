"""SLMRec's distances: worked-out values, zero at the minimum, gradient to the student only."""

import pytest
import torch

from lit_llmers.losses.feature import block_boundaries, cosine_distance, euclidean_distance


def test_values_worked_out_by_hand():
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(cosine_distance(student, teacher), torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(euclidean_distance(student, teacher), torch.tensor([0.0, 5.0**0.5]))


def test_cosine_ignores_length_and_the_norm_does_not():
    teacher = torch.tensor([[1.0, 2.0]])
    assert cosine_distance(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    assert euclidean_distance(3 * teacher, teacher).item() == pytest.approx(2 * 5**0.5)


@pytest.mark.parametrize("distance", [cosine_distance, euclidean_distance])
def test_gradient_reaches_the_student_only(distance):
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    distance(student, teacher).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_gradient_at_equality_is_zero_not_nan():
    student = torch.ones(2, 3, requires_grad=True)
    euclidean_distance(student, torch.ones(2, 3)).sum().backward()
    assert torch.equal(student.grad, torch.zeros(2, 3))


def test_block_boundaries():
    assert block_boundaries(8, 4) == [2, 4, 6, 8]
    assert block_boundaries(32, 4) == [8, 16, 24, 32]
    assert block_boundaries(4, 4) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="6 layers cannot be cut into 4"):
        block_boundaries(6, 4)
