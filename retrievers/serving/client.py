"""A retriever behind HTTP: one index, or one GPU, for many training processes. The other side is `rec-r1 serve`.

What fails is tried again a few times, with random pauses; after several failures in a row a circuit breaker answers
at once, so that an outage costs a run seconds, not timeouts. A query that stays without an answer gets ranks of -1.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.ranking import check_k, check_targets, no_hits
from retrievers.types import Hits, Query, RetrieverError, Traits

logger = logging.getLogger(__name__)
INSTALL = "pip install 'rec-r1[remote]'"
TOKEN_VARIABLE = "REC_R1_TOKEN"  # the environment variable: a recipe is no place for a secret
MAX_SCORE = float(np.finfo(np.float32).max)  # a score; comparisons with NaN are false, so NaN is refused too
FINGERPRINT_HEADER = "x-rec-r1-fingerprint"  # the header that says which index the client means


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
        if not isinstance(self.url, str) or not self.url.startswith(("http://", "https://")):
            raise ValueError(f"retriever.params.url must start with http:// or https://, got {self.url!r}")
        if not _is_plain(self.url):  # not repeated: it may hold a secret
            raise ValueError(
                "retriever.params.url must be http(s)://HOST:PORT without user, password and ?query: set the token in "
                f"${TOKEN_VARIABLE}"
            )
        for name, least in (("batch_size", 1), ("connections", 1), ("retries", 0), ("breaker_failures", 1)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"retriever.params.{name} must be an integer >= {least}, got {getattr(self, name)!r}")
        for name in ("timeout", "breaker_seconds"):
            if type(getattr(self, name)) not in (int, float) or not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"retriever.params.{name} must be a number of seconds above 0, got {getattr(self, name)!r}"
                )


class OutageError(ConnectionError):
    """The server did not answer, or not with an answer that can be one. Worth another attempt, ``pause`` seconds from
    now where the server says so."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class CircuitOpenError(OutageError):
    """Nothing was sent: too many failures lately. Not worth another attempt now."""


