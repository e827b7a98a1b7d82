"""`task.params` of the task `catalog`, and which of them fit together."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rec_r1.config import refuse
from rec_r1.tasks.clicks import COMBINATIONS
from rec_r1.tasks.query_pools import Dividing, check_fit_share, check_limits, check_seed
from rec_r1.tasks.tables import seconds

ITEM_COLUMNS = ("id", "title")
GRADE_COLUMNS = ("grade", "event", "count", "clicks", "purchases", "impressions", "position", "propensity")
JUDGMENT_COLUMNS = ("query", "item", *GRADE_COLUMNS, "date", "split")
QUERY_COLUMNS = ("query_id", "query_text")
COLUMNS = (*ITEM_COLUMNS, *JUDGMENT_COLUMNS, *QUERY_COLUMNS)
LAYOUTS = {  # The names of the columns where task.params.columns does not say them.
    "tables": {
        "id": "id",
        "title": "title",
        "query": "query",
        "item": "item",
        "grade": "grade",
        "query_id": "id",
        "query_text": "text",
    },
    "ubi": {
        "id": "id",
        "title": "title",
        "query": "query_id",
        "item": "event_attributes.object.object_id",
        "event": "action_name",
        "position": "event_attributes.position.ordinal",
        "date": "timestamp",
        "query_id": "query_id",
        "query_text": "user_query",
    },
}
GRADES = {
    "tables": {"click": 1.0, "purchase": 3.0},
    "ubi": {"click": 1.0, "click_through": 1.0, "add_to_cart": 2.0, "purchase": 3.0},
}


@dataclass(frozen=True)
class Params(Dividing):
    """`task.params` of the task catalog."""

    # How the files look. tables: a file of items, and a file of judgments or events. ubi: a file of items, and the logs
    # ubi_queries and ubi_events of OpenSearch's User Behavior Insights.
    layout: str = "tables"
    # The file of items, or a pattern of several. null finds items, products or catalog with any ending.
    items: str | None = None
    # The file of judgments or events, or a pattern of several. null finds judgments, clicks or events, or ubi_events.
    judgments: str | None = None
    # The file of queries, where the judgments name queries by ids. null: they hold the texts. For ubi: ubi_queries.
    queries: str | None = None
    encoding: str = "utf-8"  # The encoding of all text files, such as utf-16 or latin-1.
    # What separates the columns of CSV and TSV files, such as ";". null: a comma or a tab, as the ending says.
    separator: str | None = None
    # How the files name the columns id, title, query, item, grade, event, count, clicks, purchases, impressions,
    # position, propensity, date, split, query_id and query_text, where they differ: {id: sku}. `a.b` is a field inside
    # JSON. Grades come from the column grade unless event, clicks or purchases is named.
    columns: dict[str, str] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)  # The columns of an item that are indexed after its title.
    # The columns of an item that are kept as fields of the catalogue, for retrievers that search or filter by them.
    fields: list[str] = field(default_factory=list)
    # What to do with different items that have one id: refuse, or keep the first or the last of them.
    duplicates: str = "refuse"
    unknown: str = "refuse"  # What to do with judgments of an item that the catalogue lacks: refuse or drop.
    blank: str = "refuse"  # What to do with judgments whose query or item is blank: refuse or drop.
    repeated: str = "once"  # Whether lines that are equal in every cell count once, or each of them counts.
    # Event -> its grade, or value of the column grade -> its grade. Events that it does not name are ignored.
    # null: a click is 1 and a purchase 3, and grades are numbers, or true (1) and false (0). The columns clicks and
    # purchases count such events.
    grades: dict[str, float] | None = None
    event: str | None = None  # The event that every line stands for, such as click, if no column names it.
    impression: str = "impression"  # For combine=rate: the event of an item that was shown.
    # How the grade of a query and an item is made of the grades of their events: best takes the highest, sum adds them,
    # and rate divides the sum by the impressions.
    combine: str = "best"
    min_count: float = 1.0  # Events of one name count for a query and an item only if there are at least so many.
    # Rising thresholds: the grade becomes the number of them that the result of `combine` reaches. null keeps the
    # result.
    levels: list[float] | None = None
    # The eta of the propensity (1 / position)^eta by which events are weighted, from the column position. null weights
    # nothing, unless there is a column propensity.
    position_bias: float | None = None
    clip: float = 0.1  # The lowest propensity: lower ones count as this one.
    first_position: int = 1  # The first position in the column position: 1 or 0.
    # Events from this date on are the test split, and those before it train and validation. Needs the column date.
    test_from: str | None = None
    # Events from this date on, and before `test_from`, are the validation split. null takes it out of train.
    validation_from: str | None = None
    # The formats of the column date beside ISO 8601 and times since 1970, as in Python's strptime: "%d.%m.%Y".
    date_formats: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What the grades are made of: grades (a column), counts (columns of numbers), or events (one per line)."""
        if self.layout == "ubi" or self.event is not None or "event" in self.columns:
            return "events"
        return "counts" if {"clicks", "purchases"} & self.columns.keys() else "grades"

    @property
    def event_grades(self) -> Mapping[str, float]:
        """Event -> its grade."""
        return GRADES[self.layout] if self.grades is None else self.grades

    @property
    def starts(self) -> list[tuple[str, str]]:
        """The splits that begin at a date, the latest first."""
        given = (("test", self.test_from), ("validation", self.validation_from))
        return [(split, day) for split, day in given if day is not None]

    def column(self, use: str) -> str:
        """The name that the column for ``use`` has in the files."""
        return self.columns.get(use) or LAYOUTS[self.layout][use]

    def check(self) -> None:
        """Raises UserError, with one line for each, for values out of range and for settings that nothing reads."""
        check_limits(self.limits)
        check_fit_share(self.fit_share)
        check_seed(self.seed)
        refuse(f"task.params.{problem}" for problem in [*_out_of_range(self), *_unread(self), *_unread_of_splits(self)])


