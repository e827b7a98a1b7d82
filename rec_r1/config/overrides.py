"""Apply overrides of a recipe, such as `seed=1`, and name them in messages."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from rec_r1.config.redaction import redact, redact_text
from rec_r1.config.yaml_text import parse


def apply(tree: dict[str, Any], override: str) -> None:
    """Apply one override to ``tree``, the sections of a recipe. Raises ValueError, which names the override."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {_shown(override)}: write key=value, such as grpo.learning_rate=1.0e-6")
    try:
        value = parse(text)
    except ValueError as error:
        fix = f"write text in quotes, such as {in_quotes(key, text)}" if _shown(override) == repr(override) else ""
        if fix and text[:1] in ("{", "["):  # A shell splits a value without quotes at its spaces.
            fix += ", and a mapping or a list with single quotes around the whole, such as 'rewards={ndcg@10: 1.0}'"
        raise ValueError(f"override {_shown(override)}: the value is not valid YAML{fix and f': {fix}'}") from error
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ValueError(f"override {_shown(override)}: {parent!r} is not a section")
    node[leaf] = value


def _shown(override: str) -> str:
    """An override for a message. The value is hidden where it is a secret."""
    key, _, text = override.partition("=")
    try:
        value = parse(text)
    except ValueError:
        value = text
    name = key.rpartition(".")[2]
    secret = redact({name: value}) != {name: value} or redact_text(override) != override
    return repr(f"{override.partition('=')[0]}=…" if secret else override)


def in_quotes(key: str, text: str) -> str:
    """An override that sets ``key`` to the string ``text``, quoted for a shell and for YAML."""
    return shlex.quote(f"{key}={json.dumps(text, ensure_ascii=False)}")


def blamed(overrides: Sequence[str], problem: str) -> str:
    """``problem``, which overrides caused in a valid recipe, with the name of the override that caused it."""
    # The setting that a problem begins with is at fault, and otherwise one that it mentions outside a list of choices.
    for search, place in ((re.match, problem), (re.search, problem.partition(": choose from ")[0])):
        for override in reversed(overrides):
            key, _, text = override.partition("=")
            names = [
                key,
                *(f"unknown key {'.'.join(key.split('.')[:depth])}" for depth in range(1, key.count(".") + 2)),
            ]
            if not any(search(rf"{re.escape(name)}(?![\w])", place) for name in names):
                continue
            fix = ""
            if not text.strip():
                fix = ": write a value after the =, or leave the override out"
            elif problem.startswith(f"{key} must be a text") and _shown(override) == repr(override):
                fix = f": write {in_quotes(key, text)}"
            return f"override {_shown(override)}: {problem}{fix}"
    return f"override {', '.join(map(_shown, overrides))}: {problem}"
