"""What every history backend shares: a fitted model in a folder, which scores all documents for a batch of histories.

A backend is a file with `build(catalog, folder, interactions, **params)`, which fits and saves, and a function that
loads what was saved as a model; :class:`ByHistory` makes a retriever of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import damaged, fingerprint_of, is_filled, new_folder, read_meta, write_meta
from retrievers.core.ranking import check_k, check_targets, heads, no_hits, rank
from retrievers.interactions import Interactions
from retrievers.types import Hits, Query, Traits

logger = logging.getLogger(__name__)
BATCH = 256  # queries scored at a time: as many rows of n scores are in memory


class Model(Protocol):
    """A fitted model."""

    def scores(self, queries: Sequence[Query]) -> np.ndarray:
        """(Q, n) float32: how much each query's history and weights speak for each document.

        A row must not depend on the other queries of the batch. Raises ValueError for a history that does not fit the
        catalogue.
        """
        ...


class ByHistory:
    """A retriever over a fitted model; see :class:`retrievers.types.Retriever` for the contract.

    It reads ``Query.history`` and ``Query.weights``, never ``text``; an empty history finds nothing, but for models
    that say so (``answers_empty``). A document whose score is ``floor`` or less is not retrieved. What the history
    already holds is ranked like the rest: `retrievers.combine.exclude_history` leaves it out. Pickles as its folder.
    """

    def __init__(
        self,
        meta: Mapping[str, Any],
        folder: Path,
        load: Callable[[Path], Model],
        floor: float = 0.0,
        answers_empty: bool = False,
        keep: Any = None,
    ) -> None:
        self._meta = dict(meta)
        self._folder = folder.absolute()  # a child may work elsewhere
        self._load, self._floor, self._answers_empty = load, floor, answers_empty
        self._keep = keep  # a temporary folder that lives as long as this
        self.fingerprint = fingerprint_of(self._meta)

    def __reduce__(self) -> tuple[Callable[..., ByHistory], tuple[Any, ...]]:
        return ByHistory, (self._meta, self._folder, self._load, self._floor, self._answers_empty)

    def __len__(self) -> int:
        return int(self._meta["documents"])

    @cached_property
    def model(self) -> Any:
        """The fitted model, loaded on first use. Raises RetrieverError where its files are damaged."""
        try:
            return self._load(self._folder)
        except (OSError, ValueError, KeyError, EOFError) as error:  # EOFError: np.load of an empty file
            raise damaged(self._folder, error) from error

    @property
    def kind(self) -> str:
        return str(self._meta["kind"])

    @property
    def report(self) -> Mapping[str, Any]:
        """What the fit found: the value of λ that was chosen, epochs, validation figures."""
        found: Mapping[str, Any] = self._meta.get("fit", {})
        return found

    def retriever_traits(self) -> Traits:
        """It reads no text, and was fitted once, on the interactions that index.json names."""
        return Traits(
            reads_text=False,
            fitted_on=(str(self._meta["interactions"]),),
            fit_reports=((self.kind, self.report),),
        )

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol."""
        k = check_k(k, len(self))
        hits = no_hits(len(queries), k)
        for chosen, scores in self._batches(queries):
            hits.rows[chosen], hits.scores[chosen] = heads(scores, k, self._floor)
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol."""
        targets = check_targets(queries, targets, len(self))
        ranks = np.zeros(targets.shape, np.int32)
        for chosen, scores in self._batches(queries):
            for q, row in zip(chosen, scores, strict=True):
                ranks[q] = rank(row, targets[q], self._floor)
        return ranks

    def _batches(self, queries: Sequence[Query]) -> Any:
        """(places, scores) of the queries that can be answered."""
        asked = [q for q, query in enumerate(queries) if self._answers_empty or query.history]
        for start in range(0, len(asked), BATCH):
            chosen = asked[start : start + BATCH]
            yield chosen, self.model.scores([queries[q] for q in chosen])


def fitted(
    kind: str,
    form: int,
    catalog: Catalog,
    folder: str | Path | None,
    interactions: Interactions | None,
    params: Mapping[str, Any],
    fit: Callable[[Path, Interactions], Mapping[str, Any]],
    load: Callable[[Path], Model],
    floor: float = 0.0,
    answers_empty: bool = False,
) -> ByHistory:
    """The retriever in ``folder`` (None: a temporary one), fitted first where nothing is there yet.

    fit: writes the model's files into the folder it is given and returns what shall be said of the fit (plain JSON).
    form: the version of what the backend writes. Raises ValueError where there is nothing to fit on, or it is of
    another catalogue; RetrieverError for a folder that holds something else.
    """
    if interactions is None or not len(interactions.rows):
        raise ValueError(
            f"retriever.kind: {kind!r} is fitted on interactions, and this task has none: take a sequential task"
        )
    if interactions.documents != len(catalog):
        raise ValueError(f"interactions of {interactions.documents} documents for a catalogue of {len(catalog)}")
    keep = TemporaryDirectory(prefix=f"rec-r1-{kind}-") if folder is None else None
    folder = Path(keep.name) / "index" if keep is not None else Path(folder or "")
    meta = {
        "kind": kind,
        "format": form,
        "catalog": catalog.fingerprint,
        "documents": len(catalog),
        "interactions": interactions.fingerprint,
        "params": dict(params),
    }
    if not is_filled(folder):
        logger.info(
            "fitting %s on %d choices of %d users among %d documents",
            kind, len(interactions.rows), len(interactions), len(catalog),
        )  # fmt: skip
        with new_folder(folder) as temporary:
            report = fit(temporary, interactions)
            write_meta(temporary, {**meta, "fit": dict(report)})
    made = ByHistory(read_meta(folder, {**meta, "fit": None}), folder, load, floor, answers_empty, keep)
    made.model  # noqa: B018  damage is found before the first step
    return made
