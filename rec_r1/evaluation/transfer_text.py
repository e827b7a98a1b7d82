"""The result of `transfer.matrix` as tables, for terminals and pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rec_r1.evaluation import compare
from rec_r1.evaluation.number_format import number, signed
from rec_r1.evaluation.tables import aligned

LONGEST = 24  # Characters of a retriever above a column. If one is longer, all columns are numbered.
NOTE = f"* differs from the raw query on that retriever (paired randomisation test, Holm, p < {compare.ALPHA})"


class Block(NamedTuple):
    """A table: a line for each policy, a column for each retriever.

    title: what its numbers are.
    rows: pairs of a name and C cells, each a number with its interval, or "".
    """

    title: str
    rows: list[tuple[str, list[str]]]


def columns(result: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The heads of the columns, and what they stand for: lines such as "[1] bm25", none if the heads are names."""
    retrievers = result["retrievers"]
    if max(map(len, retrievers)) <= LONGEST:
        return list(retrievers), []
    heads = [f"[{i}]" for i in range(1, len(retrievers) + 1)]
    return heads, [f"{head} {retriever}" for head, retriever in zip(heads, retrievers, strict=True)]


def blocks(result: Mapping[str, Any]) -> list[Block]:
    """The means, the differences from the raw query, and those of trained from untrained policies, where there are any.

    result: what `transfer.matrix` returns.
    """
    head = f"{result['metric']} on {result['part']} (n={result['n']})"
    made = [
        Block(head, _rows(result, lambda cell: _with_interval(cell, number))),
        Block("difference from the raw query", _rows(result, _against_raw)),
        Block("difference from the untrained policy", _rows(result, _lift)),
    ]
    return [block for block in made if block.rows]


def text(result: Mapping[str, Any]) -> str:
    """All tables of :func:`blocks` for a terminal, with 95% intervals.

    result: what `transfer.matrix` returns.
    """
    heads, legend = columns(result)
    tables = [
        aligned([[block.title, *heads], *([name, *cells] for name, cells in block.rows)]) for block in blocks(result)
    ]
    # The cells of an earlier version have no intervals of differences, and so no marks.
    notes = [NOTE] if any("against_raw" in cell for cell in result["cells"]) else []
    return "\n\n".join([*tables, "\n".join([*notes, *legend])]).rstrip()


def _rows(result: Mapping[str, Any], shown: Callable[[Mapping[str, Any]], str]) -> list[tuple[str, list[str]]]:
    """The rows of a table. Systems for which ``shown`` has nothing on any retriever are left out."""
    cells = {(cell["system"], cell["retriever"]): shown(cell) for cell in result["cells"]}
    names: Sequence[str] = list(dict.fromkeys(cell["system"] for cell in result["cells"]))
    rows = [(name, [cells.get((name, spec), "") for spec in result["retrievers"]]) for name in names]
    return [(name, row) for name, row in rows if any(row)]


def _with_interval(found: Mapping[str, Any], form: Callable[[float], str]) -> str:
    return f"{form(found['mean'])} [{form(found['low'])}, {form(found['high'])}]"


def _against_raw(cell: Mapping[str, Any]) -> str:
    found = cell.get("against_raw")
    if found is None:
        return ""
    return _with_interval(found, signed) + ("*" if found["p_holm"] < compare.ALPHA else "")


def _lift(cell: Mapping[str, Any]) -> str:
    return _with_interval(cell["lift"], signed) if "lift" in cell else ""
