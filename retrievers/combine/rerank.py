"""A cross-encoder puts the first m documents of another retriever into a new order.

The cross-encoder reads the query's text and the text of a document together. The order is: the first m documents of the
inner retriever by the cross-encoder's score, then by row; behind them all others as the inner retriever has them. A
query without a text has the inner retriever's order. `ranks` is as exact as that of the inner retriever.

The scores of the first m are those of the cross-encoder. Behind them, a score only gives the order: each is a little
below the one before. In a weighted `hybrid`, set a depth of at most m.

With `tuned`, the cross-encoder is fine-tuned on the training data of the task first, see retrievers/text/tuning.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.combine.capabilities import check_part, open_part
from retrievers.core.index_folder import fingerprint_of, is_filled, link_folder, new_folder, read_meta, write_meta
from retrievers.core.parameters import Checks
from retrievers.core.ranking import check_k, check_plain, check_targets
from retrievers.encoders.cross import PairScorer
from retrievers.interactions import Interactions, Judgments
from retrievers.registry import InnerFolder
from retrievers.text.tuning import cross_job, job
from retrievers.text.tuning import settings as tuning
from retrievers.text.tuning.job_folder import ENCODER
from retrievers.types import Hits, Query, Retriever, Traits

# The version of index.json and of the ranks. In version 1, only parts of a model's large files were hashed. In version
# 2, two targets could have one rank where the inner retriever's search is approximate.
INDEX_FORMAT = 3
# Behind the first m, scores fall by this share of the last of them, or of 1: several units of a float32's last place.
STEP = 2.0**-20


@dataclass(frozen=True)
class Params:
    """The parameters of `rerank`. Raises ValueError with all bad values."""

    # The retriever whose first documents are put into a new order: {kind, params}.
    retriever: Mapping[str, Any] = field(default_factory=lambda: {"kind": "bm25"})
    # The cross-encoder: the folder of a model or a hub id.
    model: str = "cross-encoder/ms-marco-MiniLM-L6-v2"
    # How many documents of each query the cross-encoder scores. The time that a query takes is in proportion to it.
    m: int = 20
    batch_size: int = 32  # How many pairs of a query and a document are scored at once.
    max_length: int | None = None  # A pair is cut to so many tokens. null: as the model says.
    device: str | None = None  # The device of the cross-encoder, such as cuda:0. null: a GPU if there is one.
    trust_remote_code: bool = False  # Whether Python code in the model's folder may run.
    # Fine-tunes the cross-encoder on the task's interactions or judgments: a mapping, which may be empty. null: it
    # stays as it is.
    tuned: tuning.TunedCross | None = None

    def __post_init__(self) -> None:
        checks = Checks(self)
        with checks:
            object.__setattr__(self, "tuned", tuning.read(self.tuned, tuning.TunedCross))  # A recipe has a mapping.
        with checks:
            check_part("retriever.params.retriever", self.retriever)
        checks.integers("m")
        with checks:
            self.scorer()  # This checks the other parameters.
        checks.raise_all()

    def scorer(self) -> PairScorer:
        """The cross-encoder with these parameters."""
        return PairScorer(self.model, self.batch_size, self.max_length, self.device, self.trust_remote_code)


class Rerank:
    """A retriever whose first m documents a cross-encoder puts into a new order; see
    :class:`retrievers.types.Retriever` for the contract.

    inner: the retriever that finds the documents. It gets the whole query, so that it may read the history.
    catalog: the documents, whose texts the cross-encoder reads.
    scorer: the cross-encoder.
    m: how many documents of each query it scores.
    report: the report of the fit of a tuned cross-encoder. {}, the default, = it was not tuned.
    keep: a temporary folder that must exist as long as this retriever. None, the default, = there is none.

    It can be pickled, and used by several threads, if the inner retriever can. Where the inner retriever fails, this
    one fails, too: it raises the same exception, or `ranks` returns -1 for the same queries.
    """

    def __init__(
        self,
        inner: Retriever,
        catalog: Catalog,
        scorer: PairScorer,
        m: int,
        report: Mapping[str, Any] | None = None,
        keep: Any = None,
    ) -> None:
        self._inner, self._catalog, self._scorer, self._m = inner, catalog, scorer, min(m, len(catalog))
        self.report, self._keep = report or {}, keep
        self.fingerprint = fingerprint_of(
            {"kind": "rerank", "format": INDEX_FORMAT, "part": inner.fingerprint, "model": scorer.describe(), "m": m}
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_keep": None}  # The temporary folder belongs to this process.

    def __len__(self) -> int:
        return len(self._catalog)

    def around(self, inner: Retriever, m: int) -> Rerank:
        """The same cross-encoder around another retriever, or with another number of documents that it scores."""
        return Rerank(inner, self._catalog, self._scorer, m, self.report, self._keep)

    def retriever_traits(self) -> Traits:
        """It declares the inner retriever, that it reads the text itself, for one that reads only histories, and what
        its cross-encoder was tuned on."""
        reports = (("rerank", self.report),) if self.report else ()
        tuned_on = self._scorer.model.tuned_on()
        return Traits(inner=(self._inner,), reads_text=True, fitted_on=tuned_on, fit_reports=reports)

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol."""
        check_plain(queries)
        k = check_k(k, len(self))
        hits = self._reordered(queries, self._inner.search(queries, max(k, self._m)))
        return Hits(hits.rows[:, :k], hits.scores[:, :k])

    def _reordered(self, queries: Sequence[Query], found: Hits) -> Hits:
        """The hits of the inner retriever, ``found``, of which the cross-encoder has put the first m in order."""
        rows, scores = np.array(found.rows, np.int32), np.array(found.scores, np.float32)
        asked = [q for q, query in enumerate(queries) if query.text.strip() and rows[q, 0] >= 0]
        heads = [rows[q, : self._m][rows[q, : self._m] >= 0] for q in asked]
        for q, head, values in zip(asked, heads, self._values(queries, asked, heads), strict=True):
            order = np.lexsort((head, -values))
            size = len(head)
            rows[q, :size], scores[q, :size] = head[order], values[order]
            behind = np.flatnonzero(rows[q, size:] >= 0)
            last = float(scores[q, size - 1])
            scores[q, size + behind] = last - STEP * max(1.0, abs(last)) * (1 + behind)
        return Hits(rows, scores)

    def _values(
        self, queries: Sequence[Query], asked: Sequence[int], heads: Sequence[np.ndarray]
    ) -> Sequence[np.ndarray]:
        """The cross-encoder's scores of the rows in ``heads``, for each query in ``asked``: (rows,) float32 each.

        The pairs of all queries are scored in one call.
        """
        different = np.unique(np.concatenate(heads)).tolist() if heads else []
        texts = {row: self._catalog.texts[row] for row in different}
        pairs = [(queries[q].text, texts[row]) for q, head in zip(asked, heads, strict=True) for row in head.tolist()]
        return np.split(self._scorer.scores(pairs), np.cumsum([len(head) for head in heads])[:-1]) if pairs else []

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol."""
        targets = check_targets(queries, targets, len(self))
        ranks = np.zeros(targets.shape, np.int32)
        asked = np.flatnonzero((targets >= 0).any(axis=1))
        if not len(asked):
            return ranks
        several = [queries[q] for q in asked.tolist()]
        theirs = self._inner.search(several, self._m)
        hits = self._reordered(several, theirs)
        wanted = targets[asked].astype(np.int64)  # An unsigned type has no -1.
        found = (wanted[:, :, None] == hits.rows[:, None, :]) & (wanted >= 0)[:, :, None]
        within = found.any(axis=2)
        ranks[asked] = np.where(within, found.argmax(axis=2) + 1, 0)
        behind = np.where(within, -1, wanted)
        left = np.flatnonzero((behind >= 0).any(axis=1))
        if len(left):
            kept = self._behind([several[q] for q in left.tolist()], behind[left], np.asarray(theirs.rows)[left])
            failed = (kept < 0).any(axis=1, keepdims=True)
            ranks[asked[left]] = np.where(failed, -1, np.where(within[left], ranks[asked[left]], kept))
        return ranks

    def _behind(self, queries: Sequence[Query], targets: np.ndarray, heads: np.ndarray) -> np.ndarray:
        """The ranks of targets that are behind the first m documents: (Q, T) integers. -1 = the inner retriever failed.

        targets: (Q, T) int64 rows; -1 = padding.
        heads: (Q, m) the first m documents as the inner retriever has them; -1 = there are no more.

        A search that is approximate may miss documents, while the ranks are exact. All documents of the head come
        before a target, also those that the inner retriever ranks behind it.
        """
        there = heads >= 0
        sizes = there.sum(axis=1)
        last = np.where(sizes > 0, heads[np.arange(len(heads)), np.maximum(sizes, 1) - 1], -1)
        found = self._inner.ranks(queries, np.concatenate([targets, last[:, None]], axis=1))
        ranks = np.array(found[:, :-1])
        # Nothing was missed where the last document of the head has the rank that it has in the head.
        missed = np.flatnonzero((found[:, -1] != sizes) & (found >= 0).all(axis=1))
        if len(missed):
            of_head = self._inner.ranks([queries[q] for q in missed.tolist()], heads[missed].astype(np.int64))
            own = ranks[missed]
            later = (of_head[:, None] > own[:, :, None]) | (of_head[:, None] == 0)
            moved = own + (later & there[missed][:, None]).sum(axis=2)
            ranks[missed] = np.where((of_head < 0).any(axis=1, keepdims=True), -1, np.where(own > 0, moved, own))
        ranks[(found < 0).any(axis=1)] = -1
        return ranks


def inner_backends(params: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The {kind, params} mapping of the inner retriever, in a list."""
    return [Params(**params).retriever]


