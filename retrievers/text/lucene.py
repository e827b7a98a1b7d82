"""BM25 by Lucene, with the Anserini classes of pyserini, over an index of the catalogue or over an existing index.

This module calls Lucene itself and not pyserini's LuceneSearcher, which loads the stored document of every hit, while
a reward needs none of them. Lucene rounds document lengths to one byte, so its scores differ slightly from `bm25`'s.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock
from typing import Any, NamedTuple

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import damaged, fingerprint_of, is_filled, new_folder, read_meta, write_meta
from retrievers.core.numba_threads import threads
from retrievers.core.ranking import check_k, check_plain, check_targets, no_hits
from retrievers.text import jvm
from retrievers.text.lucene_params import RM3_DEFAULTS, Params
from retrievers.types import Hits, Query, RetrieverError

logger = logging.getLogger(__name__)
INDEX_FORMAT = 2
SEARCH_DEPTH = 1000  # A target is first looked up in so many hits. Otherwise Lucene counts the documents above it.
# pyjnius has one method object per class, which stores the object that it was last looked up on. Two threads that call
# a method on different objects may therefore exchange these. Calls on objects of a single thread (builders, maps) are
# made under this lock. The searcher needs no lock, because all threads use the same one.
_PYJNIUS_LOCK = RLock()
TIE_MARGIN = 64  # So many hits beyond k are requested, to see whether more documents have the k-th best score.
CONTROL_CHARACTERS, EM_SPACE = "".join(map(chr, range(33))), "\u2003"


class _Engine(NamedTuple):
    """The Java objects of an open index."""

    searcher: Any
    analyzer: Any
    generator: Any
    feedback: Any  # Anserini's SimpleSearcher with RM3. None = no RM3.
    rows: np.ndarray | None  # (n,) int32, the row of each document number of Lucene. None = they are the same.


class Lucene:
    """A BM25 retriever by Lucene; see :class:`retrievers.types.Retriever` for the contract.

    It reads ``Query.text`` only, as a bag of words without query syntax. The index is opened on first use and may be
    shared between threads. The pickle holds only the folder: a spawned child process opens it in a JVM of its own,
    and a forked one raises RetrieverError.
    """

    def __init__(
        self, meta: dict[str, Any], folder: Path, heap: str, catalog: Catalog | None = None, keep: Any = None
    ) -> None:
        self._meta = meta
        self._folder = folder.absolute()  # A child process may have another working directory.
        self._catalog = catalog  # None = the ids in Lucene are row numbers, not the ids of a catalogue.
        self._keep = keep  # A temporary folder that must exist as long as this retriever.
        self.params = Params(**meta["params"] | {"heap": heap})
        self.fingerprint = fingerprint_of(meta)

    def __reduce__(self) -> tuple[Callable[..., Lucene], tuple[Any, ...]]:
        return Lucene, (self._meta, self._folder, self.params.heap, self._catalog)

    def __len__(self) -> int:
        return int(self._meta["documents"])

    @cached_property
    def _engine(self) -> _Engine:
        jvm.start(self.params.heap)
        return jvm.run_all(lambda job: job(), [self._open], 1)[0]

    def _open(self) -> _Engine:
        path = _existing(self.params.existing) if self.params.existing else self._folder / "lucene"
        mapped = self._folder / "rows.npy"
        try:
            rows = np.load(mapped, mmap_mode="r") if mapped.is_file() else None
            return _open_engine(path, self.params, rows, len(self))
        except RetrieverError:
            raise
        except Exception as error:  # This includes the exceptions of Java.
            raise damaged(self._folder, error) from error

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol. The queries are distributed over threads."""
        check_plain(queries)
        k = check_k(k, len(self))
        hits = no_hits(len(queries), k)
        self._engine  # noqa: B018  The index is opened here, so that the threads do not each open it.
        found = jvm.run_all(lambda query: self._top(self._query(query.text), k), queries, threads())
        for q, (rows, scores) in enumerate(found):
            hits.rows[q, : len(rows)], hits.scores[q, : len(rows)] = rows, scores
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol. For a target below rank 1,000, Lucene passes over all documents that match the query."""
        targets = check_targets(queries, targets, len(self))
        out = np.zeros(targets.shape, np.int32)
        self._engine  # noqa: B018
        asked = [q for q in range(len(queries)) if (targets[q] >= 0).any()]
        found = jvm.run_all(lambda q: self._ranks(self._query(queries[q].text), targets[q]), asked, threads())
        for q, ranks in zip(asked, found, strict=True):
            out[q] = ranks
        return out

    def _query(self, text: str) -> Any:
        """The text as a query of Lucene: its terms, each as often as it occurs, or their expansion by RM3."""
        from jnius import autoclass

        engine = self._engine
        query = engine.generator.buildQuery("contents", engine.analyzer, text)
        if engine.feedback is None or not self._top(query, 1)[0].size:
            return query
        with _PYJNIUS_LOCK:
            weights = engine.feedback.get_feedback_terms(text)
            builder = autoclass("org.apache.lucene.search.BooleanQuery$Builder")()
            for term in weights.keySet().toArray():
                one = autoclass("org.apache.lucene.search.TermQuery")(
                    autoclass("org.apache.lucene.index.Term")("contents", term)
                )
                boosted = autoclass("org.apache.lucene.search.BoostQuery")(one, weights.get(term))
                builder.add(boosted, autoclass("org.apache.lucene.search.BooleanClause$Occur").SHOULD)
            return builder.build()

    def _top(self, query: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows and scores of at most k hits, best first. Of equal scores, the smaller row comes first."""
        n, depth = len(self), k
        while True:
            # Lucene orders equal scores by its own document numbers. Where these are not the rows, all documents with
            # the k-th best score are needed.
            depth = min(n, depth if self._engine.rows is None else depth + TIE_MARGIN)
            hits = self._engine.searcher.search(query, depth).scoreDocs
            docs = np.array([hit.doc for hit in hits], np.int64)
            scores = np.array([hit.score for hit in hits], np.float32)
            if self._engine.rows is None or len(hits) < depth or depth == n or scores[k - 1] != scores[-1]:
                break
            depth *= 2
        rows = docs if self._engine.rows is None else np.asarray(self._engine.rows)[docs]
        order = np.lexsort((rows, -scores))[:k]
        return rows[order], scores[order]

    def _ranks(self, query: Any, targets: np.ndarray) -> np.ndarray:
        ranks = np.zeros(len(targets), np.int32)
        own = {int(row): self._score(query, int(row)) for row in targets if row >= 0}
        if not any(score is not None for score in own.values()):
            return ranks
        rows, _ = self._top(query, min(SEARCH_DEPTH, len(self)))
        place = {int(row): i + 1 for i, row in enumerate(rows)}
        for t, row in enumerate(targets):
            score = own.get(int(row))
            if score is not None:
                ranks[t] = place.get(int(row)) or self._count(query, int(row), score)
        return ranks

    def _score(self, query: Any, row: int) -> float | None:
        """The score of one document. None where no term matches."""
        from jnius import autoclass

        occur = autoclass("org.apache.lucene.search.BooleanClause$Occur")
        identifier = str(row) if self._catalog is None else self._catalog.ids[row]
        this = autoclass("org.apache.lucene.search.TermQuery")(
            autoclass("org.apache.lucene.index.Term")("id", identifier)
        )
        with _PYJNIUS_LOCK:
            builder = autoclass("org.apache.lucene.search.BooleanQuery$Builder")()
            builder.add(query, occur.MUST)
            builder.add(this, occur.FILTER)
            only = builder.build()
        hits = self._engine.searcher.search(only, 1).scoreDocs
        return hits[0].score if hits else None

    def _count(self, query: Any, row: int, score: float) -> int:
        """The rank of a document: 1 + the number of higher scores + the number of equal scores with a smaller row."""
        from jnius import autoclass, cast

        def between(low: float, high: float | None, closed: bool) -> Any:
            values = autoclass("org.apache.lucene.queries.function.valuesource.QueryValueSource")(query, -1.0)
            ends = [
                None if x is None else cast("java.lang.Number", autoclass("java.lang.Float")(x)) for x in (low, high)
            ]
            return autoclass("org.apache.lucene.queries.function.FunctionRangeQuery")(values, *ends, closed, closed)

        searcher = self._engine.searcher
        tied = between(score, score, True)
        docs = [hit.doc for hit in searcher.search(tied, max(1, searcher.count(tied))).scoreDocs]
        rows = np.array(docs, np.int64) if self._engine.rows is None else np.asarray(self._engine.rows)[docs]
        return 1 + int(searcher.count(between(score, None, False))) + int((rows < row).sum())


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> Lucene:
    """Build a Lucene index of ``catalog``, or open the one in ``folder``.

    folder: where the index is written, atomically. None, the default, = a temporary folder.
    params: see :class:`Params`.

    Raises RetrieverError where the folder holds another index, and where Java or a package is missing. Raises
    ValueError for a bad parameter, and for an existing index whose documents are not the catalogue's.
    """
    settings = Params(**params)
    keep = TemporaryDirectory(prefix="rec-r1-lucene-") if folder is None else None
    folder = Path(keep.name) / "index" if keep is not None else Path(folder or "")
    jvm.start(settings.heap)
    meta = _meta(catalog, settings)
    if not is_filled(folder):
        with new_folder(folder) as temporary:
            _build(catalog, settings, temporary)
            write_meta(temporary, meta)
    lucene = Lucene(read_meta(folder, meta), folder, settings.heap, catalog if settings.existing else None, keep)
    lucene._engine  # noqa: B018  The index is opened now, so that a damaged file is found before a training starts.
    return lucene


