"""The rules that every task follows, whichever loader made it: for leaks, ids, empty texts and grades.

Where two splits have a query of the same text, only the held-out one keeps it: the test split before the validation
split before the training split. The log says how many queries or judgments are left out, with the first one. Data that
no rule can repair raise `UserError`.
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
from rec_r1.console import number_of
from rec_r1.tasks.types import Split, Task, grade_of, log_without_relevant, look_alike
from retrievers import Catalog

logger = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")
_SHOWN_CHARACTERS = 60  # The length to which messages cut texts.
_VARIATION_SELECTORS = re.compile("[\ufe00-\ufe0f]")


def normal(text: str) -> str:
    """The normal form of a text. Two spellings of the same query have the same normal form.

    Texts that differ only in compatibility forms (NFKC), case, white space, or characters that are not visible (a byte
    order mark, zero-width characters, variation selectors) have the same normal form. The function is idempotent.
    """
    if not text.isascii():
        text = _VARIATION_SELECTORS.sub("", "".join(c for c in text if unicodedata.category(c) != "Cf"))
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        # The compatibility forms of a few characters are capital letters.
        text = unicodedata.normalize("NFKC", text.casefold())
    return " ".join(text.casefold().split())


def leaking(texts: Mapping[str, Mapping[str, str]]) -> dict[str, set[str]]:
    """Find the queries that leak held-out texts: a later split has a query of the same text. Log how many there are.

    texts: split -> query id -> text.

    Returns for each split the ids of its leaking queries. Raises UserError where all queries of a split leak.
    """
    holder: dict[str, str] = {}  # Normal form -> the query of the latest split that has it, in words.
    found: dict[str, set[str]] = {}
    for split in sorted(texts, key=SPLITS.index, reverse=True):
        own = {query: normal(text) for query, text in texts[split].items()}
        leaks = {query: holder[text] for query, text in own.items() if text in holder}
        if leaks:
            query, other = next(iter(leaks.items()))
            example = f"{query!r} ({shown(texts[split][query])}), which is {other}"
            if len(leaks) == len(own):
                raise UserError(
                    f"{split}: all queries ({len(own)}) have the text of a held-out query, first {example}: give the "
                    "splits different queries"
                )
            logger.warning(
                "%s: %s, first %s", split, number_of(
                    len(leaks), "query has the text of a held-out query and is left out",
                    "queries have the text of a held-out query and are left out",
                ), example,
            )  # fmt: skip
        if repeats := len(own) - len(set(own.values())):
            logger.info(
                "%s: queries that have the text of another query of this split and are kept: %d", split, repeats
            )
        found[split] = set(leaks)
        for query, text in own.items():
            holder.setdefault(text, f"{split} query {query!r} ({shown(texts[split][query])})")
    return found


def refuse_without_text(source: str, texts: Mapping[str, str], places: Mapping[str, str]) -> None:
    """Raise UserError where a judged query has no text, because nothing can be searched for it.

    source: the file or the split, for the message.
    texts: query id -> text, of the judged queries.
    places: query id -> file and line, for the message. An id that is not in it is reported with ``source``.
    """
    empty = [query for query, text in texts.items() if not normal(text)]
    if empty:
        where = places.get(empty[0], source)
        raise UserError(
            f"{where}: query {empty[0]!r} has no text ({len(empty)} of {len(texts)} judged queries have none): write "
            "one, or remove the query with its judgments"
        )


def refuse_overlap(source: str, names: Mapping[str, str], ids: Mapping[str, Iterable[str]]) -> None:
    """Raise UserError where a query is judged in two splits.

    source: the file or folder, for the message.
    names: split -> its name in ``source``, such as that of a file, for the message.
    ids: split -> the ids of its judged queries.
    """
    ids_of = {split: set(own) for split, own in ids.items()}
    for one, other in ((a, b) for a in ids_of for b in ids_of if SPLITS.index(a) < SPLITS.index(b)):
        common = sorted(ids_of[one] & ids_of[other])
        if common:
            raise UserError(
                f"{source}: {len(common)} queries are in both {names[one]} ({one}) and {names[other]} "
                f"({other}), first {common[0]!r}: a held-out query must not be trained on"
            )


def shown(text: str) -> str:
    """A text in the form that messages show: quoted, and cut where it is long."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…")


def check_documents(source: str, catalog: Catalog, block: int = 10_000) -> None:
    """Log how many documents have no text, and how many ids look alike.

    source: the file, for the log.
    catalog: the documents.
    block: how many documents are read at a time.
    """
    empty = [identifier for identifier, text in _documents(catalog, block) if not text.strip()]
    if empty:
        logger.warning(
            "%s: %d of %d documents have no text, so that a search by text cannot find them, first %r",
            source, len(empty), len(catalog), empty[0],
        )  # fmt: skip
    log_look_alikes(source, "documents", (identifier for identifier, _ in _documents(catalog, block)))


