"""Ranking distillation: each method is its equation, and every mode teaches a student."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from ranking_lists import METHODS, N_ITEMS, POPULARITY, Lists, case, share_of, term
from tiny import random_dataset
from torch.nn import functional as F

from lit_llmers.backbones.bpr_mf import BPRMF
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.callbacks import ranking_samples as samples
from lit_llmers.callbacks.ranking_distillation import KEYS, RankingDistillation
from lit_llmers.conf.schema import LossConfig, OptimizerConfig, SequenceConfig
from lit_llmers.data.histories import Histories
from lit_llmers.data.loader import SequenceDataModule
from lit_llmers.data.pairs import PairBatches, PairDataModule, PairRows
from lit_llmers.errors import UserError
from lit_llmers.losses import ranking as losses
from lit_llmers.losses import sampled
from lit_llmers.students.collaborative import CollaborativeRecommender
from lit_llmers.students.output import StudentOutput
from lit_llmers.students.sequential import SequentialRecommender

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


@pytest.mark.parametrize("sampler", ["rank", "discrepancy"])
def test_what_is_drawn_beside_an_item_does_not_change_its_confidence(sampler, monkeypatch):
    output, batch = case()
    bce, given = losses.list_bce, []
    monkeypatch.setattr(losses, "list_bce", lambda *args: given.append(args[:2]) or bce(*args))
    module = term(sampler=sampler, k=3, weights={"confidence": 1.0}, normalise=True)
    torch.manual_seed(0)
    module(output, batch)
    (listed, weight), scores = given[0], output.user @ output.items.T
    for t, items, said in by_list(batch["teacher_items"], batch["teacher_scores"]):
        drawn = weight[t] > 0
        place = [(scores[t, items] - s).abs().argmin().item() for s in listed[t][drawn]]
        confidence = torch.exp(-(said[:1] - said) / (said[:1] - said[-1:]))[place]
        torch.testing.assert_close(weight[t][drawn], confidence / confidence.sum())


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
    monkeypatch.setattr(samples, "draw_others", lambda listed, met, number, n_items: fixed)
    settings = METHODS["dcd"] | {"underestimated": 8, "overestimated": 8, "rank_samples": None}
    dcd = term(**settings)
    both = dcd(output, batch)
    plain = term(**(METHODS["dcd"] | {"underestimated": 0, "overestimated": 0}))(
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


def test_what_stands_under_the_list_is_nowhere_on_the_recorded_one(monkeypatch):
    """Not behind the first k either, which are all that a step takes."""
    draw_others, relaxed, off_list, listed = samples.draw_others, losses.relaxed_listwise, [], []
    monkeypatch.setattr(samples, "draw_others", lambda *given: off_list.append(draw_others(*given)) or off_list[-1])
    monkeypatch.setattr(losses, "relaxed_listwise", lambda *given: listed.append(given[0]) or relaxed(*given))
    output, batch = case()
    callback = RankingDistillation(Lists(12), POPULARITY, **(METHODS["rrd"] | {"k": 3, "uninteresting": 400}))
    model = sequential()
    callback.setup(None, model, "fit")
    batch |= {"target_row": torch.arange(12)}
    torch.manual_seed(0)
    callback.on_train_batch_start(None, model, batch, 0)
    model.terms["ranking"](output, batch)
    (drawn, free), scores = off_list[0], output.user @ output.items.T
    for t, items, _ in by_list(Lists(12).items, Lists(12).scores):
        counted = set(drawn[0][free[t]].tolist())
        assert counted == set(range(1, N_ITEMS + 1)) - set(items.tolist()) - {batch["target"][t].item()}
        torch.testing.assert_close(listed[0][t][: len(items)], scores[t, items[:3]])


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
    module = term(**METHODS[method])
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([module(output, share_of(batch, KEYS, 1 / 3)) for _ in range(2000)])
        exact = module(output, batch)
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


def test_golden_total_of_dllm2rec_with_the_targets_own_dros(golden, monkeypatch):
    """`alpha L_dro(y)` is no part of what lambda_d multiplies: the term, which is, has it alpha / lambda_d times."""
    z = golden("dllm2rec/case_a")
    alpha, factor, k = z["hp.alpha"].item(), z["hp.lam"].item(), int(z["hp.K"])
    negative = z["in.negative"][:, None] + 1, torch.ones(6, 1, dtype=torch.bool)
    monkeypatch.setattr(samples, "draw_others", lambda listed, met, number, n_items: negative)
    scores = z["in.student_scores"].requires_grad_()
    n_items = scores.shape[1]
    callback = RankingDistillation(
        type("", (), {"k": k}),
        F.pad(torch.bincount(z["in.train_next_items"], minlength=n_items), (1, 0)),
        weights={name: z[f"hp.gamma_{name}"].item() for name in ("position", "confidence", "consistency")},
        steepness=z["hp.position_lambda"].item(),
        raw_confidence=True,
        rank_samples=None,
        negatives=1,
        official_negative_term=True,
        dros=alpha,
        dros_target=alpha / factor,
        dros_beta=z["hp.beta"].item(),
        official_dros_mean=True,
    )
    module = callback.build(type("", (), {"reduce": staticmethod(lambda loss, batch: loss.mean())}))
    batch = {"target": z["in.target"] + 1, "teacher_items": z["in.teacher_candidates"][:, :k] + 1}
    batch["teacher_scores"] = -z["in.teacher_distances"][:, :k]
    batch["items"] = torch.zeros_like(batch["target"])[:, None]  # the code leaves nothing out of the student's ranks
    output = StudentOutput(scores, F.pad(torch.eye(n_items, dtype=torch.float64), (0, 0, 1, 0)))
    total = sampled.binary(scores.gather(1, z["in.target"][:, None])[:, 0], scores.gather(1, z["in.negative"][:, None])).mean()
    total = total + factor * module(output, batch)
    torch.testing.assert_close(module.parts["dros_target"], z["out.dro_target_per_row"].mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(total, z["out.total"], rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total, scores)[0], z["grad.student_scores"], rtol=1e-5, atol=1e-6)


def test_the_targets_own_dros_is_of_the_drawn_targets_and_needs_no_list():
    output, batch = case()
    settings = {"weights": {"position": 1.0}, "dros": 0.5}
    lists = share_of(batch, KEYS, 0.5)
    without, module = term(**settings), term(**settings, dros_target=0.7)
    added = (module(output, lists) - without(output, lists)) / 0.7
    scores, drawn = (output.user @ output.items.T)[:, 1:], lists["teacher_targets"]
    shares = losses.propensity(POPULARITY[1:]).double()
    expected = []
    for t in drawn:
        target, worst = batch["target"][t] - 1, (shares * scores[t].square()).exp()
        worst[target] = (shares[target] * (scores[t, target] - 1).square()).exp()
        expected.append(worst.sum().log())
    torch.testing.assert_close(added, sum(expected) / len(drawn), rtol=1e-5, atol=0)
    torch.testing.assert_close(module.parts["dros_target"], added.detach(), rtol=1e-5, atol=0)
    d_user = torch.autograd.grad(module(output, batch), output.user)[0]
    assert d_user[3].any(), "the list of target 3 is empty"


# ---- in training -------------------------------------------------------------------------------------------------------


def sequential() -> SequentialRecommender:
    return SequentialRecommender(SASRec(N_ITEMS, 8, dim=8, layers=1, dropout=0.0), OptimizerConfig(lr=0.03))


def train(callback, kind: str, folder, epochs: int = 4, share_of_task: float = 1.0):
    """Losses of the term, by epoch, and the student."""
    dataset = random_dataset(users=40, n_items=N_ITEMS)
    L.seed_everything(0, verbose=False)
    if kind == "sequential":
        model = sequential()
        data = SequenceDataModule(dataset, SequenceConfig(max_length=8), batch_size=16, mask_history=True, seed=0)
    else:
        backbone = BPRMF(n_items=N_ITEMS, n_users=40, dim=8)
        model = CollaborativeRecommender(backbone, OptimizerConfig(lr=0.03), LossConfig(kind="bpr", negatives=1))
        data = PairDataModule(dataset, batch_size=32, negatives=1, mask_history=True, seed=0)
        callback.histories = Histories(dataset, 8)
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


@pytest.mark.parametrize("method", ["dllm2rec", "rrd", "dcd", "rd", "unkd"])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_what_a_collaborative_students_users_have_met_is_no_candidate(method, share, monkeypatch):
    """Neither among the items off the list nor among those that its own ranks count, as in the teacher's list of a user."""
    data = random_dataset(users=9, n_items=N_ITEMS, longest=20)
    rows = PairRows(data)
    model = CollaborativeRecommender(BPRMF(n_items=N_ITEMS, n_users=9, dim=8))
    settings = {**METHODS[method], "share": share, "start_epoch": 0} if method == "rd" else {**METHODS[method], "share": share}
    callback = RankingDistillation(Lists(len(rows)), POPULARITY, Histories(data, 2), **settings)
    callback.setup(None, model, "fit")
    batch = PairBatches(rows, 32, 1, seed=0).collate(np.arange(0, len(rows), 2))
    callback.on_train_batch_start(None, model, batch, 0)
    owner = batch["user"][batch.get(KEYS[2], slice(None))]
    met = torch.zeros(9, N_ITEMS + 1, dtype=torch.bool)
    met[rows.user, rows.item] = True
    off_list, ranks = [], []
    draw_others, student_ranks = samples.draw_others, samples.student_ranks
    monkeypatch.setattr(samples, "draw_others", lambda *given: off_list.append(draw_others(*given)) or off_list[-1])
    monkeypatch.setattr(samples, "student_ranks", lambda *given: ranks.append(given) or student_ranks(*given))
    model.terms["ranking"](model(batch), batch)
    for drawn, free in off_list:
        of_target = drawn[torch.arange(len(owner)) // math.ceil(len(owner) / len(drawn))]
        assert free.any()
        assert not (free & met[owner].gather(1, of_target)).any()
    for user, table, items, listed, seen, _, deepest in ranks:
        scores = (user @ table.T)[:, 1:].masked_fill(met[owner][:, 1:], -torch.inf)
        exact = (scores[:, None] > listed[:, :, None] + 1e-6).sum(2).clamp(max=deepest)
        assert torch.equal(student_ranks(user, table, items, listed, seen, None, deepest), exact.float())
    assert (len(off_list), len(ranks)) == {"dllm2rec": (1, 1), "rrd": (1, 0), "dcd": (1, 1), "rd": (0, 1)}.get(method, (0, 0))
    assert ("seen_row" in batch) == (method != "unkd"), "what nobody asks for is not looked up"


@pytest.mark.parametrize(("shift", "raw", "warned"), [(-40.0, True, 1), (-40.0, False, 0), (0.0, True, 0)])
def test_raw_confidence_of_large_distances_is_warned_of_once(shift, raw, warned, tmp_path, monkeypatch, caplog):
    read = Lists.read
    monkeypatch.setattr(Lists, "read", lambda *given: (read(*given)[0], read(*given)[1] + shift))
    train(RankingDistillation(Lists(1), weights={"confidence": 1.0}, raw_confidence=raw), "sequential", tmp_path, epochs=2)
    said = [record.getMessage() for record in caplog.records if "raw_confidence" in record.getMessage()]
    assert len(said) == warned
    assert all("below -18" in message and "Leave raw_confidence out" in message for message in said)


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
        (
            {"loss": "listwise", "weights": {"position": 1.0}},
            "belongs to loss: bce or softmax. Leave it out, or set it to null",
        ),
        (
            {"loss": "softmax", "negatives": 1},
            "negatives=1 has no effect: it belongs to loss: bce. .*or set it to 0",
        ),
        ({"loss": "listwise", "overestimated": 3}, "Set both to 1 or more, or neither"),
        ({"loss": "listwise", "sampler": "discrepancy"}, "sampler discrepancy does not fit loss listwise. Choose top or rank"),
        ({"loss": "listwise", "uninteresting": 0}, "uninteresting is 0"),
        ({"k": 0}, "k is 0. It must be at least 1"),
        ({"rank_samples": 0}, "rank_samples is 0"),
        ({"start_epoch": -1}, "start_epoch is -1"),
        ({"share": 0.0}, r"ranking_distillation: share is 0.0. It must be above 0 and at most 1\."),
        ({"decay_epochs": -1}, "decay_epochs is -1"),
        ({"weight": -1.0}, "weight is -1"),
    ],
)
def test_bad_settings_name_the_key_and_the_cure(settings, message):
    with pytest.raises(UserError, match=message):
        RankingDistillation(Lists(1), POPULARITY, **settings)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("key", ["temperature", "steepness", "mu", "epsilon", "rank_temperature", "dros_beta", "dros_power"])
