"""Ranking distillation: what is drawn is what the papers say, each method is its equation, and every mode teaches a student."""

import itertools
import math

import lightning as L
import pytest
import torch
from tiny import random_dataset
from torch.nn import functional as F

from lit_llmers.backbones.bpr_mf import BPRMF
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.callbacks import ranking_samples as samples
from lit_llmers.callbacks.ranking_distillation import RankingDistillation
from lit_llmers.conf.schema import LossConfig, OptimizerConfig, SequenceConfig
from lit_llmers.data.loader import SequenceDataModule
from lit_llmers.data.pairs import PairDataModule
from lit_llmers.errors import UserError
from lit_llmers.losses import ranking as losses
from lit_llmers.losses import ranking_weights as weighing
from lit_llmers.students.collaborative import CollaborativeRecommender
from lit_llmers.students.output import StudentOutput
from lit_llmers.students.sequential import SequentialRecommender

N_ITEMS, K = 30, 8
POPULARITY = torch.arange(N_ITEMS + 1).flip(0) ** 2
DRAWS = 40_000
METHODS = {
    "dllm2rec": {
        "loss": "bce",
        "negatives": 1,
        "weights": {"position": 0.3, "confidence": 0.5, "consistency": 0.1},
        "rank_samples": None,
        "weight": 0.8,
    },
    "dllm2rec with dros": {"negatives": 1, "weights": {"position": 0.3}, "dros": 0.5},
    "rd": {"weights": {"position": 1.0, "discrepancy": 1.0}, "combine": "product", "start_epoch": 1},
    "rrd": {"loss": "listwise", "uninteresting": 6},
    "rrd by rank": {"loss": "listwise", "sampler": "rank", "k": 4},
    "dcd": {"loss": "listwise", "k": 4, "uninteresting": 6, "underestimated": 4, "overestimated": 4},
    "bce by discrepancy": {"sampler": "discrepancy", "k": 4},
    "unkd": {"loss": "pairwise", "pairs": 12, "rank_temperature": 20.0},
    "soft top-k": {"loss": "softmax", "temperature": 2.0},
    "dllm2rec by softmax": {"loss": "softmax", "over": "catalogue", "weights": {"position": 0.3, "confidence": 0.5}},
    "soft top-k of all": {"loss": "softmax", "over": "catalogue", "k": 5},
}


class Lists:
    """A teacher's record: for target r always the same list of different items, shorter for some."""

    k = K

    def __init__(self, targets: int) -> None:
        generator = torch.Generator().manual_seed(3)
        order = torch.rand(targets, N_ITEMS, generator=generator)
        order -= torch.arange(N_ITEMS) * 7 % N_ITEMS / 10  # there is an order to be learnt, and noise
        self.items = order.argsort(1, descending=True)[:, :K] + 1
        self.scores = -torch.rand(targets, K, generator=generator).cumsum(1)
        self.items[::7, 5:] = 0
        self.items[3:4] = 0

    def read(self, batch):
        row = batch["target_row"]
        return self.items[row], self.scores[row]


def student(reduce=None):
    return type("", (), {"reduce": staticmethod(reduce or (lambda loss, batch: loss.mean()))})()


def term(targets: int = 12, reduce=None, **settings):
    return RankingDistillation(Lists(targets), POPULARITY, **settings).build(student(reduce))


def case(targets: int = 12, dim: int = 4):
    generator = torch.Generator().manual_seed(0)
    user = torch.randn(targets, dim, generator=generator, dtype=torch.float64).requires_grad_()
    table = torch.randn(N_ITEMS + 1, dim, generator=generator, dtype=torch.float64)
    table[0] = 0
    lists = Lists(targets)
    batch = {"teacher_items": lists.items, "teacher_scores": lists.scores}
    batch["target"] = torch.randint(1, N_ITEMS + 1, (targets,), generator=generator)
    return StudentOutput(user, table.requires_grad_()), batch


