"""ESCI in both its forms: rows as published, a few dozen of them."""

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
from rec_r1.tasks import esci
from rec_r1.tasks.query_pools import normal
from rec_r1.tasks.task_cache import folder_of, summary

WORDS = {"E": "Exact", "S": "Substitute", "C": "Complement", "I": "Irrelevant"}
# query id, query, split, locale, small_version, judgments
QUERIES = [
    *((n, f"train query {n}", "train", "us", 1, {f"B{n:02}": "E", f"B{n + 1:02}": "S"}) for n in range(1, 11)),
    (11, "only irrelevant", "train", "us", 1, {"B01": "I"}),
    (12, " Wireless  MOUSE", "train", "us", 1, {"B02": "E"}),  # a test query's text in other letters
    (13, "train query 1", "train", "us", 1, {"B12": "E"}),  # the text of query 1
    (14, "easy query", "train", "us", 0, {"B13": "E", "B14": "S", "B15": "C", "B01": "E"}),
    (21, "wireless mouse", "test", "us", 1, {"B01": "E", "B02": "S", "B03": "C", "B04": "I"}),
    (22, "crib sheet", "test", "us", 1, {"B05": "E", "B06": "E", "B07": "E"}),
    (23, "gift card", "test", "us", 1, {"B08": "S"}),
    (24, "マウス", "test", "jp", 1, {"B01": "E"}),
    (25, "キーボード", "train", "jp", 1, {"J02": "E"}),
]
EXAMPLES = [
    {
        "example_id": 100 * query_id + i,
        "query": query,
        "query_id": query_id,
        "product_id": product,
        "product_locale": locale,
        "esci_label": label,
        "small_version": small,
        "large_version": 1,
        "split": split,
    }
    for query_id, query, split, locale, small, judged in QUERIES
    for i, (product, label) in enumerate(judged.items())
]
PRODUCTS = [
    {
        "product_id": product,
        "product_title": f"Title of {product}" if product != "B09" else None,
        "product_description": "<p>soft &amp; warm</p>" if product == "B01" else None,
        "product_bullet_point": f"first point\nsecond {product}",
        "product_brand": "Acme",
        "product_color": None,
        "product_locale": locale,
    }
    for locale, product in [*(("us", f"B{n:02}") for n in range(1, 16)), ("jp", "B01"), ("jp", "J02")]
]
CATEGORIES = {"B01": "Video Games", "B05": "Baby", "B06": "Sports & Outdoors", "B07": "Baby", "B02": "Office Products"}


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def official(folder: Path, examples=EXAMPLES, products=PRODUCTS) -> Path:
    write(folder / esci.EXAMPLES, examples)
    write(folder / esci.PRODUCTS, products)
    return folder


def hub(folder: Path) -> Path:
    """tasksource/esci: joined, labels in words, the part in the file's name, several files a part."""
    known = {(product["product_locale"], product["product_id"]): product for product in PRODUCTS}
    for part in ("train", "test"):
        rows = []
        for example in EXAMPLES:
            if example["split"] == part:
                product = known[example["product_locale"], example["product_id"]]
                row = {**example, **product, "esci_label": WORDS[example["esci_label"]], "product_text": "all of it"}
                del row["split"]
                rows.append(row)
        rows.reverse()
        half = len(rows) // 2
        for i, own in enumerate((rows[:half], rows[half:])):
            write(folder / "data" / f"{part}-0000{i}-of-00002.parquet", own)
    return folder


def load(folder: Path, **params):
    params = {"validation_share": 0.25, **params}
    return tasks.load(TaskConfig(name="esci", path=str(folder), params=params))


