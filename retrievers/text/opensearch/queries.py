"""From the text of a query to a query in the engine's language, in which the text is never more than a value.

The query of the user's settings, `fields` or `template`, stands in a `bool` query beside the clauses of `filter`. No
text can therefore add a clause or leave one out.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrievers.text.analysis import words, words_as_written
from retrievers.text.structured import boosted
from retrievers.types import Structured

PLACE = "{query}"  # Stands for the text of the query in a template.
MAX_CHARACTERS = 10_000  # A longer text is cut.
# These clauses return only the nearest documents, so that all others count as not retrieved.
APPROXIMATE = ("knn", "neural", "semantic")
# Beside the query, the body of a search may not hold these: they change the order or the hits after the query, so that
# its scores would not tell the ranks.
AFTER_THE_QUERY = (
    *("knn", "rank", "rescore", "retriever", "sort", "collapse", "search_after", "post_filter", "min_score"),
    "indices_boost",
)


@dataclass(frozen=True)
class Form:
    """What is asked for a text, or for a structured query.

    fields: fields of the index, with the weight of each in the score. It is not read where there is a template.
    template: a query in the engine's language with PLACE in its values. None = the words of the text in ``fields``.
    filters: clauses that every hit must match.
    left_out: a clause that no hit may match. None = there is none.
    keywords: for structured queries: a field by which they filter -> the engine's field with its whole values.
    """

    fields: Mapping[str, float]
    template: Mapping[str, Any] | None
    filters: Sequence[Mapping[str, Any]]
    left_out: Mapping[str, Any] | None = None
    keywords: Mapping[str, str] = field(default_factory=dict)

    def query(self, asked: str | Structured) -> dict[str, Any]:
        """The query for a text, see :func:`clean`, or for a structured query that the schema allows."""
        if isinstance(asked, Structured):
            inner = in_parts(asked, self.fields, self.keywords)
        elif self.template is not None:
            inner = filled(self.template, asked)
        else:
            inner = any_word(asked, self.fields)
        parts: dict[str, Any] = {"must": [inner]}
        if self.filters:
            parts["filter"] = list(self.filters)
        if self.left_out is not None:
            parts["must_not"] = [self.left_out]
        return {"bool": parts}

    @property
    def approximate(self) -> list[str]:
        """The clauses of the template that return only the nearest documents."""
        return [name for name in APPROXIMATE if name in _keys(self.template)]


def any_word(text: str, fields: Mapping[str, float]) -> dict[str, Any]:
    """A clause that any word of a text matches in any field. fields: the weight of each field."""
    weighted = [f"{name}^{float(weight)}" for name, weight in fields.items()]
    # Words in several fields add up, and syntax is not interpreted. lenient: a field of numbers is left out.
    return {"multi_match": {"query": text, "fields": weighted, "type": "most_fields", "lenient": True}}


def in_parts(asked: Structured, fields: Mapping[str, float], keywords: Mapping[str, str]) -> dict[str, Any]:
    """The clauses of a structured query. fields: the weight of each field. keywords: see :class:`Form`."""
    weights = boosted(fields, asked)
    required = [_has(piece, fields) for text in asked.must for piece in text.split() if words(piece)]
    chosen = [{"terms": {keywords[name]: list(values)}} for name, values in asked.filters]
    parts: dict[str, Any] = {"must": [any_word(asked.base, weights)], "filter": [*required, *chosen]}
    if asked.extra:
        parts["should"] = [any_word(asked.extra, weights)]
    return {"bool": parts}


def _has(piece: str, fields: Mapping[str, float]) -> dict[str, Any]:
    """A clause for the documents with all words of a piece between white space.

    The engine splits and folds it by rules of its own, so that it is sent as it is written: one field has all of it.
    Where punctuation joins several words in it, such as red/blue, they may also be in different fields.
    """
    parts = words_as_written(piece)
    if len(parts) < 2:
        return _in_one_field(piece, fields)
    apart = {"bool": {"filter": [_in_one_field(part, fields) for part in parts]}}
    return {"bool": {"should": [_in_one_field(piece, fields), apart]}}


def _in_one_field(text: str, fields: Mapping[str, float]) -> dict[str, Any]:
    """A clause for the documents of which one field has all words of a text. A word that the engine drops is required
    of none."""
    clause = any_word(text, fields)["multi_match"]
    return {"multi_match": {**clause, "operator": "and", "zero_terms_query": "all"}}


def only(query: Mapping[str, Any], id_field: str | None, ids: Sequence[str]) -> dict[str, Any]:
    """``query`` with a filter for the documents of these ids, which changes no score."""
    parts = query["bool"]
    return {"bool": {**parts, "filter": [*parts.get("filter", []), these(id_field, ids)]}}


def these(id_field: str | None, ids: Sequence[str]) -> dict[str, Any]:
    """A clause that matches the documents of these ids. id_field: the field that holds them. None = `_id`."""
    return {"ids": {"values": list(ids)}} if id_field is None else {"terms": {id_field: list(ids)}}


def clean(text: str) -> str:
    """A text that every engine reads: without halves of characters, and cut to MAX_CHARACTERS at the end of a word."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if len(text) <= MAX_CHARACTERS:
        return text.strip()
    whole, _, _ = text[:MAX_CHARACTERS].rpartition(" ")
    return (whole or text[:MAX_CHARACTERS]).strip()


