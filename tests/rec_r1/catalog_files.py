"""Tables for the tests of the task `catalog`, and its tasks in a form that is easy to compare."""

import csv
import gzip
import io
import json
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec_r1 import tasks
from rec_r1.config import TaskConfig, UserError, problems_of

SHOP = Path(__file__).parents[1] / "data" / "shop"
COLUMNS = {"id": "product_id", "title": "name", "query": "search_term", "item": "product_id"}
SHOP_PARAMS = {
    "columns": {**COLUMNS, "clicks": "clicks", "purchases": "purchases"},
    "text": ["brand", "description"],
    "unknown": "drop",
    "blank": "drop",
    "duplicates": "last",
}
ITEMS = [{"id": str(1000 + n), "title": f"thing {n}", "text": f"<p>nice &amp; warm {n}</p>"} for n in range(20)]
GRADED = [
    {"query": f"query {q}", "item": str(1000 + (q + k) % 20), "grade": 3 - k} for q in range(20) for k in range(3)
]


def write(path: Path, rows: list[dict], encoding: str = "utf-8", separator: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".gz")
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if name.endswith("jsonl"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif name.endswith("json"):
        text = json.dumps(rows, indent=1)
    else:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if name.endswith("tsv") else separator)
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    raw = text.encode(encoding)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def make(folder: Path, rows: list[dict], items: list[dict] = ITEMS) -> Path:
    write(folder / "items.csv", items)
    write(folder / "clicks.csv", rows)
    return folder


def load(folder: Path, **params):
    return tasks.load(TaskConfig(name="catalog", path=str(folder), params=params))


def judged(task) -> dict[str, dict[str, float]]:
    """Query text -> item -> grade, over all splits."""
    return {
        text: {task.catalog.ids[row]: grade for row, grade in zip(rows, grades, strict=True)}
        for split in task.splits.values()
        for text, rows, grades in zip(split.queries, split.rows, split.grades, strict=True)
    }


def flat(by_query: dict[str, dict[str, float]]) -> dict[tuple[str, str], float]:
    return {(query, item): grade for query, own in by_query.items() for item, grade in own.items()}


def expected(rows: list[dict]) -> dict[str, dict[str, float]]:
    found = defaultdict(dict)
    for row in rows:
        found[row["query"]][row["item"]] = float(row["grade"])
    return dict(found)


def refused(folder: Path, **params) -> list[str]:
    with pytest.raises(UserError) as error:
        load(folder, **params)
    return problems_of(str(error.value))
