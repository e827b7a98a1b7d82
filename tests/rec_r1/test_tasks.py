import gzip
import importlib
import json
import math

import numpy as np
import pytest
import Stemmer
from hypothesis import given
from hypothesis import strategies as st

import retrievers
from rec_r1 import tasks
from rec_r1.config import TaskConfig, TrainFilter, UserError
from rec_r1.tasks import build_emoji, emoji, pad, raw_scores
from rewards import Outcome, RankingReward


@pytest.fixture(scope="module")
def emoji_task():
    return tasks.load(TaskConfig())


def test_emoji_counts_and_splits(emoji_task):
    assert len(emoji_task.catalog) == 1854
    assert {part: len(split) for part, split in emoji_task.splits.items()} == {
        "train": 336,
        "validation": 89,
        "test": 219,
    }
    stem = Stemmer.Stemmer("english").stemWord
    stems = {part: {stem(q.lower()) for q in split.queries} for part, split in emoji_task.splits.items()}
    assert not stems["train"] & stems["validation"]
    assert not stems["train"] & stems["test"]
    assert not stems["validation"] & stems["test"]


def test_no_emoji_document_carries_a_query_as_a_tag():
    data = json.loads(gzip.decompress(emoji.DATA.read_bytes()))
    queries = {query for query, _, _ in data["queries"]}
    assert not any(queries & set(keywords) for _, _, keywords in data["items"])
    assert all(2 <= len(rows) <= 25 for _, _, rows in data["queries"])


def test_the_prompt_examples_of_the_quickstart_are_no_queries(emoji_task):
    for split in emoji_task.splits.values():
        assert not {"happy", "rain"} & set(split.queries)


def test_emoji_raw_bm25_leaves_room(emoji_task):
    retriever = retrievers.open("bm25", emoji_task.catalog)
    raw = raw_scores(emoji_task.test, retriever, RankingReward("ndcg", 10))
    assert raw.mean() == pytest.approx(0.381, abs=0.001) and (raw < 0.2).mean() == pytest.approx(0.470, abs=0.001)


def test_build_emoji_holds_out_whole_keywords():
    annotations = {chr(0x1F600 + i): {"tts": [f"name {i}"], "default": [f"k{i % 20}", f"own{i}"]} for i in range(60)}
    annotations["?"] = {"tts": ["question mark"], "default": ["k1"]}  # below the symbols
    data = build_emoji.build(annotations)
    assert data == build_emoji.build(annotations)
    assert len(data["items"]) == 60
    held_out = {query: rows for query, _, rows in data["queries"]}
    assert 2 <= len(held_out) <= 15
    for row, (_, _, keywords) in enumerate(data["items"]):
        own = f"k{row % 20}"
        assert (row in held_out[own] and own not in keywords) if own in held_out else own in keywords


def config_for(folder, **more) -> TaskConfig:
    return TaskConfig(name="beir", path=str(folder), **more)


def test_beir_folder(beir_folder):
    task = tasks.load(config_for(beir_folder))
    assert len(task.catalog) == 12 and [len(split) for split in task.splits.values()] == [5, 2, 2]
    assert task.catalog.titles[0] == "Trail running shoes" and task.catalog.texts[0].startswith(
        "Trail running shoes light"
    )
    assert dict(zip(task.train.rows[0], task.train.grades[0], strict=True)) == {
        0: 3.0,
        1: 2.0,
        8: 1.0,
    }  # grade 0 dropped
    swapped = tasks.load(config_for(beir_folder, splits={"train": "dev", "validation": "train", "test": "test"}))
    assert swapped.train.ids == task.validation.ids


