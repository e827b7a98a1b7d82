"""The JSON schema of a dataclass of settings, written by pydantic, with which editors complete and check keys."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from rec_r1.config.described import comments

DIALECT = "https://json-schema.org/draft/2020-12/schema"
BASE = {"type": "string", "description": "Another recipe, whose values are used where this one has none."}


def _sections(cls: type) -> Iterator[type]:
    """``cls`` and the dataclasses of its fields, and theirs."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        if dataclasses.is_dataclass(hint):
            yield from _sections(typing.cast(type, hint))


def schema_of(cls: type) -> dict[str, Any]:
    """The schema of a recipe that is read into the dataclass ``cls``. A section has no other keys than its fields.
    The description of a key is its text in `rec-r1 options`."""
    import pydantic

    found = pydantic.TypeAdapter(cls).json_schema()
    for one in _sections(cls):
        section = found if one is cls else found["$defs"][one.__name__]
        section["additionalProperties"] = False
        for name, text in comments(one).items():
            section["properties"][name]["description"] = text
    found["properties"] = {"base": BASE} | found["properties"]
    return {"$schema": DIALECT} | found
