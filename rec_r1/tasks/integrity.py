"""What makes a task sound, whichever loader made it: one rule each for leaks, ids, empty texts and grades.

A query text that a later part has too (test before validation before training) is left out of the earlier part. What is
left out is logged with its number and the first example; what cannot be decided is refused with a `UserError`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

from rec_r1.config import UserError
from rec_r1.tasks.types import Split, Task, grade_of, look_alike
from retrievers import Catalog

logger = logging.getLogger(__name__)
PARTS = ("train", "validation", "test")
_SHOWN = 60  # characters of a text in a message
_VARIATION = re.compile("[\ufe00-\ufe0f]")


def normal(text: str) -> str:
    """What two spellings of one query have in common.

    Compatibility forms (NFKC), case and white space do not count, nor do characters without a shape of their own: a
    byte order mark, zero-width characters, variation selectors. Idempotent.
    """
    if not text.isascii():
        text = _VARIATION.sub("", "".join(c for c in text if unicodedata.category(c) != "Cf"))
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = unicodedata.normalize("NFKC", text.casefold())  # a few compatibility forms are capital letters
    return " ".join(text.casefold().split())


def leaking(texts: Mapping[str, Mapping[str, str]]) -> dict[str, set[str]]:
    """part -> the ids of its queries whose text a later part has too. texts: part -> id -> text.

    They are logged. Raises UserError where they are all queries of a part.
    """
    holder: dict[str, str] = {}  # normalised text -> the query that keeps it
    found: dict[str, set[str]] = {}
    for part in sorted(texts, key=PARTS.index, reverse=True):
        own = {query: normal(text) for query, text in texts[part].items()}
        leaks = {query: holder[text] for query, text in own.items() if text in holder}
        if leaks:
            query, other = next(iter(leaks.items()))
            example = f"{query!r} ({shown(texts[part][query])}), which is {other}"
            if len(leaks) == len(own):
                raise UserError(
                    f"{part}: all {len(own)} queries have the text of a held-out query, first {example}: give the "
                    "splits different queries"
                )
            logger.warning(
                "%s: %d queries have the text of a held-out query and are left out, first %s", part, len(leaks), example
            )
        if repeats := len(own) - len(set(own.values())):
            logger.info("%s: %d queries have the text of another query of this split; each counts", part, repeats)
        found[part] = set(leaks)
        for query, text in own.items():
            holder.setdefault(text, f"{part} query {query!r} ({shown(texts[part][query])})")
    return found


def refuse_without_text(source: str, texts: Mapping[str, str], places: Mapping[str, str]) -> None:
    """Raises UserError where a judged query has no text: nothing can be searched for it. places: id -> where it stands,
    for messages."""
    empty = [query for query, text in texts.items() if not normal(text)]
    if empty:
        where = places.get(empty[0], source)
        raise UserError(
            f"{where}: query {empty[0]!r} has no text ({len(empty)} such of {len(texts)} judged ones): write it, or "
            "drop the query with its judgments"
        )


def refuse_overlap(source: str, names: Mapping[str, str], ids: Mapping[str, Iterable[str]]) -> None:
    """Raises UserError where a query is judged in two parts; names: what each part is called in ``source``."""
    parts = {part: set(own) for part, own in ids.items()}
    for one, other in ((a, b) for a in parts for b in parts if PARTS.index(a) < PARTS.index(b)):
        common = sorted(parts[one] & parts[other])
        if common:
            raise UserError(
                f"{source}: {len(common)} queries are in both {names[one]} ({one}) and {names[other]} "
                f"({other}), first {common[0]!r}: a held-out query must not be trained on"
            )


def shown(text: str) -> str:
    """A text as messages show it: quoted, and cut."""
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")


def check_documents(source: str, catalog: Catalog, block: int = 10_000) -> None:
    """Log the documents that have no text, and ids that look alike."""
    empty = [identifier for identifier, text in _documents(catalog, block) if not text.strip()]
    if empty:
        logger.warning(
            "%s: %d of %d documents have no text, so that no search by text finds them, first %r",
            source, len(empty), len(catalog), empty[0],
        )  # fmt: skip
    log_look_alikes(source, "documents", (identifier for identifier, _ in _documents(catalog, block)))


def log_look_alikes(source: str, what: str, ids: Iterable[str]) -> None:
    """Log ids that differ in nothing that counts, such as "1014" and "1014.0". what: whose ids, for the message."""
    seen: dict[str, str] = {}
    alike: list[tuple[str, str]] = []
    for identifier in ids:
        other = seen.setdefault(look_alike(identifier), identifier)
        if other != identifier:
            alike.append((other, identifier))
    if alike:
        logger.warning(
            "%s: %d pairs of ids differ only in white space, unicode form or a .0, first %r and %r: they count as "
            "different %s",
            source, len(alike), *alike[0], what,
        )  # fmt: skip


def _documents(catalog: Catalog, block: int) -> Iterator[tuple[str, str]]:
    ids, texts = catalog.ids, catalog.texts
    for start in range(0, len(catalog), block):
        yield from zip(ids[start : start + block], texts[start : start + block], strict=True)


def sound(task: Task) -> Task:
    """``task`` without the queries and judgments that the rules above leave out.

    Raises UserError, naming part and query, where columns differ in length, an id is blank or stands twice, a row (of
    judgments, histories or candidates) is none of the catalogue, a candidate stands twice, a grade is no finite number,
    or a query asks for an item of its own history although the task does not say ``repeats``.
    """
    splits = {part: _judged(task, part, split) for part, split in task.splits.items()}
    refuse_overlap(f"task {task.name}", {part: part for part in PARTS}, {p: s.ids for p, s in splits.items()})
    # Where there are histories these are what a query asks by, and two users may have the same last title.
    by_text = {part: split for part, split in splits.items() if not split.histories}
    texts = {part: dict(zip(s.ids, s.queries, strict=True)) for part, s in by_text.items()}
    for part, own in texts.items():
        refuse_without_text(f"task {task.name}: {part}", own, {})
    for part, leaks in leaking(texts).items():
        if leaks:
            splits[part] = splits[part].take([i for i, q in enumerate(splits[part].ids) if q not in leaks])
    made: dict[str, Any] = dict(splits)
    return dataclasses.replace(task, **made)


def _judged(task: Task, part: str, split: Split) -> Split:
    """``split`` with distinct rows and grades above 0. Raises UserError as `sound`."""
    where, n = f"task {task.name}: {part}", len(task.catalog)
    _check_columns(where, split)
    kept: list[int] = []
    rows: list[tuple[int, ...]] = []
    grades: list[tuple[float, ...]] = []
    repeated = irrelevant = 0
    for q, identifier in enumerate(split.ids):
        place = f"{where} query {identifier!r}"
        _check_rows(place, "rows", split.rows[q], n)
        if split.candidates:
            _check_rows(place, "candidates", split.candidates[q], n)
            if len(set(split.candidates[q])) < len(split.candidates[q]):
                raise UserError(f"{place}: candidates: a row stands twice: name each candidate once")
        if len(split.rows[q]) != len(split.grades[q]):
            raise UserError(f"{place}: {len(split.rows[q])} rows and {len(split.grades[q])} grades: give one each")
        best: dict[int, float] = {}
        for row, given in zip(split.rows[q], split.grades[q], strict=True):
            grade = grade_of(given, f"{place}, row {row}")
            repeated += row in best
            best[row] = max(grade, best.get(row, grade))
        positive = {row: grade for row, grade in best.items() if grade > 0}
        irrelevant += len(best) - len(positive)
        if positive:
            kept.append(q)
            rows.append(tuple(positive))
            grades.append(tuple(positive.values()))
    if repeated:
        logger.warning("%s: %d documents stand twice among one query's; the best grade counts", where, repeated)
    if irrelevant:
        logger.warning("%s: %d judgments of grade 0 or less count as irrelevant", where, irrelevant)
    if not kept:
        raise UserError(f"{where}: no query with a relevant document is left: check the judgments' grades")
    if len(kept) < len(split):
        logger.warning("%s: %d queries have no relevant document and are left out", where, len(split) - len(kept))
    _check_histories(task, where, split, n)
    if not (repeated or irrelevant or len(kept) < len(split)):
        return split
    return dataclasses.replace(split.take(kept), rows=rows, grades=grades)


def _check_columns(where: str, split: Split) -> None:
    columns: dict[str, Sequence[Any]] = {"queries": split.queries, "rows": split.rows, "grades": split.grades}
    given = {"histories": split.histories, "candidates": split.candidates}
    columns |= {name: column for name, column in given.items() if column}
    columns |= {f"slices[{name!r}]": labels for name, labels in split.slices.items()}
    for name, column in columns.items():
        if len(column) != len(split.ids):
            raise UserError(f"{where}: {len(split.ids)} ids and {len(column)} {name}: give one each")
    text_of: dict[str, str] = {}
    for identifier, query in zip(split.ids, split.queries, strict=True):
        if not isinstance(identifier, str) or not identifier.strip():
            raise UserError(f"{where}: {identifier!r} is no query id: ids are texts that are not blank")
        if not isinstance(query, str):
            raise UserError(f"{where} query {identifier!r}: {query!r} is no text: give the query as a str")
        if identifier in text_of:
            texts = f"{shown(text_of[identifier])} and {shown(query)}"
            raise UserError(f"{where}: query id {identifier!r} stands twice ({texts}): give each its own id")
        text_of[identifier] = query


def _check_rows(place: str, name: str, rows: Sequence[Any], n: int) -> None:
    for row in rows:
        if not isinstance(row, Integral) or isinstance(row, bool) or not 0 <= int(row) < n:
            raise UserError(f"{place}: {name}: {row!r} is no row of the catalogue: give whole numbers below {n}")


def _check_histories(task: Task, where: str, split: Split, n: int) -> None:
    if not split.histories:
        return
    asked = []
    for identifier, rows, history in zip(split.ids, split.rows, split.histories, strict=True):
        _check_rows(f"{where} query {identifier!r}", "history", history, n)
        if not task.repeats and set(rows) & set(history):
            asked.append(identifier)
    if asked:
        raise UserError(
            f"{where}: {len(asked)} of {len(split)} queries ask for an item of their own history, first {asked[0]!r}, "
            "which rankings leave out: drop these targets, or make the task with Task(…, repeats=True)"
        )
