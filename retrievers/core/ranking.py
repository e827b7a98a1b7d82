"""What every backend shares: from the scores of one query to hits and ranks, and the checks of the contract's
arguments. `search` and `ranks` must never disagree, so both orders live here."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retrievers.core.numba_threads import compiled, shared
from retrievers.core.outage import outages
from retrievers.types import Hits, Query, Retriever, RetrieverError, UnavailableError

MAX_SEARCH_PLACES = 1 << 22  # places of a list of hits, queries x depth, that one search is asked for at most


def top(scores: np.ndarray, k: int, floor: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(n,) scores -> (min(k, n),) int32 rows, best first, ties by row, -1 = no hit; and their float32 scores, -inf.

    floor: a score of this or less means that the document matches nothing in the query (-inf: every document
    matches, as with embeddings). Raises ValueError where k is not an integer >= 1.
    """
    k = check_k(k, len(scores))
    found = np.flatnonzero(scores > floor)
    if len(found) > k:
        # Everything above the k-th best score, and the ties at it by row: a partition alone breaks them arbitrarily.
        values = scores[found]
        threshold = np.partition(values, len(found) - k)[len(found) - k]
        above = found[values > threshold]
        found = np.concatenate([above, found[values == threshold][: k - len(above)]])
    found = found[np.lexsort((found, -scores[found]))]
    rows, best = np.full(k, -1, np.int32), np.full(k, -np.inf, np.float32)
    rows[: len(found)], best[: len(found)] = found, scores[found]
    return rows, best


def heads(scores: np.ndarray, k: int, floor: float = 0.0) -> Hits:
    """(Q, n) float32 -> what :func:`top` finds in each row; compiled where there is numba."""
    from retrievers.core.kernels import heads as loop

    hits, kernel = no_hits(len(scores), check_k(k, scores.shape[1])), compiled(loop)
    if kernel is None:
        for q, row in enumerate(scores):
            hits.rows[q], hits.scores[q] = top(row, k, floor)
        return hits
    scores = np.require(scores, np.float32, ["C", "W"])  # one layout, and so one compilation
    shared(lambda first, last: kernel(scores, floor, hits.rows, hits.scores, first, last), len(scores))
    return hits


def rank(scores: np.ndarray, targets: np.ndarray, floor: float = 0.0) -> np.ndarray:
    """(n,) scores and (T,) rows, -1 = padding -> (T,) int32 ranks from 1; 0 = padding or not retrieved.

    Counts what beats each target, O(n) each, exact at any depth, without a sort. Raises ValueError for a row
    outside the catalogue.
    """
    check_rows(targets, len(scores))
    ranks = np.zeros(len(targets), np.int32)
    for t, row in enumerate(targets):
        if row >= 0 and scores[row] > floor:
            own = scores[row]
            ranks[t] = 1 + np.count_nonzero(scores > own) + np.count_nonzero(scores[:row] == own)
    return ranks


def ranks_from_search(
    search: Callable[[Sequence[Query], int], Hits],
    queries: Sequence[Query],
    targets: np.ndarray,
    documents: int,
    depth: int | None = None,
) -> np.ndarray:
    """`Retriever.ranks` for a retriever that can only `search`: (Q, T) rows, -1 = padding -> (Q, T) int32 ranks.

    search: the retriever's own method. documents: how many the catalogue has. depth: how many hits a query is searched
    for; None asks for all documents. The rank of a target is its place in the list, from 1, ties in the list's order.
    It is exact for a target among the first ``depth`` hits; every other target gets 0, as one that is not retrieved
    does, so ``depth`` should be at least the cut-off of the metric. Padding gets 0.

        def ranks(self, queries, targets):
            return retrievers.ranks_from_search(self.search, queries, targets, len(self.catalog), depth=100)

    Raises ValueError for targets that do not fit, a depth below 1, and a hit that is not a row of the catalogue; what
    ``search`` raises passes through.
    """
    targets = check_targets(queries, targets, documents)
    depth = documents if depth is None else check_k(depth, documents, "depth")
    ranks = np.zeros(targets.shape, np.int32)
    places = np.zeros(documents + 1, np.int32)  # the rank of every row; the last place is that of padding, -1
    size = max(1, MAX_SEARCH_PLACES // depth)
    for start in range(0, len(queries), size):
        asked = queries[start : start + size]
        lists = np.asarray(search(asked, depth).rows)
        if len(lists) != len(asked):
            raise ValueError(f"search found {len(lists)} lists for {len(asked)} queries: return one a query, in order")
        for q, rows in enumerate(lists, start):
            outside = rows[(rows < -1) | (rows >= documents)]
            if len(outside):
                raise ValueError(
                    f"search found row {outside[0]}, which is outside the catalogue's 0 to {documents - 1}: "
                    "use -1 for no hit, and catalog.rows(ids) to make rows of ids"
                )
            backwards = rows[::-1]  # so that of a row that is listed twice the first place counts
            places[backwards] = np.arange(len(rows), 0, -1)
            places[-1] = 0
            ranks[q] = places[targets[q]]
            places[rows] = 0
    return ranks


def check_k(k: Any, n: int, name: str = "k") -> int:
    """k clamped to the catalogue's n documents. Raises ValueError where it is not an integer >= 1."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {k!r}: ask for at least one document")
    return min(int(k), n)


def check_targets(queries: Sequence[Any], targets: Any, n: int) -> np.ndarray:
    """The (Q, T) integer array of `ranks`. Raises ValueError for another shape or type or a row outside 0 to n-1."""
    targets = np.asarray(targets)
    if targets.size and targets.dtype.kind not in "iu":
        raise ValueError(f"targets must be integer rows, got {targets.dtype}: pass catalog.rows(ids)")
    if targets.ndim != 2 or len(targets) != len(queries):
        raise ValueError(f"targets must have shape (Q, T) with Q = {len(queries)} queries, got {targets.shape}")
    check_rows(targets, n)
    return targets


def check_rows(targets: np.ndarray, n: int) -> None:
    outside = targets[(targets < -1) | (targets >= n)]
    if len(outside):
        raise ValueError(
            f"target row {outside[0]} is outside the catalogue's 0 to {n - 1} (-1 = padding): "
            "the judgments belong to another catalogue"
        )


def certain_ranks(retriever: Retriever, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
    """``retriever.ranks`` for a caller that needs all of them. Raises RetrieverError where it fails for some."""
    try:
        with outages():
            ranks = retriever.ranks(queries, targets)
    except UnavailableError as error:
        raise RetrieverError(f"the retriever fails ({error}): restart the retriever first") from error
    failed = int((ranks < 0).any(axis=1).sum())
    if failed:
        raise RetrieverError(f"the retriever failed for {failed} of {len(queries)} queries: restart it first")
    return ranks


def certain_hits(retriever: Retriever, queries: Sequence[Query], k: int) -> Hits:
    """``retriever.search`` for a caller that needs the answer. Raises RetrieverError where it fails."""
    try:
        with outages():
            return retriever.search(queries, k)
    except UnavailableError as error:
        raise RetrieverError(f"the retriever fails ({error}): restart the retriever first") from error


def no_hits(queries: int, k: int) -> Hits:
    """Hits of ``queries`` queries, (Q, k), that hold -1 and -inf: a `search` writes what it finds into them."""
    return Hits(np.full((queries, k), -1, np.int32), np.full((queries, k), -np.inf, np.float32))
