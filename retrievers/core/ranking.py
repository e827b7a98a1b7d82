"""Hits and ranks from the scores of a query, and checks of the arguments of `search` and `ranks`.

All backends use these functions, so that `search` and `ranks` have the same order: by score, then by row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retrievers.core.numba_threads import compiled, read_only, run_in_threads
from retrievers.core.outage import outages
from retrievers.types import Hits, Query, Retriever, RetrieverError, UnavailableError

MAX_SEARCH_PLACES = 1 << 22  # `ranks_from_search` asks one search for at most so many hits, queries times depth.


def top(scores: np.ndarray, k: int, floor: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The k best documents of one query: (min(k, n),) int32 rows, best first, and (min(k, n),) float32 scores.

    scores: (n,) floats, one per document. Of equal scores, the smaller row comes first.
    k: the number of hits; an integer >= 1.
    floor: a score of this or less means that the document matches nothing in the query. Default 0. -inf means that
        every document matches, as with embeddings.

    Where fewer than k documents match, the remaining rows are -1 and their scores -inf.

        rows, best = retrievers.top(np.array([0.0, 2.0, 3.0]), k=3)
        rows  # array([ 2,  1, -1], dtype=int32)

    Raises ValueError where k is not an integer >= 1.
    """
    k = check_k(k, len(scores))
    found = np.flatnonzero(scores > floor)
    if len(found) > k:
        # Take everything above the k-th best score, and of the documents with that score those with the smallest
        # rows. A partition alone would choose among them arbitrarily.
        values = scores[found]
        threshold = np.partition(values, len(found) - k)[len(found) - k]
        above = found[values > threshold]
        found = np.concatenate([above, found[values == threshold][: k - len(above)]])
    found = found[np.lexsort((found, -scores[found]))]
    rows, best = np.full(k, -1, np.int32), np.full(k, -np.inf, np.float32)
    rows[: len(found)], best[: len(found)] = found, scores[found]
    return rows, best


def heads(scores: np.ndarray, k: int, floor: float = 0.0) -> Hits:
    """The result of :func:`top` for each of Q queries. It is compiled where numba is installed.

    scores: (Q, n) float32.
    k, floor: see :func:`top`.
    """
    from retrievers.core.kernels import heads as loop

    hits, kernel = no_hits(len(scores), check_k(k, scores.shape[1])), compiled(loop)
    if kernel is None:
        for q, row in enumerate(scores):
            hits.rows[q], hits.scores[q] = top(row, k, floor)
        return hits
    (given,) = read_only([np.ascontiguousarray(scores, np.float32)])  # numba compiles the loop once for each layout.
    run_in_threads(lambda first, last: kernel(given, floor, hits.rows, hits.scores, first, last), len(given))
    return hits


def rank(scores: np.ndarray, targets: np.ndarray, floor: float = 0.0) -> np.ndarray:
    """The rank of each target in one query's ranking: (T,) int32, counted from 1; 0 = padding, or not retrieved.

    scores: (n,) floats, one per document.
    targets: (T,) integer rows; -1 = padding.
    floor: see :func:`top`.

    The rank is 1 + the number of documents above the target. Counting them takes O(n) per target, needs no sort, and
    is exact at any depth.

        retrievers.rank(np.array([0.0, 2.0, 3.0]), np.array([1, 0]))  # array([2, 0], dtype=int32)

    Raises ValueError for a row outside the catalogue.
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
    """`Retriever.ranks` for a retriever that can only `search`: (Q, T) int32 ranks.

    search: the retriever's own method.
    queries: Q queries.
    targets: (Q, T) integer rows; -1 = padding.
    documents: the number of documents in the catalogue.
    depth: the number of hits per query. None, the default, = all documents.

    The rank of a target is its position in the list of hits, counted from 1. A target that is not among the first
    ``depth`` hits gets 0, as a target that is not retrieved does, so ``depth`` should be at least the cut-off of the
    metric. Padding gets 0.

        def ranks(self, queries, targets):
            return retrievers.ranks_from_search(self.search, queries, targets, len(self.catalog), depth=100)

    Raises ValueError for targets of another shape or type, a depth below 1, and a hit that is not a row of the
    catalogue. Exceptions of ``search`` pass through.
    """
    targets = check_targets(queries, targets, documents, structured=True)  # ``search`` refuses what it does not serve.
    depth = documents if depth is None else check_k(depth, documents, "depth")
    ranks = np.zeros(targets.shape, np.int32)
    places = np.zeros(documents + 1, np.int32)  # The rank of every row. The last entry is for padding, the row -1.
    size = max(1, MAX_SEARCH_PLACES // depth)
    for start in range(0, len(queries), size):
        asked = queries[start : start + size]
        lists = np.asarray(search(asked, depth).rows)
        if len(lists) != len(asked):
            raise ValueError(
                f"search returned {len(lists)} lists for {len(asked)} queries: return one list per query, in order"
            )
        for q, rows in enumerate(lists, start):
            outside = rows[(rows < -1) | (rows >= documents)]
            if len(outside):
                raise ValueError(
                    f"search returned row {outside[0]}, but the catalogue has the rows 0 to {documents - 1}: "
                    "use -1 for no hit, and catalog.rows(ids) to turn ids into rows"
                )
            backwards = rows[::-1]  # Assign in reverse, so that a row that is listed twice gets its first position.
            places[backwards] = np.arange(len(rows), 0, -1)
            places[-1] = 0
            ranks[q] = places[targets[q]]
            places[rows] = 0
    return ranks


def check_k(k: Any, n: int, name: str = "k") -> int:
    """k, lowered to the number of documents n where it is larger. Raises ValueError unless k is an integer >= 1."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {k!r}: set it to a number of documents, such as 10")
    return min(int(k), n)


