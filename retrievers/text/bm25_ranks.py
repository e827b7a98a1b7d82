"""BM25 scores and exact ranks from a matrix of term weights ("impacts"), which is stored by term (CSC).

score(q, d) = sum over the terms t of q of count(t, q) * impact(t, d)

All numbers are float32 and are added in one fixed order, so that `scores` and `ranks` give bitwise equal results, with
numba and without.

`ranks` does not sort. It computes the score of the target, and counts the documents above it. With numba it also skips
documents that cannot be above the target (MaxScore: Turtle and Flood 1995, "Query evaluation: strategies and
optimizations"). Frequent terms have small impacts, so a document without any other term of the query cannot beat a
target with a high score. The long posting lists of these terms are therefore read only for the documents that can still
reach the target's score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from retrievers.core.numba_threads import compiled, read_only, run_in_threads
from retrievers.core.ranking import rank


class Impacts(NamedTuple):
    """The impacts of V terms in n documents, as a CSC matrix with nnz entries.

    data: (nnz,) float32 > 0, the impacts.
    rows: (nnz,) int32, the documents. Those of term t are ``rows[starts[t]:starts[t + 1]]``, in ascending order.
    starts: (V + 1,) int64.
    peaks: (V,) float32, the largest impact of each term.
    documents: n.
    """

    data: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    peaks: np.ndarray
    documents: int


class Packed(NamedTuple):
    """Q queries in one CSR structure, with N terms in total.

    starts: (Q + 1,) int64.
    terms: (N,) int64. Those of query q are ``terms[starts[q]:starts[q + 1]]``, distinct, in the order of :func:`pack`.
    counts: (N,) float32, how often the query contains the term.
    bounds: (N,) float32, the largest amount that the term can add to a score.
    """

    starts: np.ndarray
    terms: np.ndarray
    counts: np.ndarray
    bounds: np.ndarray


def peaks_of(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The largest impact of each term: (V,) float32. Every term must have at least one document."""
    return np.maximum.reduceat(data, starts[:-1]) if len(starts) > 1 else np.zeros(0, np.float32)


def pack(queries: Sequence[Sequence[int]], peaks: np.ndarray) -> Packed:
    """Pack the term ids of Q queries. The terms of a query are in the order of descending bounds, then of their ids."""
    starts = np.zeros(len(queries) + 1, np.int64)
    terms: list[np.ndarray] = [np.zeros(0, np.int64)]
    counts: list[np.ndarray] = [np.zeros(0, np.float32)]
    bounds: list[np.ndarray] = [np.zeros(0, np.float32)]
    for q, ids in enumerate(queries):
        unique, times = np.unique(np.asarray(ids, np.int64), return_counts=True)
        repeated = times.astype(np.float32)
        bound = peaks[unique] * repeated
        order = np.lexsort((unique, -bound))
        terms.append(unique[order])
        counts.append(repeated[order])
        bounds.append(bound[order])
        starts[q + 1] = starts[q] + len(unique)
    return Packed(starts, np.concatenate(terms), np.concatenate(counts), np.concatenate(bounds))


def scores(impacts: Impacts, packed: Packed, q: int) -> np.ndarray:
    """The scores of all documents for query q: (n,) float32, 0 where no term matches."""
    out = np.zeros(impacts.documents, np.float32)
    for i in range(packed.starts[q], packed.starts[q + 1]):
        span = slice(impacts.starts[packed.terms[i]], impacts.starts[packed.terms[i] + 1])
        out[impacts.rows[span]] += packed.counts[i] * impacts.data[span]
    return out


def ranks(impacts: Impacts, packed: Packed, targets: np.ndarray) -> np.ndarray:
    """The ranks of the targets: (Q, T) int32, counted from 1; 0 = padding, or no term of the query matches.

    targets: (Q, T) integer rows; -1 = padding.
    """
    out = np.zeros(targets.shape, np.int32)
    kernel = _kernel()
    if kernel is None:
        for q in range(len(targets)):
            out[q] = rank(scores(impacts, packed, q), targets[q])
        return out
    given = read_only([*impacts, *packed, np.ascontiguousarray(targets, np.int64)])
    run_in_threads(lambda first, last: kernel(*given, out, first, last), len(targets))
    return out


def _kernel() -> Any:
    """The compiled loop of `bm25_kernel`, or None where numba is not installed."""
    from retrievers.text.bm25_kernel import count

    return compiled(count)
