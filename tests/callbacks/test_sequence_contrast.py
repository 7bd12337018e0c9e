"""CL4SRec's contrast: what the three augmentations do to a history, and the loss by plain loops."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import by_name, dataset, losses, small
from torch import Tensor, nn

from lit_llmers.backbones.bert4rec import BERT4Rec
from lit_llmers.backbones.caser import Caser
from lit_llmers.backbones.gru4rec import GRU4Rec
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.callbacks.sequence_contrast import CROP, HIDE, REORDER, SequenceContrast, augment
from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.data.loader import SequenceDataModule
from lit_llmers.errors import UserError
from lit_llmers.running import run
from lit_llmers.students.output import StudentOutput
from lit_llmers.students.sequential import SequentialRecommender

OUTPUT = StudentOutput(torch.zeros(0, 1), torch.zeros(0, 1))


def histories(rows: int = 600, longest: int = 11) -> Tensor:
    """Left-padded rows of 1 to `longest` items; item number = its place in the row plus 100 times the row's number."""
    lengths = torch.arange(rows) % longest + 1
    place = torch.arange(longest) - longest + lengths[:, None]
    return torch.where(place >= 0, place + 1 + 100 * torch.arange(1, rows + 1)[:, None], 0)


def only(way: int, items: Tensor, crop: float = 0.6, hide: float = 0.3, reorder: float = 0.6) -> list[list[int]]:
    """Augment all rows in one way."""
    torch.manual_seed(0)
    changed, mask = augment(items, items > 0, torch.full((len(items),), way), crop, hide, reorder)
    assert changed.shape == mask.shape == items.shape
    assert (mask.int().diff(dim=1) >= 0).all(), "padding stays to the left"
    assert not changed[~mask].any()
    return [row[own].tolist() for row, own in zip(changed, mask, strict=True)]


def test_crop_keeps_a_span():
    items = histories()
    seen = set()
    for row, kept in zip(items, only(CROP, items), strict=True):
        whole = row[row > 0].tolist()
        assert len(kept) == max(1, int(0.6 * len(whole)))
        start = whole.index(kept[0])
        assert kept == whole[start : start + len(kept)]
        seen.add((len(whole), start))
    assert {start for length, start in seen if length == 11} == set(range(11 - 6 + 1)), "any span"


def test_mask_hides_items_in_place():
    items = histories()
    hidden_places = set()
    for row, kept in zip(items, only(HIDE, items), strict=True):
        whole = row[row > 0].tolist()
        assert [new for new in kept if new] == [old for old, new in zip(whole, kept, strict=True) if new]
        assert kept.count(0) == (max(1, int(0.3 * len(whole))) if len(whole) > 1 else 0)
        hidden_places |= {place for place, new in enumerate(kept) if not new}
    assert hidden_places == set(range(11))


def test_reorder_shuffles_a_span():
    items = histories()
    starts, moved, pairs = set(), 0, 0
    for row, kept in zip(items, only(REORDER, items), strict=True):
        whole = row[row > 0].tolist()
        assert sorted(kept) == whole
        places = [place for place, (old, new) in enumerate(zip(whole, kept, strict=True)) if old != new]
        if places:
            assert places[-1] - places[0] < max(2, int(0.6 * len(whole)))
            starts.add(places[0])
        moved += len(whole) == 11 and bool(places)
        pairs += len(whole) == 2 and bool(places)
    assert moved > 50, "of 54 with six items to shuffle"
    assert 15 < pairs < 40, "of 55 with two"
    assert starts >= set(range(5))


def test_the_ends_of_the_shares():
    items = histories(22)
    whole = [row[row > 0].tolist() for row in items]
    assert only(CROP, items, crop=1.0) == whole
    assert all(len(row) == 1 for row in only(CROP, items, crop=0.0))
    assert {row.count(0) for row in only(HIDE, items, hide=0.0)[1:11]} == {1}, "something is hidden in any case"
    assert not any(map(any, only(HIDE, items, hide=1.0)[1:11]))
    assert only(HIDE, items, hide=1.0)[0] == only(REORDER, items)[0] == whole[0], "one item alone stays as it is"


def student_of(backbone: nn.Module) -> SequentialRecommender:
    return SequentialRecommender(backbone)  # type: ignore[arg-type]


