"""A retriever without the documents that the user chose before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retrievers.combine.capabilities import schema_of
from retrievers.core.index_folder import fingerprint_of
from retrievers.core.ranking import check_k, check_targets, no_hits
from retrievers.types import Hits, Query, Retriever, Traits

BATCH = 1024  # How many queries are asked at once.


class Unseen:
    """``retriever`` without the documents of ``Query.seen``, or of ``Query.history`` if that is None; see
    :class:`retrievers.types.Retriever`.

    retriever: the retriever that is asked.
    documents: the size of the catalogue.

    It is exact if the retriever is. `search` asks for as many more hits as may be left out. `ranks` subtracts from the
    rank of a target the number of documents above it that are left out.
    """

    def __init__(self, retriever: Retriever, documents: int) -> None:
        self.retriever = retriever
        self._documents = documents
        self.fingerprint = fingerprint_of({"kind": "unseen", "of": retriever.fingerprint})

    def __reduce__(self) -> tuple[Callable[..., Unseen], tuple[Any, ...]]:
        return Unseen, (self.retriever, self._documents)

    def __len__(self) -> int:
        return self._documents

    def retriever_traits(self) -> Traits:
        """It declares the retriever inside, and passes structured queries on."""
        return Traits(inner=(self.retriever,), structured=schema_of(self.retriever))

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol."""
        k = check_k(k, len(self))
        own = [_seen(query) for query in queries]
        hits = no_hits(len(queries), k)
        left_out = np.zeros(len(self) + 1, bool)
        left_out[-1] = True  # The entry of row -1, which stands for no hit.
        # Sorted by the length of what is left out, so that only the last batch asks for the most hits.
        order = sorted(range(len(queries)), key=lambda q: len(own[q]))
        for batch in (order[start : start + BATCH] for start in range(0, len(order), BATCH)):
            depth = min(k + len(own[batch[-1]]), len(self))
            found = self.retriever.search([queries[q] for q in batch], depth)
            for q, rows, scores in zip(batch, found.rows, found.scores, strict=True):
                left_out[own[q]] = True
                kept = (~left_out[rows]).nonzero()[0][:k]
                left_out[own[q]] = False
                hits.rows[q, : len(kept)] = rows[kept]
                hits.scores[q, : len(kept)] = scores[kept]
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol. A target that is left out is not retrieved."""
        targets = check_targets(queries, targets, len(self), structured=True)
        own = [_seen(query) for query in queries]
        more = np.full((len(queries), max(map(len, own), default=0)), -1, np.int64)
        for q, rows in enumerate(own):
            more[q, : len(rows)] = rows
        ranks = self.retriever.ranks(queries, np.concatenate([targets, more], axis=1))
        asked, left_out = ranks[:, : targets.shape[1]], ranks[:, targets.shape[1] :]
        above = ((left_out[:, None] > 0) & (left_out[:, None] < asked[..., None])).sum(axis=2)
        seen = (targets[..., None] == more[:, None]).any(axis=2) & (targets >= 0)
        # A -1 says that the retriever failed for this query, and stays as it is.
        return np.where(asked <= 0, asked, np.where(seen, 0, asked - above)).astype(np.int32)


def _seen(query: Query) -> list[int]:
    """The distinct rows that the ranking of ``query`` leaves out."""
    return list(dict.fromkeys(query.history if query.seen is None else query.seen))
