"""Requests to a cluster, through the official client of its product, which is found out when it is first asked.

opensearch-py speaks to OpenSearch, and elasticsearch-py 8 to Elasticsearch 8 and 9. Both clients keep the connections,
verify certificates and send the credentials. This module decides what a failure is: an outage, which may pass, a
mistake of the user, or a refusal of this one request.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

from retrievers.core.requests import Breaker, OutageError, PerProcess, one_line, retried, retry_after
from retrievers.text.opensearch.clients import Send, elasticsearch_client, opensearch_client
from retrievers.text.opensearch.params import API_KEY, PASSWORD, USER, Address
from retrievers.types import RetrieverError

LOWEST = {"elasticsearch": 8, "opensearch": 2}  # The lowest major version of each product that is accepted.
BUILDING_S = 600.0  # A request that changes an index may take so many seconds, or `timeout` if that is more.
JSON, JSON_LINES = "application/json", "application/x-ndjson"
Body: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
Answer: TypeAlias = dict[str, Any]
Seconds: TypeAlias = float | None


class Refused(NamedTuple):
    """A request, or one of several searches in a request, that the cluster does not accept.

    status: the HTTP status, from 400.
    reason: what the cluster says, on one line.
    """

    status: int
    reason: str

    @property
    def too_many_clauses(self) -> bool:
        """Whether the query has more terms than the cluster allows (indices.query.bool.max_clause_count)."""
        return bool(re.search(r"too_many_(nested_)?clauses|maxClauseCount|too many clauses", self.reason))


class RefusedError(Exception):
    """The cluster does not accept a request. refused: what it says."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.refused = refused


