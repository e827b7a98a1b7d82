"""Structured queries on all engines: the same hits, hostile completions, and filters of a recipe that always hold."""

import dataclasses
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from postgres_server import server, shared_database
from serving import serve
from standin import REAL, Standin, delete_built, opened
from structured_data import FIELDS, asked, catalog, documents_of, hostile, is_hit, queries

import retrievers
from rec_r1.config import FormatConfig
from rec_r1.prompts import Format
from rec_r1.prompts.structured import MALFORMED
from retrievers import Catalog, Query, RetrieverError, Schema, Structured

CATALOG = catalog()
DOCUMENTS = documents_of(CATALOG)
SERVING = {"filters": ["brand", "color"]}
USUAL = {"language": None, "fields": FIELDS, "structured": SERVING}
LABELS = {"title": "A", "text": "D"}
COLUMNS = {"id_column": "sku", "tsvector_column": "terms"}
ENGINES = ["bm25", "tantivy", "opensearch", "elasticsearch", "postgres", "existing index", "existing table"]


@pytest.fixture(scope="module", autouse=True)
def _indexes():
    yield
    delete_built()


@cache
def table() -> str:
    """The address of a database with the catalogue as a shop may have it, and a view of its red items."""
    address = server().database("structured_tests")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE items (sku text PRIMARY KEY, terms tsvector, brand text, color varchar(99));"
            "CREATE TABLE noise (a int); INSERT INTO noise SELECT generate_series(1, 9);"
            "CREATE VIEW reds AS SELECT * FROM items WHERE color = 'red'"
        )
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO items VALUES (%s, setweight(to_tsvector('simple', %s), 'A') || to_tsvector('simple', %s), "
                "%s, %s)",
                [(d["id"], d["title"], d["text"], d["brand"], d["color"]) for d in DOCUMENTS],
            )
    return address


@cache
def shop() -> Standin:
    """A stand-in with the catalogue as a shop may have it."""
    engine = Standin("elasticsearch")
    sources = {d["id"]: {name: d[name] for name in ("title", "text", "brand", "color")} for d in DOCUMENTS}
    engine.add("shop", sources, keywords=["brand", "color"])
    return engine


@cache
def engine(name: str):
    if name in ("opensearch", "elasticsearch"):
        return opened(name, CATALOG, **USUAL)
    if name == "existing index":
        more = {"fields": FIELDS, "structured": SERVING}
        return retrievers.open("opensearch", CATALOG, url=shop().url, index="shop", **more)
    if name == "postgres":
        return retrievers.open(name, CATALOG, url=shared_database(), **USUAL | {"fields": LABELS})
    if name == "existing table":
        more = {"language": None, "structured": SERVING}
        return retrievers.open("postgres", CATALOG, url=table(), table="items", **COLUMNS, **more)
    if name == "remote":
        return retrievers.open(name, CATALOG, url=serve(engine("bm25"), CATALOG))
    return retrievers.open(name, CATALOG, **USUAL)


