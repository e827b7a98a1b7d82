"""The items of a catalogue in a table of your own: their titles and texts without markup, each id once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rec_r1.console import number_of
from rec_r1.tasks.raw_files import plain
from rec_r1.tasks.tables import Problems, Table, identity
from rec_r1.tasks.types import first_words

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """An item of the catalogue.

    title: "" if it has none.
    text: the indexed text, title first.
    where: file and line.
    fields: pairs of the name and the value of each further field.
    """

    title: str
    text: str
    where: str
    fields: tuple[tuple[str, str], ...] = ()


def read_items(table: Table, duplicates: str, problems: Problems) -> dict[str, Item]:
    """id -> item, in the order of the files. What is wrong is added to ``problems``; what is left out is logged.

    table: with the columns id and title, "text:NAME" for each further part of the text, and "field:NAME" for each
        further field, in their order.
    duplicates: what to do with different items that have one id: refuse, first or last.
    """
    found: dict[str, Item] = {}
    identical = different = 0
    fix = "give each item its own id, or set task.params.duplicates to first or last to keep one of them"
    texts, kept = (
        [use for use in (*table.needed, *table.optional) if use.startswith(kind)] for kind in ("text:", "field:")
    )
    for row, _, where in table.rows(problems, "items"):
        name = identity(row["id"])
        if name is None:
            problems.add(table.source, "item without an id", "items without an id", where, "give each item one")
            continue
        title = plain(row["title"])
        text = " ".join(filter(None, [title, *(plain(row[use]) for use in texts)]))
        item = Item(title, text, where, tuple((use.removeprefix("field:"), plain(row[use])) for use in kept))
        known = found.setdefault(name, item)
        if known is item:
            continue
        if known._replace(where="") == item._replace(where=""):
            identical += 1
        elif duplicates == "refuse":
            one, many = "item has the id of a different item", "items have the id of a different item"
            problems.add(table.source, one, many, f"{name!r} at {where}", fix)
        else:
            different += 1
            found[name] = known if duplicates == "first" else item
    if identical:
        logger.warning(
            "%s: %s",
            table.source,
            number_of(
                identical, "item equals an earlier item and counts once", "items equal an earlier item and count once"
            ),
        )
    if different:
        logger.warning(
            "%s: %s the id of a different item; the %s of each id is kept",
            table.source,
            number_of(different, "item has", "items have"),
            duplicates,
        )
    if found and not any(item.text for item in found.values()):
        problems.say(
            f"{table.source}: no item has a text: name the title's column in task.params.columns.title, and further "
            "columns in task.params.text"
        )
    return found


def records(source: str, items: Mapping[str, Item]) -> Iterator[dict[str, str]]:
    """The records of the catalogue. An item without a title is shown by the first words of its text, or by its id."""
    if untitled := sum(not item.title for item in items.values()):
        logger.warning(
            "%s: %s",
            source,
            number_of(
                untitled,
                "item has no title and is shown by the first words of its text or by its id",
                "items have no title and are shown by the first words of their text or by their id",
            ),
        )
    for name, item in items.items():
        yield {
            **dict(item.fields),
            "id": name,
            "text": item.text,
            "title": item.title or first_words(item.text) or name,
        }
