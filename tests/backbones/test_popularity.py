import numpy as np
import torch

from lit_llmers.backbones.popularity import Popularity


def test_every_interaction_counts_for_every_user():
    model = Popularity(4, np.array([[0, 2], [0, 2], [1, 2], [1, 4], [2, 1]]))
    items = torch.tensor([[0, 3], [1, 2]])
    assert model.scores(items, items > 0).tolist() == [[0, 1, 3, 0, 1]] * 2
    assert not list(model.parameters())
