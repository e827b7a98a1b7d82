"""Texts that a model, a user or an attacker may send to every engine: only a search happens, no filter is bypassed, and
one text does not change what the others of its batch find."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import psycopg
import pytest
from postgres_server import shared_database
from serving import serve
from standin import Standin
from structured_data import FIELDS, TEXTS, catalog, documents_of
from test_structured_engines import COLUMNS, content, table
from tiny_encoder import tiny_encoder

import retrievers
from retrievers import Cache, Query
from retrievers.text.bm25 import Params, analyze

pytestmark = pytest.mark.slow

CATALOG = catalog()
DOCUMENTS = documents_of(CATALOG)
EVERY = np.arange(len(CATALOG))
RED = "red shoe"
QUERY_STRING = {"query_string": {"query": "{query}", "default_field": "text"}}
HOSTILE = [
    *TEXTS, "red OR *:*", "color:blue OR red", "_exists_:color", '"red" -shoe', "red AND NOT (shoe OR", "red\\",
    "/.*/ red", "{query} {query}", '{query}"}}, {"match_all": {}}', "$1 %(texts)s %s %%", "1e400 NaN -Infinity 0x1F",
    "red:*A & (shoe | !boot) <-> rain", "\ud83d\ude00 \udcff red", "\ufeffred", "\u202e\u2066red\u2069",
    "red\u2028shoe", "re\u0301d " + "\u0301\u0316" * 2_000, "\ufdfa" * 500, "&amp;<red>&#0;", "a-b-" * 200,
    "http://a.b/" + "c/" * 300, "red@shoe.com " * 50, "1.2e9 " * 100, "-red " * 300, '"red" ' * 300, "red & ! " * 300,
    "((((red))))" * 200,
]  # fmt: skip
MEGABYTE = [
    "x" * 1_000_000, " ".join(f"w{number}" for number in range(150_000)), "登山鞋" * 330_000, "red\0" * 250_000,
    "\ud83d" * 200_000 + " red", "(" * 500_000 + "red" + ")" * 499_999, "red & !" * 140_000, " " * 1_000_000,
    "é" + "\u0301\u0316" * 500_000,
]  # fmt: skip


@cache
def encoder() -> str:
    return str(tiny_encoder(Path(mkdtemp()) / "encoder", CATALOG.texts))


@cache
def engine(name: str):
    kind, _, mode = name.partition(" ")
    if kind == "postgres":
        params = {"operator": mode} if mode in ("or", "and", "web") else {"mode": mode, "model": encoder()}
        return retrievers.open(kind, CATALOG, url=shared_database(), **params)
    if kind == "opensearch":
        params = {"template": QUERY_STRING} if mode == "template" else {"fields": FIELDS}
        return retrievers.open(kind, CATALOG, url=Standin().url, **params)
    if kind == "remote":
        return retrievers.open(kind, CATALOG, url=serve(engine("bm25"), CATALOG))
    if kind == "cache":
        return Cache(engine("bm25"), len(CATALOG), folder=mkdtemp())
    return retrievers.open(kind, CATALOG, fields=FIELDS)


ENGINES = ["bm25", "tantivy", *(f"postgres {mode}" for mode in ("or", "and", "web", "vector", "hybrid"))]
ENGINES += ["opensearch fields", "opensearch template", "remote", "cache"]


def check(retriever, texts: list[str]) -> None:
    """Search and ranks agree for each text, and an ordinary query beside it finds what it finds alone."""
    alone = retriever.search([Query(RED)], len(CATALOG)).rows[0].tolist()
    asked = [Query(text) for one in texts for text in (one, RED)]
    found = retriever.search(asked, len(CATALOG)).rows
    ranks = retriever.ranks(asked, np.tile(EVERY, (len(asked), 1)))
    assert (found[1::2] == alone).all()
    for rows, own in zip(found, ranks, strict=True):
        listed = rows[rows >= 0].tolist()
        assert np.flatnonzero(own).tolist() == sorted(listed) and own[listed].tolist() == list(
            range(1, len(listed) + 1)
        )


@pytest.mark.parametrize("name", ENGINES)
def test_a_hostile_text_is_searched_and_spoils_no_other(name):
    check(engine(name), HOSTILE)


@pytest.mark.parametrize("name", [name for name in ENGINES if name not in ("postgres vector", "cache")])
def test_a_text_of_a_megabyte_is_searched_and_spoils_no_other(name):
    check(engine(name), MEGABYTE)


@pytest.mark.parametrize("name", ["bm25", "tantivy", "opensearch fields", "remote", "cache"])
def test_a_bag_of_words_finds_only_documents_with_one_of_them(name):
    """No syntax is read: a hit has a word of the text, whatever else is in it."""
    found = engine(name).search([Query(text) for text in HOSTILE], len(CATALOG)).rows
    for text, rows in zip(HOSTILE, found, strict=True):
        own = set(analyze([text], Params())[0])
        for row in rows[rows >= 0].tolist():
            terms = analyze([DOCUMENTS[row][field] for field in FIELDS], Params())
            assert own & {term for field in terms for term in field}, text


@pytest.mark.parametrize("form", [{"template": QUERY_STRING}, {"fields": FIELDS}])
def test_no_text_passes_by_the_filter_of_a_recipe(form):
    own = Standin("elasticsearch")
    clause = {"term": {"color.keyword": "red"}}
    retriever = retrievers.open("elasticsearch", CATALOG, url=own.url, filter=[clause], **form)
    own.received.clear()
    found = retriever.search([Query(text) for text in HOSTILE], len(CATALOG)).rows
    assert {DOCUMENTS[row]["color"] for row in found[found >= 0].tolist()} == {"red"}
    searches = [line for _, path, lines in own.received if path == "/_msearch" for line in lines[1::2]]
    assert searches and all(clause in body["query"]["bool"]["filter"] for body in searches)
    assert {method for method, _, _ in own.received} == {"POST"}


@pytest.mark.parametrize("operator", ["or", "and", "web"])
def test_no_text_passes_by_a_view_or_changes_a_database(operator):
    more = {"language": None, "operator": operator}
    retriever = retrievers.open("postgres", CATALOG, url=table(), table="reds", **COLUMNS, **more)
    before = content(table())
    found = retriever.search([Query(text) for text in HOSTILE], len(CATALOG)).rows
    assert {DOCUMENTS[row]["color"] for row in found[found >= 0].tolist()} == {"red"}
    assert content(table()) == before
    with psycopg.connect(table()) as connection:
        assert connection.execute("SELECT count(*) FROM reds").fetchone()[0] < len(CATALOG)