def shares(values: torch.Tensor, size: int) -> torch.Tensor:
    return torch.bincount(values.flatten(), minlength=size) / values.numel()


# ---- what is drawn -----------------------------------------------------------------------------------------------------


def test_the_first_of_a_draw_follows_the_weights():
    torch.manual_seed(0)
    weight = torch.tensor([0.5, 0.0, 0.2, 0.3])
    place, drawn = samples.draw_places(weight.log(), torch.ones(DRAWS, 4, dtype=torch.bool), 1)
    assert drawn.all()
    torch.testing.assert_close(shares(place, 4), weight, atol=0.01, rtol=0)


def test_draws_without_replacement_ascend_and_follow_the_weights_of_those_left():
    torch.manual_seed(0)
    weight = torch.tensor([0.5, 0.1, 0.4])
    place, drawn = samples.draw_places(weight.log(), torch.ones(DRAWS, 3, dtype=torch.bool), 2)
    assert drawn.all()
    assert (place[:, 0] < place[:, 1]).all()
    for a, b in itertools.combinations(range(3), 2):
        expected = weight[a] * weight[b] * (1 / (1 - weight[a]) + 1 / (1 - weight[b]))
        assert ((place[:, 0] == a) & (place[:, 1] == b)).float().mean().item() == pytest.approx(expected.item(), abs=0.01)


def test_fewer_than_asked_for_come_first_and_the_rest_is_marked():
    valid = torch.tensor([[True, False, True, False], [False] * 4])
    place, drawn = samples.draw_places(torch.zeros(4), valid, 3)
    assert place.tolist() == [[0, 2, 0], [0, 0, 0]]
    assert drawn.tolist() == [[True, True, False], [False] * 3]
    assert samples.draw_places(torch.zeros(4), valid, 9)[0].shape == (2, 4)


def test_golden_rank_weights_of_rrd_cd_and_unkd(golden):
    rrd, cd, unkd = (golden(f"{case}_sampling") for case in ("de_rrd/case_a", "cd/case_a", "unkd/case_a"))
    temperatures = [rrd["hp.T_rank"].item(), cd["hp.sample_num"].item() / cd["hp.lam"].item(), 20.0]
    for z, temperature in zip((rrd, cd, unkd), temperatures, strict=True):
        weight = z["out.rank_weights"]
        torch.testing.assert_close(samples.rank_log_weight(len(weight), temperature).double().exp(), weight, rtol=1e-5, atol=0)


def test_discrepancy_draws_what_the_student_ranks_too_low():
    torch.manual_seed(0)
    rank, place = torch.tensor([0.0, 9.0, 1.0, 30.0]), torch.arange(4)
    log_weight = samples.discrepancy_log_weight(rank, place, 0.1)
    weight = torch.tensor([0.0, math.tanh(0.8), 0.0, math.tanh(2.7)])
    torch.testing.assert_close(log_weight.exp(), weight)
    drawn = samples.draw_places(log_weight, torch.ones(DRAWS, 4, dtype=torch.bool), 1)[0]
    torch.testing.assert_close(shares(drawn, 4), weight / weight.sum(), atol=0.01, rtol=0)
    high = samples.discrepancy_log_weight(-rank, -place, 0.1).exp()
    torch.testing.assert_close(high, torch.tensor([0.0, 0.0, math.tanh(0.1), 0.0]))


def test_ranks_exact_and_estimated():
    output, batch = case()
    items = batch["teacher_items"].clamp(min=1)
    user, table = output.user.detach(), output.items.detach()
    order = (user @ table[1:].T).argsort(1, descending=True).argsort(1)
    listed = losses.list_scores(user, table, items)
    exact = samples.student_ranks(user, table, items, listed, None, N_ITEMS)
    assert torch.equal(exact, order.gather(1, items - 1).double())
    torch.manual_seed(0)
    estimates = torch.stack([samples.student_ranks(user, table, items, listed, 200, 1) for _ in range(50)])
    bias = estimates.mean(0) - exact * (N_ITEMS - 1) / N_ITEMS  # what is drawn may be the item itself; and it is rounded down
    assert bias.abs().max() < 1.5
    assert bias.mean().item() == pytest.approx(-0.5, abs=0.3)
    assert (samples.student_ranks(user.float(), table.float(), items, listed.float(), None, N_ITEMS) - exact).abs().max() <= 1


