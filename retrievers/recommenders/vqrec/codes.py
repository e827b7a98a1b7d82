"""Codes of text embeddings: M small integers per item, by optimised product quantisation (OPQ).

Product quantisation (Jégou et al. 2011, "Product Quantization for Nearest Neighbor Search") splits a vector into M
pieces, and replaces each piece by the number of the nearest of K centroids. OPQ (Ge et al. 2013, "Optimized Product
Quantization") first rotates the space, so that the pieces are independent and have similar variances. faiss learns
rotation and centroids. Codes are assigned with numpy, so that opening a fitted model needs no faiss.

Shapes: n items, d dimensions of the text embedding, M codes per item, K = 2^bits centroids per code.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrievers.encoders.files import INSTALL
from retrievers.types import RetrieverError

VECTORS_PER_CENTROID = 39  # faiss recommends at least so many (ClusteringParameters.min_points_per_centroid).
MIN_BITS, MAX_BITS = 2, 8  # The range of `bits_for`. A code is stored as one byte.
OPQ_ITERATIONS = 20  # 50, the default of faiss, takes 2.5 times as long and lowers the error by less than 1%.
MAX_TRAINING_VECTORS = 200_000  # A codebook is learned from at most so many vectors.
CHUNK = (
    4096  # Codes are assigned to so many items at a time, always in this shape, so that equal texts get equal codes.
)


class Codebook(NamedTuple):
    """A learned quantiser.

    rotation: (d, d) float32, orthonormal.
    centroids: (M, K, d / M) float32.
    """

    rotation: np.ndarray
    centroids: np.ndarray

    def save(self, folder: Path) -> None:
        """Write codebook.npz into ``folder``."""
        np.savez(folder / "codebook.npz", rotation=self.rotation, centroids=self.centroids)

    @classmethod
    def load(cls, folder: Path) -> Codebook:
        """Load what :meth:`save` wrote into ``folder``. Raises ValueError or OSError where the file is damaged."""
        found = arrays(folder / "codebook.npz")
        if set(found) != set(cls._fields):
            raise ValueError(f"codebook.npz holds {sorted(found)}, not {sorted(cls._fields)}")
        return cls(**found)


def bits_for(documents: int) -> int:
    """The bits per code for a number of items: the most for which a centroid has VECTORS_PER_CENTROID items, 2 to 8."""
    return int(np.clip(np.log2(max(1, documents) / VECTORS_PER_CENTROID), MIN_BITS, MAX_BITS))


def learn(vectors: np.ndarray, codes: int, bits: int) -> Codebook:
    """Learn a codebook. The result is deterministic.

    vectors: (n, d) floats.
    codes: M.
    bits: the bits per code.

    Raises ValueError where M does not divide d, and RetrieverError where faiss is not installed.
    """
    d = vectors.shape[1]
    check_codes(codes, d)
    faiss = _import_faiss()
    sample = np.sort(
        np.random.default_rng(0).choice(len(vectors), min(len(vectors), MAX_TRAINING_VECTORS), replace=False)
    )
    # The vectors of a small catalogue are repeated: faiss needs at least as many vectors as centroids, and OPQ in
    # faiss 1.15 writes beyond its memory where there are fewer vectors than dimensions.
    sample = np.tile(sample, math.ceil(max(2**bits, d) / len(sample)))
    x = np.ascontiguousarray(vectors[sample], np.float32)
    opq = faiss.OPQMatrix(d, codes)
    opq.niter = OPQ_ITERATIONS
    opq.pq = _quantizer(faiss, d, codes, bits)  # Otherwise faiss takes 256 centroids, however few vectors there are.
    opq.train(x)
    rotation = faiss.vector_to_array(opq.A).reshape(d, d).copy()
    quantizer = _quantizer(faiss, d, codes, bits)
    quantizer.train(x @ rotation.T)
    centroids = faiss.vector_to_array(quantizer.centroids).reshape(codes, 2**bits, d // codes).copy()
    return Codebook(rotation, centroids)


def assign(book: Codebook, vectors: np.ndarray) -> np.ndarray:
    """The codes of n vectors: (n, M) uint8, the nearest centroid of each piece, and the first of equally near ones.

    vectors: (n, d) floats.
    """
    pieces, _, width = book.centroids.shape
    squares = (book.centroids**2).sum(2)  # (M, K)
    codes = np.empty((len(vectors), pieces), np.uint8)
    for start in range(0, len(vectors), CHUNK):
        part = vectors[start : start + CHUNK]
        turned = np.zeros((CHUNK, pieces * width), np.float32)
        turned[: len(part)] = part
        turned = (turned @ book.rotation.T).reshape(CHUNK, pieces, width)
        for m in range(pieces):  # |x - c|² without |x|², which is the same for all centroids.
            distances = squares[m] - 2 * (turned[:, m] @ book.centroids[m].T)
            codes[start : start + len(part), m] = distances[: len(part)].argmin(1)
    return codes


def check_codes(codes: int, dimensions: int) -> None:
    """Raises ValueError where a vector of ``dimensions`` cannot be split into ``codes`` equal pieces."""
    if dimensions % codes:
        possible = ", ".join(str(m) for m in range(1, min(dimensions, 64) + 1) if dimensions % m == 0)
        raise ValueError(
            f"retriever.params.codes: {codes} does not divide the {dimensions} dimensions of the text embedding: "
            f"choose from {possible}"
        )


def arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file. Raises ValueError or OSError for a damaged file."""
    try:
        with np.load(path) as found:
            return {name: found[name] for name in found.files}
    except (zipfile.BadZipFile, EOFError, KeyError) as error:
        raise ValueError(f"{path.name} is not a valid npz file ({error})") from error


def _quantizer(faiss: Any, d: int, codes: int, bits: int) -> Any:
    quantizer = faiss.ProductQuantizer(d, codes, bits)
    quantizer.cp.min_points_per_centroid = 1  # This silences faiss' warning about small catalogues.
    return quantizer


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise RetrieverError(f"retriever.kind: vqrec needs faiss-cpu, which is not installed: {INSTALL}") from error
    return faiss
