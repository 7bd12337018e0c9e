"""Items drawn to compete with a target when the whole catalogue does not."""

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

    Each draw takes a binary search over all training pairs. With ml-1m's number of them and one core that is 2 of the 710 ms of
    a step of `scale=paper` (25,600 targets, one negative each), 180 of the 470 ms of a step of 6,400 targets with 256.

    Args:
        rank: `[E]` int64, `first: [U]`, `free: [U]`: of `UnmetItems`.
        n_items: n.
    """

    rank: Tensor
    first: Tensor
    free: Tensor

    def __init__(self, rank: Tensor, first: Tensor, free: Tensor, n_items: int) -> None:
        super().__init__()
        self.stride = n_items + 1
        self.register_buffer("rank", rank, persistent=False)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("free", free, persistent=False)

    @classmethod
    def of(cls, unmet: UnmetItems) -> "UnmetDraw":
        rank, first, free = (torch.from_numpy(each) for each in (unmet.rank, unmet.first, unmet.free))
        return cls(rank, first, free, unmet.n_items)

    def forward(self, user: Tensor, number: int) -> Tensor:
        """`[T, number]` items 1..n for the users `[T]`, with replacement."""
        uniform = torch.rand(len(user), number, dtype=torch.float64, device=user.device)
        nth = (uniform * self.free[user][:, None]).long()  # of the items that the user has not met
        place = torch.searchsorted(self.rank, nth + (user * self.stride)[:, None], right=True)
        return nth + 1 + place - self.first[user][:, None]


def draw_uniform(target: Tensor, number: int, n_items: int) -> Tensor:
    """`[T, number]` items for each of the targets `[T]`, uniform over all items but the target itself.

    Raises:
        UserError: there is no other item.
    """
    if n_items < 2:
        raise UserError("The catalogue has one item, so none is left to be a negative. Take more data.")
    drawn = torch.randint(1, n_items, (len(target), number), device=target.device)  # 1..n-1
    return drawn + (drawn >= target[:, None])
