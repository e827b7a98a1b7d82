"""Amazon's categories, which have several names: "Video_Games", "Video Games" and "Games" are the same category."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from rec_r1.config import UserError
from rec_r1.tasks.raw_files import identifier, matches, present, read, watched

UNKNOWN = "unknown"
_PAIR = re.compile(r'"([^"\\]+)"\s*:\s*"([^"\\]*)"')
# Amazon-C4 shortens the names of Amazon Reviews 2023, and so do some items of Amazon Reviews 2023 ("Baby"). "Care" is
# left out, because it could mean two categories.
_FULL_NAMES = {
    "games": "video games",
    "baby": "baby products",
    "office": "office products",
    "sports": "sports outdoors",
    "home": "home kitchen",
    "clothing": "clothing shoes jewelry",
    "tools": "tools home improvement",
}


def canonical(name: str) -> str:
    """The normal form of a category's name: its lower-case words without "and", or the full name for a short one."""
    words = " ".join(word for word in re.findall(r"[^\W\d_]+", name.casefold()) if word != "and")
    return _FULL_NAMES.get(words, words)


def fitting(wanted: Sequence[str], there: Collection[str], setting: str, what: str) -> set[str]:
    """The labels in ``there`` that have a wanted name, whichever of its spellings is used.

    wanted: the names from the recipe.
    there: the categories of the data.
    setting: the recipe's key, for the message.
    what: "item" or "test query", for the message.

    Raises UserError for a name that is the category of none.
    """
    for name in wanted:
        if canonical(str(name)) not in set(map(canonical, there)):
            choices = ", ".join(sorted(there)) or "none"
            raise UserError(f"{setting}: no {what} has the category {name!r}: choose from {choices}")
    names = {canonical(str(name)) for name in wanted}
    return {label for label in there if canonical(label) in names}


def read_categories(
    paths: Iterable[Path], ids: Collection[str], id_column: str, category_column: str
) -> dict[str, str]:
    """The category of each id that has one in the files. Of several the first counts.

    paths: the files of categories.
    ids: the ids to look up.
    id_column, category_column: the names of the files' columns.
    """
    found: dict[str, str] = {}
    for path in paths:
        for item, label in _pairs(path, id_column, category_column):
            if item in ids and label:
                found.setdefault(item, label)
    return found


def _pairs(path: Path, id_column: str, category_column: str) -> Iterator[tuple[str, str]]:
    """Pairs of an id and its category, which is "" where the file has none."""
    if path.name.startswith("asin2category.json"):
        # In Amazon Reviews 2023 this file is one JSON object of 35 million items on one line, too large for memory.
        yield from ((match[1], match[2]) for match in matches(path, _PAIR))
        return
    records = read(path, columns=[id_column, category_column])
    for record, where in watched(records, path, "items"):
        label = present(record, category_column, where)
        # Amazon's own metadata lack the category of many items.
        yield identifier(record, id_column, where), "" if label is None else str(label).strip()
