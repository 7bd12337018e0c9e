"""Embedding distillation: how far a student's vectors of users or items are from a teacher's of the same ones.

One value per entity (row), so that the caller decides what a mean is taken over; the official codes take sums over a batch.
The teacher is detached everywhere.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`||student - teacher||^2`, a sum over the width.

    Source: FitNets, "FitNets: Hints for Thin Deep Nets", ICLR 2015 (arXiv 1412.6550), eq. 3 without its 1/2; with experts in
    front of it DE, "DE-RRD: A Knowledge Distillation Framework for Recommender System", CIKM 2020 (arXiv 2012.04357), eq. 4.

    Args:
        student: `[..., D]`, after its map to the teacher's width.
        teacher: `[..., D]`, taken as a constant.

    Returns:
        `[...]`.
    """
    return (student - teacher.detach()).square().sum(-1)


def expert_weights(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """How much of each expert an entity takes: a Gumbel-softmax of `softmax(logits)`, close to one-hot where it is cold.

    Source: DE-RRD (arXiv 2012.04357), eq. 2 and 3. We leave out the 1e-10 inside the official code's logarithm.

    Args:
        logits: `[N, E]`, made from the teacher's vectors.
        noise: `[N, E]` from a standard Gumbel distribution.
        temperature: above 0.

    Returns:
        `[N, E]`, rows sum to 1.
    """
    return ((logits.log_softmax(-1) + noise) / temperature).softmax(-1)


def gumbel_like(logits: Tensor) -> Tensor:
    """Draws from a standard Gumbel distribution, of the shape of `logits`."""
    return -torch.empty_like(logits).exponential_().clamp_(min=torch.finfo(logits.dtype).tiny).log()


def entity_topology(student: Tensor, teacher: Tensor, group: Tensor) -> Tensor:
    """`sum over j of (cos(s_i, s_j) - cos(t_i, t_j))^2`, over the j of i's group whose cosine is positive at the teacher.

    Source: HTD, "Topology Distillation for Recommender System", KDD 2021 (arXiv 2106.08700), section 4.2.2, and its official
    code, which leaves out the pairs with a negative cosine.

    Args:
        student: `[N, d]`.
        teacher: `[N, D]`, taken as a constant.
        group: `[N]` number of each entity's group.

    Returns:
        `[N]`, in float32 at least.
    """
    expected = _cosines(teacher.detach(), teacher.detach())  # [N, N]
    counted = (group[:, None] == group) & (expected > 0)
    return (_cosines(student, student) - expected).square().masked_fill(~counted, 0).sum(1)


def group_topology(student: Tensor, teacher: Tensor, group: Tensor) -> Tensor:
    """`sum over groups g of (cos(P_g, s_i) - cos(Q_g, t_i))^2`, with P_g and Q_g the means of g's students and teachers.

    Source: HTD (arXiv 2106.08700), section 4.2.2, group to entity, as the official code has it (choice `second`): the mean of
    a group takes no gradient, and an entity is compared with its own group too.

    Args:
        student: `[N, d]`.
        teacher: `[N, D]`, taken as a constant.
        group: `[N]` number of each entity's group; those without an entity do not count.

    Returns:
        `[N]`, in float32 at least.
    """
    student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher.detach()))
    groups, member = group.unique(return_inverse=True)
    count = member.bincount(minlength=len(groups)).to(student)[:, None]

    def mean(x: Tensor) -> Tensor:
        return x.new_zeros(len(groups), x.shape[1]).index_add_(0, member, x.detach()) / count.to(x)

    return (_cosines(student, mean(student)) - _cosines(teacher, mean(teacher))).square().sum(1)


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """`[N, M]` cosines of `[N, d]` and `[M, d]`, in float32 at least."""
    kind = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # a topology that is nearly learned differs by less than half precision
        return F.normalize(x.to(kind), dim=1) @ F.normalize(y.to(kind), dim=1).T
