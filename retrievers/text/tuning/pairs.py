"""Pairs of a query and a relevant document, drawn for every epoch from interactions or from judgments.

Shapes: E epochs of P pairs, X = E * P pairs in total, D distinct query texts, G groups. A group is a user or a judged
query: no document that the user chose, or that is relevant to the query, is a negative of the group's pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retrievers.interactions import Interactions, Judgments, raw_query

MAX_HISTORY = 50  # So many of the newest items of a history are asked for anti-affinity.


@dataclass(frozen=True)
class HeldOut:
    """The V queries of the validation split.

    texts: V texts.
    left_out: V tuples of rows that rankings leave out, the histories.
    rows: V tuples of rows, the relevant documents.
    """

    texts: Sequence[str] = ()
    left_out: Sequence[tuple[int, ...]] = ()
    rows: Sequence[tuple[int, ...]] = ()


@dataclass(frozen=True)
class Pairs:
    """All pairs of a fit, in the order in which they are used.

    epochs: E.
    texts: D distinct query texts.
    query: (X,) int64 numbers of query texts.
    row: (X,) int64 rows of the relevant documents.
    group: (X,) int64 numbers of groups.
    histories: X tuples of rows, oldest first. () = there are no histories.
    offsets, known: (G + 1,) int64 and (K,) int64; the documents of group g that are no negatives are
        known[offsets[g] : offsets[g + 1]].
    held_out: the validation split.
    """

    epochs: int
    texts: Sequence[str]
    query: np.ndarray
    row: np.ndarray
    group: np.ndarray
    histories: Sequence[tuple[int, ...]]
    offsets: np.ndarray
    known: np.ndarray
    held_out: HeldOut

    def __len__(self) -> int:
        return len(self.row)

    def known_of(self, pair: int) -> np.ndarray:
        """The rows that are no negatives of one pair."""
        group = self.group[pair]
        return self.known[self.offsets[group] : self.offsets[group + 1]]


def from_interactions(
    given: Interactions, titles: Sequence[str], epochs: int, positives: int | None, seed: int, most: int | None = None
) -> Pairs:
    """Pairs of the raw query of a history and the item that the user chose next.

    given: the interactions.
    titles: the titles of the catalogue, of which raw queries are made.
    epochs: E.
    positives: how many pairs of each user an epoch has at most. None = all.
    seed: the seed of the draw.
    most: how many pairs of all users an epoch has at most. None, the default, = all.

    An item that is in its own history already is no positive, because rankings leave the history out.
    """
    sequences = [given.sequence(user) for user in range(len(given))]
    places = []
    for sequence in sequences:
        first = np.unique(sequence, return_index=True)[1]
        places.append(np.sort(first[first > 0]))
    group, place = _draw(places, epochs, positives, most, np.random.default_rng(seed))
    before = [sequences[user][:p] for user, p in zip(group, place, strict=True)]
    texts = [raw_query(titles, history, given.raw_titles) for history in before]
    row = np.array([sequences[user][p] for user, p in zip(group, place, strict=True)], np.int64)
    histories = [tuple(history[-MAX_HISTORY:].tolist()) for history in before]
    held_out = HeldOut(
        [raw_query(titles, history, given.raw_titles) for history in given.validation_histories],
        [tuple(history) for history in given.validation_histories],
        [(target,) for target in given.validation_targets],
    )
    return _pairs(epochs, texts, row, group, histories, sequences, held_out)


def from_judgments(given: Judgments, epochs: int, positives: int | None, seed: int, most: int | None = None) -> Pairs:
    """Pairs of a training query and a document that is relevant to it.

    given, epochs, positives, seed, most: see :func:`from_interactions`; ``positives`` counts the pairs of each query.
    """
    relevant = [np.unique(np.array(rows, np.int64)) for rows in given.rows]
    group, row = _draw(relevant, epochs, positives, most, np.random.default_rng(seed))
    held_out = HeldOut(given.validation_queries, [()] * len(given.validation_queries), given.validation_rows)
    return _pairs(epochs, [given.queries[q] for q in group], row, group, (), relevant, held_out)


def _draw(
    candidates: Sequence[np.ndarray], epochs: int, positives: int | None, most: int | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The groups and the candidates of X pairs: two (X,) int64 arrays.

    candidates: one array per group.
    positives: how many candidates of a group an epoch has at most. None = all.
    most: how many candidates of all groups an epoch has at most. None = all.

    All candidates of a group are used before one is used again, unless ``most`` leaves some out.
    """
    orders = [rng.permutation(own) for own in candidates]
    counts = np.array([len(own) if positives is None else min(positives, len(own)) for own in orders], np.int64)
    groups = np.repeat(np.arange(len(orders)), counts)
    all_groups, all_picked = [], []
    for epoch in range(epochs):
        picked = [
            own[(epoch * m + np.arange(m)) % len(own)] for own, m in zip(orders, counts.tolist(), strict=True) if m
        ]
        flat = np.concatenate([np.zeros(0, np.int64), *picked]).astype(np.int64)
        shuffled = rng.permutation(len(flat))[:most]
        all_groups.append(groups[shuffled])
        all_picked.append(flat[shuffled])
    return np.concatenate(all_groups).astype(np.int64), np.concatenate(all_picked)


def _pairs(
    epochs: int,
    texts: Sequence[str],
    row: np.ndarray,
    group: np.ndarray,
    histories: Sequence[tuple[int, ...]],
    known: Sequence[np.ndarray],
    held_out: HeldOut,
) -> Pairs:
    """Pairs of X texts. Equal texts become one query, and only the groups that have a pair are kept."""
    number = {text: q for q, text in enumerate(dict.fromkeys(texts))}
    query = np.array([number[text] for text in texts], np.int64)
    kept, group = np.unique(group, return_inverse=True)
    lists = [np.unique(known[g]).astype(np.int64) for g in kept.tolist()]
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in lists])]).astype(np.int64)
    flat = np.concatenate([np.zeros(0, np.int64), *lists])
    return Pairs(epochs, list(number), query, row, group.astype(np.int64), histories, offsets, flat, held_out)
