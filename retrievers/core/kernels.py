"""The loops of `core/ranking.py` (`heads`) and `recommenders/item_item.py` (`multiplied`, `gram`), compiled by numba.

Without numba they run as plain Python, slowly.
"""

from typing import Any

import numpy as np

jitable: Any = lambda function: function  # noqa: E731
try:  # a function that a compiled loop calls must be known to numba
    from numba import extending

    jitable = extending.register_jitable
except ImportError:
    pass


@jitable
def sink(own: Any, found: Any, size: int, score: float, row: int) -> None:
    """Put (score, row) on top of the heap of ``size`` in place of what is there, and let it sink below all worse."""
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
    """Fill rows[first:last] and best[first:last], (Q, k), with the k best of each row of ``scores``, (Q, n) float32;
    see `core/ranking.py`. The caller fills them with -1 and -inf.

    The best so far are a heap with the worst of them on top: most documents cost one comparison with it.
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
                place, size = size, size + 1  # rises until its parent is worse
                while place > 0:
                    parent = (place - 1) >> 1
                    # rows come in order: of equal scores the parent's is the smaller row, the better one
                    if own[parent] < score:
                        break
                    own[place], found[place] = own[parent], found[parent]
                    place = parent
                own[place], found[place] = score, j
            elif score > own[0]:  # an equal one has the larger row
                sink(own, found, size, score, j)
        while size > 1:  # the worst goes to the end, the last one sinks from the top
            size -= 1
            score, row = own[size], found[size]
            own[size], found[size] = own[0], found[0]
            sink(own, found, size, score, row)


def products(
    history_starts: Any, history_rows: Any, history: Any,  # CSR (Q, n)
    starts: Any, rows: Any, weights: Any,  # CSR (n, n)
    out: Any, first: int, last: int,
) -> None:  # fmt: skip
    """Add to out[first:last], (Q, n) float32, the product of two CSR matrices, in scipy's order of summation."""
    for q in range(first, last):
        own = out[q]
        for i in range(history_starts[q], history_starts[q + 1]):
            weight = history[i]
            start, stop = starts[history_rows[i]], starts[history_rows[i] + 1]
            reached, by = rows[start:stop], weights[start:stop]
            for e in range(len(reached)):
                own[np.uintp(reached[e])] += weight * by[e]  # unsigned: no look whether it counts from the end


def pairs(
    column_starts: Any, users: Any,  # CSR (n, U) of ones
    starts: Any, rows: Any,  # CSR (U, n) of ones, each row ascending
    out: Any, first: int, last: int,
) -> None:  # fmt: skip
    """Fill out[first:last], (n, n) float zeros, from the diagonal on: how many users chose both documents."""
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
