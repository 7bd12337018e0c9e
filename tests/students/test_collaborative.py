"""What every collaborative backbone owes the rest, and the students around them and around the counting ones."""

from collections.abc import Callable

import lightning as L
import numpy as np
import pytest
import torch
from tiny import assert_equal_weights, dataset, random_dataset
from torch.nn import functional as F

from lit_llmers.backbones import CollaborativeBackbone
from lit_llmers.backbones.alpharec import AlphaRec
from lit_llmers.backbones.bpr_mf import BPRMF
from lit_llmers.backbones.item_knn import ItemKNN
from lit_llmers.backbones.lightgcn import LightGCN
from lit_llmers.backbones.mixgcf import MixGCF
from lit_llmers.backbones.popularity import Popularity
from lit_llmers.callbacks.resume import SeedEachStep, save
from lit_llmers.conf.schema import LossConfig, OptimizerConfig
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.loader import Batch, EvaluationBatches
from lit_llmers.data.pairs import PairBatches, PairDataModule, PairRows
from lit_llmers.data.sequences import EvaluationRows
from lit_llmers.errors import UserError
from lit_llmers.students.collaborative import CollaborativeRecommender
from lit_llmers.students.counting import CountingRecommender

Make = Callable[..., CollaborativeBackbone]


def alpharec(data: Dataset, **kwargs) -> AlphaRec:
    """Reads a text table that no test asks about, and has no tables to initialise or to weigh."""
    kwargs = {key: value for key, value in kwargs.items() if key not in ("init_std", "reg")}
    table = torch.randn(data.n_items + 1, 24, generator=torch.Generator().manual_seed(3))
    table[0] = 0
    return AlphaRec(data.n_users, data.n_items, table, data.training_pairs, **kwargs)


BACKBONES = {
    "alpharec": alpharec,
    "bpr_mf": lambda data, **kwargs: BPRMF(data.n_users, data.n_items, **kwargs),
    "lightgcn": lambda data, **kwargs: LightGCN(data.n_users, data.n_items, data.training_pairs, layers=2, **kwargs),
    "mixgcf": lambda data, **kwargs: MixGCF(data.n_users, data.n_items, data.training_pairs, layers=2, **kwargs),
}


@pytest.fixture(params=BACKBONES)
def make(request) -> Make:
    return BACKBONES[request.param]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return random_dataset(users=30, n_items=40)


def some_batch(data: Dataset, negatives: int = 4) -> Batch:
    return next(iter(PairBatches(PairRows(data), 64, negatives, seed=0)))


def build(make: Make, data: Dataset, seed: int = 0, **kwargs) -> CollaborativeBackbone:
    torch.manual_seed(seed)
    return make(data, dim=8, **kwargs)


def loss_of(backbone: CollaborativeBackbone, batch: Batch) -> torch.Tensor:
    torch.manual_seed(7)  # MixGCF draws
    users, items = backbone()
    positive, negative = backbone.pair_scores(batch, users, items)
    return -F.logsigmoid(positive[:, None] - negative).mean() + backbone.penalty(batch)


def trainer(epochs: int, *callbacks: L.Callback, validate: bool = False, **kwargs) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        limit_val_batches=None if validate else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


# ---- the battery of the backbones ------------------------------------------------------------------------------------


def test_shapes(make, data):
    backbone, batch = build(make, data), some_batch(data)
    users, items = backbone()
    assert users.shape == (data.n_users, 8)
    assert items.shape == (data.n_items + 1, 8)
    assert not items[0].any()
    positive, negative = backbone.pair_scores(batch, users, items)
    assert positive.shape == (64,)
    assert negative.shape == (64, 1 if isinstance(backbone, MixGCF) else 4)
    torch.testing.assert_close(positive, (users[batch["user"]] * items[batch["target"]]).sum(1))


def test_initial_tables_are_the_given_ones(make, data):
    backbone = build(make, data)
    if isinstance(backbone, AlphaRec):
        pytest.skip("has no tables")
    users, items = (table.detach().clone() for table in backbone())
    backbone.initialise(torch.ones_like(items), torch.full_like(users, 2.0))
    start = dict(backbone.named_parameters())
    learned = start["nodes"] if "nodes" in start else torch.cat([start["users.weight"], start["items.weight"]])
    wanted = torch.cat([torch.full_like(users, 2.0), torch.ones_like(items)])
    wanted[len(users)] = 0
    assert torch.equal(learned, wanted)
    with pytest.raises(UserError, match="initial table of the users"):
        backbone.initialise(items, users[1:])


def test_every_parameter_gets_a_gradient_and_the_padding_row_none(make, data):
    backbone, batch = build(make, data), some_batch(data)
    adam = torch.optim.AdamW(backbone.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        adam.zero_grad()
        loss_of(backbone, batch).backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in backbone.parameters())
        adam.step()
    assert not backbone()[1][0].any()


def test_state_dict_round_trip(make, data):
    source, copy = build(make, data), build(make, data, seed=1)
    assert not torch.equal(source()[0], copy()[0])
    copy.load_state_dict(source.state_dict())
    for ours, theirs in zip(copy(), source(), strict=True):
        assert torch.equal(ours, theirs)


