"""Reads the answers of a retriever server. An answer that is not valid raises OutageError and never becomes a rank."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from retrievers.core.requests import OutageError
from retrievers.types import Hits

MAX_SCORE = float(np.finfo(np.float32).max)  # The largest valid score. NaN is refused, too: its comparisons are False.


def read_ranks(answer: dict[str, Any], targets: np.ndarray, documents: int) -> np.ndarray:
    """The ranks in an answer to /ranks: (Q, T) int32. A row of -1 is a query for which the server's retriever failed.

    answer: the JSON object.
    targets: (Q, T) rows that the client asked for; -1 = padding.
    documents: the number of documents in the catalogue.

    Raises OutageError for anything but integers that can be the ranks of these targets: from 0 to ``documents``, 0 for
    padding, different ranks for different documents, and the same rank for the same document.
    """
    rows = _table(answer, "ranks", targets.shape, (int,))
    for wanted, ranks in zip(targets.tolist(), rows, strict=True):
        if ranks and all(rank == -1 for rank in ranks):
            continue
        at: dict[int, int] = {}
        of: dict[int, int] = {}
        for row, rank in zip(wanted, ranks, strict=True):
            if not 0 <= rank <= (documents if row >= 0 else 0):
                raise _invalid("ranks", f"a rank of {rank} among {documents} documents")
            if of.setdefault(row, rank) != rank or (rank and at.setdefault(rank, row) != row):
                raise _invalid("ranks", f"two documents at rank {rank}, or one at two ranks")
    return np.array(rows, np.int32).reshape(targets.shape)


def read_hits(answer: dict[str, Any], queries: int, k: int, documents: int) -> Hits:
    """The hits in an answer to /search, (Q, k).

    answer: the JSON object.
    queries: Q.
    k: the number of hits per query.
    documents: the number of documents in the catalogue.

    Raises OutageError for anything but distinct rows of the catalogue, followed by -1, with finite scores in descending
    order.
    """
    rows = _table(answer, "rows", (queries, k), (int,))
    scores = _table(answer, "scores", (queries, k), (int, float))
    numbers = np.full((queries, k), -np.inf, np.float32)  # The score of a row -1 is -inf, which JSON cannot express.
    for q, (hits, values) in enumerate(zip(rows, scores, strict=True)):
        found = [row for row in hits if row != -1]
        if hits[: len(found)] != found or not all(0 <= row < documents for row in found):
            raise _invalid("rows", f"rows outside a catalogue of {documents} documents, or -1 before a row")
        if len(set(found)) < len(found):
            raise _invalid("rows", "a document twice")
        kept = values[: len(found)]
        if not all(-MAX_SCORE <= value <= MAX_SCORE for value in kept) or any(a < b for a, b in pairwise(kept)):
            raise _invalid("scores", "scores that are not finite, or not in descending order")
        numbers[q, : len(kept)] = kept
    return Hits(np.array(rows, np.int32).reshape(queries, k), numbers)


def _table(answer: dict[str, Any], key: str, shape: tuple[int, ...], kinds: tuple[type, ...]) -> list[list[Any]]:
    """The table under a key of an answer, as lists.

    Raises OutageError for another shape, or for values of other types than ``kinds``. No value is converted.
    """
    rows = answer.get(key)
    fits = isinstance(rows, list) and len(rows) == shape[0]
    fits = fits and all(isinstance(row, list) and len(row) == shape[1] for row in rows or ())
    if not fits or not all(type(value) in kinds for row in rows or () for value in row):
        raise _invalid(key, f"no {shape[0]} x {shape[1]} table of {' or '.join(kind.__name__ for kind in kinds)}")
    return rows or []


def _invalid(key: str, what: str) -> OutageError:
    return OutageError(f"the server's {key!r} hold {what}: install the same version of rec-r1 on both sides")
