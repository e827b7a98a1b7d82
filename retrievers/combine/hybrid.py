"""A fusion of several retrievers, by reciprocal rank or by weighted scores.

rrf (Cormack, Clarke and Büttcher 2009): score(d) = sum over the retrievers of weight / (60 + rank(d)).
weighted: score(d) = sum over the retrievers of weight * s(d). s is the retriever's score, shifted and scaled to [0, 1]
within the list of a query (norm: minmax), or as it is (norm: none).

Each retriever contributes its first ``depth`` documents. A document that is in none of these lists is not retrieved.
`ranks` is exact for the fused list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.combine.capabilities import check_part, open_part
from retrievers.core.index_folder import fingerprint_of
from retrievers.core.parameters import Checks, check_number
from retrievers.core.ranking import check_k, check_plain, check_targets, no_hits
from retrievers.interactions import Interactions, Judgments
from retrievers.registry import InnerFolder
from retrievers.types import Hits, Query, Retriever, Traits

INDEX_FORMAT = 1
RRF_CONSTANT = 60  # The constant of reciprocal rank fusion, as it was published.
DEFAULT_RETRIEVERS = ({"kind": "bm25"}, {"kind": "dense"})  # One that matches words, and one that matches meaning.


@dataclass(frozen=True)
class Params:
    """The parameters of `hybrid`. Raises ValueError, naming the field, for a bad value."""

    # The retrievers that are combined: {kind, params, weight} each; params and weight (1.0) may be left out.
    retrievers: Sequence[Mapping[str, Any]] = DEFAULT_RETRIEVERS
    method: str = "rrf"  # rrf (reciprocal rank fusion) or weighted (a weighted sum of scores).
    norm: str = "minmax"  # For weighted: how scores are normalised first, minmax or none.
    depth: int = 1000  # How many documents each retriever contributes.

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.choice("method", ("rrf", "weighted"))
        checks.choice("norm", ("minmax", "none"))
        checks.integers("depth")
        with checks:
            self._check_retrievers()
        checks.raise_all()

    def _check_retrievers(self) -> None:
        if not isinstance(self.retrievers, Sequence) or isinstance(self.retrievers, str) or len(self.retrievers) < 1:
            raise ValueError(
                f"retriever.params.retrievers must list at least one {{kind: …}}, got {self.retrievers!r}: write "
                "[{kind: bm25}, {kind: dense}]"
            )
        checks = Checks()
        for i, part in enumerate(self.retrievers):
            with checks:
                check_part(f"retriever.params.retrievers[{i}]", part, "weight")
                check_number(f"retrievers[{i}].weight", part.get("weight", 1.0), 1, above=True)
        checks.raise_all()


class Hybrid:
    """A fusion of retrievers over one catalogue; see :class:`retrievers.types.Retriever` for the contract.

    retrievers: the inner retrievers.
    weights: one for each of them.
    documents: the size of the catalogue.
    params: method, norm and depth. None = the defaults.

    It can be pickled, and used by several threads, if all inner retrievers can. If one of them fails, the fusion fails
    too: a ranking of the others alone would be scored as if the query were at fault.
    """

    def __init__(
        self, retrievers: Sequence[Retriever], weights: Sequence[float], documents: int, params: Params | None = None
    ) -> None:
        params = params or Params()
        self._parts = list(retrievers)
        self._weights = [float(weight) for weight in weights]
        self._documents = documents
        self._method, self._norm, self._depth = params.method, params.norm, params.depth
        self.fingerprint = fingerprint_of(
            {
                "kind": "hybrid",
                "format": INDEX_FORMAT,
                "parts": [part.fingerprint for part in self._parts],
                "weights": self._weights,
                "how": [self._method, self._norm, self._depth],
            }
        )

    def __len__(self) -> int:
        return self._documents

    def retriever_traits(self) -> Traits:
        """It declares its inner retrievers, and nothing of its own."""
        return Traits(inner=self._parts)

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol."""
        check_plain(queries)
        hits = no_hits(len(queries), check_k(k, len(self)))
        for q, (rows, scores) in enumerate(self._fused(queries)):
            m = min(hits.rows.shape[1], len(rows))
            hits.rows[q, :m], hits.scores[q, :m] = rows[:m], scores[:m]
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol. A target that no inner retriever has within its depth is not retrieved."""
        targets = check_targets(queries, targets, len(self))
        ranks = np.zeros(targets.shape, np.int32)
        for q, (rows, _) in enumerate(self._fused(queries)):
            found, place = np.nonzero(targets[q][:, None] == rows[None])
            ranks[q, found] = place + 1
        return ranks

    def _fused(self, queries: Sequence[Query]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each query all fused (m,) rows, best first, ties by row, and their (m,) float32 scores."""
        lists = [part.search(queries, min(self._depth, len(self))) for part in self._parts]
        return [self._fuse([(hits.rows[q], hits.scores[q]) for hits in lists]) for q in range(len(queries))]

    def _fuse(self, lists: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        rows, parts = [], []
        for (found, scores), weight in zip(lists, self._weights, strict=True):
            found, scores = found[found >= 0], scores[found >= 0].astype(np.float64)
            if self._method == "rrf":
                scores = 1 / (RRF_CONSTANT + np.arange(1, len(found) + 1))
            elif self._norm == "minmax" and len(found):
                spread = scores.max() - scores.min()
                scores = (scores - scores.min()) / spread if spread > 0 else np.ones(len(found))
            rows.append(found)
            parts.append(weight * scores)
        unique, index = np.unique(np.concatenate(rows), return_inverse=True)
        total = np.bincount(index, np.concatenate(parts), minlength=len(unique)).astype(np.float32)
        order = np.lexsort((unique, -total))
        return unique[order], total[order]


def inner_backends(params: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The {kind, params, weight} mappings of the inner retrievers."""
    return list(Params(**params).retrievers)


def build(
    catalog: Catalog,
    folder: str | Path | None = None,
    interactions: Interactions | None = None,
    inner_folder: InnerFolder | None = None,
    judgments: Judgments | None = None,
    **params: Any,
) -> Hybrid:
    """Open every inner retriever, and build the indexes that are missing.

    catalog, folder, interactions, inner_folder, judgments: see `retrievers.open`.
    params: see :class:`Params`.

    Raises what the inner retrievers raise, and ValueError for a bad parameter.
    """
    settings = Params(**params)
    opened = [
        open_part(str(i), part, catalog, folder, interactions, inner_folder, judgments)
        for i, part in enumerate(settings.retrievers)
    ]
    weights = [part.get("weight", 1.0) for part in settings.retrievers]
    return Hybrid(opened, weights, len(catalog), settings)
