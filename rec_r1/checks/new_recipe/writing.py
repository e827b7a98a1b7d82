"""The text of a new recipe: a shipped recipe in which the settings of the data are replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rec_r1.config import find
from rec_r1.config.yaml_text import Dumper

# The shipped recipe that a new one is based on, by (whether there is a GPU, whether the task is sequential).
TEMPLATES = {
    (False, False): "cpu/search",
    (False, True): "cpu/sequential",
    (True, False): "beir_bm25",
    (True, True): "amazon_beauty_sequential",
}

_COMMENT = 300  # Characters of the longest comment: a query or a path may have thousands.


@dataclass(frozen=True)
class Section:
    """One top-level key of a recipe's text.

    name: the key; "" for the comment at the head of the file.
    lines: its lines, with the comments above it.
    """

    name: str
    lines: list[str]


def sections(text: str) -> list[Section]:
    """A recipe's text, cut before each top-level key. Comments directly above a key belong to it."""
    found = [Section("", [])]
    for line in text.splitlines():
        key = re.match(r"([A-Za-z_]\w*):", line)
        if key:
            found.append(Section(key[1], []))
        found[-1].lines.append(line)
    return found


def template(name: str) -> dict[str, str]:
    """The sections of a shipped recipe: key -> text, without the comment at its head."""
    text = find(name).read_text(encoding="utf-8")
    return {section.name: "\n".join(section.lines).strip() for section in sections(text) if section.name}


def change(text: str, values: Mapping[str, tuple[Any, str]]) -> str:
    """The text of a section with new values of some keys.

    text: the section's text.

    values: key -> its new value, and the comment that says why; "" keeps the comment that is there.

    Raises KeyError for a key that the section lacks.
    """
    lines = text.splitlines()
    for key, (value, why) in values.items():
        places = [place for place, line in enumerate(lines) if line.startswith(f"  {key}:")]
        if not places:
            raise KeyError(key)
        _, mark, there = lines[places[0]].partition("  # ")
        comment = why or there if mark or why else ""
        lines[places[0]] = f"  {key}: {flow(value)}" + (f"  # {comment}" if comment else "")
    return "\n".join(lines)


def flow(value: Any) -> str:
    """A value on one line of YAML."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=100_000, allow_unicode=True, sort_keys=False)
    return str(text).removesuffix("\n").removesuffix("...").removesuffix("\n")


def comment(text: str) -> str:
    """A text as YAML takes it in a comment: one line of at most 300 characters, without control characters."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= _COMMENT else f"{line[: _COMMENT - 1]}…"


def mapping(values: Mapping[str, Any], indent: int, notes: Mapping[str, str]) -> list[str]:
    """``values`` as lines of YAML, each with its note as a comment.

    values: key -> value; mappings and lists are written on one line.
    indent: blanks before each line.
    notes: key -> the comment behind its line.
    """
    lines = []
    for key, value in values.items():
        note = f"  # {comment(notes[key])}" if key in notes else ""
        lines.append(f"{' ' * indent}{key}: {flow(value)}{note}")
    return lines


def assemble(header: Sequence[str], parts: Mapping[str, str]) -> str:
    """A recipe's text from the lines of its head and the texts of its sections."""
    head = "\n".join(f"# {comment(line)}".rstrip() for line in header)
    short = [text for text in parts.values() if "\n" not in text]
    long = [text for text in parts.values() if "\n" in text]
    return "\n".join([head, *short, ""]) + "\n" + "\n\n".join(long) + "\n"
