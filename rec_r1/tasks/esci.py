"""ESCI, Amazon's Shopping Queries: products judged Exact, Substitute, Complement or Irrelevant for a query.

The loader reads the two files of https://github.com/amazon-science/esci-data (shopping_queries_dataset_examples.parquet
and ..._products.parquet), or the joined files of `hub:tasksource/esci`. The official test split is the test split.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rec_r1.config import TaskConfig, UserError, read_params
from rec_r1.console import number_of
from rec_r1.tasks.amazon_categories import UNKNOWN, fitting, read_categories
from rec_r1.tasks.query_pools import Carving, Pool, carve, drawn, keep_apart, log_counts, make_catalog, make_task
from rec_r1.tasks.raw_files import find_file, find_files, identifier, number, plain, read, task_folder, value, watched
from rec_r1.tasks.task_cache import prepared
from rec_r1.tasks.types import Task
from retrievers import Catalog

READS: tuple[str, ...] = ("path",)  # Which of task.path and task.splits this task reads.
logger = logging.getLogger(__name__)
EXAMPLES = "shopping_queries_dataset_examples.parquet"
PRODUCTS = "shopping_queries_dataset_products.parquet"
# Patterns of the files that have judgments and products in the same rows, for each official split.
JOINED_FILES = {split: [f"data/{split}-*.parquet", f"{split}-*.parquet"] for split in ("train", "test")}
EXPECTED_FILES = f"{EXAMPLES} and {PRODUCTS}, or data/train-*.parquet and data/test-*.parquet of hub:tasksource/esci"
# The one-letter form of a label. One release of the data writes whole words, the other letters.
LETTERS = {label: label[0] for word in ("Exact", "Substitute", "Complement", "Irrelevant") for label in (word, word[0])}


@dataclass(frozen=True)
class Params(Carving):
    """`task.params`.

    The default grades give the same NDCG as the gains 1, 0.1, 0.01 and 0 of the ESCI paper, because NDCG with linear
    gain is a ratio. With `categories`, a query has the category of most of its Exact products, or "unknown".
    """

    locale: str = "us"  # The language of queries and products: us, es or jp.
    version: str = "small"  # small: only the harder queries (small_version is 1). large: all queries.
    # The grade of each label. The default is the gains of the ESCI paper times 100, because qrels hold integers.
    # As in the Rec-R1 paper: {E: 1, S: 0, C: 0, I: 0}.
    grades: dict[str, int] = field(default_factory=lambda: {"E": 100, "S": 10, "C": 1, "I": 0})
    # The fields of a product that are indexed behind its title.
    text: list[str] = field(
        default_factory=lambda: ["product_brand", "product_color", "product_bullet_point", "product_description"]
    )
    # A file, or a pattern of several, with the categories of products: metadata of Amazon Reviews 2023, or its
    # asin2category.json. They make slices by category.
    categories: str | None = None
    id_column: str = "parent_asin"  # The column of ids in `categories`.
    category_column: str = "main_category"  # The column of categories in `categories`.
    test_categories: list[str] | None = None  # Only test queries of these categories are kept. null: all are kept.
    distractors: int = 0  # How many products of the locale without a judgment are added to the catalogue. -1: all.

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        super().check()
        if self.version not in ("small", "large"):
            raise UserError(f"task.params.version: {self.version!r}: choose from small, large")
        whole = all(isinstance(grade, int) and grade >= 0 for grade in self.grades.values())
        if set(self.grades) != set("ESCI") or not whole:
            raise UserError(
                f"task.params.grades: {self.grades}: give each of E, S, C and I a whole number from 0, as in "
                "{E: 100, S: 10, C: 1, I: 0}"
            )
        if self.distractors < -1:
            raise UserError(f"task.params.distractors: {self.distractors}: give a number from 0, or -1 for all")
        if self.test_categories is not None and not self.categories:
            raise UserError(
                "task.params.test_categories: ESCI itself has no categories: name a file that has, such as metadata of "
                "Amazon Reviews 2023, in task.params.categories"
            )


@dataclass(frozen=True)
class Files:
    """The files of the task."""

    judged: list[tuple[Path, str | None]]  # Each file of judgments, and its split. None = its column `split` says it.
    products: list[Path]
    categories: list[Path]

    @property
    def all(self) -> list[Path]:
        return list(dict.fromkeys([*(path for path, _ in self.judged), *self.products, *self.categories]))


def load(config: TaskConfig) -> Task:
    """Load the task of a recipe's section `task`. Raises UserError, with file and row, for data that it cannot use."""
    params: Params = read_params(Params, config.params, "task.params")
    params.check()
    on_hub = [EXAMPLES, PRODUCTS, *(patterns[0] for patterns in JOINED_FILES.values())]
    files = _files(task_folder(config, EXPECTED_FILES, on_hub), params)
    return log_counts(prepared(config, files.all, lambda: _build(files, params)))


def _files(folder: Path, params: Params) -> Files:
    categories: list[Path] = []
    if params.categories:
        # A user cannot add a file to the local copy of a dataset of the hub, so the working directory is searched, too.
        places = [params.categories, str(Path.cwd() / params.categories)]
        categories = find_files(folder, places, "file of categories (task.params.categories)")
    first = find_file(folder, [EXAMPLES, *JOINED_FILES["train"]], "ESCI judgments")
    if first.name.startswith(EXAMPLES):
        return Files([(first, None)], [find_file(folder, [PRODUCTS], "ESCI products")], categories)
    judged = [
        (path, split)
        for split, patterns in JOINED_FILES.items()
        for path in find_files(folder, patterns, f"{split} file")
    ]
    return Files([*judged], [path for path, _ in judged], categories)


