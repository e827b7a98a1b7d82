"""Sequential recommendation: what a user chose, in order -> what the user chooses next.

Reads any file of interactions (user, item, time) with a file of items, Amazon Reviews 2023, MovieLens as it comes
(100K, 1M, 20M and later, RecBole's files), and sessions (user, history, next). The raw query is the last title.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rec_r1.config import TaskConfig, UserError, read_params
from rec_r1.tasks.histories import Interaction, Splitting, examples, from_sessions
from rec_r1.tasks.prepared import prepared
from rec_r1.tasks.readers import Record, find_file, identifier, moment, number, plain, read, task_folder, value
from rec_r1.tasks.types import Task
from retrievers import Catalog

READS: tuple[str, ...] = ("path",)  # of the settings in `task` that not every task reads
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How a dataset's files look. columns: what user, item, time are called (sessions: user, history, next)."""

    interactions: tuple[str, ...]  # patterns of the file's name, tried in order
    items: tuple[str, ...]
    user: str = "user"
    item: str = "item"
    time: str = "timestamp"
    id: str = "id"
    title: str = "title"
    text: tuple[str, ...] = ()  # fields indexed behind the title
    separator: str | None = None
    item_separator: str | None = None
    names: tuple[str, ...] = ()  # columns of files without a header
    item_names: tuple[str, ...] = ()
    encoding: str = "utf-8"


