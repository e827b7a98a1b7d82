"""The linear recommenders: compared with other libraries, with brute force and with their optimality conditions."""

import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_data import catalog_of, dense, movielens, random_interactions

import retrievers
from retrievers import Interactions, Query, RetrieverError, Unseen
from retrievers.recommenders import item_item
from retrievers.recommenders.ease import Params as EaseParams
from retrievers.recommenders.item_item import Linear, as_float32, choose, gram, inverse, largest_entries, ndcg
from retrievers.recommenders.itemknn import Params as KnnParams

KINDS = {"itemknn": {"neighbours": 5}, "ease": {"regularization": 5.0}}
N = 24


@pytest.fixture(scope="module")
def catalog():
    return catalog_of(N)


@pytest.fixture(scope="module")
def interactions():
    return random_interactions(N, 60)


@pytest.fixture(scope="module", params=list(KINDS))
def fitted(request, catalog, interactions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear") / "index"
    return retrievers.open(request.param, catalog, folder, interactions, **KINDS[request.param])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("irspack") is None, reason="irspack is not installed")
def test_itemknn_is_irspack_s():
    from irspack import CosineKNNRecommender

    data = movielens()
    theirs = CosineKNNRecommender(data.matrix(), shrinkage=10.0, normalize=True, top_k=data.documents).learn().W
    found = retrievers.open("itemknn", catalog_of(data.documents), None, data, neighbours=data.documents, shrink=10.0)
    expected = np.asarray(theirs.toarray())
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(dense(found), expected, atol=1e-6)


