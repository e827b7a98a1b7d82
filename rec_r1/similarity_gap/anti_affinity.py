"""Does a tuned encoder learn anti-affinity: which items have negative scores in EASE?

The learned scores of an encoder for a held-out query are compared with the scores of EASE for the same items of the
history, over the items whose score is negative in EASE. A rank correlation above 0 means that the lower the score of an
item is in EASE, the lower it tends to be in the encoder.

Shapes: Q held-out queries, H of which have a text that no training pair has, n documents, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rec_r1.evaluation.significance import over_seeds
from rec_r1.similarity_gap.held_out import FEWEST_USERS, HeldOut
from rec_r1.tasks import Task
from retrievers import Query
from retrievers.text.dense import Dense
from retrievers.text.tuning.pairs import from_interactions

MOST = 1000  # At most this many held-out queries are compared, the first ones.
FEWEST_ITEMS = 10  # A query with fewer items of negative score is left out.
Spearmans = Mapping[str, np.ndarray]  # Name of a system -> (S, H) rank correlations.


def unseen(task: Task, held_out: HeldOut) -> np.ndarray:
    """The places of the held-out queries with a text that no training pair can have, (H,) int64, at most `MOST`.

    The encoder was then trained on no pair of such a query and any item.
    """
    assert task.interactions is not None
    known = set(from_interactions(task.interactions, task.catalog.titles, 1, None, 0).texts)
    places = [place for place, query in enumerate(held_out.queries) if query.text not in known]
    return np.array(places[:MOST], np.int64)


def correlations(
    task: Task, held_out: HeldOut, places: np.ndarray, ease: Any, encoders: Mapping[str, Sequence[Dense]]
) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
    """The rank correlation of each encoder's cosines with the negative scores of EASE, per query.

    places: (H,) the queries that are compared, see :func:`unseen`.
    ease: an open `ease`. Its history is the items that the text of the query names.
    encoders: name -> the encoder with each of S seeds.

    Returns the places of the queries with at least `FEWEST_ITEMS` such items, name -> (S, their number), and the number
    of pairs of a query and an item.
    """
    assert task.interactions is not None
    last = task.interactions.raw_titles
    kept: list[int] = []
    below: list[np.ndarray] = []
    against: list[np.ndarray] = []
    for place in places.tolist():
        history = held_out.queries[place].history
        scores = ease.model.scores([Query(history=history[-last:])])[0]
        rows = np.setdiff1d(np.flatnonzero(scores < 0), history)
        if len(rows) >= FEWEST_ITEMS:
            kept.append(place)
            below.append(rows)
            against.append(scores[rows])
    texts = [held_out.queries[place].text for place in kept]
    found = {
        name: np.array([_of_encoder(each, texts, below, against) for each in seeds]) for name, seeds in encoders.items()
    }
    return np.array(kept, np.int64), found, sum(map(len, below))


def _of_encoder(
    encoder: Dense, texts: Sequence[str], rows: Sequence[np.ndarray], against: Sequence[np.ndarray]
) -> list[float]:
    """The rank correlation for each query; 0 where all of an encoder's cosines are equal."""
    from scipy.stats import spearmanr

    vectors, documents = encoder.encoder.queries(texts), np.asarray(encoder.embeddings, np.float32)
    out = []
    for vector, chosen, scores in zip(vectors, rows, against, strict=True):
        cosines = documents[chosen] @ vector
        out.append(float(spearmanr(cosines, scores).statistic) if np.ptp(cosines) > 0 and np.ptp(scores) > 0 else 0.0)
    return out


def compared(found: Spearmans, base: str, users: Sequence[str], queries: int, pairs: int) -> dict[str, Any]:
    """The means of rank correlations, and the differences from one of them.

    found: see :func:`correlations`.
    base: the name of the system that the others are compared with.
    users: H labels; whose query it is. Seeds and whole users are resampled.
    queries, pairs: what was compared, for the page.

    Returns plain JSON: `rows`, each with name, mean, low and high, and `difference`, None for ``base``. `rows` is
    empty, and `reason` says why, for fewer than `FEWEST_USERS` users.
    """
    people = len(set(users))
    about = {"queries": queries, "users": people, "pairs": pairs, "base": base}
    if people < FEWEST_USERS:
        reason = (
            f"only {people} users have a held-out query whose text no training pair has, and an interval needs "
            f"{FEWEST_USERS}: set task.params.raw_titles=3, so that queries differ more"
        )
        return {**about, "rows": [], "reason": reason}
    rows = [
        {
            "name": name,
            **over_seeds(values, users),
            "difference": None if name == base else over_seeds(values - found[base], users),
        }
        for name, values in found.items()
    ]
    return {**about, "rows": rows, "reason": None}
