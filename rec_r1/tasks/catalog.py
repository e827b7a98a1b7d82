"""A catalogue and judgments or clicks in files of your own: a shop's products.csv and clicks.csv, or logs of OpenSearch.

Both files are tables: CSV, TSV, JSONL, JSON or Parquet. Grades come from a column or are made of events, see clicks.py.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

from rec_r1.config import UserError
from rec_r1.tasks.query_pools import Carving

READS: tuple[str, ...] = ("path",)  # The settings of `task` that this task reads, of those that not every task reads.
ITEM_COLUMNS = ("id", "title")
GRADE_COLUMNS = ("grade", "event", "count", "clicks", "purchases", "impressions", "position", "propensity")
JUDGMENT_COLUMNS = ("query", "item", *GRADE_COLUMNS, "date", "split")


@dataclass(frozen=True)
class Params(Carving):
    """`task.params`. limits, seed and validation_share are in query_pools.py.

    layout: how the files look. tables: a file of items and a file of judgments or events. ubi: OpenSearch's User
        Behavior Insights, a file of items, ubi_queries and ubi_events.
    items: the name of the file of items, or a pattern of several files.
    judgments: the same for the file of judgments, clicks or events.
    queries: the same for ubi_queries, which layout ubi reads.
    encoding: of all text files, such as utf-16 or latin-1. A byte order mark is never part of a text.
    separator: of CSV and TSV files where it is neither a comma nor a tab, such as ";".
    columns: what your files call each of ITEM_COLUMNS and JUDGMENT_COLUMNS. "a.b" is the field b in the object a of
        JSON. id, title, query and item are called so by default, and grade where no other column of a grade is named.
    text: fields of an item that are indexed behind its title.
    duplicates: what to do with different items that have one id: refuse, or keep the first or the last of them.
        Identical ones always count as one.
    unknown: what to do with judgments of an item that is not among the items: refuse, or drop.
    blank: what to do with judgments whose query is blank: refuse, or drop.

    grades: event -> its grade, or, with columns.grade, what that column says -> its grade. Events that it does not name
        count for nothing. None is {click: 1, purchase: 3}, and with columns.grade the numbers of that column.
    event: what every line is, such as click, where no column says it.
    combine: how a pair of query and item gets its grade from its events, see clicks.py: best, sum or rate.
    min_count: a pair's events of one name count only if they are at least so many.
    levels: thresholds of what `combine` makes: a pair's grade is how many of them it reaches. None keeps the value.
    position_bias: the eta of the propensity (1 / position)^eta by which events are weighted. It needs columns.position.
    clip: the lowest propensity that is believed, see clicks.py.
    first_position: what columns.position calls the first position, 1 or 0.

    test_share: the share of the queries that are the test, by a hash of their text, where neither a date nor a column
        decides.
    test_from: events from this date on are the test, and those before it train and validation. It needs columns.date.
    validation_from: events from this date on, and before test_from, are the validation split. Without it, validation is
        carved out of train by validation_share.
    date_formats: formats of columns.date beside ISO 8601 and times since 1970, as in Python's strptime: "%d.%m.%Y".
    """

    layout: str = "tables"
    items: str | None = None
    judgments: str | None = None
    queries: str | None = None
    encoding: str = "utf-8"
    separator: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    duplicates: str = "refuse"
    unknown: str = "refuse"
    blank: str = "refuse"
    grades: dict[str, float] | None = None
    event: str | None = None
    combine: str = "best"
    min_count: float = 1.0
    levels: list[float] | None = None
    position_bias: float | None = None
    clip: float = 0.1
    first_position: int = 1
    test_share: float = 0.2
    test_from: str | None = None
    validation_from: str | None = None
    date_formats: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        super().check()
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise UserError(f"task.params.encoding: {self.encoding!r}: name one of Python's, such as utf-16") from error
