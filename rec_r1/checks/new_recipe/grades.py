"""Where the grades of a table of judgments or events come from: a column of grades, of events' names, or of counts."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from rec_r1.checks.new_recipe.layouts import Choice, Finding, open_choice
from rec_r1.checks.new_recipe.tables import Table, all_values, as_text
from rec_r1.config import UserError
from rec_r1.console import number_of
from rec_r1.tasks import esci
from rec_r1.tasks.tables import finite

_LABELS = 20  # A column with more different values that are no numbers does not hold the names of grades.
# The parts of the names of events that take something back: "unsave" must not count as "save".
_TAKEN_BACK = ("remove", "cancel", "return", "refund", "delete", "unsave", "unwish", "dislike", "unlike")
_GRADED = (
    (3.0, ("purchase", "buy", "bought", "order", "conversion")),
    (2.0, ("cart", "basket", "wish", "save")),
    (1.0, ("click",)),
)
_NEGATIVE = {"irrelevant", "unrelated", "not", "no", "non", "none", "bad", "poor", "wrong", "off", "n", "f"}


@dataclass(frozen=True)
class Grades:
    """Where the grades of a table come from.

    columns: grade, event, clicks or purchases -> the column that holds it; {} where every row is a click.
    params: what `task.params` says about them beside the columns.
    choices, findings: what the table leaves open, and what is doubtful about it.
    notes: a key of ``params`` -> its comment in the recipe.
    """

    columns: Mapping[str, str]
    params: Mapping[str, Any] = field(default_factory=dict)
    choices: Sequence[Choice] = ()
    findings: Sequence[Finding] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    def counts(self, event: str) -> bool:
        """Whether the task counts an event of this name."""
        return "event" not in self.columns or event in self.params["grades"]

    def grade(self, given: Any) -> Any:
        """The grade that a cell of the column ``grade`` stands for."""
        return self.params.get("grades", {}).get(as_text(given), given)


def grades_of(events: Table, used: Container[str]) -> Grades:
    """Where the grades of a table come from. used: its columns that hold something else.

    A column whose name says "relevance" comes first, then events that have a usual name, then counts. A score may be
    the search engine's, and a label anything, so that these come last.
    """
    grade, score, event, clicks, purchases = (
        [column for column in events.named(role) if column not in used and events.values(column)]
        for role in ("grade", "score", "event", "clicks", "purchases")
    )
    if grade:
        return _of_a_column(events, grade)
    for column in event:
        if usual := _usual_grades(all_values(events, column)):
            return Grades({"event": column}, {"grades": usual})
    counted = {
        role: column
        for role, columns in (("clicks", clicks), ("purchases", purchases))
        for column in [column for column in columns if _are_numbers(events.values(column))][:1]
    }
    if counted:
        return Grades(counted)
    score = [c for c in score if _are_numbers(values := events.values(c)) or len(set(values)) <= _LABELS]
    if score:
        return _of_a_column(events, score)
    flags = _flags(events, [column for column in events.columns if column not in used and column not in event])
    if event:
        params = {"grades": grades_of_events(all_values(events, event[0]), f"{events.path}: column {event[0]}")}
        return Grades({"event": event[0]}, params, findings=_unused_flags(flags))
    notes = (
        {"event": f"each row is a click; or remove this line and add {flags[0]} as clicks to columns"} if flags else {}
    )
    return Grades({}, {"event": "click"}, findings=_unused_flags(flags), notes=notes)


def _of_a_column(events: Table, columns: Sequence[str]) -> Grades:
    """Grades from one of several columns: of numbers, or else of names, for which the recipe gets a draft."""
    numbers = [column for column in columns if all(finite(value) is not None for value in events.values(column))]
    columns = numbers or columns[:1]
    question = f"Which column of {events.path.name} is the grade?"
    choices = open_choice("task.params.columns.grade", question, columns)
    values = all_values(events, columns[0])
    names = [value for value in values if finite(value) is None]
    if not names or len(values) > _LABELS:
        return Grades({"grade": columns[0]}, choices=choices)
    draft = _draft(values)
    written = ", ".join(f"{name}: {draft[name]:g}" for name in draft)
    found = Finding(
        number_of(
            len(names), f"grade of {columns[0]} is no number", f"different grades of {columns[0]} are no numbers"
        ),
        f"task.params.grades of the recipe is a draft ({written}): put in the grades that you mean before you train.",
        [repr(name) for name in names[:2]],
    )
    notes = {"grades": "a draft: put in the grades that you mean before you train"}
    return Grades({"grade": columns[0]}, {"grades": draft}, findings=[found], notes=notes)


def _draft(values: Sequence[str]) -> dict[str, float]:
    """value -> grade. The labels of ESCI have the gains of its paper. Of other names, those that deny are 0, and the
    others 1, or 0 beside numbers, as "n/a" may stand there."""
    if set(values) <= esci.LETTERS.keys():
        return {value: float(esci.Params().grades[esci.LETTERS[value]]) for value in values}
    numbers = {value: finite(value) for value in values}
    other = 1.0 if all(number is None for number in numbers.values()) else 0.0
    denied = {value for value in values if _NEGATIVE & set(re.split(r"\W+|_", value.lower()))}
    return {
        value: number if number is not None else 0.0 if value in denied else other for value, number in numbers.items()
    }


def _are_numbers(values: Sequence[str]) -> bool:
    return mean(finite(value) is not None for value in values) >= 0.5


def _usual_grades(values: Iterable[str]) -> dict[str, float]:
    """event -> grade, of the events that are named as a purchase (3), a cart (2) or a click (1)."""
    found: dict[str, float] = {}
    for value in values:
        name = value.lower()
        grade = next((grade for grade, words in _GRADED if any(word in name for word in words)), None)
        if grade is not None and not _takes_back(name):
            found[value] = grade
    return found


def _takes_back(name: str) -> bool:
    return any(word in name.lower() for word in _TAKEN_BACK)


def grades_of_events(values: Sequence[str], where: str) -> dict[str, float]:
    """event -> grade. Where none has a usual name, each is 1. Events that take something back have none.

    Raises UserError, which begins with ``where``, if all of them take something back.
    """
    found = _usual_grades(values) or {value: 1.0 for value in values if not _takes_back(value)}
    if not found:
        raise UserError(f"{where}: only {', '.join(values)}, which take something back: add clicks or purchases")
    return found


def _flags(events: Table, columns: Sequence[str]) -> list[str]:
    """Those of ``columns`` that hold 0 and 1, or true and false. An empty cell or a missing key counts as 0."""
    likely = [c for c in columns if {finite(value) for value in events.values(c)} in ({0.0}, {1.0}, {0.0, 1.0})]
    found: dict[str, set[float]] = {column: set() for column in likely}
    for record, _ in events.records() if likely else ():
        for column, values in found.items():
            values.add(finite(record.get(column)) or 0.0)
    return [column for column, values in found.items() if values == {0.0, 1.0}]


def _unused_flags(columns: Sequence[str]) -> list[Finding]:
    if not columns:
        return []
    number = number_of(
        len(columns), "column of 0 and 1, or of true and false, is", "columns of 0 and 1, or of true and false, are"
    )
    fix = (
        "Rows with 0 count like rows with 1. If one of them says which rows are clicks, or relevant, replace "
        f"task.params.event and columns.event in the recipe by columns.clicks, such as {columns[0]}."
    )
    return [Finding(f"{number} not used", fix, columns[:2])]
