"""Structured queries: the parameter `structured` of the backends that serve them, and the check against a schema.

`retrievers.types.Structured` says what the parts of such a query mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from retrievers.core.parameters import is_name
from retrievers.core.sections import read_section
from retrievers.text.analysis import words
from retrievers.types import Query, Schema, Structured

UNKNOWN_FIELD, NOT_FILTERABLE, NOT_BOOSTABLE = "unknown_field", "not_filterable", "not_boostable"
BAD_BOOST, TOO_LONG, BAD_TEXT, NO_WORDS = "bad_boost", "too_long", "bad_text", "no_words"
# Why a schema does not allow a query, in the order in which it is checked.
CAUSES = (TOO_LONG, BAD_TEXT, NO_WORDS, UNKNOWN_FIELD, NOT_FILTERABLE, NOT_BOOSTABLE, BAD_BOOST)
EXAMPLES = 5  # A schema names at most this many values of each filter.
EXAMPLE_CHARACTERS = 40  # Longer values are no examples.
MOST_VALUES = 50  # Where an engine counts the values of a field, examples are among this many of the most frequent.


@dataclass(frozen=True)
class Serving:
    """Which structured queries a backend serves. Raises ValueError, naming the field, for a bad value."""

    # The fields by which a query may filter. A filter compares whole values, character by character.
    filters: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = self.filters
        if not isinstance(names, list | tuple) or not all(map(is_name, names)):
            raise ValueError(
                f"retriever.params.structured.filters must be a list of fields, got {names!r}: write them as [brand]"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"retriever.params.structured.filters names a field twice: {names!r}: name it once")
        object.__setattr__(self, "filters", list(names))


def read(given: Any) -> Serving | None:
    """The parameter `structured` as a recipe has it, null or a mapping. Raises ValueError for anything else."""
    return read_section(given, Serving, "retriever.params.structured")


def check(queries: Sequence[Query], schema: Schema | None) -> None:
    """Raise ValueError for a structured query that a retriever with this schema does not serve.

    Parsers of completions check the same, and count what is not allowed. This check is for all other callers, so that
    nothing else can reach an engine.
    """
    for query in queries:
        if query.structured is None:
            continue
        if schema is None:
            raise ValueError(
                "a structured query for a retriever that serves none: set retriever.params.structured={}, or send text"
            )
        found = problem(query.structured, schema)
        if found is not None:
            raise ValueError(f"a structured query that the schema of the retriever does not allow ({found})")


def problem(asked: Structured, schema: Schema) -> str | None:
    """One of :data:`CAUSES` for a query that the schema does not allow, and None for one that it does."""
    texts = [*([asked.query] if asked.query else []), *asked.must, *asked.should]
    values = [value for _, own in asked.filters for value in own]
    # This comes first, because splitting a text into words takes time in proportion to its length.
    if (
        sum(map(len, texts)) > schema.max_characters
        or len(texts) > schema.max_words
        or len(values) > schema.max_values
        or any(len(value) > schema.max_value_characters for value in values)
    ):
        return TOO_LONG
    if not all(map(_is_text, (*texts, *values))):
        return BAD_TEXT
    counts = [len(words(text)) for text in texts]
    if not counts or min(counts) == 0 or any(not own for _, own in asked.filters):
        return NO_WORDS
    if sum(counts) > schema.max_words or sum(len(words(text)) for text in asked.must) > schema.max_must:
        return TOO_LONG
    return _problem_of_fields(asked, schema)


def _problem_of_fields(asked: Structured, schema: Schema) -> str | None:
    filters = {name for name, _ in schema.filters}
    known = {*schema.fields, *schema.boosts, *filters}
    for name, _ in asked.filters:
        if name not in filters:
            return NOT_FILTERABLE if name in known else UNKNOWN_FIELD
    for name, value in asked.boosts:
        if name not in schema.boosts:
            return NOT_BOOSTABLE if name in known else UNKNOWN_FIELD
        # NaN fails both comparisons.
        if type(value) not in (int, float) or not schema.least_boost <= value <= schema.most_boost:
            return BAD_BOOST
    return None


def _is_text(text: str) -> bool:
    """Whether an engine can read a text: it has no half of a surrogate pair, which JSON can hold, and no NUL."""
    try:
        text.encode()
    except ValueError:
        return False
    return "\0" not in text


def examples_of(values: Iterable[str]) -> tuple[str, ...]:
    """Some values of a field, as examples for a prompt: the most frequent ones, of equally frequent ones the first by
    their characters. Empty and long values are left out."""
    counted = Counter(values)
    return first_examples(sorted(counted, key=lambda value: (-counted[value], value)))


def first_examples(values: Iterable[str]) -> tuple[str, ...]:
    """The first values that can be examples. values: distinct values, the most frequent first."""
    fit = (value for value in values if value.strip() and len(value) <= EXAMPLE_CHARACTERS and _is_text(value))
    return tuple(islice(fit, EXAMPLES))


def boosted(weights: Mapping[str, float], asked: Structured) -> dict[str, float]:
    """The weight of each field for a query: its own, multiplied by the boost of the query."""
    given = dict(asked.boosts)
    return {name: float(weight) * float(given.get(name, 1.0)) for name, weight in weights.items()}


def boostable(names: Sequence[str]) -> tuple[str, ...]:
    """The fields whose weight a query may change. With one field there is nothing to weigh it against."""
    return tuple(names) if len(names) > 1 else ()


def in_order(asked: Structured) -> tuple[str, str, str]:
    """The texts of a query that are analysed separately: the base, the extra words, and the required words."""
    return asked.base, asked.extra, " ".join(asked.must)
