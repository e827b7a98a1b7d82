"""Your own files in TREC's formats: a corpus, topics and qrels for each part."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rec_r1.config import TaskConfig, UserError, read_params
from rec_r1.tasks.integrity import PARTS, refuse_overlap
from rec_r1.tasks.query_pools import Drawing, Pool, log_counts, make_catalog, make_task
from rec_r1.tasks.raw_files import (
    Record,
    find_file,
    find_files,
    first_words,
    identifier,
    lines,
    number,
    plain,
    present,
    read,
    task_folder,
    watched,
)
from rec_r1.tasks.task_cache import prepared
from rec_r1.tasks.types import Task

READS: tuple[str, ...] = ("path",)  # of the settings in `task` that not every task reads
_TAG = re.compile(r"<(/?)(\w++)[^<>]*>")  # possessive: backtracking into a long name takes quadratic time
_LABEL = re.compile(r"^\s*(?:Number|Topic)\s*:\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Params(Drawing):
    """`task.params`."""

    # The file of documents: .jsonl, .csv, .tsv or .parquet, or a pattern of several, such as corpus/*.jsonl.
    corpus: str = "corpus.jsonl"
    # The file of queries of each split: lines of `id<TAB>text`, or the classic <top> format.
    topics: dict[str, str] = field(default_factory=lambda: {part: f"topics.{part}.tsv" for part in PARTS})
    # The file of judgments of each split: lines of `query 0 document grade`.
    qrels: dict[str, str] = field(default_factory=lambda: {part: f"qrels.{part}.txt" for part in PARTS})
    id: str = "id"  # The column of ids in the corpus.
    title: str | None = "title"  # The column of titles in the corpus, which may be missing.
    # The columns of the corpus that are indexed behind the title. pyserini's `contents` is read, too.
    text: list[str] = field(default_factory=lambda: ["text"])
    columns: list[str] = field(default_factory=list)  # The names of all columns of a corpus that has no header.

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        super().check()
        for name in ("topics", "qrels"):
            given = getattr(self, name)
            if set(given) != set(PARTS):
                raise UserError(
                    f"task.params.{name}: got {', '.join(given)}: name a file for each of {', '.join(PARTS)}"
                )
        if not self.text:
            raise UserError("task.params.text: empty: name at least one column of the corpus")


def load(config: TaskConfig) -> Task:
    """Read `task.path` as `task.params` says. Raises UserError naming file and line for whatever does not fit."""
    params: Params = read_params(Params, config.params, "task.params")
    params.check()
    names = [params.corpus, *params.topics.values(), *params.qrels.values()]
    folder = task_folder(config, "a corpus, topics and qrels", [*names, *(f"{name}.gz" for name in names)])
    corpus = find_files(folder, [params.corpus], "corpus")
    topics = {part: find_file(folder, [params.topics[part]], f"{part} topics") for part in PARTS}
    qrels = {part: find_file(folder, [params.qrels[part]], f"{part} qrels") for part in PARTS}
    files = list(dict.fromkeys([*corpus, *topics.values(), *qrels.values()]))
    return log_counts(prepared(config, files, lambda: _build(folder.resolve().name, corpus, topics, qrels, params)))


def _build(
    name: str, corpus: Sequence[Path], topics: Mapping[str, Path], qrels: Mapping[str, Path], params: Params
) -> Task:
    pools = {part: _pool(topics[part], qrels[part]) for part in PARTS}
    names = {part: path.name for part, path in qrels.items()}
    refuse_overlap(str(qrels["train"].parent), names, {part: pool.judgments for part, pool in pools.items()})
    catalog = make_catalog(", ".join(map(str, corpus)), _documents(corpus, params))
    sources = {part: str(path) for part, path in qrels.items()}
    return make_task(name, catalog, pools, params, sources)


def _documents(paths: Sequence[Path], params: Params) -> Iterator[dict[str, str]]:
    columns, optional = [params.id, *params.text], [params.title] if params.title else []
    for path in paths:
        records = read(path, names=params.columns, columns=columns, optional=optional)
        for record, where in watched(records, path, "documents"):
            title = _string(record.get(params.title)) if params.title else ""
            body = " ".join(filter(None, (_string(present(record, name, where)) for name in _texts(record, params))))
            text = f"{title} {body}".strip()
            yield {"id": identifier(record, params.id, where), "text": text, "title": title or first_words(body)}


def _texts(record: Record, params: Params) -> list[str]:
    return ["contents"] if params.text == ["text"] and "text" not in record and "contents" in record else params.text


def _string(found: object) -> str:
    return found.strip() if isinstance(found, str) else plain(found)


def _pool(topics: Path, qrels: Path) -> Pool:
    pool = Pool()
    for query, text, where in _topics(topics):
        pool.add(query, text, where)
    for line, where in lines(qrels):
        fields = line.split()
        if len(fields) != 4:
            raise UserError(f"{where}: {line.strip()!r}: four fields, query 0 document grade: fix the line")
        pool.judge(fields[0], fields[2], number({"grade": fields[3]}, "grade", where), where)
    if not pool.judgments:
        raise UserError(f"{qrels}: no judgments: add lines of query, 0, document, grade")
    return pool.log_notes(str(qrels))


def _topics(path: Path) -> Iterator[tuple[str, str, str]]:
    """id, text, place of each topic; the first line says which format it is."""
    first, _ = next(lines(path), ("", ""))
    if first.lstrip().lower().startswith("<top"):
        yield from _classic(path)
        return
    for line, where in lines(path):
        query, tab, text = line.strip().partition("\t")
        if not tab or not text.strip():
            raise UserError(f"{where}: {line.strip()!r}: id, tab, text in each line, or topics that begin with <top>")
        yield query.strip(), " ".join(text.split()), where


def _classic(path: Path) -> Iterator[tuple[str, str, str]]:
    """Tags of which most are never closed: a field goes on until the next tag."""
    fields: dict[str, str] = {}
    tag = place = ""  # place: where the open topic began
    for line, where in lines(path):
        rest = 0
        for match in _TAG.finditer(line):
            fields[tag] = f"{fields.get(tag, '')} {line[rest : match.start()]}"
            rest = match.end()
            closing, tag = bool(match[1]), match[2].lower()
            if tag == "top":
                if place:
                    yield _topic(fields, place)
                fields, place = {}, "" if closing else where
            if closing:
                tag = ""
        fields[tag] = f"{fields.get(tag, '')} {line[rest:]}"
    if place:
        yield _topic(fields, place)


def _topic(fields: dict[str, str], where: str) -> tuple[str, str, str]:
    found = {tag: " ".join(_LABEL.sub("", text).split()) for tag, text in fields.items()}
    for tag in ("num", "title"):
        if not found.get(tag):
            raise UserError(f"{where}: topic without <{tag}>: give each a <num> and a <title>")
    return found["num"], found["title"], where
