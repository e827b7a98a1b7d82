"""Elasticsearch and OpenSearch, by a stand-in on a socket: indexes, ranks, snapshots, filters, outages, credentials."""

import base64
import importlib.util
import json
import logging
import pickle
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from standin import EngineError, Standin
from starlette.responses import JSONResponse, Response

import retrievers
from retrievers import Catalog, Query, RetrieverError
from retrievers.core.requests import OutageError
from retrievers.text.opensearch import backend as module
from retrievers.text.opensearch import documents, queries
from retrievers.text.opensearch.params import Params

WORDS = ["party", "face", "sad", "tada", "castle", "shoe", "runs", "blue", "green"]
RNG = np.random.default_rng(0)
# Short texts of few words: many documents have equal scores.
TEXTS = [" ".join(RNG.choice(WORDS, RNG.integers(1, 5))) for _ in range(120)]
CATALOG = Catalog.from_records(
    {"id": f"d{i}", "text": text, "title": text.split()[0], "brand": "acme" if i % 3 else "other"}
    for i, text in enumerate(TEXTS)
)
BM25 = retrievers.open("bm25", CATALOG)
QUICK = {"retries": 1, "timeout": 5.0}
SOURCES = {f"d{i}": {"text": text, "brand": CATALOG.column("brand")[i]} for i, text in enumerate(TEXTS)}
ENGLISH = {"analysis": {"analyzer": {"default": {"type": "english"}}}, "keywords": ["code", "brand"]}
QUERIES = [Query("party face"), Query("sad castle castle"), Query("zebra"), Query("blue")]
EVERY = np.tile(np.arange(-1, len(TEXTS)), (len(QUERIES), 1))


@pytest.fixture(scope="module")
def standins():
    found = {product: Standin(product) for product in ("opensearch", "elasticsearch")}
    yield found
    for one in found.values():
        one.stop()


@pytest.fixture
def standin(request, standins):
    """A stand-in of OpenSearch, or of the product that `both` names. It behaves well, and its index `shop` holds the
    catalogue's documents."""
    one = standins[getattr(request, "param", "opensearch")]
    one.trouble = one.search_trouble = lambda *_: None
    one.jitter = lambda score, ascending: score
    one.authorization = None
    one.add("shop", SOURCES, **ENGLISH)
    one.received.clear()
    return one


both = pytest.mark.parametrize("standin", ["opensearch", "elasticsearch"], indirect=True)


def connect(standin, catalog=CATALOG, folder=None, **params):
    return retrievers.open("opensearch", catalog, folder, url=standin.url, **QUICK | params)


def searches(standin) -> list[list[dict]]:
    """The bodies of each `_msearch`."""
    return [lines[1::2] for _, path, lines in standin.received if path == "/_msearch"]


def assert_like_bm25(retriever):
    assert retriever.ranks(QUERIES, EVERY).tolist() == BM25.ranks(QUERIES, EVERY).tolist()
    for k in (1, 7, len(TEXTS)):
        ours, theirs = retriever.search(QUERIES, k), BM25.search(QUERIES, k)
        assert ours.rows.tolist() == theirs.rows.tolist()
        assert np.allclose(ours.scores, theirs.scores, rtol=1e-6, atol=0)


@both
def test_an_existing_index_and_a_built_one_rank_alike(standin):
    existing, built = connect(standin, index="shop"), connect(standin)
    assert_like_bm25(existing)
    assert_like_bm25(built)
    assert len({existing.fingerprint, built.fingerprint}) == 2


@both
def test_the_other_name_is_the_same_backend(standin):
    one = retrievers.open("elasticsearch", CATALOG, url=standin.url)
    assert one.fingerprint == connect(standin).fingerprint
    with pytest.raises(ValueError, match=r"unknown parameter of 'elasticsearch': did you mean 'k1'"):
        retrievers.open("elasticsearch", CATALOG, k2=1)


@pytest.mark.slow
@pytest.mark.parametrize(("index", "queries"), [("shop", 10_000), (None, 500)])
def test_ten_thousand_random_queries_rank_as_by_brute_force(standin, index, queries):
    """One target per query, anywhere in the list. Equal scores are in the engine's order, which is not that of rows."""
    retriever = connect(standin, index=index, timeout=60.0)
    rng = np.random.default_rng(1)
    asked = [Query(" ".join(rng.choice([*WORDS, "the", "unseen"], rng.integers(1, 4)))) for _ in range(queries)]
    targets = rng.integers(-1, len(TEXTS), (len(asked), 1))
    got, expected = retriever.ranks(asked, targets), BM25.ranks(asked, targets)
    assert got.tolist() == expected.tolist()
    assert np.unique(got).size > 60  # Ranks deep in the list, and documents that are not retrieved.


