"""A real PostgreSQL: the order of plain SQL, hostile queries, existing tables, outages, and what is refused."""

import logging
import multiprocessing
import os
import pickle
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psycopg
import pytest
from postgres_server import Server, server
from serving import serve

import retrievers
from retrievers import Catalog, Query, RetrieverError
from retrievers.text.postgres import tables
from retrievers.text.postgres.params import Params

PLAIN = "running run shoe shoes light party parties face faces sad happy castle castles book books red blue the of and"
ODD = "mother-in-law 3.5 café naïve 日本 🎉 O'Neill's back\\slash http://a.org/b x@y.org"
WORDS = [*PLAIN.split(), *ODD.split()]


def make_texts(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(0, 12))) for _ in range(count - 2)]
    return [*texts, texts[0], texts[1]]  # Equal documents have equal scores.


def make_catalog(texts) -> Catalog:
    return Catalog.from_records(
        {"id": f"d{i}", "text": text, "title": f"title {text[:9]}"} for i, text in enumerate(texts)
    )


CATALOG = make_catalog(make_texts(120))
QUERIES = [" ".join(random.Random(7 + i).choices(WORDS, k=i % 6)) for i in range(60)]


@pytest.fixture(scope="module")
def url():
    """A database with tables of the test: `items` as a shop may have it, and `noise`, which nothing may change."""
    address = server().database("postgres_tests")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE items (sku text PRIMARY KEY, body text, terms tsvector, embedding vector(384));"
            "CREATE INDEX ON items USING gin (terms);"
            "CREATE INDEX ON items USING gin (to_tsvector('english', body));"
            "CREATE ROLE reader LOGIN;"
        )
        with connection.cursor() as cursor:
            rows = [(f"d{i}", text, text) for i, text in enumerate(CATALOG.texts)]
            cursor.executemany("INSERT INTO items VALUES (%s, %s, to_tsvector('english', %s))", rows)
        connection.execute("GRANT SELECT ON items TO reader")
    return address


def direct(url, query_function, text, function="ts_rank_cd", more="") -> list[int]:
    """The ranking that plain SQL gives: rows, best first."""
    statement = (
        f"SELECT substr(sku, 2)::int AS row FROM items, {query_function}('english', %s) AS query WHERE terms @@ query "
        f"ORDER BY {function}(terms, query{more}) DESC, row"
    )
    with psycopg.connect(url) as connection:
        return [row for (row,) in connection.execute(statement, (text,))]


def ranking(retriever, text) -> list[int]:
    rows = retriever.search([Query(text)], len(CATALOG)).rows[0]
    return rows[rows >= 0].tolist()


def assert_ranks_are_the_positions(retriever, texts):
    asked, n = [Query(text) for text in texts], len(CATALOG)
    hits = retriever.search(asked, n)
    ranks = retriever.ranks(asked, np.tile(np.arange(-1, n), (len(asked), 1)))
    assert (ranks[:, 0] == 0).all() and ranks.dtype == np.int32
    expected = np.zeros((len(asked), n + 1), np.int32)
    for q, place in zip(*np.nonzero(hits.rows >= 0), strict=True):
        expected[q, hits.rows[q, place]] = place + 1
    assert (ranks[:, 1:] == expected[:, :n]).all()
    for q in range(len(asked)):
        found = int((hits.rows[q] >= 0).sum())
        order = np.lexsort((hits.rows[q, :found], -hits.scores[q, :found]))
        assert order.tolist() == list(range(found))
    return hits


