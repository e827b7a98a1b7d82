"""Judged queries, and their division into splits that have no query text in common. Several loaders use it."""

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
from rec_r1.console import number_of
from rec_r1.tasks.integrity import SPLITS, check_documents, leaking, normal, refuse_without_text, shown
from rec_r1.tasks.types import Split, Task, judged, make_split
from retrievers import Catalog

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Drawing:
    """What the tasks with judged queries have in common."""

    # At most so many queries of a split are drawn: {train: 1000, validation: 200, test: 200}.
    limits: dict[str, int] = field(default_factory=dict)
    seed: int = 0  # The seed of what is drawn.
    # The share of the training queries, chosen by a hash of their text, that retrievers are fitted on. Prompts are made
    # of the others, so that the retriever has not seen what a prompt asks for. 0: it is fitted on all of them, which is
    # for evaluations and not for rewards.
    fit_share: float = 0.0

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        check_limits(self.limits)
        check_fit_share(self.fit_share)
        check_seed(self.seed)


@dataclass(frozen=True)
class Carving(Drawing):
    """Tasks whose validation queries are taken from the training queries."""

    # The share of the training queries that become validation queries, chosen by a hash of their text.
    validation_share: float = 0.1

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        super().check()
        if not 0 < self.validation_share < 1:
            raise UserError(
                f"task.params.validation_share: {self.validation_share}: must be above 0 and below 1, 0.1 is usual"
            )


@dataclass(frozen=True)
class Dividing(Carving):
    """Tasks whose test queries are taken from all queries where no file says which they are."""

    # The share of the queries that become test queries where no file says which, chosen by a hash of their text.
    test_share: float = 0.2

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        super().check()
        if not 0 < self.test_share < 1:
            raise UserError(f"task.params.test_share: {self.test_share}: must be above 0 and below 1, 0.2 is usual")


@dataclass
class Pool:
    """The queries and judgments of one split, while its files are read."""

    texts: dict[str, str] = field(default_factory=dict)  # Query id -> text.
    places: dict[str, str] = field(default_factory=dict)  # Query id -> file and line of its text.
    judgments: dict[str, dict[str, float]] = field(default_factory=dict)  # Query id -> document id -> grade.
    # A remark about the judgments -> the number of judgments that it is true of, and the first of them.
    notes: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)

    def add(self, query: str, text: str, where: str) -> None:
        """Add a query. A repeated query is added once. Raises UserError where it has another text than before.

        query: its id.
        text: its text.
        where: file and line.
        """
        if query in self.texts:
            self.refuse_other_text(query, text, where)
        else:
            self.texts[query], self.places[query] = text, where

    def refuse_other_text(self, query: str, text: str, where: str) -> None:
        """Raise UserError, with both places, where the query has a text with another normal form than ``text``."""
        known = self.texts[query]
        if known != text and normal(known) != normal(text):
            raise UserError(
                f"{where}: query {query!r} is {shown(text)} here and {shown(known)} before ({self.places[query]}): "
                "give each query its own id"
            )

    def judge(self, query: str, document: str, grade: float, where: str) -> None:
        """Add a judgment. Where a query and a document are judged several times, the best grade counts.

        query, document: their ids.
        grade: how relevant the document is. 0 or less = irrelevant.
        where: file and line.
        """
        documents = self.judgments.setdefault(query, {})
        if document in documents:
            known = documents[document]
            if known == grade:
                one, many = "judgment is repeated", "judgments are repeated"
            else:
                rest = "two grades, of which the best counts"
                one, many = f"judgment has {rest}", f"judgments have {rest}"
            self._note(one, many, f"query {query!r}, document {document!r}: {known:g} and {grade:g} at {where}")
        if grade < 0:
            one, many = "grade below 0 counts as irrelevant", "grades below 0 count as irrelevant"
            self._note(one, many, f"query {query!r}, document {document!r} at {where}")
        documents[document] = max(grade, documents.get(document, grade))

    def _note(self, one: str, many: str, example: str) -> None:
        count, first = self.notes.get((one, many), (0, example))
        self.notes[one, many] = count + 1, first

    def log_notes(self, source: str) -> Pool:
        """Log how many judgments are repeated or negative, with the first of each kind. Returns the pool itself.

        source: the file, for the log.
        """
        for (one, many), (count, first) in self.notes.items():
            logger.warning("%s: %s, first %s", source, number_of(count, one, many), first)
        return self

    def judged_texts(self) -> dict[str, str]:
        """The id and the text of each judged query that has a text. `make_split` refuses the others."""
        return {query: self.texts[query] for query in self.judgments if query in self.texts}

    def in_order(self) -> Pool:
        """The pool with its judgments sorted by query id, numbers by their value.

        Random choices then do not depend on the order of the file.
        """
        judgments = dict(sorted(self.judgments.items(), key=lambda item: (len(item[0]), item[0])))
        return replace(self, judgments=judgments)

    def only(self, chosen: Container[str]) -> Pool:
        """The pool with the judgments of the chosen query ids only."""
        return replace(self, judgments={q: documents for q, documents in self.judgments.items() if q in chosen})


