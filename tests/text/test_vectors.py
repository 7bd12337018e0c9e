"""Fewer directions and one common size for vectors of any encoder."""

import numpy as np
import pytest

from lit_llmers.errors import UserError
from lit_llmers.text.vectors import Projection


def vectors(rows: int = 60, width: int = 8) -> np.ndarray:
    random = np.random.default_rng(0)
    spread = np.array([5, 3, 1, 0.2, 0.1, 0.1, 0.1, 0.1])[:width]
    return (random.normal(size=(rows, width)) * spread + random.normal(size=width)).astype(np.float32)


def test_without_reduction_only_the_size_changes():
    given = vectors()
    found = Projection.fit(given, None, 0)(given)
    assert np.mean(found**2) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(found * (given[0, 0] / found[0, 0]), given, rtol=1e-4)


def test_principal_components_without_whitening():
    given = vectors()
    found = Projection.fit(given, 3, 0)(given)
    assert found.dtype == np.float32
    assert np.mean(found**2) == pytest.approx(1, rel=1e-5)
    expected = np.linalg.svd(given - given.mean(0), compute_uv=False)[:3]
    own = np.linalg.svd(found, compute_uv=False)
    np.testing.assert_allclose(own / own[0], expected / expected[0], rtol=1e-4)  # whitening would make them equal
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)


def test_whitened_components_have_one_variance_and_say_nothing_of_each_other():
    given = vectors()
    found = Projection.fit(given, 5, 0, whiten=True)(given)
    assert np.mean(found**2) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(np.cov(found.T), np.eye(5) * 60 / 59, atol=1e-3)
    plain = Projection.fit(given, 5, 0)(given)
    np.testing.assert_allclose(found / found.std(0), plain / plain.std(0), rtol=1e-3, atol=1e-4)  # the same ways


@pytest.mark.parametrize(("rows", "directions"), [(60, 8), (5, 4)])
def test_all_components_are_those_there_are(rows, directions):
    given = vectors(rows)
    found = Projection.fit(given, "all", 0)(given)
    assert found.shape == (rows, directions)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    ratio = np.linalg.norm(found[1:] - found[:-1], axis=1) / np.linalg.norm(given[1:] - given[:-1], axis=1)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_distances_stay_up_to_one_factor_and_other_rows_go_the_same_way():
    given = vectors()
    project = Projection.fit(given, 8, 0)
    found = project(given)
    ratio = np.linalg.norm(found[1:] - found[:-1], axis=1) / np.linalg.norm(given[1:] - given[:-1], axis=1)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    np.testing.assert_allclose(project(given[5:9]), found[5:9], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("whiten", [False, True])
def test_equal_rows_stay_equal(whiten):
    """Items of the same text tie in a ranking; rounding would put one of them first."""
    given = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    given[200:] = given[:100]
    found = Projection.fit(given, "all", 0, whiten)(given)
    np.testing.assert_array_equal(found[200:], found[:100])


def test_a_row_of_zeros_stays_so():
    given = vectors()
    project = Projection.fit(given, 2, 0)
    found = project(np.concatenate([np.zeros((1, 8), np.float32), given[:2]]))
    assert not found[0].any()
    assert found[1:].all()


def test_more_directions_than_there_are():
    with pytest.raises(UserError, match="reduce=9 is more than 60 texts with vectors of width 8 can give. Choose reduce=8"):
        Projection.fit(vectors(), 9, 0)


@pytest.mark.parametrize("rows", [40, 400])  # of which scikit-learn decomposes the one, and the covariances of the other
def test_of_few_distinct_texts_only_what_differs_is_whitened(rows):
    given = vectors(5, 8) + 20
    project = Projection.fit(given[np.arange(rows) % 5], "all", 0, whiten=True)
    assert project(given).shape == (5, 4)
    assert np.abs(project(given + 0.1)).max() < 10
    assert Projection.fit(given[np.arange(rows) % 5], 4, 0, whiten=True)(given).shape == (5, 4)
    with pytest.raises(UserError, match=f"reduce=5 .*than the 4 in which {rows} texts .* differ. Lower it"):
        Projection.fit(given[np.arange(rows) % 5], 5, 0, whiten=True)


def test_texts_that_are_all_alike_cannot_be_whitened():
    with pytest.raises(UserError, match="than the 0 in which 3 texts .* differ. Lower it, or drop whiten"):
        Projection.fit(np.ones((3, 8), np.float32), "all", 0, whiten=True)
