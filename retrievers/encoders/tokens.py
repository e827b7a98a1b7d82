"""Embeddings of the tokens of texts, for late interaction, by sentence-transformers' `MultiVectorEncoder`.

Two kinds of models are taken:

- A model that was trained for late interaction: a `MultiVectorEncoder`, or a checkpoint of PyLate or of Stanford's
  ColBERT. Its own files say how tokens are projected, which are left out, how long texts may be, and whether queries
  are padded with [MASK] tokens (query augmentation).
- Any other encoder. The embeddings of its tokens are its last hidden states, without a projection and without query
  augmentation. The tokens of the punctuation of documents are left out, as in ColBERT. All others count, [CLS] and
  [SEP] too, so that an empty document has tokens.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.encoders.files import loading, read_object
from retrievers.encoders.model import Model, check_length, hold_length, hold_precision
from retrievers.encoders.sentence import distinct, load, remembered, slabs_of

QUERY_MEMORY = 1 << 27  # The token embeddings of queries that stay in memory, in bytes: 5,000 of 16 tokens x 384.
BATCHES_PER_SLAB = 4  # Documents are encoded in slabs of so many batches. An interrupted build loses at most one slab.
# PyLate's own class in modules.json, which `MultiVectorEncoder` replaces by its own without importing PyLate.
PYLATE = ("pylate.models.Dense.Dense",)


class TokenEncoder:
    """An encoder that gives each token of a text an embedding of length 1 with d dimensions. The model is loaded on
    first use.

    It may be shared between threads. Its pickle holds only the settings, so that a child process loads the model again.

    model, batch_size, device, trust_remote_code: see :class:`retrievers.encoders.sentence.Encoder`.
    query_prefix, document_prefix: the text before each query or document. Default "". A model of the first kind (see
        above) has its own marks for both, which precede this text.
    document_length: a document is cut to so many tokens. None, the default, = to what the model's files say.

        encoder = TokenEncoder("lightonai/GTE-ModernColBERT-v1")
        encoder.queries(["red shoes"])  # [(t, d) float32], for a query of t tokens

    Raises ValueError with all wrong values. The methods raise RetrieverError for a model that cannot be found or
    loaded, or whose weights or code are refused.
    """

    def __init__(
        self,
        model: str,
        query_prefix: str = "",
        document_prefix: str = "",
        document_length: int | None = None,
        batch_size: int = 64,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        settings = {
            "model": model,
            "query_prefix": query_prefix,
            "document_prefix": document_prefix,
            "document_length": document_length,
            "batch_size": batch_size,
            "device": device,
            "trust_remote_code": trust_remote_code,
        }
        self.model = Model(settings, _load)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of this encoder by their names."""
        return self.model.settings

    @cached_property
    def _remembered(self) -> Any:
        from cachetools import LRUCache

        return LRUCache(QUERY_MEMORY, getsizeof=lambda vectors: int(vectors.nbytes) + 1)

    @cached_property
    def dimension(self) -> int:
        """d, the number of dimensions of an embedding."""
        return int(self.model.loaded.get_embedding_dimension())

    def describe(self) -> dict[str, Any]:
        """The settings that affect an embedding and a hash of the model's files, for a fingerprint."""
        return self.model.describe("query_prefix", "document_prefix", "document_length")

    def queries(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The embeddings of the tokens of each of Q queries: (t, d) float32, with another t for each.

        Those of the last queries are kept in memory, up to QUERY_MEMORY bytes, so that the same query has the same
        ranking again: an encoder rounds the embeddings of a text a little differently in another batch.
        """
        with self.model.lock:
            return remembered(self._remembered, texts, self._encode_queries)

    def _encode_queries(self, texts: list[str]) -> list[np.ndarray]:
        given = [self.settings["query_prefix"] + text for text in texts]
        found = self.model.loaded.encode_query(given, **self._how())
        return [np.asarray(vectors, np.float32) for vectors in found]

    def slabs(self, order: Sequence[str], start: int = 0) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Encode documents slab by slab, and yield (slab, (t, d) float16 embeddings, (m,) int32 numbers of tokens) for
        the m documents of a slab, one after the other.

        order: different texts, longest first, see `distinct`, so that the texts of a batch have similar lengths.
        start: the first slab to encode. The slabs are the same for every ``start``. Default 0.

        Raises ValueError for embeddings that are not finite.
        """
        size = int(self.settings["batch_size"]) * BATCHES_PER_SLAB
        for slab, part in slabs_of(order, size, start):
            given = [self.settings["document_prefix"] + text for text in part]
            with self.model.lock:
                found = self.model.loaded.encode_document(given, **self._how(), **self._cut())
            tokens = np.concatenate([np.asarray(vectors, np.float16) for vectors in found])
            if not np.isfinite(tokens).all():
                raise ValueError(
                    f"retriever.params.model: {self.settings['model']} returns embeddings that are not finite: "
                    "take another model, or download its files again"
                )
            yield slab, tokens, np.array([len(vectors) for vectors in found], np.int32)

    def count(self, texts: Sequence[str], enough: int) -> int:
        """The number of tokens that the documents have in total, which needs the tokenizer alone.

        texts: any documents; equal ones count once.
        enough: where even the longest possible documents have no more tokens than this in total, that number is
            returned, and nothing is read.
        """
        from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

        order, _ = distinct(texts)
        longest = self.settings["document_length"] or self.model.loaded.max_seq_length
        if longest is not None and len(order) * longest <= enough:
            return len(order) * int(longest)
        masks = [module for module in self.model.loaded if isinstance(module, MultiVectorMask)]
        prompt = self.model.loaded.prompts.get("document")
        total, size = 0, int(self.settings["batch_size"])
        for _, part in slabs_of(order, size, what="counting tokens"):
            given = [self.settings["document_prefix"] + text for text in part]
            with self.model.lock:
                features = self.model.loaded.preprocess(given, prompt=prompt, task="document", **self._cut())
                for mask in masks:
                    features = mask(features, task="document")
            total += int(features["attention_mask"].sum())
        return total

    def _how(self) -> dict[str, Any]:
        return {
            "batch_size": self.settings["batch_size"],
            "normalize_embeddings": True,
            "convert_to_numpy": True,
            "show_progress_bar": False,
        }

    def _cut(self) -> dict[str, Any]:
        """The options that cut documents to ``document_length`` tokens."""
        length = self.settings["document_length"]
        return {} if length is None else {"processing_kwargs": {"text": {"max_length": length}}}


def _load(folder: str, settings: Mapping[str, Any], files: str) -> Any:
    """Raises ValueError for a `document_length` above what the model reads."""
    model = _loaded(folder, settings["device"], settings["trust_remote_code"], files)
    check_length(model, settings["document_length"], "document_length")
    return model


@lru_cache(maxsize=2)  # The retrievers of a process share a model.
def _loaded(folder: str, device: str | None, trusted: bool, files: str) -> Any:
    """The `MultiVectorEncoder` in a folder, or the one that is made of the encoder there.

    files: the hash of its files, because a process may live longer than they do.
    """
    if _is_late_interaction(Path(folder)):
        with loading(folder, trusted, PYLATE):
            from sentence_transformers import MultiVectorEncoder

            model = MultiVectorEncoder(folder, device=device, trust_remote_code=trusted)
            hold_precision(model)
            hold_length(model)
            return model
    encoder = load(folder, None, device, trusted)
    with loading(folder, trusted):
        from sentence_transformers import MultiVectorEncoder
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

        body = encoder[0]
        if not isinstance(body, Transformer):
            raise ValueError(f"{type(body).__name__} has no embedding for each token: take a transformer")
        marks = [mark for mark in string.punctuation if mark in body.tokenizer.get_vocab()]
        return MultiVectorEncoder(modules=[body, MultiVectorMask(marks)], device=device)


def _is_late_interaction(folder: Path) -> bool:
    """Whether the files say that the model was trained for late interaction."""
    settings = read_object(folder / "config_sentence_transformers.json")
    if "model_type" in settings:
        return settings["model_type"] in ("MultiVectorEncoder", "ColBERT")
    # The settings of PyLate before its version 3, and the architecture of Stanford's checkpoints.
    architectures = read_object(folder / "config.json").get("architectures") or []
    return "query_length" in settings or "HF_ColBERT" in architectures
