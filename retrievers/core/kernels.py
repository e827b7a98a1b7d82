"""The loops behind `heads` in `core/ranking.py`, and `multiplied` and `gram` in `recommenders/item_item.py`.

numba compiles them. Without numba they are plain Python, which is slow, and their callers use numpy or scipy instead.
"""

from typing import Any

import numpy as np

jitable: Any = lambda function: function  # noqa: E731
try:  # numba must know every function that a compiled loop calls.
    from numba import extending

    jitable = extending.register_jitable
except ImportError:
    pass


@jitable
def sift_down(own: Any, found: Any, size: int, score: float, row: int) -> None:
    """Replace the root of a heap by (score, row), and move it down until the heap is in order again.

    own, found: the scores and the rows of the heap, whose root is the worst of its documents.
    size: the number of documents in the heap.
    """
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (own[other] < own[child] or (own[other] == own[child] and found[other] > found[child])):
            child = other
        if own[child] > score or (own[child] == score and found[child] < row):
            break
        own[place], found[place] = own[child], found[child]
        place = child
    own[place], found[place] = score, row


def heads(scores: Any, floor: float, rows: Any, best: Any, first: int, last: int) -> None:
    """Write the k best documents of each query, as `top` in `core/ranking.py` defines them.

    scores: (Q, n) float32.
    floor: a score of this or less means that the document is not retrieved.
    rows, best: (Q, k) int32 and float32, the results. The caller has filled them with -1 and -inf.
    first, last: only the queries first to last - 1 are computed.

    The best documents so far are in a heap with the worst of them at the root, so that most documents cost only one
    comparison.
    """
    k, n = rows.shape[1], scores.shape[1]
    for q in range(first, last):
        size = 0
        own, found = best[q], rows[q]
        for j in range(n):
            score = scores[q, j]
            if size < k:
                if not score > floor:
                    continue
                place, size = size, size + 1  # The new document moves up until its parent is worse.
                while place > 0:
                    parent = (place - 1) >> 1
                    # Rows come in ascending order, so a parent with an equal score has the smaller row and is better.
                    if own[parent] < score:
                        break
                    own[place], found[place] = own[parent], found[parent]
                    place = parent
                own[place], found[place] = score, j
            elif score > own[0]:  # A document with an equal score has the larger row, so it is worse.
                sift_down(own, found, size, score, j)
        while size > 1:  # Heap sort: the root, the worst document, moves to the end.
            size -= 1
            score, row = own[size], found[size]
            own[size], found[size] = own[0], found[0]
            sift_down(own, found, size, score, row)


def products(
    history_starts: Any, history_rows: Any, history: Any,  # CSR (Q, n)
    starts: Any, rows: Any, weights: Any,  # CSR (n, n)
    out: Any, first: int, last: int,
) -> None:  # fmt: skip
    """Add the product of two CSR matrices to ``out``, (Q, n) float32, with the terms in the same order as scipy.

    history_starts, history_rows, history: indptr, indices and data of the left matrix, (Q, n).
    starts, rows, weights: indptr, indices and data of the right matrix, (n, n).
    first, last: only the rows first to last - 1 of ``out`` are computed.
    """
    for q in range(first, last):
        own = out[q]
        for i in range(history_starts[q], history_starts[q + 1]):
            weight = history[i]
            start, stop = starts[history_rows[i]], starts[history_rows[i] + 1]
            reached, by = rows[start:stop], weights[start:stop]
            for e in range(len(reached)):
                # An unsigned index spares numba the check for negative indices.
                own[np.uintp(reached[e])] += weight * by[e]


def pairs(
    column_starts: Any, users: Any,  # CSR (n, U) of ones
    starts: Any, rows: Any,  # CSR (U, n) of ones, each row ascending
    out: Any, first: int, last: int,
) -> None:  # fmt: skip
    """Count how many users chose both documents, for the upper triangle and the diagonal of ``out``.

    column_starts, users: indptr and indices of X', (n, U).
    starts, rows: indptr and indices of X, (U, n), with ascending indices in each row.
    out: (n, n) floats that the caller has filled with zeros.
    first, last: only the rows first to last - 1 of ``out`` are computed.
    """
    for i in range(first, last):
        own = out[i]
        for c in range(column_starts[i], column_starts[i + 1]):
            start, stop = starts[users[c]], starts[users[c] + 1]
            others = rows[start:stop]
            for e in range(len(others) - 1, -1, -1):
                j = others[e]
                if j < i:
                    break
                own[np.uintp(j)] += 1
