"""Deep supervision: every block predicts the next item, not only the last (SLMRec, ICLR 2025, arXiv 2405.17890)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_llmers.callbacks.distillation import Distillation, Term, check_share
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError
from lit_llmers.losses.feature import block_boundaries
from lit_llmers.students.output import StudentOutput
from lit_llmers.students.sequential import SequentialRecommender

TaskLoss = Callable[[Tensor, Batch, Tensor | None], Tensor]


class DeepSupervisionTerm(Term):
    """`sum over inner blocks k of CE(W_k h_k, target)`.

    Args:
        boundaries: indices of the hidden states at the ends of the inner blocks.
        heads: `W_k`, hidden width to the width of the item table, without bias.
        task_loss: cross-entropy of user vectors `[K, d]` for the K drawn targets of a batch, a scalar.
        share: of the targets, drawn anew at each step, that the loss is estimated from.
    """

    requires = frozenset({"hidden"})

    def __init__(self, boundaries: list[int], heads: nn.ModuleList, task_loss: TaskLoss, share: float = 1.0) -> None:
        super().__init__()
        self.boundaries, self.heads, self.task_loss, self.share = boundaries, heads, task_loss, share

    def forward(self, output: StudentOutput, batch: Batch) -> Tensor:
        assert output.hidden is not None
        targets = len(output.user)
        drawn = None
        if self.share < 1:
            drawn = torch.randperm(targets, device=output.user.device)[: math.ceil(self.share * targets)]
        losses = []
        for layer, head in zip(self.boundaries, self.heads, strict=True):
            state = output.hidden[layer] if drawn is None else output.hidden[layer].index_select(0, drawn)
            losses.append(self.task_loss(head(state), batch, drawn))
        self.parts = {f"block{k}": loss.detach() for k, loss in enumerate(losses, 1)}
        return torch.stack(losses).sum()


class DeepSupervision(Distillation):
    """Adds a next-item head and its cross-entropy at the end of every block but the last. Needs no teacher.

    Args:
        blocks: equal blocks that the student's layers are cut into.
        weight: factor of the summed cross-entropies (the paper's lambda_3).
        share: of a batch's targets that each step computes the loss on, drawn at random and weighted so that the loss is
            unbiased. Every block costs one more cross-entropy over the catalogue, which for a small student with a target
            at every position is most of a step; below 1 that price falls in proportion.
        decay_epochs: see `Distillation`.
    """

    name = "deep_supervision"

    def __init__(self, blocks: int = 4, weight: float = 1.0, share: float = 1.0, decay_epochs: int = 0) -> None:
        super().__init__(weight, decay_epochs)
        if blocks < 2:
            raise UserError(
                f"deep_supervision: blocks is {blocks}, so there is no inner block to supervise. Choose 2 or more, or remove "
                "the callback."
            )
        check_share("deep_supervision", share)
        self.blocks, self.share = blocks, share

    def build(self, student: SequentialRecommender) -> DeepSupervisionTerm:
        layers = student.backbone.layers
        width, dim = student.backbone.width, student.backbone.dim
        try:
            boundaries = block_boundaries(layers, self.blocks)[:-1]
        except ValueError as error:
            raise UserError(
                f"deep_supervision: the student's {layers} layers cannot be cut into {self.blocks} blocks. "
                "Choose a depth divisible by the blocks."
            ) from error
        heads = nn.ModuleList(nn.Linear(width, dim, bias=False) for _ in boundaries)
        return DeepSupervisionTerm(boundaries, heads, student.next_item_loss, self.share)
