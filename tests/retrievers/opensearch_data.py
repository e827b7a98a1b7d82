"""What the tests of `opensearch` share: a catalogue, its `bm25`, and the stand-in's index `shop` of it."""

import numpy as np
import pytest

import retrievers
from retrievers import Catalog, Query

WORDS = ["party", "face", "sad", "tada", "castle", "shoe", "runs", "blue", "green"]
RNG = np.random.default_rng(0)
# Short texts of few words: many documents have equal scores.
TEXTS = [" ".join(RNG.choice(WORDS, RNG.integers(1, 5))) for _ in range(120)]
CATALOG = Catalog.from_records(
    {"id": f"d{i}", "text": text, "title": text.split()[0], "brand": "acme" if i % 3 else "other"}
    for i, text in enumerate(TEXTS)
)
BM25 = retrievers.open("bm25", CATALOG)
QUICK = {"retries": 1, "timeout": 5.0}
SOURCES = {f"d{i}": {"text": text, "brand": CATALOG.column("brand")[i]} for i, text in enumerate(TEXTS)}
ENGLISH = {"analysis": {"analyzer": {"default": {"type": "english"}}}, "keywords": ["code", "brand"]}
QUERIES = [Query("party face"), Query("sad castle castle"), Query("zebra"), Query("blue")]
EVERY = np.tile(np.arange(-1, len(TEXTS)), (len(QUERIES), 1))
both = pytest.mark.parametrize("standin", ["opensearch", "elasticsearch"], indirect=True)


def connect(standin, catalog=CATALOG, folder=None, **params):
    return retrievers.open("opensearch", catalog, folder, url=standin.url, **QUICK | params)


def searches(standin) -> list[list[dict]]:
    """The bodies of each `_msearch`."""
    return [lines[1::2] for _, path, lines in standin.received if path == "/_msearch"]


def assert_like_bm25(retriever):
    assert retriever.ranks(QUERIES, EVERY).tolist() == BM25.ranks(QUERIES, EVERY).tolist()
    for k in (1, 7, len(TEXTS)):
        ours, theirs = retriever.search(QUERIES, k), BM25.search(QUERIES, k)
        assert ours.rows.tolist() == theirs.rows.tolist()
        assert np.allclose(ours.scores, theirs.scores, rtol=1e-6, atol=0)


TEMPLATE = {"bool": {"must": [{"match": {"text": {"query": "{query}"}}}]}}
