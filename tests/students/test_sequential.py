"""The sequential recommender: one loss however it is batched, padded, resumed or attached to."""

import math
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from tiny import BASE, assert_equal_weights, dataset, random_dataset
from torch.nn import functional as F

from lit_llmers.backbones.gru4rec import GRU4Rec
from lit_llmers.backbones.llm_decoder import LLMDecoder
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.callbacks.deep_supervision import DeepSupervision
from lit_llmers.callbacks.feature_distillation import FeatureDistillation
from lit_llmers.callbacks.ranking_distillation import RankingDistillation
from lit_llmers.callbacks.resume import SeedEachStep, save
from lit_llmers.conf.schema import LossConfig, OptimizerConfig, SequenceConfig
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.loader import Batch, EvaluationBatches, SequenceDataModule, TrainingBatches
from lit_llmers.data.pairs import UnmetItems
from lit_llmers.data.sequences import EvaluationRows, TrainingRows
from lit_llmers.errors import UserError
from lit_llmers.metrics import ranking_metrics
from lit_llmers.models import load_weights
from lit_llmers.record import OnlineTeacher
from lit_llmers.students.negatives import UnmetDraw
from lit_llmers.students.sequential import SequentialRecommender

MAX_LENGTH, N_ITEMS = 8, 50


class Recorded:
    """A teacher's record in memory: `[targets, blocks, width]`."""

    def __init__(self, targets: int, blocks: int = 2, width: int = 24) -> None:
        self.states = torch.randn(targets, blocks, width, generator=torch.Generator().manual_seed(9))
        self.shape = (blocks, width)

    def read(self, batch: Batch) -> torch.Tensor:
        return self.states[batch["target_row"]]


def sasrec(dropout: float = 0.0) -> SASRec:
    return SASRec(N_ITEMS, MAX_LENGTH, dim=16, layers=4, dropout=dropout, init_std=0.3)


def gru4rec(dropout: float = 0.0) -> GRU4Rec:
    return GRU4Rec(N_ITEMS, MAX_LENGTH, dim=16, layers=4, dropout=dropout, init_std=0.3)


def decoder(dropout: float = 0.0) -> LLMDecoder:
    return LLMDecoder(torch.randn(N_ITEMS + 1, 12), MAX_LENGTH, BASE, layers=4, dropout=dropout, train_items=True)


BACKBONES = {"sasrec": sasrec, "gru4rec": gru4rec, "llm": decoder}


@pytest.fixture(params=BACKBONES)
def make(request):
    """Build the same student each time, on any rows."""

    def build(rows: TrainingRows, dropout: float = 0.0, **optimizer) -> SequentialRecommender:
        torch.manual_seed(0)
        settings = OptimizerConfig(**({"lr": 1e-2} | optimizer))
        return SequentialRecommender(BACKBONES[request.param](dropout), settings, targets_per_row=rows.targets / len(rows))

    return build


@pytest.fixture(scope="module")
def data() -> Dataset:
    return random_dataset(users=24, n_items=N_ITEMS, longest=MAX_LENGTH + 3)  # all training items fit into one row


def rows_of(data: Dataset, examples: str) -> TrainingRows:
    return TrainingRows(data, SequenceConfig(MAX_LENGTH, examples))


def batch_of(rows: TrainingRows, index) -> Batch:
    return TrainingBatches(rows, 1, seed=0).collate(np.asarray(index))


class Loader:
    """These batches, in this order."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return (dict(batch) for batch in self.batches)


class Gradients(L.Callback):
    """Keeps the gradients of every optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        grads = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.steps.append(grads)


def train(model: SequentialRecommender, batches: list[Batch], *callbacks: L.Callback, **trainer) -> L.Trainer:
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    } | trainer
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    made = L.Trainer(callbacks=list(callbacks), use_distributed_sampler=False, **settings, **quiet)
    made.fit(model, Loader(batches))
    return made


# ---- one loss --------------------------------------------------------------------------------------------------------


