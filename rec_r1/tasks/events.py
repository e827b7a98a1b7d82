"""Checks of logged events before they become histories: repeated events, and columns that mix kinds of times."""

from __future__ import annotations

import datetime
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from rec_r1.config import UserError
from rec_r1.tasks.raw_files import Record, moment

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=Hashable)
_EARLIEST, _LATEST = (datetime.datetime(year, 1, 1, tzinfo=datetime.UTC).timestamp() for year in (1990, 2040))
_NEAR = 0.05  # Neighbouring numbers of two kinds that differ by less than this share may be one counter, as of lines.


class Kind(NamedTuple):
    """A way to write times.

    name: the kind in words, for messages.
    least, below: the numbers of this kind that stand for the start of 1990 and the start of 2040.
    year: about one year in the unit of this kind.
    """

    name: str
    least: float
    below: float
    year: float


def _since_1970(name: str, unit: float) -> Kind:
    return Kind(name, _EARLIEST * unit, _LATEST * unit, 366 * 86_400 * unit)


DATES = _since_1970("dates", 1.0)
NUMBERS = Kind("numbers that are no time since 1970", -np.inf, np.inf, np.inf)
# Units per second -> kind. A number from 1e8 to 1e11 seconds in the unit is of the kind (the years 1973 to 5138).
UNITS = {
    1.0: _since_1970("seconds since 1970", 1.0),
    1e3: _since_1970("milliseconds since 1970", 1e3),
    1e6: _since_1970("microseconds since 1970", 1e6),
    1e9: _since_1970("nanoseconds since 1970", 1e9),
}
COMPACT = {  # Number of digits -> (format for strptime, kind).
    8: ("%Y%m%d", Kind("dates written as YYYYMMDD", 19900101, 20400101, 1e4)),
    14: ("%Y%m%d%H%M%S", Kind("times written as YYYYMMDDHHMMSS", 19900101e6, 20400101e6, 1e10)),
}


def once(found: Sequence[T], source: Path | str, what: str, key: Callable[[T], Hashable] = lambda one: one) -> list[T]:
    """Remove duplicates, and log how many there are. The first of equal elements stays, in the given order.

    found: the elements.
    source: the file, for the log.
    what: what the elements are ("lines", "events (user, item, time)"), for the log.
    key: elements with the same key are duplicates. By default the key is the element itself.
    """
    first: dict[Hashable, T] = {}
    for one in found:
        first.setdefault(key(one), one)
    kept = list(first.values())
    if len(kept) < len(found):
        logger.warning(
            "%s: %d of %d %s repeat an earlier one and are left out", source, len(found) - len(kept), len(found), what
        )
    return kept


def kind_of(given: object, time: float) -> Kind:
    """The way in which a time is written.

    given: the value in the file.
    time: the number that `raw_files.moment` makes of it.
    """
    if isinstance(given, datetime.date) or (isinstance(given, str) and not _is_number(given)):
        return DATES
    digits = str(int(time)) if time.is_integer() and time > 0 else ""
    if len(digits) in COMPACT and "19" <= digits[:2] <= "20":
        form, kind = COMPACT[len(digits)]
        try:
            datetime.datetime.strptime(digits, form)
            return kind
        except ValueError:
            pass
    return next((kind for unit, kind in UNITS.items() if 1e8 * unit <= time < 1e11 * unit), NUMBERS)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Times:
    """The times of one column: :meth:`read` reads them one by one, and :meth:`check` checks them together.

    source: the file, for messages.
    column: the name of the column.
    """

    def __init__(self, source: str, column: str) -> None:
        self.source, self.column = source, column
        self._values, self._kinds = array("d"), array("b")
        self._known: list[Kind] = []
        # (kind, whether the time is from 1990 to 2040) -> the first such value and its place, for messages.
        self._first: dict[tuple[Kind, bool], str] = {}

    def read(self, record: Record, where: str) -> float:
        """The time of a record as a number. Arguments and errors are those of `raw_files.moment`."""
        time = moment(record, self.column, where)
        kind = kind_of(record[self.column], time)
        if kind not in self._known:
            self._known.append(kind)
        self._values.append(time)
        self._kinds.append(self._known.index(kind))
        self._first.setdefault((kind, kind.least <= time < kind.below), f"{record[self.column]!r} at {where}")
        return time

    def check(self) -> None:
        """Raise UserError for times that would be put into a wrong order.

        That is a column that mixes several ways to write times, and one in which some times are before 1990 or after
        2040, more than a year from the others. Numbers that cross the border between two kinds without a gap are
        counters, and are accepted.
        """
        values = np.frombuffer(self._values, np.float64) if self._values else np.zeros(0)
        kinds = np.frombuffer(self._kinds, np.int8) if self._kinds else np.zeros(0, np.int8)
        if len(self._known) == 1:
            self._check_years(values, self._known[0])
        elif self._known:
            self._check_kinds(values, kinds)

    def _check_kinds(self, values: np.ndarray, kinds: np.ndarray) -> None:
        order = np.argsort(values, kind="stable")
        v, k = values[order], kinds[order]
        apart = np.diff(v) > _NEAR * np.maximum(np.abs(v[1:]), np.abs(v[:-1]))
        dates = self._known.index(DATES) if DATES in self._known else -1
        strange = (k[1:] != k[:-1]) & (apart | (k[1:] == dates) | (k[:-1] == dates))
        if not strange.any():
            return
        at = int(np.flatnonzero(strange)[0])
        counts = Counter(kinds.tolist())
        one, other = sorted((int(k[at]), int(k[at + 1])), key=lambda i: -counts[i])
        kind, rare = self._known[one], self._known[other]
        raise UserError(
            f"{self.source}: column {self.column!r} mixes {kind.name} ({counts[one]} values, such as "
            f"{self._example(kind)}) with {rare.name} ({counts[other]}, such as {self._example(rare)}), which cannot "
            "be put into one order: write all times in one way"
        )

    def _example(self, kind: Kind) -> str:
        return next(first for (known, _), first in self._first.items() if known == kind)

    def _check_years(self, values: np.ndarray, kind: Kind) -> None:
        inside = (values >= kind.least) & (values < kind.below)
        if inside.all() or not inside.any():
            return
        sane, others = values[inside], values[~inside]
        latest_before = others.max(where=others < kind.least, initial=-np.inf)
        earliest_after = others.min(where=others >= kind.below, initial=np.inf)
        distances = [sane.min() - latest_before, earliest_after - sane.max()]  # Infinite where no time is on that side.
        if any(np.isfinite(distance) and distance > kind.year for distance in distances):
            raise UserError(
                f"{self.source}: column {self.column!r}: {len(others)} of {len(values)} times, {kind.name}, are before "
                f"1990 or after 2040, such as {self._first[kind, False]}, and the others are not, such as "
                f"{self._first[kind, True]}: correct these lines, or remove them"
            )