def test_what_was_met_before_a_target_is_its_row_so_far():
    items = torch.tensor([[0, 4, 5, 6], [7, 8, 9, 3]])
    every = {"items": items, "target": torch.tensor([[0, 5, 0, 2], [8, 0, 3, 1]])}
    met = [[0, 4, 0, 0], [0, 4, 5, 6], [7, 0, 0, 0], [7, 8, 9, 0], [7, 8, 9, 3]]
    assert samples.met_before(every).tolist() == met
    assert samples.met_before(every, torch.tensor([1, 3])).tolist() == [met[1], met[3]]
    one = {"items": items, "target": torch.tensor([2, 1])}
    assert torch.equal(samples.met_before(one), items)
    assert samples.met_before(one, torch.tensor([1])).tolist() == [[7, 8, 9, 3]]
    assert samples.met_before({"user": torch.tensor([1]), "target": torch.tensor([2])}) is None
    assert items[0].tolist() == [0, 4, 5, 6], "the batch is as it was"


def test_what_was_met_is_in_nobodys_way(monkeypatch):
    monkeypatch.setattr(samples, "_ROWS", 5)
    output, batch = case()
    items = batch["teacher_items"].clamp(min=1)
    user, table = output.user.detach(), output.items.detach()
    met = torch.randint(0, N_ITEMS + 1, (12, 9), generator=torch.Generator().manual_seed(5))
    scores = (user @ table.T).scatter(1, met, -torch.inf)
    listed = losses.list_scores(user, table, items)
    exact = (scores[:, None, 1:] > listed[:, :, None] + 1e-12).sum(2)
    assert torch.equal(samples.student_ranks(user, table, items, listed, None, N_ITEMS, met), exact.double())
    torch.manual_seed(0)
    estimates = torch.stack([samples.student_ranks(user, table, items, listed, 200, 1, met) for _ in range(50)])
    bias = estimates.mean(0) - exact * (N_ITEMS - 1) / N_ITEMS
    assert bias.abs().max() < 1.5
    assert bias.mean().item() == pytest.approx(-0.5, abs=0.3)


@pytest.mark.parametrize("method", ["dllm2rec", "rd", "dcd", "bce by discrepancy"])
@pytest.mark.parametrize("rank_samples", [200, None])
def test_methods_that_ask_for_ranks_leave_out_what_the_teachers_list_has_not(method, rank_samples):
    output, batch = case()
    batch["items"] = torch.arange(21, 31).expand(12, -1)
    batch["teacher_items"] = torch.where(batch["teacher_items"] > 20, batch["teacher_items"] - 10, batch["teacher_items"])
    values = []
    for size in (-50.0, 50.0):  # what was met is the student's last, and its first
        table = output.items.detach().clone()
        table[21:], output.user.data[:, 0] = torch.tensor([size, 0, 0, 0], dtype=torch.float64), 1
        one = term(**{**METHODS[method], "rank_samples": rank_samples})
        one.epoch = 1
        torch.manual_seed(0)
        values.append(one(StudentOutput(output.user, table), batch).item())
    assert values[0] == values[1]


@pytest.mark.parametrize("deepest", [1, 5, N_ITEMS, N_ITEMS + 9])
def test_exact_ranks_end_where_nothing_tells_them_apart_any_more(deepest):
    output, batch = case()
    items = batch["teacher_items"].clamp(min=1)
    user, table = output.user.detach(), output.items.detach()
    table[7] = table[9]  # a tie
    scores = user @ table.T
    exact = (scores[:, None, 1:] > scores.gather(1, items)[..., None]).sum(2)
    rank = samples.student_ranks(user, table, items, losses.list_scores(user, table, items), None, deepest)
    assert torch.equal(rank, exact.clamp(max=deepest).double())


