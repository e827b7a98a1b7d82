"""Text embeddings -> M small integers a document: a learned rotation (OPQ) and product quantisation, both by faiss.

Jégou et al. 2011, "Product Quantization for Nearest Neighbor Search": a vector is cut into M pieces, each replaced by
the number of the nearest of K centroids. Ge et al. 2013, "Optimized Product Quantization": turn the space first, so
that the pieces are independent and equally full. faiss learns; assigning is plain numpy, so opening needs no faiss.

Shapes: n documents, d dimensions of the text embedding, M codes a document, K = 2^bits centroids a code.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrievers.encoders.sentence import INSTALL
from retrievers.types import RetrieverError

VECTORS_PER_CENTROID = 39  # vectors a centroid wants, says faiss (ClusteringParameters.min_points_per_centroid)
MIN_BITS, MAX_BITS = 2, 8  # bits, at least and at most: a code is one byte
OPQ_ITERATIONS = (
    20  # of OPQ's alternation; 50, faiss' default, takes 2.5 times as long and lowers the error by less than 1%
)
MAX_TRAINING_VECTORS = 200_000  # documents that a codebook is learned on, at most
CHUNK = 4096  # documents assigned at a time: one shape but for the last, so that equal texts get equal codes


class Codebook(NamedTuple):
    """rotation: (d, d) float32, orthonormal. centroids: (M, K, d / M) float32."""

    rotation: np.ndarray
    centroids: np.ndarray

    def save(self, folder: Path) -> None:
        """codebook.npz in ``folder``."""
        np.savez(folder / "codebook.npz", rotation=self.rotation, centroids=self.centroids)

    @classmethod
    def load(cls, folder: Path) -> Codebook:
        """What :meth:`save` wrote. Raises ValueError or OSError where it is damaged."""
        found = arrays(folder / "codebook.npz")
        if set(found) != set(cls._fields):
            raise ValueError(f"codebook.npz holds {sorted(found)}, not {sorted(cls._fields)}")
        return cls(**found)


def bits_for(documents: int) -> int:
    """Bits a code: as many as ``documents`` fill, at VECTORS_PER_CENTROID a centroid."""
    return int(np.clip(np.log2(max(1, documents) / VECTORS_PER_CENTROID), MIN_BITS, MAX_BITS))


def learn(vectors: np.ndarray, codes: int, bits: int) -> Codebook:
    """(n, d) floats -> the codebook of ``codes`` codes with ``bits`` bits. The same vectors give the same one.

    Raises ValueError where ``codes`` does not divide d; RetrieverError without faiss.
    """
    d = vectors.shape[1]
    check_codes(codes, d)
    faiss = _import_faiss()
    sample = np.sort(
        np.random.default_rng(0).choice(len(vectors), min(len(vectors), MAX_TRAINING_VECTORS), replace=False)
    )
    # A tiny catalogue is repeated: faiss refuses to make more centroids than it gets vectors, and OPQ of faiss 1.15
    # writes past its memory for fewer vectors than dimensions.
    sample = np.tile(sample, math.ceil(max(2**bits, d) / len(sample)))
    x = np.ascontiguousarray(vectors[sample], np.float32)
    opq = faiss.OPQMatrix(d, codes)
    opq.niter = OPQ_ITERATIONS
    opq.pq = _quantizer(faiss, d, codes, bits)  # else of 256 centroids, however few the vectors
    opq.train(x)
    rotation = faiss.vector_to_array(opq.A).reshape(d, d).copy()
    quantizer = _quantizer(faiss, d, codes, bits)
    quantizer.train(x @ rotation.T)
    centroids = faiss.vector_to_array(quantizer.centroids).reshape(codes, 2**bits, d // codes).copy()
    return Codebook(rotation, centroids)


def assign(book: Codebook, vectors: np.ndarray) -> np.ndarray:
    """(n, d) floats -> (n, M) uint8: the nearest centroid of every piece, the first where two are as near."""
    pieces, _, width = book.centroids.shape
    squares = (book.centroids**2).sum(2)  # (M, K)
    codes = np.empty((len(vectors), pieces), np.uint8)
    for start in range(0, len(vectors), CHUNK):
        part = vectors[start : start + CHUNK]
        turned = np.zeros((CHUNK, pieces * width), np.float32)
        turned[: len(part)] = part
        turned = (turned @ book.rotation.T).reshape(CHUNK, pieces, width)
        for m in range(pieces):  # |x - c|² less |x|², which no choice changes
            distances = squares[m] - 2 * (turned[:, m] @ book.centroids[m].T)
            codes[start : start + len(part), m] = distances[: len(part)].argmin(1)
    return codes


def check_codes(codes: int, dimensions: int) -> None:
    """Raises ValueError where a vector of ``dimensions`` cannot be cut into ``codes`` pieces."""
    if dimensions % codes:
        possible = ", ".join(str(m) for m in range(1, min(dimensions, 64) + 1) if dimensions % m == 0)
        raise ValueError(
            f"retriever.params.codes: {codes} does not divide the {dimensions} dimensions of the text embedding: "
            f"choose from {possible}"
        )


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an npz file. Raises ValueError or OSError for a damaged one, whatever numpy raises."""
    try:
        with np.load(path) as found:
            return {name: found[name] for name in found.files}
    except (zipfile.BadZipFile, EOFError, KeyError) as error:
        raise ValueError(f"{path.name} is no npz file ({error})") from error


def _quantizer(faiss: Any, d: int, codes: int, bits: int) -> Any:
    quantizer = faiss.ProductQuantizer(d, codes, bits)
    quantizer.cp.min_points_per_centroid = 1  # a small catalogue is no reason to write warnings
    return quantizer


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise RetrieverError(f"vqrec needs its extra (faiss-cpu is missing): {INSTALL}") from error
    return faiss