@pytest.mark.slow
@pytest.mark.parametrize(("function", "normalization"), [("ts_rank_cd", 0), ("ts_rank_cd", 63), ("ts_rank", 5)])
def test_the_order_is_that_of_plain_sql(url, function, normalization):
    """`or` is compared with to_tsquery('a | b'), whose words are plain; `and` and `web` with PostgreSQL's functions."""
    options = {"url": url, "function": function, "normalization": normalization}
    any_word, all_words, web = (
        retrievers.open("postgres", CATALOG, operator=o, **options) for o in ("or", "and", "web")
    )
    for i in range(20):
        words = random.Random(i).choices(PLAIN.split(), k=1 + i % 15)
        more = f", {normalization}"
        assert ranking(any_word, " ".join(words)) == direct(url, "to_tsquery", " | ".join(words), function, more)
        assert ranking(all_words, " ".join(words[:3])) == direct(
            url, "plainto_tsquery", " ".join(words[:3]), function, more
        )
        text = f'{words[0]} or "{" ".join(words[1:3])}" -{words[-1]}'
        assert ranking(web, text) == direct(url, "websearch_to_tsquery", text, function, more)


@pytest.mark.slow
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"operator": "and", "normalization": 2},
        {"operator": "web"},
        {"function": "ts_rank", "fields": {"title": "A", "text": "D"}, "weights": {"A": 0.7}},
        {"language": None},
        {"table": "items", "id_column": "sku", "tsvector_column": "terms"},
        {"table": "items", "id_column": "sku", "text_column": "body", "function": "ts_rank"},
        {"mode": "vector"},
        {"mode": "vector", "distance": "cosine"},
        {"mode": "vector", "distance": "l2"},
        {"mode": "hybrid"},
        {"mode": "hybrid", "depth": 9, "vector_weight": 0.3, "batch_size": 7},
    ],
)
def test_ranks_are_the_positions_in_search(url, params):
    retriever = retrievers.open("postgres", CATALOG, url=url, **params)
    hits = assert_ranks_are_the_positions(retriever, QUERIES)
    assert (hits.rows >= 0).any()
    for k in (1, 10):
        assert retriever.search([Query(text) for text in QUERIES], k).rows.tolist() == hits.rows[:, :k].tolist()


@pytest.mark.slow
def test_an_existing_table_ranks_as_the_one_that_is_made(url):
    made = retrievers.open("postgres", CATALOG, url=url)
    for columns in ({"tsvector_column": "terms"}, {"text_column": "body"}):
        existing = retrievers.open("postgres", CATALOG, url=url, table="items", id_column="sku", **columns)
        asked = [Query(text) for text in QUERIES]
        for ours, theirs in zip(made.search(asked, 50), existing.search(asked, 50), strict=True):
            assert ours.tolist() == theirs.tolist()
        assert not retrievers.absent(existing)
        # What is searched is the same: ids and tsvectors. A text may have the same tsvector as another text.
        assert (existing.fingerprint == made.fingerprint) == ("tsvector_column" in columns)


@pytest.mark.slow
def test_hybrid_is_the_fusion_of_text_and_vector(url):
    for weight, depth in ((1, 1000), (3, 10)):
        parts = [
            {"kind": "postgres", "params": {"url": url}},
            {"kind": "postgres", "params": {"url": url, "mode": "vector"}, "weight": weight},
        ]
        ours = retrievers.open("postgres", CATALOG, url=url, mode="hybrid", depth=depth, vector_weight=weight)
        theirs = retrievers.open("hybrid", CATALOG, retrievers=parts, depth=depth)
        asked = [Query(text) for text in QUERIES]
        for a, b in zip(ours.search(asked, 60), theirs.search(asked, 60), strict=True):
            assert a.tolist() == b.tolist()


@pytest.mark.slow
def test_vectors_rank_as_dense_does(url):
    ours, theirs = retrievers.open("postgres", CATALOG, url=url, mode="vector"), retrievers.open("dense", CATALOG)
    asked = [Query(text) for text in QUERIES if text.strip()]
    a, b = ours.search(asked, len(CATALOG)), theirs.search(asked, len(CATALOG))
    assert np.allclose(a.scores, b.scores, rtol=0, atol=2e-3)  # pgvector rounds the query to float16, too.
    assert np.mean(a.rows[:, :10] == b.rows[:, :10]) > 0.9


