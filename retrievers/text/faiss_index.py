"""Approximate search by faiss: an index of embeddings, made of a factory string."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrievers.encoders.files import INSTALL
from retrievers.types import RetrieverError

MIN_TRAINING_VECTORS = 2_000  # A faiss index is trained on at least so many vectors, repeated ones for few documents.
MAX_TRAINING_VECTORS = 200_000  # A faiss index is trained on at most so many vectors.


def trained(embeddings: np.ndarray, factory: str) -> Any:
    """An index of faiss that holds all embeddings.

    embeddings: (n, d) float16.
    factory: the factory string of the index, such as HNSW32.

    Raises ValueError for a factory that does not exist or does not fit.
    """
    faiss = import_faiss()
    n, d = embeddings.shape
    try:
        index = faiss.index_factory(d, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            sample = np.sort(np.random.default_rng(0).choice(n, min(n, MAX_TRAINING_VECTORS), replace=False))
            # The vectors of a small catalogue are repeated, because faiss needs at least as many vectors as centroids.
            sample = np.resize(sample, max(len(sample), MIN_TRAINING_VECTORS))
            index.train(embeddings[sample].astype(np.float32))
        for start in range(0, n, 65_536):
            index.add(embeddings[start : start + 65_536].astype(np.float32))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].rsplit("failed: ", 1)[-1]
        raise ValueError(
            f"retriever.params.factory: {factory!r} does not fit {n} documents of {d} dimensions ({reason}): "
            "choose another factory, such as Flat or HNSW32"
        ) from error
    return index


def import_faiss() -> Any:
    """The module faiss. Raises RetrieverError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise RetrieverError(
            f"retriever.params.engine: faiss needs faiss-cpu, which is not installed: {INSTALL}"
        ) from error
    return faiss