class Cluster:
    """A cluster. It may be shared between threads, and its pickle connects again.

    address: how it is asked.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._lock = Lock()
        self._next_request = 0.0
        self._breaker = Breaker(address.breaker_failures, address.breaker_seconds)
        self._clients = PerProcess(self._client)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cluster, (self.address,)

    @cached_property
    def product(self) -> Product:
        """Which product it is.

        Raises OutageError where nothing answers, and RetrieverError where it is neither product, or too old.
        """
        return _product(self.address, *self._send_by(opensearch_client(self.address), "GET", "/", None, {}))

    def _client(self) -> Send:
        """The official client of the product, as a function."""
        if self.product.name == "elasticsearch":
            return elasticsearch_client(self.address)
        return opensearch_client(self.address)

    def ask(self, method: str, path: str, body: Body = None, longest: Seconds = None, **params: str) -> Answer:
        """Send a request, and send it again after an outage. Returns the JSON object of the answer.

        method, path, params: such as GET, /_stats and level="shards".
        body: a JSON object, or several, which are sent as one line each.
        longest: how many seconds it may take. None, the default, = `timeout`.

        Raises OutageError for no answer, RefusedError for a request that the cluster does not accept, and
        RetrieverError for wrong credentials.
        """
        return dict(
            retried(
                lambda: self.ask_once(method, path, body, longest, **params),
                self.address.retries,
                self.address.breaker_seconds,
            )
        )

    def ask_once(
        self, method: str, path: str, body: Body = None, longest: float | None = None, **params: str
    ) -> Answer:
        """Like :meth:`ask`, without another attempt."""
        self._breaker.check()
        try:
            self.product  # noqa: B018  It is found out within the breaker, too.
            self._wait_for_turn()
            answer = self._read(path, *self._send_by(self._clients.get(), method, path, body, params, longest))
        except OutageError as error:
            self._breaker.record(False, str(error))
            raise
        except RefusedError:  # The cluster answers.
            self._breaker.record(True)
            raise
        self._breaker.record(True)
        return answer

    def change(self, method: str, path: str, body: Any = None, **params: str) -> dict[str, Any]:
        """Like :meth:`ask`, for a request that changes or reads a whole index: it may take longer, and a refusal is a
        RetrieverError."""
        try:
            return self.ask(method, path, body, max(BUILDING_S, self.address.timeout), **params)
        except RefusedError as error:
            raise RetrieverError(
                f"{self.address.url}{path}: {error}: check the cluster and your permissions"
            ) from error

    def _wait_for_turn(self) -> None:
        """Sleep until the rate limit lets the next request through."""
        if self.address.requests_per_second is None:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next_request)
            self._next_request = turn + 1 / self.address.requests_per_second
        time.sleep(turn - now)

    def _send_by(
        self,
        send: Send,
        method: str,
        path: str,
        body: Any,
        params: Mapping[str, str],
        longest: float | None = None,
    ) -> tuple[int, Mapping[str, str], Any]:
        """The status, the headers in lower case, and the JSON value of the answer; None for an answer without JSON.

        Raises OutageError where the client cannot send the request or read the answer.
        """
        kind, data = JSON, None
        if body is not None:
            # ASCII without line ends: no text of a query can begin another line.
            lines = [json.dumps(each) for each in (body if isinstance(body, list) else [body])]
            kind = JSON_LINES if isinstance(body, list) else JSON
            data = "".join(f"{line}\n" for line in lines).encode("ascii") if kind == JSON_LINES else lines[0].encode()
        headers = {"accept": JSON, **({"content-type": kind} if data is not None else {})}
        try:
            return send(method, path, dict(params), data, headers, longest or self.address.timeout)
        except (RetrieverError, OutageError):
            raise
        except Exception as error:  # Both clients have a tree of exceptions of their own.
            reason = f"{type(error).__name__}: {one_line(error, 300)}"
            raise OutageError(f"{self.address.url}{path}: {reason}") from error

    def _read(self, path: str, status: int, headers: Mapping[str, str], answer: Any) -> dict[str, Any]:
        """The JSON object of an answer. Raises what :meth:`ask` raises."""
        where = f"{self.address.url}{path}"
        if 200 <= status < 300 and isinstance(answer, dict):
            return answer
        if status in (401, 403):
            raise _not_allowed(where, status, answer)
        if status == 413:
            raise RetrieverError(f"{where}: the request is too large: lower retriever.params.batch_size")
        # A gateway in front of the cluster has other answers, which count as outages.
        if 400 <= status < 500 and status not in (408, 429) and isinstance(answer, dict) and "error" in answer:
            raise RefusedError(Refused(status, reason_of(answer)))
        reason = reason_of(answer) or "no answer of a search engine"
        raise OutageError(f"{where}: status {status} ({reason})", retry_after(headers.get("retry-after", "")))


def _not_allowed(where: str, status: int, answer: Any) -> RetrieverError:
    """The error for a request that the user may not send. The cluster says which permission is missing."""
    return RetrieverError(
        f"{where}: status {status}, {reason_of(answer) or 'no reason given'}: check ${USER} and ${PASSWORD}, or "
        f"${API_KEY}, and what this user may do"
    )


class Product(NamedTuple):
    """The product behind an address.

    name: elasticsearch or opensearch.
    version: such as 8.19.3.
    lucene: the version of Lucene in it, which may change scores.
    """

    name: str
    version: str
    lucene: str


def reason_of(answer: Any) -> str:
    """What an answer with an error says, on one line: the types and the reasons at all depths, without the query."""
    found: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            said = [str(node[key]) for key in ("type", "reason") if isinstance(node.get(key), str)]
            found.extend(text for text in [": ".join(said)] if text and text not in found)
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, str):
        return one_line(error, 300)
    walk(error)
    return one_line("; ".join(found), 600)


def _product(address: Address, status: int, headers: Mapping[str, str], answer: Any) -> Product:
    """The product, from the answer to GET /."""
    if status in (401, 403):
        raise _not_allowed(address.url, status, answer)
    if status != 200:
        reason = f"{address.url}: status {status} ({reason_of(answer) or 'no answer of a search engine'})"
        raise OutageError(reason, retry_after(headers.get("retry-after", "")))
    said = answer if isinstance(answer, dict) else {}
    version = said["version"] if isinstance(said.get("version"), dict) else {}
    name = None
    if headers.get("x-elastic-product") == "Elasticsearch":
        name = "elasticsearch"
    # In its compatibility mode, OpenSearch reports the version 7.10.2 and no distribution.
    elif version.get("distribution") == "opensearch" or "OpenSearch" in str(said.get("tagline")):
        name = "opensearch"
    number = one_line(version.get("number"), 20)
    major = re.match(r"\d+", number)
    if name is None or major is None:
        raise RetrieverError(f"{address.url} is neither Elasticsearch nor OpenSearch: check retriever.params.url")
    if int(major[0]) < LOWEST[name]:
        raise RetrieverError(
            f"{address.url} is {name} {number}: upgrade it to {LOWEST['elasticsearch']} (Elasticsearch) or "
            f"{LOWEST['opensearch']} (OpenSearch), because older versions have no points in time"
        )
    return Product(name, number, one_line(version.get("lucene_version"), 20))
