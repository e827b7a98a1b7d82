"""The parts that all recommenders share: a fitted model in a folder, and a retriever that ranks by its scores.

The module of a recommender has a function `build(catalog, folder, interactions, **params)`, which fits a model and
saves it, and a function that loads the saved model. :class:`ByHistory` is the retriever.
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
from retrievers.core.ranking import check_k, check_plain, check_targets, heads, no_hits, rank
from retrievers.interactions import Interactions
from retrievers.types import Hits, Query, Traits

logger = logging.getLogger(__name__)
ALSO = "fitted_before"  # The name, in index.json, of what a part of the model was fitted on before.
BATCH = 256  # So many queries are scored at a time. Their n scores each are in memory together.


class Model(Protocol):
    """A fitted model."""

    def scores(self, queries: Sequence[Query]) -> np.ndarray:
        """The score of each of n items for each of Q queries, by their histories and weights: (Q, n) float32.

        A row must not depend on the other queries of the batch. Raises ValueError for a row outside the catalogue, and
        for weights that are not as many as the history's items.
        """
        ...


class ByHistory:
    """A recommender: a retriever with a fitted model; see :class:`retrievers.types.Retriever` for the contract.

    It reads ``Query.history`` and ``Query.weights``, and not ``Query.text``. The items of the history are ranked like
    all others; `retrievers.Unseen` leaves them out. The model is loaded on first use. The pickle holds only the
    folder, which a child process opens again.

    meta: the contents of index.json.
    folder: the folder of the model.
    load: loads the model from the folder.
    floor: a score of this or less means that the item is not retrieved. Default 0.
    answers_empty: whether a query without a history retrieves anything. Default False.
    keep: a temporary folder that must exist as long as this retriever. None, the default, = there is none.
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
        self._folder = folder.absolute()  # A child process may have another working directory.
        self._load, self._floor, self._answers_empty = load, floor, answers_empty
        self._keep = keep
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
        except (OSError, ValueError, KeyError, EOFError) as error:  # np.load raises EOFError for an empty file.
            raise damaged(self._folder, error) from error

    @property
    def kind(self) -> str:
        """The name of the backend, such as "ease"."""
        return str(self._meta["kind"])

    @property
    def report(self) -> Mapping[str, Any]:
        """The report of the fit as plain JSON, such as the chosen λ, the epochs and the metric on validation."""
        found: Mapping[str, Any] = self._meta.get("fit", {})
        return found

    def retriever_traits(self) -> Traits:
        """The traits: it does not read text, and it was fitted once, on the interactions that index.json names."""
        return Traits(
            reads_text=False,
            fitted_on=(str(self._meta["interactions"]), *self._meta.get(ALSO, ())),
            fit_reports=((self.kind, self.report),),
        )

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol."""
        check_plain(queries)
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
        """Yield batches of the queries that can be answered: their numbers, and their scores, (batch, n) float32."""
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
    also: Sequence[str] = (),
) -> ByHistory:
    """Fit a recommender, or open the one in ``folder``.

    kind: the name of the backend.
    form: the version of the files that the backend writes.
    catalog: the catalogue of n items.
    folder: where the fitted model is written, atomically. None = a temporary folder.
    interactions: the interactions to fit on.
    params: the parameters that affect the model, as plain JSON. They are part of the fingerprint.
    fit: takes a folder and the interactions, writes the files of the model into the folder, and returns a report of
        the fit as plain JSON.
    load: loads the model from the folder.
    floor, answers_empty: see :class:`ByHistory`.
    also: the fingerprints of what a part of the model was fitted on before, such as its encoder. Default ().

    Raises ValueError where there are no interactions, or those of another catalogue. Raises RetrieverError for a
    folder that holds another index.
    """
    if interactions is None or not len(interactions.rows):
        raise ValueError(
            f"retriever.kind: {kind!r} is fitted on interactions, but this task has none: take a sequential task"
        )
    if interactions.documents != len(catalog):
        raise ValueError(
            f"interactions with {interactions.documents} items for a catalogue of {len(catalog)}: give interactions of "
            "this catalogue"
        )
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
    if also:
        meta[ALSO] = sorted(set(also))
    if not is_filled(folder):
        logger.info(
            "fitting %s on %d choices by %d users from %d items",
            kind, len(interactions.rows), len(interactions), len(catalog),
        )  # fmt: skip
        with new_folder(folder) as temporary:
            report = fit(temporary, interactions)
            write_meta(temporary, {**meta, "fit": dict(report)})
    made = ByHistory(read_meta(folder, {**meta, "fit": None}), folder, load, floor, answers_empty, keep)
    made.model  # noqa: B018  The model is loaded now, so that a damaged file is found before a training starts.
    return made
