"""Feature distillation: how far a student's hidden states are from a teacher's.

Source: SLMRec, "SLMRec: Distilling Large Language Models into Small for Sequential Recommendation", ICLR 2025
(arXiv 2405.17890); the official code's `distill_type=align`. Every function returns one value per row, so that the caller
decides what a mean is taken over, and detaches the teacher: no gradient ever reaches it.
"""

import torch
from torch import Tensor

_SMALLEST = 1e-8  # norm that a vector is divided by at least


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`1 - cos(student, teacher)`, in [0, 2].

    Args:
        student: `[..., D]`.
        teacher: `[..., D]`, taken as a constant.

    Returns:
        `[...]`.
    """
    return _CosineDistance.apply(student, teacher)


def euclidean_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`||student - teacher||_2`: the norm itself, not its square.

    Args:
        student: `[..., D]`.
        teacher: `[..., D]`, taken as a constant.

    Returns:
        `[...]`. The gradient at equality is zero.
    """
    return _EuclideanDistance.apply(student, teacher)


class _CosineDistance(torch.autograd.Function):
    """With s and t: `d/ds (1 - cos) = cos s / |s|^2 - t / (|s| |t|)`. By hand it takes a third of autograd's time."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        student_norm = torch.linalg.vector_norm(student, dim=-1).clamp_(min=_SMALLEST)
        teacher_norm = torch.linalg.vector_norm(teacher, dim=-1).clamp_(min=_SMALLEST)
        cosine = (student * teacher).sum(-1).div_(student_norm).div_(teacher_norm)
        ctx.save_for_backward(student, teacher, student_norm, teacher_norm, cosine)
        return 1 - cosine

    @staticmethod
    def backward(ctx, cotangent: Tensor):
        student, teacher, student_norm, teacher_norm, cosine = ctx.saved_tensors
        unit = (cotangent / student_norm).unsqueeze(-1)
        gradient = student * (unit * (cosine / student_norm).unsqueeze(-1))
        return gradient.addcmul_(teacher, unit / teacher_norm.unsqueeze(-1), value=-1), None


class _EuclideanDistance(torch.autograd.Function):
    """`d/ds |s - t| = (s - t) / |s - t|`, and 0 where they are equal."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        difference = student - teacher
        distance = torch.linalg.vector_norm(difference, dim=-1)
        ctx.save_for_backward(difference, distance)
        return distance

    @staticmethod
    def backward(ctx, cotangent: Tensor):
        difference, distance = ctx.saved_tensors
        return difference * (cotangent / distance).masked_fill_(distance == 0, 0).unsqueeze(-1), None


def block_boundaries(layers: int, blocks: int) -> list[int]:
    """Indices of the hidden states at the end of each block: `[k * layers / blocks for k = 1..blocks]`.

    Index 0 is the input embedding, `layers` the last state. For 8 layers in 4 blocks: `[2, 4, 6, 8]`.

    Raises:
        ValueError: `layers` is not divisible by `blocks`.
    """
    if blocks < 1 or layers % blocks:
        raise ValueError(f"{layers} layers cannot be cut into {blocks} equal blocks")
    return [layers // blocks * block for block in range(1, blocks + 1)]
