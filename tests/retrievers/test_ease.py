"""EASE: compared with irspack, the optimality conditions, and the error of a float32 inverse."""

import importlib.util
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_data import amazon_office, catalog_of, dense, movielens, random_interactions

import retrievers
from retrievers import Interactions
from retrievers.recommenders import ease, item_item
from retrievers.recommenders.ease import column_error, solve
from retrievers.recommenders.item_item import as_float32, ease_weights, gram, inverse, weights_from_inverse

N = 24
CATALOG, DATA = catalog_of(N), random_interactions(N, 60)


def largest_column(off: np.ndarray) -> float:
    return float(np.linalg.norm(off, axis=0).max())


@cache
def in_float64(load, regularization: float) -> np.ndarray:
    """The weights that a real data set gives in float64, for all tests that compare others with them."""
    weights = ease_weights(gram(load().matrix()), regularization)
    weights.flags.writeable = False
    return weights


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("irspack") is None, reason="irspack is not installed")
@pytest.mark.parametrize("load", [movielens, amazon_office])
def test_ease_is_irspack_s(load):
    from irspack import DenseSLIMRecommender

    data = load()
    theirs = DenseSLIMRecommender(data.matrix(), reg=50.0).learn()._W
    ours = in_float64(load, 50.0)
    assert np.abs(theirs).max() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("load", [movielens, amazon_office])
def test_float32_takes_half_the_memory_and_is_nearly_the_same_on_real_data(load):
    data = load()
    x, n = data.matrix(), data.documents
    single = as_float32(ease_weights(gram(x, np.float32), 50.0))
    assert single.dtype == np.float32 and single.base.nbytes == 4 * n * n
    np.testing.assert_allclose(single, in_float64(load, 50.0), atol=1e-5)


def test_float32_by_its_parameter(monkeypatch):
    double, single = (
        retrievers.open("ease", CATALOG, None, DATA, regularization=5.0, precision=precision)
        for precision in ("float64", "float32")
    )
    assert double.fingerprint != single.fingerprint and dense(single).dtype == np.float32
    np.testing.assert_allclose(dense(single), dense(double), atol=1e-5)
    assert not np.array_equal(dense(single), dense(double))
    clipped = retrievers.open("ease", CATALOG, None, DATA, regularization=5.0, precision="float32", nonnegative=True)
    np.testing.assert_array_equal(dense(clipped), np.maximum(dense(single), 0))
    monkeypatch.setattr(item_item, "_available", lambda: 5 * N * N / 1e9)
    retrievers.open("ease", CATALOG, None, DATA, regularization=5.0, precision="float32")
    with pytest.raises(ValueError, match="are available"):
        retrievers.open("ease", CATALOG, None, DATA, regularization=5.0)


@given(st.integers(3, 30), st.integers(3, 60), st.floats(0.1, 1000), st.floats(-7, -4), st.integers(0, 9))
def test_the_error_of_an_inverse_is_measured(n, users, regularization, magnitude, seed):
    rng = np.random.default_rng(seed)
    data = random_interactions(n, users, seed)
    true = inverse(gram(data.matrix()), regularization)
    noise = rng.standard_normal((n, n)) * 10**magnitude * true.diagonal().min()
    off = true + noise + noise.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ease, "USERS_AT_A_TIME", 7)
        found = column_error(data.matrix(), off, regularization)
    assert found == pytest.approx(largest_column(weights_from_inverse(off) - weights_from_inverse(true)), rel=0.6)


def test_an_error_of_the_diagonal_moves_the_whole_column():
    popular = Interactions.from_sequences(60, [[0, 1 + user % 59] for user in range(200)])
    true = inverse(gram(popular.matrix()), 1.0)
    off = true.copy()
    off[0, 0] *= 1 + 1e-5
    found = column_error(popular.matrix(), off, 1.0)
    expected = largest_column(weights_from_inverse(off) - weights_from_inverse(true))
    assert expected > 5e-5 and found == pytest.approx(expected, rel=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("load", [movielens, amazon_office])
@pytest.mark.parametrize("regularization", [1.0, 50.0])
def test_the_error_of_float32_on_real_data(load, regularization):
    data = load()
    single = inverse(gram(data.matrix(), np.float32), regularization)
    found = column_error(data.matrix(), single, regularization)
    off = weights_from_inverse(single) - in_float64(load, regularization)
    assert largest_column(off) == pytest.approx(found, rel=0.5) and np.abs(off).max() <= found


def test_a_large_catalogue_is_fitted_in_float32_where_that_is_measured_to_do(monkeypatch):
    def fitted_as(**params):
        found = retrievers.open("ease", CATALOG, None, DATA, regularization=5.0, **params)
        return found.report, dense(found)

    report, double = fitted_as()
    assert report["precision"] == "float64" and "error" not in report
    _, single = fitted_as(precision="float32")
    monkeypatch.setattr(ease, "FLOAT64_UP_TO", N - 1)
    report, found = fitted_as()
    assert report["precision"] == "float32" and 0 < report["error"] <= 1e-5
    np.testing.assert_array_equal(found, single)
    assert largest_column(found - double) <= 2 * report["error"]
    monkeypatch.setattr(ease, "TOLERANCE", report["error"] / 2)
    report, found = fitted_as()
    assert report["precision"] == "float64"
    np.testing.assert_array_equal(found, double)


@pytest.mark.parametrize("regularization", [1e-4, 1e-9])  # float32 is inexact, or finds a singular matrix.
def test_where_float32_does_not_do(regularization, monkeypatch, caplog):
    alike = Interactions.from_sequences(6, [[0, 1, 2 + user % 4] for user in range(90)])
    monkeypatch.setattr(ease, "FLOAT64_UP_TO", 1)
    found, how = solve(alike.matrix(), regularization)
    assert how == {"precision": "float64"}
    np.testing.assert_array_equal(found, ease_weights(gram(alike.matrix()), regularization))
    if regularization < 1e-8:
        with pytest.raises(ValueError, match="singular in float32: set float64, or raise"):
            solve(alike.matrix(), regularization, "float32")
        return
    found, how = solve(alike.matrix(), regularization, "float32")
    assert found.dtype == np.float32 and how["error"] > 1e-3 and "the error of float32 is" in caplog.text


@given(st.integers(2, 14), st.integers(3, 40), st.floats(0.1, 1000), st.integers(0, 9))
def test_ease_is_a_stationary_point(n, users, regularization, seed):
    x = (np.random.default_rng(seed).random((users, n)) < 0.3).astype(float)
    b = ease_weights(x.T @ x, regularization)
    gradient = -x.T @ (x - x @ b) + regularization * b
    np.fill_diagonal(gradient, 0)  # The diagonal is fixed at 0.
    assert np.abs(gradient).max() < 1e-8 and not b.diagonal().any()
