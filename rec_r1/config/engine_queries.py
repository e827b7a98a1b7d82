"""Check the literal parameters of a recipe, such as the queries of an engine: they are sent, and written into a run's
file, as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rec_r1.config.redaction import MARK, leaves, literals, redact_leaf
from retrievers.text.opensearch.queries import plain

SENT = ("template", "filter")  # The literal parameters that an engine gets as JSON.


def problems(tree: Any) -> Iterator[str]:
    """One line for every literal parameter that cannot be sent, or that must not be written into a file.

    tree: the mappings, lists and values of a recipe.
    """
    for name, value in literals(tree):
        if name.rpartition(".")[2] in SENT:
            try:
                plain(value, name)
            except ValueError as error:
                yield str(error)
        for where, text in leaves(value, name):
            if not isinstance(text, str):
                continue
            if MARK in text:
                yield f"{where} is {MARK}, which stands for a value that was not written: write the value"
            elif "://" not in text and redact_leaf(text) != text:  # Addresses with secrets are refused elsewhere.
                yield f"{where} holds an access key, and is written as it is into the files of a run: take it out"
