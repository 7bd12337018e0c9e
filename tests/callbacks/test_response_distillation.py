"""Response distillation: CD by plain sums, and both losses teach both kinds of students."""

import math

import pytest
import torch
from ranking_lists import K, Lists, case, share_of, student
from test_ranking_distillation import train
from torch.nn import functional as F

from lit_llmers.callbacks.response_distillation import KEYS, ResponseDistillation
from lit_llmers.errors import UserError

METHODS = {
    "cd": {"sampler": "rank", "k": 5, "temperature": 2.0},
    "cd of distances": {"sampler": "rank", "k": 5, "scaled": True, "temperature": 0.25, "offset": -0.5},
    "soft bce": {},
    "kl": {"loss": "kl", "temperature": 1.5},
    "kl of distances": {"loss": "kl", "scaled": True},
}


def term(reduce=None, **settings):
    return ResponseDistillation(Lists(12), **settings).build(student(reduce))


def inputs():
    output, batch = case()
    return output, {"response_items": batch["teacher_items"], "response_scores": batch["teacher_scores"]}


def test_soft_bce_by_plain_sums():
    output, batch = inputs()
    loss = term(reduce=lambda loss, batch: loss, temperature=2.0, offset=0.5)(output, batch)
    scores = output.user @ output.items.T
    for t, (items, said) in enumerate(zip(batch["response_items"], batch["response_scores"], strict=True)):
        real = items > 0
        if real.any():
            label = torch.sigmoid((said[real].double() + 0.5) / 2)
            expected = F.binary_cross_entropy_with_logits(scores[t, items[real]], label)
            assert loss[t].item() == pytest.approx(expected.item(), rel=1e-6)


def test_labels_of_distances_run_from_the_worst_to_the_best_of_each_whole_list():
    output, batch = inputs()
    output.items.data[:] = 0  # all items score 0, so a gradient's sign says whether a label is above a half
    batch["response_scores"] = batch["response_scores"] * 30 - 200
    settings = {"scaled": True, "temperature": 0.25, "offset": -0.5}
    for sampler, k in (("top", None), ("rank", 1)):
        loss = term(reduce=lambda loss, batch: loss, sampler=sampler, k=k, **settings)(output, batch)
        for t, (items, said) in enumerate(zip(batch["response_items"], batch["response_scores"], strict=True)):
            said, items = said[items > 0].double(), items[items > 0]
            if not len(items):
                continue
            label = torch.sigmoid(((said - said.min()) / (said.max() - said.min()) - 0.5) / 0.25)
            assert label.max().item() == pytest.approx(0.8808, abs=1e-4)
            gradient = torch.autograd.grad(loss[t], output.items, retain_graph=True)[0][items]
            drawn = gradient.any(1)
            assert drawn.sum() == (k or len(items))
            expected = (0.5 - label)[:, None] * output.user[t].detach() / (k or len(items))
            torch.testing.assert_close(gradient[drawn], expected[drawn], rtol=1e-5, atol=1e-9)


def test_a_cut_list_has_the_labels_that_the_whole_one_gives_it():
    output, batch = inputs()
    settings = {"scaled": True, "temperature": 0.25, "offset": -0.5}
    callback = ResponseDistillation(Lists(12), k=3, **settings)
    cut = {"target_row": torch.arange(12)}
    callback.on_train_batch_start(None, type("", (), {"device": torch.device("cpu")}), cut, 0)
    loss = callback.build(student(lambda loss, batch: loss))(output, cut)
    scores = output.user @ output.items.T
    for t, (items, said) in enumerate(zip(batch["response_items"], batch["response_scores"], strict=True)):
        said, items = said[items > 0].double(), items[items > 0]
        if len(items):
            label = torch.sigmoid(((said - said.min()) / (said.max() - said.min()) - 0.5) / 0.25)
            expected = F.binary_cross_entropy_with_logits(scores[t, items[:3]], label[:3])
            assert loss[t].item() == pytest.approx(expected.item(), rel=1e-5)


def test_cd_draws_high_ranks_more_often_and_each_item_once():
    output, batch = inputs()
    output.user.data[:] = 1.0  # all items score apart, so a draw can be told from its scores
    output.items.data[:] = torch.arange(31)[:, None]
    many = {key: value[:1].expand(20_000, K) for key, value in batch.items()}
    batch_items = many["response_items"][0]
    assert (batch_items > 0).sum() == 5
    output = type(output)(output.user[:1].expand(20_000, 4), output.items)
    torch.manual_seed(0)
    cd = term(reduce=lambda loss, batch: loss, sampler="rank", k=1, rank_temperature=2.0)
    loss = cd(output, many)
    place = torch.arange(5)
    expected = torch.softmax(-place / 2, 0)
    score = 4.0 * batch_items[:5]
    label = torch.sigmoid(many["response_scores"][0, :5])
    of_place = F.softplus(score) - label * score
    drawn = (loss.detach()[:, None] - of_place).abs().argmin(1)
    torch.testing.assert_close(torch.bincount(drawn, minlength=5) / 20_000, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_fillers_have_no_influence(method):
    output, batch = inputs()
    values = []
    for filler in (0.0, 1e4):
        torch.manual_seed(0)
        said = batch["response_scores"].masked_fill(batch["response_items"] == 0, filler)
        loss = term(**METHODS[method])(output, batch | {"response_scores": said})
        values.append((loss, *torch.autograd.grad(loss, [output.user, output.items])))
    assert all(torch.equal(one, two) for one, two in zip(*values, strict=True))
    assert (values[0][2][0] == 0).all()
    assert (values[0][1][3] == 0).all(), "an empty list"


def test_a_share_is_an_unbiased_estimate():
    output, batch = inputs()
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([term()(output, share_of(batch, KEYS, 0.4)) for _ in range(1500)])
        exact = term()(output, batch)
    assert draws.std() > 0
    assert abs(draws.mean() - exact) < 4 * draws.std() / 1500**0.5


@pytest.mark.parametrize("kind", ["sequential", "collaborative"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_teaches_both_kinds_of_students(method, kind, tmp_path):
    means, _ = train(ResponseDistillation(Lists(1), weight=5.0, **METHODS[method]), kind, tmp_path)
    assert all(math.isfinite(mean) for mean in means)
    assert means[-1] < means[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mse"}, "Unknown loss.*response_distillation.loss.*kl, soft_bce"),
        ({"sampler": "ranks"}, "Did you mean 'rank'"),
        ({"k": 0}, "k is 0"),
        ({"temperature": 0}, "response_distillation: temperature is 0. It must be positive"),
        ({"sampler": "rank", "rank_temperature": 0.0}, "response_distillation: rank_temperature is 0.0. It must be positive"),
        ({"sampler": "rank", "rank_temperature": -2.0}, "response_distillation: rank_temperature is -2.0. It must be"),
        ({"loss": "kl", "offset": 1.0}, "offset=1.0 has no effect: it belongs to loss: soft_bce"),
        ({"rank_temperature": 20.0}, "rank_temperature=20.0 has no effect: it belongs to sampler: rank"),
        ({"share": 2.0}, r"response_distillation: share is 2.0. It must be above 0 and at most 1\."),
    ],
)
def test_bad_settings_name_the_key_and_the_cure(settings, message):
    with pytest.raises(UserError, match=message):
        ResponseDistillation(Lists(1), **settings)


def test_lists_that_are_too_short():
    with pytest.raises(UserError, match="k is 9, but the teacher's lists have 8"):
        term(k=9)
