"""Missing columns of a user's files: the setting that names each, and the column that is probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from rec_r1.config import refuse

# What columns are often called, by what they hold.
USUAL = {
    "user": ("user", "customer", "visitor", "member", "reviewer", "session", "uid"),
    "item": ("item", "product", "sku", "asin", "movie", "article", "track", "book", "iid"),
    "id": ("id", "item", "product", "sku", "asin", "movie", "article"),
    "time": ("time", "date", "created", "when", "ts"),
    "title": ("title", "name", "label"),
}


def refuse_missing(record: Mapping[str, Any], where: str, wanted: Iterable[tuple[str, str]]) -> None:
    """Raise UserError with one line for each column that a record lacks, and with the setting to change.

    record: the first record of a file.
    where: its file and line.
    wanted: (setting, column) of each column that is read. A setting such as task.params.columns.user names one column,
        and task.params.text a list of them.
    """
    missing = [(setting, column) for setting, column in wanted if column not in record]
    if missing:
        there = ", ".join(map(str, record)) or "nothing"
        refuse(
            f"{where}: no column {column!r}, only {there}: {_fix(setting, column, record)}"
            for setting, column in missing
        )


def _fix(setting: str, column: str, there: Iterable[str]) -> str:
    """What to set: the column that is nearest to the missing one."""
    near = nearest(column, setting.rpartition(".")[2], there)
    return f"set {setting}=[{near}]" if setting.endswith(".text") else f"set {setting}={near}"


def nearest(column: str, holds: str, there: Iterable[str]) -> str:
    """The column that is most likely meant.

    column: the name that was looked for.
    holds: what the column holds, a key of USUAL, or anything else.
    there: the names of the columns that there are, at least one.
    """
    names = list(map(str, there))
    similar = difflib.get_close_matches(column, names, n=1, cutoff=0.6)
    if similar:
        return similar[0]
    for word in USUAL.get(holds, ()):
        for name in names:
            if word in name.lower():
                return name
    return difflib.get_close_matches(column, names, n=1, cutoff=0.0)[0]
