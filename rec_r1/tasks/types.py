"""What a task is: a catalogue, and queries with graded judgments in three parts that share no query."""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rec_r1.config import UserError
from retrievers import Catalog, Interactions, Query, Retriever, certain_ranks
from rewards import RankingReward
from rewards.types import Outcome

if TYPE_CHECKING:
    from datasets import Dataset

    from rec_r1.prompts import Format, Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Q queries with their judgments.

    ids, queries: Q strings; a query is what the raw baseline sends. rows: Q tuples of distinct catalogue rows; grades:
    Q tuples of their grades, > 0. Empty where a task has none: histories: Q tuples of catalogue rows, oldest first;
    candidates: Q tuples of rows in the order shown; slices: name -> Q labels ("target" -> "cold"), by which
    evaluation is broken down.
    """

    ids: Sequence[str]
    queries: Sequence[str]
    rows: Sequence[tuple[int, ...]]
    grades: Sequence[tuple[float, ...]]
    histories: Sequence[tuple[int, ...]] = ()
    candidates: Sequence[tuple[int, ...]] = ()
    slices: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def raw(self) -> list[Query]:
        """What is asked without a model: the query as it is, and the history for those who read it."""
        histories = self.histories or [()] * len(self)
        return [Query(text, tuple(history)) for text, history in zip(self.queries, histories, strict=True)]

    def take(self, indexes: Sequence[int]) -> Split:
        return Split(
            [self.ids[i] for i in indexes],
            [self.queries[i] for i in indexes],
            [self.rows[i] for i in indexes],
            [self.grades[i] for i in indexes],
            [self.histories[i] for i in indexes] if self.histories else (),
            [self.candidates[i] for i in indexes] if self.candidates else (),
            {name: [labels[i] for i in indexes] for name, labels in self.slices.items()},
        )


@dataclass(frozen=True)
class Task:
    """counts: (n,) int64, how often each document is chosen in training; None = as the training judgments say.
    interactions: what history backends are fitted on, and the validation split that their settings are picked by; None
    where a task has no histories. set_apart: no training query's target, nor what its user chose later, is among them.
    repeats: whether a query may ask for an item of its own history. False, the default: such an item cannot be right,
    and no ranking or list holds it (`retriever.exclude_history` overrules that); data that say otherwise are refused.
    folder: where the task lies prepared (see task_cache.py); None = made anew each time."""

    name: str
    catalog: Catalog
    train: Split
    validation: Split
    test: Split
    counts: np.ndarray | None = None
    interactions: Interactions | None = None
    set_apart: bool = False
    repeats: bool = False
    folder: Path | None = None

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def excludes_history(self) -> bool:
        """Whether rankings leave out the items of a query's history: there are histories, and nothing is repeated."""
        return not self.repeats and any(split.histories for split in self.splits.values())


@dataclass(frozen=True)
class NoParams:
    """`task.params` of a task that takes none."""


def grade_of(given: object, place: str) -> float:
    """A grade as a number. Raises UserError, beginning with ``place``, for anything but a finite one."""
    if not isinstance(given, Real) or isinstance(given, bool) or not math.isfinite(given):
        raise UserError(f"{place}: grade {given!r}: a grade is a finite number, such as 1: correct the judgment")
    return float(given)


def look_alike(identifier: str) -> str:
    """What ids have in common that differ only in white space, unicode form, or a whole number's ".0"."""
    key = " ".join(unicodedata.normalize("NFKC", identifier).split())
    return re.sub(r"^(\d+)\.0+$", r"\1", key)


def unknown(missing: Sequence[str], there: Iterable[str]) -> str:
    """The first three ids that are missing, for a message, and what is there instead of the first."""
    wanted = look_alike(missing[0])
    alike = next((other for other in there if look_alike(other) == wanted), None)
    hint = "" if alike is None else f" ({missing[0]!r} is there as {alike!r}: write the ids alike)"
    return ", ".join(map(repr, missing[:3])) + hint


