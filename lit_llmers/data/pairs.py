"""Batches of users, items they met and items they did not: what collaborative students train on.

As in `lit_llmers.data.loader` nothing is done sample by sample in Python, and no worker process is needed.
"""

from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch

from lit_llmers.data.dataset import Dataset, distinct
from lit_llmers.data.loader import Batch, EvaluationBatches, TrainingBatches, cut
from lit_llmers.data.sequences import EvaluationRows
from lit_llmers.errors import UserError
from lit_llmers.files import digest


class UnmetItems:
    """Draws items that a user has no training interaction with: uniformly and exactly, without looping.

    The numbers 1..F stand for the F items that a user has not met: each for itself, and one that he has met for one of his
    items above F. So a draw is a number, and a search of all pairs for whether he has met it. Most draws need no search: a
    table of bits, 16 and more for each pair, tells which pairs are certainly not met.

    Args:
        pairs: `[E, 2]` int64: user 0..U-1 and item 1..n; pairs may repeat.
        users: `[U]` original ids, which messages name.
        n_items: n.

    Attributes:
        met: `[E]` keys `user * (n + 1) + item` of the different pairs, ascending.
        instead: `[E]` int32: what an item of these stands for, if it is at most F.
        free: `[U]` F.

    Raises:
        UserError: a user has met every item.
    """

    def __init__(self, pairs: np.ndarray, users: np.ndarray, n_items: int) -> None:
        self.n_items, self.stride = n_items, n_items + 1
        self.met = distinct(pairs[:, 0] * self.stride + pairs[:, 1])
        user, item = np.divmod(self.met, self.stride)
        count = np.bincount(user, minlength=len(users))
        self.free = n_items - count
        if not self.free.all():
            raise UserError(
                f"User '{users[self.free.argmin()]}' has met all {n_items} items of the catalogue in training, so none is left "
                "to be a negative. Raise data.k_core, take more data, or choose what needs no negatives: student=item-knn, or "
                "student.loss.kind=cross_entropy for a student that reads histories."
            )
        first = np.cumsum(count) - count  # [U], where a user's pairs begin
        above = user * self.stride + self.free[user] + 1 + np.arange(len(user)) - first[user]  # [E], items F+1..n of each user
        self.instead = np.zeros(len(user), np.int32)
        self.instead[item <= self.free[user]] = above[~self._among_met(above)[1]] % self.stride  # as many, user by user
        self.shift = np.uint64(60 - len(self.met).bit_length())
        marked = np.zeros(1 << 64 - int(self.shift), bool)
        marked[self._hash(self.met)] = True
        self.bits = np.packbits(marked, bitorder="little")

    def draw(self, user: np.ndarray, number: int, random: np.random.Generator) -> np.ndarray:
        """`[B, number]` int64 items for the users `[B]`, with replacement."""
        item = (random.random((len(user), number)) * self.free[user][:, None]).astype(np.int64)
        item += 1
        keys = (item + (user * self.stride)[:, None]).reshape(-1)
        suspects = np.flatnonzero(self._perhaps_met(keys))
        place, met = self._among_met(keys[suspects])
        item.reshape(-1)[suspects[met]] = self.instead[place[met]]
        return item

    def _among_met(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each key of `[K]` would stand in `met`, and whether it does."""
        place = np.minimum(np.searchsorted(self.met, keys), len(self.met) - 1)
        return place, self.met[place] == keys

    def _hash(self, keys: np.ndarray) -> np.ndarray:
        place = keys.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing
        place >>= self.shift
        return place.view(np.int64)

    def _perhaps_met(self, keys: np.ndarray) -> np.ndarray:
        place = self._hash(keys)
        bit = (place & 7).astype(np.uint8)
        place >>= 3
        return self.bits.take(place) & (np.uint8(1) << bit)


class PairRows:
    """The training rows of a collaborative student: every training interaction, users in order.

    Attributes:
        user, item: `[E]` int64, user 0..U-1 and item 1..n. A row's number is also that of its target.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        pairs = dataset.training_pairs
        if not len(pairs):
            raise UserError("There is no training example: no user has a training interaction. Take more data.")
        self.user, self.item = np.ascontiguousarray(pairs.T)
        self.unmet = UnmetItems(pairs, dataset.users, dataset.n_items)

    def __len__(self) -> int:
        return len(self.user)

    @property
    def targets(self) -> int:
        """Number of training targets, the rows of every recorded signal."""
        return len(self)

    @cached_property
    def fingerprint(self) -> str:
        """Names the dataset and this way to cut it: equal fingerprints mean equal target numbers."""
        return digest({"dataset": self.dataset.fingerprint, "examples": "pairs"})


class PairBatches(TrainingBatches):
    """Shuffled training pairs, each with negatives of its own; resumes as `TrainingBatches` does.

    Order and negatives are a function of (seed, epoch, batch) alone. Inside a batch the users ascend, so that memory is read
    in order.

    Args:
        rows: the training pairs.
        batch_size: pairs in a batch, over all processes.
        negatives: items that the user has not met, drawn anew for each pair in each epoch.
        seed: of order and negatives.
    """

    rows: PairRows  # type: ignore[assignment]

    def __init__(self, rows: PairRows, batch_size: int, negatives: int, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(rows, batch_size, seed, rank, world)  # type: ignore[arg-type]
        self.negatives = negatives

    def _order(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        starts = range(0, len(order), self.batch_size)
        return [order[start : start + self.batch_size] for start in starts]

    def own(self, index: np.ndarray) -> Batch:
        """Negatives are drawn for the whole batch, so they are those of one process."""
        if self.world == 1:
            return self.collate(index)
        part, about = cut(np.arange(len(index)), self.rank, self.world)
        return {key: value[part] for key, value in self.collate(index).items()} | about

    def collate(self, index: np.ndarray) -> Batch:
        """The batch of these training rows: `row, user, target, target_row [B]` and `negatives [B, N]`, all int64."""
        index = np.sort(index)
        user = self.rows.user[index]
        random = np.random.default_rng([self.seed, self.epoch, 1 + self.position])  # 0 is as none: the one of the order
        row = torch.from_numpy(index)
        return {
            "row": row,
            "user": torch.from_numpy(user),
            "target": torch.from_numpy(self.rows.item[index]),
            "negatives": torch.from_numpy(self.rows.unmet.draw(user, self.negatives, random)),
            "target_row": row,
        }


class PairDataModule(L.LightningDataModule):
    """Training pairs and validation rows (of `users`, as in `EvaluationRows`) of one dataset.

    The test rows are not in reach of the Trainer but with `part="test"`, which chooses epochs on them.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        negatives: int,
        mask_history: bool,
        seed: int,
        users: int | None = None,
        part: str = "valid",
    ) -> None:
        super().__init__()
        self.dataset, self.batch_size, self.negatives = dataset, batch_size, negatives
        self.mask_history, self.seed = mask_history, seed
        self.rows = PairRows(dataset)
        self.validation = EvaluationRows(dataset, part, 1, users)  # a user is read from a table, not from a history

    def _ranks(self) -> dict[str, Any]:
        return {"rank": self.trainer.global_rank, "world": self.trainer.world_size} if self.trainer else {}

    def train_dataloader(self) -> PairBatches:
        return PairBatches(self.rows, self.batch_size, self.negatives, self.seed, **self._ranks())

    def val_dataloader(self) -> EvaluationBatches:
        return EvaluationBatches(self.validation, 512, self.mask_history, **self._ranks())