def test_bfloat16_is_finite_and_close_to_float32(make, data):
    backbone, batch = build(make, data, init_std=1.0), some_batch(data)
    exact = torch.cat(backbone.eval()()).detach()
    backbone.bfloat16().train()
    loss = loss_of(backbone, batch)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in backbone.parameters())
    rough = torch.cat(backbone.eval()())
    assert rough.dtype == torch.bfloat16
    real = exact.norm(dim=1) > 0
    assert torch.cosine_similarity(rough.float(), exact, dim=1)[real].min() > 0.99


def test_compiled_is_eager(make, data):
    backbone, batch = build(make, data), some_batch(data)
    expected = loss_of(backbone, batch)
    gradients = torch.autograd.grad(expected, list(backbone.parameters()))
    torch.manual_seed(7)
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(batch: Batch) -> torch.Tensor:
        users, items = backbone()
        positive, negative = backbone.pair_scores(batch, users, items)
        return -F.logsigmoid(positive[:, None] - negative).mean() + backbone.penalty(batch)

    loss = compiled(batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(backbone.parameters())), gradients)


def test_ten_users_are_learned_by_heart(make):
    """Each likes five items of forty, so the five have to come first."""
    liked = [np.random.default_rng(user).choice(40, 7, replace=False) + 1 for user in range(10)]
    data = dataset([own.tolist() for own in liked], 40)
    torch.manual_seed(0)
    backbone = make(data, dim=16, reg=0.0)
    student = CollaborativeRecommender(backbone, OptimizerConfig(lr=0.02), LossConfig("bpr", 4))
    trainer(60).fit(student, datamodule=PairDataModule(data, 25, 4, True, seed=0))
    users, items = student.backbone()
    scores = users @ items.T
    for user, own in enumerate(liked):
        assert set(scores[user, 1:].topk(5).indices.add(1).tolist()) == set(own[:5].tolist())


# ---- the collaborative student ---------------------------------------------------------------------------------------


def test_a_step_is_the_plain_one(data):
    """Loss and gradient of a BPR step by autograd on copies of the rows, in float64; for the others too."""
    batch = some_batch(data, negatives=1)
    for kind in ("bpr", "bce", "sampled_softmax"):
        backbone = build(BACKBONES["bpr_mf"], data, reg=0.01, init_std=1.0).double()
        student = CollaborativeRecommender(backbone, loss=LossConfig(kind, 1))
        users, items = student.backbone()
        user, target, other = users[batch["user"]], items[batch["target"]], items[batch["negatives"][:, 0]]
        positive, negative = (user * target).sum(1), (user * other).sum(1)
        if kind != "bce":  # a softmax over two is BPR
            expected = F.softplus(negative - positive).mean()
        else:
            expected = (F.softplus(-positive) + F.softplus(negative)).mean() / 2
        expected = expected + 0.01 / 2 * sum(rows.square().sum() for rows in (user, target, other)) / 64
        loss = student.task_loss(student(batch), batch)
        torch.testing.assert_close(loss, expected)
        ours, theirs = (torch.autograd.grad(each, (users, items)) for each in (loss, expected))
        torch.testing.assert_close(ours, theirs)


def test_the_output_is_what_loss_terms_read(make, data):
    student, batch = CollaborativeRecommender(build(make, data)), some_batch(data)
    output = student(batch)
    users, items = student.backbone()
    assert torch.equal(output.user, users[batch["user"]])
    assert torch.equal(output.items, items)
    assert torch.equal(student.item_table(), items)
    assert output.hidden is None


def test_ranks_are_those_of_the_tables(make, data):
    student = CollaborativeRecommender(build(make, data, init_std=1.0)).eval()
    rows = EvaluationRows(data, "valid", 1)
    users, items = student.backbone()
    for masked in (True, False):
        for batch in EvaluationBatches(rows, 16, masked):
            scores = (users @ items.T)[batch["user"]].detach()
            own = scores.gather(1, batch["target"][:, None]).clone()
            scores[:, 0] = -torch.inf
            if masked:
                scores[batch["seen_row"], batch["seen_item"]] = -torch.inf
            assert student.ranks(batch).tolist() == (scores > own).sum(1).tolist()
    candidates = torch.randint(1, data.n_items + 1, (len(batch["target"]), 9))
    scores = (users @ items.T)[batch["user"]]
    above = scores.gather(1, candidates) > scores.gather(1, batch["target"][:, None])
    assert student.ranks(batch, student.tables(), candidates).tolist() == above.sum(1).tolist()


