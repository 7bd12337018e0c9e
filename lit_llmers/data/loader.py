"""Batches cut straight from the flat interaction array, and the LightningDataModule that serves them.

No worker processes and no per-sample Python: a batch is a handful of numpy index operations (measured: a worker pool or
per-sample lists cost 5-9 ms a step, this costs well under one).

Several processes share every batch: process r of w takes rows r, r + w, r + 2 w and so on, which are of like lengths. What it
gets then has two keys more, both plain numbers: `rows`, of the whole batch, and `weight`, `own rows x w / rows`. A mean over a
process's rows, times its weight and averaged over the processes, is the mean over the whole batch. Where a batch has fewer rows
than there are processes, some get a row of another with weight 0, in which nothing counts: so all take equally many steps.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch

from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.sequences import EvaluationRows, TrainingRows

Batch = dict[str, Any]  # tensors, and with several processes the numbers `rows` and `weight`
_POOL = 16  # batches whose rows are sorted by length together


def windows(items: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Left-padded slices `items[start:stop]`, as wide as the longest, of one column at least: `[B, L]` int64."""
    width = max(1, int((stop - start).max()))
    column = np.arange(-width, 0)
    index = stop[:, None] + column
    return np.where(index >= start[:, None], items[np.maximum(index, 0)], 0).astype(np.int64)


def seen_before(dataset: Dataset, user: np.ndarray, at: np.ndarray, target: np.ndarray | None = None) -> Batch:
    """What the users `[B]` had met before the interactions `at` `[B]`: `seen_row` and `seen_item`, pairs in order of the rows.

    Args:
        target: `[B]` items that compete although they were met: a repeated target does.
    """
    first = dataset.offsets[user]
    count = at - first
    row = np.repeat(np.arange(len(user)), count)
    item = dataset.items[np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)].astype(np.int64)
    if target is not None:
        other = item != target[row]
        row, item = row[other], item[other]
    return {"seen_row": torch.from_numpy(row), "seen_item": torch.from_numpy(item)}


def _length_batches(lengths: np.ndarray, batch_size: int, order: np.ndarray) -> list[np.ndarray]:
    """Cut `order` into batches of rows of like length: rows are sorted inside pools of `_POOL` batches."""
    pools = [order[i : i + _POOL * batch_size] for i in range(0, len(order), _POOL * batch_size)]
    ordered = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
    return [pool[i : i + batch_size] for pool in ordered for i in range(0, len(pool), batch_size)]


def cut(index: np.ndarray, rank: int, world: int) -> tuple[np.ndarray, Batch]:
    """The rows that a process reads of a batch's `[B]`, and what its batch says of that: `rows` and `weight`."""
    own = index[rank::world]
    about = {"rows": len(index), "weight": len(own) * world / len(index)}
    return (own if len(own) else index[:1]), about


def own_part(collate: Callable[[np.ndarray], Batch], index: np.ndarray, rank: int, world: int) -> Batch:
    """What a process gets of the batch of the rows `[B]`."""
    if world == 1:
        return collate(index)
    part, about = cut(index, rank, world)
    return collate(part) | about