def check_limits(limits: Mapping[str, int]) -> None:
    """Raise UserError for a split that does not exist, and for a limit that is no whole number from 1."""
    for split, limit in limits.items():
        if split not in SPLITS or type(limit) is not int or limit < 1:
            raise UserError(f"task.params.limits: {split}: {limit!r}: give train, validation or test a number from 1")


def check_fit_share(fit_share: float) -> None:
    """Raise UserError for a share that is not at least 0 and below 1."""
    if not 0 <= fit_share < 1:
        raise UserError(f"task.params.fit_share: {fit_share}: must be at least 0 and below 1, 0.5 is usual")


def check_seed(seed: int) -> None:
    """Raise UserError for a seed below 0, which numpy does not take."""
    if seed < 0:
        raise UserError(f"task.params.seed: {seed}: must be at least 0")


def set_apart(train: Split, fit_share: float, seed: int, key: Callable[[str], str] = normal) -> tuple[Split, Split]:
    """Divide the training queries as `fit_share` says, by a hash of each query's text.

    train: the training queries.
    fit_share: the share of them that retrievers are fitted on.
    seed: the seed of the hash.
    key: a function from a query to the text that is hashed. Queries with the same one stay together. Default: the
        normal form of the query.

    Returns the queries that prompts are made of, and those that retrievers are fitted on. Raises UserError where one
    of the two is empty.
    """
    # Another hash than those of `carve` and `divide`, which would else choose among the same queries again.
    fit = [share(f"fit:{key(query)}", seed) < fit_share for query in train.queries]
    if all(fit) or not any(fit):
        raise UserError(
            f"task.params.fit_share: {fit_share} of the {len(train)} training queries leaves "
            f"{'no prompts' if all(fit) else 'nothing to fit a retriever on'}: change it, or judge more queries"
        )
    numbers = range(len(train))
    return train.take([q for q in numbers if not fit[q]]), train.take([q for q in numbers if fit[q]])


def share(key: str, seed: int) -> float:
    """A hash of ``key`` as a number from 0 to below 1. It is the same on every machine, and in any order of keys."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def limited(found: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most ``limit`` elements of ``found``, drawn at random, in their order. None = all."""
    if limit is None or len(found) <= limit:
        return list(found)
    chosen = np.random.default_rng(seed).choice(len(found), limit, replace=False)
    return [found[i] for i in sorted(chosen.tolist())]


def drawn(ids: Iterable[str], n: int, seed: int) -> set[str]:
    """``n`` of the ids, chosen by their hash. A larger n chooses the same ids and more."""
    return set(heapq.nsmallest(n, ids, key=lambda identifier: (share(identifier, seed), identifier)))


def keep_apart(pools: Mapping[str, Pool]) -> dict[str, Pool]:
    """The pools without the queries whose text a later split has, too, because a held-out query must not be trained on.

    pools: split -> pool.

    Raises UserError where no query of a split is left, and where a judged query has two texts or none.
    """
    refuse_two_texts(pools)
    texts = {split: pool.judged_texts() for split, pool in pools.items()}
    for split, pool in pools.items():
        refuse_without_text(split, texts[split], pool.places)
    leaks = leaking(texts)
    return {split: pool.only(pool.judgments.keys() - leaks[split]) for split, pool in pools.items()}


