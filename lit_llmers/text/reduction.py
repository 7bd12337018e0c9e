"""From wide text vectors to a table as narrow as a model's embeddings."""

import numpy as np

from lit_llmers.errors import UserError
from lit_llmers.text.tables import has_vector

POPULAR = 0.2  # share of the items with a vector whose columns' variance is looked at


def reduce_table(table: np.ndarray, dim: int, how: str, popularity: np.ndarray, seed: int, where: str) -> np.ndarray:
    """Cut a table to `dim` columns. Items without a vector have no part in which, and none in the result.

    `pca`: the directions of largest variance, centred. The others pick columns, as LLMInit ("LLMInit: A Free Lunch from Large
    Language Models for Selective Initialization of Recommendation", official code DavidZWZ/LLMInit): `random` ones,
    `uniform`ly spaced ones, or those of the largest `variance` among the fifth of the items that interact most, in their
    order. We differ in that `random` columns are different ones, where the code may draw one twice.

    Args:
        table: `[n+1, D]`, row 0 is padding, a row of zeros no vector.
        dim: width of the result.
        how: `pca`, `random`, `uniform` or `variance`.
        popularity: `[n+1]` training interactions of each item.
        seed: of `random` and of the randomised decomposition.
        where: the key of `dim`, for the error message.

    Returns:
        `[n+1, dim]` float32, rows of zeros where there is no vector.

    Raises:
        UserError: there are fewer than `dim` columns, or items with a vector.
    """
    filled, width = np.flatnonzero(has_vector(table)), table.shape[1]
    items = table[filled]
    possible = min(width, len(items)) if how == "pca" else width
    if dim > possible:
        raise UserError(
            f"{len(items)} item vectors of width {width} cannot be cut to {dim} columns by {how}: {possible} is the most. Set "
            f"{where}={possible} or less{', or make the vectors wider (text.dim)' if width == possible else ''}."
        )
    reduced = np.zeros((len(table), dim), np.float32)
    if how == "pca":
        from sklearn.decomposition import PCA

        reduced[filled] = PCA(dim, random_state=seed).fit_transform(items)
        return reduced
    if how == "random":
        columns = np.sort(np.random.default_rng(seed).choice(width, dim, replace=False))
    elif how == "uniform":
        columns = np.arange(dim) * (width // dim)
    else:
        popular = np.argsort(-popularity[filled], kind="stable")[: max(2, int(POPULAR * (1 + len(items))))]
        columns = np.sort(np.argsort(-items[popular].var(0, ddof=1), kind="stable")[:dim])
    reduced[filled] = items[:, columns]
    return reduced


def mean_of_histories(table: np.ndarray, pairs: np.ndarray, n_users: int) -> np.ndarray:
    """`[U, D]` means of the users' training items that have a vector (LLMInit's users: `D_u^-1 A E`); zero without any.

    Args:
        table: `[n+1, D]`, a row of zeros is no vector.
        pairs: `[E, 2]` user 0..U-1 and item 1..n of every training interaction.
        n_users: U.
    """
    from scipy.sparse import csr_matrix

    pairs = pairs[has_vector(table)[pairs[:, 1]]]
    met = csr_matrix((np.ones(len(pairs), np.float32), (pairs[:, 0], pairs[:, 1])), shape=(n_users, len(table)))
    count = np.maximum(np.asarray(met.sum(1)), 1)  # [U, 1]
    means: np.ndarray = met @ table / count
    return means.astype(np.float32)
