"""The two SLMRec callbacks' terms together equal the official code's total, in value and gradient."""

import torch
from torch import nn

from lit_llmers.callbacks.deep_supervision import DeepSupervisionTerm
from lit_llmers.callbacks.feature_distillation import KEY, FeatureTerm
from lit_llmers.losses.feature import block_boundaries
from lit_llmers.losses.task import cross_entropy
from lit_llmers.students.output import StudentOutput


def test_total_and_gradients_equal_the_official_code(golden):
    case = golden("slmrec/case_a")
    blocks = int(case["hp.distill_block"])
    student = case["in.student_hidden_states"].clone().requires_grad_()  # [N+1, B, T, H]
    score = case["in.score_weight"].clone().requires_grad_()
    heads = nn.ModuleList(nn.Linear(12, 8, bias=False, dtype=torch.float64) for _ in range(blocks - 1))
    for head, weight in zip(heads, case["in.block_heads"], strict=True):
        head.weight.data.copy_(weight)
    table, target = case["in.item_table"], case["in.answers"]

    def task_loss(user, batch, drawn=None):
        return cross_entropy(user, table, target).mean()

    def reduce(per_target, batch):
        return per_target.sum() / len(target)

    student_blocks = block_boundaries(int(case["hp.layers_student"]), blocks)
    teacher_blocks = block_boundaries(int(case["hp.layers_teacher"]), blocks)
    assert student_blocks == case["hp.pair_student"].tolist()
    assert teacher_blocks == case["hp.pair_teacher"].tolist()
    hidden = student[:, :, -1].unbind(0)  # N+1 x [B, H], last position
    output = StudentOutput(user=hidden[-1] @ score.T, items=score, hidden=hidden)
    batch = {KEY: case["in.teacher_hidden_states"][teacher_blocks, :, -1].transpose(0, 1)}
    feature = FeatureTerm(student_blocks, None, float(case["hp.distill_lambda"]), float(case["hp.l2_weight"]), reduce)
    deep = DeepSupervisionTerm(student_blocks[:-1], heads, task_loss)

    main, distilled, auxiliary = task_loss(output.user, batch), feature(output, batch), deep(output, batch)
    total = main + distilled + float(case["hp.cls_multiple_lambda"]) * auxiliary
    for got, want in [
        (main, "out.ce_main"),
        (distilled, "out.loss_distill"),
        (auxiliary, "out.ce_aux_sum"),
        (total, "out.total"),
    ]:
        torch.testing.assert_close(got, case[want], rtol=1e-9, atol=1e-10)
    total.backward()
    got_heads = torch.stack([head.weight.grad for head in heads])
    for got, want in [
        (student.grad, "grad.student_hidden_states"),
        (score.grad, "grad.score_weight"),
        (got_heads, "grad.block_heads"),
    ]:
        torch.testing.assert_close(got, case[want], rtol=1e-7, atol=1e-9)
