"""Training histories by user: the latest items, and never one that is held out."""

import torch
from tiny import dataset

from lit_llmers.data.histories import Histories


def test_the_latest_training_items_and_never_a_held_out_one():
    data = dataset([[1, 2, 3, 4, 5], [6, 7, 8], [2, 9]])  # the last two of each are held out
    histories = Histories(data, 2)
    items, mask = histories.latest(torch.tensor([1, 0, 2, 0]))
    assert items.tolist() == [[0, 6], [2, 3], [0, 0], [2, 3]]
    assert torch.equal(mask, items > 0)
    assert histories.latest(torch.tensor([0]), 5)[0].tolist() == [[1, 2, 3]]
    assert histories.latest(torch.tensor([2]))[0].tolist() == [[0]], "a user without training items has one column of padding"
