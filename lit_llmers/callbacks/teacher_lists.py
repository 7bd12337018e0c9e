"""A teacher's lists of a batch's targets, or of a random share of them: a step reads no more than it learns from."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_llmers.data.loader import Batch
from lit_llmers.students.output import StudentOutput

Keys = tuple[str, str, str]  # of a batch: the lists' items and scores, and which targets they are of


class RankingSource(Protocol):
    """A teacher's recorded lists."""

    k: int

    def read(self, batch: Batch, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Items `[T, K]` and scores of every target of the batch, or of those drawn: best first, 0 where a list ends."""
        ...


def read_lists(ranking: RankingSource, batch: Batch, keys: Keys, share: float, k: int | None, device: torch.device) -> None:
    """Put the lists of a random share of a batch's targets into it, and with a share below 1 the targets' numbers.

    Args:
        k: items of each list that are wanted; None: all.
    """
    drawn = draw_targets(len(batch["target_row"]), share)
    lists: dict[str, Any] = dict(zip(keys, ranking.read(batch, drawn), strict=False))
    lists = {key: values[:, :k] for key, values in lists.items()}
    if drawn is not None:
        lists[keys[2]] = drawn
    batch |= {key: values.to(device, non_blocking=True) for key, values in lists.items()}


def draw_targets(targets: int, share: float) -> Tensor | None:
    """Numbers of a random share of the targets, ascending; None for all."""
    if share >= 1:
        return None
    return torch.randperm(targets)[: math.ceil(share * targets)].sort().values


def lists_of(output: StudentOutput, batch: Batch, keys: Keys) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Which targets have lists (None: all), and of those the student's vectors `[D, d]` and the lists `[D, K]`."""
    drawn = batch.get(keys[2])
    return drawn, of_drawn(output.user, drawn), batch[keys[0]], batch[keys[1]].float()


def of_drawn(rows: Tensor, drawn: Tensor | None) -> Tensor:
    """Those of the drawn targets."""
    return rows if drawn is None else rows.index_select(0, drawn)


def of_all(loss: Tensor, drawn: Tensor | None, targets: int) -> Tensor:
    """From the losses of the drawn targets `[D]` to an unbiased estimate of those of all `[T]`, however they are reduced."""
    if drawn is None:
        return loss
    return loss.new_zeros(targets).index_copy(0, drawn, loss * (targets / len(drawn)))