def fit_data(params: Mapping[str, Any]) -> Sequence[str]:
    """Which of "interactions" and "judgments" the cross-encoder is tuned on: (), one of them, or whichever a task has.
    What the inner retriever is fitted on does not count here."""
    return tuning.fitted_on(Params(**params).tuned)


def build(
    catalog: Catalog,
    folder: str | Path | None = None,
    interactions: Interactions | None = None,
    inner_folder: InnerFolder | None = None,
    judgments: Judgments | None = None,
    **params: Any,
) -> Rerank:
    """Load the cross-encoder and open the inner retriever, whose index is built if there is none. With `tuned`, the
    cross-encoder is tuned then.

    catalog, folder, interactions, inner_folder, judgments: see `retrievers.open`.
    params: see :class:`Params`.

    Raises what the inner retriever raises, RetrieverError where the model is missing or is no cross-encoder, and
    ValueError for a bad parameter, and where there is nothing to tune the cross-encoder on.
    """
    settings = Params(**params)
    scorer = settings.scorer()
    scorer.load()  # A model that is missing is found before an index is built, which may take long.
    data = None if settings.tuned is None else job.data_of(settings.tuned, catalog, interactions, judgments)
    inner = open_part("retriever", settings.retriever, catalog, folder, interactions, inner_folder, judgments)
    if settings.tuned is None or data is None:
        return Rerank(inner, catalog, scorer, settings.m)
    keep = TemporaryDirectory(prefix="rec-r1-rerank-") if folder is None else None
    where = Path(keep.name if keep is not None else folder or "") / "tuned"
    scorer, report = _tuned(where, catalog, scorer, settings, data, inner)
    return Rerank(inner, catalog, scorer, settings.m, report, keep)


