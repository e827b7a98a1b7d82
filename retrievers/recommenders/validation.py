"""The metric by which the settings and the epoch of a recommender are chosen: ndcg@10 on the validation split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrievers.core.ranking import rank

DEPTH = 10  # The k of ndcg@k.


def ndcg_of_ranking(scores: np.ndarray, history: Sequence[int], target: int, least: float = -np.inf) -> float:
    """ndcg@10 of one ranking with one relevant document: 1 / log2(1 + rank) down to rank 10, else 0.

    scores: (n,) floats. This function changes them, because it leaves the history out of the ranking.
    history: rows from 0 to n - 1.
    target: the row of the relevant document. -1 = no document, for which the result is 0.
    least: a score of this or less means that the document is not retrieved. Default -inf.
    """
    scores[list(history)] = -np.inf
    place = int(rank(scores, np.array([target]), least)[0])
    return float(1 / np.log2(1 + place)) if 0 < place <= DEPTH else 0.0
