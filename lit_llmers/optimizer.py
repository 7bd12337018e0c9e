"""AdamW and its learning-rate schedule, for every LightningModule here."""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_llmers.conf.schema import OptimizerConfig


def adamw(module: L.LightningModule, config: OptimizerConfig) -> Any:
    """What `configure_optimizers` returns for the trainable parameters of the module."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fused = not _clips_in_mixed_precision(module)
    tables = any(isinstance(part, torch.nn.Embedding) and part.sparse for part in module.modules())
    kind = RowwiseAdamW if tables else torch.optim.AdamW
    adam = kind(_groups(trainable), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    warmup = config.warmup_steps
    steady = config.schedule in ("constant", "plateau")  # BestCheckpoint sees to the plateau
    if not warmup and steady:
        return adam

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if steady or step == warmup:
            return 1.0
        trainer = module.trainer
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        steps = per_epoch * (trainer.max_epochs or 1)  # known only now: asking earlier would set the loader up
        passed = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 1 - passed if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * passed))

    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, factor)
    return {"optimizer": adam, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def lower_rate(trainer: L.Trainer, factor: float) -> None:
    """Multiply the learning rates from here on, and what a warm-up leads to; a checkpoint has them."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= factor
    for config in trainer.lr_scheduler_configs:
        config.scheduler.base_lrs = [rate * factor for rate in config.scheduler.base_lrs]


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW whose step touches only the rows of a table that its gradient has, where the gradient is sparse.

    The work of a step then does not grow with the table. Rows that no batch meets keep their moments as they are, and are not
    decayed; with AdamW their moments fade, and go on moving them for a while. Where every row is met the two are one.

    A fused AdamW is handed scaled gradients by `torch.amp.GradScaler` and divides them itself. This one has the scaler divide
    them, and leave out a step whose gradients overflow, as it does for optimisers that are not fused.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        met = [(group, table) for group in self.param_groups for table in group["params"] if _sparse(table.grad)]
        gradients = [table.grad.coalesce() for _, table in met]
        for _, table in met:
            table.grad = None  # the others' step passes by it
        super().step()
        for (group, table), gradient in zip(met, gradients, strict=True):
            self._step_rows(group, table, gradient)
            table.grad = gradient
        return loss

    def _step_rows(self, group: dict[str, Any], table: Tensor, gradient: Tensor) -> None:
        state, rows, values = self.state[table], gradient.indices()[0], gradient.values()
        if not state:
            zeros = {name: torch.zeros_like(table) for name in ("exp_avg", "exp_avg_sq")}
            state |= {"step": torch.zeros((), device=table.device), **zeros}
        state["step"] += 1
        (decay, decay_square), step = group["betas"], float(state["step"])
        mean = state["exp_avg"].index_select(0, rows).lerp_(values, 1 - decay)
        square = state["exp_avg_sq"].index_select(0, rows).mul_(decay_square).addcmul_(values, values, value=1 - decay_square)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        scale = square.sqrt_().div_(math.sqrt(1 - decay_square**step)).add_(group["eps"])
        table.index_add_(0, rows, mean.div_(scale), alpha=-float(group["lr"]) / (1 - decay**step))


def _sparse(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.is_sparse


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
