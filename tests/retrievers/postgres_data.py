"""What the tests of `postgres` share: a catalogue, queries, and a database with tables of them."""

import random
from functools import cache

import psycopg
from postgres_server import server

import retrievers
from retrievers import Catalog, Query

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


@cache
def shop_database() -> str:
    """The address of a database with a table `items`, as a shop may have it, and a user `reader` who may read it."""
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


def ranking(retriever, text) -> list[int]:
    rows = retriever.search([Query(text)], len(CATALOG)).rows[0]
    return rows[rows >= 0].tolist()


def open_and_search(address) -> list:
    return retrievers.open("postgres", CATALOG, url=address).search([Query("party")], 9).rows.tolist()
