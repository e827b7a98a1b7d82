"""Find the items and the judgments, clicks or interactions in a user's tables, and what each column holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rec_r1.checks.new_recipe.layouts import Choice, Event, Item, Layout
from rec_r1.checks.new_recipe.tables import Table, as_text, is_table, open_table
from rec_r1.config import UserError
from rec_r1.tasks.types import look_alike

_MATCHING = 0.5  # A column refers to items if at least this share of its values are ids of items.
_WORDS = 2.0  # A column holds texts if its values have at least so many words on average.
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


def own_tables(folder: Path) -> Layout | None:
    """Tables of items and of judgments, clicks or interactions; None where no table refers to another.

    Raises UserError for a table that cannot be read.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file() and is_table(path))
    tables = [open_table(path) for path in paths]
    logs = _behaviour_logs(tables)
    tables = [table for table in tables if table not in logs]
    link = _link(tables) if not logs else None
    queries = _query_link(tables, link) if link else None
    used = (link.items, link.events, queries and queries.items) if link else ()
    unused = [table.path.name for table in tables if table not in used]
    if logs:
        items = next((table for table in tables if table.named("id") and _texts(table, ())), None)
        return None if items is None else _behaviour(items, logs)
    if link is None:
        return None
    if link.events.named("query") or queries:
        return _search(link, queries, unused)
    if link.events.named("user"):
        return _sequential(link, unused)
    return None


def _link(tables: Sequence[Table], without: str | None = None) -> Link | None:
    """The strongest reference of one table to another, or of a table with queries to its own items.

    without: a column that is not considered.
    """
    found: list[Link] = []
    for items in tables:
        if not (items.named("title") or _texts(items, ())):
            continue
        for key in _id_columns(items):
            ids = {look_alike(as_text(record.get(key))) for record, _ in items.records()}
            for events in tables:
                if events is items and not items.named("query"):
                    continue
                columns = [key] if events is items else events.columns
                for column in columns:
                    if column == without:
                        continue
                    values = events.values(column)
                    share = mean(look_alike(value) in ids for value in values) if values else 0.0
                    if share >= _MATCHING:
                        found.append(Link(items, events, key, column, share))
    if not found:
        return None

    def weight(link: Link) -> tuple[bool, bool, bool, float]:
        is_event = bool(link.events.named("query") or link.events.named("user"))
        return link.events is not link.items, is_event, link.item in link.events.named("item"), link.share

    return max(found, key=weight)


def _query_link(tables: Sequence[Table], link: Link) -> Link | None:
    """The reference of the judgments to a table of queries, where they name queries by ids."""
    others = [table for table in tables if table not in (link.items, link.events)]
    candidates = (_link([table, link.events], without=link.item) for table in others)
    return next((found for found in candidates if found and found.items is not link.events), None)


def _id_columns(table: Table) -> list[str]:
    """The columns that may hold the ids of items: those with a usual name, else those whose values differ."""
    named = table.named("id")
    differing = [
        column
        for column in table.columns
        if (values := table.values(column)) and len(set(values)) >= 0.9 * len(values) and _words(values) < _WORDS
    ]
    return named or differing


def _words(values: Sequence[str]) -> float:
    return mean(len(value.split()) for value in values)


def _texts(table: Table, without: Sequence[str]) -> list[str]:
    """The columns with texts, by their names and by the number of their words, in the table's order."""
    named = table.named("text")
    return [
        column
        for column in table.columns
        if column not in without
        and not any(word in column.lower() for word in _NOT_TEXT)
        and (column in named or ((values := table.values(column)) and _words(values) >= _WORDS))
    ]


def _titles(table: Table, id_column: str) -> list[str]:
    """The columns that may hold the title, the likeliest first."""
    named = [column for column in table.named("title") if column != id_column]
    return named or sorted(_texts(table, [id_column]), key=lambda column: mean(map(len, table.values(column))))


def _choice(key: str, question: str, options: Sequence[str]) -> list[Choice]:
    return [Choice(key, question, options)] if len(options) > 1 else []


