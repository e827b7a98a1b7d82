"""Amazon-C4: queries in CSV, items in JSONL, the test across categories."""

import csv
import gzip
import json
import logging
from pathlib import Path

import pytest

from rec_r1 import tasks
from rec_r1.config import TaskConfig, UserError
from rec_r1.tasks import amazon_c4
from rec_r1.tasks.amazon_categories import canonical, fitting
from rec_r1.tasks.query_pools import normal

# As the published file shortens them; "Toys" holds the word games in none of its names here.
LABELS = ["Games", "Baby", "Office", "Sports", "Home", "Care", "Books", "Toys_and_Games"]
ITEMS = [
    {
        "item_id": f"I{n:02}",
        "category": LABELS[n % 8],
        "metadata": f"Item number {n} with a name of rather more than twelve words, as Amazon's items often have",
    }
    for n in range(48)
]


def queries() -> list[dict]:
    rows = [(n, f"I need, for my \n home, thing {n}", f"I{n:02}") for n in range(32)]
    rows.append((90, "  i NEED, for my home, THING 0 ", "I04"))  # the text of query 0, which is for the test
    return [
        {"qid": n, "query": text, "item_id": item, "user_id": f"U{n}", "ori_rating": 5, "ori_review": 'so "good"'}
        for n, text, item in rows
    ]


def write(folder: Path, rows=None, items=ITEMS, packed: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    ending, opened = (".gz", gzip.open) if packed else ("", open)
    rows = queries() if rows is None else rows
    with opened(folder / f"test.csv{ending}", "wt", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with opened(folder / f"{amazon_c4.ITEMS}{ending}", "wt") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)
    return folder


def load(folder: Path, **params):
    params = {"validation_share": 0.3, **params}
    return tasks.load(TaskConfig(name="amazon_c4", path=str(folder), params=params))


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "c4")


def test_four_categories_are_the_test(folder, caplog):
    with caplog.at_level(logging.INFO):
        task = load(folder)
    assert task.name == "amazon-c4" and len(task.catalog) == 48
    assert len(task.test) == 16 and len(task.train) + len(task.validation) == 16
    assert set(task.test.slices["category"]) == {"Games", "Baby", "Office", "Sports"}
    assert set(task.train.slices["category"]) <= {"Home", "Care", "Books", "Toys_and_Games"}
    assert task.test.ids[:5] == ["0", "1", "2", "3", "8"] and task.test.queries[0] == "I need, for my home, thing 0"
    for split in task.splits.values():
        assert [len(rows) for rows in split.rows] == [1] * len(split) and set(split.grades) == {(1.0,)}
    assert task.catalog.ids[task.test.rows[0][0]] == "I00"
    assert task.catalog.titles[0] == "Item number 0 with a name of rather more than twelve words,"
    assert task.catalog.texts[0].endswith("often have")
    assert "train: 1 query has the text of a held-out query" in caplog.text
    assert "test: 16 queries, judgments: 16 of grade 1" in caplog.text


def test_no_text_stands_in_two_parts(folder):
    for seed in range(2):
        task = load(folder, seed=seed)
        texts = {part: {normal(query) for query in split.queries} for part, split in task.splits.items()}
        assert not texts["train"] & texts["validation"] and not texts["test"] & (texts["train"] | texts["validation"])
        assert "90" not in {*task.train.ids, *task.validation.ids} and len(task.test) == 16


def test_packed_files_are_the_same(folder, tmp_path):
    one, other = load(folder), load(write(tmp_path / "packed", packed=True))
    assert one.splits == other.splits and one.catalog.fingerprint == other.catalog.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toys & games", "Toys_and_Games", "TOYS AND GAMES"])
def test_other_categories_by_any_spelling(folder, name):
    task = load(folder, test_categories=[name])
    assert set(task.test.slices["category"]) == {"Toys_and_Games"} and len(task.test) == 4


def test_an_unknown_category_lists_those_that_exist(folder):
    with pytest.raises(UserError, match=r"no item has the category 'Cars': choose from Baby, Books, Care, Games, Home"):
        load(folder, test_categories=["Baby", "Cars"])


def test_names_of_categories():
    same = ["Sports_and_Outdoors", "Sports & Outdoors", "sports", "SPORTS and outdoors"]
    assert len(set(map(canonical, same))) == 1
    assert canonical("Games") == canonical("Video_Games") != canonical("Toys & Games")
    assert canonical("Brandy") == "brandy"  # "and" only as a word
    assert fitting(["Baby Products"], ["Baby", "Books"], "x", "item") == {"Baby"}


@pytest.mark.slow
def test_a_smaller_catalogue_keeps_what_is_asked_for(folder):
    relevant = {f"I{n:02}" for n in range(32)}
    small, larger = ({*load(folder, max_items=n).catalog.ids} for n in (36, 40))
    assert len(small) == 36 and len(larger) == 40 and relevant < small < larger
    task = load(folder, max_items=32)
    assert {*task.catalog.ids} == relevant and task.test.ids == load(folder).test.ids
    assert len(load(folder, max_items=999).catalog) == 48
    with pytest.raises(UserError, match="31 is below the number of targets, 32,"):
        load(folder, max_items=31)


def test_limits(folder):
    task = load(folder, limits={"train": 5, "validation": 1, "test": 7})
    assert {part: len(split) for part, split in task.splits.items()} == {"train": 5, "validation": 1, "test": 7}
    assert all(len(split.slices["category"]) == len(split) for split in task.splits.values())


def test_the_second_time_it_comes_from_the_cache(folder, monkeypatch):
    first = load(folder)
    monkeypatch.setattr(amazon_c4, "_build", lambda *_: pytest.fail("read again"))
    assert load(folder).splits == first.splits


def test_an_item_that_stands_twice_counts_once(tmp_path, caplog):
    task = load(write(tmp_path / "x", items=[*ITEMS, {**ITEMS[0], "metadata": "later"}]))
    assert len(task.catalog) == 48 and "1 record repeats the id of an earlier item" in caplog.text
    assert task.catalog.texts[0].startswith("Item number 0")


def without(rows: list[dict], column: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key != column} for row in rows]


@pytest.mark.parametrize(
    ("rows", "items", "message"),
    [
        (None, ITEMS[1:], r"metadata_1M\.jsonl: 1 targets of queries are missing, first: 'I00'"),
        (None, without(ITEMS, "metadata"), r"metadata_1M\.jsonl:1: no column 'metadata', only item_id, category"),
        (None, [{**ITEMS[0], "category": ""}, *ITEMS[1:]], r"metadata_1M\.jsonl:1: 'category' is empty"),
        (
            without(queries(), "item_id"),
            ITEMS,
            r"test\.csv:3: no column 'item_id', only qid, query",
        ),  # a text of 2 lines
        ([*queries(), queries()[0]], ITEMS, r"test\.csv:68: query id '0' appears twice"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path, rows, items, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "x", rows, items))


def test_broken_json_names_its_line(folder):
    with (folder / amazon_c4.ITEMS).open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"sampled_item_metadata_1M\.jsonl:49: not valid JSON"):
        load(folder)


def test_a_damaged_archive_is_named(tmp_path):
    folder = write(tmp_path / "x", packed=True)
    path = folder / f"{amazon_c4.ITEMS}.gz"
    content = bytearray(path.read_bytes())
    content[30:60] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"1M\.jsonl\.gz: (cannot be read|not UTF-8)|1M\.jsonl\.gz:\d+: not valid JSON"):
        load(folder)
