"""Exact inner products of queries with a memory-mapped matrix of embeddings, in chunks, on CPU or GPU.

Never the whole Q x n matrix at once. A product of two vectors must come out the same in `search` and in `ranks`,
alone or in a batch, so all go through `_products`, which keeps to shapes for which the library sums in one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

CHUNK = 8192  # documents at a time: 12 MB of scores for 384 queries
ALIGN = 16  # below 8 queries or 16 documents MKL takes kernels that sum in another order; measured
MARGIN = 1e-5  # of |q| |d|: how far a float32 inner product may be from the true one, generously


class Exact:
    """Scores over embeddings, (n, d) float16. On a GPU the matrix is kept there if it takes less than half of what
    is free, else chunks are sent."""

    def __init__(self, embeddings: np.ndarray, device: str | None = None) -> None:
        import torch

        self.embeddings = embeddings
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
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

        close: list[list[tuple[float, int]]] = [[] for _ in range(targets.size)]
        above = np.zeros(targets.shape, np.int64)
        columns: list[tuple[np.ndarray, Any, Any, Any]] = []
        for t in range(targets.shape[1]):
            asked = np.flatnonzero(targets[:, t] >= 0)
            vectors = np.asarray(self.embeddings[targets[asked, t]], np.float32)
            about = np.einsum("qd,qd->q", queries[asked], vectors)
            margin = MARGIN * np.linalg.norm(queries[asked], axis=1) * np.linalg.norm(vectors, axis=1)
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
                sure, possible = (mine > high).sum(1), (mine >= low).sum(1)
                above[asked, t] += sure.cpu().numpy()
                for i in torch.nonzero(possible > sure).flatten().tolist():
                    near = torch.nonzero((mine[i] >= low[i]) & (mine[i] <= high[i])).flatten()
                    place = int(asked[i]) * targets.shape[1] + t
                    close[place] += zip(mine[i][near].tolist(), (near + start).tolist(), strict=True)
        ranks = np.zeros(targets.shape, np.int32)
        for place, candidates in enumerate(close):
            q, t = divmod(place, targets.shape[1])
            row = int(targets[q, t])
            if row >= 0:
                own = next(score for score, other in candidates if other == row)
                ranks[q, t] = 1 + above[q, t] + sum(s > own or (s == own and r < row) for s, r in candidates)
        return ranks

    def some(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(d,) and (m,) rows -> (m,) float32 scores, the same bits as in the other two."""
        import torch

        vectors = torch.from_numpy(np.asarray(self.embeddings[rows])).to(self.device)
        return np.asarray(self._products(self._queries(query[None]), vectors)[0].cpu().numpy())

    def _chunks(self, queries: np.ndarray) -> Iterator[tuple[int, Any]]:
        """(first row, (Q, up to CHUNK) float32 scores), chunk by chunk."""
        import torch

        padded = self._queries(queries)
        for start in range(0, len(self.embeddings), CHUNK):
            if self._resident is not None:
                chunk = self._resident[start : start + CHUNK]
            else:
                chunk = torch.from_numpy(np.array(self.embeddings[start : start + CHUNK])).to(self.device)
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
