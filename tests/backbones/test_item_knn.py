import numpy as np
import pytest
import torch

from lit_llmers.backbones import item_knn
from lit_llmers.backbones.item_knn import ItemKNN
from lit_llmers.errors import UserError


def random_pairs() -> np.ndarray:
    """Popular and rare items, repeated pairs, and an item (50) that nobody has."""
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(0, 60, 700), np.minimum(rng.geometric(0.08, 700), 49)], 1)


def similarities(pairs: np.ndarray, shrink: float) -> torch.Tensor:
    """`[51, 51]`, by the book."""
    users = {item: {int(user) for user, other in pairs if other == item} for item in range(51)}
    table = torch.zeros(51, 51)
    for i in range(51):
        for j in range(51):
            both = len(users[i] & users[j])
            if i != j and both:
                table[i, j] = both / (np.sqrt(len(users[i]) * len(users[j])) + shrink)
    return table


@pytest.mark.parametrize("entries", [1, 200, 10**6])  # item by item, some at a time, all at once
@pytest.mark.parametrize(("neighbours", "shrink"), [(5, 0.0), (5, 3.0), (60, 3.0)])
def test_neighbours_are_the_most_similar_items(monkeypatch, entries, neighbours, shrink):
    monkeypatch.setattr(item_knn, "_ENTRIES", entries)
    pairs = random_pairs()
    model = ItemKNN(50, 60, pairs, neighbours, shrink)
    expected = similarities(pairs, shrink)
    assert model.nearest.shape == model.weight.shape == (51, neighbours)
    for item in range(51):
        # highest first; of equal ones the smaller number
        order = sorted(range(51), key=lambda other: (-expected[item, other].item(), other))
        best = [other for other in order if expected[item, other] > 0][:neighbours]
        assert model.nearest[item, : len(best)].tolist() == best
        torch.testing.assert_close(model.weight[item, : len(best)], expected[item, best])
        assert not model.weight[item, len(best) :].any()
        assert not model.nearest[item, len(best) :].any()


def test_scores_add_up_over_the_history():
    pairs = random_pairs()
    model = ItemKNN(50, 60, pairs, neighbours=5, shrink=1.0)
    kept = torch.zeros(51, 51).scatter(1, model.nearest.long(), model.weight)
    kept[:, 0] = 0
    items = torch.tensor([[0, 0, 3], [1, 7, 7], [0, 0, 0]])
    scores = model.scores(items, items > 0)
    torch.testing.assert_close(scores, torch.stack([kept[3], kept[1] + 2 * kept[7], torch.zeros(51)]))
    wider = torch.nn.functional.pad(items, (4, 0))
    torch.testing.assert_close(model.scores(wider, wider > 0), scores)


def test_it_is_a_state_dict_and_nothing_is_trained():
    source = ItemKNN(50, 60, random_pairs(), neighbours=5)
    copy = ItemKNN(50, 60, random_pairs()[:10], neighbours=5)
    copy.load_state_dict(source.state_dict())
    items = torch.randint(1, 51, (4, 6))
    assert torch.equal(copy.scores(items, items > 0), source.scores(items, items > 0))
    assert not list(source.parameters())


@pytest.mark.parametrize("arguments", [{"neighbours": 0}, {"shrink": -1.0}])
def test_wrong_arguments_are_named(arguments):
    with pytest.raises(UserError, match="item_knn: neighbours is"):
        ItemKNN(50, 60, random_pairs(), **arguments)
