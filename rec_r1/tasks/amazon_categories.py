"""Amazon's categories under their several names: "Video_Games", "Video Games" and "Games" are one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from rec_r1.config import UserError
from rec_r1.tasks.raw_files import identifier, matches, present, read, watched

UNKNOWN = "unknown"
_PAIR = re.compile(r'"([^"\\]+)"\s*:\s*"([^"\\]*)"')
# Amazon-C4 shortens the names of Amazon Reviews 2023, whose items shorten some of them too ("Baby"). "Care" is not
# here: it could be two of them.
_SHORT = {
    "games": "video games",
    "baby": "baby products",
    "office": "office products",
    "sports": "sports outdoors",
    "home": "home kitchen",
    "clothing": "clothing shoes jewelry",
    "tools": "tools home improvement",
}


def canonical(name: str) -> str:
    """Letters without case; what stands between words, "and" too, does not count; short names in full."""
    words = " ".join(word for word in re.findall(r"[^\W\d_]+", name.casefold()) if word != "and")
    return _SHORT.get(words, words)


def fitting(wanted: Sequence[str], there: Collection[str], setting: str, what: str) -> set[str]:
    """Those of ``there`` that ``wanted`` name. Raises UserError, listing them, for a name that fits none."""
    for name in wanted:
        if canonical(str(name)) not in set(map(canonical, there)):
            raise UserError(f"{setting}: {name!r} fits no {what}: choose from {', '.join(sorted(there)) or 'none'}")
    names = {canonical(str(name)) for name in wanted}
    return {label for label in there if canonical(label) in names}


def read_categories(
    paths: Iterable[Path], ids: Collection[str], id_column: str, category_column: str
) -> dict[str, str]:
    """id -> category of those of ``ids`` that the files give one."""
    found: dict[str, str] = {}
    for path in paths:
        for item, label in _pairs(path, id_column, category_column):
            if item in ids and label:
                found.setdefault(item, label)
    return found


def _pairs(path: Path, id_column: str, category_column: str) -> Iterator[tuple[str, str]]:
    if path.name.startswith("asin2category.json"):
        # Amazon Reviews 2023 has this map of 35 million items as one object on one line: never in memory at once.
        yield from ((match[1], match[2]) for match in matches(path, _PAIR))
        return
    records = read(path, columns=[id_column, category_column])
    for record, where in watched(records, path, "items"):
        label = present(record, category_column, where)
        # Amazon's own metadata leave it empty for many items.
        yield identifier(record, id_column, where), "" if label is None else str(label).strip()
