"""What a retriever is fitted on: interactions or judged queries, with the validation split that its settings are chosen
on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.types import Query


@dataclass(frozen=True)
class Interactions:
    """The items of a catalogue that each of U users chose, in order.

    documents: n, the number of items in the catalogue.
    offsets: (U + 1,) int64; the choices of user u are rows[offsets[u] : offsets[u + 1]], oldest first.
    rows: (N,) int32 catalogue rows.
    validation_histories: V histories of catalogue rows, oldest first; default ().
    validation_targets: V catalogue rows; each is the item that the user chose after the history; default ().
    raw_titles: how many titles at the end of a history are its raw query, see :func:`raw_query`; default 1.

    Settings such as λ and the number of epochs are chosen on the validation split; nothing is fitted on it.

        interactions = retrievers.Interactions.from_sequences(3, [[0, 1], [1, 2, 0]], ([(0, 1)], [2]))
        len(interactions)         # 2 users
        interactions.sequence(1)  # array([1, 2, 0], dtype=int32)
    """

    documents: int
    offsets: np.ndarray
    rows: np.ndarray
    validation_histories: Sequence[tuple[int, ...]] = ()
    validation_targets: Sequence[int] = ()
    raw_titles: int = 1

    @classmethod
    def from_sequences(
        cls,
        documents: int,
        sequences: Iterable[Sequence[int]],
        validation: tuple[Sequence[tuple[int, ...]], Sequence[int]] = ((), ()),
        raw_titles: int = 1,
    ) -> Interactions:
        """Interactions from one sequence of catalogue rows per user.

        documents: the number of items in the catalogue.
        sequences: one sequence of rows per user, oldest first.
        validation: the histories and the targets of the validation split.
        raw_titles: how many titles at the end of a history are its raw query. Default 1.

        Raises ValueError for a row outside the catalogue, in the sequences or in the validation split.
        """
        lists = list(sequences)
        offsets = np.concatenate([[0], np.cumsum([len(s) for s in lists], dtype=np.int64)]).astype(np.int64)
        rows = _joined(lists, documents)
        _joined([*validation[0], validation[1]], documents)
        return cls(documents, offsets, rows, *validation, raw_titles)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sequence(self, user: int) -> np.ndarray:
        """The catalogue rows that one user chose, oldest first: (length,) int32."""
        return self.rows[self.offsets[user] : self.offsets[user + 1]]

    @cached_property
    def counts(self) -> np.ndarray:
        """How many users chose each item: (n,) int64."""
        return np.asarray((self.matrix() > 0).sum(axis=0)).ravel().astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the sequences, of the validation split and of ``raw_titles``, in hex."""
        digest = hashlib.sha256(f"{self.documents}".encode())
        held = [(*h, t) for h, t in zip(self.validation_histories, self.validation_targets, strict=True)]
        for part in (self.offsets, self.rows, *(np.asarray(h, np.int64) for h in held)):
            digest.update(part.shape[0].to_bytes(8, "little") + np.ascontiguousarray(part).tobytes())
        if self.raw_titles != 1:  # Indexes that were fitted before raw_titles existed keep their fingerprint.
            digest.update(f"raw_titles {self.raw_titles}".encode())
        return digest.hexdigest()

    def matrix(self) -> Any:
        """X, a scipy CSR matrix (U, n) of float32. An entry is 1 where the user chose the item once or more often."""
        from scipy.sparse import csr_matrix

        shape = (len(self), self.documents)
        # The matrix gets a copy of the rows, because sum_duplicates sorts in place and would reorder the sequences.
        x = csr_matrix((np.ones(len(self.rows), np.float32), self.rows, self.offsets), shape, copy=True)
        x.sum_duplicates()
        x.data[:] = 1
        return x

    def validation_queries(self) -> tuple[list[Query], np.ndarray]:
        """The V queries of the validation split and their targets, (V, 1) int32, as `Retriever.ranks` takes them."""
        targets = np.array(self.validation_targets, np.int32).reshape(-1, 1)
        return [Query(history=tuple(h)) for h in self.validation_histories], targets

    def save(self, folder: Path) -> None:
        """Write interactions.npz into ``folder``."""
        lengths = np.array([len(h) for h in self.validation_histories], np.int64)
        flat = np.array([row for h in self.validation_histories for row in h], np.int32)
        np.savez(
            folder / "interactions.npz",
            documents=self.documents,
            offsets=self.offsets,
            rows=self.rows,
            lengths=lengths,
            histories=flat,
            targets=np.array(self.validation_targets, np.int32),
            raw_titles=self.raw_titles,
        )

    @classmethod
    def load(cls, folder: Path) -> Interactions:
        """Read the interactions that :meth:`save` wrote into ``folder``."""
        with np.load(folder / "interactions.npz") as found:
            cuts = np.cumsum(found["lengths"])[:-1]
            histories = np.split(found["histories"], cuts) if len(found["lengths"]) else []
            return cls(
                int(found["documents"]),
                found["offsets"],
                found["rows"],
                [tuple(h.tolist()) for h in histories],
                found["targets"].tolist(),
                int(found["raw_titles"]),
            )


