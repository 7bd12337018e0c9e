"""Feature distillation alone: its values by numpy, and from YAML on a student that is no LLM."""

import numpy as np
import pytest
import torch
from tiny import by_name, losses, small
from torch import nn

from lit_llmers.callbacks.feature_distillation import KEY, FeatureDistillation, FeatureTerm
from lit_llmers.errors import UserError
from lit_llmers.models import load_dataset, load_model
from lit_llmers.running import run
from lit_llmers.students.output import StudentOutput

RECIPE = """\
# Block states of a SASRec, distilled into a shallower and narrower one.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  teacher: {fit: sasrec, model: {dim: 16, layers: 4, dropout: 0.0}}
  signals: {record: block_states, of: teacher, blocks: 2}
  student:
    fit: sasrec
    model: {dim: 8, layers: 2, dropout: 0.0}
    callbacks:
      - feature_distillation: {from: signals, cosine: 1.0, l2: 0.5, weight: 2.0}
"""


class Source:
    def __init__(self, *shape: int) -> None:
        self.shape = shape


class Student:
    """As much of a student as the callback looks at."""

    def __init__(self, layers: int, width: int) -> None:
        self.backbone = type("", (), {"layers": layers, "width": width})
        self.reduce = None


def mean(per_target: torch.Tensor, batch) -> torch.Tensor:
    return per_target.sum() / per_target.shape[-1]


def case(layers: int = 4, width: int = 5, blocks: int = 2, teacher_width: int = 5):
    generator = torch.Generator().manual_seed(0)
    hidden = tuple(torch.randn(7, width, generator=generator, requires_grad=True) for _ in range(layers + 1))
    teacher = torch.randn(7, blocks, teacher_width, generator=generator)
    return StudentOutput(torch.zeros(7, 3), torch.zeros(5, 3), hidden), {KEY: teacher}


def test_values_equal_numpy():
    output, batch = case()
    term = FeatureTerm([2, 4], None, cosine=0.7, l2=0.3, reduce=mean)
    cosine = l2 = 0.0
    for block, layer in enumerate([2, 4]):
        s, t = output.hidden[layer].detach().numpy().astype(float), batch[KEY][:, block].numpy().astype(float)
        cosine += (1 - (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)).mean()
        l2 += np.linalg.norm(s - t, axis=1).mean()
    assert term(output, batch).item() == pytest.approx(0.7 * cosine + 0.3 * l2, rel=1e-5)
    assert {key: value.item() for key, value in term.parts.items()} == pytest.approx({"cosine": cosine, "l2": l2})
    assert not any(value.requires_grad for value in term.parts.values())


def test_values_with_projectors_equal_numpy():
    output, batch = case(teacher_width=6)
    projectors = nn.ModuleList(nn.Linear(5, 6) for _ in range(2))
    term = FeatureTerm([2, 4], projectors, cosine=0.0, l2=1.0, reduce=mean)
    expected = 0.0
    for block, layer in enumerate([2, 4]):
        weight, bias = (p.detach().numpy() for p in projectors[block].parameters())
        s = output.hidden[layer].detach().numpy() @ weight.T + bias
        expected += np.linalg.norm(s - batch[KEY][:, block].numpy(), axis=1).mean()
    assert term(output, batch).item() == pytest.approx(expected, rel=1e-5)


def test_zero_where_the_states_are_equal_and_only_block_ends_count():
    output, batch = case()
    batch = {KEY: torch.stack([output.hidden[2], output.hidden[4]], 1).detach()}
    term = FeatureTerm([2, 4], None, cosine=1.0, l2=1.0, reduce=mean)
    loss = term(output, batch)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    loss.backward()
    for layer, state in enumerate(output.hidden):
        assert (state.grad is not None) == (layer in (2, 4))


def test_a_teacher_in_half_precision_is_compared_in_the_students():
    output, batch = case()
    term = FeatureTerm([2, 4], None, cosine=1.0, l2=1.0, reduce=mean)
    exact = term(output, batch).item()
    half = term(output, {KEY: batch[KEY].half()})
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact, rel=1e-3)


def test_projectors_only_where_the_widths_differ():
    same = FeatureDistillation(Source(2, 5)).build(Student(4, 5))
    assert same.projectors is None
    assert same.boundaries == [2, 4]
    other = FeatureDistillation(Source(4, 6)).build(Student(4, 5))
    assert other.boundaries == [1, 2, 3, 4]
    assert [(p.in_features, p.out_features) for p in other.projectors] == [(5, 6)] * 4


def test_a_depth_that_the_blocks_do_not_divide():
    with pytest.raises(UserError, match="student's 4 layers cannot be cut into the record's 3 blocks.*stages.signals.blocks"):
        FeatureDistillation(Source(3, 5)).build(Student(4, 5))


@pytest.mark.parametrize("key", ["cosine", "l2", "weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_weight_below_zero_or_none(key, value):
    with pytest.raises(UserError, match=f"{key} is {value}. It must be 0"):
        FeatureDistillation(Source(2, 5), **{key: value})


def test_no_weight_at_all():
    with pytest.raises(UserError, match="cosine and l2 are both 0"):
        FeatureDistillation(Source(2, 5), cosine=0, l2=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (folder / "mine.yaml").write_text(RECIPE)
    planned = small(folder, recipe=str(folder / "mine.yaml"))
    run(planned, None)
    return by_name(planned)


def test_alone_from_yaml_it_brings_a_sasrec_nearer_to_its_teacher(trained):
    student = trained["student"]
    assert losses(student, "loss/feature")[-1] < 0.9 * losses(student, "loss/feature")[0]
    total, task, term, cosine, l2 = (
        np.array(losses(student, f"loss{part}")) for part in ("", "/task", "/feature", "/feature/cosine", "/feature/l2")
    )
    np.testing.assert_allclose(term, cosine + 0.5 * l2, rtol=1e-5)
    np.testing.assert_allclose(total, task + 2.0 * term, rtol=1e-5)
    assert not losses(student, "loss/deep_supervision")
    assert not losses(trained["teacher"], "loss/feature")


def test_projectors_train_and_are_not_served(trained):
    stage = trained["student"]
    checkpoint = torch.load(stage.folder / "best.ckpt", weights_only=True)
    projectors = checkpoint["distillation"]
    assert {value.shape for key, value in projectors.items() if key.endswith("weight")} == {(16, 8)}
    trained_count = len(checkpoint["optimizer_states"][0]["state"])
    model = load_model(stage, load_dataset(stage))
    assert not [key for key in model.state_dict() if "distillation" in key]
    assert trained_count == len(list(model.parameters())) + len(projectors), "the optimiser has them"
    moments = [state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()]
    assert all(moment.abs().max() > 0 for moment in moments[-len(projectors) :]), "they get gradients"
    assert stage.summary["parameters"]["total"] == sum(p.numel() for p in model.parameters())


def test_a_depth_that_the_blocks_do_not_divide_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match="3 layers of stage 'student' cannot be cut into the 2 equal blocks"):
        small(tmp_path, "stages.student.model.layers=3", recipe=str(tmp_path / "mine.yaml"))


def test_a_source_must_be_named(tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("{from: signals, cosine: 1.0, l2: 0.5, weight: 2.0}", "{l2: 1.0}"))
    with pytest.raises(UserError, match=r"feature_distillation.from' is missing: name a record stage"):
        small(tmp_path, recipe=str(tmp_path / "mine.yaml"))
