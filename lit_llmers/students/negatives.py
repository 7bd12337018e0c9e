"""Items drawn to compete with a target when the whole catalogue does not."""

import torch
from torch import Tensor, nn


class PopularityDraw(nn.Module):
    """Draws items in proportion to 1 + their training interactions, so that no item is out of reach.

    Args:
        popularity: `[n+1]` training interactions per item; index 0 is padding.

    Attributes:
        log_q: `[n+1]` log-probability of each item in one draw; -inf for the padding.
    """

    log_q: Tensor
    cumulative: Tensor

    def __init__(self, popularity: Tensor) -> None:
        super().__init__()
        weight = popularity.double() + 1
        weight[0] = 0
        share = weight / weight.sum()
        self.register_buffer("log_q", share.log().float(), persistent=False)
        self.register_buffer("cumulative", share.cumsum(0), persistent=False)

    def forward(self, number: int) -> Tensor:
        """`[number]` items 1..n, with replacement."""
        uniform = torch.rand(number, dtype=torch.float64, device=self.cumulative.device)
        return torch.searchsorted(self.cumulative, uniform, right=True).clamp_(1, len(self.cumulative) - 1)


def draw_uniform(target: Tensor, number: int, n_items: int) -> Tensor:
    """`[T, number]` items for each of the targets `[T]`, uniform over all items but the target itself."""
    drawn = torch.randint(1, n_items, (len(target), number), device=target.device)  # 1..n-1
    return drawn + (drawn >= target[:, None])