@both
def test_a_batch_is_two_requests(standin):
    retriever = connect(standin, index="shop")
    standin.received.clear()
    asked = [Query(f"{word} {other}") for word in WORDS for other in WORDS][:60]
    retriever.ranks(asked, np.arange(60)[:, None])
    first, second = searches(standin)
    assert len(first) == 60 and all(body["_source"] is False and body["size"] == 1 for body in first)
    assert 0 < len(second) <= 60 and all(body["track_total_hits"] is True for body in second)
    assert {path for _, path, _ in standin.received} == {"/_msearch"}


def test_requests_are_bounded_in_searches_and_in_bytes(standin, monkeypatch):
    retriever = connect(standin, index="shop", batch_size=10)
    standin.received.clear()
    without = next(row for row, text in enumerate(TEXTS) if "party" not in text)
    assert not retriever.ranks([Query(f"party {i}") for i in range(35)], np.full((35, 1), without)).any()
    assert sorted(map(len, searches(standin))) == [5, 10, 10, 10]  # There is no score to count from.
    monkeypatch.setattr("retrievers.text.opensearch.searches.MAX_REQUEST_BYTES", 1200)
    standin.received.clear()
    long = [Query("party " * 200), Query("face " * 200), Query("sad")]
    assert retriever.search(long, 3).rows.tolist() == BM25.search(long, 3).rows.tolist()
    assert sorted(map(len, searches(standin))) == [1, 1, 1]


@pytest.mark.parametrize("towards", [np.inf, -np.inf])
def test_a_last_bit_that_depends_on_how_the_engine_searches_changes_no_rank(standin, towards):
    retriever = connect(standin, index="shop")
    standin.jitter = lambda score, ascending: np.nextafter(score, np.float32(towards)) if ascending else score
    assert retriever.ranks(QUERIES, EVERY).tolist() == BM25.ranks(QUERIES, EVERY).tolist()


@pytest.mark.slow
def test_many_equal_scores(standin, monkeypatch):
    equal = Catalog.from_records({"id": f"d{i}", "text": "same words" if i else "words"} for i in range(400))
    standin.add("equal", {f"d{i}": {"text": equal.texts[i]} for i in range(400)}, **ENGLISH)
    retriever = connect(standin, equal, index="equal")
    asked, targets = [Query("same")], np.array([[0, 1, 200, 399]])
    assert retriever.ranks(asked, targets).tolist() == [[0, 1, 200, 399]]
    for k in (1, 64, 150, 400):
        assert retriever.search(asked, k).rows[0].tolist() == [*range(1, 400), -1][:k]
    monkeypatch.setattr(module, "WINDOW", 100)  # An engine returns at most so many hits, and all are equal.
    bounded = connect(standin, equal, index="equal")
    assert bounded.ranks(asked, targets).tolist() == [[0, 399, 399, 399]]
    assert (bounded.search(asked, 400).rows[0, 100:] == -1).all()


def test_fields_with_weights(standin):
    weighted = connect(standin, fields={"title": 3, "text": 1})
    title, text = (retrievers.open("bm25", CATALOG, fields={name: 1}) for name in ("title", "text"))
    asked = [Query("party face")]
    both = [
        dict(zip(one.search(asked, len(TEXTS)).rows[0], one.search(asked, len(TEXTS)).scores[0], strict=True))
        for one in (title, text)
    ]
    expected = {row: 3 * both[0].get(row, 0) + both[1].get(row, 0) for row in {*both[0], *both[1]} - {-1}}
    hits = weighted.search(asked, len(TEXTS))
    found = {row: score for row, score in zip(hits.rows[0], hits.scores[0], strict=True) if row >= 0}
    assert found.keys() == expected.keys() and np.allclose([found[row] for row in expected], [*expected.values()])


TEMPLATE = {"bool": {"must": [{"match": {"text": {"query": "{query}"}}}]}}


def test_a_template_and_a_filter(standin):
    retriever = connect(standin, index="shop", template=TEMPLATE, filter=[{"term": {"brand": "acme"}}])
    rows = retriever.search(QUERIES, len(TEXTS)).rows
    plain = BM25.search(QUERIES, len(TEXTS)).rows
    for filtered, whole in zip(rows, plain, strict=True):
        assert [row for row in filtered if row >= 0] == [row for row in whole if row >= 0 and row % 3]
    ranks = retriever.ranks(QUERIES, EVERY)
    assert ranks.tolist() == retrievers.ranks_from_search(retriever.search, QUERIES, EVERY, len(TEXTS)).tolist()
    assert (ranks[:, 1::3] == 0).all()  # The rows 0, 3, 6 … are of another brand.
    body = connect(
        standin, index="shop", template={"query": TEMPLATE, "size": 10}, filter=[{"term": {"brand": "acme"}}]
    )
    assert body.fingerprint == retriever.fingerprint  # What a search needs besides its query does not matter.


HOSTILE = [
    '"', "'", "\\", '"}},{"match_all":{}}', '"}}]}}\n{}\n{"query":{"match_all":{}}}\n', "{query}", "*:*", "a OR *:*",
    '{"match_all": {}}', "\x00\x01\x1f\x7f\u2028\u2029", "\ud800 party", "🎉" * 50, "x" * 1_000_000, "%0a%0d",
    "../_delete_by_query", "party AND NOT brand:acme", ") OR (*:*", "/shop/_search?q=*", "ctx._source.remove('x')",
    "<script>", "party^9",
]  # fmt: skip


