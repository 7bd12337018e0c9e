"""Text vectors without a language model: TF-IDF and a truncated SVD (latent semantic analysis)."""

from collections.abc import Sequence

import numpy as np

from lit_llmers.errors import UserError


def tfidf_svd(texts: Sequence[str], dim: int, seed: int = 0) -> np.ndarray:
    """Encode each text by the strongest `dim` directions of the texts' TF-IDF matrix.

    Terms are single words and pairs of neighbours, in lower case; a term's count enters as 1 + log(count), and rows of
    the TF-IDF matrix have unit length (scikit-learn's definitions). A text without any word of two or more characters
    gets a zero row. The rest is scaled by one common factor, so that the mean square of their entries is 1.

    Args:
        texts: n texts, the text of item i at i-1.
        dim: width of the vectors.
        seed: of the randomised decomposition; equal arguments give equal vectors.

    Returns:
        `[n+1, dim]` float32; row 0 is padding and zero.

    Raises:
        UserError: there is no text at all, a single word, or too little text for `dim` directions.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
    try:
        terms = vectoriser.fit_transform(texts)  # [n, terms]
    except ValueError as error:
        raise UserError(
            f"The {len(texts)} item texts hold no word. Name text columns in the stage's fields, or encode other data."
        ) from error
    if terms.shape[1] < 2:  # each text is that word, once or more, or none
        raise UserError(
            f"The {len(texts)} item texts hold no word but '{vectoriser.get_feature_names_out()[0]}', which tells none from "
            "another: words have two characters or more. Name other text columns in the stage's fields."
        )
    filled = np.diff(terms.indptr) > 0
    possible = min(int(filled.sum()), terms.shape[1])
    if dim > possible:
        raise UserError(
            f"dim={dim} is more than these texts can give: {int(filled.sum())} of {len(texts)} items have text, with "
            f"{terms.shape[1]} different terms. Set text.dim={possible} or less."
        )
    table = np.zeros((len(texts) + 1, dim), dtype=np.float32)
    vectors = TruncatedSVD(dim, n_iter=5, random_state=seed).fit_transform(terms[filled])
    table[1:][filled] = vectors / np.sqrt(np.mean(np.square(vectors)))
    return table
