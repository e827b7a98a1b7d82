"""The compiled loops, compared with plain functions: heads with top, and products with scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import random as random_sparse

from retrievers.core import kernels, ranking
from retrievers.core.ranking import heads, no_hits, top
from retrievers.recommenders import item_item

VALUES = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.5, 1.0, 1.5, np.nan])
MATRICES = st.integers(1, 30).flatmap(
    lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=1, max_size=4)
)


def expected(matrix, k, floor):
    found = [top(row, k, floor) for row in matrix]
    return np.stack([rows for rows, _ in found]), np.stack([best for _, best in found])


@pytest.mark.slow
@given(MATRICES, st.integers(1, 40), st.sampled_from([0.0, -np.inf, 0.5]))
@settings(max_examples=300, deadline=None)
def test_the_heap_finds_what_top_finds(values, k, floor):
    matrix = np.nan_to_num(np.array(values, np.float32), nan=-2.0, neginf=-np.inf)
    rows, best = expected(matrix, k, floor)
    out = no_hits(len(matrix), min(k, matrix.shape[1]))
    kernels.heads(matrix, floor, out.rows, out.scores, 0, len(matrix))  # The loop as plain Python.
    np.testing.assert_array_equal(out.rows, rows)
    np.testing.assert_array_equal(out.scores, best)


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("k", [1, 7, 100, 2000])
def test_in_batches_with_numba_and_without(monkeypatch, numba, k):
    if numba:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(ranking, "compiled", lambda _: None)
    rng = np.random.default_rng(0)
    matrix = rng.integers(-3, 40, (70, 2000)).astype(np.float32)
    rows, best = expected(matrix, k, 0.0)
    for given_ in (matrix, np.asfortranarray(matrix)):
        found = heads(given_, k)
        np.testing.assert_array_equal(found.rows, rows)
        np.testing.assert_array_equal(found.scores, best)
    same = heads(np.broadcast_to(matrix[0], (3, 2000)), k)  # As in popularity: one read-only row for all.
    np.testing.assert_array_equal(same.rows, np.tile(rows[0], (3, 1)))
    with pytest.raises(ValueError, match="k must be an integer >= 1"):
        heads(matrix, 0)


def test_no_query_at_all():
    assert heads(np.zeros((0, 5), np.float32), 3).rows.shape == (0, 3)


def test_sparse_products_are_scipy_s_to_the_bit(monkeypatch):
    rng = np.random.default_rng(0)
    left = random_sparse(70, 300, 0.05, format="csr", dtype=np.float32, random_state=rng)
    right = random_sparse(300, 300, 0.1, format="csr", dtype=np.float32, random_state=rng)
    left.data -= 0.5
    compiled = item_item.multiplied(left, right)
    np.testing.assert_array_equal(item_item.multiplied(left[3:4], right)[0], compiled[3])
    monkeypatch.setattr(item_item, "compiled", lambda _: None)
    np.testing.assert_array_equal(item_item.multiplied(left, right), compiled)
    plain = np.zeros((70, 300), np.float32)
    kernels.products(left.indptr, left.indices, left.data, right.indptr, right.indices, right.data, plain, 0, 70)
    np.testing.assert_array_equal(plain, compiled)