def _item_part(table: Table, id_column: str) -> tuple[str, list[str], list[Choice]]:
    """The columns of title and texts of a table of items, and the choices that they leave open."""
    titles = _titles(table, id_column)
    if not titles:
        raise UserError(f"{table.path}: no column with titles or texts among {', '.join(table.columns)}: add one")
    texts = _texts(table, [id_column, *titles[:1]])
    return (
        titles[0],
        texts,
        _choice("task.params.columns.title", f"Which column of {table.path.name} is the title?", titles),
    )


def _reading(*tables: Table) -> dict[str, Any]:
    """`encoding` and `separator` of tables that differ from the default. Raises UserError where tables differ."""
    params: dict[str, Any] = {}
    for name, usual in (("encoding", "utf-8"), ("separator", None)):
        given = {
            getattr(table, name): table.path.name
            for table in tables
            if (name == "encoding" and table.encoding != "ascii")
            or (name == "separator" and table.path.name.removesuffix(".gz").endswith((".csv", ".tsv")))
        }
        if len(given) > 1:
            both = ", ".join(f"{file}: {value or 'comma'}" for value, file in given.items())
            raise UserError(f"{tables[0].path.parent}: files differ in their {name} ({both}): write them in one way")
        if given and (value := next(iter(given))) != usual:
            params[name] = value
    return params


def _items(table: Table, id_column: str, title: str, texts: Sequence[str]) -> list[Item]:
    return [
        Item(
            as_text(record.get(id_column)),
            as_text(record.get(title)),
            " ".join(filter(None, (as_text(record.get(name)) for name in texts))),
            where,
            tuple(name for name in texts if not as_text(record.get(name))),
        )
        for record, where in table.records()
    ]


def _search(link: Link, named: Link | None, unused: Sequence[str]) -> Layout:
    """The layout of the task catalog. named: the link to a table of queries, if the judgments name queries by ids."""
    items, events = link.items, link.events
    title, texts, choices = _item_part(items, link.id)
    queries = [named.item] if named else [column for column in events.named("query") if column != link.item]
    if events is items:  # One table has items and queries. A query is no text of its item.
        texts = [column for column in texts if column not in queries]
    columns = {"id": link.id, "title": title, "query": queries[0], "item": link.item}
    choices += _choice("task.params.columns.query", f"Which column of {events.path.name} is the query?", queries)
    params: dict[str, Any] = {"items": items.path.name, "judgments": events.path.name}
    params |= _reading(items, events, *([named.items] if named else []))
    texts_of: dict[str, str] | None = None
    if named:
        text = (named.items.named("query") or _texts(named.items, [named.id]))[0]
        params["queries"] = named.items.path.name
        columns |= {"query_id": named.id, "query_text": text}
        texts_of = {as_text(r.get(named.id)): as_text(r.get(text)) for r, _ in named.items.records()}
    grades, more = _grades(events)
    choices += more
    columns |= grades
    params["columns"] = columns
    params["text"] = texts
    if not grades:
        params["event"] = "click"
    if "event" in grades:
        params["grades"] = _grades_of_events(events.values(grades["event"]))
    dates = events.named("time")
    if splits := events.named("split"):
        columns["split"] = splits[0]
    graded = columns.get("grade")
    found = [
        Event(
            as_text(record.get(link.item)),
            where,
            given if texts_of is None else texts_of.get(given),
            None if texts_of is None else given,
            grade=record.get(graded) if graded else None,
            time=record.get(dates[0]) if dates else None,
        )
        for record, where in events.records()
        for given in [as_text(record.get(columns["query"]))]
    ]
    files = [
        f"{items.path.name}: items; id={link.id}, title={title}" + (f", text=[{', '.join(texts)}]" if texts else ""),
        f"{events.path.name}: {'judgments' if graded else 'clicks'}; "
        + ", ".join(f"{role}={column}" for role, column in columns.items() if role not in ("id", "title"))
        + (f"; the times in {dates[0]} are not used" if dates else ""),
    ]
    return Layout("catalog", params, files, _items(items, link.id, title, texts), found, None, choices, unused)


def _grades(events: Table) -> tuple[dict[str, str], list[Choice]]:
    """The columns that grades come from: of a grade, of an event's name, or of counts."""
    grade, event = events.named("grade"), events.named("event")
    counts = {role: named[0] for role in ("clicks", "purchases") if (named := events.named(role))}
    if grade:
        return {"grade": grade[0]}, _choice(
            "task.params.columns.grade", f"Which column of {events.path.name} is the grade?", grade
        )
    if event:
        return {"event": event[0]}, []
    return counts, []


