"""Queries and documents that are hostile, odd or very long, on a real PostgreSQL."""

import random

import numpy as np
import psycopg
import pytest
from postgres_data import CATALOG, WORDS, ranking, shop_database

import retrievers
from retrievers import Catalog, Query, RetrieverError
from retrievers.text.postgres import tables


@pytest.fixture(scope="module")
def url():
    return shop_database()


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
    """As a user who may only read. A control character counts as a blank, so that the word beside it is found."""
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
        with pytest.raises(RetrieverError, match="read-only transaction"):
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