def analysis_language(params: Mapping[str, Any]) -> str | None:
    """The code of the language that the analyzer is for. None = no language."""
    settings = Params(**params)
    return None if settings.whitespace else settings.language


def _meta(catalog: Catalog, params: Params) -> dict[str, Any]:
    from jnius import autoclass

    return {
        "kind": "lucene",
        "format": INDEX_FORMAT,
        "lucene": autoclass("org.apache.lucene.util.Version").LATEST.toString(),
        "catalog": catalog.fingerprint,
        "documents": len(catalog),
        "params": {name: value for name, value in asdict(params).items() if name != "heap"},  # It changes no ranks.
    }


def _build(catalog: Catalog, params: Params, folder: Path) -> None:
    from jnius import autoclass

    if params.existing:
        np.save(folder / "rows.npy", _map_ids(catalog, _existing(params.existing)))
        return
    logger.info("building a Lucene index of %d documents", len(catalog))
    source = folder / "collection"
    source.mkdir()
    with (source / "documents.jsonl").open("w", encoding="utf-8") as file:
        for row, text in enumerate(catalog.texts):
            # Anserini skips documents of control characters and white space, but every row needs a document. It does
            # not treat the em space as white space, and the em space has no term.
            blank = not text.strip(CONTROL_CHARACTERS).strip()
            file.write(json.dumps({"id": str(row), "contents": EM_SPACE if blank else text}) + "\n")
    options = ["-collection", "JsonCollection", "-input", str(source), "-index", str(folder / "lucene")]
    # With one thread and one segment, Lucene numbers documents in the order of their rows.
    options += ["-threads", "1", "-optimize", "-quiet", "-stemmer", params.stemmer]
    # Anserini ignores -pretokenized where AnalyzerMap has an analyzer for the language, which it has not for English.
    options += ["-language", "en" if params.whitespace else str(params.language)]
    options += ["-keepStopwords"] * (not params.stopwords) + ["-pretokenized"] * params.whitespace
    options += ["-storeDocvectors"] * bool(params.rm3)
    autoclass("io.anserini.index.IndexCollection").main(options)
    (source / "documents.jsonl").unlink()
    source.rmdir()
    reader = _reader(folder / "lucene")
    if reader.numDocs() != len(catalog):
        raise RetrieverError(f"Lucene indexed {reader.numDocs()} of {len(catalog)} documents: free space on the disk")
    stored, wanted = reader.storedFields(), autoclass("java.util.Collections").singleton("id")
    for doc in np.linspace(0, len(catalog) - 1, min(len(catalog), 1000)).astype(int).tolist():
        if stored.document(doc, wanted).get("id") != str(doc):
            raise RuntimeError("Lucene numbered the documents in another order: please report this")
    reader.close()


