"""Feature distillation: how far a student's hidden states are from a teacher's.

Source: SLMRec, "SLMRec: Distilling Large Language Models into Small for Sequential Recommendation", ICLR 2025
(arXiv 2405.17890); the official code's `distill_type=align`. Every function returns one value per row, so that the caller
decides what a mean is taken over, and detaches the teacher: no gradient ever reaches it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`1 - cos(student, teacher)`, in [0, 2].

    Args:
        student: `[..., D]`.
        teacher: `[..., D]`, taken as a constant.

    Returns:
        `[...]`.
    """
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=-1)


def euclidean_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`||student - teacher||_2`: the norm itself, not its square.

    Args:
        student: `[..., D]`.
        teacher: `[..., D]`, taken as a constant.

    Returns:
        `[...]`. The gradient at equality is zero.
    """
    return torch.linalg.vector_norm(student - teacher.detach(), dim=-1)


def block_boundaries(layers: int, blocks: int) -> list[int]:
    """Indices of the hidden states at the end of each block: `[k * layers / blocks for k = 1..blocks]`.

    Index 0 is the input embedding, `layers` the last state. For 8 layers in 4 blocks: `[2, 4, 6, 8]`.

    Raises:
        ValueError: `layers` is not divisible by `blocks`.
    """
    if blocks < 1 or layers % blocks:
        raise ValueError(f"{layers} layers cannot be cut into {blocks} equal blocks")
    return [layers // blocks * block for block in range(1, blocks + 1)]
