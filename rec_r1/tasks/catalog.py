"""A catalogue with judgments or clicks in files of your own: products.csv and clicks.csv, or OpenSearch's UBI logs.

All files are tables: CSV, TSV, JSONL, JSON or Parquet. Grades come from a column, or are made of events by clicks.py.
`task.params` is described in catalog_settings.py.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from rec_r1.config import TaskConfig, UserError, read_params
from rec_r1.console import number_of
from rec_r1.tasks.catalog_items import Item, read_items, records
from rec_r1.tasks.catalog_judgments import Judgments, query_texts, split_by
from rec_r1.tasks.catalog_settings import JUDGMENT_COLUMNS, Params
from rec_r1.tasks.clicks import Grading
from rec_r1.tasks.query_pools import Pool, divide, keep_apart, log_counts, make_catalog, make_task
from rec_r1.tasks.raw_files import find_files, task_folder
from rec_r1.tasks.tables import Problems, Table, same_ids
from rec_r1.tasks.task_cache import prepared
from rec_r1.tasks.types import Task, unknown

logger = logging.getLogger(__name__)
READS: tuple[str, ...] = ("path",)  # The settings of `task` that this task reads, of those that not every task reads.
_ENDINGS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet")
_USUAL = {"items": ("items", "products", "catalog"), "judgments": ("judgments", "clicks", "events")}
_UBI = {"items": _USUAL["items"], "queries": ("ubi_queries",), "judgments": ("ubi_events",)}


def load(config: TaskConfig) -> Task:
    """Read the files in `task.path` as `task.params` says. Raises UserError, with one line for each kind of problem."""
    days = {k: v.isoformat() for k, v in config.params.items() if isinstance(v, datetime.date)}
    config = dataclasses.replace(config, params=config.params | days)
    params: Params = read_params(Params, config.params, "task.params")
    params.check()
    usual = _UBI if params.layout == "ubi" else _USUAL | ({"queries": ()} if params.queries else {})
    names = {what: _patterns(vars(params)[what], stems) for what, stems in usual.items()}
    patterns = list(itertools.chain(*names.values()))
    with_gz = [*patterns, *(f"{pattern}.gz" for pattern in patterns)]
    folder = task_folder(config, "a file of items and one of judgments or events", with_gz)
    files: dict[str, list[Path]] = {}
    problems = Problems()
    for what, own in names.items():
        try:
            files[what] = find_files(folder, own, f"file of {what} (task.params.{what})")
        except UserError as error:
            problems.say(str(error))
    problems.refuse()
    every = [path for paths in files.values() for path in paths]
    # A dataset of the hub lies in a folder named by a hash.
    name = str(config.path).rpartition("/")[2] if str(config.path).startswith("hub:") else folder.resolve().name
    return log_counts(prepared(config, every, lambda: _build(name, files, params)))


def _patterns(given: str | None, stems: Sequence[str]) -> list[str]:
    return [given] if given else [f"{stem}.{ending}" for stem in stems for ending in _ENDINGS]


def _build(name: str, files: Mapping[str, list[Path]], params: Params) -> Task:
    problems = Problems()
    table = _item_table(files["items"], params)
    items = read_items(table, params.duplicates, problems)
    events = _judgment_table(files["judgments"], params)
    texts = query_texts(_query_table(files["queries"], params), problems) if "queries" in files else None
    split_of = split_by(params, events.source, problems)
    judgments = Judgments(params, events.source, problems, split_of, texts).read(events)
    complete = not problems.whole  # A file that was not read to its end may have the missing items.
    renamed = same_ids(list(items), list(judgments.lines_of))
    if renamed:
        one, other = next(iter(renamed.items()))
        logger.warning(
            "%s as the same, such as %r in %s and %r in %s",
            number_of(len(renamed), "id is written in two ways and counts", "ids are written in two ways and count"),
            one, events.source, other, table.source,
        )  # fmt: skip
    lacking = judgments.lacking(items, renamed) if complete else []
    if lacking and params.unknown == "refuse":
        problems.say(_unknown(lacking, items, judgments, table.source))
    elif lacking:
        logger.warning(
            "%s: %s not in %s; %s left out, first %s",
            events.source, number_of(len(lacking), "judged item is", "judged items are"), table.source,
            number_of(
                sum(judgments.lines_of[item] for item in lacking), "line of judgments is", "lines of judgments are"
            ),
            unknown(lacking, items),
        )  # fmt: skip
    grading = Grading(params.event_grades, params.combine, params.min_count, params.levels)
    pools = judgments.pools(grading, renamed, set(lacking))
    problems.refuse()
    catalog = make_catalog(table.source, records(table.source, items))
    pools = _splits(pools, events.source, params)
    return make_task(name, catalog, pools, params, {split: f"{events.source} ({split})" for split in pools})


def _item_table(paths: Sequence[Path], params: Params) -> Table:
    titles = {"title": params.column("title")}
    needed = {"id": params.column("id"), **(titles if "title" in params.columns else {})}
    texts = {f"text:{column}": column for column in params.text}
    kept = {f"field:{column}": column for column in params.fields}
    settings = {"id": "task.params.columns.id", "title": "task.params.columns.title"}
    settings |= dict.fromkeys(texts, "task.params.text") | dict.fromkeys(kept, "task.params.fields")
    optional = {} if "title" in params.columns else titles
    return Table(paths, needed | texts | kept, optional, settings, params.encoding, params.separator)


def _judgment_table(paths: Sequence[Path], params: Params) -> Table:
    named = [use for use in JUDGMENT_COLUMNS if use in params.columns]
    uses = ["query", "item", *named]
    uses += ["grade"] if params.kind == "grades" else []
    uses += ["event"] if params.kind == "events" and params.event is None else []
    uses += ["date"] if params.starts else []
    needed = {use: params.column(use) for use in dict.fromkeys(uses)}
    optional = {"position": params.column("position")} if params.layout == "ubi" and "position" not in needed else {}
    settings = {use: f"task.params.columns.{use}" for use in needed}
    compared = params.repeated == "once"  # Two events that differ in any cell are two.
    return Table(paths, needed, optional, settings, params.encoding, params.separator, whole=compared)


def _query_table(paths: Sequence[Path], params: Params) -> Table:
    needed = {"id": params.column("query_id"), "text": params.column("query_text")}
    settings = {"id": "task.params.columns.query_id", "text": "task.params.columns.query_text"}
    return Table(paths, needed, {}, settings, params.encoding, params.separator)


def _unknown(lacking: Sequence[str], items: Mapping[str, Item], judgments: Judgments, source: str) -> str:
    lines = sum(judgments.lines_of[item] for item in lacking)
    return (
        f"{judgments.source}: {len(lacking)} of {len(judgments.lines_of)} judged items are not in {source} "
        f"({number_of(lines, 'line', 'lines')}), first: {unknown(lacking, items)}: add them to it, or set "
        "task.params.unknown=drop to leave their "
        "judgments out"
    )


def _splits(pools: Mapping[str, Pool], source: str, params: Params) -> dict[str, Pool]:
    """train, validation and test, without a text that is in two of them. Raises UserError where one is empty."""
    if "all" in pools:
        return divide({"train": pools["all"]}, params)
    for split in ("train", "test"):
        if split not in pools or not pools[split].judgments:
            there = ", ".join(f"{len(pool.judgments)} {name}" for name, pool in pools.items())
            setting = "columns.split" if "split" in params.columns else "test_from" if params.starts else "test_share"
            raise UserError(
                f"{source}: no judged query is in the {split} split (there are {there or 'none'}): change "
                f"task.params.{setting}, or add judgments"
            )
    apart = keep_apart({split: pools[split] for split in ("train", "validation", "test") if split in pools})
    return divide(apart, params)