class _Request(NamedTuple):
    """One request, and what makes arrays of its answer. read: raises OutageError."""

    payload: dict[str, Any]
    read: Callable[[dict[str, Any]], Any]


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
    reads_text, fitted_on: of the retriever there, see :class:`retrievers.types.Traits`."""

    def __init__(
        self, params: Params, fingerprint: str, documents: int, reads_text: bool, fitted_on: Sequence[str]
    ) -> None:
        self.params = params
        self.fingerprint = fingerprint
        self._reads_text, self._fitted_on = reads_text, tuple(fitted_on)
        self._documents = documents

    def __reduce__(self) -> tuple[Callable[..., Remote], tuple[Any, ...]]:
        return Remote, (self.params, self.fingerprint, self._documents, self._reads_text, self._fitted_on)

    def __len__(self) -> int:
        return self._documents

    def retriever_traits(self) -> Traits:
        """What the server said of its retriever."""
        return Traits(reads_text=self._reads_text, fitted_on=self._fitted_on)

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
        requests = [
            _Request({"queries": _wire(part), "k": k}, partial(read_hits, queries=len(part), k=k, documents=len(self)))
            for part in self._parts(queries)
        ]
        for span, answer in self._ask("search", requests):
            if isinstance(answer, OutageError):
                raise answer
            hits.rows[span], hits.scores[span] = answer
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol; -1 for the queries of a request that stays without an answer. Raises ConnectionError
        where all do."""
        targets = check_targets(queries, targets, len(self))
        ranks = np.full(targets.shape, -1, np.int32)
        size = self.params.batch_size
        requests = []
        for i, part in enumerate(self._parts(queries)):
            asked = targets[i * size : (i + 1) * size]
            payload = {"queries": _wire(part), "targets": asked.tolist()}
            requests.append(_Request(payload, partial(read_ranks, targets=asked, documents=len(self))))
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

    def _parts(self, queries: Sequence[Query]) -> list[Sequence[Query]]:
        size = self.params.batch_size
        return [queries[start : start + size] for start in range(0, len(queries), size)]

    def _ask(self, verb: str, requests: list[_Request]) -> list[tuple[slice, Any]]:
        """Each part of the queries with what was read from its answer, or an OutageError. Raises RetrieverError of any
        at once."""

        def one(request: _Request) -> Any:
            try:
                return self._request(verb, request)
            except OutageError as outage:
                return outage

        if not requests:
            return []
        with ThreadPoolExecutor(min(self.params.connections, len(requests))) as pool:
            answers = list(pool.map(one, requests))
        size = self.params.batch_size
        return [(slice(i * size, (i + 1) * size), answer) for i, answer in enumerate(answers)]

    def _request(self, verb: str, request: _Request) -> Any:
        import tenacity

        backoff = tenacity.wait_random_exponential(multiplier=0.25, max=5)  # random: clients must not return in step

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            pause = error.pause if isinstance(error, OutageError) else None
            return backoff(state) + min(pause or 0.0, self.params.breaker_seconds)

        def attempt() -> Any:
            self._breaker.check()
            try:
                answer = request.read(_call(self._client, "POST", f"/{verb}", request.payload))
            except OutageError as error:
                self._breaker.record(False, str(error))
                raise
            self._breaker.record(True)
            return answer

        again = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(1 + self.params.retries),
            wait=wait,
            retry=tenacity.retry_if_exception(
                lambda e: isinstance(e, OutageError) and not isinstance(e, CircuitOpenError)
            ),
            reraise=True,
        )
        return again(attempt)


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> Remote:
    """Ask the server for its index and catalogue, and connect; ``folder`` is not used, the index is the server's.

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
    # A server of an earlier version says nothing about these two, and had text retrievers only.
    reads, fitted = health.get("reads_text", True), health.get("fitted_on", [])
    told = isinstance(health.get("fingerprint"), str) and type(reads) is bool
    if not (told and isinstance(fitted, list) and all(isinstance(each, str) for each in fitted)):
        raise RetrieverError(f"{settings.url} is no `rec-r1 serve`: check retriever.params.url")
    if health.get("catalog") != catalog.fingerprint:
        raise RetrieverError(
            f"{settings.url} serves another catalogue ({_plain(health.get('documents'), 16)} documents, "
            f"{_plain(health.get('catalog'), 16)}; this task's: {len(catalog)}, {catalog.fingerprint[:16]}): start "
            "`rec-r1 serve` with the recipe of this task"
        )
    return Remote(settings, health["fingerprint"], len(catalog), reads, fitted)


def _client(params: Params, fingerprint: str | None) -> Any:
    import httpx

    token = os.environ.get(TOKEN_VARIABLE)
    if token and re.search(r"[^!-~]", token):  # httpx would refuse it, and show it
        raise RetrieverError(
            f"${TOKEN_VARIABLE} has a character that a token cannot have, such as a space: set it again"
        )
    headers = {"authorization": f"Bearer {token}"} if token else {}
    headers |= {FINGERPRINT_HEADER: fingerprint} if fingerprint else {}
    limits = httpx.Limits(max_connections=params.connections)
    # trust_env: a proxy meant for the web must not get between a trainer and its retriever
    return httpx.Client(base_url=params.url, timeout=params.timeout, headers=headers, limits=limits, trust_env=False)


def _call(client: Any, method: str, path: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request. Raises RetrieverError where `rec-r1 serve` itself refuses: wrong token, other index, broken index,
    a request that it does not understand. Whatever else is no answer is an OutageError: gateways redirect, limit and
    lose a server for a while."""
    import httpx

    where = f"{str(client.base_url).rstrip('/')}{path}"
    try:
        response = client.request(method, path, json=payload)
    except httpx.RequestError as error:
        raise OutageError(f"{where}: {type(error).__name__}: {error}") from error
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        answer = None
    said = answer.get("error") if isinstance(answer, dict) else None
    reason = _plain(said, 300) if isinstance(said, str) else ""
    code = response.status_code
    if code in (401, 403):
        raise RetrieverError(f"{where} refuses the token: set ${TOKEN_VARIABLE} to what the server was started with")
    if code == 400 and reason:  # arguments were checked on this side
        raise RetrieverError(f"{where}: {reason}: install one version of rec-r1 on both sides")
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