@pytest.mark.parametrize("nothing", [None, math.nan], ids=["null", "NaN"])
def test_a_missing_title_or_text_is_no_word(beir_folder, nothing):
    """pandas writes a missing text as NaN."""
    rows = [json.loads(line) for line in (beir_folder / "corpus.jsonl").read_text().splitlines()]
    rows[0] |= {"title": nothing, "text": "a lamp"}
    rows[1] |= {"title": "A rug", "text": nothing}
    (beir_folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    catalog = tasks.load(config_for(beir_folder)).catalog
    assert list(catalog.titles[:2]) == ["a lamp", "A rug"] and list(catalog.texts[:2]) == ["a lamp", "A rug"]


def test_the_corpus_is_read_again_when_it_changes(beir_folder):
    assert len(tasks.load(config_for(beir_folder)).catalog) == 12
    with (beir_folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d13", "title": "", "text": "new"}\n')
    assert len(tasks.load(config_for(beir_folder)).catalog) == 13


def append(path, text):
    with path.open("a") as file:
        file.write(text)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "corpus.jsonl").unlink(), r"corpus\.jsonl: no such file"),
        (lambda f: (f / "qrels" / "dev.tsv").unlink(), r"dev\.tsv: no such file: .*test, train"),
        (lambda f: append(f / "corpus.jsonl", "{broken\n"), r"corpus\.jsonl:13: not valid JSON"),
        (lambda f: append(f / "corpus.jsonl", "[1]\n"), r"corpus\.jsonl:13: expected an object"),
        (lambda f: append(f / "corpus.jsonl", '{"_id": "x"}\n'), r"corpus\.jsonl:13: no 'text'"),
        (lambda f: append(f / "corpus.jsonl", '{"_id": "d1", "text": "x"}\n'), r"corpus\.jsonl: .*'d1' occurs twice"),
        (lambda f: append(f / "queries.jsonl", '{"id": "x", "text": "y"}\n'), r"queries\.jsonl:10: no '_id'"),
        (lambda f: append(f / "qrels" / "train.tsv", "q1\td1\n"), r"train\.tsv:18: .*write three tab-separated"),
        (lambda f: append(f / "qrels" / "train.tsv", "q1\td1\tgood\n"), r"train\.tsv:18: "),
        (lambda f: append(f / "qrels" / "train.tsv", "q99\td1\t1\n"), r"train\.tsv: 1 judged query is .*'q99'"),
        (lambda f: append(f / "qrels" / "train.tsv", "q1\tzz\t1\n"), r"train\.tsv: 1 of \d+ ids .*'zz'"),
        (lambda f: append(f / "qrels" / "test.tsv", "q1\td1\t1\n"), r"in both train \(train\) and test .*'q1'"),
        (lambda f: (f / "qrels" / "test.tsv").write_text("q8\td1\t0\n"), r"test\.tsv: no query with a relevant"),
    ],
)
def test_broken_beir_folders_name_file_and_line(beir_folder, break_it, message):
    break_it(beir_folder)
    with pytest.raises(UserError, match=message):
        tasks.load(config_for(beir_folder))


def test_bad_task_settings(tmp_path):
    for config, message in (
        (TaskConfig(name="emojy"), "did you mean 'emoji'"),
        (TaskConfig(name="nonsense"), "task.name: unknown 'nonsense': choose from "),
        (TaskConfig(name="no.such.module"), r"cannot import 'no.such.module' \(No module named 'no'\): check the path"),
        (TaskConfig(name="json.decoder"), "no function load"),
        (TaskConfig(name="beir"), "task.path: not set"),
        (TaskConfig(name="beir", path=str(tmp_path / "x")), "is not a folder"),
        (TaskConfig(name="beir", path=str(tmp_path), splits={"test": "test"}), "name a qrels file for train"),
    ):
        with pytest.raises(UserError, match=message):
            tasks.load(config)


def test_a_missing_dependency_of_a_task_is_named(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "emoji", "rec_r1.tasks.emoji_of_tomorrow")
    monkeypatch.setattr(importlib, "import_module", _without_pandas)
    with pytest.raises(UserError, match=r"cannot import 'emoji' \(No module named 'pandas.x'\): install pandas, which"):
        tasks.find(TaskConfig())


def _without_pandas(path):
    raise ModuleNotFoundError("No module named 'pandas.x'", name="pandas.x")


def test_a_duplicate_target_counts_once_with_its_best_grade():
    rows, grades = pad([[5, 5, 2], [7]], [[1.0, 3.0, 2.0], [1.0]])
    assert sorted(zip(rows[0].tolist(), grades[0].tolist(), strict=True)) == [(2, 2.0), (5, 3.0)]
    assert rows[1].tolist() == [7, -1] and grades[1].tolist() == [1.0, 0.0]
    ranks = np.where(rows[:1] == 5, 1, 2).astype(np.int32)
    assert RankingReward("ndcg", 10)(Outcome([""], [None], ranks, grades[:1])).tolist() == [1.0]
    assert pad([], [])[0].shape == (0, 0)


