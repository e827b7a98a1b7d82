"""The tables of a real PostgreSQL: existing ones, those that are made, and what is refused."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psycopg
import pytest
from postgres_data import CATALOG, QUERIES, make_catalog, open_and_search, ranking, shop_database

import retrievers
from retrievers import Catalog, Query, RetrieverError
from retrievers.text.postgres import tables
from retrievers.text.postgres.params import Params


@pytest.fixture(scope="module")
def url():
    return shop_database()


@pytest.mark.slow
def test_what_either_side_lacks_is_reported(url, caplog):
    more = make_catalog([*CATALOG.texts, "new party", "newer party"])
    retriever = retrievers.open("postgres", more, url=url, table="items", id_column="sku", tsvector_column="terms")
    assert retrievers.absent(retriever) == {120, 121}
    assert "lacks 2 of the 122 documents of the catalogue, which it therefore never retrieves" in caplog.text
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


@pytest.mark.slow
def test_names_that_sql_would_read_otherwise(url):
    """Upper case, reserved words, blanks, quotation marks and dots in names; ids that are numbers."""
    catalog = Catalog.from_records({"id": str(i), "text": text} for i, text in enumerate(CATALOG.texts))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            'CREATE SCHEMA "My ""Shop"; CREATE TABLE "My ""Shop"."Order" ("Select" bigint, "group.by" varchar(999))'
        )
        with connection.cursor() as cursor:
            rows = list(enumerate(catalog.texts))
            cursor.executemany('INSERT INTO "My ""Shop"."Order" VALUES (%s, %s)', rows)
    names = {"schema": 'My "Shop', "table": "Order", "id_column": "Select", "text_column": "group.by"}
    existing, made = (retrievers.open("postgres", catalog, url=url, **more) for more in (names, {}))
    for text in QUERIES[:20]:
        assert ranking(existing, text) == ranking(made, text)
    for wrong, meant in (
        ({"table": "order"}, 'schema=My "Shop and table=Order'),
        ({"schema": "public", "table": 'My "Shop.Order'}, 'schema=My "Shop and table=Order'),
        ({"schema": "public", "table": '"Items"', "id_column": "sku"}, "schema=public and table=items"),
    ):
        with pytest.raises(RetrieverError, match=f"does not exist: correct .*: did you mean {meant}"):
            retrievers.open("postgres", catalog, url=url, **names | wrong)


@pytest.mark.slow
def test_kinds_of_text(url):
    """What is a text for PostgreSQL, and what is none."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE DOMAIN title AS text")
        connection.execute(
            "CREATE TABLE kinds AS SELECT sku AS id, body::varchar(200) AS a, body::char(200) AS b, body::title AS c, "
            "to_jsonb(body) AS d, ARRAY[body] AS e FROM items"
        )
    made = retrievers.open("postgres", CATALOG, url=url)
    for column in "abc":
        existing = retrievers.open("postgres", CATALOG, url=url, table="kinds", text_column=column)
        assert ranking(existing, "party face") == ranking(made, "party face")
    for column, kind in (("d", "jsonb"), ("e", r"text\[\]")):
        with pytest.raises(RetrieverError, match=f"text_column: '{column}' in .* is {kind}, not text: name another"):
            retrievers.open("postgres", CATALOG, url=url, table="kinds", text_column=column)


@pytest.mark.slow
def test_tables_that_no_search_can_read(url):
    """Another attempt would not help, so these are no outages."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE MATERIALIZED VIEW empty AS SELECT sku AS id, body FROM items WITH NO DATA")
        connection.execute("CREATE TABLE large AS SELECT sku AS id, body FROM items")
        connection.execute("UPDATE large SET body = %s WHERE id = 'd7'", (" ".join(map(str, range(200_000))),))
    with pytest.raises(RetrieverError, match=r"has not been populated.*: run REFRESH MATERIALIZED VIEW on"):
        retrievers.open("postgres", CATALOG, url=url, table="empty", text_column="body")
    large = retrievers.open("postgres", CATALOG, url=url, table="large", text_column="body")
    with pytest.raises(RetrieverError, match=r"string is too long for tsvector .*: name a .*tsvector_column"):
        large.ranks([Query("party")], np.array([[1]]))


@pytest.mark.slow
def test_rows_without_a_text_or_an_embedding(url, caplog):
    """A document is absent where nothing finds it: in mode hybrid, where it has neither of the two."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE gaps (id text, body text, e vector(384));"
            "INSERT INTO gaps SELECT 'd' || i, CASE WHEN i IN (3, 5) THEN NULL ELSE 'party ' || i END, "
            "CASE WHEN i IN (4, 5) THEN NULL ELSE array_fill(i + 1, ARRAY[384])::vector END "
            "FROM generate_series(0, 119) AS i; INSERT INTO gaps VALUES (NULL, 'party', NULL)"
        )
    absent = {"text": {3, 5}, "vector": {4, 5}, "hybrid": {5}}
    for mode, expected in absent.items():
        columns = {"text_column": "body"} if mode == "text" else {"embedding_column": "e"}
        columns |= {"text_column": "body"} if mode == "hybrid" else {}
        retriever = retrievers.open("postgres", CATALOG, url=url, table="gaps", mode=mode, **columns)
        assert retrievers.absent(retriever) == expected
        found = retriever.search([Query("party")], len(CATALOG)).rows[0]
        assert set(range(len(CATALOG))) - set(found.tolist()) == expected
        ranks = retriever.ranks([Query("party")], np.arange(len(CATALOG))[None])[0]
        assert set(np.flatnonzero(ranks == 0).tolist()) == expected


@pytest.mark.parametrize(
    ("version", "pgvector", "params", "message"),
    [
        (12, None, {}, "PostgreSQL 12 is too old: upgrade it to 13 or later"),
        (16, "0.6.2", {"mode": "vector"}, "mode: vector with index=exact needs pgvector 0.7 or later.* has 0.6.2: run"),
        (16, "0.7.4", {"mode": "hybrid", "index": "hnsw"}, "with index=hnsw needs pgvector 0.8 or later"),
    ],
)
def test_versions_that_are_too_old_are_named(version, pgvector, params, message):
    with pytest.raises(RetrieverError, match=message):
        tables._check_versions(version, pgvector, Params(url="postgresql:///shop", **params))


def test_versions_that_are_new_enough_are_taken():
    existing = {"mode": "vector", "table": "t", "embedding_column": "e"}
    for version, pgvector, params in ((13, None, {}), (18, "0.10.1", {"mode": "vector", "index": "hnsw"}),
                                      (14, "0.5.1", existing)):  # fmt: skip
        tables._check_versions(version, pgvector, Params(url="postgresql:///shop", **params))
