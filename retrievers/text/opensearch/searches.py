"""Searches on one snapshot of an index: many in one request, each with its own hits or its own failure.

The snapshot is a point in time of the engine. It is kept alive by the searches, closed when the process ends, and
opened again where the engine has lost it; if the index was changed in the meantime, the run ends.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import RLock
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from retrievers.core.requests import OutageError, retried
from retrievers.text.opensearch.cluster import Cluster, Refused, RefusedError, reason_of
from retrievers.types import RetrieverError

logger = logging.getLogger(__name__)
MAX_REQUEST_BYTES = (
    8 << 20
)  # A request has at most so many bytes, unless it holds a single search. Engines take 100 MB.
CLOSING_S = 5.0  # Closing a point in time may take so many seconds.
# Errors after which the point in time is opened again: it has expired, or a node that held it has gone.
_LOST = ("search_context_missing_exception", "no_shard_available_action_exception", "node_disconnected_exception")

# The points in time that this process may have open: id -> the cluster, and the process that opened it. They are closed
# at its end, and not where a retriever is garbage-collected, which may happen at any moment.
_open: dict[str, tuple[Cluster, int]] = {}


class Found(NamedTuple):
    """What one search found, in the engine's order.

    ids: the ids of the hits, as the engine holds them.
    scores: (hits,) float32.
    total: how many documents match; exact where `track_total_hits` was set, and -1 otherwise.
    """

    ids: list[str]
    scores: np.ndarray
    total: int


@dataclass(frozen=True)
class Index:
    """An index and what is needed to read it.

    name: the name, alias or pattern.
    id_field: the field that holds the ids of the documents. None = they are the `_id`.
    state: the state of the index, see :func:`state_of`. None = it is not compared.
    keep_alive: how long the engine keeps an unused point in time, such as 10m.
    batch_size: how many searches a request holds at most.
    """

    name: str
    id_field: str | None
    state: str | None
    keep_alive: str
    batch_size: int

    @property
    def path(self) -> str:
        """The name as a part of a URL."""
        return "/" + quote(self.name, safe=",*-")


class Searches:
    """Runs searches on a snapshot of an index. It may be shared between threads, and its pickle opens another one.

    cluster: where the index is.
    index: the index.
    """

    def __init__(self, cluster: Cluster, index: Index) -> None:
        self.cluster, self.index = cluster, index
        self._lock = RLock()
        self._pit: str | None = None
        self._process = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Searches, (self.cluster, self.index)

    def run(self, bodies: Sequence[Mapping[str, Any]]) -> list[Found | Refused | OutageError]:
        """The result of each search, in order: its hits, a refusal of this query, or an outage.

        bodies: the searches in the engine's language, without their point in time.

        Raises RetrieverError where the index is gone or was changed, and for wrong credentials.
        """
        batches = list(self._batches(bodies))
        if not batches:
            return []
        with ThreadPoolExecutor(min(self.cluster.address.connections, len(batches))) as pool:
            return [answer for answers in pool.map(self._batch, batches) for answer in answers]

    def _batches(self, bodies: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
        """The bodies in lists of at most ``batch_size``, and of at most MAX_REQUEST_BYTES where that is possible."""
        batch: list[Mapping[str, Any]] = []
        size = 0
        for body in bodies:
            length = len(json.dumps(body))
            if batch and (len(batch) == self.index.batch_size or size + length > MAX_REQUEST_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(body)
            size += length
        if batch:
            yield batch

    def _batch(self, bodies: list[Mapping[str, Any]]) -> list[Any]:
        answers: list[Any] = [None] * len(bodies)

        def attempt() -> None:
            failed = self._fill(answers, bodies)
            if failed is not None and failed.pause == 0:  # The point in time was lost: the new one is asked at once.
                failed = self._fill(answers, bodies)
            if failed is not None:
                raise failed

        try:
            retried(attempt, self.cluster.address.retries, self.cluster.address.breaker_seconds)
        except OutageError as outage:
            answers = [outage if answer is None else answer for answer in answers]
        return answers

    def _fill(self, answers: list[Any], bodies: list[Mapping[str, Any]]) -> OutageError | None:
        """Ask for each search that has no answer yet, and write what comes back into ``answers``.

        Returns an outage of one search that still has none, with a pause of 0 where the point in time was lost.
        """
        left = [i for i, answer in enumerate(answers) if answer is None]
        pit = self._point_in_time()
        pinned = {"pit": {"id": pit, "keep_alive": self.index.keep_alive}, "_source": False, "timeout": self._timeout}
        pinned |= {} if self.index.id_field is None else {"docvalue_fields": [self.index.id_field]}
        # An engine may answer with the hits of some shards only, unless it is told not to.
        lines = [line for i in left for line in ({"allow_partial_search_results": False}, {**bodies[i], **pinned})]
        try:
            answer = self.cluster.ask_once("POST", "/_msearch", lines)
        except RefusedError as error:
            if error.refused.status != 400:
                raise RetrieverError(f"{self._where} refuses a search: {error}: check retriever.params") from error
            if len(left) == 1:
                answers[left[0]] = error.refused
                return None
            return self._fill_one_by_one(answers, bodies, left)  # The engine refuses all because of one.
        responses = answer.get("responses")
        if not isinstance(responses, list) or len(responses) != len(left):
            raise OutageError(f"{self._where}: an answer without the results of {len(left)} searches")
        failed = None
        for i, response in zip(left, responses, strict=True):
            try:
                answers[i] = self._read(response)
            except OutageError as outage:
                failed = outage if failed is None or outage.pause == 0 else failed
        if failed is not None and failed.pause == 0:
            self._forget(pit)
        else:
            self._renew(pit, responses)
        return failed

    def _fill_one_by_one(
        self, answers: list[Any], bodies: list[Mapping[str, Any]], left: list[int]
    ) -> OutageError | None:
        """Like :meth:`_fill`, with a request for each search."""
        failed = None
        for i in left:
            alone: list[Any] = [None]
            failed = self._fill(alone, [bodies[i]]) or failed
            answers[i] = alone[0]
        return failed

    def _read(self, response: Any) -> Found | Refused:
        """The hits in the answer to one search.

        Raises OutageError where it failed or is not complete, and RetrieverError where the index is gone.
        """
        if not isinstance(response, dict):
            raise OutageError(f"{self._where}: a result that is no object")
        if "error" in response:
            status, reason = response.get("status"), reason_of(response)
            if any(kind in reason for kind in _LOST):
                raise OutageError(f"{self._where}: {reason}", 0.0)
            if status == 404:
                raise RetrieverError(f"{self._where}: {reason}: the index was deleted: start the run again")
            if status in (401, 403):
                raise RetrieverError(f"{self._where}: {reason}: this user may not search the index")
            refused = Refused(status if isinstance(status, int) else 500, reason)
            if refused.too_many_clauses or refused.status in (400, 422):
                return refused
            raise OutageError(f"{self._where}: status {status} ({reason})")
        return self._hits(response)

    def _hits(self, response: dict[str, Any]) -> Found:
        shards, hits = response.get("_shards"), response.get("hits")
        if response.get("timed_out") is not False or not isinstance(shards, dict) or shards.get("failed") != 0:
            raise OutageError(f"{self._where}: a result without the hits of some shards")
        try:
            listed = hits["hits"]  # type: ignore[index]
            field = self.index.id_field
            ids = [str(hit["_id"] if field is None else hit["fields"][field][0]) for hit in listed]
            scores = [hit["_score"] for hit in listed]
            total = hits.get("total")  # type: ignore[union-attr]
            if total is not None and total["relation"] != "eq":
                raise ValueError("a total that is no exact number")
            count = -1 if total is None else total["value"]
            if type(count) is not int or not all(type(one) in (int, float) and math.isfinite(one) for one in scores):
                raise ValueError("scores that are not finite")
            if len(set(ids)) < len(ids):
                raise ValueError("a document twice")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise OutageError(f"{self._where}: a result that cannot be read ({error})") from error
        return Found(ids, np.array(scores, np.float32), count)

    @property
    def _where(self) -> str:
        return f"{self.cluster.address.url}/{self.index.name}"

    @property
    def _timeout(self) -> str:
        """How long a search may take. The engine stops it then, which the client could not."""
        return f"{math.ceil(self.cluster.address.timeout * 1000)}ms"

    def _point_in_time(self) -> str:
        """The id of the point in time, which is opened where this process has none.

        Raises RetrieverError where there is no such index, where it may not be opened, and where it was changed.
        """
        with self._lock:
            if self._pit is None or self._process != os.getpid():  # A forked process must not close that of its parent.
                pit = self._opened()
                _close_all_at_exit()
                _open[pit] = self.cluster, os.getpid()
                if self.index.state is not None and state_of(self.cluster, self.index) != self.index.state:
                    _close(pit)
                    raise RetrieverError(
                        f"{self._where} was changed while it was in use, and a retriever must not change: stop writing "
                        "to it, and start the run again"
                    )
                self._pit, self._process = pit, os.getpid()
            return self._pit

    def _opened(self) -> str:
        path, key = f"{self.index.path}/_pit", "id"
        more: dict[str, Any] = {}
        if self.cluster.product.name == "opensearch":
            path, key = f"{self.index.path}/_search/point_in_time", "pit_id"
            more = {"allow_partial_pit_creation": "false"}
        try:
            answer = self.cluster.ask_once("POST", path, keep_alive=self.index.keep_alive, **more)
        except RefusedError as error:
            raise RetrieverError(
                f"{self._where}: no point in time can be opened ({error}): check retriever.params.index and "
                "keep_alive; OpenSearch has points in time from 2.4 on"
            ) from error
        if not isinstance(answer.get(key), str):
            raise OutageError(f"{self._where}: an answer without a point in time")
        return str(answer[key])

    def _renew(self, pit: str, responses: list[Any]) -> None:
        """Use the id that the engine gives the point in time from now on; it seldom changes."""
        newer = next((one["pit_id"] for one in responses if isinstance(one, dict) and "pit_id" in one), pit)
        with self._lock:
            if self._pit == pit != newer and isinstance(newer, str):
                _open[newer] = _open.pop(pit)
                self._pit = newer

    def _forget(self, pit: str) -> None:
        """Open another point in time for the next search, unless another thread has done so."""
        with self._lock:
            if self._pit == pit:
                logger.info("%s: the point in time %s… was lost and is opened again", self._where, pit[:8])
                _open.pop(pit, None)
                self._pit = None

    def close(self) -> None:
        """Close the point in time. The next search opens another one. It is also closed when the process ends."""
        with self._lock:
            if self._pit is not None:
                _close(self._pit)
            self._pit = None


def _close(pit: str) -> bool:
    """Close a point in time that this process opened, and return whether its cluster answers.

    A failure is no error, because the engine closes it when it has expired.
    """
    cluster, process = _open.pop(pit, (None, 0))
    if cluster is None or process != os.getpid():
        return True
    try:
        if cluster.product.name == "opensearch":
            cluster.ask_once("DELETE", "/_search/point_in_time", {"pit_id": [pit]}, CLOSING_S)
        else:
            cluster.ask_once("DELETE", "/_pit", {"id": pit}, CLOSING_S)
    except OutageError:
        return False
    except (RefusedError, RetrieverError):
        pass
    return True


@cache
def _close_all_at_exit() -> None:
    """Let :func:`_close_all` run at the end of the process.

    It is registered when a client exists already, because what is registered later runs earlier. urllib3 empties its
    pools at the end of the process, too, and a request to an empty pool would wait for a connection for ever.
    """
    atexit.register(_close_all)


def _close_all() -> None:
    """Close what is open at the end of the process. A cluster that does not answer is asked once."""
    silent: set[str] = set()
    for pit, (cluster, _) in list(_open.items()):
        if cluster.address.url not in silent and not _close(pit):
            silent.add(cluster.address.url)


def state_of(cluster: Cluster, index: Index) -> str:
    """The state of an index as text: of each index behind the name its uuid, and of each shard its last operation.

    Every document that is added, replaced or deleted changes it. Raises OutageError, and RetrieverError where the
    engine does not tell it.
    """
    try:
        answer = cluster.ask("GET", f"{index.path}/_stats/docs", level="shards")
        found = {}
        for one in answer["indices"].values():
            primaries = {
                number: copy.get("seq_no", {}).get("max_seq_no")
                for number, copies in one["shards"].items()
                for copy in copies
                if copy["routing"]["primary"]
            }
            found[one["uuid"]] = [one["primaries"]["docs"]["count"], primaries]
        if not found:
            raise KeyError("no index has this name")
    except (RefusedError, KeyError, TypeError, AttributeError) as error:
        raise RetrieverError(
            f"{cluster.address.url}/{index.name}: its state cannot be read ({type(error).__name__}: {error}): check "
            "retriever.params.index, or name the state yourself in retriever.params.snapshot"
        ) from error
    return json.dumps(found, sort_keys=True)
