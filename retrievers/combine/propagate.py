"""Ground, then propagate: a text drives a backend that reads only histories.

The text goes to a text retriever. Its first ``m`` documents become a pseudo-history, in which each has a weight in
proportion to its score. The pseudo-history follows the real history, with the best document last, and the backend is
asked with both. A document that occurs several times in a history without weights counts once in total. ``mix`` is the
pseudo-history's share of the absolute weights: 0 would leave the text out, and 1 leaves the history out. A query
without a text, or with one that finds nothing, is the history alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.combine.capabilities import check_part, open_part
from retrievers.core.index_folder import fingerprint_of
from retrievers.core.parameters import Checks
from retrievers.core.ranking import check_plain
from retrievers.interactions import Interactions, Judgments
from retrievers.registry import InnerFolder
from retrievers.types import Hits, Query, Retriever, Traits

INDEX_FORMAT = 2  # Version 1 counted a repeated document of the history as often as it occurred.


@dataclass(frozen=True)
class Params:
    """The parameters of `propagate`. Raises ValueError, naming the field, for a bad value."""

    # The retriever that finds documents for the text: {kind, params}.
    text: Mapping[str, Any] = field(default_factory=lambda: {"kind": "bm25"})
    # The recommender that is asked with the history and these documents: {kind, params}.
    backend: Mapping[str, Any] = field(default_factory=lambda: {"kind": "ease"})
    m: int = 10  # How many documents of the text retriever are added to the history.
    mix: float = 0.5  # Their share of the weights, above 0 and at most 1. 1 leaves out the history itself.

    def __post_init__(self) -> None:
        checks = Checks(self)
        for name, part in (("text", self.text), ("backend", self.backend)):
            with checks:
                check_part(f"retriever.params.{name}", part)
        checks.integers("m")
        checks.numbers("mix", above=True, most=1)
        checks.raise_all()


class Propagate:
    """A backend that is asked with the history that a query's text stands for; see :class:`retrievers.types.Retriever`.
    It is as exact as the backend.

    text: the retriever that finds the documents of the pseudo-history.
    backend: the retriever that reads histories.
    m, mix: see :class:`Params`.
    """

    def __init__(self, text: Retriever, backend: Retriever, m: int, mix: float) -> None:
        self._text, self._backend = text, backend
        self._m, self._mix = m, mix
        self.fingerprint = fingerprint_of(
            {
                "kind": "propagate",
                "format": INDEX_FORMAT,
                "parts": [text.fingerprint, backend.fingerprint],
                "how": [m, float(mix)],
            }
        )

    def retriever_traits(self) -> Traits:
        """It declares its inner retrievers, and nothing of its own."""
        return Traits(inner=(self._text, self._backend))

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol."""
        return self._backend.search(self.grounded(queries), k)

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol."""
        return self._backend.ranks(self.grounded(queries), targets)

    def grounded(self, queries: Sequence[Query]) -> list[Query]:
        """The queries that the backend is asked: each has the history, then the pseudo-history, and no text."""
        check_plain(queries)
        out = [query._replace(text="") for query in queries]
        asked = [q for q, query in enumerate(queries) if query.text.strip()]
        if not asked:
            return out
        hits = self._text.search([queries[q] for q in asked], self._m)
        for q, rows, scores in zip(asked, hits.rows, hits.scores, strict=True):
            found = [(int(row), float(score)) for row, score in zip(rows, scores, strict=True) if row >= 0]
            if found:
                out[q] = self._mixed(queries[q], found[::-1])
        return out

    def _mixed(self, query: Query, found: Sequence[tuple[int, float]]) -> Query:
        """``query`` with the pseudo-history of the (row, score) pairs ``found`` after its own history."""
        positive = [max(score, 0.0) for _, score in found]
        pseudo = _scaled(positive if any(positive) else [1.0] * len(found), self._mix)
        times = Counter(query.history)
        own = query.weights or tuple(1.0 / times[row] for row in query.history)
        real = _scaled(own, 1 - self._mix) if any(own) else list(own)
        rows = (*query.history, *(row for row, _ in found))
        return Query("", rows, (*real, *pseudo), query.history if query.seen is None else query.seen)


def _scaled(weights: Sequence[float], total: float) -> list[float]:
    """``weights``, scaled so that their absolute values sum to ``total``."""
    whole = sum(map(abs, weights))
    return [total * weight / whole for weight in weights]


def inner_backends(params: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The {kind, params} mappings of the inner retrievers."""
    settings = Params(**params)
    return [settings.text, settings.backend]


def build(
    catalog: Catalog,
    folder: str | Path | None = None,
    interactions: Interactions | None = None,
    inner_folder: InnerFolder | None = None,
    judgments: Judgments | None = None,
    **params: Any,
) -> Propagate:
    """Open both inner retrievers, and build the indexes that are missing.

    catalog, folder, interactions, inner_folder, judgments: see `retrievers.open`.
    params: see :class:`Params`.

    Raises what the inner retrievers raise, and ValueError for a bad parameter.
    """
    settings = Params(**params)
    text = open_part("text", settings.text, catalog, folder, interactions, inner_folder, judgments)
    backend = open_part("backend", settings.backend, catalog, folder, interactions, inner_folder, judgments)
    return Propagate(text, backend, settings.m, settings.mix)
