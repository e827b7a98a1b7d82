"""Scores and exact ranks over a term-document matrix of impacts, stored by term (CSC).

score(q, d) = sum over the terms t of q of count(t, q) * impact(t, d), all float32 and summed in one canonical
order, so that `scores` and `ranks`, with numba or without, give the same bits.

`ranks` needs no ranking: it looks up the target's own score and counts the documents above it. With numba it also
leaves out what cannot matter (MaxScore: Turtle and Flood 1995, "Query evaluation: strategies and optimizations"):
frequent terms have small impacts, so a document that has nothing else cannot beat a target with a good score, and
their long postings are only looked up for the few documents that still can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from retrievers.core.numba_threads import compiled, shared
from retrievers.core.ranking import rank


class Impacts(NamedTuple):
    """A CSC matrix: the documents of term t are ``rows[starts[t]:starts[t + 1]]``, ascending.

    data: (nnz,) float32 > 0. rows: (nnz,) int32. starts: (V + 1,) int64. peaks: (V,) float32, each term's largest
    impact. documents: n.
    """

    data: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    peaks: np.ndarray
    documents: int


class Packed(NamedTuple):
    """Q queries as one CSR: query q has ``terms[starts[q]:starts[q + 1]]``, each once, in the canonical order.

    counts: float32, how often the query repeats the term. bounds: float32, the most it can add to a score.
    """

    starts: np.ndarray
    terms: np.ndarray
    counts: np.ndarray
    bounds: np.ndarray


def peaks_of(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(V,) float32: the largest impact of each term. Every term needs at least one document."""
    return np.maximum.reduceat(data, starts[:-1]) if len(starts) > 1 else np.zeros(0, np.float32)


def pack(queries: Sequence[Sequence[int]], peaks: np.ndarray) -> Packed:
    """Term ids of Q queries -> Packed. The canonical order: largest bound first, ties by term."""
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
    """(n,) float32 scores of query q; 0 where no term matches."""
    out = np.zeros(impacts.documents, np.float32)
    for i in range(packed.starts[q], packed.starts[q + 1]):
        span = slice(impacts.starts[packed.terms[i]], impacts.starts[packed.terms[i] + 1])
        out[impacts.rows[span]] += packed.counts[i] * impacts.data[span]
    return out


def ranks(impacts: Impacts, packed: Packed, targets: np.ndarray) -> np.ndarray:
    """(Q, T) rows, -1 = padding -> (Q, T) int32 ranks from 1; 0 = padding or no term of the query matches."""
    out = np.zeros(targets.shape, np.int32)
    kernel = _kernel()
    if kernel is None:
        for q in range(len(targets)):
            out[q] = rank(scores(impacts, packed, q), targets[q])
        return out
    targets = np.ascontiguousarray(targets, np.int64)

    def some(first: int, last: int) -> None:
        kernel(*impacts, *packed, targets, out, first, last)

    shared(some, len(targets))
    return out


def _kernel() -> Any:
    """The compiled count, or None without numba."""
    from retrievers.text.bm25_kernel import count

    return compiled(count)
