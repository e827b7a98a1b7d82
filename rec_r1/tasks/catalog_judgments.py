"""Judgments and events in a table of your own, added up by query and item; see clicks.py for their grades."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rec_r1.tasks.clicks import Counts, Grading, inverse_weight, position_propensity
from rec_r1.tasks.integrity import normal
from rec_r1.tasks.published import NAMES
from rec_r1.tasks.query_pools import Pool
from rec_r1.tasks.raw_files import Record
from rec_r1.tasks.tables import Problems, Table, finite, identity, is_blank, label, seconds

if TYPE_CHECKING:
    from rec_r1.tasks.catalog_settings import Params

logger = logging.getLogger(__name__)
COUNTED = {"clicks": "click", "purchases": "purchase"}  # columns of numbers -> the event that they count


@dataclass
class Side:
    """The judgments of one split. counts: query id -> item -> its events. Where a column has grades, ``pool`` has the
    judgments and ``counts`` is empty."""

    pool: Pool = field(default_factory=Pool)
    counts: dict[str, dict[str, Counts]] = field(default_factory=dict)


def query_id(text: str) -> str:
    """An id that depends on the query's text alone: a changed file leaves the ids of the other queries as they are."""
    return hashlib.sha256(normal(text).encode()).hexdigest()[:12]


def _merged(counts: Mapping[str, Counts], renamed: Mapping[str, str]) -> dict[str, Counts]:
    """The counts of a query by what the catalogue calls the items. Those of two forms of an id are added up."""
    found: dict[str, Counts] = {}
    for item, own in counts.items():
        there = found.setdefault(renamed.get(item, item), Counts())
        there.impressions += own.impressions
        for event, number in own.events.items():
            there.add(event, number)
    return found


