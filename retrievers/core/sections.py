"""A parameter of a retriever that is a mapping itself, such as `structured` and `tuned`."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, TypeVar

from retrievers.core.choices import choose

Kind = TypeVar("Kind")


def read_section(given: Any, kind: type[Kind], name: str) -> Kind | None:
    """A parameter as a recipe has it, null or a mapping, as an object of ``kind``, a dataclass.

    given: the value. An object of ``kind`` is returned as it is.
    name: the dotted name of the parameter, for messages.

    Raises ValueError for anything else, and for an unknown key; and what ``kind`` raises.
    """
    if given is None or isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a mapping or null, got {given!r}: write {{}} for the defaults")
    known = list(signature(kind).parameters)
    for key in given:
        if key not in known:
            raise ValueError(f"{name}.{key}: unknown key: {choose(key, known)}")
    return kind(**given)
