"""Around any retriever: what the user already has is left out, as a shop would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retrievers.core.index_folder import fingerprint_of
from retrievers.core.ranking import check_k, check_targets, no_hits
from retrievers.types import Hits, Query, Retriever, Traits

BATCH = 1024  # queries asked at a time


class Unseen:
    """``retriever`` over ``documents`` documents, without those of ``Query.seen`` (else ``history``); see
    :class:`retrievers.types.Retriever`. Exact where the retriever is: it asks for as many more hits as may go, and
    lowers a rank by what stands above it and goes."""

    def __init__(self, retriever: Retriever, documents: int) -> None:
        self.retriever = retriever
        self._documents = documents
        self.fingerprint = fingerprint_of({"kind": "unseen", "of": retriever.fingerprint})

    def __reduce__(self) -> tuple[Callable[..., Unseen], tuple[Any, ...]]:
        return Unseen, (self.retriever, self._documents)

    def __len__(self) -> int:
        return self._documents

    def retriever_traits(self) -> Traits:
        """Those of the retriever inside."""
        return Traits(inner=(self.retriever,))

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol."""
        k = check_k(k, len(self))
        own = [_seen(query) for query in queries]
        hits = no_hits(len(queries), k)
        goes = np.zeros(len(self) + 1, bool)
        goes[-1] = True  # where -1, no hit, points to
        # Those who have most come last, so that only they ask for as many more.
        order = sorted(range(len(queries)), key=lambda q: len(own[q]))
        for part in (order[start : start + BATCH] for start in range(0, len(order), BATCH)):
            depth = min(k + len(own[part[-1]]), len(self))
            found = self.retriever.search([queries[q] for q in part], depth)
            for q, rows, scores in zip(part, found.rows, found.scores, strict=True):
                goes[own[q]] = True
                kept = (~goes[rows]).nonzero()[0][:k]
                goes[own[q]] = False
                hits.rows[q, : len(kept)] = rows[kept]
                hits.scores[q, : len(kept)] = scores[kept]
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol; a target that was seen is not retrieved."""
        targets = check_targets(queries, targets, len(self))
        own = [_seen(query) for query in queries]
        more = np.full((len(queries), max(map(len, own), default=0)), -1, np.int64)
        for q, rows in enumerate(own):
            more[q, : len(rows)] = rows
        ranks = self.retriever.ranks(queries, np.concatenate([targets, more], axis=1))
        asked, gone = ranks[:, : targets.shape[1]], ranks[:, targets.shape[1] :]
        above = ((gone[:, None] > 0) & (gone[:, None] < asked[..., None])).sum(axis=2)
        seen = (targets[..., None] == more[:, None]).any(axis=2) & (targets >= 0)
        # -1 in all places of a query that the retriever failed for stays so
        return np.where(asked <= 0, asked, np.where(seen, 0, asked - above)).astype(np.int32)


def _seen(query: Query) -> list[int]:
    return list(dict.fromkeys(query.history if query.seen is None else query.seen))
