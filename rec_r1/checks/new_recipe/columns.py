"""Find the items and the judgments, clicks or interactions in a user's tables, and what each column holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rec_r1.checks.new_recipe.grades import Grades, grades_of, grades_of_events
from rec_r1.checks.new_recipe.layouts import Choice, Event, Item, Layout, open_choice
from rec_r1.checks.new_recipe.links import (
    Link,
    id_columns,
    is_about_items,
    no_link,
    queries_by_contents,
    query_link,
    strongest_link,
    texts,
)
from rec_r1.checks.new_recipe.tables import GUESSED_ENCODING, Table, all_values, as_text, is_table, open_table
from rec_r1.config import UserError
from rec_r1.tasks import published
from rec_r1.tasks.tables import value_of

_NAMED = 8  # A line names so many columns or events, and the number of the others.


def own_tables(folder: Path) -> Layout | None:
    """Tables of items and of judgments, clicks or interactions; None where the folder has no table.

    Raises UserError for a table that cannot be read, and where no table refers to another.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file() and is_table(path))
    tables = [open_table(path) for path in paths]
    if not tables:
        return None
    logs = _behaviour_logs(tables)
    tables = [table for table in tables if table not in logs]
    if logs:
        return _behaviour(folder, tables, logs)
    link = strongest_link(tables)
    if link is None:
        raise no_link(folder, tables)
    if link.items is not link.events and (
        link.id in link.events.values(link.item) or link.item in link.items.values(link.id)
    ):
        raise UserError(
            f"{folder}: the first lines of {link.items.path.name} and {link.events.path.name} should name the columns, "
            f"but {link.id!r} and {link.item!r} look like ids: write the names of the columns above the first rows"
        )
    queries = query_link(tables, link)
    used = (link.items, link.events, queries and queries.items)
    unused = [table.path.name for table in tables if table not in used]
    named = [queries.item] if queries else [column for column in link.events.named("query") if column != link.item]
    if not named and not link.events.named("user"):
        named = queries_by_contents(link)
    if named:
        return _search(link, queries, named, unused)
    if link.events.named("user"):
        return _sequential(link, unused)
    raise UserError(
        f"{link.events.path}: its column {link.item} names the items of {link.items.path.name}, and none of its "
        f"columns {', '.join(link.events.columns)} is called query or user: rename the column with queries or users"
    )


def _titles(table: Table, id_column: str) -> list[str]:
    """The columns that may hold the title, the likeliest first."""
    named = [column for column in table.named("title") if column != id_column]
    return named or sorted(texts(table, [id_column]), key=lambda column: mean(map(len, table.values(column))))


def _item_part(table: Table, id_column: str) -> tuple[str, list[str], list[Choice]]:
    """The columns of title and texts of a table of items, and the choices that they leave open."""
    titles = _titles(table, id_column)
    if not titles:
        raise UserError(f"{table.path}: no column with titles or texts among {', '.join(table.columns)}: add one")
    others = texts(table, [id_column, *titles[:1]])
    return (
        titles[0],
        others,
        open_choice("task.params.columns.title", f"Which column of {table.path.name} is the title?", titles),
    )


def _reading(*tables: Table) -> dict[str, Any]:
    """`encoding` and `separator` of tables that differ from the default. Raises UserError where tables differ."""
    params: dict[str, Any] = {}
    two_bytes = any(table.encoding == "utf-16" for table in tables)  # Other encodings read ASCII as it is.
    encodings: dict[str | None, str] = {
        table.encoding: table.path.name
        for table in tables
        if table.kind != "parquet" and (two_bytes or table.encoding != "ascii")
    }
    separators: dict[str | None, str] = {
        table.separator: table.path.name for table in tables if table.kind in ("csv", "tsv")
    }
    for name, usual, given in (("encoding", "utf-8", encodings), ("separator", None, separators)):
        if len(given) > 1:
            both = ", ".join(f"{file}: {value or 'comma'}" for value, file in given.items())
            raise UserError(f"{tables[0].path.parent}: files differ in their {name} ({both}): write them in one way")
        if given and (value := next(iter(given))) != usual:
            params[name] = value
    return params


