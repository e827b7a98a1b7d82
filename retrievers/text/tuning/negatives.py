"""Negatives of each pair, beside the documents of the other pairs of a batch.

Shapes: X pairs, D distinct query texts, n documents, m negatives per pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrievers.text.exact_search import Exact
from retrievers.text.tuning.pairs import Pairs
from retrievers.types import Query, Retriever

POOL = 50  # The negatives of a pair are drawn from so many candidates, the first ones that are no positives.
AT_A_TIME = 512  # Queries that are searched in one call.


def text_neighbours(pairs: Pairs, queries: np.ndarray, documents: Exact, count: int, seed: int) -> np.ndarray:
    """Hard negatives: documents whose embedding is near to that of the query, and that are not known to be relevant.

    pairs: X pairs.
    queries: (D, d) float32 embeddings of the query texts, by the encoder before it is tuned.
    documents: the embeddings of the catalogue by the same encoder.
    count: m.
    seed: the seed of the draw.

    Returns (X, m) int64 rows; -1 = there are no more.
    """
    depth = min(len(documents.embeddings), POOL + _most_known(pairs))
    out = np.full((len(pairs), count), -1, np.int64)
    rng = np.random.default_rng(seed)
    order = np.argsort(pairs.query, kind="stable")
    for start in range(0, len(queries), AT_A_TIME):
        found = documents.search(queries[start : start + AT_A_TIME], depth)[0]
        first, last = np.searchsorted(pairs.query[order], [start, start + len(found)])
        for pair in order[first:last].tolist():
            _fill(out[pair], found[pairs.query[pair] - start], pairs.known_of(pair), rng)
    return out


def anti_affinity(pairs: Pairs, retriever: Retriever, documents: int, count: int, seed: int) -> np.ndarray:
    """The items that speak most against the history of each pair, by a retriever with signed weights.

    pairs: X pairs with histories.
    retriever: reads histories and signed weights. EASE's score of item j is the sum of B[i, j] over the history, so
        a history with weights of -1 finds the items whose sum is most negative, and none whose sum is not negative.
    documents: n.
    count: m.
    seed: the seed of the draw.

    Returns (X, m) int64 rows; -1 = there are no more. Raises what the retriever raises.
    """
    depth = min(documents, POOL + _most_known(pairs))
    out = np.full((len(pairs), count), -1, np.int64)
    rng = np.random.default_rng(seed)
    for start in range(0, len(pairs), AT_A_TIME):
        asked = [
            Query(history=history, weights=(-1.0,) * len(history))
            for history in pairs.histories[start : start + AT_A_TIME]
        ]
        found = retriever.search(asked, depth).rows
        for offset, rows in enumerate(found):
            pair = start + offset
            _fill(out[pair], rows[rows >= 0], pairs.known_of(pair), rng)
    return out


def _fill(out: np.ndarray, found: np.ndarray, known: Sequence[int] | np.ndarray, rng: np.random.Generator) -> None:
    """Write negatives into ``out``, (m,), which are drawn from the first POOL rows of ``found`` that are not known."""
    candidates = found[~np.isin(found, known)][:POOL]
    drawn = rng.permutation(len(candidates))[: len(out)]
    out[: len(drawn)] = candidates[drawn]


def _most_known(pairs: Pairs) -> int:
    return int(np.diff(pairs.offsets).max(initial=0))