def hostile() -> list[str]:
    rng = np.random.default_rng(2)
    return HOSTILE + ["".join(rng.choice(HOSTILE[:12] + WORDS, 4)) for _ in range(500 - len(HOSTILE))]


@pytest.mark.slow
@pytest.mark.parametrize("template", [None, TEMPLATE, {"query_string": {"query": "{query}", "default_field": "text"}}])
def test_hostile_queries_only_search_and_bypass_no_filter(standin, template):
    brand = {"term": {"brand": "acme"}}
    retriever = connect(standin, index="shop", template=template, filter=[brand])
    standin.received.clear()
    asked = [Query(text) for text in hostile()]
    rows = retriever.search(asked, len(TEXTS)).rows
    ranks = retriever.ranks(asked, np.tile(np.arange(len(TEXTS)), (500, 1))[:, :6])
    assert not (rows[rows >= 0] % 3 == 0).any() and (ranks[:, ::3] == 0).all() and (ranks >= 0).all()
    assert {(method, path) for method, path, _ in standin.received} == {("POST", "/_msearch")}
    sent = [body for bodies in searches(standin) for body in bodies]
    assert len(sent) > 1000
    expected = shape(queries.Form({"text": 1.0}, template, [brand]).query("x"))
    for body in sent:
        assert set(body["query"]) == {"bool"} and body["query"]["bool"]["filter"][0] == brand
        narrowed = body["query"]["bool"]["filter"][1:]
        assert all(set(one) == {"ids"} for one in narrowed)
        assert shape({"bool": {**body["query"]["bool"], "filter": [brand]}}) == expected


def shape(node):
    """A query without its texts."""
    if isinstance(node, dict):
        return {key: shape(value) for key, value in node.items()}
    return [shape(one) for one in node] if isinstance(node, list) else "" if isinstance(node, str) else node


@settings(max_examples=60)
@given(st.text(st.characters(), max_size=60))
def test_a_text_stays_a_value(text):
    """Whatever a model writes, the query differs from another one in a single text."""
    text = queries.clean(text)
    form = queries.Form({}, TEMPLATE, [{"term": {"brand": "acme"}}])
    sent = json.loads(json.dumps(form.query(text)))
    assert sent["bool"]["must"][0]["bool"]["must"][0]["match"]["text"]["query"] == text
    assert shape(sent) == shape(form.query("x")) and "\n" not in json.dumps(sent)


def test_what_a_production_query_refuses_finds_nothing(standin, caplog):
    template = {"query_string": {"query": "{query}", "default_field": "text"}}
    retriever = connect(standin, index="shop", template=template)
    asked = [Query('party "face'), Query("party")]
    assert retriever.ranks(asked, EVERY[:2])[0].max() == 0
    assert retriever.search(asked, 3).rows[0].tolist() == [-1, -1, -1]
    assert retriever.search(asked, 3).rows[1].tolist() == BM25.search(asked, 3).rows[1].tolist()
    assert caplog.text.count("refuses a query, which therefore retrieves nothing") == 1


def test_one_query_that_cannot_be_read_does_not_take_others_with_it(standin):
    retriever = connect(standin, index="shop")

    def unreadable(body):
        if "sad" in json.dumps(body["query"]):
            raise EngineError(400, "parsing_exception", "no")  # The engine refuses the whole request.

    standin.search_trouble = unreadable
    expected = BM25.ranks(QUERIES, EVERY)
    expected[1] = 0
    assert retriever.ranks(QUERIES, EVERY).tolist() == expected.tolist()


def test_a_query_with_too_many_terms_is_cut(standin):
    retriever = connect(standin, index="shop")
    long = [Query("party " * 1500 + "castle"), Query("castle")]  # The engine takes 1024 terms.
    expected = BM25.ranks([Query("party"), Query("castle")], EVERY[:2])
    assert ((retriever.ranks(long, EVERY[:2]) > 0) == (expected > 0)).all()


def test_a_nearest_neighbour_clause_is_said_to_be_bounded(standin, caplog):
    retriever = connect(standin, index="shop", template={"knn": {"text": "{query}", "k": 5}})
    assert "the template has a knn clause" in caplog.text
    ranks = retriever.ranks([Query("party")], EVERY[:1])
    assert sorted(rank for rank in ranks[0] if rank) == [1, 2, 3, 4, 5]
    expected = retrievers.ranks_from_search(retriever.search, [Query("party")], EVERY[:1], len(TEXTS))
    assert ranks.tolist() == expected.tolist()


# ---- the documents of an existing index


