"""Structured queries on BM25: one index for each field, and the values of the fields by which queries filter.

score(q, d) = sum over the fields f of weight(f) * boost(f, q) * BM25_f(q, d)

BM25_f is the formula of :mod:`retrievers.text.bm25`, with the words of all parts of the query, and with the tf, df, |d|
and avgdl of the field alone; N is the number of all documents. This is how search engines combine fields. The score of
a plain text on several fields differs: there the weight of a field multiplies the counts of its terms. With one field
of weight 1, both are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrievers.catalog import Catalog
from retrievers.text.bm25_ranks import Impacts, pack, scores
from retrievers.text.structured import boostable, boosted, first_examples
from retrievers.types import Schema, Structured

FILTERS = "filters"  # The folder with the values of the fields, inside that of the index.


class Terms(NamedTuple):
    """The index of one field: the id of each term, and the matrix of term weights."""

    vocabulary: Mapping[str, int]
    impacts: Impacts


@dataclass(frozen=True)
class Column:
    """The values of one field of n documents.

    values: the distinct values.
    codes: (n,) int32, for each document the place of its value in ``values``.
    """

    values: Sequence[str]
    codes: np.ndarray

    def has_one_of(self, wanted: Sequence[str]) -> np.ndarray:
        """(n,) bool: whether a document has one of these values."""
        chosen = set(wanted)
        return np.array([value in chosen for value in self.values], bool)[self.codes]

    def examples(self) -> tuple[str, ...]:
        """See :func:`retrievers.text.structured.examples_of`."""
        counts = np.bincount(self.codes, minlength=len(self.values)).tolist()
        order = sorted(zip(self.values, counts, strict=True), key=lambda pair: (-pair[1], pair[0]))
        return first_examples(value for value, _ in order)


@dataclass(frozen=True)
class Fields:
    """What structured queries read.

    weights: the weight of each searched field.
    terms: the index of each searched field in which a document has a term.
    columns: the values of each field by which queries filter.
    documents: n.
    """

    weights: Mapping[str, float]
    terms: Mapping[str, Terms]
    columns: Mapping[str, Column]
    documents: int

    def schema(self) -> Schema:
        """Which structured queries can be answered."""
        filters = tuple((name, column.examples()) for name, column in self.columns.items())
        return Schema(tuple(self.weights), boostable(tuple(self.weights)), filters)

    def scores(self, asked: Structured, base: Sequence[str], extra: Sequence[str], must: Sequence[str]) -> np.ndarray:
        """The scores of all documents: (n,) float32, 0 for those that are no hits.

        asked: the query.
        base, extra, must: the terms of ``asked.base``, ``asked.extra`` and ``asked.must``.
        """
        total, found = np.zeros(self.documents, np.float32), np.zeros(self.documents, bool)
        weights = boosted(self.weights, asked)
        for name, field in self.terms.items():
            basic, more = _scores(field, base), _scores(field, extra)
            total += np.float32(weights[name]) * (basic + more)
            found |= basic > 0
        for term in dict.fromkeys(must):
            found &= self._has(term)
        for name, values in asked.filters:
            found &= self.columns[name].has_one_of(values)
        total[~found] = 0
        return total

    def _has(self, term: str) -> np.ndarray:
        """(n,) bool: whether a document has a term in any field."""
        has = np.zeros(self.documents, bool)
        for field in self.terms.values():
            number = field.vocabulary.get(term)
            if number is not None:
                has[field.impacts.rows[field.impacts.starts[number] : field.impacts.starts[number + 1]]] = True
        return has


def _scores(field: Terms, terms: Sequence[str]) -> np.ndarray:
    known = [field.vocabulary[term] for term in terms if term in field.vocabulary]
    return scores(field.impacts, pack([known], field.impacts.peaks), 0)


def columns_of(catalog: Catalog, names: Sequence[str]) -> dict[str, Column]:
    """The values of the fields ``names``. Raises ValueError, naming the fields, for one that the catalogue lacks."""
    found = {}
    for name in names:
        if name not in catalog.fields:
            raise ValueError(
                f"retriever.params.structured.filters: the catalogue has no field {name!r}: choose from "
                f"{', '.join(catalog.fields)}, or add it by task.params"
            )
        place: dict[str, int] = {}
        codes = np.fromiter((place.setdefault(value, len(place)) for value in catalog.column(name)), np.int32)
        found[name] = Column(list(place), codes)
    return found


def save_columns(folder: Path, fields: Sequence[str], columns: Mapping[str, Column]) -> None:
    """Write columns into the folder of an index that is being built. fields: the fields that have an index there."""
    (folder / FILTERS).mkdir()
    about = {"fields": list(fields), "values": {name: list(column.values) for name, column in columns.items()}}
    (folder / FILTERS / "values.json").write_text(json.dumps(about))
    for i, column in enumerate(columns.values()):
        np.save(folder / FILTERS / f"{i}.npy", column.codes)


def load_columns(folder: Path, names: Sequence[str], documents: int) -> tuple[list[str], dict[str, Column]]:
    """Read what :func:`save_columns` wrote. The codes are memory-mapped.

    names: the fields by which queries filter.

    Raises ValueError, KeyError or OSError where the files are damaged.
    """
    about: dict[str, Any] = json.loads((folder / FILTERS / "values.json").read_text())
    values = about["values"]
    if list(values) != list(names):
        raise ValueError("the filters do not belong to the index")
    found = {}
    for i, name in enumerate(names):
        codes = np.load(folder / FILTERS / f"{i}.npy", mmap_mode="r")
        whole = codes.shape == (documents,) and codes.dtype == np.int32
        if not whole or codes.min() < 0 or codes.max() >= len(values[name]):
            raise ValueError(f"the values of {name!r} are out of range")
        found[name] = Column(values[name], codes)
    return list(about["fields"]), found
