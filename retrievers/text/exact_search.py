"""Exact inner products of queries with a memory-mapped matrix of embeddings, in chunks, on CPU or GPU.

Never the whole Q x n matrix at once. A product of two vectors must come out the same in `search` and in `ranks`,
alone or in a batch, so all go through `_products`, which keeps to shapes for which the library sums in one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

CHUNK = 4096  # documents at a time on a CPU: larger results are new pages from the kernel, each time
GPU_CHUNK = 1 << 16
ALIGN = 16  # below 8 queries or 16 documents MKL takes kernels that sum in another order; measured
# How far a float32 inner product may be from the true one, of sqrt(dimensions) |q| |d|: four times the unit roundoff
# (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis").
ROUNDING_MARGIN = 4 * 2.0**-24


class Exact:
    """Scores over embeddings, (n, d) float16. On a GPU the matrix is kept there if it takes less than half of what
    is free, else chunks are sent."""

    def __init__(self, embeddings: np.ndarray, device: str | None = None) -> None:
        import torch

        self.embeddings = embeddings
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.chunk = GPU_CHUNK if self.device.type == "cuda" else CHUNK
        self._resident: Any = None
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if embeddings.nbytes < free / 2:
                self._resident = torch.from_numpy(np.asarray(embeddings)).to(self.device)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(Q, d) float32 -> (Q, k) int32 rows, best first, ties by row, and (Q, k) float32 scores; k <= n."""
        import torch

        best = torch.empty((len(queries), 0), dtype=torch.int64, device=self.device)
        for start, scores in self._chunks(queries):
            if best.shape[1] == k:  # most chunks hold nothing for most queries
                due = torch.nonzero(scores.amax(1) >= _score(best[:, -1])).flatten()
            else:
                due = torch.arange(len(queries), device=self.device)
            if not len(due):
                continue
            # One integer a document, ordered by score and then by row: a top-k of these knows no ties.
            rows = torch.arange(start, start + scores.shape[1], device=self.device)
            keys = torch.cat([best[due], (_order(scores[due]) << 32) | (0xFFFFFFFF - rows)], 1)
            top = keys.topk(min(k, keys.shape[1]), dim=1).values
            best = top if best.shape[1] < top.shape[1] else best.index_copy(0, due, top)
        rows = 0xFFFFFFFF - (best & 0xFFFFFFFF)
        return rows.to(torch.int32).cpu().numpy(), _score(best).cpu().numpy()

    def ranks(self, queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """(Q, d) float32 and (Q, T) rows, -1 = padding -> (Q, T) int32 ranks from 1; 0 = padding.

        One pass. A target's score is known up to rounding before its chunk is reached: what is surely above is
        counted, the few that may be are kept, with the target itself among them, and settled at the end.
        """
        import torch

        if self.device.type == "cuda":
            queries = queries.astype(np.float16).astype(np.float32)  # as `_products` takes them there
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
                ranks[asked, t] = 1 + above[asked, t] + _settle(np.concatenate(near[t]), targets[asked, t])
        return ranks

    def some(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(d,) and (m,) rows -> (m,) float32 scores, the same bits as in the other two."""
        import torch

        vectors = torch.from_numpy(np.asarray(self.embeddings[rows])).to(self.device)
        return np.asarray(self._products(self._queries(query[None]), vectors)[0].cpu().numpy())

    def _chunks(self, queries: np.ndarray) -> Iterator[tuple[int, Any]]:
        """(first row, (Q, up to `chunk`) float32 scores), chunk by chunk."""
        import torch

        padded = self._queries(queries)
        for start in range(0, len(self.embeddings), self.chunk):
            if self._resident is not None:
                chunk = self._resident[start : start + self.chunk]
            else:
                chunk = torch.from_numpy(np.array(self.embeddings[start : start + self.chunk])).to(self.device)
            yield start, self._products(padded, chunk)[: len(queries)]

    def _queries(self, queries: np.ndarray) -> Any:
        """Padded with zeros to a multiple of ALIGN rows."""
        import torch

        padded = np.zeros((-(-max(1, len(queries)) // ALIGN) * ALIGN, queries.shape[1]), np.float32)
        padded[: len(queries)] = queries
        return torch.from_numpy(padded).to(self.device)

    def _products(self, queries: Any, documents: Any) -> Any:
        """(padded Q, d) float32 and (m, d) float16 -> (padded Q, m) float32."""
        import torch

        missing = -len(documents) % ALIGN
        aligned = torch.nn.functional.pad(documents, (0, 0, 0, missing)) if missing else documents
        if self.device.type == "cuda":  # half-precision factors, float32 sums: what its matrix units are made for
            scores = torch.mm(queries.to(aligned.dtype), aligned.T, out_dtype=torch.float32)
        else:
            scores = queries @ aligned.float().T
        return scores[:, : len(documents)]


def _count(mask: Any) -> Any:
    """(Q, m) bool -> (Q,) int32; as bytes, since a sum of bools makes 64-bit integers of all of them first."""
    import torch

    return mask.view(torch.uint8).sum(1, dtype=torch.int32)


def _settle(near: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(m, 3) of (query, row, score), the targets themselves among them -> (Q,) how many of these beat the target."""
    query, row, score = near[:, 0].astype(np.int64), near[:, 1].astype(np.int64), near[:, 2]
    own = np.full(len(targets), np.nan)
    itself = row == targets[query]
    own[query[itself]] = score[itself]
    if np.isnan(own).any():
        raise RuntimeError("a target's score came out further from itself than rounding goes: please report this")
    beats = (score > own[query]) | ((score == own[query]) & (row < targets[query]))
    return np.bincount(query[beats], minlength=len(targets))


def _order(scores: Any) -> Any:
    """float32 -> int64 with the same order (the bits of a negative float run backwards; -0 is 0)."""
    import torch

    bits = (scores + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _score(keys: Any) -> Any:
    """The scores of keys made with :func:`_order`, (…) float32."""
    import torch

    bits = keys >> 32
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int32).view(torch.float32)
