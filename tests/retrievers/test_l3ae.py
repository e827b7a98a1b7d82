"""L3AE: the optimality conditions, its two limiting cases, and everything from texts to ranks."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_data import random_interactions

import retrievers
from retrievers import Catalog, Interactions, Query
from retrievers.recommenders.item_item import ease_weights
from retrievers.recommenders.l3ae import Params, l3ae_weights

N = 24
TOPICS = ["espresso machine for coffee", "garden hose to water plants", "running shoes for rocky trails"]


@pytest.fixture(scope="module")
def catalog():
    return Catalog.from_records({"id": f"d{i}", "text": f"{TOPICS[i % 3]}, model {i}"} for i in range(N))


@given(
    st.integers(2, 14),
    st.integers(3, 40),
    st.floats(0, 300),
    st.floats(0.01, 300),
    st.floats(0.1, 100),
    st.integers(0, 9),
)
def test_it_is_a_stationary_point(n, users, lx, le, text, seed):
    rng = np.random.default_rng(seed)
    x = (rng.random((users, n)) < 0.3).astype(float)
    e = rng.normal(size=(n, 5))
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    c = ease_weights(e @ e.T, text)
    b = l3ae_weights(x.T @ x, c, lx, le)
    # This is half the gradient of ||X - XB||^2 + λx ||B||^2 + λe ||B - C||^2.
    gradient = -x.T @ (x - x @ b) + lx * b + le * (b - c)
    np.fill_diagonal(gradient, 0)  # The diagonal is fixed at 0.
    assert np.abs(gradient).max() < 1e-8 and not b.diagonal().any()


@given(st.integers(2, 12), st.floats(0.1, 100), st.integers(0, 9))
def test_no_step_away_is_better(n, le, seed):
    rng = np.random.default_rng(seed)
    x = (rng.random((20, n)) < 0.4).astype(float)
    c = rng.normal(size=(n, n))
    np.fill_diagonal(c, 0)

    def objective(b):
        return ((x - x @ b) ** 2).sum() + 3 * (b**2).sum() + le * ((b - c) ** 2).sum()

    best = l3ae_weights(x.T @ x, c, 3.0, le)
    for _ in range(5):
        step = rng.normal(size=(n, n)) * 0.01
        np.fill_diagonal(step, 0)
        assert objective(best + step) > objective(best)


@pytest.mark.slow
def test_without_fusion_it_is_ease_and_with_much_of_it_the_texts(catalog):
    data = random_interactions(N, 60)
    x = data.matrix().toarray().astype(float)
    c = np.random.default_rng(0).normal(size=(N, N))
    np.fill_diagonal(c, 0)
    np.testing.assert_array_equal(l3ae_weights(x.T @ x, c, 7.0, 0.0), ease_weights(x.T @ x, 7.0))
    np.testing.assert_allclose(l3ae_weights(x.T @ x, c, 7.0, 1e9), c, atol=1e-5)
    ease = retrievers.open("ease", catalog, None, data, regularization=7)
    same = retrievers.open("l3ae", catalog, None, data, regularization=7, fusion=0, text_regularization=1)
    np.testing.assert_array_equal(same.model._weights, ease.model._weights)


def test_a_document_that_nobody_chose_is_found_by_its_text(catalog):
    whole = random_interactions(N, 60)
    chosen = [[row for row in whole.sequence(u) if row != 6] for u in range(60)]
    data = Interactions.from_sequences(N, chosen)
    params = {"regularization": 1, "fusion": 20, "text_regularization": 1}
    query, targets = [Query(history=(0, 3))], np.array([[6, 7]])
    assert retrievers.open("ease", catalog, None, data, regularization=1).ranks(query, targets)[0, 0] == 0
    fused = retrievers.open("l3ae", catalog, None, data, **params).ranks(query, targets)[0]
    assert 0 < fused[0] <= 9 and (fused[1] == 0 or fused[1] > fused[0])  # 6 is about coffee, as 0 and 3 are.


def test_what_is_not_given_is_chosen_and_reported(catalog, tmp_path):
    data = random_interactions(N, 60)
    found = retrievers.open("l3ae", catalog, tmp_path / "index", data, fusion=[1, 10], top=6)
    report = found.report
    assert [entry.get("text_regularization") for entry in report["validation"][:3]] == [1.0, 10.0, 100.0]
    assert [tuple(entry["regularization, fusion"]) for entry in report["validation"][3:]] == [
        (x, e) for x in (10.0, 100.0, 1000.0) for e in (1.0, 10.0)
    ]
    best = max(report["validation"][3:], key=lambda entry: entry["ndcg@10"])
    assert [report["regularization"], report["fusion"]] == list(best["regularization, fusion"])
    assert (found.model._weights.tocsc().indptr[1:] - found.model._weights.tocsc().indptr[:-1] <= 6).all()
    again = retrievers.open("l3ae", catalog, tmp_path / "index", data, fusion=[1, 10], top=6, max_gb=3)
    assert again.fingerprint == found.fingerprint and json.dumps(dict(again.report)) == json.dumps(dict(report))
    with pytest.raises(ValueError, match=r"retriever\.params\.text_regularization: null or a list"):
        retrievers.open("l3ae", catalog, None, random_interactions(N, 60, held=0))
    with pytest.raises(ValueError, match=r"max_gb: .* sansa"):
        retrievers.open("l3ae", catalog, None, data, max_gb=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("regularization", -1), ("fusion", "10"), ("text_regularization", 0), ("top", 0), ("max_gb", None)],
        *[("pooling", "median"), ("batch_size", 0)],
    ],
)
def test_a_bad_parameter_is_named(name, value):
    with pytest.raises(ValueError, match=rf"retriever\.params\.{name}"):
        Params(**{name: value})
    with pytest.raises(ValueError, match="may both be 0"):
        Params(regularization=0, fusion=0)
