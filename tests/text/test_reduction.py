"""Tables cut to a model's width: LLMInit's official columns, PCA's properties, and users as means of their items."""

import numpy as np
import pytest

from lit_llmers.errors import UserError
from lit_llmers.text.reduction import mean_of_histories, reduce_table


def table(n=30, width=12, seed=0):
    values = np.random.default_rng(seed).normal(size=(n + 1, width)) * np.arange(1, width + 1)
    values[0] = 0
    return values.astype(np.float32)


POPULARITY = np.arange(31)
DIM = "stages.a.model.dim"


def test_golden_llminit_columns_and_users(golden):
    z = {key: value.numpy() for key, value in golden("llminit/case_a").items()}
    k, given, degrees = int(z["hp.K"]), z["in.llm_table"], z["in.item_degrees"]
    uniform = reduce_table(given, k, "uniform", degrees, 0, DIM)
    variance = reduce_table(given, k, "variance", degrees, 0, DIM)
    np.testing.assert_array_equal(uniform[1:], given[1:, z["out.columns_uniform"]].astype(np.float32))
    np.testing.assert_array_equal(variance[1:], given[1:, z["out.columns_variance"]].astype(np.float32))
    met = z["in.interactions"]
    users = mean_of_histories(given[:, z["out.columns_variance"]], np.argwhere(met > 0), len(met))
    np.testing.assert_allclose(users[1:], z["out.user_init_variance"][1:], rtol=1e-6)


def test_random_columns_are_columns_each_once_and_of_the_seed():
    values = table()
    picked = reduce_table(values, 5, "random", POPULARITY, 3, DIM)
    columns = [int(np.flatnonzero((values == column[:, None]).all(0))[0]) for column in picked.T]
    assert len(set(columns)) == 5
    np.testing.assert_array_equal(picked, reduce_table(values, 5, "random", POPULARITY, 3, DIM))
    assert not np.array_equal(picked, reduce_table(values, 5, "random", POPULARITY, 4, DIM))


def test_pca_is_centred_uncorrelated_and_keeps_all_distances_at_full_width():
    values = table()
    whole = reduce_table(values, 12, "pca", POPULARITY, 0, DIM)
    assert not whole[0].any()
    np.testing.assert_allclose(whole[1:].mean(0), 0, atol=1e-5)
    covariance = np.cov(whole[1:].T)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-3)

    def distances(x):
        return np.linalg.norm(x[1:, None] - x[None, 1:], axis=2)

    np.testing.assert_allclose(distances(whole), distances(values), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("how", "dim"), [("pca", 13), ("uniform", 13), ("random", 20)])
def test_more_columns_than_there_are_is_refused(how, dim):
    with pytest.raises(UserError, match=f"cannot be cut to {dim} columns.*Set stages.a.model.dim=12 or less, or make"):
        reduce_table(table(), dim, how, POPULARITY, 0, DIM)


def test_wider_vectors_are_no_cure_for_few_items():
    with pytest.raises(UserError, match=r"5 item vectors of width 12 .* Set stages.a.model.dim=5 or less\.$"):
        reduce_table(table()[:6], 8, "pca", POPULARITY, 0, DIM)


@pytest.mark.parametrize("how", ["pca", "random", "uniform", "variance"])
def test_items_without_a_vector_have_none_and_change_no_other(how):
    values, silent = table(), np.array([3, 28, 29, 30])  # the three most popular ones among them
    values[silent] *= 0
    kept = np.setdiff1d(np.arange(31), silent)
    reduced = reduce_table(values, 5, how, POPULARITY, 0, DIM)
    assert not reduced[silent].any()
    np.testing.assert_array_equal(reduced[kept], reduce_table(values[kept], 5, how, POPULARITY[kept], 0, DIM))


def test_a_user_is_the_mean_of_his_items_and_zero_without_any():
    values = table(4, 2)
    values[2] = 0  # counts for nobody
    users = mean_of_histories(values, np.array([[0, 1], [0, 2], [0, 3], [1, 2], [2, 4], [2, 4]]), 3)
    np.testing.assert_allclose(users, [(values[1] + values[3]) / 2, [0, 0], values[4]], rtol=1e-6)
