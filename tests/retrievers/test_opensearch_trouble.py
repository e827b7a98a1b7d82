"""Failures of Elasticsearch and OpenSearch, by a stand-in: of one search, of one request, and permanent ones."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from opensearch_data import BM25, EVERY, QUERIES, WORDS, both, connect, searches
from starlette.responses import JSONResponse, Response

from retrievers import Query, RetrieverError
from retrievers.core.requests import OutageError


def failure(status, kind, reason="busy"):
    return {"error": {"type": kind, "reason": reason}, "status": status}


SINGLE = {
    "rejected": failure(429, "es_rejected_execution_exception"),
    "no shard": failure(503, "search_phase_execution_exception", "all shards failed"),
    "server error": failure(500, "null_pointer_exception"),
    "some shards": {"timed_out": False, "_shards": {"total": 2, "failed": 1}, "hits": {"hits": []}, "status": 200},
    "timed out": {"timed_out": True, "_shards": {"failed": 0}, "hits": {"hits": []}, "status": 200},
    "no object": [],
    "no hits": {"timed_out": False, "_shards": {"failed": 0}, "status": 200},
    "no score": {"timed_out": False, "_shards": {"failed": 0}, "hits": {"hits": [{"_id": "d1", "_score": None}]}},
    "a document twice": {
        "timed_out": False, "_shards": {"failed": 0}, "hits": {"hits": [{"_id": "d1", "_score": 1.0}] * 2},
    },
    "no exact total": {
        "timed_out": False, "_shards": {"failed": 0}, "hits": {"total": {"value": 9, "relation": "gte"}, "hits": []},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_a_search_that_fails_is_an_outage_of_its_query_alone(standin, name, no_pauses):
    retriever = connect(standin, index="shop")
    standin.search_trouble = lambda body: SINGLE[name] if "sad" in json.dumps(body["query"]) else None
    ranks = retriever.ranks(QUERIES, EVERY)
    expected = BM25.ranks(QUERIES, EVERY)
    expected[1] = -1
    assert ranks.tolist() == expected.tolist()
    with pytest.raises(OutageError):
        retriever.search(QUERIES, 3)
    standin.search_trouble = lambda body: SINGLE[name]
    with pytest.raises(OutageError):
        retriever.ranks(QUERIES, EVERY)


def test_only_the_searches_that_failed_are_sent_again(standin, no_pauses):
    retriever = connect(standin, index="shop")
    standin.received.clear()
    failing = iter([SINGLE["rejected"]])
    standin.search_trouble = lambda body: next(failing, None) if "sad" in json.dumps(body["query"]) else None
    assert retriever.search(QUERIES, 9).rows.tolist() == BM25.search(QUERIES, 9).rows.tolist()
    assert [len(bodies) for bodies in searches(standin)] == [4, 1] and len(no_pauses) == 1


WHOLE = {
    "429": lambda: JSONResponse(failure(429, "circuit_breaking_exception"), 429, {"retry-after": "7"}),
    "503": lambda: JSONResponse(failure(503, "master_not_discovered_exception"), 503, {"retry-after": "7"}),
    "500": lambda: JSONResponse(failure(500, "exception"), 500),
    "502 of a gateway": lambda: Response("<html>\x1b[31mbad gateway", 502),
    "404 of a gateway": lambda: Response("<html>not found", 404),
    "redirect": lambda: Response("", 302, {"location": "http://127.0.0.1:9/"}),
    "a page": lambda: Response("<html>login", 200),
    "a list": lambda: JSONResponse([1]),
    "too few results": lambda: JSONResponse({"responses": []}, headers={"x-elastic-product": "Elasticsearch"}),
}


@pytest.mark.slow
@both
@pytest.mark.parametrize("name", WHOLE)
def test_a_request_without_an_answer_is_sent_again_and_then_an_outage(standin, name, no_pauses):
    retriever = connect(standin, index="shop")
    playing = iter([WHOLE[name]])
    standin.trouble = lambda method, path: play() if path == "/_msearch" and (play := next(playing, None)) else None
    assert retriever.ranks(QUERIES, EVERY).tolist() == BM25.ranks(QUERIES, EVERY).tolist()
    assert len(no_pauses) == 1 and (no_pauses[0] >= 7) == (name in ("429", "503"))  # What Retry-After asks for.
    standin.trouble = lambda method, path: WHOLE[name]() if path == "/_msearch" else None
    with pytest.raises(OutageError) as caught:
        retriever.ranks(QUERIES, EVERY)
    assert str(caught.value).isprintable() and standin.url in str(caught.value)


def test_after_several_failures_nothing_is_sent_for_a_while(standin, no_pauses):
    retriever = connect(standin, index="shop", breaker_failures=3, retries=9)
    standin.trouble = lambda method, path: WHOLE["500"]() if path == "/_msearch" else None
    with pytest.raises(OutageError, match="3 requests in a row have failed"):
        retriever.ranks(QUERIES, EVERY)
    standin.received.clear()
    with pytest.raises(OutageError, match="the next attempt is in"):
        retriever.ranks(QUERIES, EVERY)
    assert not standin.received


@pytest.mark.slow
@both
def test_what_cannot_pass_ends_the_run(standin):
    retriever = connect(standin, index="shop")
    for play, message in (
        (failure(404, "index_not_found_exception", "no such index [shop]"), "the index was deleted"),
        (failure(403, "security_exception", "no"), "may not search"),
        (failure(400, "parsing_exception", "unknown query [mach]"), "refuses every query"),
    ):
        standin.search_trouble = lambda body, play=play: play
        with pytest.raises(RetrieverError, match=message):
            pickle.loads(pickle.dumps(retriever)).ranks(QUERIES, EVERY)
    standin.search_trouble = lambda body: None
    with pytest.raises(RetrieverError, match=r"refuses every query: parsing_exception: unknown query \[mach\]"):
        connect(standin, index="shop", template={"mach": {"text": "{query}"}})


def test_the_rate_is_limited_over_all_threads(standin, monkeypatch):
    retriever = connect(standin, index="shop", requests_per_second=10, connections=8, batch_size=1)
    slept = []
    clock = SimpleNamespace(monotonic=lambda: 1e6, sleep=slept.append)
    monkeypatch.setattr("retrievers.text.opensearch.cluster.time", clock)
    retriever.search([Query(word) for word in WORDS], 3)
    assert np.allclose(sorted(slept), np.arange(9) / 10, atol=1e-6)
    retriever._searches.close()
