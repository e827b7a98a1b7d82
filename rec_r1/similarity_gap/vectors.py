"""Retrievers of few dimensions, by which the page asks how many dimensions the task needs.

One has the embeddings of an encoder, projected onto fewer dimensions; the other has vectors of items that are fitted to
choices alone.

Shapes: n documents, D dimensions of an encoder, d <= D dimensions, Q queries, U users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from retrievers import Hits, Interactions, Query
from retrievers.core.index_folder import fingerprint_of
from retrievers.core.ranking import check_k, check_targets, no_hits
from retrievers.interactions import history_matrix
from retrievers.recommenders.ease import GRID
from retrievers.recommenders.item_item import choose
from retrievers.text.dense import Dense
from retrievers.text.exact_search import Exact


class Embedded(NamedTuple):
    """The embeddings that a retriever compares.

    documents: (n, d) float16.
    embed: Q queries -> (Q, d) float32. A query of zeros retrieves nothing.
    """

    documents: np.ndarray
    embed: Callable[[Sequence[Query]], np.ndarray]


class Vectors:
    """A retriever that ranks by inner products; see :class:`retrievers.types.Retriever`.

    about: what the vectors depend on, as plain JSON.
    documents: n.
    make: makes the vectors. It is called when they are needed, which they are not where the ranks are in the cache.
    """

    def __init__(self, about: dict[str, Any], documents: int, make: Callable[[], Embedded]) -> None:
        self.fingerprint = fingerprint_of(about)
        self._documents = documents
        self._make = make

    def __len__(self) -> int:
        return self._documents

    @cached_property
    def _made(self) -> tuple[Exact, Callable[[Sequence[Query]], np.ndarray]]:
        documents, embed = self._make()
        return Exact(documents), embed

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol."""
        k = check_k(k, len(self))
        hits, (exact, embed) = no_hits(len(queries), k), self._made
        vectors = embed(queries)
        asked = np.flatnonzero(vectors.any(axis=1))
        if len(asked):
            hits.rows[asked], hits.scores[asked] = exact.search(vectors[asked], k)
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol."""
        targets = check_targets(queries, targets, len(self))
        ranks, (exact, embed) = np.zeros(targets.shape, np.int32), self._made
        vectors = embed(queries)
        asked = np.flatnonzero(vectors.any(axis=1))
        if len(asked):
            ranks[asked] = exact.ranks(vectors[asked], targets[asked])
        return ranks


def projected(backend: Dense, dimension: int) -> Vectors:
    """An encoder whose embeddings are projected onto the ``dimension`` principal axes of the catalogue's embeddings.

    The axes are those of the matrix as it is, without its mean taken off, so that all D of them give the encoder's own
    inner products. Where embeddings have length 1, so have the projected ones.
    """

    def make() -> Embedded:
        documents = np.asarray(backend.embeddings, np.float32)
        axes = principal_axes(documents)[:, :dimension]
        shaped = _unit if backend.params.normalize else np.asarray

        def embed(queries: Sequence[Query]) -> np.ndarray:
            texts = [query.text for query in queries]
            empty = [not text.strip() for text in texts]  # `dense` retrieves nothing for these.
            vectors = np.asarray(shaped(backend.encoder.queries(texts) @ axes), np.float32)
            vectors[empty] = 0
            return vectors

        return Embedded(np.asarray(shaped(documents @ axes), np.float16), embed)

    about = {"kind": "projected", "of": backend.fingerprint, "dimension": dimension}
    return Vectors(about, len(backend), make)


def principal_axes(vectors: np.ndarray) -> np.ndarray:
    """(n, D) vectors -> (D, D) float32, whose columns are the right singular vectors, that of the largest value
    first."""
    values, axes = np.linalg.eigh((vectors.T @ vectors).astype(np.float64))
    return np.asarray(axes[:, np.argsort(-values)], np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1))


class Factors:
    """The model of :class:`Choices` with one number of dimensions and one λ. vectors: (n, d) float32."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def embed(self, queries: Sequence[Query]) -> np.ndarray:
        """(Q, d) float32: the sums of the vectors of each history."""
        return np.asarray(history_matrix(queries, len(self.vectors)) @ self.vectors, np.float32)

    def scores(self, queries: Sequence[Query]) -> np.ndarray:
        """(Q, n) float32."""
        return np.asarray(self.embed(queries) @ self.vectors.T)


class Choices:
    """Vectors of items that are fitted to choices alone, in closed form.

    With X the (U, n) matrix of choices, they minimise ||X - XB||^2 + λ ||B||^2, the loss of EASE (arXiv:1905.03375),
    over matrices B of rank d instead of over those with diag(B) = 0. For X = U S V', the minimum is B = W W' with
    W = V_d (S_d^2 / (S_d^2 + λ))^(1/2): with A = [X; λ^(1/2) I], the loss is that of A B against [X; 0], and A times
    the solution of full rank has the singular values s^2 / (s^2 + λ)^(1/2), which grow with s; the best approximation
    of rank d keeps the largest (Eckart and Young 1936). A query is the sum of the vectors of its history. λ is chosen
    for each d on validation. Inner products of d dimensions order documents as cosines of d + 1 can: documents are
    divided by the largest length, and one more coordinate gives them length 1, which is 0 in queries.

    interactions: the choices, with a validation split.
    most: the largest d.
    """

    def __init__(self, interactions: Interactions, most: int) -> None:
        self._interactions, self._most = interactions, most

    def of(self, dimension: int) -> Vectors:
        """The retriever with vectors of so many dimensions."""

        def make() -> Embedded:
            _, model = self.chosen(dimension)
            return Embedded(model.vectors.astype(np.float16), model.embed)

        about = {"kind": "choices", "of": self._interactions.fingerprint, "dimension": dimension}
        return Vectors(about, self._interactions.documents, make)

    def chosen(self, dimension: int) -> tuple[float, Factors]:
        """λ, and the model with it."""
        best, _ = choose("regularization", GRID, lambda each: self.model(dimension, each), self._interactions)
        return best, self.model(dimension, best)

    def model(self, dimension: int, regularization: float) -> Factors:
        """The model with one λ."""
        values, axes = self._decomposed
        shrunk = values[:dimension] ** 2 / (values[:dimension] ** 2 + regularization)
        return Factors(np.asarray(axes[:, :dimension] * np.sqrt(shrunk), np.float32))

    @cached_property
    def _decomposed(self) -> tuple[np.ndarray, np.ndarray]:
        """The largest singular values of X, at most ``most``, and the right singular vectors, as columns."""
        x = self._interactions.matrix().astype(np.float64)
        if self._most >= min(x.shape) - 1:  # scipy finds fewer values than the smaller side has.
            _, values, axes = np.linalg.svd(x.toarray(), full_matrices=False)
        else:
            from scipy.sparse.linalg import svds

            start = np.random.default_rng(0).normal(size=min(x.shape))
            _, values, axes = svds(x, k=self._most, v0=start)
        order = np.argsort(-values)[: self._most]
        return values[order], axes[order].T
