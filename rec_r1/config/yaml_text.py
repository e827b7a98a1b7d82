"""YAML as recipes have it: floats of YAML 1.2, no key twice, no anchors that stand for more than a recipe holds."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from rec_r1.config.redaction import is_secret

LARGEST = 100_000  # values of a recipe


class Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML alone reads 1e-6 as a string. A key that is written twice is an error, too."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value} is written twice", key.start_mark)
                seen.add(key.value)
        return node


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would read as something else: "1e-4", and separators that YAML takes for line ends."""


for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if set(text) & set("\x85\u2028\u2029") else None
    ),
)


def parse(text: str) -> Any:
    """The value of one YAML document. Raises ValueError that says what is wrong, and where."""
    try:
        tree = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-01
        raise ValueError(_problem(error, text)) from error
    except (LookupError, AttributeError, TypeError) as error:  # PyYAML's own, for a tag that does not fit: !!int ""
        raise ValueError("it cannot be read: a tag such as !!int does not fit its value") from error
    if not _expanded(tree, {}) < LARGEST:
        raise ValueError(f"its anchors stand for more than {LARGEST:,} values: write out what is meant")
    return tree


def _problem(error: Exception, text: str) -> str:
    """What is wrong, and where; not the line itself, which may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
    mark = error.problem_mark
    line = (text.split("\n")[mark.line :] or [""])[0]
    hidden = any(map(is_secret, re.findall(r"[\w.-]+", line)))
    problem = "it cannot be read" if hidden else str(error.problem)
    if problem.startswith("but "):  # PyYAML begins this sentence elsewhere
        problem = f"{error.context}, {problem}"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _expanded(value: Any, known: dict[int, float]) -> float:
    """How many values a tree has once every alias is written out; infinite where one holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # while it is open
        known[id(value)] = 1 + sum(_expanded(v, known) for v in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]
