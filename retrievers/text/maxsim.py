"""Exact late interaction of queries with all documents of a catalogue, on CPU or GPU.

MaxSim(query, document) = sum over the tokens of the query of the largest inner product with a token of the document
(ColBERT, Khattab and Zaharia 2020, arXiv:2004.12832).

Documents are stored in the order of their numbers of tokens, so that a chunk of documents with L tokens each is a plain
(m * L, d) matrix, whose products are reduced by (m, L). The products have the shapes of `exact_search`, in which the
library adds in one order. The sum over the tokens of a query is made in float64, where its rounding is far below that
of float32. So a score does not depend on which other queries are asked with it.

Shapes: n documents, u different texts, d dimensions, Q queries, t tokens of a query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from retrievers.text.exact_search import device_of, padded_rows, products, resident, rows_on_device

CHUNK = 4096  # Tokens of documents per chunk on a CPU.
GPU_CHUNK = 1 << 16  # Tokens of documents per chunk on a GPU.
QUERY_TOKENS = 1024  # So many tokens of queries are multiplied at once, unless one query has more.
MAX_SCORES = 1 << 26  # So many scores are in memory at once, 256 MB, unless those of one query are more.


class MaxSim:
    """The scores of all documents.

    tokens: (T, d) float16, the embeddings of the tokens of the u texts, one text after the other.
    lengths: (u,) integers, the number of tokens of each text, in ascending order. They sum to T.
    place: (n,) integers from 0 to u - 1, the text of each document. Documents with the same text share its tokens.
    device: a torch device. None, the default, = a GPU where there is one.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, place: np.ndarray, device: str | None = None) -> None:
        self.tokens, self.lengths, self.place = tokens, lengths, place
        self.device = device_of(device)
        self._resident = resident(tokens, self.device)

    def blocks(self, queries: Sequence[np.ndarray]) -> Iterator[slice]:
        """Yield the slices of ``queries`` that :meth:`scores` takes with bounded memory."""
        first, longest = 0, 0
        for q, query in enumerate(queries):
            longest = max(longest, len(query))
            count = q + 1 - first
            if q > first and (count * longest > QUERY_TOKENS or count * len(self.place) > MAX_SCORES):
                yield slice(first, q)
                first, longest = q, len(query)
        if len(queries):
            yield slice(first, len(queries))

    def scores(self, queries: Sequence[np.ndarray]) -> np.ndarray:
        """The MaxSim of each query with each document: (Q, n) float32.

        queries: Q arrays (t, d) float32, with another t for each.

        A document without tokens, and every document for a query without tokens, has the score -inf: nothing matches.
        """
        import torch

        longest = max((len(query) for query in queries), default=0)
        # A row of zeros has the largest product 0, so that it adds nothing to the score of a shorter query.
        asked = np.zeros((len(queries), longest, self.tokens.shape[1]), np.float32)
        for q, query in enumerate(queries):
            asked[q, : len(query)] = query
        out = np.full((len(queries), len(self.lengths)), -np.inf, np.float32)
        if longest:
            rows = padded_rows(asked.reshape(-1, asked.shape[2]), self.device)
            for first, last, length, chunk in self._chunks():
                found = products(rows, chunk)[: len(queries) * longest]
                best = found.reshape(len(queries), longest, last - first, length).amax(3)
                out[:, first:last] = best.sum(1, dtype=torch.float64).float().cpu().numpy()
        out[[len(query) == 0 for query in queries]] = -np.inf
        return out[:, self.place]

    def _chunks(self) -> Iterator[tuple[int, int, int, Any]]:
        """Yield (first text, last text + 1, their number of tokens, their tokens on the device)."""
        size = GPU_CHUNK if self.device.type == "cuda" else CHUNK
        start = 0
        values, counts = np.unique(self.lengths, return_counts=True)
        ends = counts.cumsum()
        for length, end, count in zip(values.tolist(), ends.tolist(), counts.tolist(), strict=True):
            if length == 0:
                continue  # These texts keep the score -inf.
            step = max(1, size // length)
            for first in range(end - count, end, step):
                last = min(end, first + step)
                stop = start + (last - first) * length
                yield first, last, length, rows_on_device(self.tokens, self._resident, start, stop, self.device)
                start = stop
