"""The layout of a folder, as a task reads it: its types, and the layouts that file names identify."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rec_r1.checks.new_recipe.links import id_columns, texts
from rec_r1.checks.new_recipe.tables import as_text, is_table, open_table
from rec_r1.config import UserError
from rec_r1.tasks import amazon_c4, esci, sequential
from rec_r1.tasks.integrity import SPLITS
from rec_r1.tasks.published import NAMES
from rec_r1.tasks.raw_files import Record, lines, read
from rec_r1.tasks.trec import read_topics

# (task, its parameters, its files) of data whose task is made for them.
_DATA_SETS: tuple[tuple[str, dict[str, Any], tuple[str, str]], ...] = (
    ("esci", {"locale": "us", "version": "small"}, (esci.EXAMPLES, esci.PRODUCTS)),
    ("amazon_c4", {}, (amazon_c4.QUERIES, amazon_c4.ITEMS)),
)
_NOTES_OF_ESCI = {
    "locale": "or es or jp, whose texts need another retriever.params.language",
    "version": "only the harder queries; large: all of them",
}


@dataclass(frozen=True)
class Item:
    """An item as its file has it.

    id, title, text: its fields as they are written; ``text`` is without the title.
    where: its `file:line`.
    empty: the columns of ``text`` that are empty, where it is made of several.
    """

    id: str
    title: str
    text: str
    where: str
    empty: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """A judgment, a click or an interaction as its file has it.

    item: the item's id.
    where: its `file:line`.
    query: the query's text; None for an interaction, and for a judgment whose query has no text.
    query_id: the query's id, where the file has one.
    user: the user of an interaction.
    history: the history of a session, as it is written; None for other events.
    grade, time: as they are written; None where the file has none.
    cells: the same value for records that are equal in every cell; None where a task compares only the fields above.
    """

    item: str
    where: str
    query: str | None = None
    query_id: str | None = None
    user: str | None = None
    history: Any = None
    grade: Any = None
    time: Any = None
    cells: int | None = None


@dataclass(frozen=True)
class Choice:
    """A setting that the files leave open.

    key: the recipe's key, such as task.params.columns.title.
    question: what a person is asked on a terminal.
    options: the values that fit, the likeliest first.
    """

    key: str
    question: str
    options: Sequence[str]


@dataclass(frozen=True)
class Finding:
    """One kind of problem in the files.

    what: what it is, with its number, such as "12 items have no title".
    then: what the task does about it, or what you can do.
    examples: the first of them.
    """

    what: str
    then: str
    examples: Sequence[str]

    def __str__(self) -> str:
        return f"{self.what}; first: {', '.join(self.examples)}. {self.then}"


@dataclass(frozen=True)
class Layout:
    """A folder as a task reads it.

    task: `task.name`.
    params: `task.params`.
    files: one line for each file that was recognised.
    items, events: what the files hold; () for a data set whose own task reads and checks them.
    splits: `task.splits` of the task beir; None for the others.
    choices: the settings that the files leave open.
    unused: the names of files that the task does not read.
    doubts: what is doubtful about the way in which the files are read.
    notes: a key of ``params`` -> its comment in the recipe.
    """

    task: str
    params: dict[str, Any]
    files: Sequence[str]
    items: Sequence[Item]
    events: Sequence[Event]
    splits: dict[str, str] | None = None
    choices: Sequence[Choice] = field(default=())
    unused: Sequence[str] = ()
    doubts: Sequence[Finding] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_sequential(self) -> bool:
        return self.task == "sequential"

    @property
    def is_data_set(self) -> bool:
        """Whether these are the files of a data set whose own task reads and checks them."""
        return self.task in {task for task, _, _ in _DATA_SETS}


def open_choice(key: str, question: str, options: Sequence[str]) -> list[Choice]:
    """The choice between ``options``; [] where there is only one."""
    return [Choice(key, question, options)] if len(options) > 1 else []


def split_of(name: str) -> str | None:
    """The split that a file's name contains: train for train.tsv, test for qrels.test.txt; None if it contains none."""
    words = name.lower().replace("-", ".").replace("_", ".").split(".")
    return next((NAMES[word] for word in words if word in NAMES), None)


