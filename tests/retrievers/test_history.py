"""Runs the same tests on every recommender, fitted on a small catalogue. A new one needs one line in BACKENDS."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_encoder import tiny_encoder

import retrievers
from retrievers import Cache, Catalog, Interactions, Query, RetrieverError, Unseen

N = 24
THINGS = ("shoes", "hat", "coat", "bag", "sock", "tie", "belt", "cup")
TEXTS = [f"{colour} {thing}" for colour in ("red", "green", "blue") for thing in THINGS]


def catalog(texts=TEXTS) -> Catalog:
    return Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(texts))


def interactions(seed=0) -> Interactions:
    """Every user chooses items of one colour. Nobody chooses item 23."""
    rng = np.random.default_rng(seed)
    sequences = [rng.permutation(8)[:5] + 8 * (u % 3) for u in range(30)]
    sequences = [[int(row) for row in own if row != N - 1] for own in sequences]
    return Interactions.from_sequences(
        N, sequences, ([tuple(s[:2]) for s in sequences[:9]], [s[2] for s in sequences[:9]])
    )


# name -> (kind, params). The models are small and quick to fit.
BACKENDS = {
    "popularity": ("popularity", {}),
    "itemknn": ("itemknn", {"shrink": 1.0}),
    "ease": ("ease", {"regularization": 5.0}),
    "ease-sparse": ("ease", {"regularization": 5.0, "top": 6}),
    "l3ae": ("l3ae", {}),
    "sansa": ("sansa", {"regularization": 5.0, "density": 0.5}),
    "sasrec": ("sasrec", {"epochs": 1}),
    "vqrec": ("vqrec", {"epochs": 1, "codes": 4, "dim": 32}),
    "vqrec-ids": ("vqrec", {"epochs": 1, "codes": 4, "dim": 32, "ids": True}),
    "personas": ("personas", {"epochs": 2}),
    "propagate": ("propagate", {"backend": {"kind": "ease", "params": {"regularization": 5.0}}}),
    "hybrid": ("hybrid", {"retrievers": [{"kind": "popularity"}, {"kind": "ease", "params": {"regularization": 5.0}}]}),
}
ANSWER_EMPTY = ("popularity", "hybrid")  # These rank items without a history, too.
QUERIES = [
    Query(history=(0, 1)),
    Query(history=(9,), weights=(1.0,)),
    Query(history=(8, 0), weights=(1.0, -1.0)),
    Query("red hat", (17, 18, 19)),
]


# Similar to one of the unit suite, or slow to fit. They run with the slow tests, so that the unit suite stays fast.
ONLY_IN_SLOW_TESTS = ("ease-sparse", "hybrid", "l3ae", "personas", "sansa", "sasrec", "vqrec", "vqrec-ids")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in ONLY_IN_SLOW_TESTS else ()) for name in BACKENDS],
)
def name(request):
    if request.param == "sansa":
        pytest.importorskip("sansa", reason="compiled against libsuitesparse-dev, which is not here")
    return request.param


@pytest.fixture(scope="module")
def backend(name, tmp_path_factory):
    """The kind and the parameters of a backend."""
    kind, params = BACKENDS[name]
    if kind != "vqrec":
        return kind, params
    # The codes of embeddings of 384 dimensions take a second and a half. `test_vqrec_encoder.py` has a real encoder.
    return kind, {**params, "model": str(tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny", TEXTS))}


@pytest.fixture(scope="module")
def fitted_on(name):
    """The interactions that the retriever of a backend was fitted on."""
    return interactions()


@pytest.fixture(scope="module")
def retriever(backend, fitted_on, tmp_path_factory):
    kind, params = backend
    return retrievers.open(kind, catalog(), tmp_path_factory.mktemp("index") / "index", fitted_on, **params)


def assert_agree(retriever, queries):
    hits = retriever.search(queries, N)
    assert hits.rows.shape == hits.scores.shape == (len(queries), N)
    assert hits.rows.dtype == np.int32 and hits.scores.dtype == np.float32
    ranks = retriever.ranks(queries, np.tile(np.arange(-1, N), (len(queries), 1)))
    assert ranks.dtype == np.int32 and (ranks[:, 0] == 0).all()
    for q in range(len(queries)):
        found = int((hits.rows[q] >= 0).sum())
        rows, scores = hits.rows[q, :found].tolist(), hits.scores[q, :found].tolist()
        assert (hits.rows[q, found:] == -1).all() and np.isneginf(hits.scores[q, found:]).all()
        assert len(set(rows)) == found
        assert rows == [row for _, row in sorted(zip(scores, rows, strict=True), key=lambda hit: (-hit[0], hit[1]))]
        assert ranks[q, 1:].tolist() == [rows.index(row) + 1 if row in rows else 0 for row in range(N)]
    shallow = retriever.search(queries, 3)
    assert shallow.rows.tolist() == hits.rows[:, :3].tolist()


HISTORY = st.lists(st.integers(0, N - 1), max_size=6, unique=True)
SIGNS = st.lists(st.sampled_from([1.0, 0.5, -1.0]), min_size=6, max_size=6)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(HISTORY, st.none() | SIGNS), min_size=1, max_size=4))
def test_ranks_are_the_positions_in_search(retriever, made):
    queries = [Query(history=tuple(h), weights=() if w is None else tuple(w[: len(h)])) for h, w in made]
    assert_agree(retriever, queries)
    assert_agree(Unseen(retriever, N), queries)


def test_what_was_seen_is_left_out_and_nothing_else_moves(retriever):
    hits, bare = Unseen(retriever, N).search(QUERIES, N), retriever.search(QUERIES, N)
    for q, query in enumerate(QUERIES):
        kept = [row for row in bare.rows[q].tolist() if row >= 0 and row not in query.history]
        assert [row for row in hits.rows[q].tolist() if row >= 0] == kept
    edited = Query(history=(0, 1, 2), weights=(1.0, 1.0, 1.0), seen=(0,))
    rows = Unseen(retriever, N).search([edited], N).rows[0].tolist()
    bare_rows = retriever.search([edited], N).rows[0].tolist()
    assert 0 not in rows and {1, 2} & set(rows) == {1, 2} & set(bare_rows)


def test_an_empty_history_finds_nothing_but_where_it_is_said(retriever, name):
    rows = retriever.search([Query()], 5).rows
    assert (rows >= 0).any() == (name in ANSWER_EMPTY)


def test_histories_outside_the_catalogue_and_odd_weights_are_refused(retriever, name):
    if name == "popularity":
        pytest.skip("it reads no history")
    for query in (Query(history=(0, N)), Query(history=(-1,)), Query(history=(0, 1), weights=(1.0,))):
        with pytest.raises(ValueError, match=r"history|weights"):
            retriever.search([query], 3)


def answers(retriever) -> list:
    hits = retriever.search(QUERIES, 6)
    return [hits.rows.tolist(), hits.scores.tolist(), retriever.ranks(QUERIES, np.tile([2, 10, 20], (4, 1))).tolist()]


def test_the_weights_of_an_item_are_added(retriever, name):
    """ "Less like" removes an item of the history, whichever recommender reads it (rec_r1/scoring/grounding.py)."""
    if name in ("popularity", "hybrid"):
        pytest.skip("it ranks items without a history, too")
    removed = Query(history=(0, 5, 9, 5), weights=(1.0, 1.0, 1.0, -1.0))
    left = Query(history=(0, 9), weights=(1.0, 1.0))
    every = np.arange(N)[None]
    assert retriever.ranks([removed], every).tolist() == retriever.ranks([left], every).tolist()
    nothing = Query(history=(5, 5), weights=(1.0, -1.0))
    assert retriever.search([nothing], 3).rows.tolist() == [[-1, -1, -1]]


def test_one_query_or_a_batch(retriever):
    together = retriever.search(QUERIES * 3, 6)
    for q, query in enumerate(QUERIES):
        alone = retriever.search([query], 6)
        assert alone.rows[0].tolist() == together.rows[q].tolist()
        assert alone.scores[0].tolist() == together.scores[q].tolist()


def test_threads(retriever):
    expected = answers(retriever)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: answers(retriever), range(8))) == [expected] * 8


@pytest.mark.slow
def test_pickle_and_a_spawned_process(retriever, spawned):
    again = pickle.loads(pickle.dumps(retriever))
    assert again.fingerprint == retriever.fingerprint and answers(again) == answers(retriever)
    assert spawned.apply(answers, (retriever,)) == answers(retriever)


def test_a_cache_changes_nothing(retriever, tmp_path):
    cache = Cache(retriever, N, folder=tmp_path)
    assert answers(cache) == answers(cache) == answers(retriever)


def test_the_same_again_and_another_where_data_or_settings_differ(name, backend, retriever, tmp_path):
    kind, params = backend
    again = retrievers.open(kind, catalog(), tmp_path / "a", interactions(), **params)
    assert again.fingerprint == retriever.fingerprint and answers(again) == answers(retriever)
    others = [
        retrievers.open(kind, catalog(), tmp_path / "b", interactions(1), **params),
        retrievers.open(kind, catalog([*TEXTS[:-1], "green glove"]), tmp_path / "c", interactions(), **params),
    ]
    assert len({r.fingerprint for r in (retriever, *others)}) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    opened = retrievers.open(kind, catalog(), tmp_path / "a", interactions(), **params)
    assert answers(opened) == answers(retriever)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == before  # No second fit.
    if name not in ("propagate", "hybrid"):
        with pytest.raises(RetrieverError, match="built with another interactions"):
            retrievers.open(kind, catalog(), tmp_path / "a", interactions(1), **params)


def test_nothing_to_fit_on_and_foreign_interactions_are_refused(backend):
    kind, params = backend
    with pytest.raises(ValueError, match="is fitted on interactions"):
        retrievers.open(kind, catalog(), **params)
    with pytest.raises(ValueError, match="interactions with 24 items for a catalogue of 23"):
        retrievers.open(kind, catalog(TEXTS[:-1]), None, interactions(), **params)


def test_what_depends_on_interactions_and_what_reads_text(name, backend, retriever):
    kind, params = backend
    assert retrievers.takes_interactions(kind, params)
    assert retrievers.reads_text(retriever) == (name == "propagate")
    assert [part for part, _ in retrievers.fits(retriever)]
    assert not retrievers.takes_interactions("bm25", {}) and not retrievers.takes_interactions("hybrid", {})


@pytest.mark.usefixtures("retriever")
def test_the_fit_leaves_the_interactions_as_they_were(fitted_on):
    assert fitted_on.rows.tolist() == interactions().rows.tolist()  # A sequence model needs their order.
