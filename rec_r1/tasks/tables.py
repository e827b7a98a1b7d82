"""Read a user's tables: columns by their configured names, with all problems collected for one message."""

from __future__ import annotations

import datetime
import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rec_r1.config import UserError, refuse
from rec_r1.console import number_of
from rec_r1.tasks.events import COMPACT, NUMBERS, UNITS, kind_of
from rec_r1.tasks.raw_files import Record, moment, read, watched

_SHOWN = 3  # examples of one kind of problem
_PEEKED = 100  # records of a JSON file that are searched for the columns first
_JSON = ("json", "jsonl", "ndjson")  # kinds of files in which a record may lack what others have
_WRAPPED = "_source"  # where a dump of OpenSearch keeps the fields of a document
_BULK = ({"index"}, {"create"})  # lines of a bulk file that name the index of the next document


@dataclass
class Problems:
    """Mistakes in a user's files, collected so that one message names all of them."""

    whole: list[str] = field(default_factory=list)
    _counts: dict[tuple[str, str, str, str], int] = field(default_factory=dict)
    _examples: dict[tuple[str, str, str, str], list[str]] = field(default_factory=dict)

    def say(self, message: str) -> None:
        """Add a problem that occurs once, as a whole sentence."""
        self.whole.append(message)

    def add(self, source: str, one: str, many: str, example: str, fix: str) -> None:
        """Count a problem of one line. The first examples are shown.

        one, many: the problem, as it follows the number 1 and any other number.
        """
        key = source, one, many, fix
        self._counts[key] = self._counts.get(key, 0) + 1
        examples = self._examples.setdefault(key, [])
        if len(examples) < _SHOWN:
            examples.append(example)

    def refuse(self) -> None:
        """Raise one UserError with one line for each kind of problem. Do nothing where there are none."""
        counted = [
            f"{key[0]}: {number_of(count, key[1], key[2])}, such as {', '.join(self._examples[key])}: {key[3]}"
            for key, count in self._counts.items()
        ]
        refuse([*self.whole, *counted])


@dataclass(frozen=True)
class Table:
    """Files of one table.

    paths: the files, which have the same columns.
    needed: what a column is for -> its name in the files, or "a.b" for the field b in an object a.
    optional: the same for columns that may be missing.
    settings: what a column is for -> the setting that names it, for messages.
    whole: whether records have all their cells, also of columns that are not asked for. Otherwise those of Parquet,
        which stores columns apart, have only these.
    """

    paths: Sequence[Path]
    needed: Mapping[str, str]
    optional: Mapping[str, str]
    settings: Mapping[str, str]
    encoding: str = "utf-8"
    separator: str | None = None
    whole: bool = False

    @property
    def source(self) -> str:
        """The files' names, for messages."""
        return ", ".join(path.name for path in self.paths)

    def rows(self, problems: Problems, unit: str) -> Iterator[tuple[Record, Record, str]]:
        """Yields for each record a mapping, the record itself, and its place (file and line).

        The mapping is: what a column is for -> the record's value there, None if the cell is blank.

        problems: gets a problem for a file that lacks a column or cannot be read to its end; the file's rows end there.
        unit: what a row is, for the progress bar.
        """
        for path in self.paths:
            try:
                yield from self._of_file(path, problems, unit)
            except UserError as error:
                problems.say(str(error))

    def _of_file(self, path: Path, problems: Problems, unit: str) -> Iterator[tuple[Record, Record, str]]:
        kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
        separator = self.separator if kind in ("csv", "tsv", "txt") else None
        wanted = {**self.needed, **self.optional}
        columns = _of_parquet(path, wanted.values(), self.whole) if kind == "parquet" else []

        def found() -> Iterator[tuple[Record, str]]:
            return (
                (record, where)
                for record, where in read(path, separator, encoding=self.encoding, columns=columns)
                if set(record) not in _BULK
            )

        records = iter(watched(found(), path, unit))
        first = list(itertools.islice(records, _PEEKED))
        if not first:
            problems.say(f"{path.name}: it holds no records: give a file with at least one")
        missing = _missing(self.needed, first)
        if missing and kind in _JSON:  # A column may first occur in a later line, such as that of rare purchases.
            missing = _missing(missing, found())
        if missing and first:
            for use in missing:
                problems.say(self._no_column(path, use, first[0][0], kind))
            return
        for record, where in itertools.chain(first, records):
            place = where.replace(str(path), path.name, 1)
            yield {use: value_of(record, name) for use, name in wanted.items()}, record, place

    def _no_column(self, path: Path, use: str, record: Record, kind: str) -> str:
        there = ", ".join(map(str, record.get(_WRAPPED) or record))
        hint = ""
        if kind == "parquet":
            there = ", ".join(_schema(path).names)
        elif len(record) == 1 and (separator := next((s for s in ";\t|" if s in there), None)):
            hint = f", and task.params.separator={separator!r} if it separates the columns"
        return f"{path.name}: no column {self.needed[use]!r}, only {there}: set {self.settings[use]}{hint}"