def _map_ids(catalog: Catalog, path: Path) -> np.ndarray:
    """The row of each Lucene document: (n,) int32. Raises ValueError where index and catalogue hold other documents."""
    from jnius import autoclass
    from tqdm import tqdm

    reader = _reader(path)
    if not reader.numDocs() == reader.maxDoc() == len(catalog):
        raise ValueError(
            f"retriever.params.existing: {path} holds {reader.numDocs()} documents "
            f"({reader.maxDoc() - reader.numDocs()} deleted), the catalogue {len(catalog)}: take an index of the same "
            "documents"
        )
    stored, wanted = reader.storedFields(), autoclass("java.util.Collections").singleton("id")
    documents = tqdm(range(len(catalog)), "ids", disable=len(catalog) < 50_000, leave=False)
    ids = [stored.document(doc, wanted).get("id") for doc in documents]
    reader.close()
    try:
        return catalog.rows(ids)
    except KeyError as error:
        raise ValueError(f"retriever.params.existing: {path}: {error}: take an index of the same documents") from error


def _existing(name: str) -> Path:
    """The folder of an existing index. A prebuilt one of pyserini is downloaded. Raises ValueError for other names."""
    if Path(name).is_dir():
        return Path(name).absolute()
    from pyserini.util import download_prebuilt_index

    try:
        return Path(download_prebuilt_index(name, verbose=False))
    except Exception as error:
        raise ValueError(
            f"retriever.params.existing: {name!r} is neither a folder nor a prebuilt index of pyserini that can be "
            f"downloaded ({error}): check the name and the network"
        ) from error