@pytest.mark.parametrize("method", ["rd", "dcd", "bce by discrepancy"])
def test_ranks_go_as_deep_as_the_method_can_see(method):
    module = term(**{**METHODS[method], "rank_samples": None})
    rank, place = torch.tensor(float(module.deepest)), torch.arange(K)
    deeper = rank + 1000
    assert torch.equal(weighing.discrepancy_weights(rank, place, 0.1), weighing.discrepancy_weights(deeper, place, 0.1))
    assert torch.equal(samples.discrepancy_log_weight(rank, place, 0.1), samples.discrepancy_log_weight(deeper, place, 0.1))
    assert term(**METHODS["rrd"]).deepest == 0


def test_golden_popularity_groups_and_quotas(golden):
    z = golden("unkd/case_a_groups")
    popularity = F.pad(torch.bincount(z["in.train_items"].long(), minlength=20), (1, 0))
    group_of = samples.popularity_groups(popularity, int(z["hp.n_groups"]))
    assert torch.equal(group_of[1:], z["out.item_group"])
    assert group_of[0] == -1
    quotas = samples.group_quotas(popularity, group_of, int(z["hp.sample_num"]), z["hp.lamda"].item())
    assert quotas == z["out.pairs_per_group"].tolist()
    assert samples.group_quotas(popularity, group_of, 30, 0.0) == [8, 8, 8, 8]  # 7.5 each, rounded


@pytest.mark.parametrize(
    ("count", "expected"), [([9, 1, 1, 1], [0, 0, 0, 0]), ([5, 5, 2], [0, 1, 1]), ([4, 2, 6, 0], [1, 1, 0, 1])]
)
def test_groups_by_hand(count, expected):
    """12 interactions, 6 to a group: 9 is too many for one, and the 3 left are half of one and join it."""
    assert samples.popularity_groups(torch.tensor([0, *count]), 2).tolist() == [-1, *expected]


def test_pairs_stay_within_their_group_and_follow_the_ranks_there():
    torch.manual_seed(0)
    group = torch.tensor([0, 1, 0, -1, 0, 1, 2]).expand(DRAWS, 7)
    better, worse, real = samples.draw_pairs(group, [2, 1, 3], 2.0)
    assert better.shape == worse.shape == real.shape == (DRAWS, 6)
    assert (better <= worse).all()
    assert (better < worse)[real].all()
    assert not real[:, 3:].any(), "a group with one item has no pair"
    assert set(better[:, 2][real[:, 2]].tolist()) == {1}
    assert set(worse[:, 2][real[:, 2]].tolist()) == {5}
    weight = {place: math.exp(-rank / 2) for place, rank in ((0, 1), (2, 2), (4, 3))}
    total = sum(weight[a] * weight[b] for a, b in itertools.combinations(weight, 2))
    for a, b in itertools.combinations(weight, 2):
        share = ((better == a) & (worse == b))[:, :2][real[:, :2]].float().mean().item()
        assert share == pytest.approx(weight[a] * weight[b] / total, abs=0.01)


