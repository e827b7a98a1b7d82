"""The user's own files in TREC's formats: a corpus, and topics and qrels for each split."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rec_r1.config import TaskConfig, UserError, read_params
from rec_r1.tasks.columns import refuse_missing
from rec_r1.tasks.integrity import SPLITS, refuse_overlap
from rec_r1.tasks.query_pools import Dividing, Pool, divide, log_counts, make_catalog, make_task
from rec_r1.tasks.raw_files import (
    Record,
    find_file,
    find_files,
    identifier,
    lines,
    number,
    plain,
    read,
    task_folder,
    watched,
)
from rec_r1.tasks.task_cache import prepared
from rec_r1.tasks.types import Task, first_words, refuse_unknown_queries

READS: tuple[str, ...] = ("path",)  # Which of task.path and task.splits this task reads.
_TAG = re.compile(r"<(/?)(\w++)[^<>]*>")  # \w++ does not backtrack, which would take quadratic time on a long name.
_FIELD_NAME = re.compile(r"^\s*(?:Number|Topic)\s*:\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Params(Dividing):
    """`task.params`."""

    # The file of documents: .jsonl, .csv, .tsv or .parquet, or a pattern of several, such as corpus/*.jsonl.
    corpus: str = "corpus.jsonl"
    # The file of queries of each split: lines of `id<TAB>text`, or the classic <top> format.
    topics: dict[str, str] = field(default_factory=lambda: {split: f"topics.{split}.tsv" for split in SPLITS})
    # The file of judgments of each split: lines of `query 0 document grade`.
    qrels: dict[str, str] = field(default_factory=lambda: {split: f"qrels.{split}.txt" for split in SPLITS})
    id: str = "id"  # The column of ids in the corpus.
    title: str | None = "title"  # The column of titles in the corpus, which may be missing.
    # The columns of the corpus that are indexed behind the title. pyserini's `contents` is read, too.
    text: list[str] = field(default_factory=lambda: ["text"])
    columns: list[str] = field(default_factory=list)  # The names of all columns of a corpus that has no header.

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        super().check()
        for name in ("topics", "qrels"):
            given = getattr(self, name)
            if "train" not in given or not set(given) <= set(SPLITS):
                raise UserError(
                    f"task.params.{name}: got {', '.join(given) or 'nothing'}: name a file for train, and for "
                    "validation and test if there are such files"
                )
        if set(self.topics) != set(self.qrels):
            raise UserError(
                f"task.params.qrels: {', '.join(self.qrels)}, and task.params.topics: {', '.join(self.topics)}: name "
                "files of both for the same splits"
            )
        if not self.text:
            raise UserError("task.params.text: empty: name at least one column of the corpus")


def load(config: TaskConfig) -> Task:
    """Load the task of a recipe's section `task`. Raises UserError, with file and line, for data that it cannot use."""
    params: Params = read_params(Params, config.params, "task.params")
    params.check()
    names = [params.corpus, *params.topics.values(), *params.qrels.values()]
    folder = task_folder(config, "a corpus, topics and qrels", [*names, *(f"{name}.gz" for name in names)])
    corpus = find_files(folder, [params.corpus], "corpus")
    topics = {split: find_file(folder, [name], f"{split} topics") for split, name in params.topics.items()}
    qrels = {split: find_file(folder, [name], f"{split} qrels") for split, name in params.qrels.items()}
    files = list(dict.fromkeys([*corpus, *topics.values(), *qrels.values()]))
    return log_counts(prepared(config, files, lambda: _build(folder.resolve().name, corpus, topics, qrels, params)))


def _build(
    name: str, corpus: Sequence[Path], topics: Mapping[str, Path], qrels: Mapping[str, Path], params: Params
) -> Task:
    pools = {split: _pool(topics[split], qrels[split]) for split in qrels}
    names = {split: path.name for split, path in qrels.items()}
    refuse_overlap(str(qrels["train"].parent), names, {split: pool.judgments for split, pool in pools.items()})
    for split, pool in pools.items():  # Splits are made from the texts.
        refuse_unknown_queries(str(qrels[split]), pool.texts, pool.judgments)
    catalog = make_catalog(", ".join(map(str, corpus)), _documents(corpus, params))
    sources = {split: str(qrels.get(split, qrels["train"])) for split in SPLITS}
    return make_task(name, catalog, divide(pools, params), params, sources)


def _documents(paths: Sequence[Path], params: Params) -> Iterator[dict[str, str]]:
    columns, optional = [params.id, *params.text], [params.title] if params.title else []
    for path in paths:
        records = read(path, names=params.columns, columns=columns, optional=optional)
        for record, where in watched(records, path, "documents"):
            texts = _texts(record, params)
            wanted = [("task.params.id", params.id), *(("task.params.text", name) for name in texts)]
            refuse_missing(record, where, wanted)
            title = _string(record.get(params.title)) if params.title else ""
            body = " ".join(filter(None, (_string(record[name]) for name in texts)))
            text = f"{title} {body}".strip()
            yield {"id": identifier(record, params.id, where), "text": text, "title": title or first_words(body)}


def _texts(record: Record, params: Params) -> list[str]:
    """The columns of a document's text: those of the parameters, or pyserini's `contents`."""
    return ["contents"] if params.text == ["text"] and "text" not in record and "contents" in record else params.text


def _string(found: object) -> str:
    return found.strip() if isinstance(found, str) else plain(found)


def _pool(topics: Path, qrels: Path) -> Pool:
    pool = Pool()
    for query, text, where in read_topics(topics):
        pool.add(query, text, where)
    for line, where in lines(qrels):
        fields = line.split()
        if len(fields) != 4:
            raise UserError(f"{where}: {line.strip()!r}: write four fields, query 0 document grade")
        pool.judge(fields[0], fields[2], number({"grade": fields[3]}, "grade", where), where)
    if not pool.judgments:
        raise UserError(f"{qrels}: no judgments: add lines of four fields, query 0 document grade")
    return pool.log_notes(str(qrels))


def read_topics(path: Path) -> Iterator[tuple[str, str, str]]:
    """The id, text and place of each topic. The first line of the file shows its format."""
    first, _ = next(lines(path), ("", ""))
    if first.lstrip().lower().startswith("<top"):
        yield from _classic(path)
        return
    for line, where in lines(path):
        query, tab, text = line.strip().partition("\t")
        if not tab or not text.strip():
            raise UserError(
                f"{where}: {line.strip()!r}: write id, tab, text in each line, or topics between <top> tags"
            )
        yield query.strip(), " ".join(text.split()), where


def _classic(path: Path) -> Iterator[tuple[str, str, str]]:
    """The topics of a file with tags. Most of its tags are never closed: a field ends where the next tag begins."""
    fields: dict[str, str] = {}
    tag = place = ""  # `place` is file and line of the present topic's first tag. "" = no topic is open.
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
    found = {tag: " ".join(_FIELD_NAME.sub("", text).split()) for tag, text in fields.items()}
    for tag in ("num", "title"):
        if not found.get(tag):
            raise UserError(f"{where}: topic without <{tag}>: give each topic a <num> and a <title>")
    return found["num"], found["title"], where
