"""Files in TREC's formats, as people have them."""

import csv
import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec_r1 import tasks
from rec_r1.config import TaskConfig, UserError
from rec_r1.tasks import trec
from rec_r1.tasks.task_cache import folder_of, summary

DOCUMENTS = [
    {"id": f"d{n}", "title": f"title {n}", "text": f'text of "document" {n}, which is of some length'}
    for n in range(12)
]
TOPICS = {
    "train": {"1": "red shoes", "2": "blue hats", "3": "green ties", "9": "never judged"},
    "validation": {"4": "warm socks"},
    "test": {"301": "International Organized Crime", "302": "Poliomyelitis and Post-Polio"},
}
QRELS = {
    "train": "1 0 d1 2\n1 0 d2 1\n1 0 d2 3\n2\tQ0\td3\t1\n\n3   0  d4    1\n3 0 d5 0\n",
    "validation": "4 0 d6 1\n",
    "test": "301 0 d7 1\n301 0 d8 -1\n302 0 d9 2\n",
}
CLASSIC = """<top>

<num> Number: 301
<title> International Organized
Crime

<desc> Description:
Identify organizations with 3 < 5 members.

<narr> Narrative:
Relevant.
</top>

<top>
<num> Number: 302 <title> Topic: Poliomyelitis and Post-Polio
<desc> x
</top>
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for part in TOPICS:
        (folder / f"topics.{part}.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in TOPICS[part].items()))
        (folder / f"qrels.{part}.txt").write_text(QRELS[part])
    return folder


def load(folder: Path, **params):
    return tasks.load(TaskConfig(name="trec", path=str(folder), params=params))


def test_the_folder(folder, caplog):
    with caplog.at_level(logging.INFO):
        task = load(folder)
    assert task.name == "mine" and len(task.catalog) == 12
    assert task.catalog.texts[0] == 'title 0 text of "document" 0, which is of some length'
    assert task.catalog.titles[0] == "title 0"
    assert {part: list(split.ids) for part, split in task.splits.items()} == {
        "train": ["1", "2", "3"],
        "validation": ["4"],
        "test": ["301", "302"],
    }
    assert task.train.rows == [(1, 2), (3,), (4,)] and task.train.grades == [(2.0, 3.0), (1.0,), (1.0,)]
    assert task.test.queries == list(TOPICS["test"].values())
    assert "mine: 12 documents" in caplog.text
    assert "train: 3 queries, judgments: 1 of grade 3, 1 of grade 2, 2 of grade 1" in caplog.text


@pytest.mark.slow
def test_classic_topics_are_the_same(folder):
    expected = load(folder).splits
    (folder / "topics.test.tsv").write_text(CLASSIC)
    assert load(folder).splits == expected
    (folder / "topics.test.tsv").write_text(CLASSIC.replace("</top>", "").replace("<desc>", "</title>\n<desc>"))
    assert load(folder).splits == expected
    with gzip.open(folder / "topics.robust.gz", "wt") as file:
        file.write(CLASSIC)
    topics = {part: f"topics.{part}.tsv" for part in ("train", "validation")} | {"test": "topics.robust"}
    assert load(folder, topics=topics).splits == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "jsonl.gz", "parquet", "headless.tsv"])
def test_the_corpus_in_other_formats(folder, kind):
    expected = load(folder)
    rows = [{"docno": d["id"], "name": d["title"], "body": d["text"], "junk": "[1, 2]"} for d in DOCUMENTS]
    name, more = f"docs.{kind}", {}
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    else:
        with (gzip.open if kind.endswith("gz") else open)(folder / name, "wt", newline="") as file:
            if kind == "jsonl.gz":
                file.writelines(json.dumps(row) + "\n" for row in rows)
            elif kind.startswith("csv"):
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            else:
                lines = ["\t".join(row.values()) for row in rows]
                if kind == "headless.tsv":
                    more = {"columns": list(rows[0])}
                else:
                    lines.insert(0, "\t".join(rows[0]))
                file.write("\n".join(lines) + "\n")
    task = load(folder, corpus=name, id="docno", title="name", text=["body"], **more)
    assert task.catalog.fingerprint == expected.catalog.fingerprint and task.splits == expected.splits


def test_pyserini_s_files_and_a_folder_of_them(folder):
    (folder / "corpus").mkdir()
    for i, own in enumerate((DOCUMENTS[:5], DOCUMENTS[5:])):
        text = "".join(json.dumps({"id": d["id"], "contents": f"{d['title']} {d['text']}"}) + "\n" for d in own)
        (folder / "corpus" / f"docs{i}.jsonl").write_text(text)
    task = load(folder, corpus="corpus/*.jsonl")
    assert list(task.catalog.texts) == list(load(folder).catalog.texts)
    assert task.catalog.titles[0] == 'title 0 text of "document" 0, which is of some length'


def test_a_parquet_corpus_needs_no_title(folder):
    rows = [{"id": n, "text": d["text"], "vector": [0.5] * 4} for n, d in enumerate(DOCUMENTS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "corpus.parquet")
    for path in folder.glob("qrels.*"):
        path.write_text(path.read_text().replace(" d", " ").replace("\td", "\t"))
    assert load(folder, corpus="corpus.parquet").train.rows == [(1, 2), (3,), (4,)]


def test_limits(folder):
    assert {part: len(s) for part, s in load(folder, limits={"train": 2, "test": 1}).splits.items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }


def test_a_text_of_a_held_out_query_is_not_trained_on(folder, caplog):
    with (folder / "topics.train.tsv").open("a") as file:
        file.write("10\t POLIOMYELITIS and  post-polio\n")
    with (folder / "qrels.train.txt").open("a") as file:
        file.write("10 0 d1 1\n")
    assert list(load(folder).train.ids) == ["1", "2", "3"]
    assert "train: 1 query has the text of a held-out query" in caplog.text


def test_the_second_time_it_comes_from_the_cache(folder, monkeypatch):
    first = load(folder)
    monkeypatch.setattr(trec, "_build", lambda *_: pytest.fail("read again"))
    assert load(folder).splits == first.splits


def test_files_of_one_name_keep_their_checksums_apart(folder):
    names = {}
    for kind in ("topics", "qrels"):
        (folder / kind).mkdir()
        names[kind] = {part: f"{kind}/{part}.tsv" for part in TOPICS}
        for path in folder.glob(f"{kind}.*"):
            path.rename(folder / kind / f"{path.name.split('.')[1]}.tsv")
    load(folder, **names)
    files = [folder / "corpus.jsonl", *(folder / names[kind][part] for kind in names for part in trec.SPLITS)]
    config = TaskConfig(name="trec", path=str(folder), params=names)
    assert {"corpus.jsonl", "topics/train.tsv", "qrels/train.tsv"} <= set(summary(folder_of(config, files))["sources"])


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: append(f / "qrels.train.txt", "1 d1 1\n"), r"qrels\.train\.txt:8: '1 d1 1': write four fields"),
        (lambda f: append(f / "qrels.train.txt", "1 0 d1 good\n"), r"qrels\.train\.txt:8: 'grade' must be a number"),
        (lambda f: append(f / "qrels.train.txt", "77 0 d1 1\n"), r"qrels\.train\.txt: 1 judged query is .*'77'"),
        (lambda f: append(f / "qrels.train.txt", "1 0 zz 1\n"), r"qrels\.train\.txt: 1 of \d+ ids .*'zz'"),
        (lambda f: append(f / "qrels.train.txt", "301 0 d1 1\n"), r"in both qrels\.train\.txt \(train\) and .*'301'"),
        (lambda f: (f / "qrels.test.txt").write_text("\n"), r"qrels\.test\.txt: no judgments"),
        (lambda f: append(f / "topics.train.tsv", "no tab\n"), r"topics\.train\.tsv:5: 'no tab': write id, tab, text"),
        (lambda f: append(f / "topics.train.tsv", "1\tother\n"), r"topics\.train\.tsv:5: query '1' is 'other' here"),
        (
            lambda f: (f / "topics.test.tsv").write_text("<top>\n<num> Number: 1\n</top>\n<top>\n"),
            r"topics\.test\.tsv:1: topic without <title>",
        ),
        (lambda f: append(f / "corpus.jsonl", "{broken\n"), r"corpus\.jsonl:13: not valid JSON"),
        (lambda f: append(f / "corpus.jsonl", '{"id": "x"}\n'), r"corpus\.jsonl:13: no column 'text', only id"),
        (lambda f: append(f / "corpus.jsonl", json.dumps(DOCUMENTS[0])), r"corpus\.jsonl: .*'d0' occurs twice"),
        (lambda f: (f / "topics.test.tsv").unlink(), r"no test topics \(topics\.test\.tsv, or with \.gz\)"),
    ],
)
def test_broken_files_name_file_and_line(folder, break_it, message):
    break_it(folder)
    with pytest.raises(UserError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"topics": {"test": "x"}}, "name a file for train"),
        ({"topics": {"train": "x"}}, "name files of both for the same splits"),
        ({"text": []}, "name at least one column"),
        ({"limits": {"test": 0}}, "a number from 1"),
        ({"corpus": ""}, "no corpus"),
    ],
)
def test_bad_settings(folder, params, message):
    with pytest.raises(UserError, match=message):
        load(folder, **params)
