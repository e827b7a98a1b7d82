"""Structured queries and schemas as JSON, between the server and the client."""

from __future__ import annotations

import dataclasses
from typing import Any

from retrievers.types import Schema, Structured


def query_to_json(asked: Structured) -> dict[str, Any]:
    """A query as a JSON object."""
    return {
        "query": asked.query,
        "must": list(asked.must),
        "should": list(asked.should),
        "filters": [[name, list(values)] for name, values in asked.filters],
        "boosts": [[name, float(value)] for name, value in asked.boosts],
    }


def query_from_json(sent: Any) -> Structured:
    """The query that :func:`query_to_json` wrote. Raises TypeError or ValueError for anything else.

    What the schema of a retriever does not allow, the retriever refuses.
    """
    if not isinstance(sent, dict) or set(sent) != {"query", "must", "should", "filters", "boosts"}:
        raise TypeError("a structured query must have the keys query, must, should, filters and boosts")
    if not isinstance(sent["query"], str):
        raise TypeError("a structured query's `query` must be a string")
    boosts = tuple((_text(name), value) for name, value in sent["boosts"])
    if not all(type(value) in (int, float) for _, value in boosts):
        raise TypeError("a boost must be a number")
    filters = tuple((_text(name), _texts(values)) for name, values in sent["filters"])
    return Structured(sent["query"], _texts(sent["must"]), _texts(sent["should"]), filters, boosts)


def schema_to_json(schema: Schema | None) -> dict[str, Any] | None:
    """A schema with its limits as a JSON object."""
    return None if schema is None else dataclasses.asdict(schema)


def schema_from_json(sent: Any) -> Schema | None:
    """The schema that :func:`schema_to_json` wrote. Raises TypeError or ValueError for anything else."""
    if sent is None:
        return None
    known = {field.name for field in dataclasses.fields(Schema)}
    if not isinstance(sent, dict) or set(sent) != known:
        raise TypeError(f"a schema must have the keys {', '.join(sorted(known))}")
    filters = tuple((_text(name), _texts(values)) for name, values in sent["filters"])
    return Schema(**{**sent, "fields": _texts(sent["fields"]), "boosts": _texts(sent["boosts"]), "filters": filters})


def _texts(sent: Any) -> tuple[str, ...]:
    if not isinstance(sent, list):
        raise TypeError("texts must be a list")
    return tuple(map(_text, sent))


def _text(sent: Any) -> str:
    if not isinstance(sent, str):
        raise TypeError("a text must be a string")
    return sent
