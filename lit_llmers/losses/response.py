"""Response distillation: a student's scores learn to be a teacher's. One value per target, in nats.

Where `valid` is false an entry only fills up a list that is too short and counts nowhere. No gradient reaches the teacher.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_llmers.losses.ranking import counted_mean, soft_targets, soft_top_k


def soft_labels(teacher: Tensor, temperature: float = 1.0, offset: float = 0.0) -> Tensor:
    """`sigmoid((teacher + offset) / temperature)`: what the teacher's logits say of each item alone.

    Source: CD, Lee et al., "Collaborative Distillation for Top-N Recommendation", ICDM 2019 (arXiv 1911.05276).
    """
    return torch.sigmoid((teacher.detach() + offset) / temperature)


def soft_bce(student: Tensor, label: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over the items of `-(q log sigmoid(s) + (1 - q) log(1 - sigmoid(s)))` (CD's loss, on the items that were drawn).

    UnKD's code of CD adds 1e-10 inside the logarithms, which ends the gradient of scores beyond some 20; this does not.

    Args:
        student: `[T, K]` scores.
        label: `[T, K]` q in 0..1.
        valid: `[T, K]`; None: all.

    Returns:
        `[T]`; 0 for an empty list.
    """
    return counted_mean(F.softplus(student) - label.detach() * student, valid)


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """`t^2 KL(softmax(teacher / t) || softmax(student / t))` over the items given.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531); t^2 keeps the
    gradient's size whatever the temperature is.

    Args:
        student, teacher: `[T, K]` scores of the same items.
        valid: `[T, K]`; None: all.

    Returns:
        `[T]`; 0 for an empty list, and where student and teacher differ by a constant.
    """
    valid = torch.ones_like(student, dtype=torch.bool) if valid is None else valid
    teacher = teacher.detach()
    labels = soft_targets(teacher, valid, temperature)
    return temperature**2 * (soft_top_k(student, labels, valid, temperature) - soft_top_k(teacher, labels, valid, temperature))