def test_documents_that_only_one_side_has(standin, caplog):
    sources = {one: source for one, source in SOURCES.items() if one not in ("d3", "d50")}
    standin.add("drifted", sources | {"new1": {"text": "party party"}, "new2": {"text": "party"}}, **ENGLISH)
    retriever = connect(standin, index="drifted")
    assert "lacks 2 of the 120 documents of the catalogue" in caplog.text and "the first: 'd3', 'd50'" in caplog.text
    assert "holds 2 documents that the catalogue lacks" in caplog.text and "the first: 'new1', 'new2'" in caplog.text
    assert retrievers.absent(retriever) == retrievers.absent(retrievers.Cache(retriever, len(TEXTS))) == {3, 50}
    ranks = retriever.ranks(QUERIES, EVERY)
    assert (ranks[:, [4, 51]] == 0).all()
    assert ranks.tolist() == retrievers.ranks_from_search(retriever.search, QUERIES, EVERY, len(TEXTS)).tolist()
    assert ranks.max(axis=1)[0] == (ranks[0] > 0).sum()  # The documents that are left out take no rank.


@both
def test_ids_in_a_field(standin, caplog):
    sources = {f"x{i}": {"text": text, "code": f"d{i}"} for i, text in enumerate(TEXTS)}
    standin.add("coded", sources, **ENGLISH)
    assert_like_bm25(connect(standin, index="coded", id_field="code"))
    with pytest.raises(
        RetrieverError, match=r"none of its 120 documents \(the first has the id 'x0'\) is in the catalogue"
    ):
        connect(standin, index="coded")
    with pytest.raises(ValueError, match=r"has no field 'text' of type keyword: choose from code, or leave it out"):
        connect(standin, index="coded", id_field="text")
    standin.write("coded", "x119", {"text": "party", "code": "d0"})
    with pytest.raises(RetrieverError, match="several documents have the id 'd0'"):
        connect(standin, index="coded", id_field="code")