def _out_of_range(params: Params) -> Iterator[str]:
    choices = {
        "layout": tuple(LAYOUTS),
        "duplicates": ("refuse", "first", "last"),
        "unknown": ("refuse", "drop"),
        "blank": ("refuse", "drop"),
        "repeated": ("once", "each"),
        "combine": COMBINATIONS,
        "first_position": (1, 0),
    }
    for name, allowed in choices.items():
        if (given := vars(params)[name]) not in allowed:
            yield f"{name}: {given!r}: choose from {', '.join(map(str, allowed))}"
    for use in params.columns.keys() - set(COLUMNS):
        yield f"columns.{use}: unknown: choose from {', '.join(COLUMNS)}"
    for name in params.fields:
        if name in ("id", "text", "title"):
            yield f"fields: {name!r}: every catalogue has this field: leave it out"
    for name in ("test_share", "validation_share"):
        if not 0 < vars(params)[name] < 1:
            yield f"{name}: {vars(params)[name]}: must be above 0 and below 1, 0.1 is usual"
    if not 0 < params.clip <= 1:
        yield f"clip: {params.clip}: must be above 0 and at most 1, 0.1 is usual"
    if params.min_count <= 0:
        yield f"min_count: {params.min_count}: must be above 0, 1 is usual"
    if params.position_bias is not None and params.position_bias < 0:
        yield f"position_bias: {params.position_bias}: must be at least 0, 1 is usual"
    levels = params.levels
    if levels is not None and (not levels or levels[0] <= 0 or sorted(set(levels)) != levels):
        yield f"levels: {levels}: give rising numbers above 0, such as [1, 5, 20]"
    if params.separator is not None and len(params.separator) != 1:
        yield f"separator: {params.separator!r}: must be one character"
    for split, day in params.starts:
        if seconds(day) is None:
            yield f"{split}_from: {day!r}: must be a date of ISO 8601, such as 2026-05-01"
    days = [seconds(day) for _, day in params.starts]
    if len(days) == 2 and days[0] is not None and days[1] is not None and days[1] >= days[0]:
        yield f"validation_from: {params.validation_from!r}: must be before test_from ({params.test_from!r})"
    try:
        codecs.lookup(params.encoding)
    except LookupError:
        yield f"encoding: {params.encoding!r}: name one of Python's, such as utf-16 or latin-1"


