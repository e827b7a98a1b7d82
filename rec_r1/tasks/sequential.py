"""Sequential recommendation: predict the item that a user chooses next from the items that the user chose before.

The loader reads any file of interactions (user, item, time) with a file of items, Amazon Reviews 2023, MovieLens (100K,
1M, 20M and later, and RecBole's files), and sessions (user, history, next). The raw query is the history's last title.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rec_r1.config import TaskConfig, UserError, read_params
from rec_r1.console import number_of, progress
from rec_r1.tasks import published
from rec_r1.tasks.columns import refuse_missing
from rec_r1.tasks.events import Times, once
from rec_r1.tasks.integrity import SPLITS, log_look_alikes
from rec_r1.tasks.query_pools import make_catalog
from rec_r1.tasks.raw_files import Record, find_file, identifier, number, plain, read, task_folder, value
from rec_r1.tasks.sequences import PUBLISHED, Interaction, Session, Splitting, examples, from_sessions
from rec_r1.tasks.task_cache import prepared
from rec_r1.tasks.types import Task, unknown
from retrievers import Catalog

READS: tuple[str, ...] = ("path",)  # Which of task.path and task.splits this task reads.
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """The names and columns of a dataset's files.

    interactions, items: patterns of the files' names, tried in order.
    user, item, time: the columns of the interactions. Sessions have no time, and ``item`` is the item chosen next.
    id, title: the columns of the items.
    text: the fields of an item that are indexed after its title.
    separator, item_separator: the text between two fields. None = by the ending of the file.
    names, item_names: the columns of a file without a header. () = its first line is a header.
    encoding: of all files.
    """

    interactions: tuple[str, ...]
    items: tuple[str, ...]
    user: str = "user"
    item: str = "item"
    time: str = "timestamp"
    id: str = "id"
    title: str = "title"
    text: tuple[str, ...] = ()
    separator: str | None = None
    item_separator: str | None = None
    names: tuple[str, ...] = ()
    item_names: tuple[str, ...] = ()
    encoding: str = "utf-8"


_ML_100K = ("movie_id", "title", "release_date", "video_date", "url", *(f"genre_{i}" for i in range(19)))
LAYOUTS = {
    "interactions": Layout(
        ("interactions.jsonl", "interactions.csv", "interactions.tsv", "interactions.parquet"),
        ("items.jsonl", "items.csv", "items.tsv", "items.parquet"),
    ),
    "sessions": Layout(("interactions.jsonl", "sessions.jsonl"), ("items.jsonl",), item="next"),
    # The reviews of one category. {category} is replaced by task.params.category.
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
    """`task.params`."""

    # Which files and columns the data have: interactions, sessions, amazon2023, ml-100k, ml-1m, ml-latest or
    # recbole.
    layout: str = "interactions"
    category: str | None = None  # For amazon2023: the category, such as All_Beauty.
    interactions: str | None = None  # The name of the file of interactions, where it is not the layout's.
    items: str | None = None  # The name of the file of items, where it is not the layout's.
    # The names of your columns, where they are not the layout's: {user: …, item: …, time: …, id: …, title: …}.
    columns: dict[str, str] = field(default_factory=dict)
    text: list[str] | None = None  # The fields of an item that are indexed behind its title. null: the layout's.
    min_rating: float | None = None  # Interactions with a lower `rating` are left out. null: all count.
    part_column: str | None = None  # The column that names the split of each line: train, valid (or dev), test.
    # A file of interactions for each split: {train: …, validation: …, test: …}.
    parts: dict[str, str] = field(default_factory=dict)


def settings(config: TaskConfig) -> Params:
    """The parameters of the sequential task, with all defaults filled in.

    config: the recipe's section `task`. For another task than `sequential`, all values are defaults.

    ``split`` of the result is "published" where the data have their own splits. Raises UserError for a parameter that
    does not exist.
    """
    params: Params = read_params(Params, config.params if config.name == "sequential" else {}, "task.params")
    usual = "by_user" if params.layout == "sessions" else "leave_one_out"
    split = PUBLISHED if params.parts or params.part_column else params.split or usual
    return dataclasses.replace(params, split=split)


def load(config: TaskConfig) -> Task:
    """Load the task of a recipe's section `task`. Raises UserError, with file and line, for data that it cannot use."""
    params: Params = read_params(Params, config.params, "task.params")
    params.check()
    layout = _layout(params)
    wanted = [*layout.interactions, *layout.items, *params.parts.values()]
    folder = task_folder(config, f"the files of layout {params.layout}", wanted)
    if params.parts:
        interactions = {p: find_file(folder, [params.parts[p]], f"{p} interactions") for p in SPLITS}
    else:
        patterns = [params.interactions] if params.interactions else layout.interactions
        interactions = {"": find_file(folder, patterns, "interactions")}
    items = find_file(folder, [params.items] if params.items else layout.items, "items")
    # The name comes from the path, because the folder of a dataset of the hub is named by a hash.
    name = str(config.path).rpartition("/")[2] if str(config.path).startswith("hub:") else folder.resolve().name
    name = f"{name}-{params.category}" if params.category else name
    files = [*dict.fromkeys(interactions.values()), items]
    return prepared(config, files, lambda: _build(name, interactions, items, layout, params))


