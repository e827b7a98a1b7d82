"""Scores of (query, document) pairs by any cross-encoder of sentence-transformers, such as ms-marco-MiniLM-L6-v2."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.core.progress import bar
from retrievers.encoders.files import loading, read_object
from retrievers.encoders.model import Model, check_length, hold_length, hold_precision
from retrievers.types import RetrieverError

BATCHES_PER_CALL = 16  # A progress bar over the pairs moves after this many batches.
CACHED_PAIRS = 100_000  # The scores of so many pairs stay in memory: about 25 MB.
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
        settings = {
            "model": model,
            "batch_size": batch_size,
            "max_length": max_length,
            "device": device,
            "trust_remote_code": trust_remote_code,
        }
        instead = "or give the folder of a cross-encoder that you have"
        self.model = Model(settings, _load, what="a cross-encoder", instead=instead)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of this scorer by their names."""
        return self.model.settings

    @cached_property
    def _remembered(self) -> Any:
        from cachetools import LRUCache

        return LRUCache(CACHED_PAIRS)

    def describe(self) -> dict[str, Any]:
        """The settings that affect a score and a hash of the model's files, for a fingerprint."""
        return self.model.describe("max_length")

    def with_model(self, folder: Path) -> PairScorer:
        """A scorer with the same settings and another model."""
        return PairScorer(**(self.settings | {"model": str(folder)}))

    def load(self) -> None:
        """Load the model now. Raises the errors of the class."""
        self.model.loaded  # noqa: B018

    def scores(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """The score of each pair of a query and a document: (P,) float32.

        Pairs of similar lengths are put into a batch. Equal pairs are scored once, and the scores of the last
        CACHED_PAIRS pairs are kept in memory: a model rounds the score of a pair a little differently in another batch,
        while the same query should get the same ranking again.

        Raises RetrieverError for a score that is not finite.
        """
        keys = [_key(pair) for pair in pairs]
        with self.model.lock:
            memory = self._remembered
            found = {key: memory[key] for key in keys if key in memory}
            new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in found}
            if new:
                scores = self._predicted(list(new.values()))
                fresh = dict(zip(new, scores.tolist(), strict=True))
                memory.update(fresh)
                found |= fresh
        return np.array([found[key] for key in keys], np.float32)

    def _predicted(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """The scores of different pairs: (P,) float32. Raises RetrieverError for a score that is not finite."""
        from torch.nn import Identity

        scores = np.zeros(len(pairs), np.float32)
        # The longest come first, so that a batch that does not fit into memory fails at the start.
        order = np.argsort([-len(query) - len(document) for query, document in pairs], kind="stable")
        size = int(self.settings["batch_size"]) * BATCHES_PER_CALL
        with bar(len(pairs), "scoring pairs", "pairs") as shown:
            for start in range(0, len(order), size):
                part = order[start : start + size]
                scores[part] = self.model.loaded.predict(
                    [pairs[p] for p in part.tolist()],
                    batch_size=self.settings["batch_size"],
                    activation_fn=Identity(),
                    show_progress_bar=False,
                )
                shown.update(len(part))
        if not np.isfinite(scores).all():
            raise RetrieverError(
                f"retriever.params.model: {self.settings['model']} returns scores that are not finite: "
                "take another model, or download its files again"
            )
        return scores


def _key(pair: tuple[str, str]) -> bytes:
    """A short key of a pair. The length comes first, so that ("ab", "c") and ("a", "bc") have different keys."""
    query, document = (text.encode("utf-8", "surrogatepass") for text in pair)
    return hashlib.blake2b(len(query).to_bytes(8, "little") + query + document, digest_size=16).digest()


def _load(folder: str, settings: Mapping[str, Any], files: str) -> Any:
    return _loaded(folder, settings["max_length"], settings["device"], settings["trust_remote_code"], files)


@lru_cache(maxsize=2)  # The retrievers of a process share a model.
def _loaded(folder: str, max_length: int | None, device: str | None, trusted: bool, files: str) -> Any:
    """The model in a folder. files: the hash of its files, because a process may live longer than they do."""
    return load(folder, max_length, device, trusted)


def load(folder: str, max_length: int | None, device: str | None, trusted: bool) -> Any:
    """The `CrossEncoder` in a folder; see :class:`PairScorer` for the other arguments.

    Raises RetrieverError, and ValueError for a `max_length` above what the model reads.
    """
    with loading(folder, trusted):
        from sentence_transformers import CrossEncoder

        _refuse_others(Path(folder))
        model = CrossEncoder(folder, device=device, trust_remote_code=trusted)
        hold_precision(model)
        hold_length(model)
    if model.num_labels != 1:
        raise RetrieverError(
            f"retriever.params.model: {folder} has {model.num_labels} scores for each pair, and a ranking needs one: "
            "take a cross-encoder that was trained for ranking"
        )
    check_length(model, max_length, "max_length")
    if max_length is not None:
        model.max_seq_length = max_length
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