@pytest.mark.parametrize("cells", [2**20, 200])
def test_other_items_are_uniform_and_what_is_taken_does_not_count(monkeypatch, cells):
    monkeypatch.setitem(samples._CELLS, "cpu", cells)
    torch.manual_seed(0)
    taken = torch.randint(0, N_ITEMS + 1, (5003, 6))
    drawn, free = samples.draw_others(taken, 40, N_ITEMS)
    of_target = drawn[torch.arange(5003) // math.ceil(5003 / len(drawn))]
    assert free.shape == (5003, 40)
    assert torch.equal(free, ~(of_target[:, :, None] == taken[:, None]).any(2))
    assert drawn.min() == 1
    torch.testing.assert_close(shares(drawn, N_ITEMS + 1)[1:], torch.full((N_ITEMS,), 1 / N_ITEMS), atol=0.006, rtol=0)


def test_met_items_are_those_of_the_row_as_far_as_the_batch_knows_them():
    items, target = torch.tensor([[0, 4, 5], [7, 8, 9]]), torch.tensor([[0, 5, 6], [0, 9, 10]])
    met = samples.met_items({"items": items, "target": target})
    assert met.tolist() == [[0, 4, 5, 6]] * 2 + [[7, 8, 9, 10]] * 2
    assert samples.met_items({"items": items, "target": target}, torch.tensor([1, 2])).tolist() == met[1:3].tolist()
    assert samples.met_items({"items": items, "target": torch.tensor([6, 10])}).tolist() == [[0, 4, 5, 6], [7, 8, 9, 10]]
    assert samples.met_items({"target": torch.tensor([6, 10])}).tolist() == [[6], [10]]


# ---- the methods are their equations -----------------------------------------------------------------------------------


def by_list(items, scores):
    """Each list without its fillers: (target, items, scores)."""
    for t, (own, said) in enumerate(zip(items, scores, strict=True)):
        yield t, own[own > 0], said[own > 0]


def test_dllm2rec_by_plain_sums():
    output, batch = case()
    settings = {**METHODS["dllm2rec"], "k": 5, "negatives": 0}
    scores = output.user @ output.items.T
    ranks = scores[:, 1:].argsort(1, descending=True).argsort(1)
    expected = []
    for t, items, said in by_list(batch["teacher_items"][:, :5], batch["teacher_scores"][:, :5]):
        if len(items):
            position = torch.softmax(-torch.arange(len(items)).double(), 0)
            confidence = torch.softmax(-(said[0] - said) / (said[0] - said[-1]), 0)
            consistency = (ranks[t, items - 1] < 5) + 1e-8
            weight = 0.3 * position + 0.5 * confidence + 0.1 * consistency
            expected.append((weight / weight.sum() * -F.logsigmoid(scores[t, items])).sum())
    cut = batch | {key: batch[key][:, :5] for key in ("teacher_items", "teacher_scores")}
    torch.testing.assert_close(term(**settings)(output, cut), sum(expected) / 12, rtol=1e-6, atol=0)


def test_weights_are_the_labels_of_a_softmax():
    output, batch = case()
    scores = output.user @ output.items.T
    expected = []
    for t, items, said in by_list(batch["teacher_items"], batch["teacher_scores"]):
        if len(items):
            position = torch.softmax(-torch.arange(len(items)).double(), 0)
            confidence = torch.softmax(-(said[0] - said) / (said[0] - said[-1]), 0)
            weight = 0.3 * position + 0.5 * confidence
            expected.append((weight / weight.sum() * -scores[t, 1:].log_softmax(0)[items - 1]).sum())
    settings = {"loss": "softmax", "over": "catalogue", "weights": {"position": 0.3, "confidence": 0.5}}
    torch.testing.assert_close(term(**settings)(output, batch), sum(expected) / 12, rtol=1e-6, atol=0)


def test_negatives_are_off_the_list_and_the_row():
    """All items but 1 and 2 are listed or met: the negative can be no other, or none at all."""
    output, batch = case()
    everything = torch.arange(3, N_ITEMS + 1).expand(12, -1)
    batch["target"][:] = 5
    batch |= {"teacher_items": everything[:, :20], "teacher_scores": torch.zeros(12, 20), "items": everything[:, 19:]}
    output.items.data[1:3] = 0
    torch.manual_seed(0)
    found = {round(term(negatives=1, reduce=lambda loss, batch: loss.sum())(output, batch).item(), 4) for _ in range(50)}
    base = term(reduce=lambda loss, batch: loss.sum())(output, batch).item()
    assert found == {round(base, 4), round(base + 12 * math.log(2), 4)}


def test_rd_weighs_by_the_teacher_alone_until_its_start_epoch():
    output, batch = case()
    scores, per_target = output.user @ output.items.T, {}
    rd = term(reduce=lambda loss, batch: loss, **(METHODS["rd"] | {"rank_samples": None}))
    for rd.epoch in (0, 1):
        per_target[rd.epoch] = rd(output, batch)
    ranks = scores[:, 1:].argsort(1, descending=True).argsort(1)
    for t, items, _ in by_list(batch["teacher_items"], batch["teacher_scores"]):
        if len(items):
            place = torch.arange(len(items))
            static = torch.softmax(-place.double(), 0)
            dynamic = static * torch.tanh(0.1 * (ranks[t, items - 1] - place).double()).clamp(min=0)
            loss = -F.logsigmoid(scores[t, items])
            assert per_target[0][t].item() == pytest.approx((static * loss).sum().item())
            assert per_target[1][t].item() == pytest.approx((dynamic * loss).sum().item())


def test_dcd_puts_what_is_underrated_above_what_is_overrated():
    output, batch = case()
    settings = METHODS["dcd"] | {"uninteresting": 0, "underestimated": 8, "overestimated": 8, "rank_samples": None}
    loss = term(reduce=lambda loss, batch: loss, **settings)(output, batch)
    scores = output.user @ output.items.T
    ranks = scores[:, 1:].argsort(1, descending=True).argsort(1)
    for t, items, _ in by_list(batch["teacher_items"], batch["teacher_scores"]):
        place, own = torch.arange(len(items)), ranks[t, items - 1]
        low, high = scores[t, items[own > place]], scores[t, items[own < place]]
        expected = sum((torch.cat([low[i:], high]).logsumexp(0) - low[i]).item() for i in range(len(low)))
        assert loss[t].item() == pytest.approx(expected), "all of either kind are drawn"


def test_dcd_is_rrd_and_its_correction(monkeypatch):
    output, batch = case()
    fixed = torch.tensor([[21, 22, 23, 24, 25, 26]]), torch.ones(12, 6, dtype=torch.bool)
    monkeypatch.setattr(samples, "draw_others", lambda taken, number, n_items: fixed)
    settings = METHODS["dcd"] | {"underestimated": 8, "overestimated": 8, "rank_samples": None}
    dcd = term(**settings)
    both = dcd(output, batch)
    plain = term(**(settings | {"underestimated": 0, "overestimated": 0}))(
        output, batch | {key: batch[key][:, :4] for key in ("teacher_items", "teacher_scores")}
    )
    correction = term(**(settings | {"uninteresting": 0}))(output, batch)
    assert min(plain, correction) > 0
    torch.testing.assert_close(both, plain + correction)
    torch.testing.assert_close([dcd.parts["listed"], dcd.parts["correction"]], [plain.detach(), correction.detach()])


def test_rrd_draws_from_the_list_and_keeps_its_order():
    output, batch = case()
    seen = []
    rrd = term(**(METHODS["rrd by rank"] | {"uninteresting": 5}))
    original = losses.relaxed_listwise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "relaxed_listwise", lambda *given: seen.append(given) or original(*given))
        rrd(output, batch)
    listed, others, valid, free = seen[0]
    assert others.shape == free.shape == (12, 5)
    scores = output.user @ output.items.T
    for t, items, _ in by_list(batch["teacher_items"], batch["teacher_scores"]):
        assert int(valid[t].sum()) == min(4, len(items))
        place = [(scores[t, items] - s).abs().argmin().item() for s in listed[t][valid[t]]]
        assert place == sorted(set(place))


