"""A cache of any retriever's results: in memory, and on disk for several processes and runs.

The key holds the retriever's fingerprint, the query, and the targets or k. So the results of another index are never
found.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from retrievers.combine.capabilities import schema_of
from retrievers.core.disk import open_disk
from retrievers.core.ranking import check_k, check_targets, no_hits
from retrievers.types import Hits, Query, Retriever, RetrieverError, Traits

logger = logging.getLogger(__name__)
ENTRY_OVERHEAD = 250  # The approximate number of bytes that a key and its dictionary entries take.
INSTALL = "pip install 'rec-r1[cache]'"


class Cache:
    """``retriever`` with a cache; see :class:`retrievers.types.Retriever` for the contract.

    retriever: answers the queries that are not in the cache.
    documents: the size of the catalogue.
    memory_mb: the size limit in memory, in MB. The least recently used results are removed first.
    folder: a diskcache folder that several processes may share. None = no results on disk.
    disk_mb: the size limit of that folder, in MB.

    Ranks of -1, which stand for a failure, are not kept. If the disk fails, one warning says so, and the run goes on
    without it. The cache can be pickled, and its memory is then empty in the child process. Several threads may use it.

    Raises RetrieverError if the folder cannot be opened or diskcache is not installed.
    """

    def __init__(
        self,
        retriever: Retriever,
        documents: int,
        memory_mb: int = 64,
        folder: str | Path | None = None,
        disk_mb: int = 1024,
    ) -> None:
        from cachetools import LRUCache

        if folder is not None and importlib.util.find_spec("diskcache") is None:
            raise RetrieverError(f"retriever.cache.disk needs its extra (diskcache is missing): {INSTALL}")
        self.retriever = retriever
        self.fingerprint = retriever.fingerprint  # A cache changes no result.
        self._arguments = (retriever, documents, memory_mb, folder, disk_mb)
        self._documents = documents
        self._memory: Any = LRUCache(memory_mb << 20, getsizeof=lambda value: len(value) + ENTRY_OVERHEAD)
        self._lock = Lock()
        self._disk = _open_disk(Path(folder), disk_mb) if folder is not None else None
        self._asked = self._found = 0

    def __reduce__(self) -> tuple[Callable[..., Cache], tuple[Any, ...]]:
        return Cache, self._arguments

    def __len__(self) -> int:
        return self._documents

    def counts(self) -> tuple[int, int]:
        """How many queries were asked since the last call, and how many of them were found in the cache."""
        with self._lock:
            counts = (self._asked, self._found)
            self._asked = self._found = 0
        return counts

    def retriever_traits(self) -> Traits:
        """It declares the retriever inside, and passes structured queries on."""
        return Traits(inner=(self.retriever,), structured=schema_of(self.retriever))

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol."""
        k = check_k(k, len(self))
        hits = no_hits(len(queries), k)
        keys = [self._key(query, b"k%d" % k) for query in queries]
        known, missing = self._look_up(keys, 8 * k)
        for q, value in known.items():
            hits.rows[q] = np.frombuffer(value, np.int32, k)
            hits.scores[q] = np.frombuffer(value, np.float32, k, offset=4 * k)
        if missing:
            fresh = self.retriever.search([queries[q] for q in missing], k)
            hits.rows[missing], hits.scores[missing] = fresh
            self._store({keys[q]: hits.rows[q].tobytes() + hits.scores[q].tobytes() for q in missing})
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol."""
        targets = np.ascontiguousarray(check_targets(queries, targets, len(self), structured=True), np.int32)
        ranks = np.zeros(targets.shape, np.int32)
        keys = [self._key(query, b"t" + row.tobytes()) for query, row in zip(queries, targets, strict=True)]
        known, missing = self._look_up(keys, 4 * targets.shape[1])
        for q, value in known.items():
            ranks[q] = np.frombuffer(value, np.int32)
        if missing:
            ranks[missing] = self.retriever.ranks([queries[q] for q in missing], targets[missing])
            self._store({keys[q]: ranks[q].tobytes() for q in missing if (ranks[q] >= 0).all()})
        return ranks

    def _key(self, query: Query, wanted: bytes) -> bytes:
        # Different queries have different reprs, because quotation marks in a text are escaped.
        seen = None if query.seen is None else tuple(query.seen)
        parts = (self.fingerprint, query.text, tuple(query.history), tuple(query.weights), seen)
        text = repr(parts if query.structured is None else (*parts, query.structured))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass") + b"\0" + wanted).digest()

    def _look_up(self, keys: Sequence[bytes], size: int) -> tuple[dict[int, bytes], list[int]]:
        """The cached values of ``keys``, by place, and the places without one. size: of a value, in bytes."""
        known: dict[int, bytes] = {}
        with self._lock:
            for q, key in enumerate(keys):
                if (value := self._memory.get(key)) is not None:
                    known[q] = value
        if self._disk is not None:
            found = {q: value for q, key in enumerate(keys) if q not in known and (value := self._from_disk(key, size))}
            known |= found
            self._remember({keys[q]: value for q, value in found.items()})
        with self._lock:
            self._asked += len(keys)
            self._found += len(known)
        return known, [q for q in range(len(keys)) if q not in known]

    def _remember(self, values: dict[bytes, bytes]) -> None:
        with self._lock:
            for key, value in values.items():
                if len(value) + ENTRY_OVERHEAD <= self._memory.maxsize:
                    self._memory[key] = value

    def _from_disk(self, key: bytes, size: int) -> bytes | None:
        """The value of ``key`` on disk; None if there is none, or one of another size than ``size`` bytes."""
        try:
            value = self._disk.get(key) if self._disk is not None else None
        except Exception as error:
            self._give_up(error)
            return None
        return value if isinstance(value, bytes) and len(value) == size else None

    def _store(self, values: dict[bytes, bytes]) -> None:
        self._remember(values)
        if self._disk is None:
            return
        try:
            with self._disk.transact(retry=True):  # One commit for all of them.
                for key, value in values.items():
                    self._disk.set(key, value)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("the result cache on disk fails (%s: %s): going on without it", type(error).__name__, error)
        self._disk = None


def _open_disk(folder: Path, megabytes: int) -> Any:
    import sqlite3

    try:
        return open_disk(folder, size_limit=megabytes << 20)
    except (OSError, sqlite3.Error, LookupError, TypeError, ValueError) as error:  # The last three: damaged settings.
        raise RetrieverError(
            f"retriever.cache.disk: {folder} does not open ({error}): delete the folder or name another one"
        ) from error