def _tuned(
    where: Path, catalog: Catalog, scorer: PairScorer, params: Params, data: job.Data, inner: Retriever
) -> tuple[PairScorer, Mapping[str, Any]]:
    """The tuned cross-encoder in the folder ``where``, and the report of its fit. It is tuned if there is none yet."""
    assert params.tuned is not None
    how = asdict(params.tuned)
    if how["pairs"] is None:
        del how["pairs"]  # Indexes that were made before this key existed do not have it.
    meta = {
        "kind": "rerank",
        "format": INDEX_FORMAT,
        "catalog": catalog.fingerprint,
        "part": inner.fingerprint,
        "m": params.m,
        "encoder": {**scorer.describe(), "tuned": how, "data": data.fingerprint},
    }
    if not is_filled(where):
        from filelock import FileLock

        where.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{where}.lock"):  # Without the lock, two processes could write into one unfinished fit.
            if not is_filled(where):
                _tune(where, catalog, scorer, params.tuned, data, inner, meta)
    report = read_meta(where, meta | {"fit": None})["fit"]
    tuned = scorer.with_model(where / ENCODER)
    job.check_model(where, tuned.model, data.fingerprint, report)
    tuned.load()
    return tuned, report


def _tune(
    where: Path,
    catalog: Catalog,
    scorer: PairScorer,
    tuned: tuning.TunedCross,
    data: job.Data,
    inner: Retriever,
    meta: Mapping[str, Any],
) -> None:
    """Tune the cross-encoder, and write it into the folder ``where``. meta: what index.json has, but for the report."""
    unfinished = where.parent / f".{where.name}.tuning"
    with new_folder(where) as temporary:
        m = min(int(meta["m"]), len(catalog))
        report = cross_job.tune(unfinished, fingerprint_of(meta), catalog, scorer, tuned, data, inner, m)
        files = scorer.with_model(unfinished / ENCODER).describe()["files"]
        link_folder(unfinished / ENCODER, temporary / ENCODER)
        write_meta(temporary, {**meta, "fit": {**report, "files": files}})
    shutil.rmtree(unfinished, ignore_errors=True)