class Judgments:
    """Rows of judgments or events, which are added one by one.

    texts: query id -> text where the rows have ids, as in ubi_queries; None where they have the text.
    split_of: returns the split of a row, or None if its cells name none, which it then adds to the problems.
    """

    def __init__(
        self,
        params: Params,
        source: str,
        problems: Problems,
        split_of: Callable[[Record, str], str | None],
        texts: Mapping[str, str | None] | None = None,
    ) -> None:
        self.params, self.source, self.problems = params, source, problems
        self.sides: dict[str, Side] = {}
        self.lines_of: Counter[str] = Counter()  # item -> its lines
        self._split_of, self._texts = split_of, texts
        self._seen: set[int] = set()
        self._notes: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._grades = params.event_grades
        self._labels = {label(name): grade for name, grade in (params.grades or {}).items()}

    def read(self, table: Table) -> Judgments:
        """Add the rows of ``table``, and log which of them are left out. Returns the object itself."""
        rows = 0
        for row, record, where in table.rows(self.problems, "judgments"):
            rows += 1
            self._add(row, record, where)
        for what, count in self._notes.items():
            logger.warning("%s: %d of %d lines %s", self.source, count, rows, what)
        if self._ignored:
            names = ", ".join(f"{name!r} ({count})" for name, count in self._ignored.most_common(8))
            logger.warning("%s: events without a grade in task.params.grades count for nothing: %s", self.source, names)
            if rows and not self.sides and not self._notes:
                self.problems.say(
                    f"{self.source}: no line is one of the events {', '.join(self._grades)}, only {names}: name yours "
                    "with their grades in task.params.grades"
                )
        return self

    def lacking(self, items: Container[str], renamed: Mapping[str, str]) -> list[str]:
        """The judged items that the catalogue lacks, in the order of the file. renamed: item -> its name there."""
        return [item for item in self.lines_of if renamed.get(item, item) not in items]

    def pools(self, grading: Grading, renamed: Mapping[str, str], left_out: set[str]) -> dict[str, Pool]:
        """The judgments of each split with their grades.

        renamed: item -> what the catalogue calls it. left_out: items without judgments in the result.
        """
        fix = "give each line its impressions, or set another task.params.combine"
        for side in self.sides.values():
            for query, counts in side.counts.items():
                for item, own in _merged(counts, renamed).items():
                    grade = grading.grade(own)
                    if grade is None:
                        example = f"{side.pool.texts[query]!r} and {item!r}"
                        self.problems.add(
                            self.source,
                            "pair has events and no impression",
                            "pairs have events and no impression",
                            example,
                            fix,
                        )
                    else:
                        side.pool.judge(query, item, grade, side.pool.places[query])
            judged, side.pool.judgments = side.pool.judgments, {}
            for query, grades in judged.items():
                for name, given in grades.items():
                    if name not in left_out:  # The best grade counts for two forms of an id.
                        item, known = renamed.get(name, name), side.pool.judgments.setdefault(query, {})
                        known[item] = max(given, known.get(item, given))
        return {split: side.pool.log_notes(self.source).in_order() for split, side in self.sides.items()}

    def _add(self, row: Record, record: Record, where: str) -> None:
        params = self.params
        event = self._event(row)
        impression = params.combine == "rate" and event == params.impression
        if params.kind == "events" and event not in self._grades and not impression:
            self._ignored[event] += 1
            return
        if params.repeated == "once" and self._is_repeated(record):
            self._notes["equal an earlier one and count once (task.params.repeated=each counts them all)"] += 1
            return
        pair = self._pair(row, where)
        split = self._split_of(row, where)
        if pair is None or split is None:
            return
        text, item = pair
        side, query = self.sides.setdefault(split, Side()), query_id(text)
        side.pool.add(query, text, where)
        self.lines_of[item] += 1
        if params.kind == "grades":
            grade = self._grade(row["grade"], where)
            if grade is not None:
                side.pool.judge(query, item, grade, where)
            return
        counts = side.counts.setdefault(query, {}).setdefault(item, Counts())
        weight = self._weight(row, where)
        for name, number in self._numbers(row, event, where):
            if name == params.impression:
                counts.impressions += number
            else:
                counts.add(name, number, weight)

    def _is_repeated(self, record: Record) -> bool:
        """Whether an earlier row has the same cells. 64 bits per row are kept in memory."""
        # The lines of a JSON file need not have the same keys in the same order.
        key = hash(tuple(sorted((name, str(cell)) for name, cell in record.items() if not is_blank(cell))))
        if key in self._seen:
            return True
        self._seen.add(key)
        return False

    def _event(self, row: Record) -> str:
        return self.params.event or str(row.get("event") or "").strip()

    def _pair(self, row: Record, where: str) -> tuple[str, str] | None:
        """Query text and item of a row; None where one of them is missing."""
        given, item = row["query"], identity(row["item"])
        text = None if is_blank(given) else " ".join(str(given).split())
        if text is not None and self._texts is not None:
            name = identity(given) or ""
            if name not in self._texts:
                self._leave_out(
                    self.params.unknown,
                    "names a query that task.params.queries lacks",
                    "name a query that task.params.queries lacks",
                    f"{name!r} at {where}",
                    "add the query there, or set task.params.unknown=drop to leave them out",
                )
                return None
            text = self._texts[name]
        if text is None or not normal(text) or item is None:
            self._leave_out(
                self.params.blank,
                "has no query or no item",
                "have no query or no item",
                where,
                "fill them in, or set task.params.blank=drop to leave them out",
            )
            return None
        return text, item

    def _leave_out(self, policy: str, one: str, many: str, example: str, fix: str) -> None:
        if policy == "drop":
            self._notes[f"{many} and are left out"] += 1
        else:
            self.problems.add(self.source, f"line {one}", f"lines {many}", example, fix)

    def _grade(self, given: Any, where: str) -> float | None:
        if self.params.grades is not None:
            grade = self._labels.get(label(given))
            one, many = "grade is not in task.params.grades", "grades are not in task.params.grades"
            fix = "give each of them a grade there"
        else:
            grade = finite(given)
            column = f"(column {self.params.column('grade')!r})"
            one, many = f"grade {column} is no number", f"grades {column} are no numbers"
            fix = "correct the lines, or give each a number in task.params.grades"
        if grade is None:
            self.problems.add(self.source, one, many, f"{given!r} at {where}", fix)
        return grade

    def _numbers(self, row: Record, event: str, where: str) -> list[tuple[str, float]]:
        """The events of a row and how often each happened."""
        params = self.params
        if params.kind == "events":
            found = [(event, "count" if "count" in params.columns else None)]
        else:
            found = [(name, use) for use, name in COUNTED.items() if use in params.columns]
        if "impressions" in params.columns:
            found.append((params.impression, "impressions"))
        numbers: list[tuple[str, float]] = []
        for name, use in found:
            number = 1.0 if use is None else 0.0 if row[use] is None else finite(row[use])
            if number is None or number < 0:
                self.problems.add(
                    self.source,
                    f"cell of column {params.column(str(use))!r} is no number from 0",
                    f"cells of column {params.column(str(use))!r} are no numbers from 0",
                    f"{row[str(use)]!r} at {where}",
                    "correct them, or name another column",
                )
            elif number:
                numbers.append((name, number))
        return numbers

    def _weight(self, row: Record, where: str) -> float:
        """The inverse-propensity weight of a row; 1 where nothing is weighted or the row has no position."""
        params = self.params
        use = "propensity" if "propensity" in params.columns else "position"
        if use == "position" and params.position_bias is None:
            return 1.0
        given = row.get(use)
        given = given.get("index") if isinstance(given, dict) else given  # Early schemas of UBI have {index: …} here.
        if is_blank(given):
            self._notes[f"have no {use} and are not weighted"] += 1
            return 1.0
        number = finite(given)
        if use == "propensity" and number is not None and 0 < number <= 1:
            return inverse_weight(number, params.clip)
        if use == "position" and number is not None and number.is_integer() and number >= params.first_position:
            position = int(number) - params.first_position + 1
            return inverse_weight(position_propensity(position, params.position_bias or 0.0), params.clip)
        least = "above 0 and up to 1" if use == "propensity" else f"whole numbers from {params.first_position}"
        self.problems.add(
            self.source, f"cell of column {params.column(use)!r} is not {least}",
            f"cells of column {params.column(use)!r} are not {least}", f"{given!r} at {where}",
            "correct them, or leave the column out",
        )  # fmt: skip
        return 1.0


