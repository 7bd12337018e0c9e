"""What trains is float32 while it trains, whatever type its base is stored in."""

from typing import Any

import lightning as L
import torch

HALVES = (torch.bfloat16, torch.float16)


class TrainInFloat32(L.Callback):
    """Gives trained weights in half precision float32 before the first step, and their own type back after the last.

    Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.1: a usual step of AdamW is smaller than the rounding
    of most weights in half precision, which would then never move. Products are computed in half all the same where
    `trainer.precision` is `bf16-mixed` or `16-mixed`. Checkpoints hold the float32 weights.
    """

    def __init__(self) -> None:
        self.own: dict[str, torch.dtype] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and parameter.dtype in HALVES:
                self.own[name] = parameter.dtype
                parameter.data = parameter.data.float()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        named: dict[str, Any] = dict(pl_module.named_parameters())
        for name, dtype in self.own.items():
            if not hasattr(named[name], "placements"):  # what was cut up is read back from its checkpoint
                named[name].data = named[name].data.to(dtype)