@pytest.mark.slow
def test_an_approximate_index_finds_and_ranks_exactly(url):
    """The embeddings are random, so that an index of a real size is made in a second. Ranks do not use the index."""
    n = 3000
    catalog = make_catalog([str(i) for i in range(n)])
    vectors = np.random.default_rng(0).normal(size=(n, 384)).astype(np.float16).astype(np.float32)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE many (id text PRIMARY KEY, e vector(384))")
        with connection.cursor() as cursor, cursor.copy("COPY many FROM STDIN") as copy:
            for i, vector in enumerate(vectors):
                copy.write_row((f"d{i}", str(vector.tolist())))
        options = {"table": "many", "embedding_column": "e", "mode": "vector", "index": "hnsw", "distance": "cosine"}
        with pytest.raises(
            RetrieverError, match=r"no HNSW index of 'e' for distance=cosine \(it has none\): create one"
        ):
            retrievers.open("postgres", catalog, url=url, **options)
        connection.execute("CREATE INDEX ON many USING hnsw (e vector_cosine_ops) WITH (ef_construction = 32, m = 8)")
        connection.execute("ANALYZE many")
    approximate = retrievers.open("postgres", catalog, url=url, **options, ef_search=40)
    asked = [Query(text) for text in ("party", "sad face", "castle")]
    embedded = Params(url=url).encoder().queries([query.text for query in asked])
    exact = embedded @ vectors.T / np.linalg.norm(vectors, axis=1) / np.linalg.norm(embedded, axis=1)[:, None]
    hits = approximate.search(asked, 100)
    assert (hits.rows >= 0).all()  # More than ef_search of them.
    found = np.take_along_axis(exact, hits.rows.astype(int), axis=1)
    assert np.allclose(found, hits.scores, atol=1e-6) and (np.diff(hits.scores) <= 0).all()
    targets = np.argsort(-exact, axis=1)[:, [0, 9, 999, n - 1]]
    assert approximate.ranks(asked, targets).tolist() == [[1, 10, 1000, n]] * 3
    search = approximate._texts._replace(search=psycopg.sql.SQL("EXPLAIN ").format() + approximate._texts.search)
    texts = approximate._of_texts([query.text for query in asked])
    plan = [line for (line,) in approximate._ask(search, range(len(asked)), texts, {"k": 100}, None)]
    assert any("Index Scan using many_e_idx" in line for line in plan)


SQL = [
    "'); DROP TABLE noise; --", "' OR 1=1 --", "$$; DELETE FROM noise; $$", "%s %(k)s {} %%", "\\'; DROP TABLE noise;",
    "'; COPY noise TO PROGRAM 'touch /tmp/x'; --", "1; SELECT pg_sleep(99)", '"; TRUNCATE noise; "', "E'\\047; --",
    "a' || (SELECT rolname FROM pg_roles LIMIT 1) || '", "}',null); DROP TABLE noise;--", '{"a",NULL}', "/* */ --",
]  # fmt: skip
OPERATORS = ["&", "|", "!", "<->", ":*", ":A", "(", ")", "'", "''", '"', "-", "\\", "<2>", "or", "and", "not", "not ("]
CONTROL = [chr(i) for i in (*range(32), 127, 0x85, 0x200B, 0x202E, 0xFEFF, 0xFFFF, 0x10FFFF)] + ["\ud83d", "\udc00"]


