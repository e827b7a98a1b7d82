"""Structured queries: the check against a schema, BM25's formula for fields, wrappers, and who refuses them."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import serve
from starlette.testclient import TestClient
from structured_data import BRANDS, FIELDS, asked, catalog, documents_of, is_hit, queries, score

import retrievers
from retrievers import Cache, Query, RetrieverError, Schema, Structured, Unseen
from retrievers.serving import server
from retrievers.serving.structured import schema_from_json, schema_to_json
from retrievers.text.analysis import words, words_as_written
from retrievers.text.opensearch.queries import in_parts
from retrievers.text.structured import CAUSES, examples_of, problem

CATALOG = catalog()
DOCUMENTS = documents_of(CATALOG)
SETTINGS = {"language": None, "fields": FIELDS, "structured": {"filters": ["brand", "color"]}}
BM25 = retrievers.open("bm25", CATALOG, **SETTINGS)
SCHEMA = Schema(("title", "text"), ("title", "text"), (("brand", ("Acme",)), ("color", ())))


def hits(retriever, one: Structured) -> dict[int, float]:
    found = retriever.search([asked(one)], len(CATALOG))
    return {row: score for row, score in zip(found.rows[0].tolist(), found.scores[0].tolist(), strict=True) if row >= 0}


@given(queries())
def test_a_hit_and_its_score_are_what_the_types_and_the_formula_say(one):
    found = hits(BM25, one)
    assert set(found) == {row for row, document in enumerate(DOCUMENTS) if is_hit(document, one)}
    for row in list(found)[:3]:
        assert found[row] == pytest.approx(score(CATALOG, one, row), rel=1e-5)


@given(st.lists(queries(), min_size=1, max_size=4))
def test_ranks_are_the_positions_in_search_beside_texts(several):
    mixed = [query for one in several for query in (asked(one), Query("red shoe"))]
    found = BM25.search(mixed, len(CATALOG))
    ranks = BM25.ranks(mixed, np.tile(np.arange(len(CATALOG)), (len(mixed), 1)))
    for rows, own in zip(found.rows, ranks, strict=True):
        listed = rows[rows >= 0].tolist()
        assert [int(np.flatnonzero(own == place)[0]) for place in range(1, len(listed) + 1)] == listed
        assert (own > 0).sum() == len(listed)


@given(queries(boosts=False))
def test_with_one_field_a_query_alone_scores_like_its_text(one):
    plain = Structured(one.query or "red")
    single = retrievers.open("bm25", CATALOG, structured={})
    text, parts = (single.search([query], 9) for query in (Query(plain.query), asked(plain)))
    assert text.rows.tolist() == parts.rows.tolist() and text.scores.tolist() == parts.scores.tolist()


def test_the_parts_in_words():
    every = {row for row in range(len(CATALOG)) if "red" in DOCUMENTS[row]["title"] + DOCUMENTS[row]["text"]}
    assert set(hits(BM25, Structured("red"))) == every
    assert set(hits(BM25, Structured("blue", must=("red",)))) == every  # Of query and must, one word suffices ...
    assert set(hits(BM25, Structured(must=("red", "blue")))) < every  # ... but each of must is needed.
    assert set(hits(BM25, Structured("red", should=("blue", "trail")))) == every
    assert set(hits(BM25, Structured(should=("red",)))) == every
    before, after = hits(BM25, Structured("red")), hits(BM25, Structured("red", should=("blue",)))
    assert all(after[row] >= before[row] for row in every) and after != before
    assert not hits(BM25, Structured("red", must=("unknown",))) and not hits(BM25, Structured("unknown"))
    one = Structured("red", filters=(("brand", ("O'Neill", "naïve")),))
    assert {DOCUMENTS[row]["brand"] for row in hits(BM25, one)} == {"O'Neill", "naïve"}
    assert not hits(BM25, Structured("red", filters=(("brand", ("o'neill",)),)))  # A value is compared as it is.


def test_a_word_that_the_engine_drops_is_required_of_none():
    english = retrievers.open("bm25", CATALOG, **SETTINGS | {"language": "en"})
    assert hits(english, Structured("red", must=("the",))) == hits(english, Structured("red"))
    assert hits(english, Structured("red", must=("shoes",))) == hits(english, Structured("red", must=("shoe",)))
    assert not hits(english, Structured("the", should=("red",)))


def test_a_field_without_a_word_and_an_empty_value():
    records = [
        {"id": f"d{i}", "text": text, "color": color} for i, (text, color) in enumerate([("a b", ""), ("b", "c")])
    ]
    small = retrievers.Catalog.from_records(records)
    own = retrievers.open(
        "bm25", small, language=None, fields={"text": 1, "color": 2}, structured={"filters": ["color"]}
    )
    empty = retrievers.Catalog.from_records([{"id": "d", "text": "a b", "notes": "..."}])
    other = retrievers.open("bm25", empty, language=None, fields={"text": 1, "notes": 1}, structured={})
    assert own.search([asked(Structured("b", filters=(("color", ("",)),)))], 2).rows.tolist() == [[0, -1]]
    assert other.search([asked(Structured("a", boosts=(("notes", 2.0),)))], 1).rows.tolist() == [[0]]


def test_saved_opened_again_pickled_and_cached(tmp_path):
    one, other = Structured("red", must=("shoe",)), Structured("red", filters=(("brand", ("Acme",)),))
    saved = retrievers.open("bm25", CATALOG, tmp_path / "index", **SETTINGS)
    again = retrievers.open("bm25", CATALOG, tmp_path / "index", **SETTINGS)
    wrapped = Cache(Unseen(again, len(CATALOG)), len(CATALOG), folder=tmp_path / "results")
    assert saved.fingerprint == BM25.fingerprint and retrievers.schema_of(wrapped) == retrievers.schema_of(BM25)
    for own in (saved, again, pickle.loads(pickle.dumps(saved)), pickle.loads(pickle.dumps(BM25)), wrapped, wrapped):
        for query in (one, other):
            assert hits(own, query) == hits(BM25, query)
    text = Query(one.text)
    assert wrapped.search([text], 5).rows.tolist() == BM25.search([text], 5).rows.tolist()  # Not the cached parts.


@pytest.mark.parametrize("file", ["filters/0.npy", "filters/values.json", "field1/data.csc.index.npy", "field0"])
def test_a_damaged_index_is_refused(tmp_path, file):
    retrievers.open("bm25", CATALOG, tmp_path / "index", **SETTINGS)
    (tmp_path / "index" / file).rename(tmp_path / "gone")
    with pytest.raises(RetrieverError, match="is damaged"):
        retrievers.open("bm25", CATALOG, tmp_path / "index", **SETTINGS)


def test_an_index_without_structured_queries_is_as_it_was(tmp_path):
    plain = retrievers.open("bm25", CATALOG, tmp_path / "index", language=None)
    assert "structured" not in (tmp_path / "index" / "index.json").read_text()
    assert retrievers.schema_of(plain) is None
    assert plain.fingerprint != retrievers.open("bm25", CATALOG, language=None, structured={}).fingerprint


def test_a_server_passes_them_on():
    remote = retrievers.open("remote", CATALOG, url=serve(BM25, CATALOG))
    assert retrievers.schema_of(remote) == retrievers.schema_of(BM25)
    several = [
        Structured(
            "red", ("shoe",), ("trail",), (("brand", ("O'Neill", "naïve")), ("color", ("",))), (("title", 2.5),)
        ),
        Structured(must=("red", "boot")),
    ]
    mixed = [*map(asked, several), Query("red shoe")]
    for again in (remote, pickle.loads(pickle.dumps(remote))):
        assert again.search(mixed, 9).rows.tolist() == BM25.search(mixed, 9).rows.tolist()
        targets = np.tile(np.arange(9), (3, 1))
        assert again.ranks(mixed, targets).tolist() == BM25.ranks(mixed, targets).tolist()
    for own in (remote, retrievers.open("remote", CATALOG, url=serve(retrievers.open("bm25", CATALOG), CATALOG))):
        with pytest.raises(ValueError, match="a structured query"):
            own.search([asked(Structured("red", filters=(("price", ("1",)),)))], 3)


class Limited:
    """BM25 that allows other queries than the usual ones."""

    fingerprint, search, ranks = BM25.fingerprint, staticmethod(BM25.search), staticmethod(BM25.ranks)
    schema = Schema(("title", "text"), ("title",), (("brand", ()),), 0.5, 2, 500, 32, 4, 3, 20)

    def retriever_traits(self):
        return retrievers.Traits(structured=self.schema)


def test_a_server_reports_the_limits_of_its_retriever():
    remote = retrievers.open("remote", CATALOG, url=serve(Limited(), CATALOG))
    assert retrievers.schema_of(remote) == Limited.schema
    for one in (Structured("red", boosts=(("title", 3.0),)), Structured(must=("a b c d e",)), Structured("a " * 33)):
        assert problem(one, SCHEMA) is None
        with pytest.raises(ValueError, match="does not allow"):
            remote.search([asked(one)], 3)
    usual = ["boost text", "least_boost", "most_boost", "max_characters", "max_words", "max_must", "max_values"]
    assert Limited.schema.lacks(SCHEMA) == ["filter color", *usual, "max_value_characters"]
    assert not SCHEMA.lacks(Limited.schema)


@pytest.mark.parametrize(
    "limits",
    [{"least_boost": 0}, {"least_boost": 3, "most_boost": 2}, {"most_boost": float("inf")}, {"most_boost": "9"},
     {"max_words": 1.5}, {"max_must": -1}, {"max_values": None}, {"max_characters": True}],
)  # fmt: skip
def test_limits_that_are_no_numbers_are_refused(limits):
    with pytest.raises((TypeError, ValueError)):
        Schema(**limits)
    with pytest.raises((TypeError, ValueError)):
        schema_from_json(schema_to_json(SCHEMA) | limits)


@pytest.mark.parametrize(
    "parts",
    [
        {"query": "red"},
        "red",
        [],
        {"query": 1, "must": [], "should": [], "filters": [], "boosts": []},
        {"query": "red", "must": "red", "should": [], "filters": [], "boosts": []},
        {"query": "red", "must": [], "should": [], "filters": [["brand"]], "boosts": []},
        {"query": "red", "must": [], "should": [], "filters": [["price", ["1"]]], "boosts": []},
        {"query": "red", "must": [], "should": [], "filters": [], "boosts": [["title", "2"]]},
        {"query": "red", "must": [], "should": [], "filters": [], "boosts": [["title", 1e9]]},
    ],
)
def test_a_server_refuses_what_is_no_structured_query_or_not_allowed(parts):
    application = server.app(BM25, "bm25", CATALOG.fingerprint, len(CATALOG))
    with TestClient(application) as client:
        for query in (["red", [], [], parts], ["red", [], [], None, parts]):
            answer = client.post("/search", json={"queries": [query], "k": 3})
            assert answer.status_code == 400 and "error" in answer.json()
        assert client.post("/search", json={"queries": [["red", [], []]], "k": 3}).status_code == 200


@pytest.mark.parametrize(
    "kind", ["bm25", "tantivy", pytest.param("lucene", marks=pytest.mark.slow), "hybrid", "itemknn", "propagate"]
)
def test_who_serves_none_refuses_them(kind, tmp_path):
    choices = retrievers.Interactions.from_sequences(len(CATALOG), [[0, 1], [1, 2]])
    params = {
        "hybrid": {"retrievers": [{"kind": "bm25", "params": SETTINGS}]},
        "propagate": {"text": {"kind": "bm25", "params": SETTINGS}, "backend": {"kind": "itemknn"}},
    }.get(kind, {})
    retriever = retrievers.open(kind, CATALOG, tmp_path / "index", choices, **params)
    query, targets = [asked(Structured("red"))], np.array([[0]])
    assert retrievers.schema_of(retriever) is None
    for ask in (lambda: retriever.search(query, 3), lambda: retriever.ranks(query, targets)):
        with pytest.raises(ValueError, match="a structured query for a retriever that serves none"):
            ask()
    assert retriever.ranks([Query("red", (0,))], targets).shape == (1, 1)


@pytest.mark.parametrize(
    ("one", "cause"),
    [
        (Structured("red", filters=(("price", ("1",)),)), "unknown_field"),
        (Structured("red", filters=(("title", ("red",)),)), "not_filterable"),
        (Structured("red", boosts=(("price", 2.0),)), "unknown_field"),
        (Structured("red", boosts=(("brand", 2.0),)), "not_boostable"),
        (Structured("red", boosts=(("title", float("nan")),)), "bad_boost"),
        (Structured("red", boosts=(("title", float("inf")),)), "bad_boost"),
        (Structured("red", boosts=(("title", 0.05),)), "bad_boost"),
        (Structured("red", boosts=(("title", 10**400),)), "bad_boost"),
        (Structured("red", boosts=(("title", True),)), "bad_boost"),
        (Structured("x" * 1001), "too_long"),
        (Structured("a " * 65), "too_long"),
        (Structured(must=("a b c d e f g h i j k l m n o p q",)), "too_long"),
        (Structured("red", filters=(("brand", tuple(map(str, range(17)))),)), "too_long"),
        (Structured("red", filters=(("brand", ("x" * 257,)),)), "too_long"),
        (Structured("red\0"), "bad_text"),
        (Structured("\ud83d"), "bad_text"),
        (Structured("red", filters=(("brand", ("\ud83d",)),)), "bad_text"),
        (Structured(), "no_words"),
        (Structured(filters=(("brand", ("Acme",)),)), "no_words"),
        (Structured("..."), "no_words"),
        (Structured("red", should=("...",)), "no_words"),
        (Structured("red", filters=(("brand", ()),)), "no_words"),
        (Structured("a " * 64, boosts=(("title", 10),)), None),
        (Structured(should=("red",), filters=(("brand", ("", "\n")),)), None),
    ],
)
def test_only_what_the_schema_allows_reaches_a_retriever(one, cause):
    assert problem(one, SCHEMA) == cause and (cause is None or cause in CAUSES)
    if cause is not None:
        with pytest.raises(ValueError, match=rf"does not allow \({cause}\)"):
            BM25.search([Query("red"), asked(one)], 3)
        with pytest.raises(ValueError, match=rf"does not allow \({cause}\)"):
            BM25.ranks([asked(one)], np.array([[0]]))


def test_a_field_named_twice_is_refused_and_the_order_of_fields_does_not_matter():
    with pytest.raises(ValueError, match="names a field twice"):
        Structured("red", filters=(("brand", ("a",)), ("brand", ("b",))))
    pairs = (("title", 2.0), ("text", 3.0))
    assert hash(Structured("red", boosts=pairs)) == hash(Structured("red", boosts=pairs[::-1]))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"query": None}, "query must be a text"),
        ({"query": ["red"]}, "query must be a text"),
        ({"must": "red"}, "tuples of texts"),  # Its letters would be required.
        ({"should": ["red"]}, "tuples of texts"),
        ({"must": (1,)}, "tuples of texts"),
        ({"filters": {"brand": ("Acme",)}}, "filters must be like"),
        ({"filters": (("brand", "Acme"),)}, "filters must be like"),
        ({"filters": (("brand", (True,)),)}, "filters must be like"),
        ({"filters": (("brand",),)}, "filters must be like"),
        ({"filters": ((1, ("Acme",)),)}, "filters must be like"),
        ({"boosts": {"title": 2}}, "boosts must be like"),
        ({"boosts": (("title", 2, 3),)}, "boosts must be like"),
        ({"boosts": ((None, 2),)}, "boosts must be like"),
    ],
)
def test_parts_of_another_shape_are_refused(parts, message):
    with pytest.raises(TypeError, match=message) as error:
        Structured(**{"query": "red" * 1_000} | parts)
    assert len(str(error.value)) < 400


def test_the_schema_names_the_most_frequent_values():
    assert examples_of(["b", "a", "b", "c", "a", "", " ", "x" * 41, "d", "e", "f"]) == ("a", "b", "c", "d", "e")
    schema = retrievers.schema_of(BM25)
    assert (schema.fields, schema.boosts) == (("title", "text"), ("title", "text"))
    (brand, values), (color, _) = schema.filters
    assert (brand, color) == ("brand", "color") and len(values) == 5 and set(values) < set(BRANDS)
    assert retrievers.schema_of(retrievers.open("bm25", CATALOG, structured={})) == Schema(("text",))
    assert schema.lacks(Schema(boosts=("title", "price"), filters=(("size", ()),))) == ["filter size", "boost price"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("yes", "retriever.params.structured must be a mapping or null, got 'yes': write {} for the defaults"),
        (
            {"filter": ["brand"]},
            "retriever.params.structured.filter: unknown key: did you mean 'filters'? Choose from filters",
        ),
        ({"filters": "brand"}, "retriever.params.structured.filters must be a list of fields, got 'brand'"),
        ({"filters": ["brand", "brand"]}, "names a field twice"),
        ({"filters": ["size"]}, "the catalogue has no field 'size': choose from id, text, title, brand, color"),
    ],
)
def test_wrong_parameters_are_refused(given, message):
    with pytest.raises(ValueError) as error:
        retrievers.open("bm25", CATALOG, structured=given)
    assert message in str(error.value)


def all_of(text: str) -> dict:
    own = {"query": text, "fields": ["title^1.0"], "type": "most_fields", "lenient": True}
    return {"multi_match": {**own, "operator": "and", "zero_terms_query": "all"}}


@pytest.mark.parametrize(
    "text", ["Straße", "ＡＢＣ", "cafe\u0301", "\u05e9\u05c1\u05dc\u05d5\u05dd", "신발", "シューズ", "ภาษาไทย", "3.5"]
)
def test_a_search_engine_gets_a_required_word_as_it_is_written(text):
    """It would not find a folded word, or a pair of letters, that its own analysis makes otherwise."""
    clauses = in_parts(Structured(must=(f"{text} - red",)), {"title": 1}, {})["bool"]["filter"]
    assert clauses == [all_of(text), all_of("red")]


def test_required_words_that_punctuation_joins_may_be_in_different_fields():
    (clause,) = in_parts(Structured(must=("Red/Straße",)), {"title": 1}, {})["bool"]["filter"]
    apart = {"bool": {"filter": [all_of("Red"), all_of("Straße")]}}
    assert clause == {"bool": {"should": [all_of("Red/Straße"), apart]}}


@given(st.text())
def test_words_as_written_have_the_words_of_a_text(text):
    found = words_as_written(text)
    assert all(word in text for word in found)
    if text.isascii():
        assert words(" ".join(found)) == words(text)
