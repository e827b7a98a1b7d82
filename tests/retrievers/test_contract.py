"""One contract, every backend: a new one joins by one line in BACKENDS."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import retrievers
from retrievers import Catalog, Query

# name -> (catalog, folder) -> retriever
BACKENDS = {
    "bm25 in memory": lambda catalog, folder: retrievers.open("bm25", catalog),
    "bm25 saved": lambda catalog, folder: retrievers.open("bm25", catalog, folder / "index"),
}
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


@pytest.fixture(params=BACKENDS)
def make(request, tmp_path_factory):
    """texts -> retriever."""
    return lambda texts: BACKENDS[request.param](make_catalog(texts), tmp_path_factory.mktemp("index"))


@pytest.fixture
def retriever(make):
    return make(TEXTS)


def test_shapes_order_and_padding(retriever):
    hits = retriever.search([Query("party face"), Query("zebra"), Query("")], 5)
    assert hits.rows.shape == hits.scores.shape == (3, 5)
    assert hits.rows.dtype == np.int32 and hits.scores.dtype == np.float32
    assert hits.rows[0, :2].tolist() == [2, 3]  # the same text twice: tied, by row
    assert (np.diff(hits.scores[0][hits.rows[0] >= 0]) <= 0).all()
    assert set(hits.rows[0].tolist()) == {0, 1, 2, 3, -1}
    assert np.isneginf(hits.scores[hits.rows < 0]).all() and np.isfinite(hits.scores[hits.rows >= 0]).all()
    assert (hits.rows[1:] == -1).all()


def test_k_beyond_the_catalogue_is_clamped_and_below_one_refused(retriever):
    assert retriever.search([Query("party")], 10_000).rows.shape == (1, len(TEXTS))
    for k in (0, -3):
        with pytest.raises(ValueError, match="k must be an integer >= 1"):
            retriever.search([Query("party")], k)


def test_unicode_and_very_long_queries(retriever):
    hits = retriever.search([Query("日本"), Query("🎉🎉 tada"), Query("x" * 10_000), Query("party " * 1_700)], 3)
    assert hits.rows[:, 0].tolist()[:3] == [4, 5, -1]
    assert hits.rows[3, 0] in (0, 2, 3)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=12),
    st.lists(st.lists(st.sampled_from([*WORDS, "unseen", "the"]), max_size=5).map(" ".join), min_size=1, max_size=4),
)
def test_ranks_are_the_positions_in_search(make, texts, queries):
    retriever = make(texts)
    asked = [Query(text) for text in queries]
    n = len(texts)
    hits = retriever.search(asked, n)
    ranks = retriever.ranks(asked, np.tile(np.arange(-1, n), (len(asked), 1)))
    assert ranks.shape == (len(asked), n + 1) and ranks.dtype == np.int32
    assert (ranks[:, 0] == 0).all()  # padding
    for q in range(len(asked)):
        order = hits.rows[q].tolist()
        assert ranks[q, 1:].tolist() == [order.index(row) + 1 if row in order else 0 for row in range(n)]


def test_no_queries(retriever):
    assert retriever.search([], 3).rows.shape == (0, 3)
    assert retriever.ranks([], np.zeros((0, 2), np.int32)).shape == (0, 2)


def test_targets_outside_the_catalogue_and_of_the_wrong_shape_are_refused(retriever):
    with pytest.raises(ValueError, match="outside the catalogue"):
        retriever.ranks([Query("party")], np.array([[len(TEXTS)]]))
    with pytest.raises(ValueError, match="shape"):
        retriever.ranks([Query("party")], np.array([[0], [1]]))


def test_a_repeated_term_counts_again(retriever):
    once, thrice = retriever.search([Query("party sad"), Query("party sad sad sad")], 3).rows[:, 0]
    assert once in (0, 1) and thrice == 1


def answers(retriever) -> list:
    queries = [Query(text) for text in ("party face", "sad", "", "castle tada")]
    hits = retriever.search(queries, 4)
    return [hits.rows.tolist(), hits.scores.tolist(), retriever.ranks(queries, np.tile([0, 2, 4], (4, 1))).tolist()]


def test_one_query_or_a_batch(retriever):
    queries = [Query("party face"), Query("sad party"), Query("zebra")]
    together = retriever.search(queries, 4)
    for q, query in enumerate(queries):
        alone = retriever.search([query], 4)
        assert alone.rows[0].tolist() == together.rows[q].tolist()
        assert alone.scores[0].tolist() == together.scores[q].tolist()


def test_threads(retriever):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: answers(retriever), range(16)))
    assert all(result == answers(retriever) for result in results)


def test_pickle_and_a_spawned_process(retriever):
    assert answers(pickle.loads(pickle.dumps(retriever))) == answers(retriever)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(answers, (retriever,)) == answers(retriever)


def test_fingerprint_follows_the_data(make):
    assert make(TEXTS).fingerprint == make(TEXTS).fingerprint
    others = [TEXTS[::-1], TEXTS[:-1], [*TEXTS[:-1], "running shoe"]]
    assert len({make(texts).fingerprint for texts in [TEXTS, *others]}) == 4
