"""The item table that sequential backbones share."""

from torch import Tensor, nn

from lit_llmers.errors import UserError


def item_embedding(n_items: int, dim: int, init_std: float, item_init: Tensor | None) -> nn.Embedding:
    """Trainable `[n_items+1, dim]` table with a zero row for padding, normal or copied from `item_init`.

    The padding row gets no gradient as long as item 0 is never a candidate, so it stays zero.

    Raises:
        UserError: `item_init` has another shape.
    """
    table = nn.Embedding(n_items + 1, dim, padding_idx=0)
    if item_init is None:
        nn.init.normal_(table.weight, std=init_std)
    elif item_init.shape != table.weight.shape:
        raise UserError(
            f"item_init is {list(item_init.shape)}, but {n_items} items of dim {dim} (and the padding row) need "
            f"{list(table.weight.shape)}. Make it from the same dataset, with the same dim."
        )
    else:
        table.weight.data.copy_(item_init)
    table.weight.data[0] = 0
    return table
