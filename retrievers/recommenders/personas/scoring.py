"""The scores of all items for the personas of one user.

A score is a convex combination of the scores of the single personas. All items are scored. A threshold algorithm
(Fagin, Lotem and Naor 2003), which scores only items that rank high enough for their best persona, was measured to be
slower at every size up to 500,000 items, because its scattered reads cost more than the attention that it saves.

A score must be bitwise equal, whichever other items are scored. Products are therefore computed in blocks of BLOCK
items, which all have the same shape. Everything else is elementwise, and the personas are added one after another.
"""

from __future__ import annotations

import numpy as np

BLOCK = 16  # Items per block.


class Items:
    """The m items that are scored.

    vectors: (m, d + 1) float32, with the bias in the last column.
    keys: (m, d) float32, of unit length.
    """

    def __init__(self, vectors: np.ndarray, keys: np.ndarray) -> None:
        self.m = len(vectors)
        self._vectors, self._keys = _blocks(vectors), _blocks(keys)

    def scores(self, personas: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The scores of all items: (m,) float32.

        personas: (P, d + 1) float32, with 1 in the last column.
        keys: (P, d) float32, multiplied by the factor of the attention.
        """
        return _mixed(_products(personas, self._vectors), _products(keys, self._keys))[: self.m]

    def attention(self, keys: np.ndarray, item: int) -> np.ndarray:
        """The attention of each persona to one item: (P,) float32. It sums to 1."""
        logits = _products(keys, self._keys[item // BLOCK][None])[:, item % BLOCK]
        weights = np.exp(logits - logits.max())
        return np.asarray(weights / weights.sum())


def _blocks(vectors: np.ndarray) -> np.ndarray:
    """Split (m, d) vectors into blocks, (ceil(m / BLOCK), d, BLOCK). The last block is padded with zeros."""
    padded = np.zeros((-(-max(1, len(vectors)) // BLOCK) * BLOCK, vectors.shape[1]), np.float32)
    padded[: len(vectors)] = vectors
    return np.ascontiguousarray(padded.reshape(-1, BLOCK, vectors.shape[1]).transpose(0, 2, 1))


def _products(left: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """The products of (P, d) vectors with (N, d, BLOCK) blocks: (P, N * BLOCK) float32."""
    return np.ascontiguousarray(np.matmul(left, blocks).transpose(1, 0, 2)).reshape(len(left), -1)


def _mixed(each: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The mean of the personas' scores, weighted by attention: (M,) float32.

    each: (P, M), the score of each item for each persona.
    logits: (P, M), the logits of the attention.

    The result is clipped to the range of ``each``, because rounding could otherwise exceed it.
    """
    most = logits.max(0)
    total, mixture = np.zeros_like(most), np.zeros_like(most)
    for score, logit in zip(each, logits, strict=True):
        weight = np.exp(logit - most)
        total += weight
        mixture += weight * score
    return np.clip(mixture / total, each.min(0), each.max(0))
