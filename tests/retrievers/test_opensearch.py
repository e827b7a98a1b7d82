"""Elasticsearch and OpenSearch, by a stand-in on a socket: ranks, templates, filters, and hostile queries."""

import datetime
import json
import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opensearch_data import (
    BM25,
    CATALOG,
    ENGLISH,
    EVERY,
    QUERIES,
    TEMPLATE,
    TEXTS,
    WORDS,
    assert_like_bm25,
    both,
    connect,
    searches,
)
from standin_documents import EngineError

import retrievers
from retrievers import Catalog, Query
from retrievers.text.opensearch import backend as module
from retrievers.text.opensearch import queries


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
    with pytest.raises(ValueError, match=r"unknown parameter of 'elasticsearch': choose from .*, k1"):
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
    assert bounded.ranks(asked, targets).tolist() == [[0, 397, 398, 399]]
    assert bounded.ranks([*asked, Query("words")], np.array([[399, -1, 200], [5, 7, 6]]))[0].tolist() == [399, 0, 398]
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


def test_dates_are_sent_as_texts(standin):
    """The dates of Python, which a program may give. In a recipe, a date is a text."""
    moment = datetime.datetime(2026, 5, 1, 10, 30, tzinfo=datetime.UTC)
    days = [moment.date(), moment, moment.time()]
    template = {"bool": {"must": [{"match": {"text": "{query}"}}], "should": [{"terms": {"day": days}}]}}
    retriever = connect(standin, index="shop", template=template, filter=[{"terms": {"brand": ["acme", *days]}}])
    retriever.search(QUERIES, 3)
    query = searches(standin)[-1][-1]["query"]["bool"]
    texts = ["2026-05-01", "2026-05-01T10:30:00+00:00", "10:30:00"]
    assert query["must"][0]["bool"]["should"] == [{"terms": {"day": texts}}]
    assert query["filter"][0] == {"terms": {"brand": ["acme", *texts]}}
    written = connect(standin, index="shop", template=template, filter=[{"terms": {"brand": ["acme", *texts]}}])
    assert written.fingerprint == retriever.fingerprint


def ask_forked(retriever, answers) -> None:
    answers.put(retriever.search(QUERIES, 9).rows.tolist())


@both
def test_a_forked_process_has_connections_of_its_own(standin):
    """Two processes on one connection would read the answers to each other's queries."""
    retriever = connect(standin, index="shop", connections=1)
    expected = retriever.search(QUERIES, 9).rows.tolist()
    ours = set(standin.clients)
    standin.clients.clear()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=ask_forked, args=(retriever, answers))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and answers.get() == expected
    assert standin.clients and not ours & set(standin.clients)
    assert retriever.search(QUERIES, 9).rows.tolist() == expected
