"""Tables of vectors `[n+1, D]` or `[U, D]`, in which a row of zeros is no vector: padding, and who has no text."""

from typing import TypeVar

import numpy as np
from torch import Tensor

Table = TypeVar("Table", np.ndarray, Tensor)


def has_vector(table: Table) -> Table:
    """Which rows of a table `[N, D]` hold a vector: `[N]` bool, an array for an array and a tensor for a tensor."""
    filled: Table = (table != 0).any(1)
    return filled
