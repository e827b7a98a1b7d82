"""Which table refers to which: the items, and the judgments, clicks or interactions that name them by ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rec_r1.checks.new_recipe.tables import USUAL_NAMES, Table, as_text, simple
from rec_r1.config import UserError
from rec_r1.tasks.types import look_alike

_MATCHING = 0.5  # A column refers to items if at least this share of its values are ids of items.
_WORDS = 2.0  # A column holds texts if its values have at least so many words on average.
_QUERY_WORDS = 8.0  # Texts with more words than these on average are no queries.
_NOT_TEXT = ("url", "image", "img", "link", "price", "date", "time", "stock", "currency", "discontinued")


@dataclass(frozen=True)
class Link:
    """The reference from one table to another.

    items, events: the tables.
    id: the column of ``items`` with the ids.
    item: the column of ``events`` that holds such ids.
    share: the share of the values of ``item`` that are among the ids, from 0 to 1.
    """

    items: Table
    events: Table
    id: str
    item: str
    share: float


def strongest_link(tables: Sequence[Table]) -> Link | None:
    """The reference of events to items that fits best, by names and by the share of ids that are found.

    It is the reference of one table to another, or of a table with queries to the items in its own rows; None where no
    table refers to another.
    """
    found = [link for items in tables if is_about_items(items) for link in _links(items, tables)]
    if not found and len(tables) == 1:  # A log beside a table of items that it does not fit is no table of items.
        (table,) = tables
        columns = id_columns(table) if table.named("query") and _titles_beside_queries(table) else []
        found = [Link(table, table, column, column, 1.0) for column in columns[:1]]
    return max(found, key=_weight, default=None)


def query_link(tables: Sequence[Table], link: Link) -> Link | None:
    """The reference of the judgments to a table of queries, where they name queries by ids."""
    others = [table for table in tables if table not in (link.items, link.events) and texts(table, ())]
    found = [
        one
        for table in others
        for one in _links(table, [link.events])
        if one.item != link.item
        and (_is_called(simple(one.item), "query") or (table.named("query") and not link.events.named("query")))
    ]
    return max(found, key=_weight, default=None)


def queries_by_contents(link: Link) -> list[str]:
    """The column of the events with short texts, where exactly one has them: the queries, whatever it is called."""
    found = [
        column
        for column in link.events.columns
        if column != link.item
        and not any(word in simple(column) for word in _NOT_TEXT)
        and (values := link.events.values(column))
        and _WORDS <= words(values) <= _QUERY_WORDS
        and mean(any(map(str.isalpha, value)) for value in values) > _MATCHING
    ]
    return found if len(found) == 1 else []


def no_link(folder: Path, tables: Sequence[Table]) -> UserError:
    """What to change in tables of which none refers to another."""
    about = [table for table in tables if is_about_items(table)]
    if not about:
        columns = "; ".join(f"{table.path.name}: {', '.join(table.columns)}" for table in tables)
        return UserError(
            f"{folder}: no table with an id and with titles or texts of items ({columns}): add one, or call its "
            "columns id and title"
        )
    items = about[0]
    others = [table for table in tables if table is not items]
    if not others:
        return UserError(
            f"{items.path}: the only table: add one of judgments or clicks (query, item) or of interactions (user, "
            "item, timestamp) that names its items by their id"
        )
    keys = id_columns(items)
    example = next((value for value in items.values(keys[0])), "") if keys else ""
    names = ", ".join(table.path.name for table in others)
    return UserError(
        f"{folder}: no column of {names} holds ids of {items.path.name} (such as {example!r} in its column "
        f"{keys[0] if keys else items.columns[0]}): add a table of judgments, clicks or "
        "interactions that names these ids"
    )


def is_about_items(table: Table) -> bool:
    """Whether a table may hold the items: it has titles or texts, and is neither a log nor about users."""
    if _is_called(table.stem, "user") or (table.named("query") and not _titles_beside_queries(table)):
        return False
    return bool(table.named("title") or texts(table, ()))


def id_columns(table: Table) -> list[str]:
    """The columns that may hold the ids of items: those with a usual name, else those whose values differ."""
    named = [column for column in table.named("id") if not _holds_objects(table, column)]
    differing = [
        column
        for column in table.columns
        if not _holds_objects(table, column)
        and (values := table.values(column))
        and len(set(values)) >= 0.9 * len(values)
        and words(values) < _WORDS
    ]
    return named or differing


def words(values: Sequence[str]) -> float:
    """The mean number of words."""
    return mean(len(value.split()) for value in values)


def texts(table: Table, without: Sequence[str]) -> list[str]:
    """The columns with texts, by their names and by the number of their words, in the table's order.

    An object counts as a whole, or, where one of its fields is left out, its other fields count one by one.

    without: columns that are left out.
    """
    named = table.named("text")
    opened = {column.rpartition(".")[0] for column in without} & set(table.given)
    return [
        column
        for column in table.columns
        if column not in without
        and column not in opened
        and (column in table.given or column.rpartition(".")[0] in opened)
        and not any(word in column.lower() for word in _NOT_TEXT)
        and (column in named or ((values := table.values(column)) and words(values) >= _WORDS))
    ]


def _links(items: Table, tables: Sequence[Table]) -> list[Link]:
    """The references of other tables to the ids of ``items``."""
    found = []
    for key in id_columns(items):
        ids = {look_alike(as_text(record.get(key))) for record, _ in items.records()}
        for events, column in ((table, column) for table in tables if table is not items for column in table.columns):
            values = [] if _holds_objects(events, column) else events.values(column)
            share = mean(look_alike(value) in ids for value in values) if values else 0.0
            if share >= _MATCHING:
                found.append(Link(items, events, key, column, share))
    return found


def _weight(link: Link) -> tuple[bool, bool, bool, float, bool, int]:
    """What makes a reference likely, the strongest reason first."""
    events, named = link.events, link.events.named("item")
    is_event = bool(events.named("query") or events.named("user"))
    # The column product_id refers to products.csv rather than to categories.csv that has the same numbers.
    same_name = link.items.stem in (one := simple(link.item).removesuffix("_id"), f"{one}s", f"{one[:-1]}ies")
    usual = named.index(link.item) if link.item in named else len(named)
    return is_event, link.item in named, same_name, link.share, simple(link.item) == simple(link.id), -usual


def _titles_beside_queries(table: Table) -> list[str]:
    """The columns with titles or texts of a table, beside its queries."""
    queries = table.named("query")
    return [column for column in [*table.named("title"), *texts(table, queries)] if column not in queries]


def _is_called(name: str, role: str) -> bool:
    """Whether a table or a column is called like one of the usual names of a role: users, customer or query_id."""
    singular = f"{name.removesuffix('ies')}y" if name.endswith("ies") else name.removesuffix("s")
    usual = {one.removesuffix("_id") for one in USUAL_NAMES[role]}
    return bool({name, singular, name.removesuffix("_id")} & usual)


def _holds_objects(table: Table, column: str) -> bool:
    return any(isinstance(record.get(column), dict) for record in table.sample)