def data_set(folder: Path) -> Layout | None:
    """The two files of ESCI or of Amazon-C4, whose grades and splits their own tasks know."""
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    for task, params, names in _DATA_SETS:
        files = [found.name for name in names for found in list(_files(folder, name))[:1]]
        if len(files) == len(names):
            unused = [name for name in there if name not in files]
            notes = _NOTES_OF_ESCI if task == "esci" else {}
            return Layout(task, dict(params), [", ".join(files)], (), (), unused=unused, notes=notes)
    return None


def beir(folder: Path) -> Layout | None:
    """A folder with corpus.jsonl, queries.jsonl and qrels/*.tsv."""
    corpus, queries = (next(_files(folder, name), None) for name in ("corpus.jsonl", "queries.jsonl"))
    qrels = sorted(folder.glob("qrels/*.tsv")) + sorted(folder.glob("qrels/*.tsv.gz"))
    if corpus is None or queries is None or not qrels:
        return None
    names = {path: path.name.removesuffix(".gz").removesuffix(".tsv") for path in qrels}
    splits = _by_split({name: name for name in names.values()}, folder / "qrels")
    texts = {as_text(record.get("_id")): as_text(record.get("text")) for record, _ in read(queries)}
    events = []
    for path in qrels:
        if names[path] not in splits.values():
            continue
        for line, where in lines(path):
            fields = [text.strip() for text in line.split("\t")]
            if len(fields) == 3 and fields[0] != "query-id":
                events.append(_judgment(fields[0], fields[1], fields[2], where, texts))
    read_files = [corpus.name, queries.name, *(f"qrels/{p.name}" for p in qrels if names[p] in splits.values())]
    items = [_item(record, "_id", "title", ["text"], where) for record, where in read(corpus)]
    return Layout("beir", {}, [f"{', '.join(read_files)} (BEIR)"], items, events, splits)


def trec(folder: Path) -> Layout | None:
    """A folder with a corpus, topics*.tsv (or .txt) and qrels*.txt (or .tsv)."""
    named = (path for name in ("corpus", "documents", "docs") for path in sorted(folder.glob(f"{name}*")))
    corpus = next((path for path in named if path.is_file() and is_table(path)), None)
    topics, qrels = (
        [path for pattern in (f"{name}*", f"*.{name}", f"*/{name}*") for path in sorted(folder.glob(pattern))]
        for name in ("topics", "qrels")
    )
    topics, qrels = ([path for path in dict.fromkeys(paths) if path.is_file()] for paths in (topics, qrels))
    if corpus is None or not topics or not qrels:
        return None
    by_split = [
        _by_split({str(path.relative_to(folder)): path.name for path in paths}, folder) for paths in (topics, qrels)
    ]
    texts_of = {query: text for path in topics for query, text, _ in read_topics(path)}
    events = []
    for name in by_split[1].values():
        for line, where in lines(folder / name):
            fields = line.split()
            if len(fields) == 4:
                events.append(_judgment(fields[0], fields[2], fields[3], where, texts_of))
    if len(by_split[0]) > 1 and by_split[0].keys() != by_split[1].keys():
        both = " and ".join(f"{', '.join(named.values())} ({', '.join(named)})" for named in by_split)
        raise UserError(f"{folder}: {both}: give topics and qrels for the same splits, in files that are called so")
    if len(by_split[0]) == 1:  # One file of topics serves all splits.
        by_split[0] = dict.fromkeys(by_split[1], next(iter(by_split[0].values())))
    table = open_table(corpus)
    keys = [name for name in ("id", "_id", "docno") if name in table.given] or id_columns(table)
    bodies = [name for name in ("text", "contents") if name in table.given][:1] or texts(table, [*keys[:1], "title"])
    if not keys or not bodies:
        raise UserError(
            f"{corpus}: no {'text' if keys else 'id'} among its columns {', '.join(table.columns)}: call them id, "
            "title and text"
        )
    params: dict[str, Any] = {"corpus": corpus.name, "topics": by_split[0], "qrels": by_split[1]}
    if keys[0] != "id":
        params["id"] = keys[0]
    if bodies not in (["text"], ["contents"]):
        params["text"] = bodies
    items = [_item(record, keys[0], "title", bodies, where) for record, where in read(corpus)]
    files = [params["corpus"], *dict.fromkeys(by_split[0].values()), *by_split[1].values()]
    return Layout("trec", params, [f"{', '.join(files)} (TREC)"], items, events)