def hostile_queries() -> list[str]:
    chance, found = random.Random(0), [*SQL, *OPERATORS, *CONTROL]
    while len(found) < 490:
        pieces = chance.choices([*SQL, *OPERATORS, *CONTROL, *WORDS], k=chance.randint(2, 40))
        found.append(chance.choice(["", " "]).join(pieces))
    many = " ".join(f"w{i}" for i in range(200_000))
    large = ["a " * 500_000, "'" * 1_000_000, many, "-" * 10_000, '"' * 10_000, "x" * 1_000_000, "\0" * 10_000]
    return [*found, *large, "party " * 170_000, "a-" * 50_000, "( " * 8_000]


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["or", "and", "web"])
def test_hostile_queries_only_search(url, operator):
    """As a user who may only read. A control character is a blank, so that the word beside it still finds."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "DROP TABLE IF EXISTS noise; CREATE TABLE noise AS SELECT g FROM generate_series(1, 99) AS g"
        )
        reader = url.replace("postgres@", "reader@")
        options = {"table": "items", "id_column": "sku", "tsvector_column": "terms", "operator": operator}
        before = retrievers.open("postgres", CATALOG, url=reader, **options)
        queries = hostile_queries()
        assert len(queries) == 500
        ranks = before.ranks([Query(text) for text in queries], np.tile(np.arange(9), (500, 1)))
        assert (ranks >= 0).all()
        hits = before.search([Query(text + " party") for text in (*CONTROL[:33], *CONTROL[-2:])], 5).rows
        assert (hits[:, 0] >= 0).all()
        with pytest.raises(ConnectionError, match="read-only transaction"):
            before._sessions.ask(psycopg.sql.SQL("DELETE FROM items RETURNING 1").format(), [{}])
        assert connection.execute("SELECT count(*), sum(g) FROM noise").fetchone() == (99, 99 * 50)
        assert retrievers.open("postgres", CATALOG, url=url, **options).fingerprint == before.fingerprint
        (size,) = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE query ILIKE '%drop table%'"
        ).fetchone()
        assert size <= 1  # This statement itself. Texts are parameters and no part of a statement.


@pytest.mark.slow
def test_a_query_that_postgres_cannot_read_finds_nothing_and_spares_the_others(url):
    web = retrievers.open("postgres", CATALOG, url=url, operator="web")
    hits = web.search([Query("party"), Query("-" * 10_000), Query("shoes")], 3).rows
    assert (hits[:, 0] >= 0).tolist() == [True, False, True]
    assert web.ranks([Query("-" * 10_000), Query("party")], hits[[0, 0]]).tolist() == [[0, 0, 0], [1, 2, 3]]


@pytest.mark.slow
def test_the_first_words_of_a_very_long_query_are_searched(url):
    retriever = retrievers.open("postgres", CATALOG, url=url)
    noise = " ".join(f"w{i}" for i in range(2_000))
    assert ranking(retriever, f"party {noise}") == ranking(retriever, "party")
    assert ranking(retriever, f"{noise} party") == []
    assert ranking(retrievers.open("postgres", CATALOG, url=url, operator="web"), noise) == []


@pytest.mark.slow
def test_documents_with_anything_in_them_are_stored(url, caplog):
    texts = [
        "a\0b",
        "\x01\x02 party",
        "w " * 400_000,
        " ".join(f"w{i}" for i in range(200_000)),
        "\\N",
        "",
        "tab\tparade",
    ]
    catalog = Catalog.from_records({"id": f'{i}"\\{{,\0\n', "text": text} for i, text in enumerate(texts))
    retriever = retrievers.open("postgres", catalog, url=url)
    assert "2 documents were cut" in caplog.text
    assert retriever.search([Query("b"), Query("party"), Query("w7"), Query("parade")], 1).rows.ravel().tolist() == [
        0,
        1,
        3,
        6,
    ]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS odd; CREATE TABLE odd (id text, body text)")
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO odd VALUES (%s, %s)",
                [(tables.storable(i), tables.storable(t, 9)) for i, t in zip(catalog.ids, texts, strict=True)],
            )
    existing = retrievers.open("postgres", catalog, url=url, table="odd", text_column="body")
    assert not retrievers.absent(existing)
    assert existing.search([Query("b"), Query("parade")], 1).rows.ravel().tolist() == [0, 6]


@pytest.mark.slow
def test_what_either_side_lacks_is_reported(url, caplog):
    more = make_catalog([*CATALOG.texts, "new party", "newer party"])
    retriever = retrievers.open("postgres", more, url=url, table="items", id_column="sku", tsvector_column="terms")
    assert retrievers.absent(retriever) == {120, 121}
    assert "lacks 2 of the 122 documents of the catalogue, which are therefore never retrieved" in caplog.text
    assert "'d120', 'd121'" in caplog.text
    fused = retrievers.open("hybrid", more, retrievers=[
        {"kind": "bm25"},
        {"kind": "postgres", "params": {"url": url, "table": "items", "id_column": "sku", "tsvector_column": "terms"}},
    ])  # fmt: skip
    assert retrievers.absent(fused) == {120, 121}
    fewer = make_catalog(list(CATALOG.texts)[:50])
    retriever = retrievers.open("postgres", fewer, url=url, table="items", id_column="sku", tsvector_column="terms")
    assert "holds 70 documents that the catalogue lacks, which are left out of every ranking" in caplog.text
    made = retrievers.open("postgres", fewer, url=url)
    asked = [Query(text) for text in QUERIES]
    assert retriever.search(asked, 50).rows.tolist() == made.search(asked, 50).rows.tolist()
    other = Catalog.from_records([{"id": "x", "text": "party"}])
    with pytest.raises(
        RetrieverError, match=r"holds none of the 1 documents of the catalogue.*'x'; of the table: 'd0'"
    ):
        retrievers.open("postgres", other, url=url, table="items", id_column="sku", tsvector_column="terms")


@pytest.mark.slow
def test_the_fingerprint_follows_the_content_of_an_existing_table(url):
    def fingerprint(**more) -> str:
        columns = {"id_column": "id", "text_column": "body"} | more
        return retrievers.open("postgres", CATALOG, url=url, table="changing", **columns).fingerprint

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE changing AS SELECT sku AS id, body, terms, 1 AS price FROM items")
        first = fingerprint()
        connection.execute("UPDATE changing SET price = 2")
        assert fingerprint() == first != fingerprint(text_column=None, tsvector_column="terms")
        connection.execute("UPDATE changing SET body = body || ' new' WHERE id = 'd3'")
        second = fingerprint()
        connection.execute("DELETE FROM changing WHERE id = 'd3'")
        assert len({first, second, fingerprint()}) == 3


@pytest.mark.slow
def test_a_dictionary_that_changes_words_changes_the_fingerprint(url):
    """A text search configuration of the database is a language, and what it does to words is in the fingerprint."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TEXT SEARCH CONFIGURATION shop (COPY = english)")
        own = retrievers.open("postgres", CATALOG, url=url, language="shop")
        assert ranking(own, "shoe") == ranking(retrievers.open("postgres", CATALOG, url=url), "shoe")
        connection.execute("ALTER TEXT SEARCH CONFIGURATION shop ALTER MAPPING FOR asciiword WITH simple")
        changed = retrievers.open("postgres", CATALOG, url=url, language="public.shop")
        assert changed.fingerprint != own.fingerprint and ranking(changed, "shoe") != ranking(own, "shoe")