def filled(node: Any, text: str) -> Any:
    """A template with ``text`` in its places. The text stays inside the value that had the place."""
    if isinstance(node, Mapping):
        return {key: filled(value, text) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [filled(value, text) for value in node]
    return node.replace(PLACE, text) if isinstance(node, str) else node


def checked_template(template: Any) -> Mapping[str, Any]:
    """The query of a template. It may be the body of a search; its other settings, such as `size`, are not read.

    Raises ValueError, naming what to change, for anything else.
    """
    where = "retriever.params.template"
    template = plain(template, where)
    if isinstance(template, Mapping) and "query" in template:
        beside = [key for key in template if key in AFTER_THE_QUERY]
        if beside:
            raise ValueError(
                f"{where}: {beside[0]!r} beside the query changes the ranking after it: give the query alone, with "
                f"{beside[0]!r} inside it if the engine allows that"
            )
        template = template["query"]
    if not isinstance(template, Mapping) or len(template) != 1:
        raise ValueError(
            f"{where} must be one query of the engine's language, such as {{match: {{title: '{PLACE}'}}}}, got "
            f"{_short(template)}"
        )
    if "hybrid" in template:
        raise ValueError(
            f"{where}: a hybrid query cannot be combined with a filter: fuse two retrievers of kind opensearch with "
            "retriever.kind=hybrid"
        )
    if not any(PLACE in value for value in _values(template)):
        raise ValueError(
            f"{where} holds no {PLACE}, so that all queries would be equal: write it where the text belongs"
        )
    if any(PLACE in key for key in _keys(template)):
        raise ValueError(f"{where}: {PLACE} is in the name of a key: write it in a value")
    if any(PLACE in code for code in _code(template)):
        raise ValueError(
            f"{where}: {PLACE} is in the code of a script or in a wrapper, which a model could then write: use the "
            "params of the script, and the query that is in the wrapper"
        )
    return template


def checked_filters(filters: Any) -> list[Mapping[str, Any]]:
    """The clauses of `filter`. Raises ValueError for anything but a list of clauses without PLACE."""
    clauses = [] if filters is None else plain(filters, "retriever.params.filter")
    if not isinstance(clauses, list) or not all(isinstance(one, dict) and len(one) == 1 for one in clauses):
        raise ValueError(
            "retriever.params.filter must be a list of clauses, such as [{term: {brand: acme}}], got "
            f"{_short(filters)}"
        )
    if any(PLACE in text for text in (*_values(clauses), *_keys(clauses))):
        raise ValueError(f"retriever.params.filter holds {PLACE}: a filter must not depend on what a model writes")
    return clauses


def plain(value: Any, where: str) -> Any:
    """A part of a query as JSON has it: mappings as dict, sequences as list, and dates as texts of ISO 8601.

    where: the dotted name of the setting, for messages.

    Raises ValueError, which names the place and the fix, for what JSON does not have: NaN and infinity, sets, bytes and
    other objects, and keys that are no texts.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: the key {_short(key)} is no text: write it in quotes")
        return {key: plain(one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, f"{where}[{place}]") for place, one in enumerate(value)]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value!r}, which JSON does not have: write a finite number")
    if value is not None and not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise ValueError(f"{where} is of type {kind}, which JSON does not have: write a text, a number or a list")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _values(node: Any) -> list[str]:
    """All texts in the values of a template."""
    if isinstance(node, Mapping):
        return [text for value in node.values() for text in _values(value)]
    if isinstance(node, list | tuple):
        return [text for value in node for text in _values(value)]
    return [node] if isinstance(node, str) else []


def _keys(node: Any) -> list[str]:
    """All keys of a template."""
    if isinstance(node, Mapping):
        return [*map(str, node), *(key for value in node.values() for key in _keys(value))]
    if isinstance(node, list | tuple):
        return [key for value in node for key in _keys(value)]
    return []


def _code(node: Any) -> list[str]:
    """The code of all scripts in a template."""
    if isinstance(node, Mapping):
        found = []
        for key, value in node.items():
            if key == "wrapper":  # Its text is a whole query, in base64.
                found += _values(value)
            elif key == "script":
                inner = (
                    {name: one for name, one in value.items() if name != "params"} if isinstance(value, Mapping) else 0
                )
                found += [value] if isinstance(value, str) else _values(inner)
            else:
                found += _code(value)
        return found
    return [code for value in node for code in _code(value)] if isinstance(node, list | tuple) else []


def canonical(value: Any) -> str:
    """A setting as text, for the fingerprint."""
    return json.dumps(value, sort_keys=True)
