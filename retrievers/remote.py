"""A retriever behind HTTP: one index, or one GPU, for many training processes. The other side is `rec-r1 serve`.

What fails is tried again a few times, with random pauses; after several failures in a row a circuit breaker answers
at once, so that an outage costs a run seconds, not timeouts. A query that stays without an answer gets ranks of -1.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.scores import check_k, check_targets, no_hits
from retrievers.types import Hits, Query, RetrieverError

logger = logging.getLogger(__name__)
INSTALL = "pip install 'rec-r1[remote]'"
TOKEN = "REC_R1_TOKEN"  # the environment variable: a recipe is no place for a secret
FINGERPRINT = "x-rec-r1-fingerprint"  # the header that says which index the client means


@dataclass(frozen=True)
class Params:
    """url of the server; batch_size: queries a request; connections: requests at a time; timeout: seconds a request;
    retries: further attempts at a request; breaker_failures: failed requests in a row after which none is sent for
    breaker_seconds."""

    url: str = "http://127.0.0.1:8077"
    batch_size: int = 128
    connections: int = 4
    timeout: float = 30.0
    retries: int = 3
    breaker_failures: int = 5
    breaker_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not self.url.startswith(("http://", "https://")):
            raise ValueError(f"retriever.params.url must start with http:// or https://, got {self.url!r}")
        for name, least in (("batch_size", 1), ("connections", 1), ("retries", 0), ("breaker_failures", 1)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"retriever.params.{name} must be an integer >= {least}, got {getattr(self, name)!r}")
        for name in ("timeout", "breaker_seconds"):
            if type(getattr(self, name)) not in (int, float) or not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"retriever.params.{name} must be a number of seconds above 0, got {getattr(self, name)!r}"
                )


class OutageError(ConnectionError):
    """The server did not answer, or not with an answer. Worth another attempt."""


class CircuitOpenError(OutageError):
    """Nothing was sent: too many failures lately. Not worth another attempt now."""


class Breaker:
    """Lets nothing through for ``seconds`` after ``failures`` failures in a row; then one attempt decides."""

    def __init__(self, failures: int, seconds: float) -> None:
        self.failures, self.seconds = failures, seconds
        self._lock = Lock()
        self._in_a_row = 0
        self._reason = ""
        self._closed_again = 0.0

    def check(self) -> None:
        """Raises CircuitOpenError while nothing is let through."""
        with self._lock:
            left = self._closed_again - time.monotonic()
            if left > 0:
                failed = f"{self._in_a_row} requests in a row have failed"
                raise CircuitOpenError(f"{failed}, the next attempt is in {left:.0f} s; {self._reason}")
            if self._in_a_row >= self.failures:  # this one decides; the others go on waiting
                self._closed_again = time.monotonic() + self.seconds

    def record(self, well: bool, reason: str = "") -> None:
        with self._lock:
            self._reason = reason
            self._in_a_row = 0 if well else self._in_a_row + 1
            open_ = self._in_a_row >= self.failures
            self._closed_again = time.monotonic() + self.seconds if open_ else 0.0


class Remote:
    """The client; see :class:`retrievers.types.Retriever` for the contract. Safe between threads; in a child it
    connects anew. ``fingerprint`` is the server's: every request names it, and a server with another index refuses.
    reads_text, fitted_on: of the retriever there, see `parts`."""

    def __init__(
        self, params: Params, fingerprint: str, documents: int, reads_text: bool, fitted_on: Sequence[str]
    ) -> None:
        self.params = params
        self.fingerprint = fingerprint
        self.reads_text, self.fitted_on = reads_text, tuple(fitted_on)
        self._documents = documents

    def __reduce__(self) -> tuple[Callable[..., Remote], tuple[Any, ...]]:
        return Remote, (self.params, self.fingerprint, self._documents, self.reads_text, self.fitted_on)

    def __len__(self) -> int:
        return self._documents

    @cached_property
    def _client(self) -> Any:
        return _client(self.params, self.fingerprint)

    @cached_property
    def _breaker(self) -> Breaker:
        return Breaker(self.params.breaker_failures, self.params.breaker_seconds)

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol. Raises ConnectionError where a request stays without an answer."""
        k = check_k(k, len(self))
        hits = no_hits(len(queries), k)
        for part, answer in self._ask("search", [{"queries": _wire(part), "k": k} for part in self._parts(queries)]):
            if isinstance(answer, OutageError):
                raise answer
            size = len(queries[part])
            hits.rows[part] = _array(answer, "rows", (size, k), np.int32)
            hits.scores[part] = _array(answer, "scores", (size, k), np.float32)
        hits.scores[hits.rows < 0] = -np.inf  # JSON has no infinity
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol; -1 for the queries of a request that stays without an answer. Raises ConnectionError
        where all do."""
        targets = check_targets(queries, targets, len(self))
        ranks = np.full(targets.shape, -1, np.int32)
        size = self.params.batch_size
        payloads = [
            {"queries": _wire(part), "targets": targets[i * size : (i + 1) * size].tolist()}
            for i, part in enumerate(self._parts(queries))
        ]
        outages = []
        for part, answer in self._ask("ranks", payloads):
            if isinstance(answer, OutageError):
                outages.append(answer)
            else:
                ranks[part] = _array(answer, "ranks", ranks[part].shape, np.int32)
        if outages and len(outages) == len(payloads):
            raise outages[0]
        if outages:
            logger.warning("%d of %d requests failed, the first: %s", len(outages), len(payloads), outages[0])
        return ranks

    def _parts(self, queries: Sequence[Query]) -> list[Sequence[Query]]:
        size = self.params.batch_size
        return [queries[start : start + size] for start in range(0, len(queries), size)]

    def _ask(self, verb: str, payloads: list[dict[str, Any]]) -> list[tuple[slice, dict[str, Any] | OutageError]]:
        """Each part of the queries with its answer. Raises RetrieverError and ValueError of any at once."""

        def one(payload: dict[str, Any]) -> dict[str, Any] | OutageError:
            try:
                return self._request(verb, payload)
            except OutageError as outage:
                return outage

        if not payloads:
            return []
        with ThreadPoolExecutor(min(self.params.connections, len(payloads))) as pool:
            answers = list(pool.map(one, payloads))
        size = self.params.batch_size
        return [(slice(i * size, (i + 1) * size), answer) for i, answer in enumerate(answers)]

    def _request(self, verb: str, payload: dict[str, Any]) -> dict[str, Any]:
        import tenacity

        def attempt() -> dict[str, Any]:
            self._breaker.check()
            try:
                answer = _call(self._client, "POST", f"/{verb}", payload)
            except OutageError as error:
                self._breaker.record(False, str(error))
                raise
            self._breaker.record(True)
            return answer

        again = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(1 + self.params.retries),
            wait=tenacity.wait_random_exponential(multiplier=0.25, max=5),  # random: clients must not return in step
            retry=tenacity.retry_if_exception(
                lambda e: isinstance(e, OutageError) and not isinstance(e, CircuitOpenError)
            ),
            reraise=True,
        )
        return again(attempt)


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> Remote:
    """Shake hands with the server; ``folder`` is not used, the index is the server's.

    Raises RetrieverError where nothing answers, the token is refused, or the server has another catalogue.
    """
    settings = Params(**params)
    missing = [name for name in ("httpx", "tenacity") if importlib.util.find_spec(name) is None]
    if missing:
        raise RetrieverError(f"retriever.kind: remote needs its extra ({missing[0]} is missing): {INSTALL}")
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
    if not isinstance(health.get("fingerprint"), str):
        raise RetrieverError(f"{settings.url} is no `rec-r1 serve`: check retriever.params.url")
    if health.get("catalog") != catalog.fingerprint:
        raise RetrieverError(
            f"{settings.url} serves another catalogue ({health.get('documents')} documents, "
            f"{str(health.get('catalog'))[:16]}; this task's: {len(catalog)}, {catalog.fingerprint[:16]}): start "
            "`rec-r1 serve` with the recipe of this task"
        )
    # A server of an earlier version says nothing about these two, and had text retrievers only.
    about = bool(health.get("reads_text", True)), list(health.get("fitted_on", ()))
    return Remote(settings, health["fingerprint"], len(catalog), *about)


def _client(params: Params, fingerprint: str | None) -> Any:
    import httpx

    token = os.environ.get(TOKEN)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    headers |= {FINGERPRINT: fingerprint} if fingerprint else {}
    limits = httpx.Limits(max_connections=params.connections)
    # trust_env: a proxy meant for the web must not get between a trainer and its retriever
    return httpx.Client(base_url=params.url, timeout=params.timeout, headers=headers, limits=limits, trust_env=False)


def _call(client: Any, method: str, path: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request. Raises OutageError, RetrieverError (wrong token, other index, broken index) or ValueError."""
    import httpx

    where = f"{str(client.base_url).rstrip('/')}{path}"
    try:
        response = client.request(method, path, json=payload)
    except httpx.TransportError as error:
        raise OutageError(f"{where}: {type(error).__name__}: {error}") from error
    try:
        answer = response.json()
    except ValueError:
        answer = None
    reason = answer.get("error") if isinstance(answer, dict) else None
    code = response.status_code
    if code in (401, 403):
        raise RetrieverError(f"{where} refuses the token: set ${TOKEN} to what the server was started with")
    if code == 400 and reason:
        raise ValueError(reason)
    if code == 413:
        raise ValueError(f"{where}: the request is too large: lower retriever.params.batch_size")
    if code == 409 or (code == 500 and isinstance(answer, dict) and answer.get("fatal")):
        raise RetrieverError(f"{where}: {reason}")
    if code >= 500:
        raise OutageError(f"{where}: status {code}{f' ({reason})' if reason else ''}")
    if code != 200 or not isinstance(answer, dict):
        raise RetrieverError(f"{where} is no `rec-r1 serve` (status {code}): check retriever.params.url")
    return answer


def _wire(queries: Sequence[Query]) -> list[list[Any]]:
    """Queries as JSON: [text, history, weights] each. float() and int(): numpy's own have no JSON."""
    return [[q.text, [int(row) for row in q.history], [float(w) for w in q.weights]] for q in queries]


def _array(answer: dict[str, Any], key: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    try:
        array = np.array(answer[key], dtype).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise RetrieverError(
            f"the server's answer has no {key!r} of shape {shape}: install one version of rec-r1 on both sides"
        ) from error
    return array