def _layout(params: Params) -> Layout:
    if params.layout not in LAYOUTS:
        raise UserError(f"task.params.layout: {params.layout!r}: choose from {', '.join(LAYOUTS)}")
    layout = LAYOUTS[params.layout]
    if params.layout == "amazon2023" and not params.category:
        raise UserError("task.params.category: not set: name one of Amazon Reviews 2023, such as All_Beauty")
    if params.lines_in_order and params.layout != "sessions":
        raise UserError("task.params.lines_in_order: it is for layout sessions only, which has no times: leave it out")
    _check_published(params)
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


def _check_published(params: Params) -> None:
    """Raise UserError for settings that contradict published splits."""
    if params.parts and set(params.parts) != set(SPLITS):
        raise UserError(
            f"task.params.parts: got {', '.join(params.parts)}: name a file for each of {', '.join(SPLITS)}"
        )
    for key in ("split", "interactions", "part_column"):
        if params.parts and getattr(params, key) is not None:
            raise UserError(f"task.params.{key}: task.params.parts names the file of each split: leave {key} out")
    if params.part_column is not None and params.split is not None:
        raise UserError("task.params.split: task.params.part_column names the split of each line: leave split out")


def _build(name: str, files: Mapping[str, Path], items: Path, layout: Layout, params: Params) -> Task:
    catalog = _catalog(items, layout)
    source = ", ".join(str(path) for path in dict.fromkeys(files.values()))
    has_splits = bool(params.parts or params.part_column)
    if params.layout == "sessions":
        sessions = once(_sessions(files, layout, params, catalog), source, "lines", lambda one: one._replace(where=""))
        if has_splits:
            return published.from_sessions(name, catalog, sessions, params)
        return from_sessions(name, catalog, sessions, params)
    found = once(_interactions(files, layout, params, catalog), source, "events (user, item, time)")
    if has_splits:
        return published.from_interactions(name, catalog, found, params)
    interactions = [interaction for interaction, _ in found]
    if params.split in (None, "leave_one_out"):
        _warn_of_equal_times(interactions, source)
    return examples(name, catalog, interactions, params)


def _warn_of_equal_times(interactions: Sequence[Interaction], source: str) -> None:
    """Log a warning where equal times leave it to the order of the lines which interactions are held out."""
    times: dict[str, list[float]] = {}
    for interaction in interactions:
        times.setdefault(interaction.user, []).append(interaction.time)
    last = [sorted(own)[-3:] for own in times.values() if len(own) >= 3]
    equal = sum(len(set(three)) < 3 for three in last)
    if equal:
        logger.warning(
            "%s: %s of %s users have equal times among their last three events, so that the order of the lines decides "
            "which of these are held out for validation and test: give finer times where you have them",
            source, f"{equal:,}", f"{len(last):,}",
        )  # fmt: skip


def _split_of(file_split: str, record: Record, where: str, params: Params) -> str:
    """The published split of a line: that of its file, or the value of its column. "" = there are none."""
    if params.part_column is None:
        return file_split
    return published.split_of(value(record, params.part_column, where), where)


