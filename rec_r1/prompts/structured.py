"""The action `structured`: a query in parts, which the model writes as JSON. `retrievers.Structured` explains them.

    {"query": "running shoes", "must": ["waterproof"], "should": ["trail"],
     "filters": {"brand": ["Acme", "Solvei"]}, "boosts": {"title": 2}}

All keys may be left out, as long as one of the first three has a word. A list of one text may be the text itself. What
the schema of the retriever does not allow is malformed: nothing of it reaches the engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rec_r1.prompts.templates import PLACES
from retrievers import Schema, Structured
from retrievers.text.analysis import first_words, words
from retrievers.text.structured import BAD_BOOST, CAUSES, TOO_LONG, problem

NOT_JSON, UNKNOWN_KEY, WRONG_TYPE = "not_json", "unknown_key", "wrong_type"
# Why a completion is malformed. Each cause is a curve, `scorer/malformed/CAUSE`.
MALFORMED = (NOT_JSON, UNKNOWN_KEY, WRONG_TYPE, *CAUSES)
KEYS = ("query", "must", "should", "filters", "boosts")


def read(answer: Mapping[str, Any] | None, schema: Schema) -> Structured | str:
    """The query in the JSON object of a completion, or why it is malformed, one of :data:`MALFORMED`.

    answer: the object. None = the completion holds none.
    schema: what the retriever allows.
    """
    if answer is None:
        return NOT_JSON
    if any(key not in KEYS for key in answer):
        return UNKNOWN_KEY
    query, must, should = answer.get("query", ""), _texts(answer.get("must", [])), _texts(answer.get("should", []))
    filters, boosts = answer.get("filters", {}), answer.get("boosts", {})
    if not isinstance(query, str) or must is None or should is None:
        return WRONG_TYPE
    if not isinstance(filters, dict) or not isinstance(boosts, dict):
        return WRONG_TYPE
    chosen = {name: _texts(values) for name, values in filters.items()}
    if any(not values for values in chosen.values()):
        return WRONG_TYPE
    if any(type(value) not in (int, float) for value in boosts.values()):
        return BAD_BOOST
    # A long text is not split into words, which takes time in proportion to its length.
    if len(query) + sum(map(len, (*must, *should))) > schema.max_characters:
        return TOO_LONG
    found = Structured(
        query if words(query) else "",
        tuple(filter(words, must)),
        tuple(filter(words, should)),
        tuple((name, values or ()) for name, values in chosen.items()),
        tuple(boosts.items()),
    )
    return problem(found, schema) or found


def _texts(value: Any) -> tuple[str, ...] | None:
    """A list of texts, or one text. None for anything else."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else None


def as_json(asked: Structured) -> str:
    """A query as the JSON that :func:`read` reads."""
    said = {
        "query": asked.query,
        "must": list(asked.must),
        "should": list(asked.should),
        "filters": {name: list(values) for name, values in asked.filters},
        "boosts": dict(asked.boosts),
    }
    return json.dumps({key: value for key, value in said.items() if value}, ensure_ascii=False)


def instruction(schema: Schema) -> str:
    """How a completion is written, for a prompt: an example, and what may stand in it."""
    filters = [name for name, _ in schema.filters]
    example: dict[str, Any] = {"query": "…", "must": ["…"], "should": ["…"]}
    example |= {"filters": {filters[0]: ["…"]}} if filters else {}
    example |= {"boosts": {schema.boosts[0]: 2}} if schema.boosts else {}
    lines = [
        f"Answer with JSON, like this: <answer>{json.dumps(example, ensure_ascii=False)}</answer>",
        "query: words to search for. must: words that every result has. should: words that move a result up. Leave out "
        "what you do not need.",
    ]
    if filters:
        fields = "; ".join(_with_examples(name, values) for name, values in schema.filters)
        lines.append(f"filters: every result has one of these exact values in the field. Fields: {fields}.")
    if schema.boosts:
        least, most = schema.least_boost, schema.most_boost
        lines.append(
            f"boosts: how much a word in the field counts, from {least:g} to {most:g}; 1 is usual. Fields: "
            f"{', '.join(schema.boosts)}."
        )
    return "\n".join(lines)


def _with_examples(name: str, values: tuple[str, ...]) -> str:
    # A value that looks like a place of a prompt would be replaced there.
    shown = [json.dumps(value, ensure_ascii=False) for value in values if not any(place in value for place in PLACES)]
    return f"{name} (such as {', '.join(shown)})" if shown else name


def shortened(text: str, schema: Schema) -> str:
    """The beginning of a text that is not too long for the `query` of a schema."""
    kept, count = text, schema.max_words
    while problem(Structured(kept), schema) == TOO_LONG and count:
        kept = first_words(text, count)[: schema.max_characters]
        count //= 2
    return kept
