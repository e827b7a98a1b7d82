"""Milvus Lite, the embedded database: two processes, damaged files, long documents and an interrupted build."""

import multiprocessing

import numpy as np
import pytest

import retrievers
from retrievers import Catalog, Query, RetrieverError
from retrievers.text import milvus as module

pytestmark = pytest.mark.slow
TEXTS = ["party popper", "sad face", "party face", "party face", "castle", "", "running shoes"]


def make_catalog(texts=TEXTS) -> Catalog:
    return Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(texts))


def ask(folder) -> list:
    return retrievers.open("milvus", make_catalog(), folder).search([Query("parties")], 7).rows.tolist()


def test_another_process_while_this_one_has_it_open(tmp_path):
    """Milvus Lite locks its folder. A second process sends queries to the first, and opens the folder after its end."""
    folder = tmp_path / "index"
    first = ask(folder)
    assert first == [[0, 2, 3, -1, -1, -1, -1]]
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        assert pool.map(ask, [folder] * 4, chunksize=1) == [first] * 4
    from milvus_lite.server_manager import server_manager_instance

    server_manager_instance.release_server(str(folder / "milvus.db"))  # This happens when this process ends.
    with context.Pool(1) as pool:
        assert pool.apply(ask, (folder,)) == first


def test_scores_are_those_of_bm25():
    """Analysis and formula are the same, except for the constant factor k1 + 1 of Milvus."""
    texts = [f"party {'face ' * (i % 5)} {'castle ' * (i % 3)} {i}" for i in range(60)]
    more = {"index": {"params": {"inverted_index_algo": "TAAT_NAIVE"}}}
    for params, others in (({}, {}), ({"k1": 0.6, "b": 0.2}, {}), ({"k1": 0.6, "b": 0.2}, more)):
        ours = retrievers.open("bm25", make_catalog(texts), **params)
        theirs = retrievers.open("milvus", make_catalog(texts), **params, **others)
        for text in ("party face", "castle", "7 face castle"):
            a, b = (one.search([Query(text)], 60) for one in (ours, theirs))
            assert (a.rows >= 0).tolist() == (b.rows >= 0).tolist()
            factor = params.get("k1", 1.2) + 1
            assert np.allclose(a.scores[a.rows >= 0] * factor, b.scores[b.rows >= 0], rtol=1e-4)


def test_terms_of_any_script_reach_milvus_whole():
    texts = ["हिन्दी किताबें", "हिन्दू", "防水登山鞋", "登高", "size 3.5", "size 3 or 5", "0x65 e"]
    ours, theirs = (retrievers.open(kind, make_catalog(texts), language=None) for kind in ("bm25", "milvus"))
    for text in ("हिन्दी", "हिन्दू", "登山", "3.5", "5", "0x65", "e"):
        a, b = (one.search([Query(text)], len(texts)) for one in (ours, theirs))
        assert a.rows.tolist() == b.rows.tolist()


def test_ties_across_the_cut(tmp_path):
    catalog = make_catalog(["same words"] * 300 + ["words"])
    milvus = retrievers.open("milvus", catalog)
    for k in (1, 64, 200, 300, 301):
        assert milvus.search([Query("same")], k).rows[0].tolist() == ([*list(range(300)), -1])[:k]
    assert milvus.ranks([Query("same")], np.array([[0, 299, 300]])).tolist() == [[1, 300, 0]]


def test_documents_longer_than_milvus_stores_are_cut(caplog):
    texts = ["早" * 30_000 + " early", "word " * 20_000 + "late", "late"]
    milvus = retrievers.open("milvus", make_catalog(texts))
    assert "2 documents were cut" in caplog.text
    assert milvus.search([Query("late")], 3).rows[0].tolist() == [2, -1, -1]


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        yield "party"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_texts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retrievers.open("milvus", make_catalog(), tmp_path / "index")
    assert list(tmp_path.iterdir()) == []
    assert ask(tmp_path / "index")[0][0] == 0


def test_a_damaged_or_foreign_folder_is_refused(tmp_path):
    folder = tmp_path / "index"
    ask(folder)
    with pytest.raises(RetrieverError, match="built with another params"):
        retrievers.open("milvus", make_catalog(), folder, k1=2.0)
    with pytest.raises(RetrieverError, match="built with another catalog"):
        retrievers.open("milvus", make_catalog(TEXTS[::-1]), folder)
    (folder / "milvus.db").rename(folder / "elsewhere")
    with pytest.raises(RetrieverError, match=r"damaged.*delete the folder"):
        retrievers.open("milvus", make_catalog(), folder)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"mode": "both"}, ValueError, "choose text or dense"),
        ({"uri": "milvus.db"}, ValueError, r"uri must be http\(s\)://HOST:PORT .*leave uri out to use a folder"),
        ({"uri": "milvus://me:secret@host"}, ValueError, r"^[^@]*password[^@]*MILVUS_TOKEN[^@]*$"),
        ({"index": "FLAT"}, ValueError, "index must be a mapping"),
        ({"b": 3}, ValueError, "b must be a number from 0 to 1"),
        ({"k1": 0}, ValueError, "k1 must be above 0, because Milvus refuses 0"),
        (
            {"index": {"metric_type": "L2"}},
            ValueError,
            "index.metric_type: the retriever sets it itself: leave it out",
        ),
        ({"search": {"metric_type": "L2"}}, ValueError, "search.metric_type: the retriever sets it"),
        ({"search": {"offset": 2}}, ValueError, "search.offset: the retriever sets it"),
        ({"index": {"params": {"inverted_index_algo": "x"}}}, ValueError, "index: Milvus refuses .*'x'.*: change it"),
        ({"uri": "http://127.0.0.1:9"}, RetrieverError, "no Milvus answers at http://127.0.0.1:9"),
    ],
)
def test_mistakes_are_named(params, error, message):
    with pytest.raises(error, match=message):
        retrievers.open("milvus", make_catalog(), **params)


def test_a_cluster_is_the_same_backend_by_its_address(tmp_path):
    """A Milvus Lite server takes the place of a cluster. It has the same protocol on a socket."""
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    running, database, port = start_server_in_thread(str(tmp_path / "cluster"))
    try:
        uri = f"http://127.0.0.1:{port}"
        cluster = retrievers.open("milvus", make_catalog(), uri=uri)
        embedded = retrievers.open("milvus", make_catalog())
        assert cluster.fingerprint == embedded.fingerprint
        queries = [Query("party face"), Query("sad"), Query("zebra")]
        assert cluster.search(queries, 7).rows.tolist() == embedded.search(queries, 7).rows.tolist()
        names = cluster._client.list_collections()
        again = retrievers.open("milvus", make_catalog(), uri=uri)
        assert again._client.list_collections() == names and len(names) == 1  # Nothing is built twice.
        retrievers.open("milvus", make_catalog(TEXTS[:3]), uri=uri)
        assert len(again._client.list_collections()) == 2
    finally:
        running.stop(grace=0)
        database.close()
