"""The item table that sequential backbones share."""

from torch import Tensor, nn

from lit_llmers.errors import UserError
from lit_llmers.text.tables import has_vector


def item_embedding(n_items: int, dim: int, init_std: float, sparse: bool = False) -> nn.Embedding:
    """Trainable, normal `[n_items+1, dim]` table with a zero row for padding; `sparse`: with gradients of the rows read alone.

    The padding row gets no gradient as long as item 0 is never a candidate, so it stays zero.
    """
    table = nn.Embedding(n_items + 1, dim, padding_idx=0, sparse=sparse)
    nn.init.normal_(table.weight, std=init_std)
    table.weight.data[0] = 0
    return table


def copy_table(table: Tensor, values: Tensor, what: str = "items") -> None:
    """Copy initial vectors into a table; the padding row of items stays zero.

    A row of zeros is no vector: that item or user keeps its random start, as one of whom nothing is known. From zero it would
    score the same for everyone, and all that have no text would start as one and the same.

    Raises:
        UserError: they have another shape.
    """
    if values.shape != table.shape:
        raise UserError(
            f"The initial table of the {what} is {list(values.shape)}, but the model needs {list(table.shape)}. Cut it to the "
            "model's width with initial.reduce."
        )
    filled = has_vector(values)
    table.data[filled] = values[filled].to(table)
    if what == "items":
        table.data[0] = 0