@pytest.mark.slow
def test_a_table_that_was_changed_or_dropped_is_refused(url):
    catalog = make_catalog(["party", "sad face"])
    retriever = retrievers.open("postgres", catalog, url=url)
    name = f'"{retriever._source.table}"'
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"UPDATE {name} SET text_0 = 'face' WHERE row = 0")
        with pytest.raises(RetrieverError, match=r"was changed after it was built .*DROP TABLE"):
            retrievers.open("postgres", catalog, url=url)
        connection.execute(f"DROP TABLE {name}")
    with pytest.raises(RetrieverError, match=r"does not exist.*rec-r1 index RECIPE"):
        retriever.search([Query("party")], 1)
    assert retrievers.open("postgres", catalog, url=url).search([Query("party")], 1).rows.tolist() == [[0]]


@pytest.mark.slow
def test_an_interrupted_build_leaves_nothing(url, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    def made() -> int:
        with psycopg.connect(url) as connection:
            (found,) = connection.execute("SELECT count(*) FROM pg_class WHERE relname LIKE 'rec\\_r1\\_%'").fetchone()
            return found

    catalog, before = make_catalog(["party", "sad face", "interrupted"]), made()
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retrievers.open("postgres", catalog, url=url)
    assert made() == before
    assert retrievers.open("postgres", catalog, url=url).search([Query("interrupted")], 1).rows.tolist() == [[2]]
    assert made() > before


@pytest.mark.slow
def test_processes_that_build_the_same_table_make_one(url):
    catalog = make_catalog([f"party {i}" for i in range(300)])
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: retrievers.open("postgres", catalog, url=url), range(4)))
    assert len({(one.fingerprint, one._source) for one in made}) == 1
    assert made[0].search([Query("7")], 1).rows.tolist() == [[7]]