def test_too_many_foreign_documents_are_refused_unless_a_filter_leaves_them_out(standin, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LEFT_OUT", 2)
    foreign = {f"n{i}": {"text": "party", "brand": "new"} for i in range(3)}
    standin.add("large", SOURCES | foreign, **ENGLISH)
    with pytest.raises(
        RetrieverError, match=r"holds 3 documents .* the first: 'n0', 'n1', 'n2': set retriever.params.filter"
    ):
        connect(standin, index="large")
    retriever = connect(standin, index="large", filter=[{"terms": {"brand": ["acme", "other"]}}])
    ranks = retriever.ranks(QUERIES, EVERY)
    assert ranks.tolist() == retrievers.ranks_from_search(retriever.search, QUERIES, EVERY, len(TEXTS)).tolist()
    assert ((ranks > 0) == (BM25.ranks(QUERIES, EVERY) > 0)).all()


@pytest.mark.slow
def test_the_comparison_is_kept_for_each_state(standin, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PAGE", 7)
    connect(standin, folder=tmp_path / "index", index="shop")
    read = [path for _, path, _ in standin.received if "scroll" in path or path.endswith("_search")]
    assert len(read) == 1 + 18 + 1  # 120 documents in pages of 7, and the end.
    standin.received.clear()
    again = connect(standin, folder=tmp_path / "index", index="shop")
    assert not [path for _, path, _ in standin.received if "scroll" in path or path == "/shop/_search"]
    standin.write("shop", "d0", None)
    other = connect(standin, folder=tmp_path / "index", index="shop")
    assert other.fingerprint != again.fingerprint and retrievers.absent(other) == {0}
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_a_field_that_the_index_lacks_is_named(standin):
    with pytest.raises(ValueError, match=r"fields: shop has no field 'titel': choose from text, brand"):
        connect(standin, index="shop", fields={"titel": 1})
    with pytest.raises(ValueError, match="the catalogue has no field 'titel'"):
        connect(standin, fields={"titel": 1})
    with pytest.raises(RetrieverError, match="shop2"):
        connect(standin, index="shop2")


# ---- the index of a catalogue


def test_an_interrupted_build_leaves_nothing(standin, monkeypatch):
    catalog = Catalog.from_records([{"id": "a", "text": "interrupted"}])
    before = set(standin.indexes)
    with monkeypatch.context() as patch:
        patch.setattr(documents, "_bulks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            connect(standin, catalog)
    assert set(standin.indexes) == before
    assert connect(standin, catalog).search([Query("interrupted")], 1).rows.tolist() == [[0]]
    assert len(standin.indexes) == len(before) + 1
    connect(standin, catalog)
    assert len(standin.indexes) == len(before) + 1  # It is found again.


@pytest.mark.slow
def test_two_builds_at_the_same_time_end_with_one_index(standin):
    catalog = Catalog.from_records({"id": str(i), "text": f"twice {i}"} for i in range(50))
    before = set(standin.indexes)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: connect(standin, catalog).fingerprint, range(4)))
    assert len(set(found)) == 1 and len(standin.indexes) == len(before) + 1


def test_leftovers_of_killed_builds_are_deleted_after_a_day(standin):
    catalog = Catalog.from_records([{"id": "a", "text": "leftover"}])
    name = connect(standin, catalog)._searches.index.name
    (built,) = standin.aliases.pop(name)
    standin.indexes[built]["made"] -= 25 * 3600
    standin.add(f"{name}-running", {})
    connect(standin, catalog)
    assert built not in standin.indexes and f"{name}-running" in standin.indexes


@both
def test_documents_for_which_there_is_no_room_are_sent_again(standin, monkeypatch):
    monkeypatch.setattr("retrievers.text.opensearch.documents.time.sleep", lambda _: None)
    catalog = Catalog.from_records({"id": str(i), "text": f"full {i}"} for i in range(9))
    answers = iter([429, 201])

    def crowded(method, path):
        code = next(answers, None) if path.endswith("_bulk") else None
        if code != 429:
            return None
        items = [{"index": {"_id": str(i), "status": 429, "error": {"type": "rejected"}}} for i in range(9)]
        return JSONResponse({"errors": True, "items": items}, headers={"x-elastic-product": "Elasticsearch"})

    standin.trouble = crowded
    assert connect(standin, catalog).search([Query("full")], 9).rows[0].tolist() == list(range(9))
    standin.trouble = lambda method, path: (
        JSONResponse(
            {
                "errors": True,
                "items": [{"index": {"status": 400, "error": {"type": "mapper_parsing_exception", "reason": "no"}}}],
            },
            headers={"x-elastic-product": "Elasticsearch"},
        )
        if path.endswith("_bulk")
        else None
    )
    with pytest.raises(RetrieverError, match="refuses document 0: mapper_parsing_exception: no"):
        connect(standin, Catalog.from_records([{"id": "a", "text": "bad"}]))


def test_an_index_that_lost_documents_is_refused(standin):
    catalog = Catalog.from_records({"id": str(i), "text": f"lost {i}"} for i in range(3))
    (built,) = standin.aliases[connect(standin, catalog)._searches.index.name]
    standin.write(built, "1", None)
    with pytest.raises(RetrieverError, match="holds 2 instead of 3 documents: delete this index"):
        connect(standin, catalog)


# ---- the snapshot


def test_a_snapshot_does_not_see_what_is_written(standin):
    retriever = connect(standin, index="shop")
    before = retriever.search(QUERIES, 9).rows.tolist()
    standin.write("shop", "d0", {"text": "blue " * 9})
    assert retriever.search(QUERIES, 9).rows.tolist() == before
    assert connect(standin, index="shop").search(QUERIES, 9).rows.tolist() != before


@both
def test_a_snapshot_that_expires_is_opened_again(standin):
    retriever = connect(standin, index="shop", retries=0)
    standin.pits.clear()
    opened = standin.opened
    assert_like_bm25(retriever)
    assert standin.opened == opened + 1
    standin.pits.clear()
    standin.write("shop", "d0", None)
    with pytest.raises(RetrieverError, match="was changed while it was in use"):
        retriever.ranks(QUERIES, EVERY)
    assert not standin.pits  # The new one is closed again.


def test_a_name_of_the_users_stands_for_the_state(standin):
    named = connect(standin, index="shop", snapshot="2026-11")
    assert not [path for _, path, _ in standin.received if "_stats" in path]  # The user need not be allowed to ask.
    standin.write("shop", "d0", {"text": "blue"})
    assert connect(standin, index="shop", snapshot="2026-11").fingerprint == named.fingerprint
    assert connect(standin, index="shop", snapshot="2026-12").fingerprint != named.fingerprint


@both
def test_a_snapshot_is_closed(standin):
    standin.pits.clear()
    retriever = connect(standin, index="shop")
    copy = pickle.loads(pickle.dumps(retriever))
    copy.search(QUERIES, 3)
    assert len(standin.pits) == 2  # Each process has its own.
    copy._searches.close()
    assert len(standin.pits) == 1
    assert_like_bm25(copy)  # It opens another one.


ENDS = """
import sys, retrievers
catalog = retrievers.Catalog.from_records([{"id": "a", "text": "ends"}])
retrievers.open("opensearch", catalog, url=sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_that_ends_closes_its_snapshot(standin):
    standin.pits.clear()
    opened = standin.opened
    subprocess.run([sys.executable, "-c", ENDS, standin.url], check=True, timeout=60)
    assert standin.opened == opened + 1 and not standin.pits


@pytest.mark.slow
def test_the_fingerprint_follows_what_changes_a_rank(standin):
    usual = connect(standin, index="shop").fingerprint
    assert (
        connect(standin, index="shop", timeout=9.0, batch_size=3, connections=1, keep_alive="1h").fingerprint == usual
    )
    others = [{"fields": {"text": 2}}, {"fields": {"text": 1, "brand": 1}}, {"template": TEMPLATE}]
    others += [{"filter": [{"term": {"brand": "acme"}}]}]
    found = {connect(standin, index="shop", **params).fingerprint for params in others}
    built = {connect(standin, **params).fingerprint for params in ({}, {"language": "de"}, {"k1": 0.9}, {"b": 0.4})}
    assert len(found | built | {usual}) == 9


# ---- failures


def failure(status, kind, reason="busy"):
    return {"error": {"type": kind, "reason": reason}, "status": status}


SINGLE = {
    "rejected": failure(429, "es_rejected_execution_exception"),
    "no shard": failure(503, "search_phase_execution_exception", "all shards failed"),
    "server error": failure(500, "null_pointer_exception"),
    "some shards": {"timed_out": False, "_shards": {"total": 2, "failed": 1}, "hits": {"hits": []}, "status": 200},
    "timed out": {"timed_out": True, "_shards": {"failed": 0}, "hits": {"hits": []}, "status": 200},
    "no object": [],
    "no hits": {"timed_out": False, "_shards": {"failed": 0}, "status": 200},
    "no score": {"timed_out": False, "_shards": {"failed": 0}, "hits": {"hits": [{"_id": "d1", "_score": None}]}},
    "a document twice": {
        "timed_out": False, "_shards": {"failed": 0}, "hits": {"hits": [{"_id": "d1", "_score": 1.0}] * 2},
    },
    "no exact total": {
        "timed_out": False, "_shards": {"failed": 0}, "hits": {"total": {"value": 9, "relation": "gte"}, "hits": []},
    },
}  # fmt: skip


@pytest.fixture
def no_pauses(monkeypatch):
    """The seconds that would be waited between attempts."""
    pauses = []
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    return pauses


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_a_search_that_fails_is_an_outage_of_its_query_alone(standin, name, no_pauses):
    retriever = connect(standin, index="shop")
    standin.search_trouble = lambda body: SINGLE[name] if "sad" in json.dumps(body["query"]) else None
    ranks = retriever.ranks(QUERIES, EVERY)
    expected = BM25.ranks(QUERIES, EVERY)
    expected[1] = -1
    assert ranks.tolist() == expected.tolist()
    with pytest.raises(OutageError):
        retriever.search(QUERIES, 3)
    standin.search_trouble = lambda body: SINGLE[name]
    with pytest.raises(OutageError):
        retriever.ranks(QUERIES, EVERY)


def test_only_the_searches_that_failed_are_sent_again(standin, no_pauses):
    retriever = connect(standin, index="shop")
    standin.received.clear()
    failing = iter([SINGLE["rejected"]])
    standin.search_trouble = lambda body: next(failing, None) if "sad" in json.dumps(body["query"]) else None
    assert retriever.search(QUERIES, 9).rows.tolist() == BM25.search(QUERIES, 9).rows.tolist()
    assert [len(bodies) for bodies in searches(standin)] == [4, 1] and len(no_pauses) == 1


WHOLE = {
    "429": lambda: JSONResponse(failure(429, "circuit_breaking_exception"), 429, {"retry-after": "7"}),
    "503": lambda: JSONResponse(failure(503, "master_not_discovered_exception"), 503, {"retry-after": "7"}),
    "500": lambda: JSONResponse(failure(500, "exception"), 500),
    "502 of a gateway": lambda: Response("<html>\x1b[31mbad gateway", 502),
    "404 of a gateway": lambda: Response("<html>not found", 404),
    "redirect": lambda: Response("", 302, {"location": "http://127.0.0.1:9/"}),
    "a page": lambda: Response("<html>login", 200),
    "a list": lambda: JSONResponse([1]),
    "too few results": lambda: JSONResponse({"responses": []}, headers={"x-elastic-product": "Elasticsearch"}),
}


@pytest.mark.slow
@both
@pytest.mark.parametrize("name", WHOLE)
def test_a_request_without_an_answer_is_sent_again_and_then_an_outage(standin, name, no_pauses):
    retriever = connect(standin, index="shop")
    playing = iter([WHOLE[name]])
    standin.trouble = lambda method, path: play() if path == "/_msearch" and (play := next(playing, None)) else None
    assert retriever.ranks(QUERIES, EVERY).tolist() == BM25.ranks(QUERIES, EVERY).tolist()
    assert len(no_pauses) == 1 and (no_pauses[0] >= 7) == (name in ("429", "503"))  # What Retry-After asks for.
    standin.trouble = lambda method, path: WHOLE[name]() if path == "/_msearch" else None
    with pytest.raises(OutageError) as caught:
        retriever.ranks(QUERIES, EVERY)
    assert str(caught.value).isprintable() and standin.url in str(caught.value)


def test_after_several_failures_nothing_is_sent_for_a_while(standin, no_pauses):
    retriever = connect(standin, index="shop", breaker_failures=3, retries=9)
    standin.trouble = lambda method, path: WHOLE["500"]() if path == "/_msearch" else None
    with pytest.raises(OutageError, match="3 requests in a row have failed"):
        retriever.ranks(QUERIES, EVERY)
    standin.received.clear()
    with pytest.raises(OutageError, match="the next attempt is in"):
        retriever.ranks(QUERIES, EVERY)
    assert not standin.received


@pytest.mark.slow
@both
def test_what_cannot_pass_ends_the_run(standin):
    retriever = connect(standin, index="shop")
    for play, message in (
        (failure(404, "index_not_found_exception", "no such index [shop]"), "the index was deleted"),
        (failure(403, "security_exception", "no"), "may not search"),
        (failure(400, "parsing_exception", "unknown query [mach]"), "refuses every query"),
    ):
        standin.search_trouble = lambda body, play=play: play
        with pytest.raises(RetrieverError, match=message):
            pickle.loads(pickle.dumps(retriever)).ranks(QUERIES, EVERY)
    standin.search_trouble = lambda body: None
    with pytest.raises(RetrieverError, match=r"refuses every query: parsing_exception: unknown query \[mach\]"):
        connect(standin, index="shop", template={"mach": {"text": "{query}"}})


def test_the_rate_is_limited_over_all_threads(standin, monkeypatch):
    retriever = connect(standin, index="shop", requests_per_second=10, connections=8, batch_size=1)
    slept = []
    clock = SimpleNamespace(monotonic=lambda: 1e6, sleep=slept.append)
    monkeypatch.setattr("retrievers.text.opensearch.cluster.time", clock)
    retriever.search([Query(word) for word in WORDS], 3)
    assert np.allclose(sorted(slept), np.arange(9) / 10, atol=1e-6)
    retriever._searches.close()


# ---- credentials and mistakes


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.slow
@both
def test_credentials_come_from_the_environment_and_stay_there(standin, monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    standin.authorization = basic("shop", "s3cret-wörd")
    with pytest.raises(RetrieverError, match=r"status 401: check \$REC_R1_OPENSEARCH_USER"):
        connect(standin, index="shop")
    monkeypatch.setenv("REC_R1_OPENSEARCH_USER", "shop")
    with pytest.raises(RetrieverError, match="is set without"):
        connect(standin, index="shop")
    monkeypatch.setenv("REC_R1_OPENSEARCH_PASSWORD", "s3cret-wörd")
    retriever = connect(standin, folder=tmp_path, index="shop")
    assert_like_bm25(retriever)
    monkeypatch.setenv("REC_R1_OPENSEARCH_PASSWORD", "s3cret-wrong")
    other = pickle.loads(pickle.dumps(retriever))
    with pytest.raises(RetrieverError, match="401") as caught:
        other.ranks(QUERIES, EVERY)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    everything = [str(caught.value), caplog.text, written, retriever.fingerprint, str(vars(retriever))]
    secrets = "s3cret", basic("shop", "s3cret-wörd")[6:], basic("shop", "s3cret-wrong")[6:]
    assert not [secret for secret in secrets for text in everything if secret in text]
    assert not any(secret.encode() in pickle.dumps(retriever) for secret in secrets)


@both
def test_an_api_key(standin, monkeypatch):
    standin.authorization = "ApiKey s3cret=="
    monkeypatch.setenv("REC_R1_OPENSEARCH_API_KEY", "s3cret==")
    assert_like_bm25(connect(standin, index="shop"))
    monkeypatch.setenv("REC_R1_OPENSEARCH_API_KEY", "s3cret\n==")
    with pytest.raises(RetrieverError, match="has a character that a key cannot have") as caught:
        connect(standin, index="shop")
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("REC_R1_OPENSEARCH_USER", "shop")
    with pytest.raises(RetrieverError, match="unset one of them"):
        connect(standin, index="shop")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that no authority has signed, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    made = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=standin -addext subjectAltName=IP:127.0.0.1"
    paths = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", *made.split(), "-out", paths[0], "-keyout", paths[1]], check=True, capture_output=True, timeout=60
    )
    return paths


@pytest.mark.slow
@both
def test_certificates_are_verified(standin, certificate):
    config = uvicorn.Config(
        standin.app(), port=0, ssl_certfile=certificate[0], ssl_keyfile=certificate[1], log_level="error"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    secure = SimpleNamespace(url=f"https://127.0.0.1:{port}")
    with pytest.raises(RetrieverError, match=r"no Elasticsearch or OpenSearch answers at https://.*(?i:certificate)"):
        connect(secure, index="shop")
    retriever = connect(secure, index="shop", ca_certs=str(certificate[0]))
    assert_like_bm25(retriever)
    retriever._searches.close()
    server.should_exit = server.force_exit = True
    thread.join(timeout=30)


@both
def test_other_servers_and_old_versions_are_refused(standin):
    product = standin.root
    for root, message in (
        ({"hello": "world"}, "neither Elasticsearch nor OpenSearch|no Elasticsearch or OpenSearch answers"),
        (
            product | {"version": product["version"] | {"number": "1.3.2"}},
            "is (opensearch|elasticsearch) 1.3.2: upgrade",
        ),
    ):
        standin.root = root
        if "hello" in root and standin.product == "elasticsearch":
            continue  # Its header says what it is.
        with pytest.raises(RetrieverError, match=message):
            connect(standin)
    standin.root = product
    with pytest.raises(RetrieverError, match=r"no Elasticsearch or OpenSearch answers at http://127.0.0.1:9 \("):
        retrievers.open("opensearch", CATALOG, url="http://127.0.0.1:9", retries=0)


def test_opensearch_in_its_compatibility_mode_is_found_out():
    standin = Standin()
    standin.root = {"version": {"number": "7.10.2", "lucene_version": "9.12.1"}, "tagline": standin.root["tagline"]}
    assert_like_bm25(connect(standin))
    standin.stop()


MISTAKES = [
    ({"url": "127.0.0.1:9200"}, r"url must be http\(s\)://HOST:PORT .* got '127.0.0.1:9200'"),
    ({"url": "https://me:s3cret@host:1"}, "set the user in [$]REC_R1_OPENSEARCH_USER"),
    ({"url": "https://host:1?key=s3cret"}, "without user, password and .query: set"),
    ({"index": ""}, "index must be a name or null, got ''"),
    ({"index": 3}, "index must be a name or null, got 3"),
    ({"fields": {}}, "fields must map fields to weights above 0, got {}"),
    ({"fields": {"text": 0}}, "weights above 0"),
    ({"fields": {"text": True}}, "weights above 0"),
    ({"fields": {"text^9": 1}}, "weights above 0"),
    ({"fields": ["text"]}, "weights above 0"),
    ({"template": {"match": {"text": "party"}}}, "template holds no {query}"),
    ({"template": {"match": {"{query}": "{query}"}}}, "in the name of a key"),
    ({"template": {"script_score": {"query": {"match_all": {}}, "script": {"source": "{query}"}}}}, "code of a script"),
    ({"template": {"script_score": {"query": {"match_all": {}}, "script": "{query}"}}}, "code of a script"),
    ({"template": {"match": {"text": "{query}"}, "term": {}}}, "template must be one query"),
    ({"template": "{query}"}, "template must be one query"),
    ({"template": {"hybrid": {"queries": [{"match": {"text": "{query}"}}]}}}, "retriever.kind=hybrid"),
    ({"template": {"query": {"match": {"text": "{query}"}}, "rescore": {}}}, "'rescore' beside the query"),
    ({"filter": [{"term": {"brand": "{query}"}}]}, "must not depend on what a model writes"),
    ({"filter": {"term": {"brand": "acme"}}}, "filter must be a list of clauses"),
    ({"filter": [{"term": {}, "match": {}}]}, "filter must be a list of clauses"),
    ({"id_field": "code"}, "id_field is not read for an index that is built"),
    ({"snapshot": "a"}, "snapshot is not read for an index that is built"),
    ({"index": "shop", "k1": 2.0}, "k1 is not read for the existing index 'shop'"),
    ({"index": "shop", "language": "de"}, "language is not read for the existing index"),
    ({"template": {"match": {"title": "{query}"}}, "fields": {"title": 1}}, "fields is not read for a template"),
    ({"b": 3}, "b must lie in"),
    ({"language": "klingon"}, "language: unknown 'klingon'"),
    ({"keep_alive": "soon"}, "keep_alive must be a time such as 90s, 10m or 2h, got 'soon'"),
    ({"batch_size": 0}, "batch_size must be an integer >= 1"),
    ({"connections": 0}, "connections must be an integer >= 1"),
    ({"retries": -1}, "retries must be an integer >= 0"),
    ({"timeout": 0}, "timeout must be a number above 0"),
    ({"requests_per_second": 0}, "requests_per_second must be a number above 0"),
    ({"ca_certs": "/nowhere.pem"}, "ca_certs: there is no file '/nowhere.pem'"),
]  # fmt: skip


@pytest.mark.parametrize(("params", "message"), MISTAKES)
def test_mistakes_are_named(params, message):
    with pytest.raises(ValueError, match=message) as caught:
        Params(**params)
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_script_may_take_the_text_in_its_params():
    script = {"source": "params.words", "params": {"words": "{query}"}}
    template = {"script_score": {"query": {"match": {"text": "{query}"}}, "script": script}}
    filled = queries.Form({}, Params(template=template).template, []).query("party")["bool"]["must"][0]
    assert filled["script_score"]["script"] == {"source": "params.words", "params": {"words": "party"}}


def test_ports_and_paths():
    given = ["http://a", "https://a", "https://a:7/x/", "http://[::1]", "http://[::1]:9"]
    expected = ["http://a:9200", "https://a:443", "https://a:7/x", "http://[::1]:9200", "http://[::1]:9"]
    assert [Params(url=url).address().with_port for url in given] == expected


def test_a_missing_package_says_which_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "opensearchpy" else found(name)
    )
    message = r"needs opensearchpy, which is not installed: pip install 'rec-r1\[opensearch\]'"
    with pytest.raises(RetrieverError, match=message):
        retrievers.open("opensearch", CATALOG)
