"""Scores of (query, document) pairs by any cross-encoder of sentence-transformers, such as ms-marco-MiniLM-L6-v2."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from retrievers.encoders.sentence import (
    check_installed,
    hash_of_files,
    loading,
    read_object,
    resolve,
)
from retrievers.encoders.settings import model_problems
from retrievers.types import RetrieverError

CACHED_PAIRS = 100_000  # The scores of so many pairs stay in memory: about 25 MB.
LEAST_LENGTH = 8  # The smallest `max_length`: the marks around a pair take three or four tokens.
# The ends of the architectures that score a pair: with a head that was trained, or by the words yes and no.
SCORING_ARCHITECTURES = ("ForSequenceClassification", "ForCausalLM")


class PairScorer:
    """A cross-encoder. The model is loaded on first use.

    It may be shared between threads. Its pickle holds only the settings, so that a child process loads the model again.

    model, batch_size, device, trust_remote_code: see :class:`retrievers.encoders.sentence.Encoder`. Default of
        batch_size: 32 pairs.
    max_length: a pair is cut to so many tokens. None, the default, = to what the model's files say.

    Prompts are those of the model's files. A score is the model's output before any activation, so that two scores do
    not become equal where a sigmoid rounds both to 1.

        scorer = PairScorer("cross-encoder/ms-marco-MiniLM-L6-v2")
        scorer.scores([("red shoes", "crimson sneakers"), ("red shoes", "garden hose")])  # (2,) float32

    Raises ValueError with all wrong values. The methods raise RetrieverError for a model that cannot be found or
    loaded, whose weights or code are refused, or that is no cross-encoder with one score for each pair.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 32,
        max_length: int | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        problems = model_problems(model, batch_size, device, trust_remote_code)
        if max_length is not None and (type(max_length) is not int or max_length < LEAST_LENGTH):
            problems.append(
                f"retriever.params.max_length must be null or an integer >= {LEAST_LENGTH}, got {max_length!r}: "
                "null takes what the model says"
            )
        if problems:
            raise ValueError("; ".join(problems))
        self.settings: dict[str, Any] = {
            "model": model,
            "batch_size": batch_size,
            "max_length": max_length,
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

        return LRUCache(CACHED_PAIRS)

    @cached_property
    def folder(self) -> Path:
        """The folder of the model's files, which are downloaded first where that is necessary.

        Raises RetrieverError where the model is not found.
        """
        return resolve(self.settings["model"], "or give the folder of a cross-encoder that you have")

    @cached_property
    def _model(self) -> Any:
        check_installed("a cross-encoder")
        settings = self.settings
        how = settings["max_length"], settings["device"], settings["trust_remote_code"]
        return _load(str(self.folder), *how, files=hash_of_files(self.folder))

    def describe(self) -> dict[str, Any]:
        """The settings that affect a score and a hash of the model's files, for a fingerprint."""
        model = Path(self.settings["model"]).name
        return {"max_length": self.settings["max_length"], "model": model, "files": hash_of_files(self.folder)}

    def load(self) -> None:
        """Load the model now. Raises the errors of the class."""
        self._model  # noqa: B018

    def scores(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """The score of each pair of a query and a document: (P,) float32.

        All pairs are scored in one call, which puts pairs of similar lengths into a batch. Equal pairs are scored once,
        and the scores of the last CACHED_PAIRS pairs are kept in memory: a model rounds the score of a pair a little
        differently in another batch, while the same query should get the same ranking again.

        Raises RetrieverError for a score that is not finite.
        """
        from torch.nn import Identity

        keys = [_key(pair) for pair in pairs]
        with self._lock:
            memory = self._remembered
            found = {key: memory[key] for key in keys if key in memory}
            new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in found}
            if new:
                scores = self._model.predict(
                    list(new.values()),
                    batch_size=self.settings["batch_size"],
                    activation_fn=Identity(),
                    show_progress_bar=False,
                )
                if not np.isfinite(scores).all():
                    raise RetrieverError(
                        f"retriever.params.model: {self.settings['model']} returns scores that are not finite: "
                        "take another model, or download its files again"
                    )
                fresh = dict(zip(new, np.asarray(scores, np.float32).tolist(), strict=True))
                memory.update(fresh)
                found |= fresh
        return np.array([found[key] for key in keys], np.float32)


def _key(pair: tuple[str, str]) -> bytes:
    """A short key of a pair. The length comes first, so that ("ab", "c") and ("a", "bc") have different keys."""
    query, document = (text.encode("utf-8", "surrogatepass") for text in pair)
    return hashlib.blake2b(len(query).to_bytes(8, "little") + query + document, digest_size=16).digest()


@lru_cache(maxsize=2)  # The retrievers of a process share a model.
def _load(folder: str, max_length: int | None, device: str | None, trusted: bool, files: str) -> Any:
    """The `CrossEncoder` in a folder. files: the hash of its files, because a process may live longer than they do.

    Raises RetrieverError, and ValueError for a `max_length` above the model's.
    """
    with loading(folder, trusted):
        from sentence_transformers import CrossEncoder

        _refuse_others(Path(folder))
        model = CrossEncoder(folder, max_length=max_length, device=device, trust_remote_code=trusted)
    if model.num_labels != 1:
        raise RetrieverError(
            f"retriever.params.model: {folder} has {model.num_labels} scores for each pair, and a ranking needs one: "
            "take a cross-encoder that was trained for ranking"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if max_length is not None and positions is not None and max_length > positions > 0:
        raise ValueError(
            f"retriever.params.max_length: {max_length}: {folder} reads at most {positions} tokens: set {positions} or "
            "less, or leave it out"
        )
    return model


def _refuse_others(folder: Path) -> None:
    """Raises RetrieverError for an encoder of single texts, to which the library would add a head of random weights."""
    kind = read_object(folder / "config_sentence_transformers.json").get("model_type")
    if kind == "CrossEncoder":
        return
    architectures = read_object(folder / "config.json").get("architectures") or [""]
    if kind is not None or not str(architectures[0]).endswith(SCORING_ARCHITECTURES):
        raise RetrieverError(
            f"retriever.params.model: {folder} is no cross-encoder ({kind or architectures[0] or 'no architecture'}): "
            "take one, such as cross-encoder/ms-marco-MiniLM-L6-v2; `dense` and `late` take encoders of single texts"
        )
