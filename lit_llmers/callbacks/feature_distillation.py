"""Block-wise feature distillation (SLMRec, ICLR 2025, arXiv 2405.17890)."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_llmers.callbacks.distillation import Distillation, Reduce, SignalSource, Term
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError
from lit_llmers.losses.feature import block_boundaries, cosine_distance, euclidean_distance
from lit_llmers.students.output import StudentOutput
from lit_llmers.students.sequential import SequentialRecommender

KEY = "block_states"


class FeatureTerm(Term):
    """`sum over blocks of cosine * (1 - cos(h_S, h_T)) + l2 * ||h_S - h_T||`.

    Args:
        boundaries: indices of the student's hidden states at its block ends.
        projectors: student width to teacher width, one for each block; None where the widths are equal.
        reduce: mean over the targets of a batch.
    """

    requires = frozenset({"hidden", KEY})

    def __init__(
        self, boundaries: list[int], projectors: nn.ModuleList | None, cosine: float, l2: float, reduce: Reduce
    ) -> None:
        super().__init__()
        self.boundaries, self.projectors = boundaries, projectors
        self.cosine, self.l2, self.reduce = cosine, l2, reduce

    def forward(self, output: StudentOutput, batch: Batch) -> Tensor:
        assert output.hidden is not None
        teacher = batch[KEY].unbind(1)  # blocks x [T, D_T]
        cosine, l2 = [], []
        for block, layer in enumerate(self.boundaries):
            state = output.hidden[layer]  # [T, D_S]
            if self.projectors is not None:
                state = self.projectors[block](state)
            state = state.to(torch.promote_types(state.dtype, torch.float32))  # distances need more than half precision
            signal = teacher[block].to(state)
            cosine.append(cosine_distance(state, signal))
            l2.append(euclidean_distance(state, signal))
        cosine_loss = self.reduce(torch.stack(cosine), batch)
        l2_loss = self.reduce(torch.stack(l2), batch)
        self.parts = {"cosine": cosine_loss.detach(), "l2": l2_loss.detach()}
        return self.cosine * cosine_loss + self.l2 * l2_loss


class FeatureDistillation(Distillation):
    """The student's hidden states at the end of each block learn to be the teacher's.

    Args:
        signals: the teacher's block states, `[T, blocks, D_T]` for a batch with T targets.
        cosine: weight of the cosine distance (the paper's lambda_1).
        l2: weight of the Euclidean distance (0.1, hard-coded in the official code).
        weight: factor of both.
        decay_epochs: see `Distillation`.

    The number of blocks is that of the record; the student's depth must be divisible by it.

    Raises:
        UserError: a weight below 0, or both distances without one.
    """

    name = "feature"
    sources = {"signals": ("from", "signals")}  # noqa: RUF012

    def __init__(
        self, signals: SignalSource, cosine: float = 1.0, l2: float = 0.1, weight: float = 1.0, decay_epochs: int = 0
    ) -> None:
        super().__init__(weight, decay_epochs)
        for key, value in {"cosine": cosine, "l2": l2}.items():
            if not value >= 0:
                raise UserError(f"feature_distillation: {key} is {value}. It must be 0 (no effect) or more.")
        if not cosine + l2:
            raise UserError("feature_distillation: cosine and l2 are both 0, so nothing is learned. Set one of them above 0.")
        self.signals, self.cosine, self.l2 = signals, cosine, l2

    def build(self, student: SequentialRecommender) -> FeatureTerm:
        blocks, teacher_width = self.signals.shape
        layers, width = student.backbone.layers, student.backbone.width
        try:
            boundaries = block_boundaries(layers, blocks)
        except ValueError as error:
            raise UserError(
                f"feature_distillation: the student's {layers} layers cannot be cut into the record's {blocks} blocks. "
                f"Choose a depth divisible by {blocks}, or record another number of blocks (stages.signals.blocks)."
            ) from error
        projectors = None
        if width != teacher_width:
            projectors = nn.ModuleList(nn.Linear(width, teacher_width) for _ in range(blocks))
        return FeatureTerm(boundaries, projectors, self.cosine, self.l2, student.reduce)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        batch[KEY] = self.signals.read(batch).to(pl_module.device, non_blocking=True)
