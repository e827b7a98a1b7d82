"""BM25 over bm25s (Lù 2024, arXiv:2407.03618), Lucene's variant: scores are computed once, at build time.

score(q, d) = sum over the terms t of q (a repeated term counts again) of
    ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * |d| / avgdl))
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog, new_folder
from retrievers.scores import rank, top
from retrievers.types import Hits, Query, RetrieverError

logger = logging.getLogger(__name__)
FORMAT = 1  # of index.json and the analyser; a change makes old indexes refuse to open
LARGE = 50_000  # documents from which on a build shows its progress
# The 33 English stop words of Lucene's EnglishAnalyzer.
STOPWORDS = {
    "en": (
        "a an and are as at be but by for if in into is it no not of on or such that the their then there "
        "these they this to was will with"
    )
}


@dataclass(frozen=True)
class Params:
    """k1 and b of BM25 (1.2 / 0.75 by default, as in the paper); a Snowball stemmer's name or None; a
    stop-word list's name ("en") or None."""

    k1: float = 1.2
    b: float = 0.75
    stemmer: str | None = "english"
    stopwords: str | None = "en"

    def __post_init__(self) -> None:
        if not self.k1 >= 0:
            raise ValueError(f"retriever.params.k1 must be >= 0, got {self.k1!r}: 1.2 is usual")
        if not 0 <= self.b <= 1:
            raise ValueError(f"retriever.params.b must lie in [0, 1], got {self.b!r}: 0.75 is usual")
        if self.stopwords is not None and self.stopwords not in STOPWORDS:
            raise ValueError(
                f"retriever.params.stopwords: unknown list {self.stopwords!r}: choose from "
                f"{', '.join(STOPWORDS)}, or null"
            )


def analyze(texts: Sequence[str], params: Params, progress: bool = False) -> list[list[str]]:
    """Texts -> terms, for documents and queries alike: lower-cased runs of word characters, no stop words, stems.

    Raises ValueError for a stemmer that PyStemmer does not have.
    """
    import bm25s
    import Stemmer

    if params.stemmer is not None and params.stemmer not in Stemmer.algorithms():
        raise ValueError(
            f"retriever.params.stemmer: unknown {params.stemmer!r}: choose from "
            f"{', '.join(Stemmer.algorithms())}, or null"
        )
    return bm25s.tokenize(
        list(texts),
        token_pattern=r"(?u)\b\w+\b",  # bm25s' own default drops words of one letter, and so "C" and "5"
        stopwords=STOPWORDS[params.stopwords].split() if params.stopwords else [],
        stemmer=Stemmer.Stemmer(params.stemmer) if params.stemmer else None,
        return_ids=False,
        show_progress=progress,
    )


class BM25:
    """A BM25 retriever, opened on first use; see :class:`retrievers.types.Retriever` for the contract.

    One that has a folder pickles as the folder and opens it again in the child, memory-mapped; one built in
    memory pickles by value. ``Query.history`` and ``weights`` are not read.
    """

    def __init__(self, meta: dict[str, Any], folder: Path | None = None, model: Any = None) -> None:
        self._meta = meta
        self._folder = folder
        self._built = model
        self.params = Params(**meta["params"])
        self.fingerprint = fingerprint_of(meta)

    def __reduce__(self) -> tuple[Callable[..., BM25], tuple[Any, ...]]:
        return BM25, (self._meta, self._folder, None if self._folder else self._built)

    @cached_property
    def _model(self) -> Any:
        if self._built is not None:
            return self._built
        return _load(self._folder, self._meta)

    def __len__(self) -> int:
        return int(self._meta["documents"])

    def _scores(self, queries: Sequence[Query]) -> Iterator[np.ndarray]:
        """One (n,) float32 a query, 0 where no term matches. The only place that scores, so that
        ``search`` and ``ranks`` cannot disagree."""
        n = len(self)
        for terms in analyze([query.text for query in queries], self.params):
            ids = self._model.get_tokens_ids(terms)
            yield self._model.get_scores_from_ids(ids) if ids else np.zeros(n, np.float32)

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol. bm25s' own ``retrieve`` returns arbitrary documents where nothing matches and
        raises for k > n; here those are -1 and a clamp."""
        found = [top(score, k) for score in self._scores(queries)]
        if not found:
            top(np.zeros(len(self), np.float32), k)  # a bad k is an error without queries, too
            width = min(k, len(self))
            return Hits(np.zeros((0, width), np.int32), np.zeros((0, width), np.float32))
        return Hits(np.stack([rows for rows, _ in found]), np.stack([scores for _, scores in found]))

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol: O(n * T) a query."""
        targets = np.asarray(targets)
        if targets.ndim != 2 or len(targets) != len(queries):
            raise ValueError(f"targets must have shape (Q, T) with Q = {len(queries)} queries, got {targets.shape}")
        ranks = np.zeros(targets.shape, np.int32)
        for q, score in enumerate(self._scores(queries)):
            ranks[q] = rank(score, targets[q])
        return ranks


