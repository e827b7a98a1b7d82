"""`rec-r1 init` writes a recipe for the files that a task can read, however they are named and encoded."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rec_r1 import config, tasks
from rec_r1.checks.new_recipe import new_recipe, recognise
from rec_r1.config import TaskConfig, UserError
from rec_r1.tasks import esci
from tests.rec_r1.datasets_ import write_jsonl, write_lines

WORDS = ("red shoe", "blue shoe", "green hat", "warm scarf", "rain coat", "wool sock", "silk tie", "straw hat")
ITEMS = ["id,title,description", *(f"p{i},{WORDS[i % 8]} {i},made of {i} parts" for i in range(40))]
CLICKS = ["query,item", *(f"needed thing {i},p{i % 40}" for i in range(60))]


def init(folder: Path, tmp_path: Path) -> tuple[str, TaskConfig, tasks.Task]:
    """What init prints for a folder, the task of its recipe, and what that reads."""
    output = tmp_path / "mine.yaml"
    said = "\n".join(new_recipe(folder, output, on_gpu=False, ask=None))
    task = config.load(output).task
    return said, task, tasks.load(task)


def late(records: list[dict], ending: str, folder: Path) -> Path:
    """A folder whose events are lines of JSON, or one array."""
    write_lines(folder / "items.csv", ITEMS)
    if ending == "json":
        (folder / "clicks.json").write_text(json.dumps(records))
    else:
        write_jsonl(folder / "clicks.jsonl", records)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_column_may_first_occur_late_in_a_file_of_json(tmp_path, ending):
    records = [{"query": f"needed thing {i}", "item": f"p{i % 40}", "clicks": 1, "n": i} for i in range(300)]
    records[250]["purchases"] = 2
    _, config_of_task, task = init(late(records, ending, tmp_path / "data"), tmp_path)
    assert config_of_task.params["columns"]["purchases"] == "purchases"
    assert sorted({float(max(grades)) for split in task.splits.values() for grades in split.grades}) == [1.0, 3.0]
    params = config_of_task.params
    params["columns"]["purchases"] = "no_such_column"
    with pytest.raises(UserError, match="no column 'no_such_column', only query") as refused:
        tasks.load(config_of_task)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.slow
def test_events_of_user_behavior_insights_without_an_object_are_left_out(tmp_path):
    folder = tmp_path / "data"
    write_lines(folder / "items.csv", [line.replace(",", ";") for line in ITEMS])
    write_jsonl(folder / "ubi_queries.jsonl", [{"query_id": f"q{i}", "user_query": f"thing {i}"} for i in range(60)])
    events = [
        {
            "query_id": f"q{i}",
            "action_name": name,
            "timestamp": i,
            "event_attributes": {"object": {which: f"p{i % 40}"}},
        }
        for i in range(60)
        for name, which in (
            ("click", "object_id"),
            ("click", "type"),
            ("impression", "type"),
            ("impression", "object_id"),
        )
        if i % 10 == 0 or which == "object_id"
    ]
    write_jsonl(folder / "ubi_events.jsonl", events)
    said, found, task = init(folder, tmp_path)
    assert found.params["blank"] == "drop" and found.params["separator"] == ";"
    assert "6 rows have no item; first: ubi_events.jsonl:2" in said and "They are left out." in said
    assert "events that count for nothing: impression (66)" in said
    assert sum(map(len, task.splits.values())) == 60


@pytest.mark.slow
@pytest.mark.parametrize("names", [("PRODUCTS.CSV", "CLICKS.CSV"), ("Items.Csv.GZ", "clicks.csv")])
def test_endings_in_capitals(tmp_path, names):
    (tmp_path / "data").mkdir()
    for name, lines in zip(names, (ITEMS, CLICKS), strict=True):
        text = "\n".join(lines).replace(",", ";").encode()
        (tmp_path / "data" / name).write_bytes(gzip.compress(text) if name.endswith("GZ") else text)
    _, found, task = init(tmp_path / "data", tmp_path)
    assert found.params["separator"] == ";" and len(task.catalog) == 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "grades"),
    [
        (("Exact", "Irrelevant"), {"Exact": 100.0, "Irrelevant": 0.0}),
        (("very good", "not good"), {"very good": 1.0, "not good": 0.0}),
        (("yes", "no"), {"yes": 1.0, "no": 0.0}),
        (("2", "unsure"), {"2": 2.0, "unsure": 0.0}),
    ],
)
def test_grades_that_are_names_get_a_draft(tmp_path, labels, grades):
    folder = tmp_path / "data"
    write_lines(folder / "items.csv", ITEMS)
    rows = [
        f"{line},{labels[0]}\n{line.partition(',')[0]},p{(i + 9) % 40},{labels[1]}" for i, line in enumerate(CLICKS[1:])
    ]
    write_lines(folder / "judgments.csv", ["query,item,label", *rows])
    said, found, task = init(folder, tmp_path)
    assert found.params["grades"] == grades and "task.params.grades of the recipe is a draft (" in said
    assert "# a draft: put in the grades that you mean before you train" in (tmp_path / "mine.yaml").read_text()
    assert {sum(grade > 0 for grade in own) for split in task.splits.values() for own in split.grades} == {1}


def test_a_column_of_many_labels_is_no_grade(tmp_path):
    folder = tmp_path / "data"
    write_lines(folder / "items.csv", ITEMS)
    write_lines(folder / "clicks.csv", ["query,item,label", *(f"{x},label {i}" for i, x in enumerate(CLICKS[1:]))])
    layout = recognise(folder)
    assert layout.params["event"] == "click" and "not used: label" in layout.files[1]


@pytest.mark.slow
def test_the_two_files_of_esci_are_the_task_esci(tmp_path):
    judged = [
        {
            "query": f"needed thing {i % 60}", "query_id": i % 60, "product_id": f"p{i % 40}", "product_locale": "us",
            "esci_label": "ESCI"[i % 4], "small_version": 1, "large_version": 1,
            "split": "train" if i % 60 < 40 else "test",
        }
        for i in range(300)
    ]  # fmt: skip
    texts = ("product_description", "product_bullet_point", "product_brand", "product_color")
    products = [
        {
            "product_id": f"p{i}",
            "product_title": f"{WORDS[i % 8]} {i}",
            "product_locale": place,
            **dict.fromkeys(texts, "a"),
        }
        for i in range(40)
        for place in ("us", "es")
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in ((esci.EXAMPLES, judged), (esci.PRODUCTS, products)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    (folder / "notes.txt").write_text("a")
    said, found, task = init(folder, tmp_path)
    assert (found.name, found.params) == ("esci", {"locale": "us", "version": "small"})
    assert "a known data set; task.name=esci" in said and "not used: notes.txt" in said and len(task.test) > 0


@pytest.mark.slow
def test_the_files_of_amazon_c4_are_their_task(tmp_path):
    folder = tmp_path / "data"
    write_lines(folder / "test.csv", ["qid,query,item_id", *(f"{i},I need a thing {i},p{i % 40}" for i in range(200))])
    items = [
        {"item_id": f"p{i}", "category": ("Games", "Home", "Baby", "Office", "Sports")[i % 5], "metadata": WORDS[i % 8]}
        for i in range(40)
    ]
    write_jsonl(folder / "sampled_item_metadata_1M.jsonl", items)
    _, found, task = init(folder, tmp_path)
    assert (found.name, found.params) == ("amazon_c4", {}) and len(task.catalog) == 40


WORDS_IN = {
    "cp1251": ("красный", "синий", "стул", "стол", "чайник"),
    "cp1253": ("κόκκινο", "μπλε", "καρέκλα", "τραπέζι", "σπίτι"),
    "gb18030": ("红色", "蓝色", "椅子", "桌子", "水壶"),
    "cp1250": ("żółty", "łóżko", "krzesło", "świeca", "biały"),
    "cp1252": ("hôtel", "théière", "chaise", "table", "vélo"),
}


def encoded(folder: Path, encoding: str) -> Path:
    words = WORDS_IN.get(encoding, ("赤い", "青い", "椅子", "机", "時計"))
    write_lines(
        folder / "items.csv", ["id,title", *(f"p{i},{words[i % 5]} {words[i // 5 % 5]}" for i in range(25))], encoding
    )
    clicks = [f"{words[i % 5]} {i},p{i % 25}" for i in range(60)]
    write_lines(folder / "clicks.csv", ["query,item", *clicks], encoding)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("encoding", WORDS_IN)
def test_a_guessed_encoding_is_said_with_a_title(tmp_path, encoding):
    folder = encoded(tmp_path / "data", encoding)
    said, found, _ = init(folder, tmp_path)
    word = next(word for word in WORDS_IN[encoding] if not word.isascii())
    assert word.encode(encoding).decode("cp1252") in said
    assert "encoding: cp1252  # a guess: if titles are misread" in (tmp_path / "mine.yaml").read_text()
    if encoding in ("cp1250", "cp1252"):
        assert "no findings" in said and "encoding of the files: cp1252, a guess, which reads" in said
    else:
        assert "1 finding:\n  - most letters of the titles have accents" in said and "cp1251 (Cyrillic)" in said
    found.params["encoding"] = encoding
    assert set(" ".join(tasks.load(found).catalog.titles).split()) == set(WORDS_IN[encoding])


def test_what_cp1252_does_not_read_is_to_be_converted(tmp_path):
    with pytest.raises(UserError, match=r"clicks.csv: neither UTF-8 nor cp1252 .*: convert it to UTF-8"):
        recognise(encoded(tmp_path / "data", "shift_jis"))


@pytest.mark.slow
def test_a_certain_encoding_is_no_guess(tmp_path):
    write_lines(tmp_path / "data" / "items.csv", ITEMS, "utf-16")
    write_lines(tmp_path / "data" / "clicks.csv", CLICKS, "utf-16")
    said, _, _ = init(tmp_path / "data", tmp_path)
    assert "guess" not in said and "encoding: utf-16\n" in (tmp_path / "mine.yaml").read_text()


def test_the_task_sequential_says_that_the_encoding_is_a_guess(tmp_path):
    folder = tmp_path / "data"
    write_lines(folder / "items.csv", ["id,title", *(f"p{i},hôtel {i}" for i in range(20))], "cp1252")
    write_lines(folder / "log.csv", ["user,item,timestamp", *(f"u{i % 9},p{i % 20},{i}" for i in range(60))])
    with pytest.raises(UserError, match=r"encoding cp1252 \(a guess\): the task sequential reads UTF-8"):
        recognise(folder)