def check_plain(queries: Sequence[Any]) -> None:
    """Raise ValueError for a structured query. A retriever that serves none calls this, because it would search for the
    words and ignore `must`, `filters` and `boosts`."""
    if any(isinstance(query, Query) and query.structured is not None for query in queries):
        raise ValueError("a structured query for a retriever that serves none: send text")


def check_targets(queries: Sequence[Any], targets: Any, n: int, structured: bool = False) -> np.ndarray:
    """The targets of `ranks` as a (Q, T) integer array.

    structured: whether the retriever serves structured queries, or passes them on.

    Raises ValueError for another shape or type, for a row that is not -1 or from 0 to n - 1, and for a structured query
    where the retriever serves none.
    """
    if not structured:
        check_plain(queries)
    targets = np.asarray(targets)
    if targets.size and targets.dtype.kind not in "iu":
        raise ValueError(f"targets must be integer rows, got {targets.dtype}: pass catalog.rows(ids)")
    if targets.ndim != 2 or len(targets) != len(queries):
        raise ValueError(f"targets must have shape (Q, T) with Q = {len(queries)} queries, got {targets.shape}")
    check_rows(targets, n)
    return targets


def check_rows(targets: np.ndarray, n: int) -> None:
    """Raises ValueError for a target that is neither -1 nor one of the rows 0 to n - 1."""
    outside = targets[(targets < -1) | (targets >= n)]
    if len(outside):
        raise ValueError(
            f"target row {outside[0]} is outside the catalogue's rows 0 to {n - 1} (-1 = padding): "
            "take the judgments of this catalogue"
        )


def certain_ranks(retriever: Retriever, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
    """``retriever.ranks`` for a caller that needs the ranks of all queries: (Q, T) int32.

    Raises RetrieverError where the retriever fails for any of them, and ValueError for bad arguments.
    """
    try:
        with outages():
            ranks = retriever.ranks(queries, targets)
    except UnavailableError as error:
        raise RetrieverError(f"the retriever fails ({error}): restart the retriever first") from error
    failed = int((ranks < 0).any(axis=1).sum())
    if failed:
        raise RetrieverError(
            f"the retriever failed for {failed} of {len(queries)} queries: restart the retriever first"
        )
    return ranks


def certain_hits(retriever: Retriever, queries: Sequence[Query], k: int) -> Hits:
    """``retriever.search`` for a caller that needs the hits of all queries.

    Raises RetrieverError where the retriever fails, and ValueError for bad arguments.
    """
    try:
        with outages():
            return retriever.search(queries, k)
    except UnavailableError as error:
        raise RetrieverError(f"the retriever fails ({error}): restart the retriever first") from error


def no_hits(queries: int, k: int) -> Hits:
    """Empty hits, (queries, k), filled with -1 and -inf. A `search` writes its results into them."""
    return Hits(np.full((queries, k), -1, np.int32), np.full((queries, k), -np.inf, np.float32))
