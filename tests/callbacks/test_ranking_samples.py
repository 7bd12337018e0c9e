"""What ranking distillation draws from lists and catalogue, and how it ranks: the papers' shares, exactly or on average."""

import itertools
import math

import pytest
import torch
from ranking_lists import METHODS, N_ITEMS, NOTHING_MET, K, case, term
from torch.nn import functional as F

from lit_llmers.callbacks import ranking_samples as samples
from lit_llmers.losses import ranking_weights as weighing
from lit_llmers.losses.scores import list_scores
from lit_llmers.students.output import StudentOutput

DRAWS = 40_000


def shares(values: torch.Tensor, size: int) -> torch.Tensor:
    return torch.bincount(values.flatten(), minlength=size) / values.numel()


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
    listed = list_scores(user, table, items)
    exact = samples.student_ranks(user, table, items, listed, NOTHING_MET, None, N_ITEMS)
    assert torch.equal(exact, order.gather(1, items - 1).double())
    torch.manual_seed(0)
    estimates = torch.stack([samples.student_ranks(user, table, items, listed, NOTHING_MET, 200, 1) for _ in range(50)])
    bias = estimates.mean(0) - exact * (N_ITEMS - 1) / N_ITEMS  # what is drawn may be the item itself; and it is rounded down
    assert bias.abs().max() < 1.5
    assert bias.mean().item() == pytest.approx(-0.5, abs=0.3)
    in_single = samples.student_ranks(user.float(), table.float(), items, listed.float(), NOTHING_MET, None, N_ITEMS)
    assert (in_single - exact).abs().max() <= 1


def by_target(met: samples.Met) -> list[list[int]]:
    """The items of each target, fillers too."""
    target, item = met
    assert (target.diff() >= 0).all()
    return [item[target == number].tolist() for number in target.unique()]


def test_what_was_met_before_a_target_is_its_row_so_far():
    items = torch.tensor([[0, 4, 5, 6], [7, 8, 9, 3]])
    every = {"items": items, "target": torch.tensor([[0, 5, 0, 2], [8, 0, 3, 1]])}
    met = [[0, 4, 0, 0], [0, 4, 5, 6], [7, 0, 0, 0], [7, 8, 9, 0], [7, 8, 9, 3]]
    assert by_target(samples.met_before(every)) == met
    assert by_target(samples.met_before(every, torch.tensor([1, 3]))) == [met[1], met[3]]
    one = {"items": items, "target": torch.tensor([2, 1])}
    assert by_target(samples.met_before(one)) == items.tolist()
    assert by_target(samples.met_before(one, torch.tensor([1]))) == [[7, 8, 9, 3]]
    assert items[0].tolist() == [0, 4, 5, 6], "the batch is as it was"


def test_what_was_met_is_in_nobodys_way(monkeypatch):
    monkeypatch.setattr(samples, "_ROWS", 5)
    output, batch = case()
    items = batch["teacher_items"].clamp(min=1)
    user, table = output.user.detach(), output.items.detach()
    generator = torch.Generator().manual_seed(5)
    met = torch.arange(12).repeat_interleave(torch.arange(12)), torch.randint(0, N_ITEMS + 1, (66,), generator=generator)
    scores = (user @ table.T).index_put(met, torch.tensor(-torch.inf, dtype=torch.float64))
    listed = list_scores(user, table, items)
    exact = (scores[:, None, 1:] > listed[:, :, None] + 1e-12).sum(2)
    assert torch.equal(samples.student_ranks(user, table, items, listed, met, None, N_ITEMS), exact.double())
    torch.manual_seed(0)
    estimates = torch.stack([samples.student_ranks(user, table, items, listed, met, 200, 1) for _ in range(50)])
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
    rank = samples.student_ranks(user, table, items, list_scores(user, table, items), NOTHING_MET, None, deepest)
    assert torch.equal(rank, exact.clamp(max=deepest).double())


@pytest.mark.parametrize(("n_items", "deepest"), [(299, 7), (300, 20), (301, 37), (307, 38)])
def test_exact_ranks_stop_at_the_best_scores_and_ties_share_the_better_rank(n_items, deepest):
    torch.manual_seed(1)
    items = torch.stack([torch.randperm(n_items)[:50] + 1 for _ in range(9)])
    user, table = torch.randn(9, 4), torch.randn(n_items + 1, 4).round()  # with ties
    listed = list_scores(user, table, items)
    scores = user @ table.T
    exact = (scores[:, None, 1:] > scores.gather(1, items)[..., None]).sum(2)
    assert (exact < deepest).sum() > 9
    with torch.autocast("cpu", torch.bfloat16):
        rank = samples.student_ranks(user, table, items, listed, NOTHING_MET, None, deepest)
    assert torch.equal(rank, exact.clamp(max=deepest).float())


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


def test_a_group_without_a_quota_gives_no_pair():
    popularity = torch.tensor([0, 5, 5, 5, 5])
    group_of = samples.popularity_groups(popularity, 4)
    quotas = samples.group_quotas(popularity, group_of, 2, 0.0)
    assert sorted(quotas) == [0, 0, 1, 1], "two pairs for four groups"
    group = torch.arange(4).repeat_interleave(2).expand(5, 8)  # two of each group in a list
    better, worse, _ = samples.draw_pairs(group, quotas, 2.0)
    assert better.shape == worse.shape == (5, 2)
    assert set(group[0][better].flatten().tolist()) == {number for number, quota in enumerate(quotas) if quota}


@pytest.mark.parametrize("cells", [2**20, 200])
def test_other_items_are_uniform_and_what_is_taken_does_not_count(monkeypatch, cells):
    monkeypatch.setitem(samples._CELLS, "cpu", cells)
    torch.manual_seed(0)
    listed = torch.randint(0, N_ITEMS + 1, (5003, 3))
    number = torch.randint(0, 6, (5003,))  # of items that were met
    met = torch.arange(5003).repeat_interleave(number), torch.randint(0, N_ITEMS + 1, (int(number.sum()),))
    drawn, free = samples.draw_others(listed, met, 40, N_ITEMS)
    of_target = drawn[torch.arange(5003) // math.ceil(5003 / len(drawn))]
    assert free.shape == (5003, 40)
    taken = torch.zeros(5003, N_ITEMS + 1, dtype=torch.bool).scatter(1, listed, True)
    taken[met] = True
    assert torch.equal(free, ~taken.gather(1, of_target))
    assert drawn.min() == 1
    torch.testing.assert_close(shares(drawn, N_ITEMS + 1)[1:], torch.full((N_ITEMS,), 1 / N_ITEMS), atol=0.006, rtol=0)


def test_met_items_are_those_of_the_row():
    items, target = torch.tensor([[0, 4, 5], [7, 8, 9]]), torch.tensor([[0, 5, 6], [0, 9, 10]])
    met = [[0, 4, 5, 6]] * 2 + [[7, 8, 9, 10]] * 2
    assert by_target(samples.met_items({"items": items, "target": target})) == met
    assert by_target(samples.met_items({"items": items, "target": target}, torch.tensor([1, 2]))) == met[1:3]
    assert by_target(samples.met_items({"items": items, "target": torch.tensor([6, 10])})) == [[0, 4, 5, 6], [7, 8, 9, 10]]


def test_what_a_pairs_user_has_met_comes_with_the_batch():
    batch = {"target": torch.tensor([6, 10]), "seen_row": torch.tensor([0, 0, 1]), "seen_item": torch.tensor([6, 2, 10])}
    assert by_target(samples.met_items(batch)) == by_target(samples.met_before(batch)) == [[6, 2], [10]]
