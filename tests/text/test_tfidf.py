"""TF-IDF vectors against the formula written out, and their contract."""

import numpy as np
import pytest

from lit_llmers.errors import UserError
from lit_llmers.text.tfidf import tfidf_svd

SPACE = ["space war in the stars", "war of the stars", "stars and space ships", "ships in space war"]
LOVE = ["a love story in paris", "paris love letters", "a love letter story", "story of love in paris"]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_texts_about_the_same_are_near():
    table = tfidf_svd(SPACE + LOVE, 2)[1:]
    near = [cosine(table[i], table[j]) for i in range(4) for j in range(i)]
    far = [cosine(table[i], table[j]) for i in range(4) for j in range(4, 8)]
    assert min(near) > max(far)


def test_inner_products_are_those_of_the_formula_up_to_one_factor():
    """With as many directions as texts nothing is cut away, so the Gram matrix is the one computed by hand."""
    texts = ["star star war", "war story", "story star star star"]
    terms = {
        "star": [2, 0, 3], "war": [1, 1, 0], "story": [0, 1, 1],
        "star star": [1, 0, 2], "star war": [1, 0, 0], "war story": [0, 1, 0], "story star": [0, 0, 1],
    }  # fmt: skip
    counts = np.array(list(terms.values()), dtype=float).T  # [texts, terms]
    sublinear = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0)
    idf = np.log((1 + 3) / (1 + (counts > 0).sum(0))) + 1
    rows = sublinear * idf
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table = tfidf_svd(texts, 3)[1:]
    expected = rows @ rows.T  # diagonal 1: the scale makes the mean square of the entries 1, so |row|^2 = dim
    np.testing.assert_allclose(table @ table.T, 3 * expected, atol=1e-5)


def test_shape_scale_padding_and_determinism():
    texts = [*SPACE, "", "  ", "!?", "a", *LOVE]
    table = tfidf_svd(texts, 5, seed=1)
    assert table.shape == (13, 5)
    assert table.dtype == np.float32
    empty = ~table.any(axis=1)
    assert np.flatnonzero(empty).tolist() == [0, 5, 6, 7, 8]
    assert np.mean(table[~empty] ** 2) == pytest.approx(1, rel=1e-5)
    assert np.array_equal(table, tfidf_svd(texts, 5, seed=1))


def test_case_does_not_matter():
    np.testing.assert_allclose(tfidf_svd([text.upper() for text in SPACE], 2), tfidf_svd(SPACE, 2))


def test_more_directions_than_the_texts_have():
    with pytest.raises(UserError, match=r"dim=5 is more .* 4 of 5 items have text.* Set text.dim=4 or less"):
        tfidf_svd([*SPACE, ""], 5)


@pytest.mark.parametrize("texts", [[], ["", " "], ["a b c"]])
def test_no_text_at_all(texts):
    with pytest.raises(UserError, match="hold no word"):
        tfidf_svd(texts, 2)


def test_a_single_word_tells_no_text_from_another():
    with pytest.raises(UserError, match="hold no word but 'item', which tells none from another"):
        tfidf_svd(["item A", "item B", ""], 1)