def judged(task, part: str) -> dict[str, dict[str, float]]:
    split, ids = getattr(task, part), task.catalog.ids
    return {
        query: {ids[row]: grade for row, grade in zip(rows, grades, strict=True)}
        for query, rows, grades in zip(split.ids, split.rows, split.grades, strict=True)
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    return official(tmp_path / "esci")


def test_the_official_files(folder, caplog):
    with caplog.at_level(logging.INFO):
        task = load(folder)
    assert task.name == "esci-us-small"
    assert list(task.catalog.ids) == [f"B{n:02}" for n in range(1, 13)]  # B13 to B15 are of the large version
    assert task.catalog.titles[0] == "Title of B01" and task.catalog.titles[8] == "B09"
    assert task.catalog.texts[0] == "Title of B01 Acme first point second B01 soft & warm"
    assert {part: len(split) for part, split in task.splits.items()} == {"train": 9, "validation": 2, "test": 3}
    assert judged(task, "test") == {
        "21": {"B01": 100.0, "B02": 10.0, "B03": 1.0},
        "22": {"B05": 100.0, "B06": 100.0, "B07": 100.0},
        "23": {"B08": 10.0},
    }
    assert task.test.slices == {}
    assert "train: 1 query has the text of a held-out query" in caplog.text
    assert "esci-us-small: 12 documents" in caplog.text
    assert "test: 3 queries, judgments: 4 of grade 100, 2 of grade 10, 1 of grade 1" in caplog.text


@pytest.mark.slow
def test_the_joined_rows_of_the_hub_make_the_same_task(folder, tmp_path):
    for params in ({}, {"version": "large"}, {"distractors": 2}, {"limits": {"train": 3}}):
        one, other = load(folder, **params), load(hub(tmp_path / "hub"), **params)
        assert one.catalog.fingerprint == other.catalog.fingerprint
        assert one.splits == other.splits


@pytest.mark.parametrize("seed", range(2))
def test_no_text_stands_in_two_parts_and_the_test_stays_whole(folder, seed):
    task = load(folder, seed=seed, validation_share=0.4)
    texts = {part: {normal(query) for query in split.queries} for part, split in task.splits.items()}
    assert not texts["train"] & texts["validation"] and not texts["test"] & (texts["train"] | texts["validation"])
    assert task.test.ids == ["21", "22", "23"]
    # Query 12 asks what the test asks, query 11 has nothing relevant; 1 and 13 ask the same.
    assert {*task.train.ids, *task.validation.ids} == {str(n) for n in range(1, 14)} - {"11", "12"}
    assert {"1", "13"} <= {*task.train.ids} or {"1", "13"} <= {*task.validation.ids}


def test_other_seeds_carve_other_validation_queries(folder):
    assert len({tuple(load(folder, seed=seed, validation_share=0.4).validation.ids) for seed in range(3)}) > 1


def test_exact_only(folder):
    task = load(folder, grades={"E": 1, "S": 0, "C": 0, "I": 0})
    assert judged(task, "test") == {"21": {"B01": 1.0}, "22": {"B05": 1.0, "B06": 1.0, "B07": 1.0}}
    assert len(task.catalog) == 12  # what is judged irrelevant can be retrieved all the same


def test_of_a_pair_judged_twice_the_best_grade_counts(tmp_path):
    again = [{**EXAMPLES[0], "esci_label": "C"}, *EXAMPLES, {**EXAMPLES[0], "esci_label": "I"}]
    task = load(official(tmp_path / "x", again))
    assert (judged(task, "train") | judged(task, "validation"))["1"] == {"B01": 100.0, "B02": 10.0}


def test_the_large_version_and_another_locale(folder):
    large = load(folder, version="large")
    assert len(large.catalog) == 15 and "14" in {*large.train.ids, *large.validation.ids}
    with pytest.raises(UserError, match=r"validation_share: 0\.25 of the 1 queries .*leaves no"):
        load(folder, locale="jp")
    with pytest.raises(UserError, match=r"no train judgments of locale 'de' .*'us': \d+, 'jp': 2"):
        load(folder, locale="de")


@pytest.mark.slow
def test_distractors_are_unjudged_and_stable(folder):
    assert [*load(folder, distractors=-1).catalog.ids][12:] == ["B13", "B14", "B15"]
    one, two = ({*load(folder, distractors=n).catalog.ids} for n in (1, 2))
    assert len(one) == 13 and len(two) == 14 and one < two
    backwards = official(folder.parent / "other", EXAMPLES, PRODUCTS[::-1])
    assert {*load(backwards, distractors=1).catalog.ids} == one
    assert load(folder, distractors=9).catalog.fingerprint == load(folder, distractors=-1).catalog.fingerprint
    assert judged(load(folder, distractors=-1), "test") == judged(load(folder), "test")


def test_limits(folder):
    task = load(folder, limits={"train": 4, "validation": 1, "test": 2})
    assert {part: len(split) for part, split in task.splits.items()} == {"train": 4, "validation": 1, "test": 2}
    assert load(folder, limits={"train": 4, "test": 99}).train.ids == task.train.ids
    assert {*task.train.ids} <= {*load(folder).train.ids} and len(task.catalog) == 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv.gz", "parquet", "asin2category"])
def test_categories_from_any_file(folder, kind):
    columns, name = {"id_column": "item_id", "category_column": "category"}, f"meta.{kind}"
    rows = [{"item_id": item, "category": category, "other": 1} for item, category in CATEGORIES.items()]
    if kind == "parquet":
        write(folder / name, rows)
    elif kind == "csv.gz":
        with gzip.open(folder / name, "wt", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "asin2category":
        name = "asin2category.json"
        (folder / name).write_text(json.dumps(CATEGORIES))
    else:
        with (gzip.open if kind.endswith("gz") else open)(folder / name, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    task = load(folder, categories=name, **columns)
    assert task.test.slices == {"category": ["Video Games", "Baby", "unknown"]}
    kept = load(folder, categories=name, **columns, test_categories=["Baby_Products"])
    assert kept.test.ids == ["22"] and kept.train.ids == task.train.ids  # still without the whole test's texts
    by_query = dict(zip(task.train.ids, task.train.slices["category"], strict=True))
    assert by_query["2"] == "Office Products" and by_query["3"] == "unknown"


def test_amazon_s_metadata_leave_categories_empty(folder, tmp_path, monkeypatch):
    rows = [{"parent_asin": item, "main_category": category} for item, category in CATEGORIES.items()]
    rows.append({"parent_asin": "B08", "main_category": None})
    (tmp_path / "meta_A.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    (tmp_path / "meta_B.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    monkeypatch.chdir(tmp_path)  # where a dataset of the hub leaves no place
    assert load(folder, categories="meta_*.jsonl").test.slices["category"] == ["Video Games", "Baby", "unknown"]
    with pytest.raises(
        UserError, match=r"no test query has the category 'Books': choose from Baby, Video Games, unknown"
    ):
        load(folder, categories="meta_*.jsonl", test_categories=["video games", "Books"])
    with pytest.raises(UserError, match=r"meta_A\.jsonl:1: no column 'asin', only parent_asin, main_category"):
        load(folder, categories="meta_A.jsonl", id_column="asin")


def test_the_second_time_it_comes_from_the_cache(folder, monkeypatch):
    first = load(folder)
    monkeypatch.setattr(esci, "_build", lambda *_: pytest.fail("read again"))
    second = load(folder)
    assert second.splits == first.splits and second.catalog.fingerprint == first.catalog.fingerprint
    config = TaskConfig(name="esci", path=str(folder), params={"validation_share": 0.25})
    files = [folder / esci.EXAMPLES, folder / esci.PRODUCTS]
    assert set(summary(folder_of(config, files))["sources"]) == {esci.EXAMPLES, esci.PRODUCTS}


def with_first(**changes):
    return [{**EXAMPLES[0], **changes}, *EXAMPLES[1:]]


@pytest.mark.parametrize(
    ("examples", "products", "message"),
    [
        (with_first(esci_label="X"), PRODUCTS, r"examples\.parquet: row 1: esci_label 'X': must be one of Exact, E"),
        (with_first(split="dev"), PRODUCTS, r"row 1: split 'dev': must be train or test"),
        (with_first(query=""), PRODUCTS, r"row 1: 'query' is empty"),
        (with_first(query="other"), PRODUCTS, r"row 2: query '1' is 'train query 1' here and 'other' before"),
        (EXAMPLES, PRODUCTS[1:], r"products\.parquet: locale 'us' lacks 1 judged product, first: 'B01'"),
        (
            [{k: v for k, v in row.items() if k != "esci_label"} for row in EXAMPLES],
            PRODUCTS,
            r"examples\.parquet: no column 'esci_label', only example_id, query, query_id",
        ),
    ],
)
def test_broken_rows_name_file_and_row(tmp_path, examples, products, message):
    with pytest.raises(UserError, match=message):
        load(official(tmp_path / "x", examples, products))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"version": "medium"}, "choose from small, large"),
        ({"grades": {"E": 1}}, "give each of E, S, C and I"),
        ({"grades": {"E": 1, "S": 0.1, "C": 0, "I": 0}}, "grades must be a mapping to integers"),
        ({"distractors": -2}, "-1 for all"),
        ({"test_categories": ["Baby"]}, r"name a file that has.*task\.params\.categories"),
        ({"test_categories": ["Baby"], "categories": "no.jsonl"}, r"no file of categories .*no\.jsonl"),
        ({"validation_share": 1.0}, "must be above 0"),
        ({"validation_share": 1e-9}, "leaves no validation query"),
        ({"limits": {"dev": 3}}, "give train, validation or test"),
        ({"text": ["product_size"]}, r"products\.parquet: no column 'product_size', only product_id"),
    ],
)
def test_bad_settings(folder, params, message):
    with pytest.raises(UserError, match=message):
        load(folder, **params)


def test_missing_files_are_named(folder, tmp_path):
    (folder / esci.PRODUCTS).unlink()
    with pytest.raises(UserError, match="no ESCI products"):
        load(folder)
    with pytest.raises(UserError, match=r"no ESCI judgments .*data/train-\*\.parquet"):
        load(tmp_path)
    (folder / esci.PRODUCTS).write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"products\.parquet: cannot be read as Parquet"):
        load(folder)
