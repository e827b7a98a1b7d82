"""The parameter `tuned` of `dense`: how its encoder is fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

DATA = ("interactions", "judgments")  # What an encoder can be tuned on.


@dataclass(frozen=True)
class Tuned:
    """How the encoder of `dense` is fine-tuned. Raises ValueError, naming the field, for a bad value."""

    # What the encoder is tuned on: interactions (the raw query of a history, and the item that was chosen next) or
    # judgments (a training query, and a relevant document). null: whichever the task has.
    on: str | None = None
    # The number of epochs. Of these the best on validation is kept, or the encoder as it was, if that is better.
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
    # How many further negatives of each pair are items that its history speaks against, by the retriever `affinity`.
    anti_affinity: int = 0
    # For anti_affinity: a retriever that reads histories and signed weights, {kind, params}.
    affinity: Mapping[str, Any] = field(default_factory=lambda: {"kind": "ease"})
    # How many further negatives of each pair are texts that a language model wrote for it, from `written_file`.
    written: int = 0
    # For written: the JSONL file of these texts. `rec-r1 fit RECIPE --write policy` writes it.
    written_file: str | None = None
    # The share of the loss, below 1, that keeps the similarities of the encoder as it was.
    keep: float = 0.0
    # LoRA: the options of peft's LoraConfig, such as {r: 16, lora_alpha: 32}. null: all weights are tuned.
    lora: Mapping[str, Any] | None = None
    # Longer texts are cut to so many tokens, in the fit and in the index. null: as the model says.
    max_tokens: int | None = 64
    seed: int = 0  # The seed of the pairs, of the negatives and of the fit.

    def __post_init__(self) -> None:
        if self.on is not None and self.on not in DATA:
            raise ValueError(f"retriever.params.tuned.on: unknown {self.on!r}: choose {', '.join(DATA)} or null")
        for name, least, optional in (
            ("epochs", 1, False), ("positives", 1, True), ("batch_size", 2, False), ("mini_batch", 1, True),
            ("hard", 0, False), ("anti_affinity", 0, False), ("written", 0, False), ("max_tokens", 4, True),
            ("seed", 0, False),
        ):  # fmt: skip
            self._check_integer(name, least, optional)
        for name, most in (("learning_rate", 1.0), ("warmup", 1.0), ("scale", 1000.0), ("keep", 1.0)):
            value, above = getattr(self, name), name in ("learning_rate", "scale")
            if type(value) not in (int, float) or not 0 <= value < most or (above and value == 0):
                raise self._wrong(name, f"a number {'above' if above else 'from'} 0 to below {most:g}")
        if type(self.log_q) is not bool:
            raise self._wrong("log_q", "true or false")
        self._check_nested()

    def _check_integer(self, name: str, least: int, optional: bool) -> None:
        value = getattr(self, name)
        if not (optional and value is None) and (type(value) is not int or not least <= value < 2**32):
            raise self._wrong(name, f"{'null or ' if optional else ''}an integer from {least}")

    def _check_nested(self) -> None:
        affinity = self.affinity
        if not isinstance(affinity, Mapping) or not isinstance(affinity.get("kind"), str):
            raise self._wrong("affinity", "a mapping with a kind, such as {kind: ease}")
        if unknown := sorted(set(affinity) - {"kind", "params"}):
            raise ValueError(f"retriever.params.tuned.affinity: unknown key {unknown[0]!r}: choose from kind, params")
        if not self.anti_affinity and affinity != {"kind": "ease"}:
            raise ValueError(
                "retriever.params.tuned.affinity: nothing reads it without anti_affinity: set that, or leave it out"
            )
        if not isinstance(affinity.get("params", {}), Mapping):
            raise self._wrong("affinity", "a mapping whose params are a mapping, such as {kind: ease, params: {}}")
        self._check_written()
        if self.lora is None:
            return
        if not isinstance(self.lora, Mapping):
            raise self._wrong("lora", "null, or a mapping of peft's options, such as {r: 16, lora_alpha: 32}")
        from inspect import signature

        from peft import LoraConfig

        known = signature(LoraConfig).parameters
        if unknown := sorted(set(self.lora) - set(known)):
            raise ValueError(f"retriever.params.tuned.lora: unknown option {unknown[0]!r}: see peft's LoraConfig")

    def _check_written(self) -> None:
        file = self.written_file
        if file is not None and (not isinstance(file, str) or not file):
            raise self._wrong("written_file", "null, or the path of a JSONL file")
        if self.written and file is None:
            raise ValueError(
                f"retriever.params.tuned.written: {self.written} needs texts: name a file in tuned.written_file, which "
                "`rec-r1 fit RECIPE --write policy` writes"
            )
        if file is not None and not self.written:
            raise ValueError(
                "retriever.params.tuned.written_file: nothing reads it without written: set written: 1, or leave it out"
            )

    def _wrong(self, name: str, expected: str) -> ValueError:
        usual = {"affinity": "{kind: ease}", "log_q": "true"}.get(name, getattr(Tuned, name, None))
        return ValueError(
            f"retriever.params.tuned.{name} must be {expected}, got {getattr(self, name)!r}: the default is "
            f"{'null' if usual is None else usual}"
        )


def read(given: Any) -> Tuned | None:
    """The parameter `tuned` as a recipe has it: null or a mapping. Raises ValueError for anything else."""
    if given is None or isinstance(given, Tuned):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(
            f"retriever.params.tuned must be null or a mapping, got {given!r}: write {{}} to tune with the defaults"
        )
    known = [one.name for one in fields(Tuned)]
    for name in given:
        if name not in known:
            from difflib import get_close_matches

            nearest = get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"retriever.params.tuned.{name}: unknown key: did you mean {nearest!r}? Choose from {', '.join(known)}"
            )
    return Tuned(**given)