def test_keep_headroom(beir_folder):
    task = tasks.load(config_for(beir_folder))
    retriever = retrievers.open("bm25", task.catalog)
    raw = raw_scores(task.train, retriever, RankingReward("ndcg", 10))
    threshold = float(np.median(raw))
    kept = tasks.keep_headroom(task.train, retriever, TrainFilter(threshold))
    assert kept.ids == [i for i, score in zip(task.train.ids, raw, strict=True) if score < threshold]
    assert 0 < len(kept) < len(task.train)
    assert tasks.keep_headroom(task.train, retriever, TrainFilter()).ids == task.train.ids
    with pytest.raises(UserError, match="leaves no training query"):
        tasks.keep_headroom(task.train, retriever, TrainFilter(-1.0))


def test_no_stem_of_an_emoji_query_stands_in_two_splits(emoji_task):
    """Word by word, as the builder stems."""
    stem = Stemmer.Stemmer("english").stemWords
    part_of: dict[tuple[str, ...], str] = {}
    for part, split in emoji_task.splits.items():
        for query in split.queries:
            assert part_of.setdefault(tuple(stem(query.lower().split())), part) == part, query


def test_no_emoji_query_stands_in_two_splits_and_grades_are_one(emoji_task):
    queries = [query for split in emoji_task.splits.values() for query in split.queries]
    assert len(queries) == len(set(queries)) == 336 + 89 + 219
    assert {grade for split in emoji_task.splits.values() for grades in split.grades for grade in grades} == {1.0}


def test_build_emoji_keeps_one_stem_in_one_split():
    forms = {"dance": ["dance", "dances", "dancing"], "run": ["run", "runs", "running"], "cook": ["cook", "cooks"]}
    words = [form for variants in forms.values() for form in variants]
    # Every word at several symbols; a suffix makes more stems, each with the same inflections.
    annotations = {
        chr(0x1F600 + i): {"tts": [f"name {i}"], "default": [f"{word} {i % 10}" for word in words]} for i in range(30)
    }
    queries = build_emoji.build(annotations)["queries"]
    stem = Stemmer.Stemmer("english").stemWords
    part_of: dict[tuple[str, ...], set[str]] = {}
    for query, part, _ in queries:
        part_of.setdefault(tuple(stem(query.split())), set()).add(part)
    assert len(part_of) < len(queries)  # some stem has several forms, else this shows nothing
    assert {part for parts in part_of.values() for part in parts} == {"train", "validation", "test"}
    assert all(len(parts) == 1 for parts in part_of.values())


def test_build_emoji_takes_only_keywords_that_2_to_25_items_carry():
    annotations = {
        chr(0x1F300 + i): {"tts": [f"name {i}"], "default": [f"once{i}", "always", f"pair{i // 2}", f"big{i // 26}"]}
        for i in range(104)
    }
    held_out = {query: rows for query, _, rows in build_emoji.build(annotations)["queries"]}
    assert held_out and all(query.startswith("pair") and len(rows) == 2 for query, rows in held_out.items())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "queries.jsonl").unlink(), r"queries\.jsonl: no such file"),
        (lambda f: (f / "corpus.jsonl").write_text(""), r"corpus\.jsonl: the catalogue is empty"),
        (lambda f: (f / "corpus.jsonl").write_text("\n\n"), r"corpus\.jsonl: the catalogue is empty"),
        (lambda f: append(f / "queries.jsonl", "{broken\n"), r"queries\.jsonl:10: not valid JSON"),
        (lambda f: append(f / "queries.jsonl", '\n"x"\n'), r"queries\.jsonl:11: expected an object, got str"),
        (lambda f: append(f / "queries.jsonl", "[" * 100_000), r"queries\.jsonl:10: not valid JSON"),
        (
            lambda f: append(f / "queries.jsonl", '{"_id": "x", "text": "smile \\ud83d"}\n'),
            r"queries\.jsonl:10: half a character: .*write both, or remove it",
        ),
        (
            lambda f: append(f / "corpus.jsonl", '{"_id": "x", "text": "a", "title": "\\uDE00\\ud83d"}\n'),
            r"corpus\.jsonl:13: half a character",
        ),
        (lambda f: (f / "corpus.jsonl").write_bytes(b"caf\xe9\n"), r"corpus\.jsonl: not UTF-8"),
        (lambda f: (f / "qrels" / "train.tsv").write_text(""), r"train\.tsv: no judgments"),
        (
            lambda f: append(f / "qrels" / "train.tsv", "".join(f"q1\tz{i}\t0\n" for i in range(5))),
            r"train\.tsv: 5 of \d+ ids are not in the catalogue, first: '\w+', '\w+', '\w+': use the corpus",
        ),
        (
            lambda f: append(f / "qrels" / "train.tsv", "".join(f"x{i}\td1\t1\n" for i in range(5))),
            r"train\.tsv: 5 judged queries are not in the query file, first: 'x0', 'x1', 'x2': add",
        ),
        (lambda f: [path.unlink() for path in (f / "qrels").iterdir()], r"the ones there: none"),
    ],
)
def test_more_broken_beir_folders(beir_folder, break_it, message):
    break_it(beir_folder)
    with pytest.raises(UserError, match=message):
        tasks.load(config_for(beir_folder))


