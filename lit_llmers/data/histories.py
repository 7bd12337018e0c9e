"""Users' training histories by the user's number: what may be read of a user without looking at what is held out."""

import numpy as np
import torch
from torch import Tensor

from lit_llmers.data.dataset import TRAIN, Dataset
from lit_llmers.data.loader import Batch, seen_before, windows


class Histories:
    """The training interactions of every user; validation and test items are not in reach.

    Args:
        dataset: where they come from.
        length: items of a history that are read, the latest ones.

    Attributes:
        stop: `[U]`, one past each user's last training interaction in `dataset.items`.
    """

    def __init__(self, dataset: Dataset, length: int) -> None:
        self.dataset, self.length = dataset, length
        train = np.add.reduceat((dataset.split == TRAIN).astype(np.int64), dataset.offsets[:-1])
        self.stop = dataset.offsets[:-1] + train

    def __len__(self) -> int:
        return len(self.stop)

    def latest(self, users: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
        """The latest training items `[N, L]`, left-padded with 0, of the users `[N]`, and their mask.

        Args:
            users: numbers 0..U-1.
            length: items at most; None takes the `length` of the object.
        """
        return self._before(users, self.stop[users.cpu().numpy()], length)

    def inputs(self, users: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
        """As `latest`, but without each user's last training item: what his latest training row reads, whose target it is."""
        user = users.cpu().numpy()
        return self._before(users, np.maximum(self.stop[user] - 1, self.dataset.offsets[user]), length)

    def seen(self, users: Tensor) -> Batch:
        """All that the users `[N]` have met, uncut: `seen_row` and `seen_item`, see `seen_before`; on the CPU."""
        user = users.cpu().numpy()
        return seen_before(self.dataset, user, self.stop[user])

    def _before(self, users: Tensor, stop: np.ndarray, length: int | None) -> tuple[Tensor, Tensor]:
        start = np.maximum(stop - (length or self.length), self.dataset.offsets[users.cpu().numpy()])
        items = torch.from_numpy(windows(self.dataset.items, start, stop)).to(users.device)
        return items, items > 0
