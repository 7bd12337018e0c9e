"""Text added to what a student reads: Cui et al., "Distillation Matters: Empowering Sequential Recommenders to Match the
Performance of Large Language Models", RecSys 2024 (arXiv 2405.00338)."""

from typing import ClassVar

from torch import Tensor, nn

from lit_llmers.backbones import Backbone
from lit_llmers.errors import UserError
from lit_llmers.fusion import Fusion, Sources
from lit_llmers.fusion.text import TextView


class AddProjected(Fusion):
    """DLLM2Rec's collaborative embedding distillation: `x = E_i + epsilon (W t_i + b)` enters, and E alone scores.

    t is the teacher's frozen item table; W and b are trained with the task, so that E is what collaboration adds to text.
    We differ from the official code: padding is zero, not `epsilon b`; and the output layer is the backbone's (mostly E
    itself), where theirs is a layer of its own with biases.

    Args:
        items: `[n+1, D]` frozen text vectors.
        epsilon: weight of the text.

    Raises:
        UserError: its weight is below 0.
    """

    sources: ClassVar[Sources] = {"items": ("from", "items")}

    def __init__(self, backbone: Backbone, items: Tensor, epsilon: float = 0.2) -> None:
        super().__init__(backbone)
        if not epsilon >= 0:
            raise UserError(f"add_projected's epsilon is {epsilon}. It must be 0 (no text) or more.")
        self.epsilon = epsilon
        self.text = TextView(items, backbone, nn.Linear(items.shape[-1], self.dim))

    def embed(self, items: Tensor) -> Tensor:
        return self.inner.embed(items).add(self.text.rows(items, whole=False), alpha=self.epsilon)
