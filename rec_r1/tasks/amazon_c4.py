"""Amazon-C4: long questions, each written from a review of one product. That product is the query's only target.

The loader reads test.csv and sampled_item_metadata_1M.jsonl of `hub:McAuley-Lab/Amazon-C4`. As in the Rec-R1 paper, the
splits are by category: the queries of some categories are the test split, and all others are for training.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rec_r1.config import TaskConfig, UserError, read_params
from rec_r1.console import number_of
from rec_r1.tasks.amazon_categories import fitting
from rec_r1.tasks.query_pools import Carving, Pool, carve, drawn, keep_apart, log_counts, make_catalog, make_task
from rec_r1.tasks.raw_files import (
    find_file,
    identifier,
    plain,
    present,
    read,
    task_folder,
    value,
    watched,
)
from rec_r1.tasks.task_cache import prepared
from rec_r1.tasks.types import Task, first_words

READS: tuple[str, ...] = ("path",)  # Which of task.path and task.splits this task reads.
logger = logging.getLogger(__name__)
QUERIES = "test.csv"
ITEMS = "sampled_item_metadata_1M.jsonl"


@dataclass(frozen=True)
class Params(Carving):
    """`task.params`. amazon_categories.py says which names of a category mean the same: "Games" is "Video_Games"."""

    # The categories whose queries are test queries, so that training shows none of them.
    test_categories: list[str] = field(
        default_factory=lambda: ["Video_Games", "Baby_Products", "Office_Products", "Sports_and_Outdoors"]
    )
    # A catalogue of so many items: those that queries ask for, and others that are drawn. null: all items.
    max_items: int | None = None


def load(config: TaskConfig) -> Task:
    """Load the task of a recipe's section `task`. Raises UserError, with file and line, for data that it cannot use."""
    params: Params = read_params(Params, config.params, "task.params")
    params.check()
    folder = task_folder(config, f"{QUERIES} and {ITEMS}", [QUERIES, ITEMS])
    queries, items = find_file(folder, [QUERIES], "queries"), find_file(folder, [ITEMS], "items")
    return log_counts(prepared(config, [queries, items], lambda: _build(queries, items, params)))


def _build(queries: Path, path: Path, params: Params) -> Task:
    asked = Pool()
    for record, where in read(queries):
        query, text = identifier(record, "qid", where), " ".join(str(value(record, "query", where)).split())
        if query in asked.texts:
            raise UserError(f"{where}: query id {query!r} appears twice: give each query its own id")
        asked.add(query, text, where)
        asked.judge(query, identifier(record, "item_id", where), 1, where)
    item_of = {query: item for query, items in asked.judgments.items() for item in items}
    items = Items(path, set(item_of.values()), params)
    catalog = make_catalog(str(path), items)
    missing = sorted(items.relevant - items.category_of.keys())
    if missing:
        raise UserError(
            f"{path}: {len(missing)} targets of queries are missing, first: "
            f"{', '.join(map(repr, missing[:3]))}: download the file again, or remove their queries"
        )
    labels = {query: items.category_of[item] for query, item in item_of.items()}
    held_out = fitting(params.test_categories, items.categories, "task.params.test_categories", "item")
    test = {query for query, label in labels.items() if label in held_out}
    pools = keep_apart({"train": asked.only(labels.keys() - test), "test": asked.only(test)})
    pools |= carve(pools["train"], params)
    sources = {split: f"{queries} ({split})" for split in pools}
    return make_task("amazon-c4", catalog, pools, params, sources, {"category": labels.__getitem__})


class Items:
    """Iterates over the records of the catalogue, and collects the categories of the items.

    path: the file of items.
    relevant: the ids of the targets, which the catalogue must hold.
    params: the parameters of the task.

    ``categories`` and ``category_of`` are complete after one iteration.
    """

    def __init__(self, path: Path, relevant: set[str], params: Params) -> None:
        self.path = path
        self.relevant = relevant
        self.categories: Counter[str] = Counter()  # The number of items in each category.
        self.category_of: dict[str, str] = {}  # The category of each target.
        self._kept = None if params.max_items is None else relevant | self._drawn(params.max_items, params.seed)

    def _drawn(self, max_items: int, seed: int) -> set[str]:
        if max_items < len(self.relevant):
            raise UserError(
                f"task.params.max_items: {max_items} is below the number of targets, {len(self.relevant)}, and the "
                "catalogue needs all of them: raise it"
            )
        others = {identifier(record, "item_id", where) for record, where in self._records("item ids")} - self.relevant
        return drawn(others, max_items - len(self.relevant), seed)

    def _records(self, unit: str) -> Iterator[tuple[dict[str, object], str]]:
        yield from watched(read(self.path), self.path, unit)

    def __iter__(self) -> Iterator[dict[str, str]]:
        seen: set[str] = set()
        repeated = 0
        for record, where in self._records("items"):
            item = identifier(record, "item_id", where)
            category = str(value(record, "category", where)).strip()
            self.categories[category] += 1
            if item in seen:
                repeated += 1
            elif self._kept is None or item in self._kept:
                text = plain(present(record, "metadata", where))
                seen.add(item)
                if item in self.relevant:
                    self.category_of[item] = category
                yield {"id": item, "text": text, "title": first_words(text) or item}
        if repeated:
            logger.warning(
                "%s: %s",
                self.path,
                number_of(
                    repeated,
                    "record repeats the id of an earlier item and is left out",
                    "records repeat the id of an earlier item and are left out",
                ),
            )