def _grades_of_events(values: Sequence[str]) -> dict[str, float]:
    """event -> grade: 3 for an event that is named as a purchase, 2 for a cart, 1 for a click; others are left out."""
    found: dict[str, float] = {}
    for value in dict.fromkeys(values):
        name = value.lower()
        if any(word in name for word in ("purchase", "buy", "bought", "order", "conversion")):
            found[value] = 3.0
        elif any(word in name for word in ("cart", "basket", "wish", "save")):
            found[value] = 2.0
        elif "click" in name:
            found[value] = 1.0
    return found or dict.fromkeys(values, 1.0)


def _sequential(link: Link, unused: Sequence[str]) -> Layout:
    """The task sequential: items, and interactions or sessions."""
    items, events = link.items, link.events
    title, texts, choices = _item_part(items, link.id)
    users, times = events.named("user"), events.named("time")
    history = next((name for name in events.columns if isinstance(events.sample[0].get(name), list)), None)
    columns = {"user": users[0], "item": link.item, "id": link.id, "title": title}
    params: dict[str, Any] = {"interactions": events.path.name, "items": items.path.name, "columns": columns}
    if history is not None:
        params["layout"] = "sessions"
    elif times:
        columns["time"] = times[0]
    else:
        raise UserError(
            f"{events.path}: user {users[0]} and item {link.item}, and no column with times among "
            f"{', '.join(events.columns)}: add one, so that histories have an order"
        )
    reading = _reading(items, events)
    if reading:
        written = ", ".join(f"{key} {value}" for key, value in reading.items())
        raise UserError(
            f"{events.path}: {written}: the task sequential reads UTF-8, with commas in .csv and tabs in .tsv: convert "
            "the files"
        )
    if texts:
        params["text"] = texts
    choices += _choice("task.params.columns.user", f"Which column of {events.path.name} is the user?", users)
    found = [
        Event(
            as_text(record.get(link.item)),
            where,
            user=as_text(record.get(users[0])),
            history=record.get(history) if history else None,
            time=record.get(times[0]) if times and history is None else None,
        )
        for record, where in events.records()
    ]
    files = [
        f"{items.path.name}: items; id={link.id}, title={title}",
        f"{events.path.name}: {'sessions' if history else 'interactions'}; user={users[0]}, item={link.item}",
    ]
    return Layout("sequential", params, files, _items(items, link.id, title, ()), found, None, choices, unused)


def _behaviour_logs(tables: Sequence[Table]) -> list[Table]:
    """ubi_queries and ubi_events of OpenSearch's User Behavior Insights; [] where they are not both there."""
    queries = next((table for table in tables if {"query_id", "user_query"} <= set(table.columns)), None)
    events = next(
        (table for table in tables if {"query_id", "action_name", "event_attributes"} <= set(table.columns)), None
    )
    return [queries, events] if queries and events else []


def _behaviour(items: Table, logs: Sequence[Table]) -> Layout:
    queries, events = logs
    id_column = items.named("id")[0]
    title, texts, choices = _item_part(items, id_column)
    texts_of = {as_text(r.get("query_id")): as_text(r.get("user_query")) for r, _ in queries.records()}
    found = []
    for record, where in events.records():
        what = (record.get("event_attributes") or {}).get("object") or {}
        if what.get("object_id") is None:
            continue
        query = as_text(record.get("query_id"))
        found.append(Event(as_text(what["object_id"]), where, texts_of.get(query), query, time=record.get("timestamp")))
    params = {
        "layout": "ubi",
        "items": items.path.name,
        "queries": queries.path.name,
        "judgments": events.path.name,
        "columns": {"id": id_column, "title": title},
        "text": texts,
        "grades": _grades_of_events(events.values("action_name")),
    }
    files = [f"{items.path.name}: items", f"{queries.path.name}, {events.path.name}: User Behavior Insights"]
    return Layout("catalog", params, files, _items(items, id_column, title, texts), found, None, choices)