def make_split(
    source: str, catalog: Catalog, queries: Mapping[str, str], judgments: Mapping[str, Mapping[str, float]]
) -> Split:
    """Judgments by id -> a Split by row. Grades of 0 or less are judged irrelevant and dropped; a query that
    keeps none is dropped, and counted in the log.

    source: the file, for messages. Raises UserError naming the first three documents or queries that the
    corpus or the query file lacks, and for a grade that is no finite number.
    """
    missing = [q for q in judgments if q not in queries]
    if missing:
        raise UserError(
            f"{source}: {len(missing)} judged queries are not in the query file, first: "
            f"{unknown(missing, queries)}: add them or remove their judgments"
        )
    # Irrelevant documents count here too: an id that the corpus lacks means a wrong corpus, whatever its grade.
    judged = list(dict.fromkeys(doc for docs in judgments.values() for doc in docs))
    lacking = [doc for doc in judged if doc not in catalog]
    if lacking:
        raise UserError(
            f"{source}: {len(lacking)} of {len(judged)} ids are not in the catalogue, first: "
            f"{unknown(lacking, catalog.ids)}: judge documents of this corpus, or add them to it"
        )
    row_of = dict(zip(judged, map(int, catalog.rows(judged)), strict=True))
    kept: list[tuple[str, str, tuple[int, ...], tuple[float, ...]]] = []
    for query, docs in judgments.items():
        graded = [(row_of[d], grade_of(g, f"{source}: query {query!r}, document {d!r}")) for d, g in docs.items()]
        positive = sorted(pair for pair in graded if pair[1] > 0)
        if positive:
            rows, grades = zip(*positive, strict=True)
            kept.append((query, queries[query], rows, grades))
    if len(kept) < len(judgments):
        logger.warning("%s: %d queries have no relevant document and are left out", source, len(judgments) - len(kept))
    if not kept:
        raise UserError(f"{source}: no query with a relevant document is left: check the judgments' grades")
    ids, texts, row_lists, grade_lists = (list(column) for column in zip(*kept, strict=True))
    return Split(ids, texts, row_lists, grade_lists)


def pad(rows: Sequence[Sequence[int]], grades: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Ragged judgments -> (B, T) int32 rows padded with -1 and (B, T) float32 grades padded with 0.

    A row that stands twice among one query's targets counts once, with its best grade: the reference counted
    it twice in the ideal DCG, so that a perfect ranking scored below 1.
    """
    best = [dict(sorted(zip(r, g, strict=True), key=lambda pair: pair[1])) for r, g in zip(rows, grades, strict=True)]
    width = max((len(targets) for targets in best), default=0)
    out_rows = np.full((len(best), width), -1, np.int32)
    out_grades = np.zeros((len(best), width), np.float32)
    for b, targets in enumerate(best):
        out_rows[b, : len(targets)] = list(targets)
        out_grades[b, : len(targets)] = list(targets.values())
    return out_rows, out_grades


def raw_scores(split: Split, retriever: Retriever, metric: RankingReward) -> np.ndarray:
    """(Q,) float32: what each raw query scores, before any model."""
    targets, grades = pad(split.rows, split.grades)
    queries = split.raw()
    ranks = certain_ranks(retriever, queries, targets)
    return metric(Outcome(split.queries, queries, ranks, grades))


def prompts(split: Split, catalog: Catalog, format_: Format) -> list[Prompt]:
    """What the model is asked for each query of ``split``, with the titles of its history and candidates."""
    titles = catalog.titles
    return [
        format_.prompt(
            query,
            [titles[row] for row in split.histories[q]] if split.histories else (),
            [titles[row] for row in split.candidates[q]] if split.candidates else (),
        )
        for q, query in enumerate(split.queries)
    ]


def to_dataset(split: Split, catalog: Catalog, format_: Format) -> Dataset:
    """The columns that the trainer hands to the Scorer. Two parallel lists, not {row: grade}: a dict column
    becomes one Arrow struct over all keys."""
    from datasets import Dataset

    columns: dict[str, Any] = {
        "prompt": prompts(split, catalog, format_),
        "query_id": list(split.ids),
        "query": list(split.queries),
        "target_rows": [list(r) for r in split.rows],
        "target_grades": [list(g) for g in split.grades],
    }
    for name, lists in (("histories", split.histories), ("candidates", split.candidates)):
        if lists:
            columns[name] = [list(rows) for rows in lists]
    return Dataset.from_dict(columns)