def _items(table: Table, id_column: str, title: str, bodies: Sequence[str]) -> list[Item]:
    return [
        Item(
            as_text(record.get(id_column)),
            as_text(record.get(title)),
            " ".join(filter(None, (as_text(record.get(name)) for name in bodies))),
            where,
            tuple(name for name in bodies if not as_text(record.get(name))),
        )
        for record, where in table.records()
    ]


def _search(link: Link, named: Link | None, queries: Sequence[str], unused: Sequence[str]) -> Layout:
    """The layout of the task catalog.

    named: the link to a table of queries, if the judgments name queries by ids. None = they hold the texts.
    queries: the columns of the judgments that may be the query.
    """
    items, events = link.items, link.events
    title, bodies, choices = _item_part(items, link.id)
    own = {link.id, title} if events is items else set()
    grades = grades_of(events, {link.item, *queries, *own})
    if events is items:  # A query is no text of its item, and neither is its grade.
        bodies = [column for column in bodies if column not in (*queries, *grades.columns.values())]
        own |= {*bodies}
    columns = {"id": link.id, "title": title, "query": queries[0], "item": link.item}
    choices += open_choice("task.params.columns.query", f"Which column of {events.path.name} is the query?", queries)
    choices += grades.choices
    params: dict[str, Any] = {"items": items.path.name, "judgments": events.path.name}
    params |= _reading(items, events, *([named.items] if named else []))
    texts_of: dict[str, str] | None = None
    if named:
        text = (named.items.named("query") or texts(named.items, [named.id]))[0]
        params["queries"] = named.items.path.name
        columns |= {"query_id": named.id, "query_text": text}
        texts_of = {as_text(r.get(named.id)): as_text(r.get(text)) for r, _ in named.items.records()}
    columns |= grades.columns
    params |= {"columns": columns, "text": bodies, **grades.params}
    if splits := [column for column in events.named("split") if _names_splits(all_values(events, column))]:
        columns["split"] = splits[0]
    found, ignored = _counted(events, columns, texts_of, grades)
    roles = {role: column for role, column in columns.items() if role not in ("id", "title")}
    read = {column for role, column in roles.items() if role not in ("query_id", "query_text")}
    files = [
        f"{items.path.name}: items; id={link.id}, title={title}" + (f", text=[{', '.join(bodies)}]" if bodies else ""),
        f"{events.path.name}: {'judgments' if 'grade' in columns else 'clicks'}; "
        + ", ".join(f"{role}={column}" for role, column in roles.items())
        + _unused_columns(events, read | own),
        *_ungraded(events, ignored),
    ]
    return Layout(
        "catalog", params, files, _items(items, link.id, title, bodies), found, None, choices, unused,
        grades.findings, grades.notes,
    )  # fmt: skip


def _counted(
    events: Table, columns: Mapping[str, str], texts_of: Mapping[str, str] | None, grades: Grades
) -> tuple[list[Event], Counter[str]]:
    """The events that the task counts, and the names of the others, which it ignores.

    columns: what a column is for -> its name.
    texts_of: query id -> text, if the events name queries by ids. None = they hold the texts.
    """
    dates, found, ignored = events.named("time"), [], Counter[str]()
    for record, where in events.records():
        name = as_text(record.get(columns.get("event", "")))
        if not grades.counts(name):
            ignored[name] += 1
            continue
        given = as_text(record.get(columns["query"]))
        found.append(
            Event(
                as_text(record.get(columns["item"])),
                where,
                given if texts_of is None else texts_of.get(given),
                None if texts_of is None else given,
                grade=grades.grade(record.get(columns["grade"])) if "grade" in columns else None,
                time=record.get(dates[0]) if dates else None,
                cells=events.cells(record),
            )
        )
    return found, ignored


def _unused_columns(events: Table, used: Container[str]) -> str:
    """What the line about a table says about its columns that the task does not read. used: the others."""
    opened = {column.rpartition(".")[0] for column in events.columns if column in used}
    rest = [column for column in events.given if column and column not in used and column not in opened]
    return f"; columns that are not used: {_first(rest)}" if rest else ""


def _ungraded(events: Table, ignored: Counter[str]) -> list[str]:
    """The line about the events that the task ignores. ignored: their names."""
    names = [f"{name or 'no name'} ({count:,})" for name, count in ignored.items()]
    return [f"{events.path.name}: events that count for nothing: {_first(names)}"] if names else []