def hits(retriever, several) -> list[dict[int, float]]:
    found = retriever.search([asked(one) for one in several], len(CATALOG))
    return [
        {row: score for row, score in zip(rows.tolist(), scores.tolist(), strict=True) if row >= 0}
        for rows, scores in zip(found.rows, found.scores, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.opensearch
@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(several=st.lists(queries(boosts=False), min_size=4, max_size=12), boosted=queries(), seed=st.integers(0, 99))
def test_all_engines_have_the_same_hits(name, several, boosted, seed):
    retriever = engine(name)
    several = several + ([boosted] if retrievers.schema_of(retriever).boosts else [])
    expected = [{row for row, document in enumerate(DOCUMENTS) if is_hit(document, one)} for one in several]
    found = hits(retriever, several)
    assert [set(one) for one in found] == expected
    targets = np.random.default_rng(seed).integers(0, len(CATALOG), (len(several), 6))
    ranks = retriever.ranks([asked(one) for one in several], targets)
    for own, rows, places in zip(found, targets.tolist(), ranks.tolist(), strict=True):
        order = sorted(own, key=lambda row, own=own: (-own[row], row))
        assert places == [order.index(row) + 1 if row in own else 0 for row in rows]


PARTS = [
    Structured("red shoe", should=("trail",), filters=(("brand", ("Acme", "O'Neill", "naïve")),)),
    Structured("light", must=("red",), filters=(("color", ("", "red")),)),
    Structured(must=("boot", "blue")),
    Structured(should=("warm sock",), filters=(("brand", ('Say "hi"', "back\\slash", "")),)),
]


@pytest.mark.slow
@pytest.mark.opensearch
@pytest.mark.parametrize("name", [*ENGINES, "remote"])
def test_threads_and_a_spawned_process_find_the_same(name, spawned):
    retriever = engine(name)
    expected = hits(retriever, PARTS)
    assert all(expected)
    fresh = pickle.loads(pickle.dumps(retriever))  # No thread has used it yet.
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: hits(fresh, [PARTS[i % 4]]), range(32)))
    assert found == [[expected[i % 4]] for i in range(32)]
    assert spawned.apply(hits, (retriever, PARTS)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tantivy", "opensearch", "elasticsearch", "existing index"])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(several=st.lists(queries(), min_size=4, max_size=8))
def test_engines_that_rank_by_bm25_have_the_same_scores(name, several):
    if REAL:
        pytest.skip("a real cluster has its own analysis")
    factor = 2.2 if name == "tantivy" else 1.0  # tantivy does not leave out k1 + 1.
    for own, expected in zip(hits(engine(name), several), hits(engine("bm25"), several), strict=True):
        assert own == pytest.approx({row: factor * score for row, score in expected.items()}, rel=1e-4)


def test_a_boost_in_postgresql_is_a_weight_of_its_ranking_function():
    one = Structured("red", should=("shoe",), boosts=(("text", 8.0), ("title", 0.5)))
    weights = "{0.8, 0.2, 0.4, 0.5}"  # D to A: 0.1 * 8 of the text, and 1 * 0.5 of the title.
    with psycopg.connect(table()) as connection:
        found = connection.execute(
            "SELECT sku, ts_rank_cd(%s::float4[], terms, 'red | shoe'::tsquery) FROM items WHERE terms @@ 'red'",
            (weights,),
        )
        expected = {CATALOG.row(sku): score for sku, score in found}
    boosted, plain = hits(engine("postgres"), [one, Structured("red", should=("shoe",))])
    assert boosted == pytest.approx(expected, rel=1e-5) and list(boosted) != list(plain)
    # Weights above 1 are divided by the largest: 10 of the title, 0.1 of the text.
    (large,) = hits(engine("postgres"), [Structured("red", boosts=(("title", 10.0),))])
    with psycopg.connect(table()) as connection:
        found = connection.execute(
            "SELECT sku, ts_rank_cd('{0.01, 0.02, 0.04, 1}', terms, 'red') FROM items WHERE terms @@ 'red'"
        )
        assert large == pytest.approx({CATALOG.row(sku): score for sku, score in found}, rel=1e-5)


def test_what_an_index_and_a_table_say_about_themselves():
    schemas = {name: retrievers.schema_of(engine(name)) for name in ENGINES}
    for name in ("opensearch", "elasticsearch", "postgres", "existing index"):
        assert schemas[name] == schemas["bm25"], name
    in_order = ("text", "title")  # tantivy sorts its fields.
    assert schemas["tantivy"] == dataclasses.replace(schemas["bm25"], fields=in_order, boosts=in_order)
    assert (schemas["existing table"].fields, schemas["existing table"].boosts) == ((), ())
    assert schemas["existing table"].filters == schemas["bm25"].filters


@pytest.mark.parametrize("name", ["tantivy", "opensearch", "postgres", "existing table"])
def test_only_what_the_schema_allows_reaches_an_engine(name):
    for one in (Structured("red", filters=(("price", ("1",)),)), Structured("red\0"), Structured("x" * 2000)):
        with pytest.raises(ValueError, match="does not allow"):
            engine(name).search([asked(one)], 3)
        with pytest.raises(ValueError, match="does not allow"):
            engine(name).ranks([Query("red"), asked(one)], np.array([[0], [0]]))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"structured": {}, "template": {"match": {"text": "{query}"}}}, "leave out one of the two"),
        ({"structured": {"filters": ["title"]}}, "shop has no field 'title' of type keyword: choose from brand, color"),
    ],
)
def test_what_an_index_cannot_serve_is_refused(params, message):
    with pytest.raises(ValueError) as error:
        retrievers.open("opensearch", CATALOG, url=shop().url, index="shop", **params)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["bm25", "tantivy", "opensearch", "elasticsearch", "postgres"])