def log_look_alikes(source: str, what: str, ids: Iterable[str]) -> None:
    """Log ids that look alike, such as "1014" and "1014.0", because they probably mean the same thing.

    source: the file, for the log.
    what: "documents" or "users", for the log.
    ids: the distinct ids.
    """
    seen: dict[str, str] = {}
    alike: list[tuple[str, str]] = []
    for identifier in ids:
        other = seen.setdefault(look_alike(identifier), identifier)
        if other != identifier:
            alike.append((other, identifier))
    if alike:
        logger.warning(
            "%s: %s only in white space, unicode form or a .0, first %r and %r: they count as different %s",
            source, number_of(len(alike), "pair of ids differs", "pairs of ids differ"), *alike[0], what,
        )  # fmt: skip


def _documents(catalog: Catalog, block: int) -> Iterator[tuple[str, str]]:
    ids, texts = catalog.ids, catalog.texts
    for start in range(0, len(catalog), block):
        yield from zip(ids[start : start + block], texts[start : start + block], strict=True)


def sound(task: Task) -> Task:
    """``task`` without the queries and judgments that the rules leave out.

    Raises UserError, with the split and the query, in these cases: two columns differ in length; an id is blank or
    appears twice; a row of judgments, histories or candidates is not in the catalogue; a candidate appears twice; a
    grade is no finite number; a target is an item of its query's history, and the task does not allow ``repeats``.
    """
    splits = {name: _judged(task, name, split) for name, split in task.splits.items()}
    refuse_overlap(f"task {task.name}", {name: name for name in SPLITS}, {p: s.ids for p, s in splits.items()})
    # A query with a history is identified by the history, because two users may have the same last title.
    by_text = {name: split for name, split in splits.items() if not split.histories}
    texts = {name: dict(zip(s.ids, s.queries, strict=True)) for name, s in by_text.items()}
    for name, own in texts.items():
        refuse_without_text(f"task {task.name}: {name}", own, {})
    for name, leaks in leaking(texts).items():
        if leaks:
            splits[name] = splits[name].take([i for i, q in enumerate(splits[name].ids) if q not in leaks])
    made: dict[str, Any] = dict(splits)
    return dataclasses.replace(task, **made)


def _judged(task: Task, name: str, split: Split) -> Split:
    """``split`` with distinct targets of grades above 0, and without queries that have none. name: the split's name.

    Raises UserError as :func:`sound` does.
    """
    where, n = f"task {task.name}: {name}", len(task.catalog)
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
                raise UserError(f"{place}: candidates: a row appears twice: name each candidate once")
        if len(split.rows[q]) != len(split.grades[q]):
            counts = f"{len(split.rows[q])} rows and {len(split.grades[q])} grades"
            raise UserError(f"{place}: {counts}: give one grade for each row")
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
        logger.warning(
            "%s: %s; the best grade counts",
            where,
            number_of(
                repeated, "judgment repeats a document of its query", "judgments repeat a document of their query"
            ),
        )
    if irrelevant:
        logger.warning(
            "%s: %s as irrelevant",
            where,
            number_of(irrelevant, "judgment of grade 0 or less counts", "judgments of grade 0 or less count"),
        )
    if not kept:
        raise UserError(f"{where}: no query with a relevant document is left: check the judgments' grades")
    if len(kept) < len(split):
        log_without_relevant(where, len(split) - len(kept))
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
            raise UserError(f"{where}: {len(split.ids)} ids and {len(column)} {name}: give one for each id")
    text_of: dict[str, str] = {}
    for identifier, query in zip(split.ids, split.queries, strict=True):
        if not isinstance(identifier, str) or not identifier.strip():
            raise UserError(f"{where}: {identifier!r} is no query id: give a str that is not blank")
        if not isinstance(query, str):
            raise UserError(f"{where} query {identifier!r}: {query!r} is no text: give the query as a str")
        if identifier in text_of:
            texts = f"{shown(text_of[identifier])} and {shown(query)}"
            raise UserError(f"{where}: query id {identifier!r} appears twice ({texts}): give each query its own id")
        text_of[identifier] = query


def _check_rows(place: str, name: str, rows: Sequence[Any], n: int) -> None:
    for row in rows:
        if not isinstance(row, Integral) or isinstance(row, bool) or not 0 <= int(row) < n:
            raise UserError(f"{place}: {name}: {row!r} is no row of the catalogue: give whole numbers below {n}")


def _check_histories(task: Task, where: str, split: Split, n: int) -> None:
    if not split.histories:
        return
    in_history = []
    for identifier, rows, history in zip(split.ids, split.rows, split.histories, strict=True):
        _check_rows(f"{where} query {identifier!r}", "history", history, n)
        if not task.repeats and set(rows) & set(history):
            in_history.append(identifier)
    if in_history:
        raise UserError(
            f"{where}: {len(in_history)} of {len(split)} queries have a target that is in their history, first "
            f"{in_history[0]!r}, and rankings leave the history out: remove these targets, or make the task with "
            "Task(…, repeats=True)"
        )