def _first(names: Sequence[str]) -> str:
    """The first of several names, and how many others there are."""
    rest = f" and {len(names) - _NAMED} others" if len(names) > _NAMED + 1 else ""
    return ", ".join(names[:_NAMED] if rest else names) + rest


def _names_splits(values: Sequence[str]) -> bool:
    """Whether values name train and test, and nothing that is no split."""
    named = {published.NAMES.get(value.casefold()) for value in values}
    return None not in named and {"train", "test"} <= named


def _sequential(link: Link, unused: Sequence[str]) -> Layout:
    """The task sequential: items, and interactions or sessions."""
    items, events = link.items, link.events
    title, bodies, choices = _item_part(items, link.id)
    users, times = events.named("user"), events.named("time")
    lists = [name for name in events.columns if any(isinstance(record.get(name), list) for record in events.sample)]
    history = "history" if "history" in lists else None
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
            + (f", or rename {lists[0]} to history if it lists the items that were chosen before" if lists else "")
        )
    inside = [name for name in (*columns.values(), *bodies) if name not in {*items.given, *events.given}]
    if inside:
        raise UserError(
            f"{events.path.parent}: {', '.join(inside)}: the task sequential reads no fields inside of objects: write "
            "them as columns of their own"
        )
    reading = _reading(items, events)
    if reading:
        guess = " (a guess)" if reading.get("encoding") == GUESSED_ENCODING else ""
        written = ", ".join(f"{key} {value}{guess if key == 'encoding' else ''}" for key, value in reading.items())
        raise UserError(
            f"{events.path}: {written}: the task sequential reads UTF-8, with commas in .csv and tabs in .tsv: convert "
            "the files"
        )
    if bodies:
        params["text"] = bodies
    choices += open_choice("task.params.columns.user", f"Which column of {events.path.name} is the user?", users)
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
        f"{events.path.name}: {'sessions' if history else 'interactions'}; user={users[0]}, item={link.item}"
        + _unused_columns(events, {*columns.values(), *([history] if history else [])}),
    ]
    return Layout("sequential", params, files, _items(items, link.id, title, ()), found, None, choices, unused)


def _behaviour_logs(tables: Sequence[Table]) -> list[Table]:
    """ubi_queries and ubi_events of OpenSearch's User Behavior Insights; [] where they are not both there."""
    queries = next((table for table in tables if {"query_id", "user_query"} <= set(table.columns)), None)
    events = next(
        (table for table in tables if {"query_id", "action_name", "event_attributes"} <= set(table.columns)), None
    )
    return [queries, events] if queries and events else []


def _behaviour(folder: Path, tables: Sequence[Table], logs: Sequence[Table]) -> Layout:
    queries, events = logs
    items = next((table for table in tables if is_about_items(table) and id_columns(table)), None)
    if items is None:
        raise UserError(
            f"{folder}: {queries.path.name} and {events.path.name}, and no table of items with an id and a title: add "
            "the one that you indexed"
        )
    id_column = id_columns(items)[0]
    title, bodies, choices = _item_part(items, id_column)
    texts_of = {as_text(r.get("query_id")): as_text(r.get("user_query")) for r, _ in queries.records()}
    grades = grades_of_events(all_values(events, "action_name"), f"{events.path}: column action_name")
    found, ignored = [], Counter[str]()
    for record, where in events.records():
        if (name := as_text(record.get("action_name"))) not in grades:
            ignored[name] += 1
            continue
        item, query = as_text(value_of(record, "event_attributes.object.object_id")), as_text(record.get("query_id"))
        time, cells = record.get("timestamp"), events.cells(record)
        found.append(Event(item, where, texts_of.get(query), query, time=time, cells=cells))
    if not any(event.item for event in found):
        raise UserError(
            f"{events.path}: no event has event_attributes.object.object_id: write the id of the item there, in objects"
        )
    params = {
        "layout": "ubi",
        "items": items.path.name,
        "queries": queries.path.name,
        "judgments": events.path.name,
        "columns": {"id": id_column, "title": title},
        "text": bodies,
        "grades": grades,
        **_reading(items, queries, events),
    }
    files = [
        f"{items.path.name}: items",
        f"{queries.path.name}, {events.path.name}: User Behavior Insights",
        *_ungraded(events, ignored),
    ]
    return Layout("catalog", params, files, _items(items, id_column, title, bodies), found, None, choices)