def open_and_search(address) -> list:
    return retrievers.open("postgres", CATALOG, url=address).search([Query("party")], 9).rows.tolist()


@pytest.mark.slow
def test_a_user_who_may_only_read(url):
    reader = url.replace("postgres@", "reader@")
    catalog = make_catalog(["party", "only read"])
    with pytest.raises(RetrieverError, match=r"permission denied for schema public.*GRANT"):
        retrievers.open("postgres", catalog, url=reader)
    made = retrievers.open("postgres", catalog, url=url)
    with pytest.raises(RetrieverError, match=r"permission denied for table rec_r1_.*GRANT"):
        retrievers.open("postgres", catalog, url=reader)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'GRANT SELECT ON "{made._source.table}" TO reader')
    again = retrievers.open("postgres", catalog, url=reader)
    assert again.fingerprint == made.fingerprint and again.search([Query("read")], 1).rows.tolist() == [[1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"language": "klingon"}, ValueError, "'klingon' has no text search configuration.*english.*simple"),
        ({"language": "zh"}, ValueError, "'zh' has no text search configuration"),
        ({"table": "nothing", "tsvector_column": "t"}, RetrieverError, "table public.nothing does not exist: correct"),
        ({"schema": "nowhere"}, RetrieverError, 'schema "nowhere" does not exist'),
        ({"table": "items", "tsvector_column": "terms"}, RetrieverError, "no column .id.: choose from sku, body"),
        ({"table": "items", "id_column": "sku", "tsvector_column": "body"}, RetrieverError, "is text, not tsvector"),
        ({"table": "items", "id_column": "body", "tsvector_column": "terms"}, RetrieverError, "different ids: name"),
        (
            {"table": "items", "id_column": "sku", "mode": "vector", "embedding_column": "terms"},
            RetrieverError, r"is tsvector, not vector\(N\) or halfvec\(N\)",
        ),
        ({"fields": {"titel": "A"}}, ValueError, "no field 'titel': choose from id, text, title"),
    ],
)  # fmt: skip
def test_mistakes_that_the_database_shows_are_named(url, params, error, message):
    with pytest.raises(error, match=message) as raised:
        retrievers.open("postgres", CATALOG, url=url, **params)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_database_that_cannot_be_used_is_named(url):
    for name, options in (("bare", "ENCODING 'UTF8'"), ("latin", "ENCODING 'LATIN1' LOCALE 'C'")):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 {options}")
    bare, latin = (url.replace("/postgres_tests", f"/{name}") for name in ("bare", "latin"))
    with pytest.raises(RetrieverError, match=r"needs pgvector.*CREATE EXTENSION vector.*mode=text"):
        retrievers.open("postgres", CATALOG, url=bare, mode="vector")
    assert open_and_search(bare) == open_and_search(url)
    with pytest.raises(RetrieverError, match=r"LATIN1.*encoding UTF8"):
        retrievers.open("postgres", CATALOG, url=latin)
    with pytest.raises(RetrieverError, match=r'database "missing" does not exist.*retriever.params.url'):
        retrievers.open("postgres", CATALOG, url=url.replace("/postgres_tests", "/missing"))
    with pytest.raises(RetrieverError, match=r"no connection to PostgreSQL .*refused.*start it.*PGPASSWORD"):
        retrievers.open("postgres", CATALOG, url="postgresql://me@127.0.0.1:9/shop")


