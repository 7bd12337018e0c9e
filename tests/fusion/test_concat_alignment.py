"""PAD's second phase: the two views of an item in a `concat` are drawn together, and both learn."""

import pytest
import torch

from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.callbacks.alignment import Alignment
from lit_llmers.errors import UserError
from lit_llmers.fusion.concat import Concat
from lit_llmers.losses.alignment import multi_kernel_mmd
from lit_llmers.students.sequential import SequentialRecommender


def batch() -> dict[str, torch.Tensor]:
    items = torch.tensor([[0, 1, 2], [3, 4, 5]])
    return {"items": items, "mask": items > 0, "target": torch.tensor([[0, 2, 6], [4, 5, 7]])}


def test_the_two_views_of_the_targets_and_of_uniform_items_are_compared_and_both_learn():
    torch.manual_seed(0)
    vectors = torch.randn(10, 12)
    vectors[[0, 6]] = 0  # nothing is said about item 6
    student = SequentialRecommender(Concat(SASRec(9, 5, dim=8), vectors, layers=2, dropout=0.0))
    term = Alignment(kind="mmd", projector="none", share=1.0).build(student)
    output = student(batch())
    torch.manual_seed(1)
    loss = term(output, batch())
    torch.manual_seed(1)
    looked_at = torch.cat([torch.tensor([2, 6, 4, 5, 7]), torch.randint(1, 10, (5,))])
    share = (looked_at != 6).float().mean()
    ids = looked_at[looked_at != 6].unique()
    assert len(ids) > 4, "not the targets alone"
    identity, text = student.backbone.id_table()[ids], student.backbone.text_table()[ids]
    torch.testing.assert_close(loss, share * multi_kernel_mmd(identity, text) * student.reduce(torch.ones(5), batch()))
    loss.backward()
    assert student.backbone.inner.items.weight.grad.any(1).nonzero().flatten().tolist() == ids.tolist()
    assert all(parameter.grad.any() for parameter in student.backbone.text.parameters())


def test_a_student_with_one_view_needs_another_stage():
    with pytest.raises(UserError, match="Name a stage with item vectors in 'from'"):
        Alignment(kind="mmd", projector="none").build(SequentialRecommender(SASRec(9, 5, dim=8)))
