"""Judged queries dealt to train, validation and test so that no text stands in two: what several loaders share."""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from rec_r1.config import UserError
from rec_r1.tasks.integrity import PARTS, check_documents, leaking, normal, refuse_without_text, shown
from rec_r1.tasks.types import Task, make_split
from retrievers import Catalog

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Drawing:
    """What the tasks with judged queries have in common."""

    # At most so many queries of a split are drawn: {train: 1000, validation: 200, test: 200}.
    limits: dict[str, int] = field(default_factory=dict)
    seed: int = 0  # The seed of what is drawn.

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        check_limits(self.limits)


@dataclass(frozen=True)
class Carving(Drawing):
    """Tasks whose validation queries are taken from the training queries."""

    # The share of the training queries that become validation queries, chosen by a hash of their text.
    validation_share: float = 0.1

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        super().check()
        if not 0 < self.validation_share < 1:
            raise UserError(
                f"task.params.validation_share: {self.validation_share}: must be above 0 and below 1, 0.1 is usual"
            )


@dataclass
class Pool:
    """Queries as they are read: id -> text, id -> where the text stands, and id -> document id -> grade. notes: what is
    said of the judgments -> how often it holds, and the first example; see `log_notes`."""

    texts: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    judgments: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, query: str, text: str, where: str) -> None:
        """Raises UserError where the query is known with another text; a repeated one counts once."""
        if query in self.texts:
            self.refuse_other_text(query, text, where)
        else:
            self.texts[query], self.places[query] = text, where

    def refuse_other_text(self, query: str, text: str, where: str) -> None:
        """Raises UserError, with both places, where the query is known with a text that `normal` tells from this."""
        known = self.texts[query]
        if known != text and normal(known) != normal(text):
            raise UserError(
                f"{where}: query {query!r} is {shown(text)} here and {shown(known)} before ({self.places[query]}): "
                "give each its own id"
            )

    def judge(self, query: str, document: str, grade: float, where: str) -> None:
        """Of a pair judged twice the best grade counts."""
        documents = self.judgments.setdefault(query, {})
        if document in documents:
            known = documents[document]
            what = "judgments stand twice" if known == grade else "judgments have two grades, of which the best counts"
            self._note(what, f"query {query!r}, document {document!r}: {known:g} and {grade:g} at {where}")
        if grade < 0:
            self._note("grades below 0 count as irrelevant", f"query {query!r}, document {document!r} at {where}")
        documents[document] = max(grade, documents.get(document, grade))

    def _note(self, what: str, example: str) -> None:
        count, first = self.notes.get(what, (0, example))
        self.notes[what] = count + 1, first

    def log_notes(self, source: str) -> Pool:
        """Itself, with judgments that stand twice or are negative in the log: their number and the first."""
        for what, (count, first) in self.notes.items():
            logger.warning("%s: %d %s, first %s", source, count, what, first)
        return self

    def judged_texts(self) -> dict[str, str]:
        """id -> text of the judged queries that have one; `make_split` refuses the others."""
        return {query: self.texts[query] for query in self.judgments if query in self.texts}

    def in_order(self) -> Pool:
        """By id, numbers by their value: what is drawn does not depend on the file's order."""
        judgments = dict(sorted(self.judgments.items(), key=lambda item: (len(item[0]), item[0])))
        return replace(self, judgments=judgments)

    def only(self, chosen: Container[str]) -> Pool:
        """The queries whose id is chosen."""
        return replace(self, judgments={q: documents for q, documents in self.judgments.items() if q in chosen})


def check_limits(limits: Mapping[str, int]) -> None:
    """Raises UserError for a part that does not exist or a limit that is no number from 1."""
    for part, limit in limits.items():
        if part not in PARTS or type(limit) is not int or limit < 1:
            raise UserError(f"task.params.limits: {part}: {limit!r}: give train, validation or test a number from 1")


