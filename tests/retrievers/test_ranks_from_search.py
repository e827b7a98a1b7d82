"""`ranks_from_search`: compared with brute force and with BM25's own ranks, and for an engine behind HTTP."""

import inspect
import json
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import retrievers
from retrievers import Catalog, Hits, Query, ranks_from_search
from retrievers.core import ranking

WORDS = ["party", "face", "sad", "tada", "castle", "the"]
TEXTS = ["party popper", "sad face", "party face", "party face", "castle", "tada", "the of and", "sad sad party"]
CATALOG = Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS))
BM25 = retrievers.open("bm25", CATALOG)
N = len(TEXTS)


def listed(lists):
    """A search that returns these rows, cut or padded to the depth."""

    def search(queries, k):
        rows = np.full((len(queries), k), -1, np.int32)
        for q, query in enumerate(queries):
            found = lists[int(query.text)][:k]
            rows[q, : len(found)] = found
        return Hits(rows, np.zeros(rows.shape, np.float32))

    return search


@given(data=st.data(), documents=st.integers(1, 9), width=st.integers(0, 4), places=st.sampled_from([1, 5, 1000]))
def test_it_is_the_place_in_the_list(data, documents, width, places):
    row = st.integers(0, documents - 1)
    lists = data.draw(st.lists(st.lists(row, max_size=documents), max_size=5))  # A row may occur twice.
    depth = data.draw(st.none() | st.integers(1, documents + 3))
    each = st.lists(st.just(-1) | row, min_size=width, max_size=width)
    targets = data.draw(st.lists(each, min_size=len(lists), max_size=len(lists)))
    expected = [
        [own[:depth].index(t) + 1 if t in own[:depth] else 0 for t in wanted]
        for own, wanted in zip(lists, targets, strict=True)
    ]
    given_ = np.array(targets, np.int64).reshape(len(lists), width)
    queries = [Query(str(q)) for q in range(len(lists))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "MAX_SEARCH_PLACES", places)  # Several searches give the same ranks as one.
        found = ranks_from_search(listed(lists), queries, given_, documents, depth)
    assert found.dtype == np.int32 and found.shape == given_.shape and found.tolist() == expected


@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join), min_size=1, max_size=4), st.integers(1, N))
def test_it_agrees_with_the_ranks_of_bm25(texts, depth):
    queries = [Query(text) for text in texts]
    targets = np.tile(np.arange(-1, N), (len(queries), 1))
    own = BM25.ranks(queries, targets)
    assert ranks_from_search(BM25.search, queries, targets, N).tolist() == own.tolist()
    assert ranks_from_search(BM25.search, queries, targets, N, depth).tolist() == np.where(own > depth, 0, own).tolist()


def test_what_does_not_fit_is_refused():
    one, rows = [Query("0")], np.array([[0]])
    with pytest.raises(ValueError, match="depth must be an integer >= 1, got 0"):
        ranks_from_search(listed([[0]]), one, rows, 3, depth=0)
    with pytest.raises(ValueError, match="target row 3 is outside"):
        ranks_from_search(listed([[0]]), one, np.array([[3]]), 3)
    for found in (3, -2):
        with pytest.raises(ValueError, match=f"search returned row {found}, but the catalogue has the rows 0 to 2"):
            ranks_from_search(listed([[found]]), one, rows, 3)
    with pytest.raises(ValueError, match="search returned 1 lists for 2 queries"):
        ranks_from_search(lambda queries, k: listed([[0]])(queries[:1], k), one * 2, np.array([[0], [0]]), 3)
    with pytest.raises(TimeoutError):  # An outage passes through.

        def search(queries, k):
            raise TimeoutError

        ranks_from_search(search, one, rows, 3)


class Handler(BaseHTTPRequestHandler):
    """A search engine that answers GET ?text=…&size=… with [{id, score}, …]."""

    def do_GET(self):
        asked = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        hits = BM25.search([Query(asked["text"][0])], int(asked["size"][0]))
        found = [(row, score) for row, score in zip(hits.rows[0], hits.scores[0], strict=True) if row >= 0]
        answer = json.dumps([{"id": CATALOG.ids[int(row)], "score": float(score)} for row, score in found]).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_the_engine_of_the_docstring_ranks_as_its_server_does():
    lines = inspect.getdoc(retrievers.Retriever).partition("::\n")[2].splitlines()
    code = "\n".join(line for line in lines if line.startswith("    ") or not line)
    names = {}
    exec(textwrap.dedent(code), names)
    running = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        engine = names["Engine"](f"http://127.0.0.1:{running.server_port}", CATALOG)
        queries, targets = [Query("party face"), Query("zebra"), Query("")], np.tile(np.arange(-1, N), (3, 1))
        assert engine.ranks(queries, targets).tolist() == BM25.ranks(queries, targets).tolist()
        for ours, theirs in zip(engine.search(queries, 3), BM25.search(queries, 3), strict=True):
            assert ours.tolist() == theirs.tolist()
    finally:
        running.shutdown()
        running.server_close()
