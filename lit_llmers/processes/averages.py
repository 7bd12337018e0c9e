"""Means over what several processes hold together; with one process they are its own."""

import lightning as L
import torch
from torch import Tensor

from lit_llmers.data.loader import Batch


def part_of_mean(values: Tensor, batch: Batch, module: L.LightningModule) -> Tensor:
    """A process's part in the mean of the values `[N]` of all processes: the mean of the parts is that mean, a scalar.

    N may differ between processes. All of them must call it.
    """
    if "weight" not in batch:
        return values.mean()
    counts = 1.0 if batch["weight"] else 0.0
    number = module.trainer.strategy.reduce(values.new_tensor(counts * len(values)), reduce_op="sum")
    return values.sum() * (counts * module.trainer.world_size / number)


def averages(values: dict[str, Tensor], batch: Batch, module: L.LightningModule) -> dict[str, Tensor]:
    """Each scalar's mean over the processes, by one collective of all of them."""
    detached = {name: value.detach() for name, value in values.items()}
    if "weight" not in batch or not values:
        return detached
    together = torch.stack([value.float() for value in detached.values()])
    return dict(zip(values, module.trainer.strategy.reduce(together, reduce_op="mean"), strict=True))
