"""SANSA where its package is installed, and everywhere its parameters and the error for the missing package."""

import logging
import sys

import numpy as np
import pytest
from linear_data import catalog_of, random_interactions

import retrievers
from retrievers import Interactions, Query, RetrieverError, Unseen
from retrievers.recommenders.item_item import ease_weights, gram
from retrievers.recommenders.sansa import Factored, Params

N = 24


@pytest.fixture(scope="module")
def data():
    return random_interactions(N, 60)


def test_a_missing_package_says_how_to_get_it(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "sansa", None)
    with pytest.raises(RetrieverError, match=r"needs the package sansa .* pip install 'rec-r1\[sansa\]'"):
        retrievers.open("sansa", catalog_of(N), None, data, regularization=10)


@pytest.mark.parametrize(
    ("name", "value"),
    [("regularization", 0), ("density", 0), ("density", 1.5), ("density", "x"), ("factorizer", "lu")],
)
def test_a_bad_parameter_is_named(name, value):
    with pytest.raises(ValueError, match=rf"retriever\.params\.{name}"):
        Params(**{name: value})


@pytest.mark.parametrize("sequences", [[[3]], [[3], [4]]])
def test_too_few_chosen_together_is_no_traceback(sequences):
    pytest.importorskip("sansa")
    few = Interactions.from_sequences(N, sequences)
    with pytest.raises(ValueError, match=r"so few were chosen together: set retriever\.kind: ease"):
        retrievers.open("sansa", catalog_of(N), None, few, regularization=10)


def test_scores_are_of_both_factors_and_the_history():
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, N, N)).astype(np.float32)
    model = Factored(csr_matrix(left), csr_matrix(right))
    queries = [Query(history=(1, 2), weights=(2.0, -1.0)), Query(history=(3, 3)), Query(history=(0,))]
    history = np.zeros((3, N))
    history[0, 1], history[0, 2], history[1, 3], history[2, 0] = 2, -1, 1, 1
    np.testing.assert_allclose(model.scores(queries), history @ left @ right + history, atol=1e-4)
    np.testing.assert_array_equal(model.scores(queries[1:2])[0], model.scores(queries)[1])


@pytest.mark.slow  # numba compiles the functions of the package.
@pytest.mark.parametrize("factorizer", ["icf", "cholmod"])
def test_it_fits_opens_again_and_ranks(data, factorizer, tmp_path):
    pytest.importorskip("sansa")
    params = {"regularization": [5.0, 50.0], "density": 0.4, "factorizer": factorizer}
    handlers = list(logging.getLogger().handlers)
    made = retrievers.open("sansa", catalog_of(N), tmp_path / "index", data, **params)
    assert logging.getLogger().handlers == handlers
    again = retrievers.open("sansa", catalog_of(N), tmp_path / "index", data, **params)
    assert again.fingerprint == made.fingerprint and len(made.report["validation"]) == 2
    queries = [Query(history=h) for h in data.validation_histories]
    retriever = Unseen(made, N)
    rows = retriever.search(queries, N).rows
    ranks = retriever.ranks(queries, np.tile(np.arange(N), (len(queries), 1)))
    for q in range(len(queries)):
        for place, row in enumerate(rows[q][rows[q] >= 0], 1):
            assert ranks[q, row] == place
    assert (rows[:, 0] >= 0).all()


@pytest.mark.slow
def test_with_everything_kept_it_is_ease(data):
    pytest.importorskip("sansa")
    made = retrievers.open("sansa", catalog_of(N), None, data, regularization=20, density=1.0, factorizer="cholmod")
    found = made.model.scores([Query(history=(row,)) for row in range(N)])
    expected = ease_weights(gram(data.matrix()), 20.0)
    assert np.abs(found.diagonal()).max() < 1e-5
    np.testing.assert_allclose(found, expected, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("factorizer", ["icf", "cholmod"])
def test_documents_that_nobody_chose_change_nothing(data, factorizer):
    """Items that nobody chose, between others and at the end. The package itself gives them wrong norms, or raises."""
    pytest.importorskip("sansa")
    place = np.delete(np.arange(N + 4), [0, 5, 6, N + 3])  # The rows of the N items among N + 4.
    sequences = [place[data.sequence(u)].tolist() for u in range(len(data))]
    wide = Interactions.from_sequences(N + 4, sequences)
    params = {"regularization": 20, "density": 0.5, "factorizer": factorizer}
    few = retrievers.open("sansa", catalog_of(N), None, data, **params).model
    many = retrievers.open("sansa", catalog_of(N + 4), None, wide, **params).model
    expected = few.scores([Query(history=(row, 3)) for row in range(N)])
    found = many.scores([Query(history=(int(place[row]), int(place[3]))) for row in range(N)])
    np.testing.assert_allclose(found[:, place], expected, atol=1e-6)
    assert not found[:, [0, 5, 6, N + 3]].any() and not many.scores([Query(history=(5, N + 3))]).any()
