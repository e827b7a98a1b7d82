"""The client of a retriever over HTTP, so that many training processes share one index or one GPU.

The server is `rec-r1 serve`. A request that fails is sent again a few times, after random pauses. After several
failures in a row, a circuit breaker raises an error at once for a while, so that an outage costs a run seconds instead
of many timeouts. The ranks of a query without an answer are -1.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.joined import warn
from retrievers.core.parameters import Checks, check_address
from retrievers.core.ranking import check_k, check_targets, no_hits
from retrievers.core.requests import (
    Breaker,
    OutageError,
    PerProcess,
    one_line,
    retried,
    retry_after,
)
from retrievers.serving.answers import read_hits, read_ranks
from retrievers.serving.structured import query_to_json, schema_from_json
from retrievers.text import structured
from retrievers.types import Hits, Query, RetrieverError, Traits

logger = logging.getLogger(__name__)
INSTALL = "pip install 'rec-r1[remote]'"
TOKEN_VARIABLE = "REC_R1_TOKEN"  # The environment variable with the token. A recipe must not contain secrets.
MAX_QUERY_CHARACTERS = 1 << 20  # A longer text is cut.
MAX_TEXT_BYTES = 48 << 20  # A request has at most so many bytes of texts. Servers refuse 64 MiB.
LONGEST_CHARACTER = 12  # Bytes of a character beyond U+FFFF in JSON.
FINGERPRINT_HEADER = "x-rec-r1-fingerprint"  # The header with the fingerprint of the index that the client expects.


@dataclass(frozen=True)
class Params:
    """The parameters of `remote`. Raises ValueError, naming the field, for a bad value."""

    # The address of a server that `rec-r1 serve` started; $REC_R1_TOKEN holds its token.
    url: str = "http://127.0.0.1:8077"
    batch_size: int = 128  # How many queries one request holds.
    connections: int = 4  # How many requests are sent at the same time.
    timeout: float = 30.0  # How many seconds a request may take.
    retries: int = 3  # How often a failed request is sent again.
    breaker_failures: int = 5  # After so many failed requests in a row, none is sent for `breaker_seconds`.
    breaker_seconds: float = 30.0  # How many seconds no request is sent then.

    def __post_init__(self) -> None:
        checks = Checks(self)
        with checks:
            check_address("url", self.url, f"set the token in ${TOKEN_VARIABLE}")
        checks.integers("batch_size", "connections", "breaker_failures")
        checks.integers("retries", least=0)
        checks.numbers("timeout", "breaker_seconds", above=True)
        checks.raise_all()


class _Request(NamedTuple):
    """One request to the server."""

    span: slice  # Its queries among all queries.
    payload: dict[str, Any]  # The JSON object to send.
    read: Callable[[dict[str, Any]], Any]  # Turns the JSON answer into arrays. Raises OutageError for an invalid one.


class Remote:
    """A retriever on a server; see :class:`retrievers.types.Retriever` for the contract.

    It may be shared between threads, and connects again in a child process. Of a text of more than a million
    characters, the first MAX_QUERY_CHARACTERS are sent.

    params: the parameters.
    fingerprint: the fingerprint of the server's retriever. Every request contains it, and a server with another index
        refuses the request.
    documents: the number of documents in the catalogue.
    traits: those of the server's retriever.
    """

    def __init__(self, params: Params, fingerprint: str, documents: int, traits: Traits) -> None:
        self.params = params
        self.fingerprint = fingerprint
        self._documents, self._traits = documents, traits
        self._clients = PerProcess(partial(_client, params, fingerprint))
        self._breaker = Breaker(params.breaker_failures, params.breaker_seconds)

    def __reduce__(self) -> tuple[Callable[..., Remote], tuple[Any, ...]]:
        return Remote, (self.params, self.fingerprint, self._documents, self._traits)

    def __len__(self) -> int:
        return self._documents

    def retriever_traits(self) -> Traits:
        """The traits that the server reported."""
        return self._traits

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol. Raises ConnectionError where a request gets no answer."""
        structured.check(queries, self._traits.structured)
        k = check_k(k, len(self))
        hits = no_hits(len(queries), k)
        requests = []
        for span in self._spans(queries):
            part = queries[span]
            read = partial(read_hits, queries=len(part), k=k, documents=len(self))
            requests.append(_Request(span, {"queries": _to_json(part), "k": k}, read))
        for span, answer in self._ask("search", requests):
            if isinstance(answer, OutageError):
                raise answer
            hits.rows[span], hits.scores[span] = answer
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol. The ranks of queries whose request gets no answer are -1.

        Raises ConnectionError where no request gets an answer.
        """
        targets = check_targets(queries, targets, len(self), structured=True)
        structured.check(queries, self._traits.structured)
        ranks = np.full(targets.shape, -1, np.int32)
        requests = []
        for span in self._spans(queries):
            payload = {"queries": _to_json(queries[span]), "targets": targets[span].tolist()}
            read = partial(read_ranks, targets=targets[span], documents=len(self))
            requests.append(_Request(span, payload, read))
        outages = []
        for span, answer in self._ask("ranks", requests):
            if isinstance(answer, OutageError):
                outages.append(answer)
            else:
                ranks[span] = answer
        if outages and len(outages) == len(requests):
            raise outages[0]
        if outages:
            logger.warning("%d of %d requests failed, the first: %s", len(outages), len(requests), outages[0])
        return ranks

    def _spans(self, queries: Sequence[Query]) -> list[slice]:
        """The queries of each request: at most ``batch_size``, and no more than a server reads, so that some huge texts
        do not spoil the others."""
        spans, start, size = [], 0, 0
        for q, query in enumerate(queries):
            own = LONGEST_CHARACTER * min(len(query.text), MAX_QUERY_CHARACTERS)
            if q > start and (q - start == self.params.batch_size or size + own > MAX_TEXT_BYTES):
                spans.append(slice(start, q))
                start, size = q, 0
            size += own
        return [*spans, slice(start, len(queries))] if len(queries) else []

    def _ask(self, verb: str, requests: list[_Request]) -> list[tuple[slice, Any]]:
        """Send the requests. Returns the slice of the queries of each, and its answer or OutageError.

        Raises RetrieverError where any request raises one.
        """

        def one(request: _Request) -> Any:
            try:
                return self._request(verb, request)
            except OutageError as outage:
                return outage

        if not requests:
            return []
        with ThreadPoolExecutor(min(self.params.connections, len(requests))) as pool:
            answers = list(pool.map(one, requests))
        return [(request.span, answer) for request, answer in zip(requests, answers, strict=True)]

    def _request(self, verb: str, request: _Request) -> Any:
        def attempt() -> Any:
            self._breaker.check()
            try:
                answer = request.read(_call(self._clients.get(), "POST", f"/{verb}", request.payload))
            except OutageError as error:
                self._breaker.record(False, str(error))
                raise
            self._breaker.record(True)
            return answer

        return retried(attempt, self.params.retries, self.params.breaker_seconds)


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> Remote:
    """Connect to a server, and check that it has the same catalogue.

    catalog: the catalogue of the task.
    folder: it is not used, because the server has the index.
    params: see :class:`Params`.

    Raises RetrieverError where no server answers, where it refuses the token, and where it has another catalogue.
    Raises ValueError for a bad parameter.
    """
    settings = Params(**params)
    missing = [name for name in ("httpx", "tenacity") if importlib.util.find_spec(name) is None]
    if missing:
        raise RetrieverError(f"retriever.kind: remote needs {missing[0]}, which is not installed: {INSTALL}")
    client = _client(settings, None)
    try:
        health = _call(client, "GET", "/health")
    except OutageError as error:
        raise RetrieverError(
            f"no retriever answers at {settings.url} ({error}): start one with `rec-r1 serve RECIPE`, or set "
            "retriever.params.url"
        ) from error
    finally:
        client.close()
    if health.get("catalog") != catalog.fingerprint and isinstance(health.get("fingerprint"), str):
        raise RetrieverError(
            f"{settings.url} serves another catalogue ({one_line(health.get('documents'), 16)} documents, fingerprint "
            f"{one_line(health.get('catalog'), 16)}; this task has {len(catalog)}, {catalog.fingerprint[:16]}): start "
            "`rec-r1 serve` with the recipe of this task"
        )
    traits = _traits(health, len(catalog))
    if traits is None:
        raise RetrieverError(f"{settings.url} is no `rec-r1 serve`: check retriever.params.url")
    warn(f"an index at {settings.url}", catalog.ids, traits.absent)
    return Remote(settings, health["fingerprint"], len(catalog), traits)


def _traits(health: dict[str, Any], documents: int) -> Traits | None:
    """The traits of the server's retriever, in the answer to /health. None = this is no answer of `rec-r1 serve`.

    documents: the number of documents in the catalogue.
    """
    # Servers of earlier versions do not report these. They only had text retrievers with all documents.
    reads, fitted, absent = health.get("reads_text", True), health.get("fitted_on", []), health.get("absent", [])
    valid = isinstance(health.get("fingerprint"), str) and type(reads) is bool
    valid = valid and isinstance(fitted, list) and all(isinstance(each, str) for each in fitted)
    valid = valid and isinstance(absent, list) and all(type(row) is int and 0 <= row < documents for row in absent)
    try:
        schema = schema_from_json(health.get("structured"))
    except (TypeError, ValueError):
        valid = False
    return Traits(reads_text=reads, fitted_on=fitted, absent=absent, structured=schema) if valid else None


def _client(params: Params, fingerprint: str | None) -> Any:
    import httpx

    token = os.environ.get(TOKEN_VARIABLE)
    if token and re.search(r"[^!-~]", token):  # httpx would refuse it with a message that contains the token.
        raise RetrieverError(
            f"${TOKEN_VARIABLE} has a character that a token cannot have, such as a space: set it again"
        )
    headers = {"authorization": f"Bearer {token}"} if token else {}
    headers |= {FINGERPRINT_HEADER: fingerprint} if fingerprint else {}
    return httpx.Client(
        base_url=params.url,
        timeout=params.timeout,
        headers=headers,
        limits=httpx.Limits(max_connections=params.connections),
        verify=_tls(),
        trust_env=False,  # A proxy for the web must not be used between a training and its retriever.
    )


@cache
def _tls() -> Any:
    """The TLS settings of all clients, which httpx needs for http addresses, too.

    A forked process takes those of its parent. If it made its own, it would wait for ever for a lock of OpenSSL that
    another thread of its parent held during the fork.
    """
    import httpx

    return httpx.create_ssl_context(trust_env=False)


def _call(client: Any, method: str, path: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send one request, and return the JSON object of its answer.

    Raises RetrieverError where `rec-r1 serve` itself refuses: for a wrong token, another index, a broken index, and a
    request that it does not understand. Raises OutageError for every other failure, because gateways may redirect
    requests, limit their rate, or lose the server for a while.
    """
    import httpx

    where = f"{str(client.base_url).rstrip('/')}{path}"
    # ASCII, because httpx refuses halves of surrogate pairs, which a text may have.
    content = None if payload is None else json.dumps(payload).encode("ascii")
    try:
        response = client.request(method, path, content=content, headers={"content-type": "application/json"})
    except httpx.RequestError as error:
        raise OutageError(f"{where}: {type(error).__name__}: {error}") from error
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        answer = None
    said = answer.get("error") if isinstance(answer, dict) else None
    reason = one_line(said, 300) if isinstance(said, str) else ""
    code = response.status_code
    if code in (401, 403):
        raise RetrieverError(f"{where} refuses the token: set ${TOKEN_VARIABLE} to the token of the server")
    if code == 400 and reason:  # The client has checked the arguments, so the two versions must differ.
        raise RetrieverError(f"{where}: {reason}: install the same version of rec-r1 on both sides")
    if code == 413:
        raise RetrieverError(f"{where}: the request is too large: lower retriever.params.batch_size")
    if reason and (code == 409 or (code == 500 and isinstance(answer, dict) and answer.get("fatal") is True)):
        raise RetrieverError(f"{where}: {reason}")
    if code == 200 and isinstance(answer, dict):
        return answer
    pause = retry_after(response.headers.get("retry-after", ""))
    if code >= 500 or reason:
        raise OutageError(f"{where}: status {code}{f' ({reason})' if reason else ''}", pause)
    raise OutageError(f"{where} is no `rec-r1 serve` (status {code}): check retriever.params.url", pause)


def _to_json(queries: Sequence[Query]) -> list[list[Any]]:
    """Each query as a JSON list, [text, history, weights] or, for a structured one, [text, history, weights, parts].

    Numbers of numpy become Python's, which JSON needs. Servers of earlier versions read texts only.
    """
    sent = []
    for query in queries:
        parts = [] if query.structured is None else [query_to_json(query.structured)]
        text = query.text[:MAX_QUERY_CHARACTERS]
        sent.append([text, [int(row) for row in query.history], [float(w) for w in query.weights], *parts])
    return sent
