"""Deep supervision alone: its values by plain cross-entropy, and from YAML on a student that is no LLM."""

import numpy as np
import pytest
import torch
from tiny import by_name, losses, small
from torch import nn
from torch.nn import functional as F

from lit_llmers.backbones.gru4rec import GRU4Rec
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.callbacks.deep_supervision import DeepSupervision, DeepSupervisionTerm
from lit_llmers.errors import UserError
from lit_llmers.models import load_dataset, load_model
from lit_llmers.running import run
from lit_llmers.students.output import StudentOutput
from lit_llmers.students.sequential import SequentialRecommender

RECIPE = """\
# Every block of a recurrent student predicts the next item.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  student:
    fit: gru4rec
    model: {dim: 8, layers: 4, dropout: 0.0}
    callbacks:
      - deep_supervision: {blocks: 4, weight: 0.5}
  masked:
    fit: bert4rec
    model: {dim: 8, layers: 2, heads: 1}
    sequences: {examples: sequence}
    callbacks:
      - deep_supervision: {blocks: 2}
"""


@pytest.fixture
def student():
    torch.manual_seed(0)
    return SequentialRecommender(SASRec(20, 8, dim=8, layers=4, init_std=0.5))


@pytest.fixture
def case(student):
    generator = torch.Generator().manual_seed(0)
    hidden = tuple(torch.randn(9, 8, generator=generator, requires_grad=True) for _ in range(5))
    target = torch.randint(1, 21, (9,), generator=generator)
    return StudentOutput(hidden[-1], torch.zeros(0), hidden), {"target": target}


def test_values_equal_plain_cross_entropy(student, case):
    output, batch = case
    term = DeepSupervision(blocks=4).build(student)
    assert term.boundaries == [1, 2, 3], "the last block has the task's own loss"
    table = student.item_table()[1:]
    expected = [
        F.cross_entropy(output.hidden[layer] @ head.weight.T @ table.T, batch["target"] - 1)
        for layer, head in zip([1, 2, 3], term.heads, strict=True)
    ]
    torch.testing.assert_close(term(output, batch), torch.stack(expected).sum())
    parts = [term.parts[f"block{k}"] for k in (1, 2, 3)]
    torch.testing.assert_close(torch.stack(parts), torch.stack(expected).detach())


def test_gradients_reach_inner_states_heads_and_the_item_table(student, case):
    output, batch = case
    term = DeepSupervision(blocks=2).build(student)
    term(output, batch).backward()
    assert [state.grad is not None for state in output.hidden] == [False, False, True, False, False]
    assert all(head.weight.grad.abs().sum() > 0 for head in term.heads)
    assert student.item_table().grad.abs().sum() > 0


def test_heads_that_point_at_the_target_cost_nothing():
    output = StudentOutput(torch.eye(4), torch.eye(4), (torch.eye(4), torch.eye(4), torch.eye(4)))
    head = nn.Linear(4, 4, bias=False)
    head.weight.data = 50 * torch.eye(4)

    def task_loss(user, batch, drawn):
        return F.cross_entropy(user, torch.arange(4))

    assert DeepSupervisionTerm([1], nn.ModuleList([head]), task_loss)(output, {}).item() == pytest.approx(0, abs=1e-6)


def test_a_share_is_an_unbiased_estimate(student, case):
    output, batch = case
    whole = DeepSupervision(blocks=4).build(student)
    share = DeepSupervisionTerm(whole.boundaries, whole.heads, student.next_item_loss, share=1 / 3)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([share(output, batch) for _ in range(3000)])
        exact = whole(output, batch)
    assert draws.std() > 0
    assert abs(draws.mean() - exact) < 4 * draws.std() / 3000**0.5


@pytest.mark.parametrize("settings", [{"blocks": 3}, {"blocks": 5}])
def test_a_depth_that_the_blocks_do_not_divide(student, settings):
    with pytest.raises(UserError, match=f"student's 4 layers cannot be cut into {settings['blocks']} blocks"):
        DeepSupervision(**settings).build(student)


def test_settings_that_supervise_nothing():
    for blocks in (1, 0, -2):
        with pytest.raises(UserError, match=f"blocks is {blocks}, so there is no inner block"):
            DeepSupervision(blocks=blocks)
    for share in (0.0, 1.5, -1):
        with pytest.raises(UserError, match=rf"deep_supervision: share is {share}. It must be above 0 and at most 1\."):
            DeepSupervision(share=share)


@pytest.mark.parametrize("backbone", [SASRec, GRU4Rec])
def test_heads_map_the_width_to_the_item_table(backbone):
    model = SequentialRecommender(backbone(20, 8, dim=6, layers=4))
    term = DeepSupervision(blocks=4).build(model)
    assert [(head.in_features, head.out_features, head.bias) for head in term.heads] == [(6, 6, None)] * 3


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (folder / "mine.yaml").write_text(RECIPE)
    planned = small(folder, "optimizer.lr=0.02", recipe=str(folder / "mine.yaml"))
    run(planned, None)
    return by_name(planned)


@pytest.fixture(scope="module")
def trained(every):
    return every["student"]


def test_the_log_of_a_part_is_of_the_targets_that_were_trained_on(every):
    """BERT4Rec hides other items in each step than those that the batch came with."""
    part, term = (losses(every["masked"], f"loss/deep_supervision{name}") for name in ("/block1", ""))
    np.testing.assert_allclose(part, term, rtol=1e-5)


def test_alone_from_yaml_it_teaches_every_block_of_a_gru(trained):
    total, task, term, *blocks = (
        np.array(losses(trained, f"loss{part}"))
        for part in ("", "/task", "/deep_supervision", *(f"/deep_supervision/block{k}" for k in (1, 2, 3)))
    )
    np.testing.assert_allclose(term, sum(blocks), rtol=1e-5)
    np.testing.assert_allclose(total, task + 0.5 * term, rtol=1e-5)
    assert all(block[-5:].mean() < block[:5].mean() for block in blocks)


def test_heads_are_not_served(trained):
    checkpoint = torch.load(trained.folder / "best.ckpt", weights_only=True)
    assert len(checkpoint["distillation"]) == 3
    model = load_model(trained, load_dataset(trained))
    assert not [key for key in model.state_dict() if "distillation" in key]
    assert trained.summary["parameters"]["total"] == sum(p.numel() for p in model.parameters())


def test_defaults_need_no_arguments(tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("deep_supervision: {blocks: 4, weight: 0.5}", "deep_supervision:"))
    assert by_name(small(tmp_path, recipe=str(tmp_path / "mine.yaml")))["student"].config.callbacks


def test_a_depth_is_checked_before_anything_runs(tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match="6 layers of stage 'student' cannot be cut into the 4 equal blocks"):
        small(tmp_path, "stages.student.model.layers=6", recipe=str(tmp_path / "mine.yaml"))


def test_the_default_blocks_are_checked_too(tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("blocks: 4, ", ""))
    with pytest.raises(UserError, match="6 layers"):
        small(tmp_path, "stages.student.model.layers=6", recipe=str(tmp_path / "mine.yaml"))