def test_the_longest_value_that_a_query_may_name_is_found(name):
    """The engines that are written in Java count a letter beyond U+FFFF twice."""
    longest = "🎉" * Schema().max_value_characters
    own = Catalog.from_records(
        {"id": f"d{i}", "text": "red", "brand": brand} for i, brand in enumerate(["x", longest, longest[1:]])
    )
    shape = {"fields": {"text": "D"}, "url": shared_database()} if name == "postgres" else {"fields": {"text": 1}}
    build = opened if name in ("opensearch", "elasticsearch") else retrievers.open
    retriever = build(name, own, language=None, structured={"filters": ["brand"]}, **shape)
    query = asked(Structured("red", filters=(("brand", (longest,)),)))
    assert retriever.search([query], 3).rows.tolist() == [[1, -1, -1]]


def test_a_cluster_that_allows_fewer_clauses_than_a_query_may_have_is_refused():
    """Its refusal is no fault of a query, which must not earn what a query that finds nothing earns."""
    engine = Standin()
    retriever = retrievers.open("opensearch", CATALOG, url=engine.url, **USUAL)
    error = {"type": "too_many_nested_clauses", "reason": "Query contains too many nested clauses; maxClauseCount is 9"}
    few = {"error": error, "status": 400}
    engine.search_trouble = lambda body: few if json.dumps(body["query"]).count("red shoe boot") > 1 else None
    one = Structured("red shoe boot sock", should=("red shoe boot",))
    for ask in (lambda: retriever.search([asked(one)], 3), lambda: retriever.ranks([asked(one)], np.array([[0]]))):
        with pytest.raises(
            RetrieverError, match=r"allows fewer clauses .* raise indices\.query\.bool\.max_clause_count"
        ):
            ask()
    assert retriever.ranks([Query("red")], np.array([[0]])).shape == (1, 1)
    engine.search_trouble = lambda body: few if "a60" in json.dumps(body["query"]) else None
    with pytest.raises(RetrieverError, match=r"allows fewer clauses .* or name fewer retriever\.params\.fields"):
        retrievers.open("opensearch", CATALOG, url=engine.url, **USUAL)
    retrievers.open("opensearch", CATALOG, url=engine.url, language=None)  # A text is cut in place of that.


@pytest.mark.parametrize("normalized", ["brand", "color"])
def test_an_index_that_changes_values_before_it_compares_them_is_refused(normalized):
    sources = {d["id"]: {name: d[name] for name in ("title", "text", "brand", "color")} for d in DOCUMENTS}
    more = {normalized: {"normalizer": "lowercase"}}
    shop().add("folded", sources, keywords=["brand", "color"], normalized=more)
    params = {"url": shop().url, "index": "folded", "fields": FIELDS}
    with pytest.raises(
        ValueError, match=rf"folded compares the values of '{normalized}' by the normalizer 'lowercase'"
    ):
        retrievers.open("opensearch", CATALOG, structured=SERVING, **params)
    other = {"filters": [name for name in SERVING["filters"] if name != normalized]}
    assert retrievers.schema_of(retrievers.open("opensearch", CATALOG, structured=other, **params)) is not None


def test_what_a_table_cannot_serve_is_refused():
    for params, kind, message in (
        ({"structured": {"filters": ["size"]}}, RetrieverError, "has no column 'size': choose from sku, terms, brand"),
        ({"structured": {}, "operator": "web"}, ValueError, "it needs retriever.params.operator=or, got 'web'"),
        ({"structured": {}, "mode": "hybrid", "embedding_column": "e"}, ValueError, "retriever.params.mode=text"),
        ({"structured": {"filters": ["a%"]}}, ValueError, "must be names without %"),
    ):
        with pytest.raises(kind) as error:
            retrievers.open("postgres", CATALOG, url=table(), table="items", **COLUMNS, **params)
        assert message in str(error.value)


@cache
def attacks() -> tuple[list[Query], dict[str, int]]:
    """What the parser lets through of 500 hostile completions, and how many of them it counts by cause."""
    format_ = Format(FormatConfig(action="structured", answer="json"), schema=retrievers.schema_of(engine("bm25")))
    completions = hostile()
    assert len(completions) == 500
    causes = [format_.cause(completion) for completion in completions]
    actions = [format_.parse(completion, "raw") for completion in completions]
    assert [action is None for action in actions] == [cause is not None for cause in causes]
    allowed = [Query(action.text, structured=action.structured) for action in actions if action is not None]
    return allowed, {cause: causes.count(cause) for cause in MALFORMED}