def share(key: str, seed: int) -> float:
    """A number from 0 to below 1 by a hash: the same on every machine, and whatever else is drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def limited(found: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most ``limit`` of them, drawn, in their order."""
    if limit is None or len(found) <= limit:
        return list(found)
    chosen = np.random.default_rng(seed).choice(len(found), limit, replace=False)
    return [found[i] for i in sorted(chosen.tolist())]


def drawn(ids: Iterable[str], n: int, seed: int) -> set[str]:
    """``n`` of the ids by their hash: a larger n draws the same ones and more."""
    return set(heapq.nsmallest(n, ids, key=lambda identifier: (share(identifier, seed), identifier)))


def keep_apart(pools: Mapping[str, Pool]) -> dict[str, Pool]:
    """The pools without the queries whose text a later part has too: what is held out must not be trained on. Raises
    UserError where nothing is left of one, and where a judged query has two texts or none."""
    refuse_two_texts(pools)
    texts = {part: pool.judged_texts() for part, pool in pools.items()}
    for part, pool in pools.items():
        refuse_without_text(part, texts[part], pool.places)
    leaks = leaking(texts)
    return {part: pool.only(pool.judgments.keys() - leaks[part]) for part, pool in pools.items()}


def refuse_two_texts(pools: Mapping[str, Pool]) -> None:
    """Raises UserError where two parts know a query by different texts."""
    known: dict[str, Pool] = {}
    for pool in pools.values():
        for query in pool.judged_texts():
            other = known.setdefault(query, pool)
            other.refuse_other_text(query, pool.texts[query], pool.places[query])


def carve(train: Pool, params: Carving) -> dict[str, Pool]:
    """train and validation of one pool, by a hash of the query's text. Raises UserError where one of them is empty."""
    held = {q for q in train.judgments if share(normal(train.texts[q]), params.seed) < params.validation_share}
    parts = {"train": train.only(train.judgments.keys() - held), "validation": train.only(held)}
    for part, pool in parts.items():
        if not pool.judgments:
            raise UserError(
                f"task.params.validation_share: {params.validation_share} of {len(train.judgments)} queries that are "
                f"not for the test leaves no {part} query: change it"
            )
    return parts


def make_catalog(source: str, records: Iterable[Mapping[str, str]]) -> Catalog:
    """Logs documents without a text. Raises UserError for an empty catalogue or an id that stands twice."""
    try:
        catalog = Catalog.from_records(records)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    check_documents(source, catalog)
    return catalog


def make_task(
    name: str,
    catalog: Catalog,
    pools: Mapping[str, Pool],
    params: Drawing,
    sources: Mapping[str, str],
    slices: Mapping[str, Callable[[str], str]] | None = None,
) -> Task:
    """The pools as a task, kept apart. sources: part -> file, for messages. slices: name -> what labels a query's id.

    Limits come last, so that queries without a relevant document take nobody's place.
    """
    pools = keep_apart(pools)
    splits: dict[str, Any] = {}
    for part in PARTS:
        split = make_split(sources[part], catalog, pools[part].texts, pools[part].judgments)
        labels = {label: [of(query) for query in split.ids] for label, of in (slices or {}).items()}
        split = replace(split, slices=labels)
        splits[part] = split.take(limited(range(len(split)), params.limits.get(part), params.seed))
    return Task(name, catalog, **splits)


def log_counts(task: Task) -> Task:
    """``task``, with its documents, queries a part, judgments a grade and labels in the log."""
    logger.info("%s: %d documents", task.name, len(task.catalog))
    for part, split in task.splits.items():
        grades = Counter(grade for grades in split.grades for grade in grades)
        counted = [f"{n} of grade {grade:g}" for grade, n in sorted(grades.items(), reverse=True)]
        logger.info("%s: %d queries, judgments: %s", part, len(split), ", ".join(counted))
        for name, labels in split.slices.items():
            logger.info("%s by %s: %s", part, name, dict(Counter(labels).most_common(12)))
    return task