def test_one_causal_pass_equals_all_prefixes(make, data):
    losses, gradients = [], []
    for examples in ("sequence", "prefixes"):
        rows = rows_of(data, examples)
        model = make(rows).eval()
        if isinstance(model.backbone, SASRec):  # it counts positions from a row's right end, where a prefix stands elsewhere
            model.backbone.positions.requires_grad_(False).zero_()
        batch = batch_of(rows, range(len(rows)))
        loss = model.task_loss(model(batch), batch)
        loss.backward()
        losses.append(loss)
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert rows.targets > 2 * len(data.users)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    for key, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][key], rtol=1e-4, atol=1e-6, msg=key)


def test_the_task_is_the_mean_cross_entropy_of_every_target(make, data):
    for examples in ("last", "prefixes", "sequence"):
        rows = rows_of(data, examples)
        model = make(rows).eval()
        batch = batch_of(rows, range(len(rows)))
        every = model.backbone(batch["items"], batch["mask"], every_position=True)[-1]
        target = batch["target"] if examples == "sequence" else F.pad(batch["target"][:, None], (every.shape[1] - 1, 0))
        scores = model.backbone.head(every) @ model.item_table()[1:].T  # [B, L, n]
        plain = F.cross_entropy(scores.flatten(0, 1), target.flatten() - 1, ignore_index=-1)
        torch.testing.assert_close(model.task_loss(model(batch), batch), plain, rtol=1e-5, atol=1e-6)