@pytest.mark.slow
def test_pgvector_in_a_schema_of_its_own(url):
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE managed TEMPLATE template0")
    managed = url.replace("/postgres_tests", "/managed")
    with psycopg.connect(managed, autocommit=True) as connection:
        connection.execute('CREATE SCHEMA "my ext"; CREATE EXTENSION vector SCHEMA "my ext"; CREATE SCHEMA "S"')
    retriever = retrievers.open("postgres", CATALOG, url=managed, mode="hybrid", schema="S")
    assert (
        ranking(retriever, "party")[:5]
        == ranking(retrievers.open("postgres", CATALOG, url=url, mode="hybrid"), "party")[:5]
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"url": None}, "url is not set: give the address"),
        ({"url": "localhost:5432"}, "url must start with postgresql://"),
        ({"url": "postgresql://me:hunter2@host/shop"}, "has a password: remove it, and set .*PGPASSWORD"),
        ({"url": "postgresql://host/shop?user=me&password=hunter2"}, "has a password"),
        ({"url": "postgresql://host/shop?%70assword=hunter2"}, "has a password"),
        ({"url": "postgresql://[hunter2/shop"}, "url cannot be read"),
        ({"mode": "words"}, "mode: unknown 'words': choose from text, vector, hybrid"),
        ({"operator": "any"}, "operator: unknown 'any': choose from or, and, web"),
        ({"function": "bm25"}, "function: unknown 'bm25'"),
        ({"distance": "dot"}, "distance: unknown 'dot': choose from inner_product, cosine, l2"),
        ({"index": "ivfflat"}, "index: unknown 'ivfflat': choose from exact, hnsw"),
        ({"normalization": 64}, "normalization must be an integer from 0 to 63, got 64: 0 is usual"),
        ({"normalization": True}, "normalization must be an integer"),
        ({"ef_search": 1001}, "ef_search must be an integer from 1 to 1000"),
        ({"depth": 0}, "depth must be an integer >= 1, got 0: 1000 is usual"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"connections": 0}, "connections must be an integer >= 1"),
        ({"timeout": 0}, "timeout must be a number above 0"),
        ({"vector_weight": float("nan")}, "vector_weight must be a number above 0"),
        ({"weights": {"E": 1}}, "weights must map A, B, C or D to numbers from 0 to 1"),
        ({"weights": {"A": 2}}, "weights must map"),
        ({"fields": {"title": 3}}, r"fields must map fields to the weights A, B, C or D.*\{title: A, text: D\}"),
        ({"language": False}, "YAML reads no as false"),
        ({"tsvector_column": "t"}, "tsvector_column names a column of an existing table: set table"),
        ({"table": "t"}, "mode text needs tsvector_column, or text_column"),
        ({"table": "t", "tsvector_column": "a", "text_column": "b"}, "set one of the two"),
        ({"table": "t", "mode": "vector"}, "mode vector needs embedding_column"),
        ({"table": "t", "tsvector_column": "a", "fields": {"text": "A"}}, "fields is for a table that the backend"),
        ({"table": "50%", "tsvector_column": "a"}, "table must be a name without %"),
        ({"table": "t", "tsvector_column": 3}, "tsvector_column must be a name"),
        ({"schema": ""}, "schema must be a name"),
        ({"mode": "vector", "pooling": "mode"}, "pooling: unknown 'mode'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(params, message):
    given = {"url": "postgresql://me@localhost/shop"} | params
    with pytest.raises(ValueError, match=message) as raised:
        Params(**given)
    assert "hunter2" not in str(raised.value)


def test_languages_are_codes_names_or_configurations():
    url = "postgresql:///shop"
    found = [Params(url=url, language=one).configuration for one in ("en", "english", "de", None, "none", "my.shop")]
    assert found == ["english", "english", "german", "simple", "simple", "my.shop"]
    assert Params(url=url, language="german") == Params(url=url, language="de")
    kinds = [{}, {"mode": "vector"}, {"language": "shop"}, {"language": "de"}]
    assert [retrievers.languages("postgres", {"url": url, **one})[0] for one in kinds] == ["en", None, None, "de"]


@pytest.fixture
def own_server():
    """A server that a test may kill."""
    running = Server()
    yield running
    running.stop()


@pytest.mark.slow
def test_a_server_that_is_killed_stopped_and_started_again(own_server):
    address = own_server.database("shop")
    retriever = retrievers.open("postgres", CATALOG, url=address, timeout=1)
    asked, targets = [Query("party"), Query("shoes")], np.array([[1, 2], [3, -1]])
    before = retriever.ranks(asked, targets).tolist()
    copy = pickle.loads(pickle.dumps(retriever))
    with ThreadPoolExecutor(4) as pool:  # Four connections, all of which are lost.
        assert list(pool.map(lambda _: copy.ranks(asked, targets).tolist(), range(8))) == [before] * 8
    own_server.kill()
    for one in (retriever, copy):
        with pytest.raises(ConnectionError, match=f"PostgreSQL at {address[:20]}"):
            one.ranks(asked, targets)
    with pytest.raises(RetrieverError, match=r"no connection to PostgreSQL.*start it"):
        retrievers.open("postgres", CATALOG, url=address, timeout=1)
    own_server.start()
    for one in (retriever, copy):
        assert one.ranks(asked, targets).tolist() == before
    own_server.kill()
    own_server.start()  # Nobody asked in between: the lost connections are replaced, and no query is lost.
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: copy.ranks(asked, targets).tolist(), range(8))) == [before] * 8


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_an_outage(own_server, monkeypatch):
    monkeypatch.setattr("retrievers.text.postgres.connection.GRACE", 0.2)
    address = own_server.database("shop")
    retriever = retrievers.open("postgres", CATALOG, url=address, timeout=0.5)
    assert retriever.search([Query("party")], 1).rows[0, 0] >= 0
    with psycopg.connect(address) as connection:
        connection.execute(f'LOCK TABLE "{retriever._source.table}" IN ACCESS EXCLUSIVE MODE')
        with pytest.raises(TimeoutError, match="statement timeout"):
            retriever.search([Query("party")], 1)
    assert retriever.search([Query("party")], 1).rows[0, 0] >= 0
    processes = own_server.processes()
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises((ConnectionError, TimeoutError)):
        retriever.search([Query("party")], 1)
    waited = time.monotonic() - started
    for process in processes:
        os.kill(process, signal.SIGCONT)
    logging.getLogger(__name__).info("an outage after %.1f s", waited)
    assert retriever.search([Query("party")], 1).rows[0, 0] >= 0


@pytest.mark.slow
def test_a_spawned_process_asks_an_existing_table(url):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        retriever = retrievers.open("postgres", CATALOG, url=url, table="items", id_column="sku", text_column="body")
        assert pool.apply(ranking, (retriever, "party face")) == ranking(retriever, "party face")


@pytest.mark.slow
def test_it_is_served_like_any_other(url):
    retriever = retrievers.open("postgres", CATALOG, url=url)
    remote = retrievers.open("remote", CATALOG, url=serve(retriever, CATALOG))
    asked, targets = [Query(text) for text in QUERIES], np.tile(np.arange(9), (len(QUERIES), 1))
    assert remote.fingerprint == retriever.fingerprint
    assert remote.ranks(asked, targets).tolist() == retriever.ranks(asked, targets).tolist()