def test_hostile_completions_are_malformed_and_counted_by_cause():
    allowed, causes = attacks()
    assert len(allowed) >= 20 and sum(causes.values()) + len(allowed) == 500
    assert all(causes.values()), causes


def check_hits(retriever, color: str | None = None) -> None:
    """Send what is left of the attacks to an engine. Nothing is raised, and every hit passes every filter.

    color: what the recipe's own filter lets through.
    """
    allowed = attacks()[0]
    if not retrievers.schema_of(retriever).boosts:
        allowed = [query for query in allowed if not query.structured.boosts]
    everything = np.tile(np.arange(len(CATALOG)), (len(allowed), 1))
    found, ranks = retriever.search(allowed, len(CATALOG)), retriever.ranks(allowed, everything)
    assert (found.rows >= 0).any()
    for query, rows, own in zip(allowed, found.rows, ranks, strict=True):
        listed = rows[rows >= 0].tolist()
        assert np.flatnonzero(own).tolist() == sorted(listed)
        for row in listed:
            assert color is None or DOCUMENTS[row]["color"] == color
            assert all(DOCUMENTS[row][name] in values for name, values in query.structured.filters)


@pytest.mark.parametrize("name", ["bm25", "tantivy", "remote"])
def test_hostile_completions_do_nothing_but_search_in_memory(name):
    check_hits(engine(name))


# What a search may consist of.
CLAUSES = {"bool", "must", "should", "filter", "must_not", "multi_match", "terms", "term", "ids", "values"}
SETTINGS = {"query", "fields", "type", "lenient", "operator", "zero_terms_query"}


def keys_of(node) -> set[str]:
    if isinstance(node, dict):
        return set(node) | {key for value in node.values() for key in keys_of(value)}
    return {key for value in node for key in keys_of(value)} if isinstance(node, list) else set()


@pytest.mark.parametrize("existing", [False, True])
def test_hostile_completions_do_nothing_but_search_an_index_and_no_filter_is_bypassed(existing):
    own, field = (shop(), "color") if existing else (Standin(), "color.keyword")
    more = {"index": "shop"} if existing else {"language": None}
    more |= {"filter": [{"term": {field: "red"}}], "fields": FIELDS, "structured": SERVING}
    retriever = retrievers.open("opensearch", CATALOG, url=own.url, **more)
    own.received.clear()
    check_hits(retriever, "red")
    assert {(method, path.rpartition("/")[2]) for method, path, _ in own.received} <= {
        ("POST", "_msearch"), ("POST", "_pit"), ("POST", "point_in_time"), ("GET", "docs"),
    }  # fmt: skip
    searches = [line for _, path, lines in own.received if path == "/_msearch" for line in lines[1::2]]
    assert searches
    for body in searches:
        assert {"term": {field: "red"}} in body["query"]["bool"]["filter"]
        names = {"brand", "color", "brand.keyword", "color.keyword"}
        assert keys_of(body["query"]) <= CLAUSES | SETTINGS | names
        for fields in re.findall(r'"fields": (\[[^]]*\])', json.dumps(body["query"])):
            assert {one.partition("^")[0] for one in json.loads(fields)} <= set(FIELDS)


def content(address: str) -> list:
    with psycopg.connect(address) as connection:
        tables = "SELECT n.nspname, relname, relkind, relacl::text FROM pg_class AS c JOIN pg_namespace AS n "
        return [
            *connection.execute(f"{tables} ON n.oid = relnamespace WHERE nspname NOT LIKE 'pg_%' ORDER BY 1, 2"),
            *connection.execute("SELECT rolname, rolsuper FROM pg_roles ORDER BY 1"),
            *connection.execute("SELECT * FROM noise ORDER BY 1"),
            *connection.execute("SELECT sku, terms::text, brand, color FROM items ORDER BY 1"),
        ]


@pytest.mark.parametrize("which", ["items", "reds", "own"])
def test_hostile_completions_do_nothing_but_search_a_table_and_no_filter_is_bypassed(which):
    """A view is how a recipe filters in PostgreSQL."""
    shape = {"fields": LABELS} if which == "own" else {"table": which, **COLUMNS}
    retriever = retrievers.open("postgres", CATALOG, url=table(), language=None, structured=SERVING, **shape)
    before = content(table())
    check_hits(retriever, "red" if which == "reds" else None)
    assert content(table()) == before and len(before) > 60
