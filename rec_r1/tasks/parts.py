"""Judged queries dealt to train, validation and test so that no text stands in two: what several loaders share."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from rec_r1.config import UserError
from rec_r1.tasks.types import Task, make_split
from retrievers import Catalog

logger = logging.getLogger(__name__)
PARTS = ("train", "validation", "test")
T = TypeVar("T")


@dataclass(frozen=True)
class Drawing:
    """limits: train, validation, test -> at most so many queries, drawn."""

    limits: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        check_limits(self.limits)


@dataclass(frozen=True)
class Carving(Drawing):
    """validation_share: of the training queries, by a hash of their text."""

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
    """Queries as they are read: id -> text, and id -> document id -> grade."""

    texts: dict[str, str] = field(default_factory=dict)
    judgments: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, query: str, text: str, where: str) -> None:
        """Raises UserError where the query is known with another text."""
        if self.texts.setdefault(query, text) != text:
            raise UserError(
                f"{where}: query {query!r} is {text!r} here and {self.texts[query]!r} before: give each its own id"
            )

    def judge(self, query: str, document: str, grade: float) -> None:
        """Of a pair judged twice the best grade counts."""
        documents = self.judgments.setdefault(query, {})
        documents[document] = max(grade, documents.get(document, grade))

    def in_order(self) -> Pool:
        """By id, numbers by their value: what is drawn does not hang on the file's order."""
        return Pool(self.texts, dict(sorted(self.judgments.items(), key=lambda item: (len(item[0]), item[0]))))

    def only(self, chosen: Container[str]) -> Pool:
        """The queries whose id is chosen."""
        return Pool(self.texts, {query: documents for query, documents in self.judgments.items() if query in chosen})


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


def normal(text: str) -> str:
    """What two spellings of one query have in common: letters without case, white space single."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def keep_apart(pools: Mapping[str, Pool]) -> dict[str, Pool]:
    """The pools without the queries whose text a later part has too: what is held out must not be trained on."""
    seen: set[str] = set()
    kept: dict[str, Pool] = {}
    for part in sorted(pools, key=PARTS.index, reverse=True):
        pool = pools[part]
        # A judged query without a text is make_split's to refuse.
        texts = {query: normal(pool.texts[query]) for query in pool.judgments if query in pool.texts}
        leaks = {query for query, text in texts.items() if text in seen}
        if leaks:
            logger.warning("%s: %d queries have the text of a held-out query and are left out", part, len(leaks))
        kept[part] = pool.only(pool.judgments.keys() - leaks)
        seen |= set(texts.values())
    return {part: kept[part] for part in pools}


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
    """Raises UserError for an empty catalogue or an id that stands twice."""
    try:
        return Catalog.from_records(records)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def make_task(
    name: str,
    catalog: Catalog,
    pools: Mapping[str, Pool],
    params: Drawing,
    sources: Mapping[str, str],
    slices: Mapping[str, Callable[[str], str]] | None = None,
) -> Task:
    """The pools as a task. sources: part -> file, for messages. slices: name -> what labels a query's id.

    Limits come last, so that queries without a relevant document take nobody's place.
    """
    splits: dict[str, Any] = {}
    for part in PARTS:
        split = make_split(sources[part], catalog, pools[part].texts, pools[part].judgments)
        labels = {label: [of(query) for query in split.ids] for label, of in (slices or {}).items()}
        split = dataclasses.replace(split, slices=labels)
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