def _schema(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}): export it again") from error


def _of_parquet(path: Path, wanted: Any, whole: bool) -> list[str]:
    """The columns of a file that are read: those that are asked for, and where ``whole`` all that hold no lists.

    A file may hold vectors, which take minutes to read.
    """
    from pyarrow import types

    heads = {part for name in wanted for part in (name, name.partition(".")[0], _WRAPPED)}
    lists = types.is_list, types.is_large_list, types.is_fixed_size_list
    return [
        column.name
        for column in _schema(path)
        if column.name in heads or (whole and not any(is_list(column.type) for is_list in lists))
    ]


def _missing(columns: Mapping[str, str], records: Iterable[tuple[Record, str]]) -> dict[str, str]:
    """Those of ``columns`` that no record has: what a column is for -> its name."""
    missing = dict(columns)
    for record, _ in records:
        missing = {use: name for use, name in missing.items() if _at(record, name) is _ABSENT}
        if not missing:
            break
    return missing


_ABSENT = object()


def _at(record: Record, column: str) -> Any:
    if column in record:
        return record[column]
    found: Any = record
    for name in column.split("."):
        if not isinstance(found, dict) or name not in found:
            inner = record.get(_WRAPPED)
            return _at(inner, column) if isinstance(inner, dict) else _ABSENT
        found = found[name]
    return found


def value_of(record: Record, column: str) -> Any:
    """``record[column]``, also inside objects ("a.b") and in a dump of OpenSearch; None where there is none."""
    found = _at(record, column)
    return None if found is _ABSENT or is_blank(found) else found


def is_blank(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, or white space."""
    return (
        value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value.strip())
    )


def identity(value: Any) -> str | None:
    """An id as text, or None for a blank cell. A float that is a whole number is that number (12.0 is "12")."""
    if is_blank(value):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def label(value: Any) -> str:
    """A cell as a name of `task.params.grades`: 3, 3.0 and "3" are one name, and so are true, "True" and 1."""
    number = finite(value)
    return identity(value if number is None else number) or ""


def finite(value: Any) -> float | None:
    """A number, also one written as text; true and false are 1 and 0; None for anything else, and for an infinity."""
    if is_blank(value):
        return None
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false")):
        return float(str(value).strip().lower() == "true")
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def seconds(value: Any, formats: Sequence[str] = ()) -> float | None:
    """A date as seconds since 1970 in UTC, or None for anything else.

    value: a date of ISO 8601, a number of seconds, milliseconds, microseconds or nanoseconds since 1970, a number such
        as 20260501, or a date of Parquet. Without a zone it is in UTC.
    formats: formats of Python's strptime that are tried first.
    """
    text = str(value).strip()
    for form in formats:
        try:
            value = datetime.datetime.strptime(text, form)
            break
        except ValueError:
            continue
    try:
        time = moment({"date": value}, "date", "")
    except (UserError, OverflowError):
        return None
    kind = kind_of(value.strip() if isinstance(value, str) else value, time)
    if kind is NUMBERS:
        return None
    for form, compact in COMPACT.values():
        if kind is compact:
            return datetime.datetime.strptime(str(int(time)), form).replace(tzinfo=datetime.UTC).timestamp()
    return time / next((unit for unit, known in UNITS.items() if known is kind), 1.0)


def same_ids(own: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Id in ``others`` -> id in ``own``, for ids that are written in two ways (see :func:`_form`).

    Where ``own`` has one form of an id, every form in ``others`` stands for it. Where it has several, these are
    different items, and an id in ``others`` stands only for the item whose id is exactly the same.
    """
    there: dict[str, list[str]] = {}
    for name in dict.fromkeys(own):
        there.setdefault(_form(name), []).append(name)
    found = {name: there.get(_form(name), []) for name in dict.fromkeys(others)}
    return {name: forms[0] for name, forms in found.items() if len(forms) == 1 and forms[0] != name}


def _form(name: str) -> str:
    """An id in composed Unicode (NFC), without blanks around it and without the ".0" that pandas adds to numbers."""
    return re.sub(r"^([0-9]+)\.0+$", r"\1", unicodedata.normalize("NFC", name.strip()))
