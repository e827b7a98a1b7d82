"""Runs the same tests of the contract on every backend. A new backend needs one line in BACKENDS. Nothing is mocked."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from postgres_server import shared_database
from serving import serve
from standin import delete_built, opened
from tiny_encoder import tiny_encoder

import retrievers
from retrievers import Cache, Catalog, Judgments, Query
from retrievers.text.tuning import job, train


def kind(name, **usual):
    """A function that takes a catalogue, a folder and parameters, and opens a retriever of this kind."""
    return lambda catalog, folder, **params: retrievers.open(name, catalog, folder / "index", **usual | params)


def served(catalog, folder, **params):
    inner = retrievers.open("bm25", catalog, **params)
    return retrievers.open("remote", catalog, url=serve(inner, catalog))


def cached(catalog, folder, **params):
    inner = retrievers.open("bm25", catalog, folder / "index", **params)
    return Cache(inner, len(catalog), folder=folder / "results")


def tuned(catalog, folder, **params):
    """`dense` with an encoder that is tuned on some judgments, in this process, which has imported everything."""
    encoder = tiny_encoder(folder / "encoder", [*TEXTS, "shoe", "a"])
    found = {word: tuple(row for row, text in enumerate(catalog.texts) if word in text.split()) for word in WORDS}
    judged = {word: rows for word, rows in found.items() if rows}
    judgments = Judgments(len(catalog), list(judged), list(judged.values()))
    usual = {"model": str(encoder), "device": "cpu", "tuned": {"epochs": 1, "batch_size": 4}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_run", lambda where, device: train.run(where))
        return retrievers.open("dense", catalog, folder / "index", judgments=judgments, **usual | params)


def reranked(catalog, folder, **params):
    model = tiny_models.cross_encoder(folder / "model") if not (folder / "model").exists() else folder / "model"
    return retrievers.open("rerank", catalog, folder / "index", **{"model": str(model), "m": 2} | params)


def engine(product):
    """A function like those of `kind`, for an index on a stand-in, or on the cluster at $REC_R1_OPENSEARCH_URL."""
    return lambda catalog, folder, **params: opened(product, catalog, folder / "index", **params)


def postgres(**usual):
    return lambda catalog, folder, **params: retrievers.open(
        "postgres", catalog, url=shared_database(), **usual | params
    )


BM25 = {"kind": "bm25", "weight": 2}
# name -> a function that takes a catalogue, a folder and parameters, and opens the retriever.
BACKENDS = {
    "bm25-memory": lambda catalog, folder, **params: retrievers.open("bm25", catalog, **params),
    "bm25-saved": kind("bm25"),
    "cached-bm25": cached,
    "lucene": kind("lucene"),
    "tantivy": kind("tantivy"),
    "dense-exact": kind("dense"),
    "dense-flat": kind("dense", engine="faiss"),
    "dense-hnsw": kind("dense", engine="faiss", factory="HNSW16", tune="efSearch=64"),
    "dense-tuned": tuned,
    "dense-ivfpq": kind("dense", engine="faiss", factory="IVF2,PQ2x4", tune="nprobe=2"),  # It reads all lists.
    "hybrid-rrf": kind("hybrid"),
    "hybrid-weighted": kind("hybrid", method="weighted", retrievers=[BM25, {"kind": "bm25", "params": {"b": 0.4}}]),
    "hybrid-lucene": kind("hybrid", method="weighted", retrievers=[BM25, {"kind": "lucene", "params": {"b": 0.4}}]),
    "milvus-text": kind("milvus"),
    "milvus-dense": kind("milvus", mode="dense"),
    "postgres-text": postgres(),
    "postgres-vector": postgres(mode="vector"),
    "postgres-hnsw": postgres(mode="vector", index="hnsw"),
    "postgres-hybrid": postgres(mode="hybrid"),
    "remote-bm25": served,
    "late": kind("late"),
    "rerank": reranked,
    "opensearch": engine("opensearch"),
    "elasticsearch": engine("elasticsearch"),
}
ENGINES = ("opensearch", "elasticsearch")
# Values that are not the defaults.
OTHER_PARAMS = {name: {"k1": 2.0} for name in BACKENDS}
OTHER_PARAMS |= {name: {"document_prefix": "a "} for name in BACKENDS if "dense" in name or name == "late"}
OTHER_PARAMS |= {"rerank": {"m": 3}}
OTHER_PARAMS |= {name: {"depth": 7} for name in BACKENDS if name.startswith("hybrid")}
OTHER_PARAMS |= {"tantivy": {"fields": {"title": 2, "text": 1}}}
OTHER_PARAMS |= {"postgres-text": {"normalization": 1}, "postgres-hybrid": {"depth": 7}}
OTHER_PARAMS |= {name: {"document_prefix": "a "} for name in ("postgres-vector", "postgres-hnsw")}
BY_WORDS = ("lucene", "tantivy", "milvus-text", "postgres-text", *ENGINES)
LEXICAL = [name for name in BACKENDS if "bm25" in name or name in BY_WORDS]  # They match terms.
# These build fast enough to try many catalogues.
FAST = [
    "bm25-memory",
    "cached-bm25",  # Its index is saved, too.
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("bm25-saved", "lucene", "tantivy", "postgres-text")),
]
TEXTS = [
    "party popper",
    "sad face",
    "party face",
    "party face",
    "日本 castle",
    "🎉 tada",
    "the of and",
    "running shoes",
]
WORDS = ["party", "face", "sad", "tada", "castle", "zebra", "runs"]


def make_catalog(texts) -> Catalog:
    return Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(texts))


# Similar to one of the unit suite, or slow to build. They run with the slow tests, so that the unit suite stays fast.
ONLY_IN_SLOW_TESTS = (
    "lucene",
    "tantivy",
    "remote-bm25",
    "dense-exact",
    "dense-flat",
    "dense-hnsw",
    "dense-ivfpq",
    "dense-tuned",
    "hybrid-rrf",
    "hybrid-lucene",
    "milvus-dense",
    "milvus-text",
    "late",
    "rerank",
    *ENGINES,
    *(name for name in BACKENDS if name.startswith("postgres")),
)


def marked(name):
    """The name of a backend as the parameter of a test, with the marks of the backend."""
    slow = [pytest.mark.slow] if name in ONLY_IN_SLOW_TESTS else []
    return pytest.param(name, marks=[*slow, pytest.mark.opensearch] if name in ENGINES else slow)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left():
    yield
    delete_built()


@pytest.fixture(params=[marked(name) for name in BACKENDS])
def backend(request) -> str:
    return request.param


@pytest.fixture
def make(backend, tmp_path_factory):
    """A function that takes texts and parameters, and opens a retriever in a folder of its own."""
    return lambda texts, **params: BACKENDS[backend](make_catalog(texts), tmp_path_factory.mktemp("index"), **params)


@pytest.fixture(scope="module")
def built():
    return {}


@pytest.fixture
def retriever(backend, make, built):
    if backend not in built:
        built[backend] = make(TEXTS)
    return built[backend]


only_lexical = pytest.mark.parametrize("backend", map(marked, LEXICAL), indirect=True)


def test_shapes_order_and_padding(retriever, backend):
    hits = retriever.search([Query("party face"), Query("zebra"), Query("")], 5)
    assert hits.rows.shape == hits.scores.shape == (3, 5)
    assert hits.rows.dtype == np.int32 and hits.scores.dtype == np.float32
    assert hits.rows[0, :2].tolist() == [2, 3]  # Two documents have the same text, so they are ordered by row.
    for q in range(3):
        assert (np.diff(hits.scores[q][hits.rows[q] >= 0]) <= 0).all()
    assert {0, 1, 2, 3} <= set(hits.rows[0].tolist())
    assert np.isneginf(hits.scores[hits.rows < 0]).all() and np.isfinite(hits.scores[hits.rows >= 0]).all()
    assert (hits.rows[2] == -1).all()
    if backend in LEXICAL:
        assert set(hits.rows[0].tolist()) == {0, 1, 2, 3, -1} and (hits.rows[1] == -1).all()


def test_k_beyond_the_catalogue_is_clamped_and_below_one_refused(retriever):
    assert retriever.search([Query("party")], 10_000).rows.shape == (1, len(TEXTS))
    for k in (0, -3):
        with pytest.raises(ValueError, match="k must be an integer >= 1"):
            retriever.search([Query("party")], k)


def test_unicode_and_very_long_queries(retriever, backend):
    hits = retriever.search([Query("日本"), Query("🎉🎉 tada"), Query("party " * 1_700), Query("x" * 10_000)], 3)
    assert hits.rows[:2, 0].tolist() == [4, 5]
    assert hits.rows[2, 0] in (0, 2, 3)
    assert hits.rows[3, 0] == -1 or backend not in LEXICAL


@pytest.mark.parametrize("text", ["", " \n\t", "zebra", "?!…", "x" * 10_000])
def test_a_query_without_a_known_term_retrieves_nothing(retriever, backend, text):
    if text.strip() and backend not in LEXICAL:
        pytest.skip("to embeddings every text is a little like every other")
    n = len(TEXTS)
    hits = retriever.search([Query(text)], n)
    assert (hits.rows == -1).all() and np.isneginf(hits.scores).all()
    assert (retriever.ranks([Query(text)], np.arange(n)[None]) == 0).all()


QUERY = st.lists(st.sampled_from([*WORDS, "unseen", "the"]), max_size=5).map(" ".join)
QUERIES = st.lists(QUERY, min_size=1, max_size=4)
only_fast = pytest.mark.parametrize("backend", FAST, indirect=True)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(QUERIES)
def test_ranks_are_the_positions_in_search_of_one_catalogue(retriever, queries):
    assert_search_and_ranks_agree(retriever, TEXTS, queries)


@only_fast
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=12),
    QUERIES,
)
def test_ranks_are_the_positions_in_search(make, texts, queries):
    assert_search_and_ranks_agree(make(texts), texts, queries)


ANY_TEXT = st.one_of(st.text(max_size=12), st.lists(st.sampled_from([*WORDS, "🎉", "日本"]), max_size=4).map(" ".join))


@only_fast
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ANY_TEXT, max_size=8), st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_ranks_are_the_positions_in_search_for_any_text(make, texts, queries):
    texts = [*texts, "party face"]  # A catalogue without any term is refused.
    assert_search_and_ranks_agree(make(texts), texts, [*queries, texts[0], "party"])


def assert_search_and_ranks_agree(retriever, texts, queries):
    asked = [Query(text) for text in queries]
    n = len(texts)
    hits = retriever.search(asked, n)
    assert hits.rows.shape == hits.scores.shape == (len(asked), n)
    assert hits.rows.dtype == np.int32 and hits.scores.dtype == np.float32
    ranks = retriever.ranks(asked, np.tile(np.arange(-1, n), (len(asked), 1)))
    assert ranks.shape == (len(asked), n + 1) and ranks.dtype == np.int32
    assert (ranks[:, 0] == 0).all()  # padding
    for q in range(len(asked)):
        order = hits.rows[q].tolist()
        assert ranks[q, 1:].tolist() == [order.index(row) + 1 if row in order else 0 for row in range(n)]
        found = int((hits.rows[q] >= 0).sum())
        rows, scores = order[:found], hits.scores[q, :found].tolist()
        assert order[found:] == [-1] * (n - found) and np.isneginf(hits.scores[q, found:]).all()
        assert len(set(rows)) == found and all(row < n for row in rows)
        assert list(zip(scores, rows, strict=True)) == sorted(
            zip(scores, rows, strict=True), key=lambda hit: (-hit[0], hit[1])
        )
    for k in {1, (n + 1) // 2}:  # A smaller k gives the beginning of the same list, also among equal scores.
        shallow = retriever.search(asked, k)
        assert shallow.rows.tolist() == hits.rows[:, :k].tolist()
        assert shallow.scores.tolist() == hits.scores[:, :k].tolist()


def test_no_queries(retriever):
    assert retriever.search([], 3).rows.shape == (0, 3)
    assert retriever.ranks([], np.zeros((0, 2), np.int32)).shape == (0, 2)


def test_targets_outside_the_catalogue_and_of_the_wrong_shape_are_refused(retriever):
    for row in (len(TEXTS), -2):
        for text in ("party", ""):  # A bad target is refused even for a query that finds nothing.
            with pytest.raises(ValueError, match=f"target row {row} is outside the catalogue"):
                retriever.ranks([Query(text)], np.array([[0, row]]))
    with pytest.raises(ValueError, match="shape"):
        retriever.ranks([Query("party")], np.array([[0], [1]]))


@only_lexical
def test_targets_keep_their_places(retriever):
    ranks = retriever.ranks([Query("sad"), Query("castle")], np.array([[-1, 1, 0, 1], [4, -1, -1, 1]]))
    assert ranks.tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]  # Padding, a repeated target, and one not found.


@only_lexical
def test_a_repeated_term_counts_again(retriever, backend):
    if backend == "postgres-text":
        pytest.skip("a tsquery does not count how often a word is in a query")
    alone, twice = retriever.search([Query("sad"), Query("sad sad")], 1).scores[:, 0]
    assert twice > alone
    once, thrice = retriever.search([Query("party sad"), Query("party sad sad sad")], 3).rows[:, 0]
    assert once in (0, 1) and thrice == 1


def answers(retriever) -> list:
    queries = [Query(text) for text in ("party face", "sad", "", "castle tada")]
    hits = retriever.search(queries, 4)
    return [hits.rows.tolist(), hits.scores.tolist(), retriever.ranks(queries, np.tile([0, 2, 4], (4, 1))).tolist()]


def test_one_query_or_a_batch(retriever, backend):
    queries = [Query("party face"), Query("sad party"), Query("zebra")]
    together = retriever.search(queries, 4)
    for q, query in enumerate(queries):
        alone = retriever.search([query], 4)
        assert alone.rows[0].tolist() == together.rows[q].tolist()
        assert np.allclose(alone.scores[0], together.scores[q], rtol=0, atol=1e-6)
        assert alone.scores[0].tolist() == together.scores[q].tolist() or backend == "milvus-dense"  # Its BLAS.


def test_threads(retriever):
    expected = answers(retriever)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: answers(retriever), range(16))) == [expected] * 16


def test_threads_that_ask_different_things_of_a_retriever_nobody_used_yet(retriever):
    queries = [Query(text) for text in TEXTS * 4]
    expected = [hits_of(retriever, query) for query in queries[: len(TEXTS)]] * 4
    assert len({str(one) for one in expected}) > 4
    fresh = pickle.loads(pickle.dumps(retriever))
    with ThreadPoolExecutor(8) as pool:
        for got, wanted in zip(pool.map(lambda query: hits_of(fresh, query), queries), expected, strict=True):
            assert got[0] == wanted[0] and np.allclose(got[1], wanted[1], rtol=0, atol=1e-5)


def hits_of(retriever, query) -> list:
    hits = retriever.search([query], len(TEXTS))
    return [hits.rows.tolist(), hits.scores.tolist()]


def same(first, second) -> bool:
    """Whether two results are equal. Scores may differ by the rounding of an encoder, which depends on the batch."""
    return first[0] == second[0] and np.allclose(first[1], second[1], rtol=0, atol=1e-5) and first[2] == second[2]


@pytest.mark.slow
def test_pickle_and_a_spawned_process(retriever, spawned):
    assert same(answers(pickle.loads(pickle.dumps(retriever))), answers(retriever))
    assert same(spawned.apply(answers, (retriever,)), answers(retriever))


def test_opening_again_gives_the_same(retriever, backend, tmp_path):
    first = BACKENDS[backend](make_catalog(TEXTS), tmp_path)
    assert first is not retriever and first.fingerprint == retriever.fingerprint  # The same data in another folder.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("index/*")}
    saved = make_catalog(TEXTS).save(tmp_path / "catalog")
    for catalog in (make_catalog(TEXTS), saved):
        again = BACKENDS[backend](catalog, tmp_path)
        assert again is not first and again.fingerprint == first.fingerprint
        assert same(answers(again), answers(first))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("index/*")} == before  # Nothing was built again.


def test_fingerprint_survives_pickling(retriever):
    assert pickle.loads(pickle.dumps(retriever)).fingerprint == retriever.fingerprint


def test_fingerprint_follows_the_parameters(retriever, backend, make):
    one, two = (make(TEXTS, **OTHER_PARAMS[backend]) for _ in range(2))
    assert one.fingerprint == two.fingerprint != retriever.fingerprint


def test_fingerprint_follows_the_data(retriever, make):
    others = [TEXTS[::-1], TEXTS[:-1], [*TEXTS[:-1], "running shoe"]]
    assert len({retriever.fingerprint, *(make(texts).fingerprint for texts in others)}) == 4


def test_a_cache_changes_nothing(retriever, tmp_path):
    bare = answers(retriever)
    cache = Cache(retriever, len(TEXTS), folder=tmp_path / "results")
    assert cache.fingerprint == retriever.fingerprint and len(cache) == len(TEXTS)
    assert answers(cache) == answers(cache) == bare
    assert cache.counts() == (16, 8)  # Four queries are searched and ranked, twice each.
    another = pickle.loads(pickle.dumps(cache))  # Its memory is empty, and its disk is the same.
    assert answers(another) == bare and another.counts() == (8, 8)
