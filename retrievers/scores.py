"""From the scores of one query over the whole catalogue to hits and ranks: the two must never disagree, so both
live here. A score of 0 or less means that nothing in the query speaks for the document."""

import numpy as np


def top(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) scores -> (min(k, n),) int32 rows, best first, ties by row, -1 = no hit; and their float32 scores, -inf.

    Raises ValueError where k is not an integer >= 1.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k must be an integer >= 1, got {k!r}: ask for at least one document")
    k = min(int(k), len(scores))
    found = np.flatnonzero(scores > 0)
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


def rank(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(n,) scores and (T,) rows, -1 = padding -> (T,) int32 ranks from 1; 0 = padding or not retrieved.

    Counts what beats each target, O(n) each, exact at any depth, without a sort. Raises ValueError for a row
    outside the catalogue.
    """
    n = len(scores)
    ranks = np.zeros(len(targets), np.int32)
    for t, row in enumerate(targets):
        if not -1 <= row < n:
            raise ValueError(
                f"target row {row} is outside the catalogue's 0 to {n - 1} (-1 = padding): "
                "the judgments belong to another catalogue"
            )
        if row >= 0 and scores[row] > 0:
            own = scores[row]
            ranks[t] = 1 + np.count_nonzero(scores > own) + np.count_nonzero(scores[:row] == own)
    return ranks