def published(folder: Path) -> Layout | None:
    """Interactions in the layout of a published data set: RecBole's files, MovieLens, Amazon Reviews 2023."""
    for name, known in sequential.LAYOUTS.items():
        if name in ("interactions", "sessions"):
            continue
        files = _files_of(folder, known)
        if files is None:
            continue
        interactions, items, category = files
        params = {"layout": name, "category": category} if category else {"layout": name}
        found = [
            _item(record, known.id, known.title, known.text, where)
            for record, where in read(items, known.item_separator, known.item_names, known.encoding)
        ]
        events = [
            Event(
                as_text(record.get(known.item)),
                where,
                user=as_text(record.get(known.user)),
                time=record.get(known.time),
            )
            for record, where in read(interactions, known.separator, known.names, known.encoding)
        ]
        there = [str(path.relative_to(folder)) for path in (interactions, items)]
        return Layout("sequential", params, [f"{', '.join(there)} ({name})"], found, events)
    return None


def _files_of(folder: Path, known: sequential.Layout) -> tuple[Path, Path, str | None] | None:
    """The files of interactions and items, and the category, which Amazon's file names have; None where they lack.

    Raises UserError where there are several pairs of them.
    """
    pairs = []
    for pattern in known.items:
        for items in _files(folder, pattern.replace("{category}", "*")):
            category = items.name.removesuffix(".gz").removesuffix(".jsonl").removeprefix("meta_")
            patterns = [one.replace("{category}", category) for one in known.interactions]
            logs = [path for one in patterns for path in _files(folder, one)]
            if logs:
                pairs.append((logs[0], items, category if "{category}" in pattern else None))
    if len(pairs) > 1:
        names = ", ".join(items.name for _, items, _ in pairs)
        raise UserError(f"{folder}: several data sets ({names}): put each into a folder of its own, and name one")
    return pairs[0] if pairs else None


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    yield from sorted(itertools.chain(folder.glob(pattern), folder.glob(f"{pattern}.gz")))


def _by_split(names: dict[str, str], folder: Path) -> dict[str, str]:
    """split -> the file with its queries. names: what the recipe calls a file -> the file's name.

    If no name contains the training split, the one file whose name contains no split is taken for training. Raises
    UserError if there are several such files.
    """
    found: dict[str, str] = {}
    silent = []
    for called, name in names.items():
        split = split_of(name)
        if split is None or split in found:
            silent.append(called)
        else:
            found[split] = called
    if "train" not in found:
        rest = silent or list(found.values())
        if len(rest) > 1 and not silent:  # Validation and test without training.
            raise UserError(
                f"{folder}: {', '.join(names)} and no file for training: name one of them train, or join them into one"
            )
        if len(silent) > 1:
            raise UserError(
                f"{folder}: {', '.join(silent)}: their names do not say which of them is for training: "
                "put train into the name of that one"
            )
        found = {split: called for split, called in found.items() if called != rest[0]} | {"train": rest[0]}
    return {split: found[split] for split in SPLITS if split in found}


def _judgment(query: str, item: str, grade: str, where: str, texts: dict[str, str]) -> Event:
    return Event(item, where, texts.get(query), query, grade=grade)


def _item(record: Record, key: str, title: str, text: Sequence[str], where: str) -> Item:
    return Item(
        as_text(record.get(key)),
        as_text(record.get(title)),
        " ".join(as_text(record.get(name)) for name in text),
        where,
    )
