"""BM25 in Lucene's variant, by bm25s (Lù 2024, arXiv:2407.03618), which computes term weights when the index is built.

score(q, d) = sum over the terms t of q, each as often as it occurs in q, of
    ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * |d| / avgdl))

N is the number of documents, df the number of documents with the term, tf how often the term occurs in d, |d| the
number of terms of d, and avgdl their mean. A term in a field of weight w counts w times, in tf and in |d| (Robertson,
Zaragoza and Taylor 2004, "Simple BM25 extension to multiple weighted fields").
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import damaged, fingerprint_of, is_filled, new_folder, read_meta, write_meta
from retrievers.core.ranking import check_k, check_targets, no_hits, top
from retrievers.text.analysis import terms
from retrievers.text.bm25_ranks import Impacts, Packed, pack, peaks_of, ranks, scores
from retrievers.text.languages import LANGUAGES, check_analysis, code_of
from retrievers.types import Hits, Query, RetrieverError

logger = logging.getLogger(__name__)
INDEX_FORMAT = 3  # The version of index.json and the analyser. Indexes of another version are refused.
PROGRESS_FROM = 50_000  # A build shows a progress bar from so many documents on.
CHUNK = 20_000  # The terms of so many documents are in memory as strings at a time.
OF_LANGUAGE = "auto"  # The value that means the language's own stemmer or stop words.


@dataclass(frozen=True)
class Params:
    """The parameters of `bm25`. Raises ValueError, naming the field, for a bad value."""

    k1: float = 1.2  # k1 of BM25: how fast repetitions of a term stop counting; at least 0.
    b: float = 0.75  # b of BM25: how much long documents are discounted; from 0 to 1.
    # An ISO 639-1 code or an English name, which brings its stemmer and stop words. null: no language.
    language: str | None = "en"
    stemmer: str | None = OF_LANGUAGE  # A Snowball algorithm. auto: the language's own. null: words are not stemmed.
    # The language whose stop words are dropped. auto: the language's own. null: none are dropped.
    stopwords: str | None = OF_LANGUAGE
    # Fields that are indexed instead of the text, with how often each counts: {title: 3, text: 1}.
    fields: dict[str, int] | None = None

    def __post_init__(self) -> None:
        weights = self.fields.values() if isinstance(self.fields, dict) else []
        if self.fields is not None and not (weights and all(type(w) is int and w >= 1 for w in weights)):
            raise ValueError(
                f"retriever.params.fields must map fields to integer weights >= 1, got {self.fields!r}: write them as "
                "{title: 3, text: 1}"
            )
        for name, highest, allowed in (("k1", math.inf, "be >= 0"), ("b", 1, "lie in [0, 1]")):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not 0 <= value <= highest:
                usual = type(self).__dataclass_fields__[name].default
                raise ValueError(f"retriever.params.{name} must {allowed}, got {value!r}: {usual} is usual")
            object.__setattr__(self, name, float(value))  # So that 1 and 1.0 give the same fingerprint.
        language = code_of(self.language)
        own = LANGUAGES[language] if language is not None else None
        object.__setattr__(self, "language", language)
        if self.stemmer == OF_LANGUAGE:
            object.__setattr__(self, "stemmer", own.name if own is not None and own.stemmed else None)
        if self.stopwords == OF_LANGUAGE:
            object.__setattr__(self, "stopwords", language if own is not None and own.stopwords else None)
        check_analysis(self.stemmer, self.stopwords)


def analyze(texts: Sequence[str], params: Params) -> list[list[str]]:
    """The terms of each text, which may be a document or a query; see :mod:`retrievers.text.analysis`.

    A query that consists of stop words, such as "to be or not", has no term and retrieves nothing.
    """
    return terms(texts, params.language, params.stemmer, params.stopwords)


def analysis_language(params: Mapping[str, Any]) -> str | None:
    """The code of the language that the analyser is for. None = no language."""
    return Params(**params).language


class BM25:
    """A BM25 retriever; see :class:`retrievers.types.Retriever` for the contract.

    It reads ``Query.text`` only. The index is opened on first use and may be shared between threads. With a folder, the
    pickle holds only the folder, and a child process maps the same files into memory; without one, it holds the index.

    meta: the contents of index.json.
    folder: the folder of the index. None = the index is in memory.
    model: the bm25s.BM25 that was built, where there is no folder.
    """

    def __init__(self, meta: dict[str, Any], folder: Path | None = None, model: Any = None) -> None:
        self._meta = meta
        # The path is absolute, because a child process may have another working directory.
        self._folder = folder.absolute() if folder is not None else None
        self._built = model
        self.params = Params(**meta["params"])
        self.fingerprint = fingerprint_of(meta | {"params": asdict(self.params)})

    def __reduce__(self) -> tuple[Callable[..., BM25], tuple[Any, ...]]:
        return BM25, (self._meta, self._folder, None if self._folder else self._built)

    @cached_property
    def _model(self) -> tuple[dict[str, int], Impacts]:
        """The id of each term, and the matrix of term weights."""
        model = self._built if self._built is not None else _load(self._folder, self._meta)
        data, rows, starts = (np.asarray(model.scores[name]) for name in ("data", "indices", "indptr"))
        return model.vocab_dict, Impacts(data, rows, starts, peaks_of(data, starts), len(self))

    def __len__(self) -> int:
        return int(self._meta["documents"])

    def _pack(self, queries: Sequence[Query]) -> Packed:
        vocabulary, impacts = self._model
        analyzed = analyze([query.text for query in queries], self.params)
        known = [[vocabulary[term] for term in text if term in vocabulary] for text in analyzed]
        return pack(known, impacts.peaks)

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol. bm25s' own ``retrieve`` is not used: it returns arbitrary documents where none matches."""
        hits, packed = no_hits(len(queries), check_k(k, len(self))), self._pack(queries)
        for q in range(len(queries)):
            hits.rows[q], hits.scores[q] = top(scores(self._model[1], packed, q), k)
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol. :mod:`retrievers.text.bm25_ranks` explains the computation."""
        targets = check_targets(queries, targets, len(self))
        return ranks(self._model[1], self._pack(queries), targets)


def _meta(catalog: Catalog, params: Params) -> dict[str, Any]:
    import bm25s

    return {
        "kind": "bm25",
        "format": INDEX_FORMAT,
        "bm25s": bm25s.__version__,
        "catalog": catalog.fingerprint,
        "documents": len(catalog),
        "params": asdict(params),
    }


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> BM25:
    """Build a BM25 index of a catalogue, or open the one in ``folder``.

    catalog: the documents.
    folder: where the index is written, atomically. None, the default, = the index is only in memory.
    params: see :class:`Params`.

    Raises RetrieverError where the folder holds another index. Raises ValueError for a bad parameter, a field that the
    catalogue does not have, and a catalogue without a single term.
    """
    import bm25s

    settings = Params(**params)
    meta = _meta(catalog, settings)
    if folder is not None and is_filled(folder):
        return open_index(catalog, folder, **params)
    logger.info("building BM25 over %d documents", len(catalog))
    model = bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene")
    model.index(_tokens(catalog, settings), show_progress=len(catalog) > PROGRESS_FROM)
    falling = np.flatnonzero(np.diff(model.scores["indices"]) <= 0) + 1
    if not np.isin(falling, model.scores["indptr"]).all():
        raise RuntimeError(
            "bm25s no longer sorts postings by document, which bm25_ranks.py requires: please report this"
        )
    if folder is None:
        return BM25(meta, None, model)
    with new_folder(folder) as temporary:
        model.save(temporary, show_progress=False)
        write_meta(temporary, meta)
    return open_index(catalog, folder, **params)


def _tokens(catalog: Catalog, params: Params) -> Any:
    """The term ids of all documents and the vocabulary, in the form that bm25s takes.

    Documents are analysed CHUNK at a time, so that the terms of all documents are never in memory as strings at once.
    """
    from bm25s.tokenization import Tokenized
    from tqdm import tqdm

    vocabulary: dict[str, int] = {}
    ids: list[list[int]] = [[] for _ in range(len(catalog))]
    columns = [(catalog.column(name), weight) for name, weight in (params.fields or {"text": 1}).items()]
    for start in tqdm(
        range(0, len(catalog), CHUNK), "terms", disable=len(catalog) <= PROGRESS_FROM, unit_scale=CHUNK, leave=False
    ):
        for column, weight in columns:
            for row, found in enumerate(analyze(column[start : start + CHUNK], params), start):
                ids[row] += [vocabulary.setdefault(term, len(vocabulary)) for term in found] * weight
    if not vocabulary:
        raise ValueError(
            "no document holds a single term after analysis: check the text column, or set stopwords: null"
        )
    return Tokenized(ids, vocabulary)


def open_index(catalog: Catalog, folder: str | Path, **params: Any) -> BM25:
    """Open a saved index, and check that it is complete and was built from this catalogue with these parameters.

    Raises RetrieverError, naming the folder and what differs, otherwise.
    """
    folder = Path(folder)
    index = BM25(read_meta(folder, _meta(catalog, Params(**params))), folder)
    if len(index) > PROGRESS_FROM and importlib.util.find_spec("numba") is None:
        logger.warning("BM25 ranks %d documents ten times as fast after: pip install 'rec-r1[fast]'", len(index))
    index._model  # noqa: B018  The index is loaded now, so that a damaged file is found before a training starts.
    return index


def _load(folder: Path | None, meta: dict[str, Any]) -> Any:
    import bm25s

    assert folder is not None  # An index without a folder is already in memory.
    if read_meta(folder, {}) != meta:  # A child process opens the folder later than its parent.
        raise RetrieverError(f"index {folder} was replaced while it was in use: start the run again")
    try:
        model = bm25s.BM25.load(folder, mmap=True, load_corpus=False, show_progress=False)
        indptr, data, rows = (model.scores[name] for name in ("indptr", "data", "indices"))
        # There is one column per term. bm25s also numbers the empty term, which has no column.
        whole = len(data) == len(rows) == indptr[-1] and len(model.vocab_dict) - (len(indptr) - 1) in (0, 1)
        if not (whole and model.method == "lucene" and model.scores["num_docs"] == meta["documents"]):
            raise ValueError("the files do not belong together")
        # A crash of the machine can leave files of the right length that hold only zeros, with which no query would
        # retrieve anything. This check reads all arrays once, which also brings them into the page cache.
        sound = (np.diff(indptr) > 0).all() and data.min() > 0 and np.isfinite(data.max())
        if not (sound and rows.min() >= 0 and rows.max() < meta["documents"]):
            raise ValueError("the arrays hold values that are out of range")
    except Exception as error:
        raise damaged(folder, error) from error
    return model
