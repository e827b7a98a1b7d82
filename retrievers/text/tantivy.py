"""BM25 by tantivy, a search engine like Lucene that runs inside this process, without Java.

The analyser of `bm25` makes the terms, so that all scripts work, and both backends match the same words. tantivy's own
tokenizers split neither Chinese nor Japanese nor Thai. Only words of more than 65,530 bytes are left out by tantivy.

score(q, d) = sum over the fields f of weight(f) * the sum over the terms t of q, each as often as it occurs in q, of
    ln(1 + (N - df + 0.5) / (df + 0.5)) * 2.2 * tf / (tf + 1.2 * (0.25 + 0.75 * |d| / avgdl))

N is the number of documents; df, tf, |d| and avgdl are those of the field (see :mod:`retrievers.text.bm25`). tantivy
fixes k1 = 1.2 and b = 0.75, and stores |d| in one byte, as Lucene does: lengths above 40 are rounded down by at most an
eighth. The constant factor k1 + 1 = 2.2 changes no rank.

A query is a set of terms in a Boolean query and is never parsed, so a text of a policy can do nothing but search.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import damaged, fingerprint_of, is_filled, new_folder, read_meta, write_meta
from retrievers.core.numba_threads import run_in_threads
from retrievers.core.ranking import check_k, check_targets, no_hits
from retrievers.text import bm25, structured
from retrievers.text.tantivy_params import Params
from retrievers.text.tantivy_queries import made_of
from retrievers.types import Hits, Query, RetrieverError, Schema, Traits

logger = logging.getLogger(__name__)
INSTALL = "pip install 'rec-r1[tantivy]'"
INDEX_FORMAT = 1  # The version of index.json, the schema and the terms. Indexes of another version are refused.
SEARCH_DEPTH = 300  # A target is first looked up in so many hits.
FEW, MANY = 1_000, 100_000  # Below these, it is looked up among so many hits at least, and so many at most.
MEMORY = 4_290_000_000  # About the largest buffer of a segment that tantivy admits. It takes only what it needs.
CHECKED_AT_ONCE = 1 << 20  # So many bytes of a file are read at a time to compute its checksum.


class _Engine(NamedTuple):
    """An open index of tantivy."""

    schema: Any
    searcher: Any


class Tantivy:
    """A BM25 retriever by tantivy; see :class:`retrievers.types.Retriever` for the contract.

    It reads ``Query.text`` as a bag of words without query syntax, and with the parameter `structured` also
    ``Query.structured``. The index is opened on first use, may be
    shared between threads and forked processes, and is memory-mapped. The pickle holds only the folder.

    The index is one segment without deleted documents, in which tantivy's number of a document is its row. tantivy
    orders equal scores by this number, as the contract does.

    meta: the contents of index.json.
    folder: the folder of the index.
    keep: a temporary folder that must exist as long as this retriever. None, the default, = there is none.
    """

    def __init__(self, meta: dict[str, Any], folder: Path, keep: Any = None) -> None:
        self._meta = meta
        self._folder = folder.absolute()  # A child process may have another working directory.
        self._keep = keep
        self.params = Params(**meta["params"])
        # The names and checksums of the files differ each time that the same index is built.
        self.fingerprint = fingerprint_of({name: value for name, value in meta.items() if name != "files"})

    @property
    def _schema(self) -> Schema | None:
        given = self._meta.get("filters")
        if self.params.structured is None or given is None:
            return None
        fields = tuple(name for name, _ in self.params.columns().values())
        return Schema(fields, structured.boostable(fields), tuple((name, tuple(own)) for name, own in given))

    def retriever_traits(self) -> Traits:
        """Which structured queries it serves."""
        return Traits(structured=self._schema)

    def __reduce__(self) -> tuple[Callable[..., Tantivy], tuple[Any, ...]]:
        return Tantivy, (self._meta, self._folder)

    def __len__(self) -> int:
        return int(self._meta["documents"])

    @cached_property
    def _engine(self) -> _Engine:
        return _open(self._folder, self._meta)

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol. The queries are distributed over threads."""
        hits = no_hits(len(queries), check_k(k, len(self)))
        structured.check(queries, self._schema)
        made = made_of(queries, self.params, self._engine.schema)

        def run(first: int, last: int) -> None:
            for q in range(first, last):
                rows, scores = self._hits(made[q], hits.rows.shape[1])
                hits.rows[q, : len(rows)], hits.scores[q, : len(rows)] = rows, scores

        with self._failures_named():
            run_in_threads(run, len(made))
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol. The ranks are exact at any depth. The queries are distributed over threads."""
        targets = check_targets(queries, targets, len(self), structured=True)
        structured.check(queries, self._schema)
        out = np.zeros(targets.shape, np.int32)
        asked = [q for q in range(len(queries)) if (targets[q] >= 0).any()]
        made = made_of([queries[q] for q in asked], self.params, self._engine.schema)

        def run(first: int, last: int) -> None:
            for query, q in zip(made[first:last], asked[first:last], strict=True):
                out[q] = self._ranks(query, targets[q])

        with self._failures_named():
            run_in_threads(run, len(made))
        return out

    def _hits(self, query: Any, limit: int, offset: int = 0) -> tuple[list[int], list[float]]:
        """The rows and scores of at most ``limit`` hits, best first, without the first ``offset`` hits."""
        hits = self._engine.searcher.search(query, limit, count=False, offset=offset).hits
        return [address.doc for _, address in hits], [score for score, _ in hits]

    def _ranks(self, query: Any, targets: np.ndarray) -> np.ndarray:
        """The rank of each target of one query. The first hits are listed, and other targets are looked for below."""
        first = self._engine.searcher.search(query, min(SEARCH_DEPTH, len(self)), count=True)
        places = {address.doc: place for place, (_, address) in enumerate(first.hits, 1)}
        if first.count > len(places):
            missing = {row for row in targets.tolist() if row >= 0 and row not in places}
            for row, score in self._scores_of(query, missing).items():
                places[row] = self._deep_rank(query, row, score, first.count)
        return np.array([places.get(row, 0) for row in targets.tolist()], np.int32)

    def _scores_of(self, query: Any, rows: set[int]) -> dict[int, float]:
        """Row -> score, for those of the rows that the query matches. The filter by row adds 0 to the scores."""
        import tantivy

        make, schema = tantivy.Query, self._engine.schema
        if not rows:
            return {}
        # A term_set_query takes several times as long, because it walks through the dictionary of all rows.
        wanted = make.boolean_query([(tantivy.Occur.Should, make.term_query(schema, "row", row)) for row in rows])
        clauses = [(tantivy.Occur.Must, query), (tantivy.Occur.Must, make.const_score_query(wanted, 0.0))]
        return dict(zip(*self._hits(make.boolean_query(clauses), len(rows)), strict=True))

    def _deep_rank(self, query: Any, row: int, score: float, count: int) -> int:
        """The rank of a target that is not among the first hits of ``count``.

        Its place is bisected, because making Python objects of a hit takes as long as scoring tens of documents. When
        an eighth of the hits is left, listing these takes about as long as the next step.
        """
        low, high = SEARCH_DEPTH, count  # At least ``low`` and fewer than ``high`` hits are above the target.
        while high - low > max(FEW, min(MANY, count // 8)):
            middle = (low + high) // 2
            (other,), (value,) = self._hits(query, 1, middle)
            if (-value, other) <= (-score, row):
                low = middle
            else:
                high = middle
        rows, _ = self._hits(query, high - low, low)
        if row not in rows:
            raise RetrieverError("tantivy gives one document two scores for the same query: please report this")
        return low + rows.index(row) + 1

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """Turn an error of tantivy into a RetrieverError. Queries are never parsed, so the index must be the cause."""
        try:
            yield
        except ValueError as error:
            raise damaged(self._folder, error) from error


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> Tantivy:
    """Build a tantivy index of ``catalog``, or open the one in ``folder``.

    folder: where the index is written, atomically. None, the default, = a temporary folder.
    params: see :class:`Params`.

    Raises RetrieverError where the folder holds another index, where the package is missing, and where the catalogue
    is too large for one segment. Raises ValueError for a bad parameter, a field that the catalogue does not have, and a
    catalogue without a single term.
    """
    settings = Params(**params)
    if importlib.util.find_spec("tantivy") is None:
        raise RetrieverError(f"retriever.kind: tantivy needs tantivy, which is not installed: {INSTALL}")
    keep = TemporaryDirectory(prefix="rec-r1-tantivy-") if folder is None else None
    folder = Path(keep.name) / "index" if keep is not None else Path(folder or "")
    meta = _meta(catalog, settings)
    if not is_filled(folder):
        logger.info("building a tantivy index of %d documents", len(catalog))
        with new_folder(folder) as temporary:
            _build(catalog, settings, temporary / "tantivy")
            write_meta(temporary, meta | {"files": _checksums(temporary / "tantivy")})
    tantivy = Tantivy(read_meta(folder, meta | {"files": None}), folder, keep)
    tantivy._engine  # noqa: B018  The index is opened now, so that a damaged file is found before a training starts.
    return tantivy


def analysis_language(params: Mapping[str, Any]) -> str | None:
    """The code of the language that the analyser is for. None = no language."""
    return Params(**params).language


def _meta(catalog: Catalog, params: Params) -> dict[str, Any]:
    return {
        "kind": "tantivy",
        "format": INDEX_FORMAT,
        "tantivy": version("tantivy"),
        "catalog": catalog.fingerprint,
        "documents": len(catalog),
        "params": params.described(),
        **({} if params.structured is None else {"filters": _examples(catalog, params)}),
    }


def _examples(catalog: Catalog, params: Params) -> list[list[Any]]:
    """The fields by which structured queries filter, each with some of its values.

    Raises ValueError for a field that the catalogue lacks.
    """
    return [[name, list(structured.examples_of(catalog.column(name)))] for name in params.filters()]


def _build(catalog: Catalog, params: Params, folder: Path) -> None:
    import tantivy

    builder = tantivy.SchemaBuilder()
    for name in params.columns():
        builder.add_text_field(name, tokenizer_name="terms", index_option="freq")
    for name in params.filters().values():
        builder.add_text_field(name, tokenizer_name="raw", index_option="basic")
    builder.add_unsigned_field("row", indexed=True)
    folder.mkdir()
    index = tantivy.Index(builder.build(), str(folder))
    # The terms of a document are given as a text with spaces between them. No term contains white space.
    index.register_tokenizer("terms", tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()).build())
    # One thread numbers the documents in the order of their rows. The end of the block waits for it.
    with index.writer(heap_size=MEMORY, num_threads=1) as writer:
        for document in _documents(catalog, params):
            writer.add_document(document)
        writer.commit()  # The end of the block commits, too, but raises no error of a full disk.
    # tantivy lets only the owner read these two files, but the users of a machine share one cache.
    usual = (folder / ".tantivy-meta.lock").stat().st_mode
    for name in (".managed.json", "meta.json"):
        (folder / name).chmod(usual)
    segments = tantivy.Index.open(str(folder)).searcher().num_segments
    if segments != 1:  # Segments have no order, so equal scores would not be ordered by row.
        raise RetrieverError(
            f"retriever.kind: tantivy made {segments} segments of the {len(catalog)} documents, which do not fit into "
            f"the {MEMORY / 1e9:.1f} GB of one: choose lucene or bm25"
        )


def _documents(catalog: Catalog, params: Params) -> Iterator[Any]:
    """Each row as a document of tantivy, with the terms of each field as one text.

    Raises ValueError where no document has a term.
    """
    import tantivy
    from tqdm import tqdm

    columns = [(name, catalog.column(field)) for name, (field, _) in params.columns().items()]
    values = [(name, catalog.column(field)) for field, name in params.filters().items()]
    any_term, size = False, bm25.CHUNK
    starts = range(0, len(catalog), size)
    for start in tqdm(starts, "terms", disable=len(catalog) <= bm25.PROGRESS_FROM, unit_scale=size, leave=False):
        chunk = [(name, bm25.analyze(texts[start : start + size], params.analysis())) for name, texts in columns]
        whole = [(name, column[start : start + size]) for name, column in values]
        for place in range(min(size, len(catalog) - start)):
            document = tantivy.Document()
            document.add_unsigned("row", start + place)
            for name, own in whole:
                document.add_text(name, own[place])
            for name, terms in chunk:
                any_term = any_term or bool(terms[place])
                document.add_text(name, " ".join(terms[place]))
            yield document
    if not any_term:
        raise ValueError(
            "no document holds a single term after analysis: check the text column, or set stopwords: null"
        )


def _open(folder: Path, meta: Mapping[str, Any]) -> _Engine:
    """Open the index, and check that its files are those that were written.

    Raises RetrieverError, naming the folder, otherwise.
    """
    import tantivy

    if read_meta(folder, {}) != meta:  # A child process opens the folder later than its parent.
        raise RetrieverError(f"index {folder} was replaced while it was in use: start the run again")
    try:
        files = folder / "tantivy"
        if _checksums(files) != meta["files"]:
            raise ValueError("its files are not those that were written")
        with _writable(files) as openable:
            index = tantivy.Index.open(str(openable))
            index.config_reader("manual")  # By default, a thread would watch the folder for changes.
            searcher = index.searcher()
        if not (searcher.num_segments == 1 and searcher.num_docs == meta["documents"]):
            raise ValueError(f"{searcher.num_docs} documents instead of {meta['documents']}")
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error
    return _Engine(index.schema, searcher)


@contextmanager
def _writable(folder: Path) -> Iterator[Path]:
    """Yield a folder through which tantivy can open the index in ``folder``.

    tantivy writes a lock file to open an index. Where another user's folder cannot be written, it gets a temporary
    folder of links to the files. The open files are memory-mapped, so they outlive these links.
    """
    if os.access(folder, os.W_OK) and all(os.access(lock, os.W_OK) for lock in folder.glob(".*.lock")):
        yield folder
        return
    with TemporaryDirectory(prefix="rec-r1-tantivy-") as links:
        for file in folder.iterdir():
            if file.suffix != ".lock":
                (Path(links) / file.name).symlink_to(file.absolute())
        yield Path(links)


def _checksums(folder: Path) -> dict[str, int]:
    """The CRC-32 of each file, by its name. Lock files are left out."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".lock":
            continue
        found[path.name] = 0
        with path.open("rb") as file:
            while part := file.read(CHECKED_AT_ONCE):
                found[path.name] = zlib.crc32(part, found[path.name])
    return found
