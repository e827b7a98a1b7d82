"""Scores of items for one user's personas.

A score is a convex combination of what the personas say. All items are scored: a threshold algorithm (Fagin, Lotem and
Naor 2003), which scores only those that the most pleased persona puts high enough, was measured and was slower at every
size up to 500,000 items, since the attention that it saves is cheaper than the sparse reading that it needs.

A score must be the same bits whatever else is asked for. Products therefore go through blocks of BLOCK items, all of
one shape, and the rest is elementwise, with the personas added up one after another.
"""

from __future__ import annotations

import numpy as np

BLOCK = 16


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
    most that is said, whatever the rounding."""
    most = logits.max(0)
    total, mixture = np.zeros_like(most), np.zeros_like(most)
    for said, logit in zip(each, logits, strict=True):
        weight = np.exp(logit - most)
        total += weight
        mixture += weight * said
    return np.clip(mixture / total, each.min(0), each.max(0))