def test_the_gram_matrix_and_its_inverse_by_blocks(monkeypatch):
    data = random_interactions(41, 30)
    x = data.matrix().toarray().astype(float)
    expected = np.linalg.inv(x.T @ x + 3 * np.eye(41))
    for block in (1, 41 * 7, 1 << 22):
        monkeypatch.setattr(item_item, "BLOCK_ENTRIES", block)
        matrix = gram(data.matrix())
        np.testing.assert_array_equal(matrix, x.T @ x)
        found = inverse(matrix, 3.0)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        np.testing.assert_array_equal(found, found.T)
        assert np.shares_memory(found, matrix)
        copy = found.astype(np.float32)
        np.testing.assert_array_equal(as_float32(found), copy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(item_item, "compiled", lambda _: None)
            np.testing.assert_array_equal(gram(data.matrix()), x.T @ x)


def test_the_matrix_leaves_the_sequences_as_they_are():
    data = Interactions.from_sequences(4, [[2, 0, 2], [3, 3, 1]])
    first = data.matrix().toarray().tolist()
    assert first == data.matrix().toarray().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert data.sequence(0).tolist() == [2, 0, 2] and data.sequence(1).tolist() == [3, 3, 1]


@pytest.mark.parametrize(
    ("sequences", "held", "message"),
    [
        ([[1, 4]], ((), ()), "0 to 3, got 1 to 4"),
        ([[2**40]], ((), ()), "0 to 3"),
        ([[1.7]], ((), ()), "must be integers"),
        ([["1"]], ((), ()), "must be integers"),
        ([[1]], ([(0, 9)], [1]), "0 to 3, got 0 to 9"),
        ([[1]], ([(0,)], [-1]), "0 to 3, got -1 to 0"),
    ],
)
def test_what_is_no_row_of_the_catalogue_is_refused(sequences, held, message):
    with pytest.raises(ValueError, match=f"interactions: rows must .*{message}|interactions: rows {message}"):
        Interactions.from_sequences(4, sequences, held)


def test_a_singular_matrix_is_named():
    with pytest.raises(ValueError, match="singular: raise the regularization"):
        inverse(np.ones((3, 3)), -1.0)


def test_nonnegative_clips_and_top_keeps_the_strongest(catalog, interactions):
    whole = dense(retrievers.open("ease", catalog, None, interactions, regularization=5.0))
    clipped = dense(retrievers.open("ease", catalog, None, interactions, regularization=5.0, nonnegative=True))
    assert whole.min() < 0
    np.testing.assert_array_equal(clipped, np.maximum(whole, 0))
    few = retrievers.open("ease", catalog, None, interactions, regularization=5.0, top=4)
    kept = dense(few)
    assert not isinstance(few.model._weights, np.ndarray)
    for j in range(N):
        order = sorted(range(N), key=lambda i: (-abs(whole[i, j]), i))[:4]
        assert sorted(np.flatnonzero(kept[:, j])) == sorted(i for i in order if whole[i, j])
        np.testing.assert_array_equal(kept[order, j], whole[order, j])
    every = retrievers.open("ease", catalog, None, interactions, regularization=5.0, top=N)
    np.testing.assert_array_equal(dense(every), whole)


SEQUENCES = st.lists(st.lists(st.integers(0, 7), max_size=6), min_size=1, max_size=12).filter(any)


@pytest.mark.slow
@given(SEQUENCES, st.integers(1, 9), st.sampled_from([0.0, 1.0, 7.5]))
def test_itemknn_by_brute_force(sequences, neighbours, shrink):
    found = retrievers.open(
        "itemknn", EIGHT, None, Interactions.from_sequences(8, sequences), neighbours=neighbours, shrink=shrink
    )
    users = [[u for u, s in enumerate(sequences) if i in s] for i in range(8)]

    def similarity(i, j):
        both = len(set(users[i]) & set(users[j]))
        return both / ((len(users[i]) * len(users[j])) ** 0.5 + shrink) if both and i != j else 0.0

    expected = np.zeros((8, 8), np.float32)
    for j in range(8):
        for i in sorted(range(8), key=lambda i: (-round(similarity(i, j), 12), i))[:neighbours]:
            expected[i, j] = similarity(i, j)
    # Equal similarities may differ by rounding, so the kept values are compared, and not which entries are kept.
    np.testing.assert_allclose(np.sort(dense(found), 0), np.sort(expected, 0), atol=1e-6)


EIGHT = catalog_of(8)


def test_strongest_breaks_ties_by_row_and_keeps_no_zero():
    columns = [(None, np.array([1.0, -1.0, 1.0])), (np.array([0, 2]), np.array([0.0, 0.5])), (None, np.zeros(3))]
    kept = largest_entries(iter(columns), 3, 2).toarray()
    assert kept.tolist() == [[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.5, 0.0]]


def test_scores_are_history_times_weights_and_a_row_stands_alone(fitted):
    rng = np.random.default_rng(1)
    queries = [
        Query(history=tuple(map(int, rows)), weights=tuple(map(float, rng.normal(size=len(rows)))) if i % 2 else ())
        for i, rows in enumerate(rng.integers(0, N, (50, 6)))
    ]
    together = fitted.model.scores(queries)
    assert together.dtype == np.float32 and together.shape == (50, N)
    for q, query in enumerate(queries):
        np.testing.assert_array_equal(fitted.model.scores([query])[0], together[q])  # Bitwise equal.
        given_ = np.zeros(N)
        for row, weight in zip(query.history, query.weights or [1.0] * 6, strict=True):
            given_[row] = given_[row] + weight if query.weights else 1.0
        np.testing.assert_allclose(together[q], given_ @ dense(fitted).astype(float), atol=1e-5)


def test_a_negative_weight_counts_against(fitted):
    weights = dense(fitted)
    i, j = np.unravel_index(np.argmax(weights), weights.shape)
    both = fitted.search([Query(history=(int(i),)), Query(history=(int(i),), weights=(-1.0,))], N)
    assert j in both.rows[0] and j not in both.rows[1]
    np.testing.assert_array_equal(
        fitted.model.scores([Query(history=(int(i),), weights=(-1.0,))]),
        -fitted.model.scores([Query(history=(int(i),))]),
    )


@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: Unseen(r, N)], ids=["plain", "unseen"])
def test_search_agrees_with_ranks(fitted, wrap):
    rng = np.random.default_rng(2)
    queries = [Query(history=tuple(map(int, rng.integers(0, N, size)))) for size in rng.integers(0, 6, 40)]
    retriever = wrap(fitted)
    rows = retriever.search(queries, N).rows
    ranks = retriever.ranks(queries, np.tile(np.arange(N), (40, 1)))
    for q in range(40):
        order = rows[q][rows[q] >= 0]
        expected = np.zeros(N, int)
        expected[order] = np.arange(1, len(order) + 1)
        assert ranks[q].tolist() == expected.tolist()
        np.testing.assert_array_equal(retriever.search(queries[q : q + 1], 5).rows[0], rows[q, :5])