def _catalog(path: Path, layout: Layout) -> Catalog:
    wanted = [
        ("task.params.columns.id", layout.id),
        ("task.params.columns.title", layout.title),
        *(("task.params.text", column) for column in layout.text),
    ]

    def records() -> Any:
        lines = read(path, layout.item_separator, layout.item_names, layout.encoding)
        untitled = 0
        for record, where in progress(lines, path.name, "items"):
            refuse_missing(record, where, wanted)
            name = identifier(record, layout.id, where)
            title = plain(record[layout.title])
            untitled += not title
            body = [plain(record[name]) for name in layout.text]
            yield {"id": name, "text": " ".join([title, *body]).strip(), "title": title or name}
        if untitled:
            logger.warning(
                "%s: %s",
                path,
                number_of(
                    untitled,
                    "item has no title, so its id is used as a title",
                    "items have no title, so their ids are used as titles",
                ),
            )

    return make_catalog(str(path), records())


def _row(record: Record, key: str, where: str, known: dict[str, int], path: Path) -> int:
    """The row of the item in a column. known: item id -> row. Raises UserError for an unknown item."""
    name = identifier(record, key, where)
    if name not in known:
        raise UserError(
            f"{where}: item {unknown([name], known)} is not in the catalogue: add it to the items, or remove the line"
        )
    return known[name]


def _interactions(
    files: Mapping[str, Path], layout: Layout, params: Params, catalog: Catalog
) -> list[tuple[Interaction, str]]:
    """The interactions of all files, each with its published split or ""."""
    known = {name: row for row, name in enumerate(catalog.ids)}
    found = []
    source = ", ".join(map(str, files.values()))
    times, left_out = Times(source, layout.time), 0
    wanted = [
        ("task.params.columns.user", layout.user),
        ("task.params.columns.item", layout.item),
        ("task.params.columns.time", layout.time),
        *_part_column(params),
    ]
    for file_split, path in files.items():
        lines = read(path, layout.separator, layout.names, layout.encoding)
        for record, where in progress(lines, path.name, "interactions"):
            refuse_missing(record, where, wanted)
            if not _rated(record, where, params):
                continue
            user, time = identifier(record, layout.user, where), times.read(record, where)
            item = identifier(record, layout.item, where)
            if item not in known:
                if not params.drop_unknown:
                    raise UserError(
                        f"{where}: item {unknown([item], known)} is not in the catalogue: add it to the items, or set "
                        "task.params.drop_unknown=true to leave out such interactions"
                    )
                left_out += 1
                continue
            found.append((Interaction(user, known[item], time), _split_of(file_split, record, where, params)))
    times.check()
    if left_out:
        logger.warning(
            "%s: %s",
            source,
            number_of(
                left_out,
                "interaction with an item that is not in the catalogue is left out",
                "interactions with items that are not in the catalogue are left out",
            ),
        )
    log_look_alikes(source, "users", dict.fromkeys(interaction.user for interaction, _ in found))
    return found


def _part_column(params: Params) -> list[tuple[str, str]]:
    """(setting, column) of the column of published splits, where it is set."""
    return [("task.params.part_column", params.part_column)] if params.part_column is not None else []


def _rated(record: Record, where: str, params: Params) -> bool:
    """Whether the rating is at least `min_rating`. Raises UserError where there is no column of ratings."""
    if params.min_rating is None:
        return True
    rating = next((key for key in ("rating", "rating:float") if key in record), None)
    if rating is None:
        raise UserError(f"{where}: task.params.min_rating needs a column rating, and there is none: leave it out")
    return number(record, rating, where) >= params.min_rating


def _sessions(files: Mapping[str, Path], layout: Layout, params: Params, catalog: Catalog) -> list[Session]:
    """The lines of all files."""
    wanted = [
        ("task.params.columns.user", layout.user),
        ("task.params.columns.item", layout.item),
        *_part_column(params),
    ]
    known = {name: row for row, name in enumerate(catalog.ids)}
    found = []
    for file_split, path in files.items():
        for record, where in read(path, layout.separator, layout.names, layout.encoding):
            refuse_missing(record, where, wanted)
            history = value(record, "history", where)
            if not isinstance(history, list) or not history:
                raise UserError(f"{where}: 'history' must be a list of item ids, oldest first, got {history!r}")
            rows = tuple(_row({"history": item}, "history", where, known, path) for item in history)
            user, target = identifier(record, layout.user, where), _row(record, layout.item, where, known, path)
            found.append(Session(user, rows, target, _split_of(file_split, record, where, params), where))
    return found