def test_what_divides_or_scales_must_be_positive(key, value):
    with pytest.raises(UserError, match=rf"^ranking_distillation: {key} is {value}\. It must be positive\.$"):
        RankingDistillation(Lists(1), POPULARITY, **{key: value})


@pytest.mark.parametrize(
    ("settings", "of"),
    [
        ({"temperature": 2.0}, "loss: softmax"),
        ({"over": "catalogue"}, "loss: softmax"),
        ({"pairs": 9}, "loss: pairwise"),
        ({"groups": 3}, "loss: pairwise"),
        ({"group_power": 1.0}, "loss: pairwise"),
        ({"uninteresting": 0}, "loss: listwise"),
        ({"overestimated": 3}, "loss: listwise"),
        ({"combine": "product"}, "weights"),
        ({"normalise": False}, "weights"),
        ({"steepness": 2.0, "weights": {"confidence": 1.0}}, "the weight position"),
        ({"raw_confidence": True, "weights": {"position": 1.0}}, "the weight confidence"),
        ({"mu": 1.0, "weights": {"consistency": 1.0}}, "the weight discrepancy"),
        ({"start_epoch": 1, "weights": {"position": 1.0}}, "the weights consistency and discrepancy"),
        ({"rank_samples": None, "weights": {"position": 1.0}}, "sampler: discrepancy, underestimated, and"),
        ({"epsilon": 0.5}, "sampler: discrepancy and underestimated"),
        ({"rank_temperature": 5.0}, "sampler: rank"),
        ({"official_negative_term": True}, "negatives"),
        ({"official_dros_mean": True}, "dros"),
        ({"dros_target": 1.0}, "dros"),
        ({"dros_beta": 2.0}, "dros"),
        ({"loss": "softmax", "dros": 1.0}, "loss: bce"),
        ({"loss": "pairwise", "k": 5}, "loss: bce, listwise or softmax"),
        ({"loss": "pairwise", "rank_samples": None}, "sampler: discrepancy"),
        *(({"loss": "listwise", key: value}, "") for key, value in [("over", "catalogue"), ("temperature", 2.0)]),
        *(({"loss": "listwise", key: 2.0}, "") for key in ("steepness", "mu")),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(settings, of):
    with pytest.raises(UserError, match=rf"^ranking_distillation: \w+=.* has no effect: it belongs to {of}.* Leave it out, or"):
        RankingDistillation(Lists(1), POPULARITY, **settings)


def test_a_setting_at_its_default_is_as_one_left_out():
    RankingDistillation(Lists(1), POPULARITY, over="list", weights={}, combine="sum", normalise=None, rank_samples=100)


def test_lists_that_are_too_short():
    with pytest.raises(UserError, match="k is 9, but the teacher's lists have 8 items. Lower k, or record longer lists"):
        term(k=9)