def test_of_a_pair_judged_twice_the_best_grade_counts(beir_folder):
    append(beir_folder / "qrels" / "train.tsv", "q1\td1\t1\nq1\td2\t9\n")
    train = tasks.load(config_for(beir_folder)).train
    assert dict(zip(train.rows[0], train.grades[0], strict=True)) == {0: 3.0, 1: 9.0, 8: 1.0}


def test_windows_line_ends_and_a_missing_header_are_read(beir_folder):
    before = tasks.load(config_for(beir_folder))
    for path in (beir_folder / "qrels").iterdir():
        _, *lines = path.read_text().splitlines()
        path.write_bytes("".join(line + "\r\n" for line in lines).encode())
    after = tasks.load(config_for(beir_folder))
    assert after.splits == before.splits


def test_a_query_without_a_relevant_document_is_left_out(beir_folder, caplog):
    with (beir_folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q10", "text": "nothing"}\n')
    append(beir_folder / "qrels" / "train.tsv", "q10\td1\t0\nq10\td2\t-1\n")
    task = tasks.load(config_for(beir_folder))
    assert list(task.train.ids) == ["q1", "q2", "q3", "q4", "q5"]
    assert "1 query has no relevant document" in caplog.text


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1.0, 2.0, 3.0])), max_size=6), max_size=5))
def test_pad_keeps_every_row_once_with_its_best_grade(judged):
    rows, grades = pad([[r for r, _ in pairs] for pairs in judged], [[g for _, g in pairs] for pairs in judged])
    assert rows.shape == grades.shape == (len(judged), max((len({r for r, _ in p}) for p in judged), default=0))
    assert rows.dtype == np.int32 and grades.dtype == np.float32
    for pairs, padded, given_grades in zip(judged, rows.tolist(), grades.tolist(), strict=True):
        n = len({r for r, _ in pairs})
        expected = {r: max(g for other, g in pairs if other == r) for r, _ in pairs}
        assert dict(zip(padded[:n], given_grades[:n], strict=True)) == expected
        assert padded[n:] == [-1] * (len(padded) - n) and given_grades[n:] == [0.0] * (len(padded) - n)


def test_pad_refuses_rows_and_grades_of_other_lengths():
    with pytest.raises(ValueError):
        pad([[1, 2]], [[1.0]])


def test_a_null_text_is_no_text(beir_folder):
    append(beir_folder / "corpus.jsonl", '{"_id": "d13", "title": "Bare", "text": null}\n')
    assert tasks.load(config_for(beir_folder)).catalog.texts[12] == "Bare"


def test_an_infinite_grade_names_file_and_line(beir_folder):
    append(beir_folder / "qrels" / "train.tsv", "q1\td1\tinf\n")
    with pytest.raises(UserError, match=r"train\.tsv:18"):
        tasks.load(config_for(beir_folder))


@pytest.mark.parametrize("line", [b"caf\xe9\td1\t1\n", b"q" * 140_000 + b"\td1\t1\n"])
def test_qrels_that_cannot_be_read_name_the_file(beir_folder, line):
    with (beir_folder / "qrels" / "train.tsv").open("ab") as file:
        file.write(line)
    with pytest.raises(UserError, match=r"train\.tsv"):
        tasks.load(config_for(beir_folder))


def test_a_relative_task_name():
    with pytest.raises(UserError, match=r"task\.name"):
        tasks.load(TaskConfig(name=".x"))