def search_in_child(pickled: bytes) -> list:
    return pickle.loads(pickled).search([Query(history=(1, 4))], 5).rows.tolist()


@pytest.mark.slow
def test_a_spawned_process_finds_the_same(catalog, interactions, tmp_path, spawned):
    made = [retrievers.open(kind, catalog, tmp_path / kind, interactions, **params) for kind, params in KINDS.items()]
    for retriever in made:
        expected = retriever.search([Query(history=(1, 4))], 5).rows.tolist()
        assert spawned.apply(search_in_child, (pickle.dumps(retriever),)) == expected


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_folder_opens_again_and_a_foreign_or_broken_one_does_not(kind, catalog, interactions, tmp_path):
    params = KINDS[kind]
    made = retrievers.open(kind, catalog, tmp_path / "index", interactions, **params)
    again = retrievers.open(kind, catalog, tmp_path / "index", interactions, **params)
    assert again.fingerprint == made.fingerprint and again.report == made.report
    with pytest.raises(RetrieverError, match="was built with another interactions"):
        retrievers.open(kind, catalog, tmp_path / "index", random_interactions(N, 60, 1), **params)
    with pytest.raises(RetrieverError, match="was built with another kind"):
        retrievers.open("popularity", catalog, tmp_path / "index", interactions)
    for file in (tmp_path / "index").glob("weights*.npy"):
        whole = file.read_bytes()
        for broken in (whole[:-5], b""):
            file.write_bytes(broken)
            with pytest.raises(RetrieverError, match=r"is damaged .* build it again"):
                retrievers.open(kind, catalog, tmp_path / "index", interactions, **params)
        file.write_bytes(whole)
    retrievers.open(kind, catalog, tmp_path / "index", interactions, **params)


def test_files_that_do_not_fit_together_are_damage_not_a_crash(catalog, interactions, tmp_path):
    folder = tmp_path / "index"
    retrievers.open("itemknn", catalog, folder, interactions)
    indices = np.load(folder / "weights.indices.npy")
    for wrong in (indices + N, indices - N, indices[:-1]):
        np.save(folder / "weights.indices.npy", wrong)
        with pytest.raises(RetrieverError, match="do not belong together"):
            retrievers.open("itemknn", catalog, folder, interactions)
    other = tmp_path / "dense"
    retrievers.open("ease", catalog, other, interactions, regularization=5)
    for wrong in (np.zeros((N, N)), np.zeros((N, 2), np.float32)):
        np.save(other / "weights.npy", wrong)
        with pytest.raises(RetrieverError, match="not a square of float32"):
            retrievers.open("ease", catalog, other, interactions, regularization=5)


def test_weights_of_another_catalogue_s_size_are_damage(catalog, interactions, tmp_path):
    retrievers.open("ease", catalog, tmp_path / "index", interactions, regularization=5)
    np.save(tmp_path / "index" / "weights.npy", np.zeros((N - 1, N - 1), np.float32))
    with pytest.raises(RetrieverError, match=f"{N - 1} items instead of {N}"):
        retrievers.open("ease", catalog, tmp_path / "index", interactions, regularization=5)


