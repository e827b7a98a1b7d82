"""A real PostgreSQL: the order of plain SQL, hybrid and approximate rankings, processes and servers."""

import random

import numpy as np
import psycopg
import pytest
from postgres_data import CATALOG, PLAIN, QUERIES, WORDS, make_catalog, ranking, shop_database
from serving import serve

import retrievers
from retrievers import Query, RetrieverError
from retrievers.encoders import lsa
from retrievers.text.postgres.params import Params


@pytest.fixture(scope="module")
def url():
    return shop_database()


def direct(url, query_function, text, function="ts_rank_cd", more="") -> list[int]:
    """The ranking that plain SQL gives: rows, best first."""
    statement = (
        f"SELECT substr(sku, 2)::int AS row FROM items, {query_function}('english', %s) AS query WHERE terms @@ query "
        f"ORDER BY {function}(terms, query{more}) DESC, row"
    )
    with psycopg.connect(url) as connection:
        return [row for (row,) in connection.execute(statement, (text,))]


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
@pytest.mark.parametrize(("mode", "queries"), [("text", 10_000), ("vector", 1_000), ("hybrid", 1_000)])
def test_the_ranks_of_thousands_of_random_queries_are_the_positions_in_search(url, mode, queries, tmp_path):
    model = {} if mode == "text" else {"model": str(lsa.fit(CATALOG.texts, tmp_path / "lsa"))}
    retriever = retrievers.open("postgres", CATALOG, url=url, mode=mode, **model)
    chance, n = random.Random(3), len(CATALOG)
    asked = [Query(" ".join(chance.choices([*WORDS, "unseen"], k=chance.randint(1, 5)))) for _ in range(queries)]
    targets = np.array([[chance.randrange(n)] for _ in asked])
    found = retriever.search(asked, n).rows == targets
    expected = np.where(found.any(axis=1), found.argmax(axis=1) + 1, 0)
    assert retriever.ranks(asked, targets)[:, 0].tolist() == expected.tolist()
    assert np.unique(expected).size > (30 if mode == "text" else 100)


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


@pytest.mark.slow
def test_a_spawned_process_asks_an_existing_table(url, spawned):
    retriever = retrievers.open("postgres", CATALOG, url=url, table="items", id_column="sku", text_column="body")
    assert spawned.apply(ranking, (retriever, "party face")) == ranking(retriever, "party face")


@pytest.mark.slow
def test_it_is_served_like_any_other(url):
    retriever = retrievers.open("postgres", CATALOG, url=url)
    remote = retrievers.open("remote", CATALOG, url=serve(retriever, CATALOG))
    asked, targets = [Query(text) for text in QUERIES], np.tile(np.arange(9), (len(QUERIES), 1))
    assert remote.fingerprint == retriever.fingerprint
    assert remote.ranks(asked, targets).tolist() == retriever.ranks(asked, targets).tolist()