_ML_100K = ("movie_id", "title", "release_date", "video_date", "url", *(f"genre_{i}" for i in range(19)))
LAYOUTS = {
    "interactions": Layout(
        ("interactions.jsonl", "interactions.csv", "interactions.tsv", "interactions.parquet"),
        ("items.jsonl", "items.csv", "items.tsv", "items.parquet"),
    ),
    "sessions": Layout(("interactions.jsonl", "sessions.jsonl"), ("items.jsonl",), item="next"),
    # Reviews of one category: {category} comes from task.params.category.
    "amazon2023": Layout(
        ("benchmark/5core/rating_only/{category}.csv", "{category}.csv", "raw/review_categories/{category}.jsonl"),
        ("raw/meta_categories/meta_{category}.jsonl", "meta_{category}.jsonl"),
        user="user_id", item="parent_asin", id="parent_asin",
    ),
    "ml-100k": Layout(
        ("u.data",), ("u.item",), item="movie_id", id="movie_id", separator="\t", item_separator="|",
        names=("user", "movie_id", "rating", "timestamp"), item_names=_ML_100K, encoding="latin-1",
    ),
    "ml-1m": Layout(
        ("ratings.dat",), ("movies.dat",), item="movie_id", id="movie_id", separator="::", item_separator="::",
        names=("user", "movie_id", "rating", "timestamp"), item_names=("movie_id", "title", "genres"),
        text=("genres",), encoding="latin-1",
    ),
    "ml-latest": Layout(
        ("ratings.csv",), ("movies.csv",), user="userId", item="movieId", id="movieId", text=("genres",)
    ),
    "recbole": Layout(
        ("*.inter",), ("*.item",), user="user_id:token", item="item_id:token", time="timestamp:float",
        id="item_id:token", title="movie_title:token_seq", text=("class:token_seq",), separator="\t",
        item_separator="\t",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Params(Splitting):
    """`task.params`. The splitting's own are in histories.py; columns and files override the layout's."""

    layout: str = "interactions"
    category: str | None = None  # amazon2023: such as All_Beauty
    interactions: str | None = None  # the file's name, where the layout's patterns do not fit
    items: str | None = None
    columns: dict[str, str] = field(default_factory=dict)  # user, item, time, id, title -> the file's own names
    text: list[str] | None = None  # fields of an item that are indexed behind its title
    min_rating: float | None = None  # interactions with a lower `rating` are left out


def load(config: TaskConfig) -> Task:
    """Read `task.path` as `task.params` says. Raises UserError naming file and line for whatever does not fit."""
    params: Params = read_params(Params, config.params, "task.params")
    params.check()
    layout = _layout(params)
    folder = task_folder(config, f"the files of layout {params.layout}", [*layout.interactions, *layout.items])
    interactions = find_file(
        folder, [params.interactions] if params.interactions else layout.interactions, "interactions"
    )
    items = find_file(folder, [params.items] if params.items else layout.items, "items")
    # A dataset of the hub lies in a folder named by a hash.
    name = str(config.path).rpartition("/")[2] if str(config.path).startswith("hub:") else folder.resolve().name
    name = f"{name}-{params.category}" if params.category else name
    return prepared(config, [interactions, items], lambda: _build(name, interactions, items, layout, params))


def _layout(params: Params) -> Layout:
    if params.layout not in LAYOUTS:
        raise UserError(f"task.params.layout: {params.layout!r}: choose from {', '.join(LAYOUTS)}")
    layout = LAYOUTS[params.layout]
    if params.layout == "amazon2023" and not params.category:
        raise UserError("task.params.category: not set: name one of Amazon Reviews 2023, such as All_Beauty")
    if params.lines_in_order and params.layout != "sessions":
        raise UserError("task.params.lines_in_order: layout sessions alone has no times: leave it out")
    changes: dict[str, Any] = {
        name: tuple(pattern.replace("{category}", params.category or "") for pattern in getattr(layout, name))
        for name in ("interactions", "items")
    }
    for key, column in params.columns.items():
        if key not in ("user", "item", "time", "id", "title"):
            raise UserError(f"task.params.columns.{key}: unknown: choose from user, item, time, id, title")
        changes[key] = column
    if params.text is not None:
        changes["text"] = tuple(params.text)
    return Layout(**{**vars(layout), **changes})


def _build(name: str, interactions: Path, items: Path, layout: Layout, params: Params) -> Task:
    catalog = _catalog(items, layout)
    if params.layout == "sessions":
        return from_sessions(name, catalog, _sessions(interactions, layout, catalog), params)
    return examples(name, catalog, _interactions(interactions, layout, params, catalog), params)


def _catalog(path: Path, layout: Layout) -> Catalog:
    from tqdm import tqdm

    def records() -> Any:
        lines = read(path, layout.item_separator, layout.item_names, layout.encoding)
        untitled = 0
        for record, where in tqdm(lines, desc=path.name, unit=" items", mininterval=1):
            name = identifier(record, layout.id, where)
            missing = [name for name in (layout.title, *layout.text) if name not in record]
            if missing:
                raise UserError(f"{where}: no column {missing[0]!r}, only {', '.join(record)}: set task.params.columns")
            title = plain(record[layout.title])
            untitled += not title
            body = [plain(record[name]) for name in layout.text]
            yield {"id": name, "text": " ".join([title, *body]).strip(), "title": title or name}
        if untitled:
            logger.warning("%s: %d items have no title and go by their id", path, untitled)

    try:
        return Catalog.from_records(records())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _row(record: Record, key: str, where: str, known: dict[str, int], path: Path) -> int:
    name = identifier(record, key, where)
    if name not in known:
        raise UserError(f"{where}: item {name!r} is not among the items: add it to them, or drop the line")
    return known[name]


def _interactions(path: Path, layout: Layout, params: Params, catalog: Catalog) -> list[Interaction]:
    from tqdm import tqdm

    known = {name: row for row, name in enumerate(catalog.ids)}
    found = []
    unknown = 0
    lines = read(path, layout.separator, layout.names, layout.encoding)
    for record, where in tqdm(lines, desc=path.name, unit=" interactions", mininterval=1):
        rating = next((key for key in ("rating", "rating:float") if key in record), None)
        if params.min_rating is not None:
            if rating is None:
                raise UserError(f"{where}: task.params.min_rating needs a column rating: remove the setting")
            if number(record, rating, where) < params.min_rating:
                continue
        user, time = identifier(record, layout.user, where), moment(record, layout.time, where)
        item = identifier(record, layout.item, where)
        if item not in known:
            if not params.drop_unknown:
                raise UserError(
                    f"{where}: item {item!r} is not among the items: add it to them, or set "
                    "task.params.drop_unknown=true to leave such interactions out"
                )
            unknown += 1
            continue
        found.append(Interaction(user, known[item], time))
    if unknown:
        logger.warning("%s: %d interactions with items that are not in the catalogue are left out", path, unknown)
    return found


def _sessions(path: Path, layout: Layout, catalog: Catalog) -> list[tuple[str, tuple[int, ...], int]]:
    known = {name: row for row, name in enumerate(catalog.ids)}
    found = []
    for record, where in read(path, layout.separator, layout.names, layout.encoding):
        history = value(record, "history", where)
        if not isinstance(history, list) or not history:
            raise UserError(f"{where}: 'history' must be a list of item ids, oldest first, got {history!r}")
        rows = tuple(_row({"history": item}, "history", where, known, path) for item in history)
        found.append((identifier(record, layout.user, where), rows, _row(record, layout.item, where, known, path)))
    return found