@dataclass(frozen=True)
class Judgments:
    """Q training queries and their relevant documents, for retrievers that are fitted on texts.

    documents: n, the number of documents in the catalogue.
    queries: Q texts.
    rows: Q tuples of catalogue rows, the relevant documents of each query; at least one each.
    validation_queries: V texts; default ().
    validation_rows: V tuples of catalogue rows; default ().

    Settings such as the number of epochs are chosen on the validation split; nothing is fitted on it.

        judgments = retrievers.Judgments(3, ["shoes", "water"], [(0, 1), (2,)], ["hose"], [(2,)])
        len(judgments)  # 2 queries

    Raises ValueError for lists of different lengths, a query without a relevant document, and a row outside the
    catalogue.
    """

    documents: int
    queries: Sequence[str]
    rows: Sequence[tuple[int, ...]]
    validation_queries: Sequence[str] = ()
    validation_rows: Sequence[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        for texts, lists in ((self.queries, self.rows), (self.validation_queries, self.validation_rows)):
            if len(texts) != len(lists):
                raise ValueError(f"judgments: {len(texts)} queries with {len(lists)} lists of rows: give one per query")
            if not all(lists):
                raise ValueError("judgments: a query has no relevant document: leave it out")
            _joined(lists, self.documents)

    def __len__(self) -> int:
        return len(self.queries)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the queries and their relevant documents, and of the validation split, in hex."""
        digest = hashlib.sha256(f"judgments {self.documents}".encode())
        for texts, lists in ((self.queries, self.rows), (self.validation_queries, self.validation_rows)):
            for text, rows in zip(texts, lists, strict=True):
                digest.update(repr((text, tuple(map(int, rows)))).encode("utf-8", "surrogatepass"))
            digest.update(b"end")
        return digest.hexdigest()


def raw_query(titles: Sequence[str], history: Sequence[int], last: int) -> str:
    """The raw query of a history: the titles of its ``last`` items, oldest first.

    titles: the n titles of the catalogue.
    history: catalogue rows, oldest first.
    last: how many items at the end of the history are named, at least 1.
    """
    return " ".join(titles[row] for row in history[-last:])


def _joined(lists: Sequence[Sequence[int]], documents: int) -> np.ndarray:
    """All rows of ``lists`` in one array, (N,) int32. Raises ValueError for a row outside the catalogue."""
    filled = [np.asarray(part) for part in lists if len(part)]
    rows = np.concatenate(filled) if filled else np.zeros(0, np.int32)
    if rows.dtype.kind not in "iu":
        raise ValueError(f"interactions: rows must be integers, got {rows.dtype}")
    if len(rows) and not 0 <= rows.min() <= rows.max() < documents:
        raise ValueError(f"interactions: rows must lie in 0 to {documents - 1}, got {rows.min()} to {rows.max()}")
    return rows.astype(np.int32)


def added_weights(history: Sequence[int], weights: Sequence[float]) -> dict[int, float]:
    """item -> the sum of its weights, in the order of the items' last places in the history.

    history: item numbers, oldest first.
    weights: one for each of them.
    """
    added: dict[int, float] = {}
    for item, weight in zip(history, weights, strict=True):
        added[item] = added.pop(item, 0.0) + weight  # A key that is set again comes last.
    return added


def history_matrix(queries: Sequence[Query], documents: int) -> Any:
    """The histories of Q queries as a scipy CSR matrix (Q, n) of float32, with one weight per item.

    Where a query has no weights, each item of its history gets the weight 1, however often it occurs. Where it has
    weights, the weights of an item that occurs several times are added.

    Raises ValueError for a row outside the catalogue, and for weights that are not as many as the history's items.
    """
    from scipy.sparse import csr_matrix

    rows: list[int] = []
    weights: list[float] = []
    offsets = [0]
    for q, query in enumerate(queries):
        if query.weights and len(query.weights) != len(query.history):
            raise ValueError(
                f"query {q} has {len(query.weights)} weights for a history of {len(query.history)}: give one weight "
                "per item"
            )
        history = query.history if query.weights else tuple(dict.fromkeys(query.history))
        rows += history
        weights += query.weights or (1.0,) * len(history)
        offsets.append(len(rows))
    flat = np.array(rows, np.int64)
    if len(flat) and not 0 <= flat.min() <= flat.max() < documents:
        raise ValueError(f"a query's history has row {flat.min()} or {flat.max()}, outside 0 to {documents - 1}")
    matrix = csr_matrix((np.array(weights, np.float32), flat, offsets), (len(queries), documents))
    matrix.sum_duplicates()
    return matrix