def test_padding_has_no_influence_on_the_loss(make, data):
    for examples in ("last", "sequence"):
        rows = rows_of(data, examples)
        model = make(rows)
        DeepSupervision(blocks=2).setup(None, model, "fit")
        recorded = Recorded(rows.targets)
        FeatureDistillation(recorded).setup(None, model, "fit")
        model.log_dict = lambda values: None
        short = [r for r in range(len(rows)) if rows.lengths[r] <= 5]
        batch = batch_of(rows, short)
        width = MAX_LENGTH - batch["items"].shape[1]
        assert width > 0
        padded = dict(batch)
        for key in ("items", "mask", "target"):
            if padded[key].dim() == 2:
                padded[key] = F.pad(padded[key], (width, 0))
        losses = [model.training_step(b | {"block_states": recorded.read(b)}, 0) for b in (batch, padded)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("examples", ["last", "prefixes", "sequence"])
def test_micro_batches_add_up_to_one_batch(make, data, examples):
    rows = rows_of(data, examples)
    index = np.random.default_rng(0).permutation(len(rows))[:16]
    lengths = {len(batch_of(rows, index[i : i + 4])["target_row"]) for i in range(0, 16, 4)}
    assert examples != "sequence" or len(lengths) > 1, "the micro-batches have equally many targets: nothing is shown"
    gradients = []
    for size in (16, 4):
        kept = Gradients()
        terms = [FeatureDistillation(Recorded(rows.targets)), DeepSupervision(blocks=2)]
        batches = [batch_of(rows, index[i : i + size]) for i in range(0, 16, size)]
        train(make(rows), batches, *terms, kept, accumulate_grad_batches=16 // size)
        assert len(kept.steps) == 1
        gradients.append(kept.steps[0])
    assert any(key.startswith("distillation.feature") for key in gradients[0])
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_a_share_of_the_targets_estimates_the_same_loss(make, data):
    rows = rows_of(data, "sequence")
    model = make(rows).eval()
    batch = batch_of(rows, range(len(rows)))
    user = model(batch).user
    whole = model.next_item_loss(user, batch)
    parts = torch.randperm(rows.targets).split(rows.targets // 4)  # a partition: the estimates average to the loss
    estimates = torch.stack([model.next_item_loss(user[drawn], batch, drawn) for drawn in parts])
    size = torch.tensor([len(drawn) for drawn in parts], dtype=torch.float)
    torch.testing.assert_close((estimates * size).sum() / size.sum(), whole, rtol=1e-5, atol=1e-6)
    assert estimates.std() > 0


@pytest.mark.parametrize("settings", [{}, {"weights": {"position": 1.0, "discrepancy": 1.0}, "combine": "product"}])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_students_softmax_serves_a_list_of_the_teacher_as_one_of_the_lists_own_would(data, share, settings):
    rows = rows_of(data, "sequence")
    torch.manual_seed(0)
    model = SequentialRecommender(sasrec(), targets_per_row=rows.targets / len(rows)).double()
    batch = batch_of(rows, range(len(rows)))
    lists = torch.rand(rows.targets, N_ITEMS).argsort(1)[:, :6] + 1
    lists[::5, 3:] = 0
    lists[1] = 0
    batch |= {"teacher_items": lists, "teacher_scores": -torch.rand(rows.targets, 6).cumsum(1)}
    callback = RankingDistillation(SimpleNamespace(k=6), None, loss="softmax", over="catalogue", share=share, **settings)
    model.distillation["ranking"] = callback.build(model)
    model.weights["ranking"] = 0.7
    seen = []
    for softmax in (True, False):
        torch.manual_seed(1)
        loss, parts = model.losses(replace(model(batch), softmax=softmax), batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        seen.append([loss.detach(), *(parts[name].detach() for name in ("task", "ranking")), *gradients])
        assert (model.terms["ranking"].counts_more is None) != softmax
    assert seen[0][2] > 1
    for shared, own in zip(*seen, strict=True):
        torch.testing.assert_close(shared, own)


def test_scores_and_encodings_are_those_of_training(make, data):
    rows = rows_of(data, "last")
    model = make(rows).eval()
    batch = batch_of(rows, range(8))
    user = model.encode(batch["items"], batch["mask"])
    torch.testing.assert_close(user, model(batch).user)
    some = torch.randint(1, N_ITEMS + 1, (8, 5))
    torch.testing.assert_close(model.score(user, some), (user @ model.item_table().T).gather(1, some))


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_validates_on_the_validation_items_by_their_rank(make, data):
    module = SequenceDataModule(data, SequenceConfig(MAX_LENGTH, "sequence"), 8, True, seed=0)
    model = make(module.rows)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, **quiet)
    trainer.fit(model, datamodule=module)
    model.eval()
    ranks = []
    for user in range(data.n_users):
        history = data.items[data.offsets[user] : data.offsets[user + 1] - 2]
        target = int(data.items[data.offsets[user + 1] - 2])
        read = torch.from_numpy(history[-MAX_LENGTH:].astype(np.int64))[None]
        with torch.no_grad():
            scores = (model.encode(read, read > 0) @ model.item_table().T)[0]
        others = [i for i in range(1, N_ITEMS + 1) if i != target and i not in history]
        ranks.append(float((scores[others] > scores[target]).sum()))
    expected = ranking_metrics(torch.tensor(ranks), (5, 10, 20))
    for name, value in expected.items():
        assert trainer.callback_metrics[f"val/{name}"].item() == pytest.approx(value, abs=1e-6), name


def rates(**settings) -> list[float]:
    """The learning rate of each optimiser step of 3 epochs with 4 batches."""

    class Rates(L.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.seen.append(optimizer.param_groups[0]["lr"])

    accumulate = settings.pop("accumulate", 1)
    rows = rows_of(dataset([[1, 2, 3, 4, 5]]), "last")
    torch.manual_seed(0)
    kept = Rates()
    model = SequentialRecommender(SASRec(5, MAX_LENGTH, dim=4, layers=1), OptimizerConfig(lr=0.5, **settings))
    train(model, [batch_of(rows, [0])] * 4, kept, max_epochs=3, accumulate_grad_batches=accumulate)
    return kept.seen


def test_learning_rate_schedules():
    assert rates() == [0.5] * 12
    assert rates(warmup_steps=4) == [0.125, 0.25, 0.375, 0.5] + [0.5] * 8
    cosine = [0.25 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert rates(schedule="cosine") == pytest.approx(cosine)
    assert cosine[6] == pytest.approx(0.25)
    assert rates(schedule="linear") == pytest.approx([0.5 * (1 - step / 12) for step in range(12)])
    late = [0.25 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates(schedule="cosine", warmup_steps=2, accumulate=2) == pytest.approx([0.25, 0.5, *late]), "in steps, not batches"


def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_step(make, data):
    class Diverge(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 2:
                next(pl_module.backbone.parameters()).data.fill_(math.nan)

    rows = rows_of(data, "last")
    with pytest.raises(UserError, match=r"not finite at step 2 \(task nan\).*optimizer\.lr"):
        train(make(rows), [batch_of(rows, [r]) for r in range(4)], Diverge())


# ---- terms and checkpoints -------------------------------------------------------------------------------------------


def test_a_term_without_weight_changes_nothing(make, data):
    rows = rows_of(data, "sequence")
    batches = [batch_of(rows, range(i, i + 4)) for i in range(0, 16, 4)]
    plain, attached = make(rows, dropout=0.2), make(rows, dropout=0.2)
    train(plain, batches, SeedEachStep(0))
    assert not [key for key in plain.state_dict() if "distillation" in key]
    terms = [FeatureDistillation(Recorded(rows.targets), weight=0.0), DeepSupervision(blocks=2, weight=0.0)]
    train(attached, batches, SeedEachStep(0), *terms)
    assert_equal_weights(attached.backbone.state_dict(), plain.backbone.state_dict())


class Losses(L.Callback):
    """Keeps every step's loss and what was logged of it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        logged = {key: value.item() for key, value in trainer.callback_metrics.items()}
        factor = len(batch["target_row"]) / pl_module._typical_targets(batch)  # logged: means over the batch's own targets
        self.steps.append(logged | {"total": outputs["loss"].item(), "factor": factor})


def test_weights_multiply_their_terms(make, data):
    rows = rows_of(data, "sequence")
    kept = Losses()
    terms = [FeatureDistillation(Recorded(rows.targets), weight=0.25), DeepSupervision(blocks=2, weight=3.0)]
    train(make(rows), [batch_of(rows, range(6)), batch_of(rows, range(6, 8))], *terms, kept)
    assert kept.steps[0]["factor"] != kept.steps[1]["factor"]
    for step in kept.steps:
        total = step["loss/task"] + 0.25 * step["loss/feature"] + 3.0 * step["loss/deep_supervision"]
        assert step["loss"] == pytest.approx(total, rel=1e-5)
        assert step["total"] == pytest.approx(total * step["factor"], rel=1e-5)


def test_a_weight_can_fall_to_zero_over_some_epochs(data):
    rows = rows_of(data, "sequence")
    torch.manual_seed(0)
    model, kept = SequentialRecommender(sasrec(), targets_per_row=rows.targets / len(rows)), Losses()
    terms = [FeatureDistillation(Recorded(rows.targets), weight=6.0, decay_epochs=3), DeepSupervision(blocks=2)]
    train(model, [batch_of(rows, range(6))] * 2, *terms, kept, max_epochs=5)
    left = [(s["loss"] - s["loss/task"] - s["loss/deep_supervision"]) / s["loss/feature"] for s in kept.steps]
    assert left == pytest.approx([6, 6, 4, 4, 2, 2, 0, 0, 0, 0], abs=1e-4)


def test_a_checkpoint_with_terms_loads_without_them_and_goes_on_with_them(make, data, tmp_path):
    rows = rows_of(data, "sequence")
    batches = [batch_of(rows, range(i, i + 4)) for i in range(0, 12, 4)]

    def terms() -> list[L.Callback]:
        return [FeatureDistillation(Recorded(rows.targets)), DeepSupervision(blocks=2)]

    student = make(rows)
    save(train(student, batches, *terms()), tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not [key for key in checkpoint["state_dict"] if key.startswith("distillation")]
    assert {key.split(".")[1] for key in checkpoint["distillation"]} == {"feature", "deep_supervision"}

    served = make(rows)
    load_weights(served, tmp_path / "last.ckpt")
    assert_equal_weights(served.state_dict(), student.backbone.state_dict(prefix="backbone."))

    whole, resumed = make(rows), make(rows)
    train(whole, batches, *terms(), max_epochs=2)
    again = train(resumed, batches, *terms(), max_epochs=0)
    again.fit_loop.max_epochs = 2
    again.fit(resumed, Loader(batches), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert_equal_weights(resumed.state_dict(), whole.state_dict())


def test_what_is_frozen_stays_out_of_the_checkpoint(data, tmp_path):
    rows = rows_of(data, "sequence")
    base = BASE | {"lora": {"rank": 2, "targets": ["up_proj"]}}

    def build() -> SequentialRecommender:
        torch.manual_seed(0)
        table = torch.randn(N_ITEMS + 1, 12)
        return SequentialRecommender(LLMDecoder(table, MAX_LENGTH, base, layers=2), OptimizerConfig(lr=0.1))

    student = build()
    save(train(student, [batch_of(rows, range(8))]), tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert set(saved) == trained
    assert {name.rpartition("lora_")[1] for name in trained} == {"lora_", ""}
    loaded = build()
    load_weights(loaded, tmp_path / "last.ckpt")
    assert_equal_weights(loaded.state_dict(), student.state_dict())


def test_what_is_frozen_stays_out_of_the_checkpoint_under_all_of_its_names(data):
    """As the head of a language model does whose weights are those of its token table."""
    backbone = SASRec(N_ITEMS, MAX_LENGTH, dim=8, layers=1)
    backbone.tokens, backbone.says = (torch.nn.Linear(8, 3, bias=False).requires_grad_(False) for _ in range(2))
    backbone.says.weight = backbone.tokens.weight
    student = SequentialRecommender(backbone)
    checkpoint = {"state_dict": student.state_dict()}
    student.on_save_checkpoint(checkpoint)
    assert not {name for name in checkpoint["state_dict"] if "tokens" in name or "says" in name}
    student.on_load_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == set(student.state_dict())


def test_no_gradient_ever_reaches_the_teacher(make, data):
    rows = rows_of(data, "sequence")
    torch.manual_seed(1)
    teacher = SequentialRecommender(SASRec(N_ITEMS, MAX_LENGTH, dim=8, layers=2, dropout=0.5))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    source = OnlineTeacher(teacher, [1, 2])
    student = make(rows)
    trainer = train(student, [batch_of(rows, range(8))] * 2, FeatureDistillation(source))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert_equal_weights(teacher.state_dict(), before)
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not trained & {id(p) for p in teacher.parameters()}
    assert not teacher.training, "its dropout is off"


def test_evaluation_does_not_depend_on_the_batch_size(make, data):
    rows = EvaluationRows(data, "test", MAX_LENGTH)
    model = make(rows_of(data, "last")).eval()
    results = []
    for size in (1, 5, 100):
        ranks = torch.empty(len(rows))
        for batch in EvaluationBatches(rows, size):
            ranks[batch["row"]] = model.ranks(batch)
        results.append(ranks)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", ["sampled_softmax", "bce", "gbce", "bpr"])
@pytest.mark.parametrize("backbone", [SASRec, GRU4Rec])
def test_sparse_gradients_are_the_dense_ones(data, backbone, kind):
    rows = rows_of(data, "sequence")
    batch = batch_of(rows, range(4))
    popularity = torch.ones(N_ITEMS + 1)
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = backbone(N_ITEMS, MAX_LENGTH, dim=8, dropout=0.0, init_std=0.3, sparse=sparse)
        unmet = UnmetDraw.of(UnmetItems(data.training_pairs, data.users, N_ITEMS))
        student = SequentialRecommender(model, None, LossConfig(kind, negatives=3), 1.0, popularity, unmet)
        student.task_loss(student(batch), batch).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    dense, sparse = gradients
    assert sparse["items.weight"].is_sparse
    assert not sparse["items.weight"].to_dense()[0].any(), "padding"
    for name, gradient in sparse.items():
        torch.testing.assert_close(gradient.to_dense() if gradient.is_sparse else gradient, dense[name])