def test_unkd_compares_within_groups():
    output, batch = case()
    unkd = term(loss="pairwise", pairs=400, groups=2)
    assert unkd.group_of.unique().tolist() == [-1, 0, 1]
    torch.manual_seed(0)
    user, table = output.user, output.items
    gradient = torch.autograd.grad(unkd(output, batch), [user, table])
    assert all(x.isfinite().all() for x in gradient)
    batch["teacher_items"] = torch.tensor([[1, 30, 0, 0]]).expand(12, 4)  # the most and the least popular: no pair
    batch["teacher_scores"] = torch.zeros(12, 4)
    assert unkd(output, batch) == 0


@pytest.mark.parametrize("method", METHODS)
def test_what_fills_up_a_list_has_no_influence(method):
    output, batch = case()
    module = term(**METHODS[method])
    module.epoch = 5
    longer = {"teacher_items": F.pad(batch["teacher_items"], (0, 3)), "teacher_scores": F.pad(batch["teacher_scores"], (0, 3))}
    other = longer | {"teacher_scores": longer["teacher_scores"].masked_fill(longer["teacher_items"] == 0, 1e4)}
    values = []
    for lists in (longer, other):
        torch.manual_seed(0)
        loss = module(output, batch | lists)
        d_user, d_table = torch.autograd.grad(loss, [output.user, output.items])
        assert (d_table[0] == 0).all(), "the padding row"
        assert loss.isfinite()
        assert (d_user[3] == 0).all(), "an empty list teaches nothing"
        assert d_user.abs().sum() > 0
        values.append((loss, d_user, d_table))
    assert all(torch.equal(one, two) for one, two in zip(*values, strict=True))
    if method == "soft top-k":  # nothing is drawn, so that the shorter lists can be told to give the same
        torch.testing.assert_close(module(output, batch), values[0][0])