def test_what_shapes_no_model_changes_no_fingerprint(catalog, interactions, tmp_path):
    first = retrievers.open("ease", catalog, tmp_path / "index", interactions, regularization=5, max_gb=1)
    other = retrievers.open("ease", catalog, tmp_path / "index", interactions, regularization=[5.0], max_gb=2.5)
    assert first.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    ("params", "name", "value"),
    [
        (EaseParams, "regularization", 0),
        (EaseParams, "regularization", -1.0),
        (EaseParams, "regularization", "100"),
        (EaseParams, "regularization", True),
        (EaseParams, "regularization", float("nan")),
        (EaseParams, "regularization", [10, "x"]),
        (EaseParams, "regularization", []),
        (EaseParams, "top", 0),
        (EaseParams, "top", 1.5),
        (EaseParams, "nonnegative", 1),
        (EaseParams, "precision", "float16"),
        (EaseParams, "precision", 32),
        (EaseParams, "precision", "auto"),
        (EaseParams, "max_gb", 0),
        (KnnParams, "neighbours", 0),
        (KnnParams, "neighbours", None),
        (KnnParams, "shrink", -1),
        (KnnParams, "shrink", float("inf")),
    ],
)
def test_a_bad_parameter_is_named(params, name, value):
    with pytest.raises(ValueError, match=rf"retriever\.params\.{name} ") as error:
        params(**{name: value})
    assert "got" in str(error.value) or "empty list" in str(error.value)


def test_the_regularization_is_chosen_on_the_validation_part(catalog, interactions):
    found = retrievers.open("ease", catalog, None, interactions, regularization=[0.1, 5.0, 1000.0])
    measured = {entry["regularization"]: entry["ndcg@10"] for entry in found.report["validation"]}
    queries, targets = interactions.validation_queries()
    for value, expected in measured.items():
        single = retrievers.open("ease", catalog, None, interactions, regularization=value)
        ranks = Unseen(single, N).ranks(queries, targets)[:, 0]
        gains = np.where((ranks > 0) & (ranks <= 10), 1 / np.log2(1 + np.maximum(ranks, 1)), 0)
        assert gains.mean() == pytest.approx(expected, abs=1e-6)
        assert single.report == {"regularization": value, "precision": "float64", "validation": []}
    assert found.report["regularization"] == max(measured, key=measured.get)
    json.dumps(found.report)
    best = retrievers.open("ease", catalog, None, interactions, regularization=found.report["regularization"])
    np.testing.assert_array_equal(dense(found), dense(best))
    assert len(retrievers.open("ease", catalog, None, interactions).report["validation"]) == 9


def test_a_tie_is_the_first_of_the_grid(interactions):
    same = Linear(np.ones((N, N), np.float32))
    chosen, measured = choose("x", ["a", "b"], lambda _: same, interactions)
    assert chosen == "a" and [entry["x"] for entry in measured] == ["a", "b"]
    assert ndcg(same, interactions) == pytest.approx(measured[0]["ndcg@10"], abs=1e-6)


def test_nothing_held_out_needs_a_number(catalog):
    bare = random_interactions(N, 60, held=0)
    with pytest.raises(ValueError, match=r"retriever\.params\.regularization: null or a list .* give one number"):
        retrievers.open("ease", catalog, None, bare)
    retrievers.open("ease", catalog, None, bare, regularization=10)


def test_a_catalogue_too_large_for_the_memory_is_refused(catalog, interactions, monkeypatch):
    with pytest.raises(ValueError, match=r"retriever\.params\.max_gb: .* sansa"):
        retrievers.open("ease", catalog, None, interactions, regularization=10, max_gb=1e-9)
    monkeypatch.setattr(item_item, "_available", lambda: 1e-9)
    with pytest.raises(ValueError, match=r"are available: .* sansa"):
        retrievers.open("ease", catalog, None, interactions, regularization=10)


def test_the_available_memory_is_a_number_everywhere(monkeypatch):
    assert 0.01 < item_item._available() < 1e5

    def absent(self, *args, **kwargs):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", absent)
    assert 0.001 < item_item._available() <= float("inf")