def fingerprint_of(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _meta(catalog: Catalog, params: Params) -> dict[str, Any]:
    import bm25s

    return {
        "kind": "bm25",
        "format": FORMAT,
        "bm25s": bm25s.__version__,
        "catalog": catalog.fingerprint,
        "documents": len(catalog),
        "params": asdict(params),
    }


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> BM25:
    """Index ``catalog.texts`` into ``folder`` at one stroke, or in memory where it is None.

    A folder that already holds this very index is opened, not built again. Raises RetrieverError where it
    holds another, ValueError for a bad parameter or a catalogue without a single term.
    """
    import bm25s

    settings = Params(**params)
    meta = _meta(catalog, settings)
    if folder is not None and Path(folder).exists():
        return open_index(catalog, folder, **params)
    large = len(catalog) > LARGE
    logger.info("building BM25 over %d documents", len(catalog))
    tokens = analyze(catalog.texts, settings, progress=large)
    if not any(tokens):
        raise ValueError(
            "no document holds a single term after analysis: check the text column, or set stopwords: null"
        )
    model = bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene")
    model.index(tokens, show_progress=large)
    if folder is None:
        return BM25(meta, None, model)
    with new_folder(folder) as temporary:
        model.save(temporary, show_progress=False)
        (temporary / "index.json").write_text(json.dumps(meta, indent=1))
    return open_index(catalog, folder, **params)


def open_index(catalog: Catalog, folder: str | Path, **params: Any) -> BM25:
    """Open a saved index after checking that it is this catalogue's, with these parameters, and whole.

    Raises RetrieverError, naming the folder and what differs, otherwise.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise RetrieverError(
            f"index {folder} does not open ({type(error).__name__}: {error}): delete the folder, "
            "`rec-r1 index RECIPE` builds it again"
        ) from error
    expected = _meta(catalog, Params(**params))
    differing = [key for key in expected if meta.get(key) != expected[key]]
    if differing:
        key = differing[0]
        raise RetrieverError(
            f"index {folder} was built with another {key} ({meta.get(key)!r}, now {expected[key]!r}): "
            "delete the folder or set retriever.index to another one"
        )
    index = BM25(meta, folder)
    index._model  # noqa: B018  a truncated file is found now, before the first step, not in the middle of a run
    return index


def _load(folder: Path | None, meta: dict[str, Any]) -> Any:
    import bm25s

    try:
        model = bm25s.BM25.load(folder, mmap=True, load_corpus=False, show_progress=False)
        indptr, data, rows = (model.scores[name] for name in ("indptr", "data", "indices"))
        if not (len(data) == len(rows) == indptr[-1] and model.scores["num_docs"] == meta["documents"]):
            raise ValueError("the arrays do not fit together")
    except Exception as error:
        raise RetrieverError(
            f"index {folder} is damaged ({type(error).__name__}: {error}): delete the folder, "
            "`rec-r1 index RECIPE` builds it again"
        ) from error
    return model
