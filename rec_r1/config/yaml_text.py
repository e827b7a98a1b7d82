"""Read and write the YAML of recipes: numbers and booleans of YAML 1.2, no dates, no repeated key, and a limit on what
anchors expand to."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from rec_r1.config.redaction import is_secret

MAX_VALUES = 100_000  # A recipe must have fewer values than this, counted after every alias is expanded.


class Loader(yaml.SafeLoader):
    """A loader that follows YAML 1.2 where PyYAML does not, and refuses a key that is written twice.

    It reads 1e-6 as a float, where PyYAML reads a string. It reads no, off, yes and on as strings, where PyYAML reads
    booleans: these words are values of options (`grpo.save_strategy=no`), names of columns, and labels of grades. It
    reads 2026-05-01, 12:30 and 007 as strings, where PyYAML reads a date, 750 and an octal number: these are values in
    the query of an engine, and ids.
    """

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
    """A dumper that quotes the texts that `Loader` misreads: "1e-4", and separators that YAML reads as line ends."""


_YAML_1_1 = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "timestamp", "int", "float")}
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _YAML_1_1]
    for first, resolvers in Loader.yaml_implicit_resolvers.items()
}
# The dumper keeps PyYAML's patterns, so it quotes what other readers of the file would take for a boolean or a date.
for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+|0b[01_]+", "-+0123456789"),
    ("float", r"[-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+0123456789."),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))
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
    """The value of one YAML document. Raises ValueError, which says what is wrong and where."""
    try:
        tree = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # A number of 4,300 digits raises ValueError.
        raise ValueError(_problem(error, text)) from error
    except (LookupError, AttributeError, TypeError) as error:  # PyYAML raises these for a wrong tag, such as !!int "".
        raise ValueError("it cannot be read: a tag such as !!int does not fit its value") from error
    if not _expanded(tree, {}) < MAX_VALUES:
        raise ValueError(f"its aliases expand to more than {MAX_VALUES:,} values: write the values out")
    return tree


def _problem(error: Exception, text: str) -> str:
    """What is wrong and where. The line itself is not quoted, because it may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
    mark = error.problem_mark
    line = (text.split("\n")[mark.line :] or [""])[0]
    hidden = any(map(is_secret, re.findall(r"[\w.-]+", line)))
    problem = "it cannot be read" if hidden else str(error.problem)
    if problem.startswith("but "):  # PyYAML has put the beginning of this sentence into `context`.
        problem = f"{error.context}, {problem}"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _expanded(value: Any, known: dict[int, float]) -> float:
    """How many values a tree has after every alias is expanded. Infinite where an alias contains itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # Found again while it is being counted, the value contains itself.
        known[id(value)] = 1 + sum(_expanded(v, known) for v in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]
