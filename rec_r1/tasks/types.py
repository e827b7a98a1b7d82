"""The type of a task: a catalogue, and queries with graded judgments in three splits that have no query in common."""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rec_r1.config import UserError
from rec_r1.console import number_of, progress
from retrievers import Catalog, Interactions, Judgments, Query, Retriever, certain_ranks
from retrievers.text import analysis
from rewards import RankingReward
from rewards.types import Outcome

if TYPE_CHECKING:
    from datasets import Dataset

    from rec_r1.prompts import Format, Prompt

logger = logging.getLogger(__name__)
AT_A_TIME = 1024  # Queries that are sent to the retriever in one call. Between two calls the progress is shown.


@dataclass(frozen=True)
class Split:
    """Q queries with their judgments.

    ids: Q distinct strings.
    queries: Q raw queries.
    rows: Q tuples of distinct catalogue rows, the targets.
    grades: Q tuples of the targets' grades, which are above 0.
    histories: Q tuples of catalogue rows, oldest first. () = the task has no histories.
    candidates: Q tuples of catalogue rows, in the order in which a prompt shows them. () = there are none.
    slices: name of a slice -> Q labels, such as "target" -> "cold". Evaluations report every label apart.
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
        """The Q raw queries, each with its history, for the retriever."""
        histories = self.histories or [()] * len(self)
        return [Query(text, tuple(history)) for text, history in zip(self.queries, histories, strict=True)]

    def take(self, indexes: Sequence[int]) -> Split:
        """The queries at ``indexes``, in that order."""
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
    """A catalogue of n documents, and queries for training, validation and test.

    name: the name of the task, for messages and reports.
    catalog: the documents or items.
    train, validation, test: the splits.
    counts: (n,) int64: how often each item is chosen in training. None = by the training judgments.
    interactions: the interactions that retrievers are fitted on, with the validation queries that choose their
        settings. None = the task has no histories.
    judgments: the judged queries that text retrievers are fitted on, with the same validation queries. None = `load`
        makes them of all training queries, unless the task has interactions.
    set_apart: whether ``interactions`` has no target of a training query, and nothing that its user chose later, or
        ``judgments`` has no training query.
    repeats: whether a target may be an item of its query's history. False = such targets are refused, and rankings and
        lists leave out the history, unless `retriever.exclude_history` says otherwise.
    folder: the folder in which the task is prepared, see task_cache.py. None = it is not prepared.
    """

    name: str
    catalog: Catalog
    train: Split
    validation: Split
    test: Split
    counts: np.ndarray | None = None
    interactions: Interactions | None = None
    judgments: Judgments | None = None
    set_apart: bool = False
    repeats: bool = False
    folder: Path | None = None

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def excludes_history(self) -> bool:
        """Whether rankings leave out the items of a query's history: it has one, and ``repeats`` is False."""
        return not self.repeats and any(split.histories for split in self.splits.values())


def grade_of(given: object, place: str) -> float:
    """A grade as a float. Raises UserError, which begins with ``place``, for anything but a finite number, and for one
    that is infinite or 0 as float32, in which rewards and metrics compute."""
    if not isinstance(given, Real) or isinstance(given, bool) or not math.isfinite(given):
        raise UserError(f"{place}: grade {given!r}: a grade is a finite number, such as 1: correct the judgment")
    grade, limits = float(given), np.finfo(np.float32)
    smallest, largest = float(limits.tiny), float(limits.max)
    if grade > largest or 0 < grade < smallest:
        raise UserError(
            f"{place}: grade {given!r}: a grade above 0 is from {smallest:.1e} to {largest:.1e}: correct the judgment, "
            "or rescale all grades"
        )
    return grade


def look_alike(identifier: str) -> str:
    """The normal form of an id. Ids that differ only in white space, unicode form, or a final ".0" have the same."""
    key = " ".join(unicodedata.normalize("NFKC", identifier).split())
    return re.sub(r"^(\d+)\.0+$", r"\1", key)


def unknown(missing: Sequence[str], there: Iterable[str]) -> str:
    """The first three missing ids, for a message, with the id that looks like the first of them.

    missing: the ids that were not found.
    there: the ids among which they were searched.
    """
    wanted = look_alike(missing[0])
    alike = next((other for other in there if look_alike(other) == wanted), None)
    hint = "" if alike is None else f" ({missing[0]!r} is there as {alike!r}: write the ids alike)"
    return ", ".join(map(repr, missing[:3])) + hint


def refuse_unknown_queries(source: str, queries: Mapping[str, str], judged: Iterable[str]) -> None:
    """Raise UserError for judged queries without a text.

    source: the file with the judgments, for the message.
    queries: query id -> text.
    judged: the ids of the judged queries.
    """
    missing = [query for query in judged if query not in queries]
    if missing:
        raise UserError(
            f"{source}: {number_of(len(missing), 'judged query is', 'judged queries are')} not in the query file, "
            f"first: {unknown(missing, queries)}: add them or remove their judgments"
        )


