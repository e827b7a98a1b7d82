"""Check values from YAML against type annotations: pydantic decides, and the messages are written here."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import operator
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union

from rec_r1.config.redaction import leaves, redact

UNION = (Union, types.UnionType)
# The types of YAML in a message: one value, and several.
WORDS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("true or false", "booleans"),
    dict: ("a mapping", "mappings"),
    list: ("a list", "lists"),
}
hints = functools.cache(typing.get_type_hints)  # One call takes 10 ms for GRPOConfig.


def mismatch(hint: Any, value: Any, name: str) -> str | None:
    """Why ``value`` does not match an annotation, such as "must be an integer, got 'one'".

    hint: the annotation.
    value: a value from YAML.
    name: the name of the setting. Where the name is that of a secret, the message hides the value.

    Returns None where the value matches.

    YAML has the types of JSON, so pydantic validates strict JSON: an int is accepted for a float and a list for a
    tuple. A bool or a text is not accepted for a number, and no number may be infinite. An annotation such as
    `SchedulerType | str` accepts the values of the enum alone. A dataclass is a section, whose keys are checked by the
    code that reads the section.
    """
    import pydantic

    accepted = writable(hint)
    try:
        if not isinstance(value, dict | list | str | int | float | None):  # a date, a set
            raise TypeError(value)
        text = json.dumps(value, default=lambda _: [])  # A date deep in a section is refused where its key is read.
        _adapter(accepted).validate_json(text, strict=True)
    except (pydantic.ValidationError, TypeError, ValueError):  # ValueError: a number of more than 4,300 digits
        # YAML 1.1 had these words for booleans, and YAML 1.2, which recipes follow, reads them as text.
        meant = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(str(value).lower())
        fix = f": write {meant}" if meant and bool in _options(accepted) else ""
        if any(map(dataclasses.is_dataclass, _options(hint))):
            fix = ": write {} for the defaults"  # In the words of `retrievers.core.sections`.
        return f"must be {expected(accepted)}, got {shown(redact({name: value})[name])}{fix}"
    return None


def _options(hint: Any) -> tuple[Any, ...]:
    """The options of a union. Any other annotation is its only option."""
    return typing.get_args(hint) if typing.get_origin(hint) in UNION else (hint,)


def shown(value: Any) -> str:
    """``value`` on one line, cut to 80 characters. A single null, true or false is shown as YAML writes it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def not_finite(tree: Any) -> Iterator[str]:
    """The dotted name of every NaN and infinity in nested mappings and lists."""
    return (name for name, value in leaves(tree) if isinstance(value, float) and not math.isfinite(value))


def writable(hint: Any) -> Any:
    """The annotation of what YAML holds for ``hint``: a dict for a dataclass, and no `str` beside an enum."""
    if dataclasses.is_dataclass(hint):
        return dict
    if typing.get_origin(hint) not in UNION:
        return hint
    options = [writable(option) for option in typing.get_args(hint)]
    if any(isinstance(option, type) and issubclass(option, enum.Enum) for option in options):
        options = [option for option in options if option is not str]
    return functools.reduce(operator.or_, options)


def _origin(hint: Any) -> Any:
    """`typing.get_origin`, but list for a Sequence and dict for a Mapping, because YAML has only those."""
    origin = typing.get_origin(hint)
    return {Mapping: dict, Sequence: list}.get(origin, origin)


def described(hint: Any) -> str:
    """An annotation in words: "int", "list of str or null", "one of 'steps', 'no'"."""
    origin, arguments = _origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return "dict"
    if origin in UNION:
        return " or ".join(described(option) for option in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(repr(member.value) for member in hint)}"
    if origin in (list, dict) and arguments[-1] is not Any:
        return f"{origin.__name__} of {described(arguments[-1])}"
    if hint is type(None):
        return "null"
    plain = origin or hint
    return plain.__name__ if isinstance(plain, type) else str(plain)


def expected(hint: Any) -> str:
    """An annotation in the words of a message: "an integer", "a list of texts or null"."""
    origin, arguments = _origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return WORDS[dict][0]
    if origin in UNION:
        return " or ".join(expected(option) for option in arguments)
    held = _origin(arguments[-1]) or arguments[-1] if arguments else None
    if origin in (list, dict) and held in WORDS:
        return f"{WORDS[origin][0]} {'of' if origin is list else 'to'} {WORDS[held][1]}"
    return WORDS[origin or hint][0] if (origin or hint) in WORDS else described(hint)


@functools.cache
def _adapter(hint: Any) -> Any:
    import pydantic

    # The adapter of a plain type has no option `allow_inf_nan` of its own: it must be passed as config.
    config = pydantic.ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
    return pydantic.TypeAdapter(hint, config=config)
