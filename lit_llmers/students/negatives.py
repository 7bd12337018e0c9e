"""Items drawn to compete with a target when the whole catalogue does not."""

import numpy as np
import torch
from torch import Tensor, nn

from lit_llmers.data.pairs import UnmetItems
from lit_llmers.errors import UserError


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
        weight = popularity.long() + 1
        weight[0] = 0
        self.register_buffer("log_q", (weight / weight.sum()).log(), persistent=False)
        self.register_buffer("cumulative", weight.cumsum(0), persistent=False)  # whole numbers: no precision rounds them

    def forward(self, number: int) -> Tensor:
        """`[number]` items 1..n, with replacement."""
        uniform = torch.rand(number, dtype=torch.float64, device=self.cumulative.device)
        return torch.searchsorted(self.cumulative, (uniform * self.cumulative[-1]).long(), right=True)


class UnmetDraw(nn.Module):
    """Draws items that a user has no training interaction with, as `UnmetItems` does, on the device of the step.

    An accelerator searches all pairs for every draw: it is fast at that, and would have to wait to learn which are suspects.
    With ml-1m's pairs and one core of a CPU a draw is 40 of the 155 ms of a step of 6,400 targets with 256 negatives, and would
    be 85 if all were searched for; 2 of the 280 ms of a step of 25,600 targets with one negative each.

    Args:
        met: `[E]` int64, `instead: [E]`, `free: [U]`: of `UnmetItems`.
        n_items: n.
        in_memory: where they are from, which draws on a CPU; None: every draw is searched for there too.
    """

    met: Tensor
    instead: Tensor
    free: Tensor

    def __init__(self, met: Tensor, instead: Tensor, free: Tensor, n_items: int, in_memory: UnmetItems | None = None) -> None:
        super().__init__()
        self.stride, self.in_memory = n_items + 1, in_memory
        self.register_buffer("met", met, persistent=False)
        self.register_buffer("instead", instead, persistent=False)
        self.register_buffer("free", free, persistent=False)

    @classmethod
    def of(cls, unmet: UnmetItems) -> "UnmetDraw":
        met, instead, free = (torch.from_numpy(each) for each in (unmet.met, unmet.instead, unmet.free))
        return cls(met, instead, free, unmet.n_items, unmet)

    def forward(self, user: Tensor, number: int) -> Tensor:
        """`[T, number]` items 1..n for the users `[T]`, with replacement."""
        if self.in_memory is not None and user.device.type == "cpu":
            random = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
            return torch.from_numpy(self.in_memory.draw(user.numpy(), number, random))
        uniform = torch.rand(len(user), number, dtype=torch.float64, device=user.device)
        item = (uniform * self.free[user][:, None]).long() + 1
        keys = item + (user * self.stride)[:, None]
        place = torch.searchsorted(self.met, keys).clamp_(max=len(self.met) - 1)
        return torch.where(self.met[place] == keys, self.instead[place], item)


def draw_uniform(target: Tensor, number: int, n_items: int) -> Tensor:
    """`[T, number]` items for each of the targets `[T]`, uniform over all items but the target itself.

    Raises:
        UserError: there is no other item.
    """
    if n_items < 2:
        raise UserError("The catalogue has one item, so none is left to be a negative. Take more data.")
    drawn = torch.randint(1, n_items, (len(target), number), device=target.device)  # 1..n-1
    return drawn + (drawn >= target[:, None])
