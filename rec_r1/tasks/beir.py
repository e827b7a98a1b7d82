"""A folder in BEIR's format: corpus.jsonl, queries.jsonl, qrels/NAME.tsv (query-id, corpus-id, grade); .gz as well."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rec_r1.config import TaskConfig, UserError, read_params
from rec_r1.tasks.integrity import SPLITS, refuse_overlap
from rec_r1.tasks.known_files import hint
from rec_r1.tasks.query_pools import Dividing, Pool, divide, make_catalog, make_task
from rec_r1.tasks.raw_files import identifier, lines, read, task_folder, watched
from rec_r1.tasks.tables import is_blank
from rec_r1.tasks.task_cache import prepared
from rec_r1.tasks.types import Task, refuse_unknown_queries


@dataclass(frozen=True)
class Params(Dividing):
    """`task.params`."""


READS: tuple[str, ...] = ("path", "splits")  # Which of task.path and task.splits this task reads.
EXPECTED_FILES = "corpus.jsonl, queries.jsonl and qrels/"
_FIRST_COLUMN = "query-id"  # Where the first line of a qrels file begins with it, the line is a header.


def load(config: TaskConfig) -> Task:
    """Load the task of a recipe's section `task`.

    `task.splits` names the qrels file of each split (in BEIR: train, dev, test). Where it names none for test or
    validation, they are taken out of train (`task.params.test_share`, `validation_share`). A document is indexed as its
    title and its text.

    Raises UserError, with file and line, for data that it cannot use, and for a query that is in two splits.
    """
    params: Params = read_params(Params, config.params, "task.params")
    params.check()
    folder = task_folder(config, EXPECTED_FILES)
    if "train" not in config.splits or not set(config.splits) <= set(SPLITS):
        raise UserError(
            f"task.splits: got {', '.join(config.splits) or 'nothing'}: name a qrels file for train, and for "
            "validation and test if there are such files"
        )
    corpus, queries = (
        _file(folder / name, f"a BEIR folder has {EXPECTED_FILES}") for name in ("corpus.jsonl", "queries.jsonl")
    )
    there = ", ".join(sorted({path.name.partition(".tsv")[0] for path in folder.glob("qrels/*.tsv*")})) or "none"
    qrels = {
        split: _file(folder / "qrels" / f"{name}.tsv", f"set task.splits to the ones there: {there}")
        for split, name in config.splits.items()
    }
    files = [corpus, queries, *dict.fromkeys(qrels.values())]
    return prepared(config, files, lambda: _build(folder, corpus, queries, qrels, config.splits, params))


def _file(path: Path, fix: str) -> Path:
    """``path``, or the same path with .gz. Raises UserError, which ends with ``fix``, where there is neither file."""
    found = next((one for one in (path, path.with_name(f"{path.name}.gz")) if one.is_file()), None)
    if found is None:
        known = hint(path.parent, [path.name]) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such file{known}: {fix}")
    return found


def _build(
    folder: Path, corpus: Path, queries: Path, qrels: Mapping[str, Path], names: Mapping[str, str], params: Dividing
) -> Task:
    catalog = make_catalog(str(corpus), _documents(corpus))
    asked = Pool()
    for record, where in read(queries):
        asked.add(_id(record, where), " ".join(_text(record, where).split()), where)
    pools = {split: _judged(asked, path) for split, path in qrels.items()}
    refuse_overlap(f"{folder}/qrels", names, {split: pool.judgments for split, pool in pools.items()})
    for split, pool in pools.items():  # Splits are made from the texts.
        refuse_unknown_queries(str(qrels[split]), pool.texts, pool.judgments)
    sources = {split: str(qrels.get(split, qrels["train"])) for split in SPLITS}
    return make_task(folder.name, catalog, divide(pools, params), params, sources)


def _documents(path: Path) -> Iterator[dict[str, str]]:
    for record, where in watched(read(path), path, "docs"):
        title, text = _plain(record.get("title")), _text(record, where)
        yield {"id": _id(record, where), "text": f"{title} {text}".strip(), "title": title or text}


def _id(record: dict[str, Any], where: str) -> str:
    _check(record, "_id", where)
    return identifier(record, "_id", where)


def _text(record: dict[str, Any], where: str) -> str:
    _check(record, "text", where)
    return _plain(record["text"])


def _plain(value: Any) -> str:
    """A text as it is, or "" for null and for NaN, which pandas writes for a missing text."""
    return "" if is_blank(value) else str(value)


def _check(record: dict[str, Any], key: str, where: str) -> None:
    if key not in record or (key == "_id" and record[key] is None):
        raise UserError(f"{where}: no {key!r}, only {', '.join(record)}: BEIR records have _id, title, text")


def _judged(asked: Pool, path: Path) -> Pool:
    """``asked`` with the judgments of one qrels file."""
    pool = replace(asked, judgments={}, notes={})
    for number, (line, where) in enumerate(lines(path)):
        fields = [text.strip() for text in line.split("\t")]
        if number == 0 and fields[0] == _FIRST_COLUMN:
            continue
        try:
            query, document, grade = fields
            value = float(grade)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not (query and document):
            raise UserError(
                f"{where}: {fields!r}: write three tab-separated fields, query-id corpus-id grade (a number)"
            )
        pool.judge(query, document, value, where)
    if not pool.judgments:
        raise UserError(f"{path}: no judgments: add lines of query-id, corpus-id, grade")
    return pool.log_notes(str(path))
