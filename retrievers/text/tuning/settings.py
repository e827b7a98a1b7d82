"""The parameter `tuned` of `dense` and of `rerank`: how their models are fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, TypeVar

from retrievers.core.parameters import MAX_SEED, Checks, wrong
from retrievers.core.sections import read_section

DATA = ("interactions", "judgments")  # What an encoder can be tuned on.


@dataclass(frozen=True)
class Tuned:
    """How the encoder of `dense` is fine-tuned. Raises ValueError, naming the field, for a bad value."""

    # What the encoder is tuned on: interactions (the raw query of a history, and the item that was chosen next) or
    # judgments (a training query, and a relevant document). null: whichever the task has.
    on: str | None = None
    # The number of epochs. The best epoch on validation is kept, or the encoder before tuning, if that is better.
    epochs: int = 3
    # How many pairs of each user, or of each judged query, an epoch draws at most. null: all.
    positives: int | None = 5
    batch_size: int = 64  # The number of pairs in a step. The documents of the other pairs are negatives.
    # How many texts are in the memory of a step at once, with gradient caching. null: all of the step.
    mini_batch: int | None = None
    learning_rate: float = 5e-5  # The highest learning rate. It rises linearly, and then falls linearly to 0.
    warmup: float = 0.1  # The share of the steps in which it rises.
    scale: float = 20.0  # By what cosines are multiplied in the softmax of the loss: 1 / temperature.
    # Whether the softmax is corrected for how often a document is drawn as a negative (logQ).
    log_q: bool = True
    # How many further negatives of each pair are text neighbours of its query that are not relevant.
    hard: int = 0
    # How many further negatives of each pair are those items to which the retriever `affinity` gives the most negative
    # scores for its history.
    anti_affinity: int = 0
    # For anti_affinity: a retriever that reads histories and signed weights, {kind, params}.
    affinity: Mapping[str, Any] = field(default_factory=lambda: {"kind": "ease"})
    # How many further negatives of each pair are texts that a language model wrote for it, from `written_file`.
    written: int = 0
    # For written: the JSONL file of these texts. `rec-r1 fit RECIPE --write policy` writes it.
    written_file: str | None = None
    # The share of the loss, below 1, that keeps similarities as they were before tuning.
    keep: float = 0.0
    # LoRA: the options of peft's LoraConfig, such as {r: 16, lora_alpha: 32}. null: all weights are tuned.
    lora: Mapping[str, Any] | None = None
    # Longer texts are cut to so many tokens in the steps of the fit. null: as the model says. Validation and the index
    # read as much of a text as the encoder does before it is tuned.
    max_tokens: int | None = 64
    seed: int = 0  # The seed of the pairs, of the negatives and of the fit.

    def __post_init__(self) -> None:
        checks = Checks(self, "tuned.")
        with checks:
            check_on(self.on)
        checks.integers("epochs")
        checks.integers("batch_size", least=2)
        checks.integers("positives", "mini_batch", optional=True)
        checks.integers("max_tokens", least=4, optional=True)
        checks.integers("hard", "anti_affinity", "written", least=0)
        checks.integers("seed", least=0, most=MAX_SEED)
        checks.numbers("learning_rate", above=True, below=1)
        checks.numbers("scale", above=True, below=1000)
        checks.numbers("warmup", "keep", below=1)
        checks.flags("log_q")
        checks.raise_all()
        for check in (self._check_affinity, self._check_written, self._check_lora):
            with checks:
                check()
        checks.raise_all()

    def _check_affinity(self) -> None:
        affinity = self.affinity
        if not isinstance(affinity, Mapping) or not isinstance(affinity.get("kind"), str):
            raise wrong("tuned.affinity", "a mapping with a kind", affinity, "{kind: ease}")
        if unknown := sorted(set(affinity) - {"kind", "params"}):
            raise ValueError(f"retriever.params.tuned.affinity: unknown key {unknown[0]!r}: choose from kind, params")
        if not self.anti_affinity and affinity != {"kind": "ease"}:
            raise ValueError(
                "retriever.params.tuned.affinity: nothing reads it without anti_affinity: set that, or leave it out"
            )
        if not isinstance(affinity.get("params", {}), Mapping):
            raise wrong("tuned.affinity", "a mapping whose params are a mapping", affinity, "{kind: ease, params: {}}")

    def _check_lora(self) -> None:
        if self.lora is None:
            return
        if not isinstance(self.lora, Mapping):
            raise wrong(
                "tuned.lora", "null, or a mapping of peft's options", self.lora, "null, or {r: 16, lora_alpha: 32},"
            )
        from peft import LoraConfig

        known = signature(LoraConfig).parameters
        if unknown := sorted(set(self.lora) - set(known)):
            raise ValueError(f"retriever.params.tuned.lora: unknown option {unknown[0]!r}: see peft's LoraConfig")

    def _check_written(self) -> None:
        file = self.written_file
        if file is not None and (not isinstance(file, str) or not file):
            raise wrong("tuned.written_file", "null, or the path of a JSONL file", file, None)
        if self.written and file is None:
            raise ValueError(
                f"retriever.params.tuned.written: {self.written} needs texts: name a file in tuned.written_file, which "
                "`rec-r1 fit RECIPE --write policy` writes"
            )
        if file is not None and not self.written:
            raise ValueError(
                "retriever.params.tuned.written_file: nothing reads it without written: set written: 1, or leave it out"
            )


@dataclass(frozen=True)
class TunedCross:
    """How the cross-encoder of `rerank` is fine-tuned. Raises ValueError, naming the field, for a bad value."""

    # What the cross-encoder is tuned on: interactions (the raw query of a history, and the item that was chosen next)
    # or judgments (a training query, and a relevant document). null: whichever the task has.
    on: str | None = None
    # The number of epochs. The best epoch on validation is kept, or the model before tuning, if that is better.
    epochs: int = 2
    # How many pairs of each user, or of each judged query, an epoch draws at most. null: all.
    positives: int | None = 3
    # How many negatives each pair has. They are among the inner retriever's first `m` documents and not relevant.
    negatives: int = 4
    # How many pairs of all users, or of all judged queries, an epoch has at most, drawn at random. null: no limit.
    pairs: int | None = None
    batch_size: int = 16  # The number of pairs in a step, each with its negatives.
    learning_rate: float = 2e-5  # The highest learning rate. It rises linearly, and then falls linearly to 0.
    warmup: float = 0.1  # The share of the steps in which it rises.
    seed: int = 0  # The seed of the pairs, of the negatives and of the fit.

    def __post_init__(self) -> None:
        checks = Checks(self, "tuned.")
        with checks:
            check_on(self.on)
        checks.integers("epochs", "negatives")
        checks.integers("positives", optional=True)
        checks.integers("pairs", least=2, optional=True)
        checks.integers("batch_size", least=2)
        checks.integers("seed", least=0, most=MAX_SEED)
        checks.numbers("learning_rate", above=True, below=1)
        checks.numbers("warmup", below=1)
        checks.raise_all()


def check_on(on: Any) -> None:
    """Raises ValueError where ``on`` is neither null nor something that a model can be tuned on."""
    if on is not None and on not in DATA:
        raise ValueError(f"retriever.params.tuned.on: unknown {on!r}: choose {', '.join(DATA)} or null")


Kind = TypeVar("Kind", Tuned, TunedCross)


def read(given: Any, kind: type[Kind]) -> Kind | None:
    """The parameter `tuned` as a recipe has it, null or a mapping, as an object of ``kind``, a dataclass.

    Raises ValueError for anything else, and for an unknown key.
    """
    return read_section(given, kind, "retriever.params.tuned")


def fitted_on(tuned: Tuned | TunedCross | None) -> Sequence[str]:
    """Which of "interactions" and "judgments" a model is tuned on: (), one of them, or whichever a task has."""
    if tuned is None:
        return ()
    return DATA if tuned.on is None else (tuned.on,)
