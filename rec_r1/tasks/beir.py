"""Any folder in BEIR format: corpus.jsonl, queries.jsonl, qrels/NAME.tsv (query-id, corpus-id, grade)."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rec_r1.config import TaskConfig, UserError, cache_folder
from rec_r1.tasks.types import Split, Task, make_split
from retrievers import Catalog

logger = logging.getLogger(__name__)


def load(config: TaskConfig) -> Task:
    """Read `task.path`; `task.splits` says which qrels file plays which part (BEIR itself: train, dev, test).

    A document is indexed as its title and its text. Raises UserError naming file and line for whatever does
    not fit, and where one query stands in two parts.
    """
    if not config.path:
        raise UserError("task.path: not set: give the folder with corpus.jsonl, queries.jsonl and qrels/")
    folder = Path(config.path)
    if not folder.is_dir():
        raise UserError(f"task.path: {folder} is not a folder: give the one with corpus.jsonl and qrels/")
    if set(config.splits) != {"train", "validation", "test"}:
        raise UserError(
            f"task.splits: got {', '.join(config.splits)}: name a qrels file for each of train, validation, test"
        )
    catalog = _catalog(folder / "corpus.jsonl")
    queries = {
        _string(record, "_id", where): _string(record, "text", where)
        for record, where in _records(folder / "queries.jsonl")
    }
    judgments = {part: _qrels(folder / "qrels" / f"{name}.tsv") for part, name in config.splits.items()}
    _refuse_overlap(folder, config.splits, judgments)
    splits: dict[str, Split] = {
        part: make_split(str(folder / "qrels" / f"{name}.tsv"), catalog, queries, judgments[part])
        for part, name in config.splits.items()
    }
    return Task(folder.name, catalog, **splits)


def _catalog(path: Path) -> Catalog:
    """The corpus as a memory-mapped table in the cache, made anew when the file's size or date changes."""
    if not path.is_file():
        raise UserError(f"{path}: no such file: a BEIR folder has corpus.jsonl, queries.jsonl and qrels/")
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cached = cache_folder() / "catalogs" / key
    if cached.is_dir():
        return Catalog.load(cached)
    logger.info("reading %s into %s", path, cached)
    try:
        return Catalog.from_records(_documents(path)).save(cached)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _documents(path: Path) -> Iterator[dict[str, str]]:
    from tqdm import tqdm

    for record, where in tqdm(_records(path), desc=path.name, unit=" docs", disable=path.stat().st_size < 1 << 24):
        title, text = str(record.get("title") or ""), _string(record, "text", where)
        yield {"id": _string(record, "_id", where), "text": f"{title} {text}".strip(), "title": title or text}


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """JSONL records, each with its `file:line`."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{where}: not valid JSON ({error}): one object a line") from error
                if not isinstance(record, dict):
                    raise UserError(f"{where}: expected an object, got {type(record).__name__}")
                yield record, where
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: a BEIR folder has corpus.jsonl, queries.jsonl and qrels/") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}): convert it") from error


def _string(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record or (key == "_id" and record[key] is None):
        raise UserError(f"{where}: no {key!r}, only {', '.join(record)}: BEIR records have _id, title, text")
    return "" if record[key] is None else str(record[key])  # null is no text, not the word "None"


def _qrels(path: Path) -> dict[str, dict[str, float]]:
    """query id -> {document id: grade}; of a pair judged twice the best grade counts."""
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.tsv"))
        raise UserError(f"{path}: no such file: set task.splits to the ones there: {', '.join(there) or 'none'}")
    judgments: dict[str, dict[str, float]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            for number, fields in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
                if not fields or (number == 1 and fields[:1] == ["query-id"]):
                    continue
                try:
                    query, document, grade = fields
                    value = float(grade)
                    if not math.isfinite(value):
                        raise ValueError(grade)
                except ValueError:
                    raise UserError(
                        f"{path}:{number}: {fields!r}: three tab-separated fields, query-id corpus-id grade (a number)"
                    ) from None
                docs = judgments.setdefault(query, {})
                docs[document] = max(value, docs.get(document, value))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}): three tab-separated fields a line, in UTF-8") from error
    if not judgments:
        raise UserError(f"{path}: no judgments: add lines of query-id, corpus-id, grade")
    return judgments


def _refuse_overlap(folder: Path, names: dict[str, str], judgments: dict[str, dict[str, dict[str, float]]]) -> None:
    parts = list(judgments)
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            common = sorted(set(judgments[one]) & set(judgments[other]))
            if common:
                raise UserError(
                    f"{folder}/qrels: {len(common)} queries are in both {names[one]} ({one}) and {names[other]} "
                    f"({other}), first {common[0]!r}: a held-out query must not be trained on"
                )