def test_a_killed_run_goes_on_bit_for_bit(make, data, tmp_path):
    class SaveOnce(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if (trainer.current_epoch, batch_idx) == (1, 1) and not (tmp_path / "last.ckpt").exists():
                save(trainer, tmp_path / "last.ckpt")

    def fit(resume=None) -> dict[str, torch.Tensor]:
        student = CollaborativeRecommender(build(make, data), OptimizerConfig(lr=0.01), LossConfig("bpr", 4))
        module = PairDataModule(data, 32, 4, True, seed=0)
        trainer(3, SeedEachStep(0), SaveOnce(), validate=True).fit(
            student, datamodule=module, ckpt_path=resume, weights_only=True
        )
        return student.state_dict()

    assert_equal_weights(fit(), fit(tmp_path / "last.ckpt"))


def test_it_learns_what_the_validation_asks(data):
    """Users of two kinds, each with half the catalogue: the held-out item is of the user's own half."""
    rng = np.random.default_rng(0)
    histories = [(rng.choice(20, 12, replace=False) + 1 + 20 * (user % 2)).tolist() for user in range(60)]
    halves = dataset(histories, 40)
    torch.manual_seed(0)
    student = CollaborativeRecommender(BACKBONES["lightgcn"](halves, dim=8), OptimizerConfig(lr=0.05), LossConfig("bpr", 1))
    run = trainer(20, validate=True)
    run.fit(student, datamodule=PairDataModule(halves, 128, 1, True, seed=0))
    # 10 of 40 items are left of the own half, so a model that knows the halves hits at 10 always
    assert run.callback_metrics["val/HR@10"] > 0.95


def test_sparse_training_learns_and_leaves_other_rows_alone(data):
    student = CollaborativeRecommender(
        build(BACKBONES["bpr_mf"], data, sparse=True), OptimizerConfig(lr=0.01), LossConfig("bpr", 1)
    )
    before, batch = [table.detach().clone() for table in student.backbone()], some_batch(data, negatives=1)
    first = student.task_loss(student(batch), batch).item()
    step = trainer(1, limit_train_batches=1)
    step.fit(student, datamodule=PairDataModule(data, 8, 1, True, seed=0))
    batch = next(iter(PairBatches(PairRows(data), 8, 1, seed=0)))
    touched = [batch["user"], torch.cat([batch["target"], batch["negatives"][:, 0]])]
    for old, new, rows in zip(before, student.backbone(), touched, strict=True):
        assert (old != new).any(1).nonzero().squeeze(1).tolist() == rows.unique().tolist()
    trainer(20).fit(student, datamodule=PairDataModule(data, 64, 1, True, seed=0))
    batch = some_batch(data, negatives=1)
    assert student.task_loss(student(batch), batch).item() < first - 0.05


@pytest.mark.parametrize("kind", ["cross_entropy", "gbce"])
def test_a_loss_that_is_not_pairwise_is_refused(data, kind):
    with pytest.raises(UserError, match=f"loss.kind is {kind}.*bpr or bce"):
        CollaborativeRecommender(build(BACKBONES["bpr_mf"], data), loss=LossConfig(kind))


# ---- the counting student --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["popularity", "item_knn"])
def test_counting_ranks_are_those_of_the_scores(kind, monkeypatch):
    monkeypatch.setattr("lit_llmers.students.counting._CHUNK", 7)
    data = random_dataset(users=30, n_items=40)
    pairs = data.training_pairs
    backbone = Popularity(40, pairs) if kind == "popularity" else ItemKNN(40, 30, pairs, neighbours=6)
    student = CountingRecommender(backbone)
    for masked in (True, False):
        for batch in EvaluationBatches(EvaluationRows(data, "test", 6), 20, masked):
            scores = backbone.scores(batch["items"], batch["mask"]).clone()
            own = scores.gather(1, batch["target"][:, None]).clone()
            candidate = torch.ones_like(scores, dtype=torch.bool)
            candidate[:, 0] = False
            candidate.scatter_(1, batch["target"][:, None], False)
            if masked:
                candidate[batch["seen_row"], batch["seen_item"]] = False
            expected = (((scores > own) & candidate).sum(1) + ((scores == own) & candidate).sum(1) / 2).tolist()
            assert student.ranks(batch).tolist() == expected
    candidates = torch.randint(1, 41, (len(batch["target"]), 9))
    others = scores.gather(1, candidates)
    mine = candidates != batch["target"][:, None]
    expected = (((others > own) & mine).sum(1) + ((others == own) & mine).sum(1) / 2).tolist()
    assert student.ranks(batch, None, candidates).tolist() == expected
    assert student.item_table() is None


def test_a_counting_student_is_validated_without_training(data):
    """Against each user's place of the held-out item among those that he has not met, by how often all have met them."""
    count, hits = np.bincount(data.training_pairs[:, 1], minlength=41), []
    for user in range(data.n_users):
        own = data.items[data.offsets[user] : data.offsets[user + 1]]
        *met, target = own[: len(own) - 1].tolist()
        others = [count[item] for item in range(1, 41) if item not in met and item != target]
        place = sum(each > count[target] for each in others) + sum(each == count[target] for each in others) / 2
        hits.append(place <= 9)
    assert 0 < np.mean(hits) < 1
    run = trainer(1, validate=True)
    student = CountingRecommender(Popularity(data.n_items, data.training_pairs))
    found = run.validate(student, datamodule=PairDataModule(data, 32, 1, True, seed=0), verbose=False)[0]
    assert found["val/HR@10"] == pytest.approx(np.mean(hits))
