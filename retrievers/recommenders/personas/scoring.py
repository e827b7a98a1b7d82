"""Scores of items for one user's personas, and the exact best k of them without scoring all.

A score is a convex combination of what the personas say, so none is above what the most pleased of them says. That is
the bound of a threshold algorithm (Fagin, Lotem and Naor 2003, "Optimal aggregation algorithms for middleware"):
merge the personas' lists, best first, score what comes up first, and then all that the k-th best of those does not
beat. Measured (tests/benchmarks/personas.py): at no size up to 500,000 items is it faster than scoring them all, since
the attention that it saves is cheaper than the sparse reading that it needs. So the backend scores all, and this is for
who pays more for an item's attention.

A score must be the same bits in `scores` and in `top_k`. Products therefore go through blocks of BLOCK items, all of
one shape whatever else is asked for, and the rest is elementwise, with the personas added up one after another.
"""

from __future__ import annotations

import numpy as np

from retrievers.core.ranking import top

BLOCK = 16
FIRST = 4  # times k items are scored in the first round,
LEAST = 256  # and at least so many


class Items:
    """m items: (m, d + 1) float32 vectors with a bias, and (m, d) keys of length 1."""

    def __init__(self, vectors: np.ndarray, keys: np.ndarray) -> None:
        self.m = len(vectors)
        self._vectors, self._keys = _blocks(vectors), _blocks(keys)

    def scores(self, personas: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """(P, d + 1) personas, the last column 1, and (P, d) keys times the sharpness, float32 -> (m,) float32."""
        return _mixed(_products(personas, self._vectors), _products(keys, self._keys))[: self.m]

    def attention(self, keys: np.ndarray, item: int) -> np.ndarray:
        """(P,) float32: how much each persona has to say about an item; adds up to 1."""
        logits = _products(keys, self._keys[item // BLOCK][None])[:, item % BLOCK]
        weights = np.exp(logits - logits.max())
        return np.asarray(weights / weights.sum())

    def top_k(self, personas: np.ndarray, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The first k of :meth:`scores`: (k,) int32 items, best first, ties by item, -1 behind the last; their scores;
        and how many items were scored, whose attention alone is computed."""
        each = _products(personas, self._vectors)
        bound = each.max(0)
        bound[self.m :] = -np.inf
        size = max(FIRST * k, LEAST)
        blocks = np.arange(len(self._vectors))
        if size < self.m:
            first = np.unique(np.argpartition(-bound, size)[:size] // BLOCK)
            _, scores = top(self._some(each, keys, first), k, -np.inf)
            # An equal bound may be an equal score of an earlier item.
            blocks = np.unique(np.flatnonzero(bound >= scores[-1]) // BLOCK)
        order, best = top(self._some(each, keys, blocks), k, -np.inf)
        rows, values = np.full(k, -1, np.int32), np.full(k, -np.inf, np.float32)
        rows[: len(order)] = np.where(order >= 0, blocks[order // BLOCK] * BLOCK + order % BLOCK, -1)
        values[: len(best)] = best
        return rows, values, len(blocks) * BLOCK

    def _some(self, each: np.ndarray, keys: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """The scores of these blocks' items, (len(blocks) * BLOCK,), -inf for padding."""
        places = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        found = _mixed(each[:, places], _products(keys, self._keys[blocks]))
        found[places >= self.m] = -np.inf
        return found


def _blocks(vectors: np.ndarray) -> np.ndarray:
    """(m, d) -> (ceil(m / BLOCK), d, BLOCK), zeros behind the last."""
    padded = np.zeros((-(-max(1, len(vectors)) // BLOCK) * BLOCK, vectors.shape[1]), np.float32)
    padded[: len(vectors)] = vectors
    return np.ascontiguousarray(padded.reshape(-1, BLOCK, vectors.shape[1]).transpose(0, 2, 1))


def _products(left: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """(P, d) and (N, d, BLOCK) -> (P, N * BLOCK) float32."""
    return np.ascontiguousarray(np.matmul(left, blocks).transpose(1, 0, 2)).reshape(len(left), -1)


def _mixed(each: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """(P, M) what the personas say and (P, M) logits of their attention -> (M,) float32, between the least and the
    most that is said: rounding must not break the bound."""
    most = logits.max(0)
    total, mixture = np.zeros_like(most), np.zeros_like(most)
    for said, logit in zip(each, logits, strict=True):
        weight = np.exp(logit - most)
        total += weight
        mixture += weight * said
    return np.clip(mixture / total, each.min(0), each.max(0))
