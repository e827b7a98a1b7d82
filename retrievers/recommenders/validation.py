"""How settings and epochs of a recommender are chosen: ndcg@10 of held-out choices, one relevant document each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrievers.core.ranking import rank

DEPTH = 10


def gain(scores: np.ndarray, history: Sequence[int], target: int, least: float = -np.inf) -> float:
    """ndcg@10 of one ranking with one relevant document: 1 / log2(1 + rank) down to rank 10, else 0.

    scores: (n,) floats, which this function changes: documents of the history leave the ranking.
    history: rows from 0 to n - 1.
    target: the row of the relevant document; -1 = none of the n, which gains 0.
    least: a document is ranked where its score is above this.
    """
    scores[list(history)] = -np.inf
    place = int(rank(scores, np.array([target]), least)[0])
    return float(1 / np.log2(1 + place)) if 0 < place <= DEPTH else 0.0