def batch_of(histories: Tensor) -> dict[str, Tensor]:
    """The last item is the target."""
    items, target = histories[:, :-1], histories[:, -1]
    return {"items": items, "mask": items > 0, "target": target}


def views_of(batch: dict[str, Tensor], max_length: int, **shares: float) -> tuple[Tensor, Tensor]:
    """The two views `[B, L]` of each row; -1 is a hidden item."""
    seen: list[Tensor] = []

    def encode(items: Tensor, mask: Tensor) -> Tensor:
        seen.append(items.masked_fill(mask & (items == 0), -1))
        return torch.zeros(len(items), 2)

    student = SimpleNamespace(backbone=SimpleNamespace(causal=True), encode=encode, reduce=lambda losses, batch: losses.sum())
    SequenceContrast(max_length, **shares).build(student)(OUTPUT, batch)
    (views,) = seen
    return views[: len(views) // 2], views[len(views) // 2 :]


def test_the_two_views_of_a_row_are_never_the_same():
    torch.manual_seed(0)
    items = histories(3300)
    items = items[(items > 0).sum(1) > 1]
    first, second = views_of(batch_of(items), 11)
    assert first.shape == second.shape == items.shape
    assert (first != second).any(1).all()


def test_each_way_has_a_third_of_the_views_and_each_pair_of_ways_a_third_of_the_rows():
    torch.manual_seed(0)
    items = histories(6600)[10::11]  # all of eleven items
    views = torch.stack(views_of(batch_of(items), 11))  # [2, R, 11]
    cropped, hidden = ((views == unread).any(2) for unread in (0, -1))
    way = torch.where(cropped, CROP, torch.where(hidden, HIDE, REORDER))  # [2, R]
    assert (way[0] != way[1]).all()
    for view in way:
        assert (view.bincount(minlength=3) / len(items) - 1 / 3).abs().max() < 0.07
    assert (way.sum(0).bincount(minlength=4)[1:] / len(items) - 1 / 3).abs().max() < 0.07


@pytest.mark.parametrize(
    "off", [("crop",), ("hide",), ("reorder",), ("crop", "hide"), ("crop", "reorder"), ("hide", "reorder")]
)
def test_a_share_of_0_switches_a_way_off(off):
    """Two ways left are each in every row, and one makes both views, which differ by chance."""
    torch.manual_seed(0)
    items = histories(660)[10::11]
    views = torch.stack(views_of(batch_of(items), 11, **dict.fromkeys(off, 0.0)))
    cropped, hidden = ((views == unread).any(2) for unread in (0, -1))
    made = {"crop": cropped, "hide": hidden, "reorder": ~cropped & ~hidden}
    for name, of_views in made.items():
        assert (of_views.sum(0) == (0 if name in off else len(off))).all()
    assert (views[0] != views[1]).any()


@pytest.mark.parametrize("examples", ["sequence", "prefixes", "last"])
def test_views_are_of_the_row_with_its_last_training_target_and_of_no_held_out_item(examples):
    n = 9
    held_out = [[10 * user + n, 10 * user + n + 1] for user in range(8)]
    data = dataset([[10 * user + place for place in range(1, n)] + held_out[user] for user in range(8)])
    config = SequenceConfig(max_length=5, examples=examples)
    loader = SequenceDataModule(data, config, batch_size=4, mask_history=True, seed=0).train_dataloader()
    seen: set[int] = set()
    for epoch in range(30):
        loader.set_epoch(epoch)
        for batch in loader:
            first, second = views_of(batch, 5)
            assert first.shape[1] <= 5
            assert (first != second).any(1).all()
            seen |= set(torch.cat([first, second]).flatten().tolist()) - {0, -1}
    assert not seen & {item for items in held_out for item in items}
    assert seen >= {10 * user + n - 1 for user in range(8)}, "the last training target"


def test_value_by_plain_loops(monkeypatch):
    torch.manual_seed(0)
    student = student_of(SASRec(20, 6, dim=8, dropout=0.0, init_std=0.3).double())
    items = torch.randint(1, 21, (4, 7))
    items[1, :4] = 0
    shapes = []

    def encode(items: Tensor, mask: Tensor) -> Tensor:
        shapes.append(tuple(items.shape))
        views.append(SequentialRecommender.encode(student, items, mask))
        return views[-1]

    views: list[Tensor] = []
    monkeypatch.setattr(student, "encode", encode)
    loss = SequenceContrast(6, temperature=2.0).build(student)(OUTPUT, batch_of(items))
    assert shapes == [(8, 6)], "both views of all rows at once, of six items as the student can read"
    dots = (views[0] @ views[0].T / 2.0).tolist()
    expected = 0.0
    for row in range(8):
        other = (row + 4) % 8
        negatives = [math.exp(dots[row][j]) for j in range(8) if j not in (row, other)]
        assert len(negatives) == 2 * (4 - 1)
        expected -= math.log(math.exp(dots[row][other]) / (math.exp(dots[row][other]) + sum(negatives))) / 8
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("targets", [1, 3])
def test_a_row_weighs_as_much_as_one_target(targets):
    """The sum over rows is divided by what the sum over targets is: targets of a typical row, times rows."""
    torch.manual_seed(0)
    student = SequentialRecommender(SASRec(20, 6, dim=8, dropout=0.0, init_std=0.3), targets_per_row=2.5)
    items = torch.randint(1, 21, (4, 6))
    target = torch.randint(1, 21, (4, 6))
    target[:, :-targets] = 0  # rows of one target, or three, in a data set where two and a half are usual
    term = SequenceContrast(6).build(student)
    torch.manual_seed(1)
    of_one_each = term(OUTPUT, {"items": items, "mask": items > 0, "target": target[:, -1]})
    torch.manual_seed(1)
    of_many = term(OUTPUT, {"items": items, "mask": items > 0, "target": target})
    assert of_many.item() == pytest.approx(of_one_each.item() / 2.5)


@pytest.mark.parametrize("make", [SASRec, GRU4Rec, Caser])
def test_it_learns_to_tell_histories_apart(make):
    torch.manual_seed(0)
    student = student_of(make(200, 12, dim=16, dropout=0.0, init_std=0.1))
    term = SequenceContrast(12).build(student)
    batch = batch_of(torch.arange(1, 193).view(16, 12))
    adam = torch.optim.Adam(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        adam.zero_grad()
        loss = term(OUTPUT, batch)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[0] > 1.0
    assert sum(losses[-10:]) / 10 < 0.25 * losses[0]
    assert not student.backbone.items.weight[0].any(), "hidden items and padding are not trained"


def test_a_single_row_has_nothing_to_tell_apart():
    term = SequenceContrast(6).build(student_of(SASRec(20, 6, dim=8, dropout=0.0)))
    assert term(OUTPUT, batch_of(torch.tensor([[1, 2, 3]]))).item() == 0


def test_it_adds_no_parameters():
    student = student_of(SASRec(20, 6, dim=8))
    assert not list(SequenceContrast(6).build(student).parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": 1.5}, "crop is 1.5"),
        ({"hide": -0.1}, "hide is -0.1"),
        ({"reorder": 2.0}, "reorder is 2.0"),
        ({"crop": 0, "hide": 0.0, "reorder": 0}, "crop, hide and reorder are 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"decay_epochs": -1}, "decay_epochs is -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        SequenceContrast(6, **arguments)


def test_a_student_that_hides_items_itself_is_refused():
    with pytest.raises(UserError, match="BERT4Rec.*causal"):
        SequenceContrast(6).build(student_of(BERT4Rec(20, 6, dim=8)))


def test_cl4srec_from_yaml_learns_both_and_serves_as_sasrec(tmp_path):
    """The contrast belongs to the model, so it is no callback that a control would go without."""
    planned = small(
        tmp_path,
        "student=cl4srec",
        "student.optimizer.lr=0.01",
        "student.objective=[{sequence_contrast: {temperature: 8.0, weight: 2.0}}]",
        "+stages.student.trainer.batch_size=16",
        "sequences.targets_per_user=null",  # a row of each user
        recipe="student",
    )
    student = by_name(planned)["student"]
    assert student.config.fit == "sasrec"
    assert not student.config.callbacks
    run(planned, "student")
    total, task, term = (np.array(losses(student, f"loss{part}")) for part in ("", "/task", "/sequence_contrast"))
    np.testing.assert_allclose(total, task + 2 * term, rtol=1e-5)
    assert term[-5:].mean() < 0.8 * term[:5].mean()
    weights = torch.load(student.folder / "best.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[1] for name in weights} == {"items", "positions", "blocks", "norm"}
