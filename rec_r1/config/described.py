"""The keys of a dataclass with type, default and text, for `rec-r1 options` and the tables of the pages.

A key's text is the comment beside its field, or the comment in the lines above the field.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import io
import re
import textwrap
import tokenize
import typing
from typing import Any, NamedTuple

import yaml

from rec_r1.config.typed import described

_YAML_WORDS = {"None": "null", "True": "true", "False": "false"}
_FOR_TOOLS = re.compile(r"# (noqa|fmt:|type:)")  # Comments that linters and type checkers read.


class Key(NamedTuple):
    """One key of a section.

    name: the dotted name, such as format.titles.
    kind: its type in words, such as "int or null".
    default: its default as YAML; "" where there is none.
    text: what it sets, in one line.
    """

    name: str
    kind: str
    default: str
    text: str


def keys(cls: type, prefix: str = "") -> list[Key]:
    """The keys of a dataclass, those of nested dataclasses included, in the order of the fields.

    cls: the dataclass.
    prefix: the beginning of each name, such as "retriever.params.".
    """
    hints, texts = typing.get_type_hints(cls), comments(cls)
    found = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found += keys(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            text = texts.get(field.name, "")
            found.append(Key(prefix + field.name, described(hint), as_yaml(default(field)), text))
    return found


def comments(cls: type) -> dict[str, str]:
    """The comment of each field that has one: beside the field, or in the lines above it. A comment of several lines
    becomes one line. Python's None, True and False become YAML's null, true and false.

    cls: a dataclass. The fields of its bases are included. A class whose source cannot be read has no comments.
    """
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if dataclasses.is_dataclass(one):
            found |= _own_comments(one)
    return found


def _own_comments(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comment = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT and not _FOR_TOOLS.match(t.string)}
    lines = source.splitlines()
    found = {}
    (definition,) = ast.parse(source).body
    for field in typing.cast(ast.ClassDef, definition).body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        first = field.lineno
        while first - 1 in comment and lines[first - 2].lstrip().startswith("#"):
            first -= 1
        last = field.end_lineno or field.lineno
        text = " ".join(comment[n].lstrip("# ") for n in range(first, last + 1) if n in comment)
        found[field.target.id] = re.sub(r"\b(None|True|False)\b", lambda word: _YAML_WORDS[word.group()], text)
    return found


def default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; MISSING where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def as_yaml(value: Any) -> str:
    """A value as YAML writes it in one line; "" for MISSING."""
    if value is dataclasses.MISSING:
        return ""
    text = yaml.safe_dump(_plain(value), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _plain(value: Any) -> Any:
    """``value`` as the types that YAML has; an object of another type as its text."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def table(found: list[Key]) -> list[str]:
    """The rows of a page's table, `| key | default | text |`, as Markdown."""
    return [f"| `{key.name}` | `{key.default}` | {key.text} |" for key in found]
