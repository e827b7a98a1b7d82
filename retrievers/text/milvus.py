"""A Milvus collection, in an embedded database in a folder (Milvus Lite) or on a cluster.

Mode "text" is Milvus' full-text search with BM25. The analyser of `bm25` makes the terms, because Milvus Lite has no
stemmer, and because a cluster should rank like a folder. Mode "dense" searches embeddings.

Milvus returns at most 16,384 hits. A target below that rank counts as not retrieved.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import damaged, fingerprint_of, is_filled, new_folder, read_meta, write_meta
from retrievers.core.progress import bar
from retrievers.core.ranking import check_k, check_plain, check_targets, no_hits
from retrievers.encoders.sentence import Encoder
from retrievers.text import bm25
from retrievers.text.milvus_params import TEXT_PARAMETERS, TOKEN_VARIABLE, Params
from retrievers.types import Hits, Query, RetrieverError, Traits

logger = logging.getLogger(__name__)
INSTALL = "pip install 'rec-r1[milvus]'"
INDEX_FORMAT = 3  # The version of index.json. In version 2, only parts of an encoder's large files were hashed.
TEXT_FORMAT = 2  # The version of index.json and the terms in mode text. Indexes of another version are refused.
MAX_HITS = 16_384  # Milvus returns at most so many hits per query.
MAX_TEXT_BYTES = 65_535  # Milvus stores at most so many bytes per text.
TIE_MARGIN = 64  # So many hits beyond k are requested, to see whether more documents have the k-th best score.
INSERT_BATCH = 1_000  # Documents per insert, and the largest number of queries per search.
COLLECTION = "documents"  # The name of the collection in a folder.
_opening_lock = Lock()


class Milvus:
    """A Milvus collection as a retriever; see :class:`retrievers.types.Retriever` for the contract.

    It reads ``Query.text`` only and connects on first use. With the default indexes, the first 16,384 hits are exact;
    an approximate index may miss documents. Only one process can open a folder. The first one serves it and writes its
    address there, and the other processes of the machine send their queries to that address.

    meta: the contents of index.json.
    folder: the folder of the database. None = a cluster.
    name: the name of the collection.
    keep: a temporary folder that must exist as long as this retriever. None, the default, = there is none.
    """

    def __init__(self, meta: dict[str, Any], params: Params, folder: Path | None, name: str, keep: Any = None) -> None:
        self._meta = meta
        # The path is absolute, because a child process may have another working directory.
        self._folder = folder.absolute() if folder is not None else None
        self._name = name
        self._keep = keep
        self.params = params
        self.fingerprint = fingerprint_of(meta)

    def __reduce__(self) -> tuple[Callable[..., Milvus], tuple[Any, ...]]:
        return Milvus, (self._meta, self.params, self._folder, self._name)

    def __len__(self) -> int:
        return int(self._meta["documents"])

    def retriever_traits(self) -> Traits:
        """What the encoder of mode "dense" was tuned on."""
        return Traits(fitted_on=self._encoder.model.tuned_on() if self.params.mode == "dense" else ())

    @cached_property
    def _encoder(self) -> Encoder:
        return self.params.encoder()

    @cached_property
    def _client(self) -> Any:
        client = _connect(self.params.uri) if self._folder is None else _open(self._folder)
        try:
            rows = int(client.get_collection_stats(self._name)["row_count"])
            client.load_collection(self._name)
        except Exception as error:
            raise damaged(self._folder, error) from error
        if rows != len(self):
            raise damaged(self._folder, ValueError(f"{rows} documents instead of {len(self)}"))
        return client

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol. There are at most 16,384 hits; the rest is padding."""
        check_plain(queries)
        k = check_k(k, len(self))
        hits = no_hits(len(queries), k)
        for q, (rows, scores) in self._found(queries, min(k, MAX_HITS)):
            hits.rows[q, : len(rows)], hits.scores[q, : len(rows)] = rows, scores
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol. A target below rank 16,384 gets 0."""
        targets = check_targets(queries, targets, len(self))
        ranks = np.zeros(targets.shape, np.int32)
        for q, (rows, _) in self._found(queries, min(len(self), MAX_HITS)):
            found, place = np.nonzero(targets[q][:, None] == rows[None])
            ranks[q, found] = place + 1
        return ranks

    def _found(self, queries: Sequence[Query], k: int) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """Yield the number of each query that has terms, and its at most k rows and scores, in the contract's order."""
        if self.params.mode == "text":
            terms = bm25.analyze([query.text for query in queries], self.params.analysis())
            asked = {q: _tokens_for_milvus(words) for q, words in enumerate(terms) if words}
        else:
            asked = {q: query.text for q, query in enumerate(queries) if query.text.strip()}
        data: dict[int, Any] = dict(asked)
        if self.params.mode == "dense" and asked:
            data = dict(zip(asked, self._encoder.queries(list(asked.values())).tolist(), strict=True))
        depth = k
        while data:
            depth = min(len(self), MAX_HITS, depth + TIE_MARGIN)
            again = {}
            for q, (rows, scores) in self._ask(data, depth).items():
                # Milvus orders equal scores arbitrarily, so all documents with the k-th best score are needed.
                if len(rows) == depth < min(len(self), MAX_HITS) and scores[k - 1] == scores[-1]:
                    again[q] = data[q]
                    continue
                order = np.lexsort((rows, -scores))[:k]
                yield q, (rows[order], scores[order])
            data, depth = again, 2 * depth

    def _ask(self, data: Mapping[int, Any], depth: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """The first ``depth`` rows and scores of each query, in Milvus' order."""
        field_, metric = ("sparse", "BM25") if self.params.mode == "text" else ("vector", "IP")
        out = {}
        places = list(data)
        step = max(1, min(INSERT_BATCH, 64 * MAX_HITS // depth))
        for start in range(0, len(places), step):
            part = places[start : start + step]
            answers = self._client.search(
                self._name,
                data=[data[q] for q in part],
                anns_field=field_,
                limit=depth,
                output_fields=["row"],
                search_params={"metric_type": metric, **self.params.search},
                consistency_level="Strong",
            )
            for q, answer in zip(part, answers, strict=True):
                rows = np.array([hit["row"] for hit in answer], np.int64)
                scores = np.array([hit["distance"] for hit in answer], np.float32)
                # Milvus Lite returns BM25 scores as negative distances, and a cluster returns them as scores.
                out[q] = rows, np.abs(scores) if metric == "BM25" else scores
        return out


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> Milvus:
    """Insert ``catalog`` into a collection, or open the existing collection.

    folder: the folder of the database. None, the default, = a temporary folder. It is not used with a cluster.
    params: see :class:`Params`.

    Raises RetrieverError where a package is missing, where the folder holds another index, and where the cluster does
    not answer. Raises ValueError for a bad parameter.
    """
    settings = Params(**params)
    missing = [name for name in ("pymilvus", "milvus_lite") if importlib.util.find_spec(name) is None]
    if settings.uri is not None:
        missing = [name for name in missing if name == "pymilvus"]
    if missing:
        raise RetrieverError(f"retriever.kind: milvus needs {missing[0]}, which is not installed: {INSTALL}")
    meta = _meta(catalog, settings)
    if settings.uri is not None:
        return _build_remote(catalog, settings, meta)
    keep = TemporaryDirectory(prefix="rec-r1-milvus-") if folder is None else None
    folder = Path(keep.name) / "index" if keep is not None else Path(folder or "")
    if not is_filled(folder):
        from milvus_lite.server_manager import server_manager_instance

        with new_folder(folder) as temporary:
            path = str(temporary / "milvus.db")
            # pymilvus requests a timestamp when it creates an index. Milvus Lite has none, and grpc logs that error.
            noisy = logging.getLogger("grpc._server")
            level = noisy.level
            noisy.setLevel(logging.CRITICAL)
            try:
                _insert(_connect(path), COLLECTION, catalog, settings)
            finally:
                server_manager_instance.release_server(path)  # This writes the database and releases the folder.
                noisy.setLevel(level)
            write_meta(temporary, meta)
    milvus = Milvus(read_meta(folder, meta), settings, folder, COLLECTION, keep)
    milvus._client  # noqa: B018  The database is opened now, so that a damaged one is found before a training starts.
    return milvus


def _build_remote(catalog: Catalog, params: Params, meta: dict[str, Any]) -> Milvus:
    client = _connect(params.uri)
    name = f"rec_r1_{fingerprint_of(meta)[:32]}"
    if not client.has_collection(name):
        client.drop_collection(f"{name}_part")  # An interrupted build may have left it.
        _insert(client, f"{name}_part", catalog, params)
        client.rename_collection(f"{name}_part", name)  # Only a complete collection gets the name that is opened.
    milvus = Milvus(meta, params, None, name)
    milvus._client  # noqa: B018
    return milvus


def _meta(catalog: Catalog, params: Params) -> dict[str, Any]:
    """Everything that affects the ranking. The place does not: a folder and a cluster may have the same fingerprint."""
    values = asdict(params)
    shaping = {
        name: values[name] for name in ("mode", "index", "search", *(TEXT_PARAMETERS if params.mode == "text" else ()))
    }
    return {
        "kind": "milvus",
        "format": INDEX_FORMAT if params.mode == "dense" else TEXT_FORMAT,
        "catalog": catalog.fingerprint,
        "documents": len(catalog),
        "params": shaping,
        "encoder": params.encoder().describe() if params.mode == "dense" else None,
    }


def _insert(client: Any, name: str, catalog: Catalog, params: Params) -> None:
    from pymilvus import DataType, Function, FunctionType, MilvusException

    schema, index = client.create_schema(auto_id=False), client.prepare_index_params()
    schema.add_field("row", DataType.INT64, is_primary=True)
    if params.mode == "text":
        analyzer = {"tokenizer": "standard"}  # This splits at the spaces of `_tokens_for_milvus`.
        schema.add_field(
            "text", DataType.VARCHAR, max_length=MAX_TEXT_BYTES, enable_analyzer=True, analyzer_params=analyzer
        )
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        schema.add_function(Function("bm25", FunctionType.BM25, ["text"], ["sparse"]))
        constants = {"bm25_k1": params.k1, "bm25_b": params.b, **params.index.get("params", {})}
        if params.uri is None:
            constants = {"params": constants}  # pymilvus removes one level of nesting that Milvus Lite needs.
        usual = {"index_type": "SPARSE_INVERTED_INDEX", "metric_type": "BM25"}
        index.add_index("sparse", **{**usual, **params.index, "params": constants})
        column, values = "text", _texts(catalog, params)
    else:
        encoder = params.encoder()
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=encoder.dimension)
        index.add_index("vector", **{"index_type": "FLAT", "metric_type": "IP", **params.index})
        vectors = encoder.documents(catalog.texts)
        column, values = "vector", (vector.astype(np.float32).tolist() for vector in vectors)
    try:
        client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")
    except MilvusException as error:
        if not params.index:
            raise
        raise ValueError(f"index: Milvus refuses {dict(params.index)!r} ({error.message}): change it") from error
    logger.info("inserting %d documents into Milvus", len(catalog))
    with bar(len(catalog), "inserting", "documents") as shown:
        for start in range(0, len(catalog), INSERT_BATCH):
            rows = range(start, min(start + INSERT_BATCH, len(catalog)))
            client.insert(name, [{"row": row, column: next(values)} for row in rows])
            shown.update(len(rows))
    next(values, None)  # This runs the end of `_texts`, which logs a warning.
    client.flush(name)


def _texts(catalog: Catalog, params: Params) -> Iterator[str]:
    """Yield the terms of each document as one text, cut to MAX_TEXT_BYTES. At the end, log how many were cut."""
    cut = 0
    for start in range(0, len(catalog), INSERT_BATCH):
        for terms in bm25.analyze(catalog.texts[start : start + INSERT_BATCH], params.analysis()):
            text = _tokens_for_milvus(terms)
            encoded = text.encode()
            if len(encoded) > MAX_TEXT_BYTES:
                cut += 1
                text = encoded[:MAX_TEXT_BYTES].decode(errors="ignore").rpartition(" ")[0]
            yield text
    if cut:
        logger.warning("%d documents were cut to %d bytes of terms, the limit of Milvus", cut, MAX_TEXT_BYTES)


def _tokens_for_milvus(terms: Sequence[str]) -> str:
    """A text that Milvus' tokenizer splits into exactly these terms.

    The tokenizer splits at combining marks and at everything that it takes for punctuation. A term with other
    characters than a to z and 0 to 9 is therefore written as 0x and its UTF-8 bytes in hexadecimal.
    """
    return " ".join(
        term if term.isascii() and term.isalnum() and not term.startswith("0x") else f"0x{term.encode().hex()}"
        for term in terms
    )


def analysis_language(params: Mapping[str, Any]) -> str | None:
    """The code of the language that the analyser is for. None = no language, or mode "dense"."""
    settings = Params(**params)
    return settings.language if settings.mode == "text" else None


def _connect(uri: str | None) -> Any:
    from pymilvus import MilvusClient

    try:
        return MilvusClient(uri, token=os.environ.get(TOKEN_VARIABLE) or "")
    except Exception as error:
        raise RetrieverError(
            f"no Milvus answers at {uri} ({type(error).__name__}: {' '.join(str(error).split())[:200]}): start it, or "
            f"check retriever.params.uri and ${TOKEN_VARIABLE}"
        ) from error


def _open(folder: Path) -> Any:
    """A client of the database in a folder. This process serves the database, unless another one already does."""
    from milvus_lite.server_manager import server_manager_instance

    path, address = folder / "milvus.db", folder / "address"
    if not path.exists():
        raise damaged(folder, FileNotFoundError("milvus.db"))
    for _ in range(100):
        with _opening_lock:
            if str(path) in server_manager_instance._servers or not _locked(path / "LOCK"):
                client = _connect(str(path))
                uri = str(server_manager_instance.start_and_get_uri(str(path)))
                if not address.is_file() or address.read_text() != uri:
                    temporary = folder / f"address.{os.getpid()}"
                    temporary.write_text(uri)
                    temporary.replace(address)
                return client
        try:
            return _connect(address.read_text())
        except (OSError, RetrieverError):  # The other process is just starting or ending.
            time.sleep(0.1)
    raise RetrieverError(f"index {folder} is open in another process that does not answer: end that process first")


def _locked(path: Path) -> bool:
    """Whether a process holds the lock of a Milvus Lite database. The lock is released again at once."""
    import fcntl

    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True