@pytest.mark.parametrize("method", ["soft top-k", "soft top-k of all"])
def test_a_share_is_an_unbiased_estimate(method):
    output, batch = case()
    whole, part = term(**METHODS[method]), term(share=1 / 3, **METHODS[method])
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([part(output, batch) for _ in range(2000)])
        exact = whole(output, batch)
    assert draws.std() > 0
    assert abs(draws.mean() - exact) < 4 * draws.std() / 2000**0.5


def test_dros_is_a_part_of_its_own_that_share_makes_cheaper():
    output, batch = case()
    module = term(dros=0.5, weights={"position": 1.0})
    loss = module(output, batch)
    torch.testing.assert_close(loss.detach(), module.parts["bce"] + 0.5 * module.parts["dros"])
    official = term(dros=0.5, weights={"position": 1.0}, official_dros_mean=True)(output, batch)
    assert abs(official - loss) > 1e-6
    assert module.state_dict() == {}, "what popularity says is not stored with the student"


# ---- in training -------------------------------------------------------------------------------------------------------


def train(callback, kind: str, folder, epochs: int = 4, share_of_task: float = 1.0):
    """Losses of the term, by epoch, and the student."""
    dataset = random_dataset(users=40, n_items=N_ITEMS)
    L.seed_everything(0, verbose=False)
    if kind == "sequential":
        model = SequentialRecommender(SASRec(N_ITEMS, 8, dim=8, layers=1, dropout=0.0), OptimizerConfig(lr=0.03))
        data = SequenceDataModule(dataset, SequenceConfig(max_length=8), batch_size=16, mask_history=True, seed=0)
    else:
        backbone = BPRMF(n_items=N_ITEMS, n_users=40, dim=8)
        model = CollaborativeRecommender(backbone, OptimizerConfig(lr=0.03), LossConfig(kind="bpr", negatives=1))
        data = PairDataModule(dataset, batch_size=32, negatives=1, mask_history=True, seed=0)
    callback.ranking = Lists(data.rows.targets)
    by_epoch: dict[int, list[float]] = {}
    model.log_losses = lambda values, batch: by_epoch.setdefault(model.current_epoch, []).append(  # type: ignore[method-assign]
        values.get(f"loss/{callback.name}", torch.tensor(math.nan)).item()
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=[callback],
    )
    trainer.fit(model, data)
    means = [torch.tensor(values).nanmean().item() for values in by_epoch.values()]
    return means, model