def make_split(
    source: str, catalog: Catalog, queries: Mapping[str, str], judgments: Mapping[str, Mapping[str, float]]
) -> Split:
    """Make a split of judgments by id.

    Documents of grade 0 or less are irrelevant, and are left out. A query without a relevant document is left out, too,
    and the log says how many there are.

    source: the file, for messages.
    catalog: the documents.
    queries: query id -> text.
    judgments: query id -> document id -> grade.

    Raises UserError for queries without a text, for documents that are not in the catalogue, for a grade that is no
    finite number, and where no query is left.
    """
    refuse_unknown_queries(source, queries, judgments)
    # Irrelevant documents are checked, too: if the catalogue lacks a judged id, it is probably the wrong catalogue.
    judged = list(dict.fromkeys(doc for docs in judgments.values() for doc in docs))
    lacking = [doc for doc in judged if doc not in catalog]
    if lacking:
        raise UserError(
            f"{source}: {len(lacking)} of {len(judged)} ids are not in the catalogue, first: "
            f"{unknown(lacking, catalog.ids)}: use the corpus that was judged, or add these documents to it"
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
        log_without_relevant(source, len(judgments) - len(kept))
    if not kept:
        raise UserError(f"{source}: no query with a relevant document is left: check the judgments' grades")
    ids, texts, row_lists, grade_lists = (list(column) for column in zip(*kept, strict=True))
    return Split(ids, texts, row_lists, grade_lists)


def log_without_relevant(source: str, n: int) -> None:
    """Log that ``n`` queries of ``source`` have no relevant document."""
    one = "query has no relevant document and is left out"
    logger.warning("%s: %s", source, number_of(n, one, "queries have no relevant document and are left out"))


def pad(rows: Sequence[Sequence[int]], grades: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Pad the judgments of B queries to arrays.

    A row that is repeated among the targets of a query counts once, with its best grade. If it counted twice in the
    ideal DCG, a perfect ranking would score below 1.

    rows: B lists of the targets' rows.
    grades: B lists of their grades.

    Returns (B, T) int32 rows, padded with -1, and (B, T) float32 grades, padded with 0.
    """
    best = [dict(sorted(zip(r, g, strict=True), key=lambda pair: pair[1])) for r, g in zip(rows, grades, strict=True)]
    width = max((len(targets) for targets in best), default=0)
    out_rows = np.full((len(best), width), -1, np.int32)
    out_grades = np.zeros((len(best), width), np.float32)
    for b, targets in enumerate(best):
        out_rows[b, : len(targets)] = list(targets)
        out_grades[b, : len(targets)] = list(targets.values())
    return out_rows, out_grades


def judged(catalog: Catalog, fit: Split, validation: Split) -> Judgments:
    """What text retrievers are fitted on in a task without histories.

    catalog: the documents.
    fit: the queries to fit on.
    validation: the queries by which settings are chosen.
    """
    return Judgments(len(catalog), fit.queries, fit.rows, validation.queries, validation.rows)


def popularity(task: Task) -> np.ndarray:
    """How often each of the n documents was chosen in training, as an (n,) array.

    These are the task's own counts, or where it has none, how often the document is a target of a training query.
    """
    if task.counts is not None:
        return task.counts
    rows = [row for targets in task.train.rows for row in targets]
    return np.bincount(np.array(rows, np.int64), minlength=len(task.catalog))


def raw_scores(split: Split, retriever: Retriever, metric: RankingReward) -> np.ndarray:
    """(Q,) float32 scores of the raw queries of a split in one metric. Raises what the retriever raises."""
    targets, grades = pad(split.rows, split.grades)
    queries = split.raw()
    ranks = ranks_in_parts(partial(certain_ranks, retriever), queries, targets)
    return metric(Outcome(split.queries, queries, ranks, grades))


def ranks_in_parts(
    ranks: Callable[[Sequence[Query], np.ndarray], np.ndarray], queries: Sequence[Query], targets: np.ndarray
) -> np.ndarray:
    """(B, T) int32 ranks of the targets of B queries. Many queries are ranked in several calls, with a progress bar.

    ranks: a retriever's method `ranks`, or a function like it.
    queries: B queries.
    targets: (B, T) int32 rows.
    """
    starts: Iterable[int] = range(0, len(queries), AT_A_TIME)
    if len(queries) > AT_A_TIME:
        starts = progress(starts, "ranking", f"x {AT_A_TIME} queries")
    parts = [ranks(queries[i : i + AT_A_TIME], targets[i : i + AT_A_TIME]) for i in starts]
    return np.concatenate(parts) if parts else np.zeros(targets.shape, np.int32)


def prompts(split: Split, catalog: Catalog, format_: Format) -> list[Prompt]:
    """The prompts for the queries of a split, with the titles of its histories and candidates."""
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
    """A split as a dataset with the prompts, and the columns that the trainer passes to the Scorer.

    Rows and grades are two columns of lists, because Arrow would store {row: grade} as one struct of all keys.
    """
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


def first_words(text: str, n: int = 12) -> str:
    """The first ``n`` words of a text, as the title of a document that has none."""
    return analysis.first_words(text, n)
