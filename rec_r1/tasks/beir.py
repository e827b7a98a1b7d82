"""Any folder in BEIR format: corpus.jsonl, queries.jsonl, qrels/NAME.tsv (query-id, corpus-id, grade)."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rec_r1.config import TaskConfig, UserError, read_params
from rec_r1.tasks.prepared import prepared
from rec_r1.tasks.readers import read, task_folder
from rec_r1.tasks.types import NoParams, Task, make_split
from retrievers import Catalog

READS: tuple[str, ...] = ("path", "splits")  # of the settings in `task` that not every task reads
HOLDS = "corpus.jsonl, queries.jsonl and qrels/"


def load(config: TaskConfig) -> Task:
    """Read `task.path`; `task.splits` says which qrels file plays which part (BEIR itself: train, dev, test).

    A document is indexed as its title and its text. Raises UserError naming file and line for whatever does
    not fit, and where one query stands in two parts.
    """
    read_params(NoParams, config.params, "task.params")
    folder = task_folder(config, HOLDS)
    if set(config.splits) != {"train", "validation", "test"}:
        raise UserError(
            f"task.splits: got {', '.join(config.splits)}: name a qrels file for each of train, validation, test"
        )
    files = [folder / "corpus.jsonl", folder / "queries.jsonl"]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file: a BEIR folder has {HOLDS}")
    for name in config.splits.values():
        path = folder / "qrels" / f"{name}.tsv"
        if not path.is_file():
            there = ", ".join(sorted(p.stem for p in path.parent.glob("*.tsv"))) or "none"
            raise UserError(f"{path}: no such file: set task.splits to the ones there: {there}")
        files.append(path)
    return prepared(config, files, lambda: _build(folder, config.splits))


def _build(folder: Path, names: dict[str, str]) -> Task:
    catalog = _catalog(folder / "corpus.jsonl")
    queries = {
        _string(record, "_id", where): _string(record, "text", where)
        for record, where in read(folder / "queries.jsonl")
    }
    judgments = {part: _qrels(folder / "qrels" / f"{name}.tsv") for part, name in names.items()}
    refuse_overlap(f"{folder}/qrels", names, judgments)
    splits: dict[str, Any] = {
        part: make_split(str(folder / "qrels" / f"{name}.tsv"), catalog, queries, judgments[part])
        for part, name in names.items()
    }
    return Task(folder.name, catalog, **splits)


def _catalog(path: Path) -> Catalog:
    try:
        return Catalog.from_records(_documents(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _documents(path: Path) -> Iterator[dict[str, str]]:
    from tqdm import tqdm

    for record, where in tqdm(read(path), desc=path.name, unit=" docs", disable=path.stat().st_size < 1 << 24):
        title, text = str(record.get("title") or ""), _string(record, "text", where)
        yield {"id": _string(record, "_id", where), "text": f"{title} {text}".strip(), "title": title or text}


def _string(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record or (key == "_id" and record[key] is None):
        raise UserError(f"{where}: no {key!r}, only {', '.join(record)}: BEIR records have _id, title, text")
    return "" if record[key] is None else str(record[key])  # null is no text, not the word "None"


def _qrels(path: Path) -> dict[str, dict[str, float]]:
    """query id -> {document id: grade}; of a pair judged twice the best grade counts."""
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


def refuse_overlap(source: str, names: dict[str, str], judgments: dict[str, dict[str, dict[str, float]]]) -> None:
    """Raises UserError where a query is judged in two parts; names: what each part is called in ``source``."""
    parts = list(judgments)
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            common = sorted(set(judgments[one]) & set(judgments[other]))
            if common:
                raise UserError(
                    f"{source}: {len(common)} queries are in both {names[one]} ({one}) and {names[other]} "
                    f"({other}), first {common[0]!r}: a held-out query must not be trained on"
                )
