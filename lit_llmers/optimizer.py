"""AdamW and its learning-rate schedule, for every LightningModule here."""

import math
from typing import Any

import lightning as L
import torch

from lit_llmers.conf.schema import OptimizerConfig


def adamw(module: L.LightningModule, config: OptimizerConfig) -> Any:
    """What `configure_optimizers` returns for the trainable parameters of the module."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fused = not _clips_in_mixed_precision(module)
    adam = torch.optim.AdamW(_groups(trainable), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    warmup = config.warmup_steps
    if not warmup and config.schedule == "constant":
        return adam

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant" or step == warmup:
            return 1.0
        trainer = module.trainer
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        steps = per_epoch * (trainer.max_epochs or 1)  # known only now: asking earlier would set the loader up
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, factor)
    return {"optimizer": adam, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _groups(parameters: list[torch.nn.Parameter]) -> list[Any]:
    """Parameters in shards apart from whole ones: they cannot be stepped together."""
    sharded = [each for each in parameters if hasattr(each, "placements")]
    whole = [each for each in parameters if not hasattr(each, "placements")]
    return [{"params": sharded}, {"params": whole}] if sharded and whole else parameters


def _clips_in_mixed_precision(module: L.LightningModule) -> bool:
    """Whether the Trainer clips gradients in mixed precision, which Lightning refuses with a fused optimiser."""
    try:
        trainer = module.trainer
    except RuntimeError:  # there is none
        return False
    return bool(trainer.gradient_clip_val) and "mixed" in str(trainer.precision)
