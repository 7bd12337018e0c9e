"""Negatives of a user's targets are items that the user has not met in training, drawn uniformly."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny import random_dataset

from lit_llmers.backbones import Backbone
from lit_llmers.backbones.bert4rec import BERT4Rec
from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.conf.schema import LossConfig, SequenceConfig
from lit_llmers.data.loader import TrainingBatches
from lit_llmers.data.pairs import UnmetItems
from lit_llmers.data.sequences import TrainingRows
from lit_llmers.errors import UserError
from lit_llmers.losses.scores import list_scores
from lit_llmers.students import sequential
from lit_llmers.students.negatives import PopularityDraw, UnmetDraw, draw_uniform
from lit_llmers.students.sequential import SequentialRecommender


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("met", [[], [1, 20], list(range(5, 18)), [*range(1, 12), *range(13, 21)]])
def test_every_item_that_a_user_has_not_met_is_as_likely(met, searched):
    """Whether he has met none, few, most, or all but one; beside another user. Searched for as on an accelerator, too."""
    pairs = np.array([[0, item] for item in met + met[:1]] + [[1, item] for item in range(1, 20)])
    draw = UnmetDraw.of(UnmetItems(pairs, np.array(["a", "b"]), 20))
    draw.in_memory = None if searched else draw.in_memory
    torch.manual_seed(0)
    drawn = draw(torch.tensor([0, 1]).repeat(10_000), 4)  # [T, K]
    assert (drawn[1::2] == 20).all()
    left = sorted(set(range(1, 21)) - set(met))
    count = drawn[::2].flatten().bincount(minlength=21).numpy()
    assert count[left].sum() == 40_000
    assert chisquare(count[left]).pvalue > 1e-3 if len(left) > 1 else count[left[0]] == 40_000


def test_most_draws_on_a_cpu_are_not_searched_for_and_follow_the_seed(monkeypatch):
    data = random_dataset(users=30, n_items=40)
    unmet, searched = UnmetItems(data.training_pairs, data.users, 40), []
    draw, search = UnmetDraw.of(unmet), unmet._among_met
    monkeypatch.setattr(unmet, "_among_met", lambda keys: searched.append(len(keys)) or search(keys))
    user = torch.arange(30).repeat(20)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(draw(user, 50))
    assert sum(searched) < 0.5 * 3 * 30_000
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_item_is_drawn_in_proportion_to_its_popularity_in_any_precision(dtype):
    """Of a thousand items too, which a running sum of shares in bfloat16 could not tell apart."""
    torch.manual_seed(0)
    popularity = torch.arange(1001) % 5
    draw = PopularityDraw(popularity).to(dtype)
    share = (popularity[1:] + 1).numpy() / (popularity[1:] + 1).sum().item()
    count = draw(200_000).bincount(minlength=1001).numpy()
    assert not count[0]
    assert chisquare(count[1:], 200_000 * share).pvalue > 1e-3
    assert draw.log_q[1:].float().exp().numpy() == pytest.approx(share, rel=1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("kind", ["bce", "bpr"])
@pytest.mark.parametrize(("backbone", "examples"), [(SASRec, "sequence"), (SASRec, "prefixes"), (BERT4Rec, "sequence")])
def test_what_a_target_competes_with_its_user_has_not_met(monkeypatch, kind, backbone, examples):
    """Neither in the row nor before it, wherever in the row the target is and of whichever share of the targets it is."""
    data = random_dataset(users=30, n_items=40)
    rows = TrainingRows(data, SequenceConfig(5, examples))
    made: Backbone = backbone(40, 5, dim=8)
    unmet = UnmetDraw.of(UnmetItems(data.training_pairs, data.users, 40))
    student = SequentialRecommender(made, None, LossConfig(kind, negatives=20), unmet=unmet)
    batch = made.training_view(TrainingBatches(rows, 1, seed=0).collate(np.arange(len(rows))))
    scored: list[torch.Tensor] = []
    monkeypatch.setattr(sequential, "list_scores", lambda *of: scored.append(of[2]) or list_scores(*of))
    output = student(batch)
    student.task_loss(output, batch)
    some = torch.randperm(len(output.user))[:9]
    student.next_item_loss(output.user[some], batch, some)
    met = {tuple(pair) for pair in data.training_pairs.tolist()}
    who = batch["user"][batch["target"].reshape(len(rows), -1).nonzero()[:, 0]]
    for user, ids in zip((who, who[some]), scored, strict=True):
        target, negatives = ids[:, 0], ids[:, 1:]
        assert negatives.shape == (len(target), 20)
        assert set(zip(user.tolist(), target.tolist(), strict=True)) <= met
        assert not set(zip(user.repeat_interleave(20).tolist(), negatives.flatten().tolist(), strict=True)) & met


def test_a_catalogue_of_one_item_has_no_negative():
    with pytest.raises(UserError, match="one item"):
        draw_uniform(torch.tensor([1]), 3, 1)
    with pytest.raises(UserError, match=r"'u' has met all 1 items.*loss.kind=cross_entropy"):
        UnmetItems(np.array([[0, 1]]), np.array(["u"]), 1)