def _plain(said: Any, most: int) -> str:
    """What a server said, as one line of at most ``most`` characters that can be shown: it may send anything."""
    return "".join(filter(str.isprintable, " ".join(str(said).split())))[:most]


def retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None where it says nothing."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _is_plain(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname and parts.port != 0) and not {"@", "?", "#"} & set(url)
    except ValueError:
        return False


def _wire(queries: Sequence[Query]) -> list[list[Any]]:
    """Queries as JSON: [text, history, weights] each. float() and int(): numpy's own have no JSON."""
    return [[q.text, [int(row) for row in q.history], [float(w) for w in q.weights]] for q in queries]


def read_ranks(answer: dict[str, Any], targets: np.ndarray, documents: int) -> np.ndarray:
    """(Q, T) int32 of an answer to /ranks. Raises OutageError for anything but integers that can be ranks of these
    targets: from 0 to ``documents``, one for each document; -1 in a whole row is a query that the server failed at."""
    rows = _table(answer, "ranks", targets.shape, (int,))
    for wanted, ranks in zip(targets.tolist(), rows, strict=True):
        if ranks and all(rank == -1 for rank in ranks):
            continue
        at: dict[int, int] = {}
        of: dict[int, int] = {}
        for row, rank in zip(wanted, ranks, strict=True):
            if not 0 <= rank <= (documents if row >= 0 else 0):
                raise _odd("ranks", f"a rank of {rank} among {documents} documents")
            if of.setdefault(row, rank) != rank or (rank and at.setdefault(rank, row) != row):
                raise _odd("ranks", f"two documents at rank {rank}, or one at two ranks")
    return np.array(rows, np.int32).reshape(targets.shape)


def read_hits(answer: dict[str, Any], queries: int, k: int, documents: int) -> Hits:
    """(Q, k) of an answer to /search. Raises OutageError for anything but distinct rows of the catalogue with finite
    scores in descending order, and -1 behind them."""
    rows = _table(answer, "rows", (queries, k), (int,))
    scores = _table(answer, "scores", (queries, k), (int, float))
    numbers = np.full((queries, k), -np.inf, np.float32)  # also beside a row of -1: JSON has no infinity
    for q, (hits, values) in enumerate(zip(rows, scores, strict=True)):
        found = [row for row in hits if row != -1]
        if hits[: len(found)] != found or not all(0 <= row < documents for row in found):
            raise _odd("rows", f"rows that are not of a catalogue of {documents} documents, or -1 before one")
        if len(set(found)) < len(found):
            raise _odd("rows", "a document twice")
        kept = values[: len(found)]
        if not all(-MAX_SCORE <= value <= MAX_SCORE for value in kept) or any(a < b for a, b in pairwise(kept)):
            raise _odd("scores", "scores that are not finite, or not in descending order")
        numbers[q, : len(kept)] = kept
    return Hits(np.array(rows, np.int32).reshape(queries, k), numbers)


def _table(answer: dict[str, Any], key: str, shape: tuple[int, ...], kinds: tuple[type, ...]) -> list[list[Any]]:
    """The rows of an answer, as JSON has them. Raises OutageError for another shape or type: nothing is converted."""
    rows = answer.get(key)
    well = isinstance(rows, list) and len(rows) == shape[0]
    well = well and all(isinstance(row, list) and len(row) == shape[1] for row in rows or ())
    if not well or not all(type(value) in kinds for row in rows or () for value in row):
        raise _odd(key, f"no {shape[0]} x {shape[1]} table of {' or '.join(kind.__name__ for kind in kinds)}")
    return rows or []


def _odd(key: str, what: str) -> OutageError:
    return OutageError(f"the server's {key!r} hold {what}: install one version of rec-r1 on both sides")