def _build(files: Files, params: Params) -> Task:
    pools, exact = _judgments(files, params)
    judged = {product for pool in pools.values() for products in pool.judgments.values() for product in products}
    catalog = _catalog(files.products, judged, params)
    # This comes before the test split is narrowed down, so that no query of the official test split is trained on.
    pools = keep_apart(pools)
    slices: dict[str, Any] = {}
    if params.categories:
        labels = _query_categories(files.categories, exact, params)
        slices["category"] = lambda query: labels.get(query, UNKNOWN)
        if params.test_categories is not None:
            pools["test"] = _of_categories(pools["test"], labels, params.test_categories)
    pools |= carve(pools["train"], params)
    source = ", ".join(dict.fromkeys(path.name for path, _ in files.judged))
    sources = {split: f"{source} ({split})" for split in pools}
    return make_task(f"esci-{params.locale}-{params.version}", catalog, pools, params, sources, slices)


def _judgments(files: Files, params: Params) -> tuple[dict[str, Pool], dict[str, set[str]]]:
    """The queries of the locale and version in the two official splits, and the Exact products of each query."""
    pools = {"train": Pool(), "test": Pool()}
    exact: dict[str, set[str]] = {}
    locales: Counter[str] = Counter()
    version = f"{params.version}_version"
    columns = ["query", "query_id", "product_id", "product_locale", "esci_label", version]
    for path, file_split in files.judged:
        records = read(path, columns=columns if file_split else [*columns, "split"])
        for record, where in watched(records, path, "judgments"):
            locale = value(record, "product_locale", where)
            locales[locale] += 1
            if locale != params.locale or number(record, version, where) != 1:
                continue
            label = LETTERS.get(str(value(record, "esci_label", where)).strip())
            if label is None:
                raise UserError(
                    f"{where}: esci_label {record['esci_label']!r}: must be one of {', '.join(LETTERS)}: fix the row"
                )
            split = file_split or str(value(record, "split", where))
            if split not in pools:
                raise UserError(f"{where}: split {split!r}: must be train or test: fix the row")
            query, product = identifier(record, "query_id", where), identifier(record, "product_id", where)
            pools[split].add(query, " ".join(str(value(record, "query", where)).split()), where)
            pools[split].judge(query, product, params.grades[label], where)
            if label == "E" and params.categories:
                exact.setdefault(query, set()).add(product)
    for split, pool in pools.items():
        pool.log_notes(f"{files.judged[0][0].parent} ({split})")
        if not pool.judgments:
            raise UserError(
                f"{files.judged[0][0].parent}: no {split} judgments of locale {params.locale!r} in the "
                f"{params.version} version (rows per locale: {dict(locales)}): set task.params.locale and version"
            )
    return {split: pool.in_order() for split, pool in pools.items()}, exact


def _catalog(paths: Sequence[Path], judged: set[str], params: Params) -> Catalog:
    wanted = judged | _distractors(paths, judged, params) if params.distractors else judged
    columns = ["product_id", "product_locale", "product_title", *params.text]
    found: dict[str, dict[str, str]] = {}
    for path in paths:
        for record, where in watched(read(path, columns=columns), path, "products"):
            if record["product_locale"] != params.locale:
                continue
            product = identifier(record, "product_id", where)
            if product in wanted and product not in found:  # Joined files repeat a product with every judgment.
                title = plain(record["product_title"])
                text = " ".join(filter(None, [title, *(plain(record[name]) for name in params.text)]))
                found[product] = {"id": product, "text": text, "title": title or product}
    missing = sorted(judged - found.keys())
    if missing:
        raise UserError(
            f"{', '.join(path.name for path in paths)}: locale {params.locale!r} lacks "
            f"{number_of(len(missing), 'judged product', 'judged products')}, first: "
            f"{', '.join(map(repr, missing[:3]))}: download the products again, or remove their "
            "judgments"
        )
    # The order by id makes the catalogue the same for both forms of the data.
    return make_catalog(paths[0].name, (found[product] for product in sorted(found)))


def _distractors(paths: Sequence[Path], judged: set[str], params: Params) -> set[str]:
    others: set[str] = set()
    for path in paths:
        records = read(path, columns=["product_id", "product_locale"])
        for record, where in watched(records, path, "product ids"):
            if record["product_locale"] == params.locale:
                others.add(identifier(record, "product_id", where))
    others -= judged
    if params.distractors > len(others):
        logger.warning(
            "task.params.distractors: %d, but only %d products of the locale have no judgment: all are added",
            params.distractors,
            len(others),
        )
    return others if params.distractors == -1 else drawn(others, params.distractors, params.seed)


def _query_categories(paths: Sequence[Path], exact: dict[str, set[str]], params: Params) -> dict[str, str]:
    """The category of each query: the most frequent one of its Exact products, and of equals the first by name.

    paths: the files of categories.
    exact: the Exact products of each query.
    """
    known = read_categories(paths, set().union(*exact.values()), params.id_column, params.category_column)
    counted = {query: Counter(known[p] for p in products if p in known) for query, products in exact.items()}
    return {query: min(labels, key=lambda name: (-labels[name], name)) for query, labels in counted.items() if labels}


def _of_categories(test: Pool, labels: dict[str, str], wanted: Sequence[str]) -> Pool:
    """``test`` without the queries of other categories than the wanted ones."""
    there = {labels.get(query, UNKNOWN) for query in test.judgments}
    kept = fitting(wanted, there, "task.params.test_categories", "test query")
    return test.only({query for query in test.judgments if labels.get(query, UNKNOWN) in kept})