class TrainingBatches:
    """Shuffled training batches; an iterable that remembers where it is.

    The order is a function of (seed, epoch) alone, so `(epoch, batch)` is the whole state: a run resumed in mid-epoch goes
    on with the very next batch. Rows of like length share a batch, so that little is spent on padding.

    Lightning restores `state_dict` when it resumes inside an epoch, and calls `sampler.set_epoch` before every epoch; both
    are needed, for it does not restore the state when it resumes between two epochs.

    Args:
        batch_size: rows of a batch, over all processes.
        rank, world: which process this is, of how many.
    """

    def __init__(self, rows: TrainingRows, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.rows, self.batch_size, self.seed, self.rank, self.world = rows, batch_size, seed, rank, world
        self.epoch, self.position = 0, 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless it is the one at hand."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self.load_state_dict(self.state_dict())
        batches = self._order(self.epoch)
        while self.position < len(self):
            batch = self.own(batches[self.position])
            self.position += 1
            yield batch

    def _order(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng([self.seed, epoch])
        batches = _length_batches(self.rows.lengths, self.batch_size, random.permutation(len(self.rows)))
        return [batches[i] for i in random.permutation(len(batches))]

    def own(self, index: np.ndarray) -> Batch:
        """What this process gets of the batch of these training rows."""
        return own_part(self.collate, index, self.rank, self.world)

    def collate(self, index: np.ndarray) -> Batch:
        """The batch of these training rows."""
        rows = self.rows
        start, stop = rows.start[index], rows.stop[index]
        window = windows(rows.dataset.items, start, stop)  # [B, L+1], inputs and the target after them
        items = window[:, :-1]
        first, last = rows.target_offset[index], rows.target_offset[index + 1]
        if rows.every_position:
            count = last - first
            target = np.where(np.arange(-items.shape[1], 0) >= -count[:, None], window[:, 1:], 0)
            target_row = np.repeat(last - np.cumsum(count), count) + np.arange(count.sum())
        else:
            target, target_row = window[:, -1], first
        return {
            "row": torch.from_numpy(index),
            "user": torch.from_numpy(rows.user[index]),
            "items": torch.from_numpy(np.ascontiguousarray(items)),
            "mask": torch.from_numpy(items > 0),
            "target": torch.from_numpy(np.ascontiguousarray(target)),
            "target_row": torch.from_numpy(target_row),
        }

    def state_dict(self) -> dict[str, int]:
        if self.position == len(self):  # after the last batch of an epoch comes the first of the next
            return {"epoch": self.epoch + 1, "position": 0}
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class OrderedBatches:
    """The training rows once, in order of their number and unshuffled: what a teacher is asked about when it is recorded."""

    def __init__(self, rows: TrainingRows, batch_size: int, targets: range | None = None) -> None:
        self.source = TrainingBatches(rows, batch_size, seed=0)
        targets = range(rows.targets) if targets is None else targets
        first = int(np.searchsorted(rows.target_offset, targets.start, side="right")) - 1
        last = int(np.searchsorted(rows.target_offset, targets.stop, side="left"))
        index = np.arange(first, last)
        self.batches = _length_batches(rows.lengths, batch_size, index)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self.source.collate(index) for index in self.batches)


class EvaluationBatches:
    """Held-out rows with their histories; longest together, every row once.

    Args:
        batch_size: rows of a batch, over all processes.
        mask_history: also give the index pairs of the items seen before, which do not compete with the target.
        rank, world: which process this is, of how many.
        spare_target: a target that was seen before competes nevertheless; False for lists, which must not depend on targets.
    """

    def __init__(
        self,
        rows: EvaluationRows,
        batch_size: int,
        mask_history: bool = True,
        rank: int = 0,
        world: int = 1,
        spare_target: bool = True,
    ) -> None:
        self.rows, self.mask_history, self.rank, self.world = rows, mask_history, rank, world
        self.spare_target = spare_target
        order = np.argsort(rows.lengths, kind="stable")
        self.batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return (own_part(self.collate, index, self.rank, self.world) for index in self.batches)

    def collate(self, index: np.ndarray) -> Batch:
        """The batch of these evaluation rows."""
        rows = self.rows
        items = windows(rows.dataset.items, rows.start[index], rows.at[index])
        batch = {
            "row": torch.from_numpy(index),
            "user": torch.from_numpy(rows.user[index]),
            "items": torch.from_numpy(items),
            "mask": torch.from_numpy(items > 0),
            "target": torch.from_numpy(rows.target[index]),
        }
        if self.mask_history:
            spared = rows.target[index] if self.spare_target else None
            batch |= seen_before(rows.dataset, rows.user[index], rows.at[index], spared)
        return batch


class SequenceDataModule(L.LightningDataModule):
    """Training batches and validation rows (of `users`, as in `EvaluationRows`) of one dataset.

    The test rows are not in reach of the Trainer but with `part="test"`, which chooses epochs on them.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: SequenceConfig,
        batch_size: int,
        mask_history: bool,
        seed: int,
        users: int | None = None,
        part: str = "valid",
    ) -> None:
        super().__init__()
        self.dataset, self.config = dataset, config
        self.batch_size, self.mask_history, self.seed = batch_size, mask_history, seed
        self.validation = EvaluationRows(dataset, part, config.max_length, users)

    @cached_property
    def rows(self) -> TrainingRows:
        """Made when asked for: a student that is counted has none."""
        return TrainingRows(self.dataset, self.config)

    def _ranks(self) -> dict[str, Any]:
        return {"rank": self.trainer.global_rank, "world": self.trainer.world_size} if self.trainer else {}

    def train_dataloader(self) -> TrainingBatches:
        return TrainingBatches(self.rows, self.batch_size, self.seed, **self._ranks())

    def val_dataloader(self) -> EvaluationBatches:
        return EvaluationBatches(self.validation, max(self.batch_size, 256), self.mask_history, **self._ranks())