def split_by(params: Params, source: str, problems: Problems) -> Callable[[Record, str], str | None]:
    """Returns a function that names the split of a row: by column or date, or "all" if queries are divided later."""

    def by_column(row: Record, where: str) -> str | None:
        split = NAMES.get(str(row["split"]).strip().casefold())
        if split is None:
            problems.add(
                source, f"cell of column {params.column('split')!r} names no split",
                f"cells of column {params.column('split')!r} name no split", f"{row['split']!r} at {where}",
                f"write one of {', '.join(NAMES)}",
            )  # fmt: skip
        return split

    starts = [(split, seconds(day)) for split, day in params.starts]

    def by_date(row: Record, where: str) -> str | None:
        time = seconds(row["date"], params.date_formats)
        if time is None:
            problems.add(
                source, f"cell of column {params.column('date')!r} is no date",
                f"cells of column {params.column('date')!r} are no dates", f"{row['date']!r} at {where}",
                'write them in ISO 8601, or name their formats in task.params.date_formats, such as "%d.%m.%Y"',
            )  # fmt: skip
            return None
        return next((split for split, start in starts if start is not None and time >= start), "train")

    if "split" in params.columns:
        return by_column
    return by_date if starts else lambda row, where: "all"


def query_texts(table: Table, problems: Problems) -> dict[str, str | None]:
    """The texts of a file of queries: query id -> text, None where it is blank."""
    found: dict[str, str | None] = {}
    for row, _, where in table.rows(problems, "queries"):
        name = identity(row["id"])
        if name is None:
            problems.add(table.source, "query without an id", "queries without an id", where, "give each an id")
        else:
            found[name] = None if row["text"] is None else " ".join(str(row["text"]).split())
    return found