def _unread(params: Params) -> Iterator[str]:
    """Settings that contradict each other, or that have no effect with the other settings."""
    named, usual = params.columns.keys(), Params()
    sources = [f"columns.{use}" for use in ("grade", "event", "clicks") if use in named]
    sources += ["columns.purchases"] if "purchases" in named and "clicks" not in named else []
    sources += ["event"] if params.event is not None else []
    sources += ["layout"] if params.layout == "ubi" and "event" not in named else []
    if len(sources) > 1:
        yield f"{sources[1]}: {sources[0]} says what the grades are made of: leave one of them out"
    for use in QUERY_COLUMNS:
        if use in named and params.queries is None and params.layout != "ubi":
            yield f"columns.{use}: only read with task.params.queries, the file of queries: set that, or remove it"
    if params.kind == "grades":
        read_by_events = ("impression", "combine", "min_count", "levels", "position_bias", "clip", "first_position")
        given = [name for name in read_by_events if vars(params)[name] != vars(usual)[name]]
        given += [f"columns.{use}" for use in GRADE_COLUMNS[2:] if use in named]
        for name in given:
            yield f"{name}: nothing reads it, because grades come from a column: remove it, or name columns of events"
        return
    if params.impression != usual.impression and params.combine != "rate":
        yield "impression: only combine=rate reads it: leave it out"
    if "count" in named and params.kind == "counts":
        yield "columns.count: columns.clicks and columns.purchases are counts themselves: leave it out"
    weighted = params.position_bias is not None or "propensity" in named
    if "position" in named and params.position_bias is None:
        yield "columns.position: nothing reads it without task.params.position_bias: set that, 1 is usual"
    if params.position_bias is not None and "propensity" in named:
        yield "position_bias: columns.propensity has the propensities: leave one of them out"
    elif params.position_bias is not None and "position" not in named and params.layout != "ubi":
        yield "position_bias: it needs positions: name their column in task.params.columns.position"
    if params.clip != usual.clip and not weighted:
        yield "clip: nothing is weighted: set task.params.position_bias or columns.propensity, or leave it out"
    if weighted and params.combine == "best" and params.min_count <= 1:
        yield (
            "combine: best only checks whether an event happened, so weights change nothing: set sum or rate, or a "
            "min_count above 1, or leave weights out"
        )
    if params.combine == "rate" and (params.grades or {}).get(params.impression):
        yield f"grades.{params.impression}: combine=rate divides by this event: leave it out of the grades"
    if params.combine == "rate" and params.kind == "counts" and "impressions" not in named:
        yield "combine: rate needs impressions: name their column in task.params.columns.impressions"
    if "impressions" in named and params.combine != "rate":
        yield "columns.impressions: only combine=rate reads it: leave it out"
    if params.combine == "rate" and params.event is not None and "impressions" not in named:
        yield f"combine: rate needs impressions, and each line is a {params.event}: name columns.impressions"


def _unread_of_splits(params: Params) -> Iterator[str]:
    named, usual = params.columns.keys(), Params()
    by = "columns.split" if "split" in named else "test_from" if params.test_from is not None else None
    if "split" in named and params.starts:
        yield f"{params.starts[0][0]}_from: columns.split says what is in which split: leave one of them out"
    if params.validation_from is not None and params.test_from is None:
        yield "validation_from: it needs task.params.test_from, where the test begins"
    if by and params.test_share != usual.test_share:
        yield f"test_share: {by} says which queries are in test: leave one of them out"
    if params.starts and "date" not in named and params.layout != "ubi":
        yield f"{params.starts[0][0]}_from: it needs dates: name their column in task.params.columns.date"
    if not params.starts and ("date" in named or params.date_formats):
        yield f"{'columns.date' if 'date' in named else 'date_formats'}: nothing reads it without task.params.test_from"
