"""Alignment of two sets of vectors that mean the same: contrast, soft targets, equal distributions, equal directions.

Contrast lets an anchor find its positive among others; one value per anchor, in nats.
Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018 (arXiv 1807.03748), eq. 4,
with the density ratio `f(x, y) = e^(sim(x, y) / temperature)` of the methods that use it here. Both sides get a gradient
everywhere: who aligns with a constant gives one.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_llmers.losses.task import cross_entropy


def info_nce_among(
    anchor: Tensor,
    candidates: Tensor,
    own: Tensor | None = None,
    excluded: Tensor | None = None,
    *,
    temperature: float | Tensor,
    cosine: bool = True,
    weight: Tensor | None = None,
) -> Tensor:
    """`-log(f(x, y+) / sum over the candidates of f(x, y))`: all candidates but its positive are an anchor's negatives.

    SGL's contrast takes all users (or items) of the other view as candidates, with `own` the users of the batch; CL4SRec's
    takes all views of the batch, and excludes the anchor from its own candidates. Without `excluded` memory does not grow
    with anchors x candidates.

    Args:
        anchor: `[B, d]`.
        candidates: `[N, d]`.
        own: `[B]` row of each anchor's positive among the candidates; None: anchor b has candidate b.
        excluded: `[B]` row of a candidate that is none for that anchor.
        temperature: divides the similarities.
        cosine: similarity is the cosine; otherwise the dot product.
        weight: `[B]` factors of the losses, without gradient: cheaper here than on the result, see `cross_entropy`.

    Returns:
        `[B]`, in float32 at least; 0 for a single anchor among itself.
    """
    kind = torch.promote_types(torch.promote_types(anchor.dtype, candidates.dtype), torch.float32)
    with torch.autocast(anchor.device.type, enabled=False):  # over a temperature, half precision would be tenths of nats off
        anchor, candidates = anchor.to(kind), candidates.to(kind)
        if cosine:
            anchor, candidates = F.normalize(anchor, dim=-1), F.normalize(candidates, dim=-1)
        anchor = anchor / temperature
        own = torch.arange(len(anchor), device=anchor.device) if own is None else own
        if excluded is None:
            return cross_entropy(anchor, candidates, own, weight)
        logits = (anchor @ candidates.T).scatter(1, excluded[:, None], -torch.inf)
        losses = F.cross_entropy(logits, own, reduction="none")
        return losses if weight is None else losses * weight


def soft_clip(x: Tensor, y: Tensor, *, temperature: float | Tensor) -> Tensor:
    """CLIP's contrast in both directions, where items that are alike on both sides are not pushed apart.

    Source: LLMEmb, "LLMEmb: Large Language Model Can Be a Good Embedding Generator for Sequential Recommendation", AAAI 2025
    (arXiv 2409.19925), as its official code computes it; also LLM-ESR's (arXiv 2405.20646) option `cl`. With dot products,
    `S = x y^T / tau` and the soft targets `P = softmax(tau / 2 (x x^T + y y^T))` the mean over rows is half of
    `H(P, softmax(S)) + H(P^T, softmax(S^T))`. The targets pass a gradient on too.

    Args:
        x, y: `[B, d]`, row by row of the same item.
        temperature: tau, divides the dot products and multiplies those of the targets.

    Returns:
        `[B]`, the share of row i of P: `1/2 sum_j P_ij (logsumexp_j S_ij + logsumexp_i S_ij - 2 S_ij)`.
    """
    with torch.autocast(x.device.type, enabled=False):  # in half precision the products of long vectors would be nats off
        x, y = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in (x, y))
        logits = x @ y.T / temperature  # [B, B]
        target = ((x @ x.T + y @ y.T) * (temperature / 2)).softmax(1)
        return (logits.logsumexp(1) + target.mv(logits.logsumexp(0))) / 2 - (target * logits).sum(1)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """`1 - cos(x, y)` of `[..., d]` and `[..., d]`: `[...]`, in [0, 2]."""
    return 1 - F.cosine_similarity(x, y, dim=-1)


def multi_kernel_mmd(x: Tensor, y: Tensor, powers: Sequence[int] = (-3, -2, -1, 0, 1)) -> Tensor:
    """How different two distributions are: the unbiased estimate of the squared maximum mean discrepancy.

    Source: PAD, "PAD: Towards Effective and Efficient Pre-train-Align-Disentangle Paradigm", SIGIR 2025 (arXiv 2412.04107);
    Long et al., "Learning Transferable Features with Deep Adaptation Networks", ICML 2015 (arXiv 1502.02791). With K the sum
    of the kernels `e^(-|a - b|^2 / (2 2^p m))`, m the mean of all squared distances, a constant:
    `(sum_{i != j} K(x_i, x_j) + K(y_i, y_j)) / (n (n - 1)) - 2 / n^2 sum_{i, j} K(x_i, y_j)`.
    The official code adds the constant `2 / (n - 1)`.

    Args:
        x, y: `[n, d]`; they are no pairs.
        powers: p of each kernel.

    Returns:
        a scalar, 0 in expectation for equal distributions and 0 for single vectors.
    """
    if len(x) < 2:
        return (x - x.detach()).sum() + (y - y.detach()).sum()
    return _MultiKernelMMD.apply(x, y, tuple(sorted(powers, reverse=True)))


class _MultiKernelMMD(torch.autograd.Function):
    """One exponential serves all kernels, the next narrower being its square; the gradient is made while they are in memory.

    With z both sets and G the weighted slopes of K at the squared distances, `d z = 4 (rowsum(G) z - G z)`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, powers: tuple[int, ...]) -> Tensor:
        n, of_pairs, across = len(x), 1 / (len(x) * (len(x) - 1)), -1 / len(x) ** 2
        with torch.autocast(x.device.type, enabled=False):
            z = torch.cat([x, y]).to(torch.promote_types(x.dtype, torch.float32))
            square = z.square().sum(1)
            distance = torch.addmm(square, z, z.T, alpha=-2).add_(square[:, None]).clamp_(min=0).fill_diagonal_(0)
            mean = distance.mean().clamp(min=torch.finfo(z.dtype).tiny)
            kernel = distance.mul_(-(0.5 ** (powers[0] + 1)) / mean).exp_()  # of the widest, in place of the distance
            total, slope = kernel.clone(), kernel * 0.5 ** powers[0]
            for wider, power in pairwise(powers):
                for _ in range(wider - power):
                    kernel.square_()
                total.add_(kernel)
                slope.add_(kernel, alpha=0.5**power)
            within = total[:n, :n].sum() + total[n:, n:].sum() - 2 * n * len(powers)  # without i = j
            loss = within * of_pairs + 2 * across * total[:n, n:].sum()
            for rows in (slice(n), slice(n, None)):
                for columns in (slice(n), slice(n, None)):
                    slope[rows, columns].mul_(of_pairs if rows == columns else across)
            gradient = (slope.sum(1, keepdim=True) * z).sub_(slope @ z).mul_(-2 / mean)
        ctx.save_for_backward(*gradient.to(x.dtype).split(n))
        return loss

    @staticmethod
    def backward(ctx, cotangent: Tensor):
        of_x, of_y = ctx.saved_tensors
        return of_x * cotangent, of_y * cotangent, None
