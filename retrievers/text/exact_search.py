"""Exact inner products of queries with a memory-mapped matrix of embeddings, on CPU or GPU.

The products are computed in chunks of documents, so that the Q x n matrix of scores is never in memory as a whole. The
product of two vectors must be bitwise equal in `search` and in `ranks`, for one query and for a batch. All products are
therefore computed by `products`, which only uses shapes for which the library adds in one order.

Shapes: n documents, d dimensions, Q queries, T targets per query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

CHUNK = 4096  # Documents per chunk on a CPU. For larger results, the memory is requested from the system each time.
GPU_CHUNK = 1 << 16  # Documents per chunk on a GPU.
ALIGN = 16  # Sizes are padded to multiples of this. Below 8 queries or 16 documents, MKL adds in another order.
# The largest error of a float32 inner product, as a multiple of sqrt(dimensions) |q| |d|: four times the unit roundoff
# (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis").
ROUNDING_MARGIN = 4 * 2.0**-24


class Exact:
    """Exact search and exact ranks by inner product.

    embeddings: (n, d) float16. On a GPU, the whole matrix stays in its memory if it takes less than half of the free
        memory. Otherwise chunks are copied to the GPU each time.
    device: a torch device. None, the default, = a GPU where there is one.
    """

    def __init__(self, embeddings: np.ndarray, device: str | None = None) -> None:
        self.embeddings = embeddings
        self.device = device_of(device)
        self.chunk = GPU_CHUNK if self.device.type == "cuda" else CHUNK
        self._resident = resident(embeddings, self.device)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of each query: (Q, k) int32 rows, best first, and (Q, k) float32 scores.

        queries: (Q, d) float32.
        k: at most n.

        Of equal scores, the smaller row comes first.
        """
        import torch

        best = torch.empty((len(queries), 0), dtype=torch.int64, device=self.device)
        for start, scores in self._chunks(queries):
            if best.shape[1] == k:  # Most chunks contain no better document for most queries; these are skipped.
                due = torch.nonzero(scores.amax(1) >= _scores_of_keys(best[:, -1])).flatten()
            else:
                due = torch.arange(len(queries), device=self.device)
            if not len(due):
                continue
            # One integer per document, in the order of scores and then of rows. All are distinct, so topk has no ties.
            rows = torch.arange(start, start + scores.shape[1], device=self.device)
            keys = torch.cat([best[due], (_sortable_keys(scores[due]) << 32) | (0xFFFFFFFF - rows)], 1)
            top = keys.topk(min(k, keys.shape[1]), dim=1).values
            best = top if best.shape[1] < top.shape[1] else best.index_copy(0, due, top)
        rows = 0xFFFFFFFF - (best & 0xFFFFFFFF)
        return rows.to(torch.int32).cpu().numpy(), _scores_of_keys(best).cpu().numpy()

    def ranks(self, queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The ranks of the targets: (Q, T) int32, counted from 1; 0 = padding.

        queries: (Q, d) float32.
        targets: (Q, T) integer rows; -1 = padding.

        This takes one pass over the embeddings. The score of a target is first computed up to rounding. Documents that
        are certainly above it are counted. The few whose scores are within the rounding error, with the target itself,
        are kept and compared at the end.
        """
        import torch

        if self.device.type == "cuda":
            queries = queries.astype(np.float16).astype(np.float32)  # `products` rounds them so on a GPU.
        near: list[list[np.ndarray]] = [[] for _ in range(targets.shape[1])]
        above = np.zeros(targets.shape, np.int64)
        columns: list[tuple[np.ndarray, Any, Any, Any]] = []
        for t in range(targets.shape[1]):
            asked = np.flatnonzero(targets[:, t] >= 0)
            vectors = np.asarray(self.embeddings[targets[asked, t]], np.float64)
            mine = queries[asked].astype(np.float64)
            about, margin = np.einsum("qd,qd->q", mine, vectors), ROUNDING_MARGIN * np.sqrt(mine.shape[1])
            margin = margin * np.linalg.norm(mine, axis=1) * np.linalg.norm(vectors, axis=1)
            low, high = (
                torch.from_numpy(x.astype(np.float32)).to(self.device)[:, None]
                for x in (about - margin, about + margin)
            )
            columns.append((asked, torch.from_numpy(asked).to(self.device), low, high))
        for start, scores in self._chunks(queries):
            for t, (asked, index, low, high) in enumerate(columns):
                if not len(asked):
                    continue
                mine = scores if len(asked) == len(queries) else scores[index]
                sure, possible = _count(mine > high), _count(mine >= low)
                above[asked, t] += sure.cpu().numpy()
                unsure = torch.nonzero(possible > sure).flatten()
                if len(unsure):
                    part = mine[unsure]
                    place, row = torch.nonzero((part >= low[unsure]) & (part <= high[unsure]), as_tuple=True)
                    found = (unsure[place].double(), row.double() + start, part[place, row].double())
                    near[t].append(torch.stack(found, 1).cpu().numpy())
        ranks = np.zeros(targets.shape, np.int32)
        for t, (asked, *_) in enumerate(columns):
            if len(asked):
                ranks[asked, t] = 1 + above[asked, t] + _count_above(np.concatenate(near[t]), targets[asked, t])
        return ranks

    def scores_of(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The scores of m documents for one query: (m,) float32, bitwise equal to those of the other methods.

        query: (d,) float32.
        rows: (m,) integers.
        """
        import torch

        vectors = torch.from_numpy(np.asarray(self.embeddings[rows])).to(self.device)
        return np.asarray(products(padded_rows(query[None], self.device), vectors)[0].cpu().numpy())

    def _chunks(self, queries: np.ndarray) -> Iterator[tuple[int, Any]]:
        """Yield the first row of each chunk of documents, and the scores of the chunk, (Q, up to `chunk`) float32."""
        padded = padded_rows(queries, self.device)
        for start in range(0, len(self.embeddings), self.chunk):
            chunk = rows_on_device(self.embeddings, self._resident, start, start + self.chunk, self.device)
            yield start, products(padded, chunk)[: len(queries)]


def device_of(device: str | None) -> Any:
    """The torch.device that is named, or a GPU where there is one."""
    import torch

    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def resident(embeddings: np.ndarray, device: Any) -> Any:
    """The whole matrix in the memory of a GPU if it takes less than half of the free memory there; else None."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if embeddings.nbytes < free / 2:
            return torch.from_numpy(np.asarray(embeddings)).to(device)
    return None


def rows_on_device(embeddings: np.ndarray, there: Any, start: int, stop: int, device: Any) -> Any:
    """The rows ``start`` to ``stop`` of a matrix as a tensor on the device. there: what :func:`resident` returned."""
    import torch

    if there is not None:
        return there[start:stop]
    return torch.from_numpy(np.array(embeddings[start:stop])).to(device)


def padded_rows(queries: np.ndarray, device: Any) -> Any:
    """A (Q, d) float32 matrix as a tensor on the device, padded with zeros to a multiple of ALIGN rows."""
    import torch

    padded = np.zeros((-(-max(1, len(queries)) // ALIGN) * ALIGN, queries.shape[1]), np.float32)
    padded[: len(queries)] = queries
    return torch.from_numpy(padded).to(device)


def products(queries: Any, documents: Any) -> Any:
    """The inner products of (padded Q, d) float32 queries and (m, d) float16 documents: (padded Q, m) float32."""
    import torch

    missing = -len(documents) % ALIGN
    aligned = torch.nn.functional.pad(documents, (0, 0, 0, missing)) if missing else documents
    if documents.device.type == "cuda":  # The matrix units of a GPU multiply half-precision numbers and add in float32.
        scores = torch.mm(queries.to(aligned.dtype), aligned.T, out_dtype=torch.float32)
    else:
        scores = queries @ aligned.float().T
    return scores[:, : len(documents)]


def _count(mask: Any) -> Any:
    """The number of True values in each row of a (Q, m) bool tensor: (Q,) int32.

    The mask is summed as bytes, because torch first turns bools into 64-bit integers.
    """
    import torch

    return mask.view(torch.uint8).sum(1, dtype=torch.int32)


def _count_above(near: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """For each query, the number of documents in ``near`` that are above its target: (Q,) int64.

    near: (m, 3) float64 with the columns query, row and score. It contains the targets themselves.
    targets: (Q,) rows.
    """
    query, row, score = near[:, 0].astype(np.int64), near[:, 1].astype(np.int64), near[:, 2]
    own = np.full(len(targets), np.nan)
    itself = row == targets[query]
    own[query[itself]] = score[itself]
    if np.isnan(own).any():
        raise RuntimeError("the score of a target is off by more than its rounding error: please report this")
    beats = (score > own[query]) | ((score == own[query]) & (row < targets[query]))
    return np.bincount(query[beats], minlength=len(targets))


def _sortable_keys(scores: Any) -> Any:
    """Map float32 scores to int64 keys that have the same order. -0 becomes 0.

    The bits of non-negative floats have the order of their values; those of negative floats have the reverse order.
    """
    import torch

    bits = (scores + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _scores_of_keys(keys: Any) -> Any:
    """The float32 scores in the upper 32 bits of keys that were made with :func:`_sortable_keys`."""
    import torch

    bits = keys >> 32
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int32).view(torch.float32)
