"""The JSON schema of a dataclass of settings, by which editors complete and check keys. pydantic writes it."""

from __future__ import annotations

from typing import Any

DIALECT = "https://json-schema.org/draft/2020-12/schema"
BASE = {"type": "string", "description": "Another recipe, whose values are used where this one has none."}


def schema_of(cls: type) -> dict[str, Any]:
    """The schema of a recipe that is read into the dataclass ``cls``. A section has no other keys than its fields."""
    import pydantic

    found = pydantic.TypeAdapter(cls).json_schema()
    for section in (found, *found.get("$defs", {}).values()):
        section["additionalProperties"] = False
    found["properties"] = {"base": BASE} | found["properties"]
    return {"$schema": DIALECT} | found