def _reader(path: Path) -> Any:
    from jnius import autoclass, cast

    directory = autoclass("org.apache.lucene.store.MMapDirectory")(autoclass("java.nio.file.Paths").get(str(path)))
    reader = autoclass("org.apache.lucene.index.DirectoryReader").open(directory)
    return cast("org.apache.lucene.index.IndexReader", reader)


def _open_engine(path: Path, params: Params, rows: np.ndarray | None, documents: int) -> _Engine:
    from jnius import autoclass

    reader = _reader(path)
    if reader.numDocs() != documents:
        raise ValueError(f"{reader.numDocs()} documents instead of {documents}")
    for leaf in reader.leaves().toArray():
        leaf.reader().checkIntegrity()  # This reads all files once and compares them with their checksums.
    autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(1 << 20)  # For queries with many words.
    searcher = autoclass("org.apache.lucene.search.IndexSearcher")(reader)
    searcher.setSimilarity(autoclass("org.apache.lucene.search.similarities.BM25Similarity")(params.k1, params.b))
    if params.whitespace:
        analyzer = autoclass("org.apache.lucene.analysis.core.WhitespaceAnalyzer")()
    elif params.language != "en":
        analyzer = autoclass("io.anserini.analysis.AnalyzerMap").getLanguageSpecificAnalyzer(params.language)
    else:
        english = autoclass("io.anserini.analysis.DefaultEnglishAnalyzer")
        analyzer = english.fromArguments(params.stemmer, not params.stopwords, None)
    generator = autoclass("io.anserini.search.query.BagOfWordsQueryGenerator")()
    feedback = None
    if params.rm3:
        feedback = autoclass("io.anserini.search.SimpleSearcher")(str(path))
        feedback.set_analyzer(analyzer)
        feedback.set_bm25(params.k1, params.b)
        settings = RM3_DEFAULTS | (params.rm3 if isinstance(params.rm3, dict) else {})
        feedback.set_rm3(settings["fb_terms"], settings["fb_docs"], settings["original_query_weight"])
    return _Engine(searcher, analyzer, generator, feedback, rows)
