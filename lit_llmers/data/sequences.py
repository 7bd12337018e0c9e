"""Training rows and evaluation rows: which slice of which user's history is read, and what is to be predicted."""

import hashlib
from functools import cached_property

import numpy as np

from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.data.dataset import TEST, TRAIN, VALID, Dataset
from lit_llmers.errors import UserError
from lit_llmers.files import digest


class TrainingRows:
    """The training rows of a dataset: row `r` reads `items[start[r]:stop[r]-1]` and predicts what follows.

    With `examples=sequence` each position has a target, the item after it, but for those that are there as `context` for the
    rest; otherwise `items[stop-1]` is the only one.

    Attributes:
        user, start, stop: `[R]` int64.
        target_offset: `[R+1]` int64: the targets of row `r`, the last items before `stop[r]`, are numbered
            `target_offset[r]..target_offset[r+1]`: user by user and in order of time, so that the same targets have the same
            numbers however rows are cut. These numbers are the keys of recorded signals.
    """

    def __init__(self, dataset: Dataset, config: SequenceConfig) -> None:
        self.dataset, self.config = dataset, config
        begin = dataset.offsets[:-1]
        train = np.add.reduceat((dataset.split == TRAIN).astype(np.int64), begin)
        end = begin + train  # one past the last training interaction of each user
        targets = np.maximum(train - 1, 0)  # the first item has no history
        if config.most_targets:
            targets = np.minimum(targets, config.most_targets)
        self._of_users = hashlib.sha256(np.ascontiguousarray(targets, "<i8").tobytes()).hexdigest()
        if config.examples == "sequence":  # windows that share no target, the latest window full
            size = config.max_length - config.context
            rows = -(-targets // size)
        else:
            rows, size = targets, 1
        self.user = np.repeat(np.arange(dataset.n_users), rows)
        nth = np.repeat(np.cumsum(rows), rows) - 1 - np.arange(len(self.user))  # 0 = the latest row of its user, the last
        self.stop = end[self.user] - nth * size
        if config.examples == "sequence":
            first = np.maximum(self.stop - size, (end - targets)[self.user])  # target
            self.start = np.maximum(first - 1 - config.context, begin[self.user])
            count = self.stop - first
        else:
            self.start = np.maximum(self.stop - 1 - config.max_length, begin[self.user])
            count = np.ones(len(self.user), np.int64)
        self.target_offset = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
        if not len(self):
            k_core = dataset.info.get("k_core", 0)
            cure = f"Lower data.k_core (it is {k_core}), take" if k_core > 1 else "Take"
            raise UserError(
                f"There is no training example: no user has two training interactions, of which one precedes the other. {cure} "
                "more data, or choose a student that learns from single ones, as student=bpr-mf or student=lightgcn with "
                "recipe=student."
            )

    def __len__(self) -> int:
        return len(self.user)

    @property
    def every_position(self) -> bool:
        """Whether a row has targets at its positions, and not at its end alone."""
        return self.config.examples == "sequence"

    def places(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whose the targets of these numbers `[T]` are, and where they stand in `dataset.items`: two `[T]` int64."""
        row = np.searchsorted(self.target_offset, number, side="right") - 1
        return self.user[row], self.stop[row] - self.target_offset[row + 1] + number

    @property
    def targets(self) -> int:
        """Number of training targets, the rows of every recorded signal."""
        return int(self.target_offset[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """`[R]` items that each row reads."""
        return self.stop - self.start - 1

    @cached_property
    def fingerprint(self) -> str:
        """Names the dataset and the targets in it: equal fingerprints mean equal target numbers, however rows are cut."""
        return digest({"dataset": self.dataset.fingerprint, "targets": self._of_users})


class EvaluationRows:
    """One row per held-out interaction: predict `items[at]` from everything of the user before it.

    Args:
        part: `valid` or `test`.
        max_length: items of history that a model reads.
        users: take the rows of so many users only, drawn at random, the same for every model and seed; more users are fewer
            users and some others. None takes all.

    Attributes:
        user, start, at: `[R]` int64; the model reads `items[start:at]`, the last `max_length` of the history
            `items[offsets[user]:at]`.
    """

    def __init__(self, dataset: Dataset, part: str, max_length: int, users: int | None = None) -> None:
        self.dataset, self.part = dataset, part
        self.at = np.flatnonzero(dataset.split == {"valid": VALID, "test": TEST}[part])
        if not len(self.at):
            raise UserError(f"The {part} part of {dataset.info.get('name', 'the data')} is empty: nothing to evaluate on.")
        self.user = np.searchsorted(dataset.offsets, self.at, side="right") - 1
        if users is not None:
            drawn = np.zeros(dataset.n_users, bool)
            drawn[np.random.default_rng(0).permutation(np.flatnonzero(np.bincount(self.user)))[:users]] = True
            self.at, self.user = self.at[drawn[self.user]], self.user[drawn[self.user]]
        self.start = np.maximum(self.at - max_length, dataset.offsets[self.user])

    def __len__(self) -> int:
        return len(self.at)

    @cached_property
    def lengths(self) -> np.ndarray:
        """`[R]` items that each row reads."""
        return self.at - self.start

    @cached_property
    def target(self) -> np.ndarray:
        """`[R]` held-out items."""
        return self.dataset.items[self.at].astype(np.int64)

    @cached_property
    def history_length(self) -> np.ndarray:
        """`[R]` interactions before the held-out one, uncut."""
        return self.at - self.dataset.offsets[self.user]
