"""BM25 in Lucene's variant, by bm25s (Lù 2024, arXiv:2407.03618), which computes term weights when the index is built.

score(q, d) = sum over the terms t of q, each as often as it occurs in q, of
    ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * |d| / avgdl))

N is the number of documents, df the number of documents with the term, tf how often the term occurs in d, |d| the
number of terms of d, and avgdl their mean. A term in a field of weight w counts w times, in tf and in |d| (Robertson,
Zaragoza and Taylor 2004, "Simple BM25 extension to multiple weighted fields").

With the parameter `structured`, structured queries are answered, too; :mod:`retrievers.text.bm25_fields` has their
formula.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import damaged, fingerprint_of, is_filled, new_folder, read_meta, write_meta
from retrievers.core.parameters import Checks, is_name
from retrievers.core.ranking import check_k, check_targets, no_hits, rank, top
from retrievers.text import structured
from retrievers.text.analysis import terms
from retrievers.text.bm25_fields import Column, Fields, Terms, columns_of, load_columns, save_columns
from retrievers.text.bm25_ranks import Impacts, Packed, pack, peaks_of, ranks, scores
from retrievers.text.languages import LANGUAGES, check_analysis, code_of
from retrievers.text.structured import Serving
from retrievers.types import Hits, Query, RetrieverError, Schema, Traits

logger = logging.getLogger(__name__)
INDEX_FORMAT = 3  # The version of index.json and the analyser. Indexes of another version are refused.
PROGRESS_FROM = 50_000  # A build shows a progress bar from so many documents on.
CHUNK = 20_000  # The terms of so many documents are in memory as strings at a time.
HEAVIEST = 1000  # The largest weight of a field, whose terms are repeated so many times in memory.
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
    # Which structured queries are answered, such as {filters: [brand]}, see `format.action`. null: none.
    structured: Serving | None = None

    def __post_init__(self) -> None:
        checks = Checks(self)
        with checks:
            object.__setattr__(self, "structured", structured.read(self.structured))  # A recipe has a mapping.
        checks.numbers("k1", as_float=True)
        checks.numbers("b", most=1, as_float=True)
        for check in (self._check_fields, self._set_analysis):
            with checks:
                check()
        checks.raise_all()

    def _check_fields(self) -> None:
        if self.fields is None:
            return
        weights = self.fields if isinstance(self.fields, dict) else {}
        fit = [is_name(name) and type(w) is int and 1 <= w <= HEAVIEST for name, w in weights.items()]
        if not (fit and all(fit)):
            raise ValueError(
                f"retriever.params.fields must map fields to integer weights from 1 to {HEAVIEST}, got "
                f"{self.fields!r:.200}: write them as {{title: 3, text: 1}}"
            )

    def _set_analysis(self) -> None:
        """Replace a language by its code, and what follows from a language by its values."""
        language = code_of(self.language)
        own = LANGUAGES[language] if language is not None else None
        object.__setattr__(self, "language", language)
        if self.stemmer == OF_LANGUAGE:
            object.__setattr__(self, "stemmer", own.name if own is not None and own.stemmed else None)
        if self.stopwords == OF_LANGUAGE:
            object.__setattr__(self, "stopwords", language if own is not None and own.stopwords else None)
        check_analysis(self.stemmer, self.stopwords)

    @property
    def columns(self) -> dict[str, int]:
        """The searched fields and their weights."""
        return self.fields or {"text": 1}

    def described(self) -> dict[str, Any]:
        """The parameters for index.json. `structured` is left out where it is null, as in indexes of older versions."""
        found = asdict(self)
        if self.structured is None:
            del found["structured"]
        return found


def set_analysis(params: Any, names: Sequence[str]) -> None:
    """Check fields of another backend's parameters as those of `bm25`, and replace them as these are: a language by its
    code, and what follows from it by its values.

    params: a dataclass.
    names: its fields. Each is a parameter of `bm25`, too.

    Raises ValueError for a bad value.
    """
    given = vars(params)
    checked = vars(Params(**{name: given[name] for name in names}))
    for name in names:
        object.__setattr__(params, name, checked[name])


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

    It reads ``Query.text``, and with the parameter `structured` also ``Query.structured``. The index is opened on first
    use and may be shared between threads. With a folder, the pickle holds only the folder, and a child process maps the
    same files into memory; without one, it holds the index.

    meta: the contents of index.json.
    folder: the folder of the index. None = the index is in memory.
    built: what was built, where there is no folder.
    """

    def __init__(self, meta: dict[str, Any], folder: Path | None = None, built: Built | None = None) -> None:
        self._meta = meta
        # The path is absolute, because a child process may have another working directory.
        self._folder = folder.absolute() if folder is not None else None
        self._built = built
        self.params = Params(**meta["params"])
        self.fingerprint = fingerprint_of(meta | {"params": self.params.described()})

    def __reduce__(self) -> tuple[Callable[..., BM25], tuple[Any, ...]]:
        return BM25, (self._meta, self._folder, None if self._folder else self._built)

    @cached_property
    def _model(self) -> Terms:
        """The index of texts."""
        model = self._built.model if self._built is not None else _load(self._folder, self._meta)
        return _terms(model, len(self))

    @cached_property
    def _fields(self) -> Fields | None:
        """What structured queries read. None = they are not served."""
        if self.params.structured is None:
            return None
        columns, weights = self.params.columns, {name: float(weight) for name, weight in self.params.columns.items()}
        if self._built is not None:
            models, filters = self._built.fields, self._built.filters
        else:
            models, filters = _load_fields(self._folder, self._meta, self.params)
        found = {name: _terms(model, len(self)) for name, model in models.items()}
        return Fields(weights, {"text": self._model} if columns == {"text": 1} else found, filters, len(self))

    @cached_property
    def _schema(self) -> Schema | None:
        return self._fields.schema() if self._fields is not None else None

    def retriever_traits(self) -> Traits:
        """Which structured queries it serves."""
        return Traits(structured=self._schema)

    def __len__(self) -> int:
        return int(self._meta["documents"])

    def _pack(self, queries: Sequence[Query]) -> Packed:
        analyzed = analyze([query.text for query in queries], self.params)
        vocabulary = self._model.vocabulary
        known = [[vocabulary[term] for term in text if term in vocabulary] for text in analyzed]
        return pack(known, self._model.impacts.peaks)

    def _scores(self, queries: Sequence[Query]) -> Iterator[np.ndarray]:
        """Yield the scores of all documents for each query: (n,) float32."""
        structured.check(queries, self._schema)
        parts = [query.structured for query in queries]
        texts = [text for one in parts if one is not None for text in structured.in_order(one)]
        terms = iter(analyze(texts, self.params))
        packed = self._pack(queries)
        for q, one in enumerate(parts):
            if one is None or self._fields is None:
                yield scores(self._model.impacts, packed, q)
            else:
                yield self._fields.scores(one, next(terms), next(terms), next(terms))

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol. bm25s' own ``retrieve`` is not used: it returns arbitrary documents where none matches."""
        hits = no_hits(len(queries), check_k(k, len(self)))
        for q, values in enumerate(self._scores(queries)):
            hits.rows[q], hits.scores[q] = top(values, k)
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol. :mod:`retrievers.text.bm25_ranks` explains the computation. For structured queries, the
        scores of all documents are computed."""
        targets = check_targets(queries, targets, len(self), structured=True)
        in_parts = [q for q, query in enumerate(queries) if query.structured is not None]
        if not in_parts:
            return ranks(self._model.impacts, self._pack(queries), targets)
        found = np.zeros(targets.shape, np.int32)
        plain = [q for q, query in enumerate(queries) if query.structured is None]
        found[plain] = ranks(self._model.impacts, self._pack([queries[q] for q in plain]), targets[plain])
        for q, values in zip(in_parts, self._scores([queries[q] for q in in_parts]), strict=True):
            found[q] = rank(values, targets[q])
        return found


class Built(NamedTuple):
    """An index in memory.

    model: the bm25s.BM25 of texts.
    fields: for structured queries on several fields: field -> its bm25s.BM25.
    filters: for structured queries: the values of the fields by which they filter.
    """

    model: Any
    fields: Mapping[str, Any]
    filters: Mapping[str, Column]


def _terms(model: Any, documents: int) -> Terms:
    data, rows, starts = (np.asarray(model.scores[name]) for name in ("data", "indices", "indptr"))
    return Terms(model.vocab_dict, Impacts(data, rows, starts, peaks_of(data, starts), documents))


def _meta(catalog: Catalog, params: Params) -> dict[str, Any]:
    import bm25s

    return {
        "kind": "bm25",
        "format": INDEX_FORMAT,
        "bm25s": bm25s.__version__,
        "catalog": catalog.fingerprint,
        "documents": len(catalog),
        "params": params.described(),
    }


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> BM25:
    """Build a BM25 index of a catalogue, or open the one in ``folder``.

    catalog: the documents.
    folder: where the index is written, atomically. None, the default, = the index is only in memory.
    params: see :class:`Params`.

    Raises RetrieverError where the folder holds another index. Raises ValueError for a bad parameter, a field that the
    catalogue does not have, and a catalogue without a single term.
    """
    settings = Params(**params)
    meta = _meta(catalog, settings)
    if folder is not None and is_filled(folder):
        return open_index(catalog, folder, **params)
    logger.info("building BM25 over %d documents", len(catalog))
    filters = columns_of(catalog, settings.structured.filters) if settings.structured is not None else {}
    model = _indexed(catalog, settings, settings.columns)
    if model is None:
        raise ValueError(
            "no document holds a single term after analysis: check the text column, or set stopwords: null"
        )
    built = Built(model, _field_models(catalog, settings), filters)
    if folder is None:
        return BM25(meta, None, built)
    with new_folder(folder) as temporary:
        built.model.save(temporary, show_progress=False)
        for i, one in enumerate(built.fields.values()):
            one.save(temporary / f"field{i}", show_progress=False)
        if settings.structured is not None:
            save_columns(temporary, list(built.fields), filters)
        write_meta(temporary, meta)
    return open_index(catalog, folder, **params)


def _indexed(catalog: Catalog, params: Params, columns: Mapping[str, int]) -> Any:
    """The bm25s.BM25 of some fields with their weights. None = no document has a term in them."""
    import bm25s

    model = bm25s.BM25(k1=params.k1, b=params.b, method="lucene")
    tokens = _tokens(catalog, params, columns)
    if not tokens.vocab:
        return None
    model.index(tokens, show_progress=len(catalog) > PROGRESS_FROM)
    falling = np.flatnonzero(np.diff(model.scores["indices"]) <= 0) + 1
    if not np.isin(falling, model.scores["indptr"]).all():
        raise RuntimeError(
            "bm25s no longer sorts postings by document, which bm25_ranks.py requires: please report this"
        )
    return model


def _field_models(catalog: Catalog, params: Params) -> dict[str, Any]:
    """For structured queries: the bm25s.BM25 of each field, unless that of texts is the same. A field without a single
    term has none."""
    if params.structured is None or params.columns == {"text": 1}:
        return {}
    found = {name: _indexed(catalog, params, {name: 1}) for name in params.columns}
    return {name: model for name, model in found.items() if model is not None}


def _tokens(catalog: Catalog, params: Params, fields: Mapping[str, int]) -> Any:
    """The term ids of all documents and the vocabulary, in the form that bm25s takes.

    fields: the fields whose terms are taken, with how often each counts.

    Documents are analysed CHUNK at a time, so that the terms of all documents are never in memory as strings at once.
    """
    from bm25s.tokenization import Tokenized
    from tqdm import tqdm

    vocabulary: dict[str, int] = {}
    ids: list[list[int]] = [[] for _ in range(len(catalog))]
    columns = [(catalog.column(name), weight) for name, weight in fields.items()]
    for start in tqdm(
        range(0, len(catalog), CHUNK), "terms", disable=len(catalog) <= PROGRESS_FROM, unit_scale=CHUNK, leave=False
    ):
        for column, weight in columns:
            for row, found in enumerate(analyze(column[start : start + CHUNK], params), start):
                ids[row] += [vocabulary.setdefault(term, len(vocabulary)) for term in found] * weight
    return Tokenized(ids, vocabulary)


def open_index(catalog: Catalog, folder: str | Path, **params: Any) -> BM25:
    """Open a saved index, and check that it is complete and was built from this catalogue with these parameters.

    Raises RetrieverError, naming the folder and what differs, otherwise.
    """
    folder = Path(folder)
    index = BM25(read_meta(folder, _meta(catalog, Params(**params))), folder)
    if len(index) > PROGRESS_FROM and importlib.util.find_spec("numba") is None:
        logger.warning("BM25 ranks %d documents ten times as fast after: pip install 'rec-r1[fast]'", len(index))
    # The index is loaded now, so that a damaged file is found before a training starts.
    index._model, index._schema  # noqa: B018
    return index


def _load(folder: Path | None, meta: dict[str, Any]) -> Any:
    assert folder is not None  # An index without a folder is already in memory.
    if read_meta(folder, {}) != meta:  # A child process opens the folder later than its parent.
        raise RetrieverError(f"index {folder} was replaced while it was in use: start the run again")
    try:
        return _read_model(folder, meta)
    except Exception as error:
        raise damaged(folder, error) from error


def _load_fields(folder: Path | None, meta: dict[str, Any], params: Params) -> tuple[dict[str, Any], dict[str, Column]]:
    """The bm25s.BM25 of each field, and the values of the fields by which queries filter."""
    assert folder is not None and params.structured is not None
    try:
        names, filters = load_columns(folder, params.structured.filters, meta["documents"])
        return {name: _read_model(folder / f"field{i}", meta) for i, name in enumerate(names)}, filters
    except Exception as error:
        raise damaged(folder, error) from error


def _read_model(folder: Path, meta: dict[str, Any]) -> Any:
    """A saved bm25s.BM25. Raises ValueError, among others, where its files are damaged."""
    import bm25s

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
    return model
