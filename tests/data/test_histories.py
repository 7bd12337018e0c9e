"""Training histories by user: the latest items, and never one that is held out."""

import numpy as np
import torch
from tiny import dataset

from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.data.histories import Histories
from lit_llmers.data.loader import TrainingBatches
from lit_llmers.data.sequences import TrainingRows


def test_the_latest_training_items_and_never_a_held_out_one():
    data = dataset([[1, 2, 3, 4, 5], [6, 7, 8], [2, 9]])  # the last two of each are held out
    histories = Histories(data, 2)
    items, mask = histories.latest(torch.tensor([1, 0, 2, 0]))
    assert items.tolist() == [[0, 6], [2, 3], [0, 0], [2, 3]]
    assert torch.equal(mask, items > 0)
    assert histories.latest(torch.tensor([0]), 5)[0].tolist() == [[1, 2, 3]]
    assert histories.latest(torch.tensor([2]))[0].tolist() == [[0]], "a user without training items has one column of padding"


def test_inputs_end_before_the_last_training_item_as_the_training_rows_do():
    data = dataset([[1, 2, 3, 4, 5, 6], [6, 7, 8], [2, 9], [9, 8, 7, 6]])
    histories = Histories(data, 2)
    items, mask = histories.inputs(torch.tensor([1, 0, 2, 3]))
    assert items.tolist() == [[0, 0], [2, 3], [0, 0], [0, 9]]
    assert torch.equal(mask, items > 0)
    rows = TrainingRows(data, SequenceConfig(max_length=5))
    batch = TrainingBatches(rows, len(rows), 0).collate(np.arange(len(rows)))
    assert batch["user"].tolist() == [0, 3]
    assert torch.equal(histories.inputs(batch["user"], 5)[0], batch["items"])
    assert histories.inputs(torch.tensor([2]))[0].tolist() == [[0]]


def test_what_a_user_has_met_is_uncut_and_in_order():
    seen = Histories(dataset([[1, 2, 3, 4, 5], [6, 7, 8], [2, 9]]), 2).seen(torch.tensor([1, 0, 2, 0]))
    assert seen["seen_row"].tolist() == [0, 1, 1, 1, 3, 3, 3]
    assert seen["seen_item"].tolist() == [6, 1, 2, 3, 1, 2, 3]