def refuse_two_texts(pools: Mapping[str, Pool]) -> None:
    """Raise UserError where a query id has different texts in two splits."""
    known: dict[str, Pool] = {}
    for pool in pools.values():
        for query in pool.judged_texts():
            other = known.setdefault(query, pool)
            other.refuse_other_text(query, pool.texts[query], pool.places[query])


def carve(train: Pool, params: Carving) -> dict[str, Pool]:
    """Divide a pool into train and validation, by a hash of each query's text.

    train: the queries that are not for the test split.
    params: validation_share and seed.

    Raises UserError where one of the splits is empty.
    """
    held = {q for q in train.judgments if share(normal(train.texts[q]), params.seed) < params.validation_share}
    by_split = {"train": train.only(train.judgments.keys() - held), "validation": train.only(held)}
    for split, pool in by_split.items():
        if not pool.judgments:
            raise UserError(
                f"task.params.validation_share: {params.validation_share} of the {len(train.judgments)} queries that "
                f"are not in the test split leaves no {split} query: change it"
            )
    return by_split


def divide(pools: Mapping[str, Pool], params: Dividing) -> dict[str, Pool]:
    """All three splits. A test split and a validation split that are not there are taken out of train, in this order.

    pools: train, and the other splits that have judgments of their own.
    params: test_share, validation_share and seed.

    Raises UserError where one of the splits is empty.
    """
    divided = dict(pools)
    if "test" not in divided:
        train = divided["train"]
        # Another hash than that of `carve`, which would else choose among the smallest hashes again.
        held = {q for q in train.judgments if share(f"test:{normal(train.texts[q])}", params.seed) < params.test_share}
        divided |= {"train": train.only(train.judgments.keys() - held), "test": train.only(held)}
        for split in ("train", "test"):
            if not divided[split].judgments:
                raise UserError(
                    f"task.params.test_share: {params.test_share} of the {len(train.judgments)} judged queries leaves "
                    f"no {split} query: change it, or judge more queries"
                )
    return divided if "validation" in divided else divided | carve(divided["train"], params)


def make_catalog(source: str, records: Iterable[Mapping[str, str]]) -> Catalog:
    """Make a catalogue, and log the documents without a text.

    source: the file, for messages.
    records: one mapping with id, text and title for each document.

    Raises UserError for an empty catalogue, and for an id that appears twice.
    """
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
    """Make a task of judged queries. No query text is in two of its splits.

    name: the name of the task.
    catalog: the documents.
    pools: split -> its queries and judgments.
    params: limits, seed and fit_share. The limits are applied last, so that they count neither queries without a
        relevant document nor those that retrievers are fitted on.
    sources: split -> file, for messages.
    slices: name of a slice -> a function from a query's id to its label. None = no slices.

    Raises UserError as :func:`keep_apart` and :func:`rec_r1.tasks.types.make_split` do.
    """
    pools = keep_apart(pools)
    splits: dict[str, Any] = {}
    fit = None
    for split_name in SPLITS:
        split = make_split(sources[split_name], catalog, pools[split_name].texts, pools[split_name].judgments)
        labels = {label: [label_of(query) for query in split.ids] for label, label_of in (slices or {}).items()}
        split = replace(split, slices=labels)
        if split_name == "train" and params.fit_share:
            split, fit = set_apart(split, params.fit_share, params.seed)
        splits[split_name] = split.take(limited(range(len(split)), params.limits.get(split_name), params.seed))
    judgments = judged(catalog, fit, splits["validation"]) if fit is not None else None
    return Task(name, catalog, **splits, judgments=judgments, set_apart=fit is not None)


def log_counts(task: Task) -> Task:
    """Log the number of documents, and the queries, grades and labels of each split. Returns the task itself."""
    logger.info("%s: %d documents", task.name, len(task.catalog))
    for split_name, split in task.splits.items():
        grades = Counter(grade for grades in split.grades for grade in grades)
        counted = [f"{n} of grade {grade:g}" for grade, n in sorted(grades.items(), reverse=True)]
        logger.info("%s: %d queries, judgments: %s", split_name, len(split), ", ".join(counted))
        for name, labels in split.slices.items():
            logger.info("%s by %s: %s", split_name, name, dict(Counter(labels).most_common(12)))
    return task