@pytest.mark.parametrize("kind", ["sequential", "collaborative"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_teaches_both_kinds_of_students(method, kind, tmp_path):
    settings = METHODS[method] | {"weight": 5.0}
    means, model = train(RankingDistillation(Lists(1), POPULARITY, **settings), kind, tmp_path)
    assert all(math.isfinite(mean) for mean in means)
    if method == "rd":  # its weights are others from epoch 1 on, where most of the work is done
        means = means[:1] + means[-1:]
    assert means[-1] < means[0]
    assert (model.item_table()[0] == 0).all()
    assert model.terms["ranking"].epoch == 3


def test_same_seed_same_draws(tmp_path):
    settings = METHODS["dcd"] | {"share": 0.5}
    runs = [train(RankingDistillation(Lists(1), POPULARITY, **settings), "sequential", tmp_path, epochs=1) for _ in range(2)]
    assert runs[0][0] == runs[1][0]


def test_bf16_is_finite(tmp_path):
    output, batch = case()
    for settings in METHODS.values():
        module = term(**settings)
        half = StudentOutput(output.user.detach().bfloat16().requires_grad_(), output.items.detach().float().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(half, batch)
        assert loss.dtype == torch.float32
        assert all(x.isfinite().all() for x in torch.autograd.grad(loss, [half.user, half.items]))


# ---- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "bpr"}, "Unknown loss.*ranking_distillation.loss.*listwise"),
        ({"sampler": "tops"}, "Unknown sampler.*Did you mean 'top'"),
        ({"sampler": "popularity"}, "sampler popularity does not fit loss bce. Choose top or rank or discrepancy"),
        ({"loss": "pairwise", "sampler": "top"}, "sampler top does not fit loss pairwise. Choose popularity"),
        ({"weights": {"postion": 1.0}}, "Unknown weight.*Did you mean 'position'"),
        ({"weights": {"position": 0.0}}, "weights.position is 0.0. It must be a number above 0"),
        ({"weights": {"position": "much"}}, "weights.position is much"),
        ({"combine": "mean"}, "Unknown combine"),
        ({"over": "all"}, "Unknown over"),
        ({"loss": "listwise", "weights": {"position": 1.0}}, "weights belong to loss: bce or softmax"),
        ({"loss": "softmax", "negatives": 1}, "negatives belongs to loss: bce"),
        ({"loss": "softmax", "dros": 1.0}, "dros belongs to loss: bce"),
        ({"overestimated": 3}, "overestimated belong to loss: listwise"),
        ({"loss": "listwise", "overestimated": 3}, "Set both to 1 or more, or neither"),
        ({"loss": "listwise", "sampler": "discrepancy"}, "sampler discrepancy does not fit loss listwise. Choose top or rank"),
        ({"loss": "listwise", "uninteresting": 0}, "uninteresting is 0"),
        ({"k": 0}, "k is 0. It must be at least 1"),
        ({"rank_samples": 0}, "rank_samples is 0"),
        ({"start_epoch": -1}, "start_epoch is -1"),
        ({"temperature": 0.0}, "temperature is 0.0. It must be positive"),
        ({"share": 0.0}, "share is 0.0"),
        ({"decay_epochs": -1}, "decay_epochs is -1"),
        ({"weight": -1.0}, "weight is -1"),
    ],
)
def test_bad_settings_name_the_key_and_the_cure(settings, message):
    with pytest.raises(UserError, match=message):
        RankingDistillation(Lists(1), POPULARITY, **settings)


def test_lists_that_are_too_short():
    with pytest.raises(UserError, match="k is 9, but the teacher's lists have 8 items. Lower k, or record longer lists"):
        term(k=9)
