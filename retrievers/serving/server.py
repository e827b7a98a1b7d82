"""The server for `remote`: any retriever over HTTP, with the requests of many clients combined into one call.

GET /health -> status, kind, fingerprint, catalog, documents, reads_text, fitted_on, absent, structured.
POST /ranks {queries, targets} -> {ranks}. POST /search {queries, k} -> {rows, scores}.
A query is [text, history, weights], and a structured one [text, history, weights, parts]. Errors are {error}.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from retrievers.combine.capabilities import absent, fitted_on, reads_text, schema_of
from retrievers.core.progress import hidden
from retrievers.serving.client import FINGERPRINT_HEADER, MAX_QUERY_CHARACTERS
from retrievers.serving.http_server import BODY_TIMEOUT_S, Batcher, RefusedError, check_token, read_body
from retrievers.serving.structured import query_from_json, schema_to_json
from retrievers.types import Query, Retriever, RetrieverError

logger = logging.getLogger(__name__)
MAX_ANSWER_PLACES = 20_000_000  # places of an answer: queries x k, or queries x targets


class _Asked(NamedTuple):
    """The queries of one request, with their targets, or with k > 0."""

    queries: list[Query]
    targets: np.ndarray | None
    k: int


def app(
    retriever: Retriever,
    kind: str,
    catalog: str,
    documents: int,
    token: str | None = None,
    max_batch: int = 1024,
    wait_ms: float = 2.0,
    body_s: float = BODY_TIMEOUT_S,
) -> Any:
    """The Starlette application. catalog: the catalogue's fingerprint. token: what clients must send; None = nothing.
    body_s: seconds for a request's body to arrive."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    batcher = Batcher(partial(_call, retriever), max_batch, wait_ms)
    about: dict[str, Any] = {"status": "ok", "kind": kind, "fingerprint": retriever.fingerprint}
    about |= {"catalog": catalog, "documents": documents}
    about |= {"reads_text": reads_text(retriever), "fitted_on": sorted(fitted_on(retriever))}
    about |= {"absent": sorted(map(int, absent(retriever)))}
    about["structured"] = schema_to_json(schema_of(retriever))

    async def answer(request: Request) -> dict[str, Any]:
        check_token(request, token)
        if request.url.path == "/health":
            return about
        meant = request.headers.get(FINGERPRINT_HEADER, retriever.fingerprint)
        if meant != retriever.fingerprint:
            raise RefusedError(
                409, f"the server has another index now ({retriever.fingerprint[:16]}, not {meant[:16]})"
            )
        try:
            asked = _parse(await read_body(request, body_s), request.url.path == "/ranks", documents)
            answered: dict[str, Any] = await batcher.ask(asked, len(asked.queries), asked.k)
            return answered
        except ValueError as error:
            raise RefusedError(400, str(error)) from error
        except RetrieverError as error:
            raise RefusedError(500, str(error), fatal=True) from error

    async def handle(request: Request) -> Response:
        try:
            return JSONResponse(await answer(request))
        except RefusedError as error:
            refused: Response = error.response()
            return refused
        except Exception as error:
            logger.exception("the retriever fails")
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 503)

    posts = [Route(path, handle, methods=["POST"]) for path in ("/ranks", "/search")]
    return Starlette(routes=[Route("/health", handle), *posts], lifespan=lambda _: batcher.running())


def _call(retriever: Retriever, asked: list[_Asked]) -> list[dict[str, Any]]:
    """One call of the retriever for several requests, all with targets or all with the same k.

    No progress bar appears in the log of the server.
    """
    queries = [query for each in asked for query in each.queries]
    ends = np.cumsum([len(each.queries) for each in asked])
    spans = [slice(end - len(each.queries), end) for each, end in zip(asked, ends, strict=True)]
    if asked[0].k:
        with hidden():
            hits = retriever.search(queries, asked[0].k)
        scores = np.where(hits.rows < 0, 0, hits.scores)  # JSON has no infinity; the client restores it
        return [{"rows": hits.rows[span].tolist(), "scores": scores[span].tolist()} for span in spans]
    tables = [each.targets for each in asked if each.targets is not None]
    targets = np.full((len(queries), max(table.shape[1] for table in tables)), -1, np.int64)
    for span, table in zip(spans, tables, strict=True):
        targets[span, : table.shape[1]] = table
    with hidden():
        ranks = retriever.ranks(queries, targets)
    return [{"ranks": ranks[span, : table.shape[1]].tolist()} for span, table in zip(spans, tables, strict=True)]


def _parse(body: bytes, ranks: bool, documents: int) -> _Asked:
    """The queries with their targets, or with k. Raises ValueError that says what to send; nothing is converted."""
    shape = '{"queries": [[text, history, weights], …], ' + ('"targets": [[row, …], …]}' if ranks else '"k": 10}')
    try:
        tree = json.loads(body)
        queries = [_query(each, documents) for each in tree["queries"]]
        if not ranks:
            k = tree["k"]
            if type(k) is not int or k < 1:
                raise ValueError(f"k must be an integer >= 1, got {str(k)[:20]}")
            _check_size(len(queries), min(k, documents))
            return _Asked(queries, None, min(k, documents))
        rows = tree["targets"]
        if len(rows) != len(queries) or len({len(row) for row in rows}) > 1:
            raise ValueError("targets must be one list per query, all of one length")
        if not all(type(row) is int and -1 <= row < 2**31 for each in rows for row in each):
            raise TypeError("a target must be a row")
        width = len(rows[0]) if rows else 0
        _check_size(len(queries), width)
        return _Asked(queries, np.array(rows, np.int64).reshape(len(queries), width), 0)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"send {shape} ({type(error).__name__}: {str(error)[:200]})") from error


def _query(sent: Any, documents: int) -> Query:
    if not isinstance(sent, list) or len(sent) not in (3, 4):
        raise TypeError("a query must be a list of three parts, or of four with a structured query")
    text, history, weights, *parts = sent
    if not isinstance(text, str) or len(text) > MAX_QUERY_CHARACTERS:
        raise TypeError(f"a text must be a string of at most {MAX_QUERY_CHARACTERS} characters")
    if not all(type(row) is int and 0 <= row < documents for row in history):
        raise TypeError("a history must hold rows of the catalogue")
    if not all(type(weight) in (int, float) and -1e30 < weight < 1e30 for weight in weights):
        raise TypeError("a weight must be a finite number")
    structured = query_from_json(parts[0]) if parts else None
    return Query(text, tuple(history), tuple(map(float, weights)), structured=structured)


def _check_size(queries: int, width: int) -> None:
    if queries * width > MAX_ANSWER_PLACES:
        raise ValueError(
            f"{queries} queries x {width}: at most {MAX_ANSWER_PLACES:,} places: send fewer queries at a time"
        )
