"""The parameters of `postgres`."""

import pytest

import retrievers
from retrievers.text.postgres.params import Params


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
        ({"index": "ivfflat"}, "index: unknown 'ivfflat': choose exact or hnsw"),
        ({"normalization": 64}, "normalization must be an integer from 0 to 63, got 64: 0 is usual"),
        ({"normalization": True}, "normalization must be an integer"),
        ({"ef_search": 1001}, "ef_search must be an integer from 1 to 1000"),
        ({"depth": 0}, "depth must be an integer >= 1, got 0: 1000 is usual"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"connections": 0}, "connections must be an integer >= 1"),
        ({"timeout": 0}, "timeout must be a number above 0"),
        ({"timeout": 1e9}, "timeout must be a number above 0 and below 2,000,000, got 1000000000.0: 60.0 is usual"),
        ({"vector_weight": float("nan")}, "vector_weight must be a number above 0"),
        ({"weights": {"E": 1}}, "weights must map A, B, C or D to numbers from 0 to 1"),
        ({"weights": {"A": 2}}, "weights must map"),
        ({"fields": {"title": ["A"]}}, r"fields must map fields to the weights A, B, C or D, got \{'title': \['A'\]\}"),
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
