"""A cache of results around any retriever: in memory, and on disk for several processes and runs.

The key is the retriever's fingerprint, the query, and the targets or k: a changed index never finds an old answer.
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

from retrievers.core.disk import open_disk
from retrievers.core.ranking import check_k, check_targets, no_hits
from retrievers.types import Hits, Query, Retriever, RetrieverError, Traits

logger = logging.getLogger(__name__)
ENTRY_OVERHEAD = 250  # bytes that a key and its places in the dictionaries take, about
INSTALL = "pip install 'rec-r1[cache]'"


class Cache:
    """``retriever`` with a memory; see :class:`retrievers.types.Retriever` for the contract.

    documents: n of the catalogue. memory_mb: how much is kept in memory (the least recently used go first). folder: a
    diskcache folder that several processes may share, or None; disk_mb: its size limit.

    Answers that say "failed" are not kept. A disk that fails is reported once and then done without: a cache is no
    reason to lose a run. Picklable (memory starts empty in the child) and safe between threads.
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
        self.fingerprint = retriever.fingerprint  # a cache changes no answer
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
        """(queries asked, of them found here) since the last call of this."""
        with self._lock:
            counts = (self._asked, self._found)
            self._asked = self._found = 0
        return counts

    def retriever_traits(self) -> Traits:
        """Those of the retriever inside."""
        return Traits(inner=(self.retriever,))

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
        targets = np.ascontiguousarray(check_targets(queries, targets, len(self)), np.int32)
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
        # repr of a Query is one-to-one: a text's quotation marks are escaped
        seen = None if query.seen is None else tuple(query.seen)
        text = repr((self.fingerprint, query.text, tuple(query.history), tuple(query.weights), seen))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass") + b"\0" + wanted).digest()

    def _look_up(self, keys: Sequence[bytes], size: int) -> tuple[dict[int, bytes], list[int]]:
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
        """What is kept for ``key``: ``size`` bytes, or nothing."""
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
            with self._disk.transact(retry=True):  # one commit for all of them
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
    except (OSError, sqlite3.Error, LookupError, TypeError, ValueError) as error:  # the last three: damaged settings
        raise RetrieverError(
            f"retriever.cache.disk: {folder} does not open ({error}): delete the folder or name another one"
        ) from error
