"""The task `catalog`: tables of items and clicks as people have them, and everything wrong with them in one message."""

import csv
import datetime
import gzip
import io
import json
import logging
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_r1 import tasks
from rec_r1.config import TaskConfig, UserError, problems_of
from rec_r1.tasks import catalog
from rec_r1.tasks.catalog_settings import Params
from rec_r1.tasks.integrity import normal
from rec_r1.tasks.task_cache import folder_of, summary

SHOP = Path(__file__).parents[1] / "data" / "shop"
COLUMNS = {"id": "product_id", "title": "name", "query": "search_term", "item": "product_id"}
SHOP_PARAMS = {
    "columns": {**COLUMNS, "clicks": "clicks", "purchases": "purchases"},
    "text": ["brand", "description"],
    "unknown": "drop",
    "blank": "drop",
    "duplicates": "last",
}
ITEMS = [{"id": str(1000 + n), "title": f"thing {n}", "text": f"<p>nice &amp; warm {n}</p>"} for n in range(20)]
GRADED = [
    {"query": f"query {q}", "item": str(1000 + (q + k) % 20), "grade": 3 - k} for q in range(20) for k in range(3)
]


def write(path: Path, rows: list[dict], encoding: str = "utf-8", separator: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".gz")
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if name.endswith("jsonl"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif name.endswith("json"):
        text = json.dumps(rows, indent=1)
    else:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if name.endswith("tsv") else separator)
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    raw = text.encode(encoding)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def make(folder: Path, rows: list[dict], items: list[dict] = ITEMS) -> Path:
    write(folder / "items.csv", items)
    write(folder / "clicks.csv", rows)
    return folder


def load(folder: Path, **params):
    return tasks.load(TaskConfig(name="catalog", path=str(folder), params=params))


def judged(task) -> dict[str, dict[str, float]]:
    """Query text -> item -> grade, over all splits."""
    return {
        text: {task.catalog.ids[row]: grade for row, grade in zip(rows, grades, strict=True)}
        for split in task.splits.values()
        for text, rows, grades in zip(split.queries, split.rows, split.grades, strict=True)
    }


def flat(by_query: dict[str, dict[str, float]]) -> dict[tuple[str, str], float]:
    return {(query, item): grade for query, own in by_query.items() for item, grade in own.items()}


def expected(rows: list[dict]) -> dict[str, dict[str, float]]:
    found = defaultdict(dict)
    for row in rows:
        found[row["query"]][row["item"]] = float(row["grade"])
    return dict(found)


def refused(folder: Path, **params) -> list[str]:
    with pytest.raises(UserError) as error:
        load(folder, **params)
    return problems_of(str(error.value))


# ---- The shop with every defect


def test_the_shop_s_own_files_load_with_three_decisions(caplog):
    with caplog.at_level(logging.WARNING):
        task = load(SHOP, **SHOP_PARAMS)
    assert len(task.catalog) == 300 and sum(map(len, task.splits.values())) == len(judged(task))
    for said in (
        "products.csv: 4 items equal an earlier item and count once",
        "products.csv: 3 items have the id of a different item; the last of each id is kept",
        "clicks.csv: 5 of 400 lines equal an earlier one and count once",
        "clicks.csv: 3 of 400 lines have no query or no item and are left out",
        "clicks.csv: 7 judged items are not in products.csv; their judgments, 7 lines, are left out",
        'ids differ only by ".0" and count as the same',
        "products.csv: 6 items have no title",
    ):
        assert said in caplog.text
    words = {word for text in task.catalog.texts for word in text.lower().replace(";", " ").replace("&", " ").split()}
    assert not words & {"nbsp", "li", "<li>", "br", "<br/>", "amp", "lt", "p", "ul"}
    assert "Tilbury & Ash" in " ".join(task.catalog.titles) and "咖啡壶 双层" in task.catalog.titles


def test_the_shop_s_grades_are_those_of_brute_force():
    rows = list(csv.DictReader((SHOP / "clicks.csv").read_text("utf-8-sig").splitlines()))
    known = {row["product_id"] for row in csv.DictReader((SHOP / "products.csv").read_text("utf-8-sig").splitlines())}
    clicks, purchases = defaultdict(int), defaultdict(int)
    for row in {tuple(row.items()): row for row in rows}.values():
        item = row["product_id"].removesuffix(".0")
        if row["search_term"].strip() and item in known:
            clicks[row["search_term"], item] += int(row["clicks"])
            purchases[row["search_term"], item] += int(row["purchases"])
    want = {pair: 3.0 if purchases[pair] else 1.0 for pair in clicks}
    assert flat(judged(load(SHOP, **SHOP_PARAMS))) == want
    by_sum = judged(load(SHOP, **SHOP_PARAMS, combine="sum", grades={"click": 1, "purchase": 10}))
    assert flat(by_sum) == {pair: clicks[pair] + 10.0 * purchases[pair] for pair in clicks}


def test_the_shop_is_refused_once_with_everything_that_is_wrong():
    lines = refused(SHOP, columns=SHOP_PARAMS["columns"], text=["brand"])
    assert len(lines) == 3
    assert "7 of 233 judged items are not in products.csv (7 lines), first: '9" in lines[0]
    assert "add them to it, or set task.params.unknown=drop" in lines[0]
    assert lines[1].startswith("products.csv: 3 items have the id of a different item, such as '")
    assert lines[2].startswith("clicks.csv: 3 lines have no query or no item, such as clicks.csv:")


def test_the_shop_s_four_ways_to_write_a_day():
    columns = {**SHOP_PARAMS["columns"], "date": "day"}
    params = SHOP_PARAMS | {"columns": columns}
    task = load(SHOP, **params, test_from="2026-05-15")
    assert task.test == load(SHOP, **params, date_formats=["%d.%m.%Y"], test_from="2026-05-15").test
    late = load(SHOP, **params, test_from="2026-05-15", validation_from="2026-04-20")
    assert task.test == late.test and len(late.validation) > 5
    assert all(len(split) for split in task.splits.values())


def test_the_shop_s_files_are_what_their_script_writes(tmp_path):
    sys.path.insert(0, str(SHOP.parent))
    try:
        import make_shop
    finally:
        sys.path.remove(str(SHOP.parent))
    make_shop.main(tmp_path)
    for name in ("products.csv", "clicks.csv"):
        assert (tmp_path / name).read_bytes() == (SHOP / name).read_bytes(), name
    assert sum(path.stat().st_size for path in SHOP.iterdir()) < 200_000


# ---- Formats


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet", "csv.gz", "jsonl.gz"])
def test_every_format_makes_the_same_task(tmp_path, ending):
    write(tmp_path / f"products.{ending}", ITEMS)
    write(tmp_path / f"judgments.{ending}", GRADED)
    task = load(tmp_path, text=["text"])
    assert judged(task) == expected(GRADED)
    assert task.catalog.texts[3] == "thing 3 nice & warm 3" and task.catalog.titles[3] == "thing 3"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_encodings(tmp_path, encoding):
    items = [item | {"title": f"Café {item['title']}"} for item in ITEMS]
    write(tmp_path / "items.csv", items, encoding)
    write(tmp_path / "clicks.csv", GRADED, encoding)
    given = {} if encoding.startswith("utf-8") else {"encoding": encoding}
    assert load(tmp_path, **given).catalog.titles[0] == "Café thing 0"
    if given:
        lines = refused(tmp_path)
        assert "items.csv: not UTF-8" in lines[0] and "name its encoding" in lines[0]
    lines = refused(tmp_path, encoding="utf-17")
    assert lines == ["task.params.encoding: 'utf-17': name one of Python's, such as utf-16 or latin-1"]


def test_semicolons_with_quoted_fields(tmp_path):
    items = [item | {"title": f'a "{n}"; b'} for n, item in enumerate(ITEMS)]
    write(tmp_path / "items.csv", items, separator=";")
    write(tmp_path / "clicks.csv", GRADED, separator=";")
    assert load(tmp_path, separator=";").catalog.titles[2] == 'a "2"; b'
    assert "set task.params.columns.id, and task.params.separator=';' if" in refused(tmp_path)[0]


def test_parquet_floats_nulls_and_vectors(tmp_path):
    items = [{"id": float(n), "title": None if n == 1 else f"t{n}", "vector": [0.5] * 4} for n in range(20)]
    rows = [{"query": f"q{n}", "item": n, "grade": 1.0} for n in range(20)]
    write(tmp_path / "items.parquet", items)
    write(tmp_path / "judgments.parquet", rows)
    task = load(tmp_path)
    assert list(task.catalog.ids) == [str(n) for n in range(20)] and task.catalog.titles[1] == "1"
    assert "no column 'name', only id, title, vector" in refused(tmp_path, columns={"title": "name"})[0]


def test_columns_inside_objects_and_dumps_of_opensearch(tmp_path):
    items = [{"_id": item["id"], "_source": {"name": {"en": item["title"]}}} for item in ITEMS]
    write(tmp_path / "items.jsonl", items)
    write(tmp_path / "clicks.csv", GRADED)
    assert judged(load(tmp_path, columns={"id": "_id", "title": "name.en"})) == expected(GRADED)


def test_several_files_by_a_pattern(tmp_path):
    write(tmp_path / "a" / "p1.csv", ITEMS[:9])
    write(tmp_path / "a" / "p2.csv", ITEMS[9:])
    write(tmp_path / "clicks-2026.csv", GRADED)
    assert judged(load(tmp_path, items="a/p*.csv", judgments="clicks-2026.csv")) == expected(GRADED)


# ---- Ids and duplicates


@pytest.mark.parametrize(("items_end", "clicks_end"), [("", ".0"), (".0", ""), (".0", ".0")])
def test_ids_that_pandas_made_floats(tmp_path, caplog, items_end, clicks_end):
    items = [item | {"id": item["id"] + items_end} for item in ITEMS]
    rows = [row | {"item": row["item"] + clicks_end} for row in GRADED]
    with caplog.at_level(logging.WARNING):
        task = load(make(tmp_path, rows, items))
    assert list(task.catalog.ids) == [item["id"] for item in items]
    assert judged(task) == expected([row | {"item": row["item"] + items_end} for row in GRADED])
    said = f"20 ids differ only by \".0\" and count as the same, such as '1000{clicks_end}' in clicks.csv"
    assert (said in caplog.text) == (items_end != clicks_end)


def test_two_forms_of_an_id_in_one_file_stay_two(tmp_path):
    both = [*GRADED, {"query": "other", "item": "1003.0", "grade": 1}]
    assert "'1003.0' is there as '1003': write the ids alike" in refused(make(tmp_path / "a", both))[0]
    items = [*ITEMS, {"id": "1003.0", "title": "version 3", "text": ""}]
    assert judged(load(make(tmp_path / "b", both, items)))["other"] == {"1003.0": 1.0}
    one = [row | {"item": "1003.00"} if row["item"] == "1003" else row for row in GRADED]
    assert "1003.00" in refused(make(tmp_path / "c", one, items))[0]


def test_duplicates_among_the_items(tmp_path, caplog):
    items = [*ITEMS, ITEMS[4], ITEMS[2] | {"title": "another"}, ITEMS[2] | {"title": "a third"}]
    folder = make(tmp_path, GRADED, items)
    (line,) = refused(folder)
    assert line.startswith(
        "items.csv: 2 items have the id of a different item, such as '1002' at items.csv:23, '1002' at"
    )
    for policy, title in (("first", "thing 2"), ("last", "a third")):
        task = load(folder, duplicates=policy)
        assert task.catalog.titles[2] == title and len(task.catalog) == 20
    assert "items.csv: 1 items equal an earlier item and count once" in caplog.text


def test_discontinued_items(tmp_path, caplog):
    gone = [*GRADED, *({"query": f"query {n}", "item": f"x{n}", "grade": 9} for n in range(5))]
    gone.append({"query": "only what is gone", "item": "x0", "grade": 1})
    folder = make(tmp_path, gone)
    assert refused(folder) == [
        "clicks.csv: 5 of 25 judged items are not in items.csv (6 lines), first: 'x0', 'x1', 'x2': add them to it, or "
        "set task.params.unknown=drop to leave their judgments out"
    ]
    assert judged(load(folder, unknown="drop")) == expected(GRADED)
    assert "clicks.csv: 5 judged items are not in items.csv; their judgments, 6 lines, are left out" in caplog.text


# ---- Everything at once


def test_problems_of_both_files_come_in_one_message(tmp_path):
    items = [*ITEMS, {"id": "", "title": "no id", "text": ""}, ITEMS[0] | {"title": "other"}]
    rows = [
        *GRADED,
        {"query": "a", "item": "zzz", "grade": 1},
        {"query": "b", "item": "1001", "grade": "good"},
        {"query": "b", "item": "1002", "grade": "inf"},
        {"query": "", "item": "1001", "grade": 1},
        {"query": "c", "item": "", "grade": 1},
    ]
    lines = refused(make(tmp_path, rows, items))
    assert [line.partition(",")[0] for line in lines] == [
        "clicks.csv: 1 of 21 judged items are not in items.csv (1 lines)",
        "items.csv: 1 items without an id",
        "items.csv: 1 items have the id of a different item",
        "clicks.csv: 2 grades (column 'grade') are no numbers",
        "clicks.csv: 2 lines have no query or no item",
    ]
    assert "'good' at clicks.csv:63, 'inf' at clicks.csv:64" in lines[3]


def test_all_missing_columns_come_at_once_and_hide_what_depends_on_them(tmp_path):
    lines = refused(make(tmp_path, GRADED), columns={"id": "sku", "query": "q", "item": "i"}, text=["text", "brand"])
    assert lines == [
        "items.csv: no column 'sku', only id, title, text: set task.params.columns.id",
        "items.csv: no column 'brand', only id, title, text: set task.params.text",
        "clicks.csv: no column 'q', only query, item, grade: set task.params.columns.query",
        "clicks.csv: no column 'i', only query, item, grade: set task.params.columns.item",
    ]


def test_missing_and_empty_files(tmp_path):
    write(tmp_path / "other.csv", ITEMS)
    lines = refused(tmp_path)
    assert len(lines) == 2 and "no file of items (task.params.items)" in lines[0] and "no file of judgments" in lines[1]
    (tmp_path / "items.csv").write_text("id,title\n")
    (tmp_path / "clicks.csv").write_text("query,item,grade\n")
    assert refused(tmp_path) == [
        f"{name}.csv: it holds no records: give a file with at least one" for name in ("items", "clicks")
    ]


def test_items_without_any_text(tmp_path):
    items = [{"id": item["id"], "name": item["title"]} for item in ITEMS]
    (line,) = refused(make(tmp_path, GRADED, items))
    assert "items.csv: no item has a text: name the title's column in task.params.columns.title" in line


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"layout": "x"}, "layout: 'x': choose from tables, ubi"),
        ({"duplicates": "x", "unknown": "y", "blank": "z"}, "unknown: 'y': choose from refuse, drop"),
        ({"columns": {"name": "x"}}, "columns.name: unknown: choose from id, title, query"),
        ({"columns": {"event": "e", "clicks": "c"}}, "columns.clicks: columns.event says what the grades are made of"),
        ({"event": "click", "columns": {"grade": "g"}}, "event: columns.grade says what the grades are made of"),
        ({"combine": "sum"}, "combine: nothing reads it, because grades come from a column"),
        ({"columns": {"position": "p"}}, "columns.position: nothing reads it, because grades come from a column"),
        ({"columns": {"clicks": "c", "position": "p"}}, "columns.position: nothing reads it without"),
        ({"columns": {"clicks": "c"}, "position_bias": 1}, "position_bias: it needs positions"),
        ({"columns": {"clicks": "c", "propensity": "p"}}, "combine: best only checks whether an event happened"),
        ({"columns": {"clicks": "c"}, "combine": "rate"}, "combine: rate needs impressions"),
        ({"columns": {"clicks": "c", "impressions": "i"}}, "columns.impressions: only combine=rate reads it"),
        ({"columns": {"clicks": "c"}, "clip": 0.5}, "clip: nothing is weighted"),
        ({"columns": {"clicks": "c"}, "clip": 0}, "clip: 0.0: must be above 0 and at most 1"),
        ({"columns": {"clicks": "c"}, "levels": [3, 1]}, "levels: [3, 1]: give rising numbers above 0"),
        ({"columns": {"clicks": "c"}, "min_count": 0}, "min_count: 0.0: must be above 0"),
        ({"columns": {"query_id": "x"}}, "columns.query_id: only read with task.params.queries"),
        ({"test_share": 1}, "test_share: 1.0: must be above 0 and below 1"),
        ({"test_from": "2026-01-01"}, "test_from: it needs dates"),
        ({"test_from": "soon", "columns": {"date": "d"}}, "test_from: 'soon': must be a date of ISO 8601"),
        ({"columns": {"date": "d"}}, "columns.date: nothing reads it without task.params.test_from"),
        (
            {"validation_from": "2026-01-01", "columns": {"date": "d"}},
            "validation_from: it needs task.params.test_from",
        ),
        (
            {"test_from": "2026-01-01", "validation_from": "2026-02-01", "columns": {"date": "d"}},
            "validation_from: '2026-02-01': must be before test_from",
        ),
        ({"test_from": "2026-01-01", "columns": {"date": "d", "split": "s"}}, "test_from: columns.split says what"),
        ({"test_share": 0.5, "columns": {"split": "s"}}, "test_share: columns.split says which queries are in test"),
    ],
)
def test_bad_settings(tmp_path, params, problem):
    lines = refused(make(tmp_path, GRADED), **params)
    assert any(line.startswith(f"task.params.{problem}") for line in lines), lines


# ---- Grades


def test_grades_from_labels(tmp_path):
    rows = [row | {"grade": {3: "Exact", 2: "Substitute", 1: "Irrelevant"}[row["grade"]]} for row in GRADED]
    folder = make(tmp_path, rows)
    grades = {"Exact": 1, "Substitute": 0.1, "Irrelevant": 0}
    found = judged(load(folder, grades=grades))
    assert found["query 4"] == {"1004": 1.0, "1005": 0.1}
    (line,) = refused(folder, grades={"Exact": 1, "Substitute": 0.1})
    assert line.startswith("clicks.csv: 20 grades are not in task.params.grades, such as 'Irrelevant' at clicks.csv:4")


def test_of_a_pair_that_is_graded_twice_the_best_grade_counts(tmp_path, caplog):
    rows = [*GRADED, GRADED[0], GRADED[1] | {"grade": 7}, GRADED[2] | {"grade": -1}]
    assert judged(load(make(tmp_path, rows)))["query 0"] == {"1000": 3.0, "1001": 7.0, "1002": 1.0}
    assert "2 judgments have two grades, of which the best counts" in caplog.text


def logged(n: int = 300) -> list[dict]:
    """Events in an order without chance: 20 queries, 4 items each, positions 1 to 10."""
    names = ["click", "click", "purchase", "scroll", "impression", "impression"]
    return [
        {
            "query": f"query {n % 20}", "item": str(1000 + (n * 7 + n // 20) % 4 + n % 16), "event": names[n * n % 6],
            "position": 1 + n * 3 % 10, "day": f"2026-0{1 + n % 6}-{10 + n % 15}", "number": 1 + n % 5,
        }
        for n in range(n)
    ]  # fmt: skip


def test_one_event_a_line(tmp_path, caplog):
    rows = logged()
    folder = make(tmp_path, rows)
    columns = {"event": "event"}
    want, counted = defaultdict(dict), defaultdict(int)
    for row in rows:
        grade = {"click": 1.0, "purchase": 3.0}.get(row["event"])
        if grade:
            own = want[row["query"]]
            own[row["item"]] = max(grade, own.get(row["item"], 0))
            counted[row["query"], row["item"]] += grade
    assert judged(load(folder, columns=columns)) == want
    ignored = {name: sum(row["event"] == name for row in rows) for name in ("impression", "scroll")}
    for name, count in ignored.items():
        assert f"{name!r} ({count})" in caplog.text
    by_sum = judged(load(folder, columns=columns, combine="sum", repeated="each"))
    assert by_sum == {query: {item: float(counted[query, item]) for item in own} for query, own in want.items()}
    (line,) = refused(folder, columns={"event": "event"}, grades={"klick": 1})
    assert line.startswith("clicks.csv: no line is one of the events klick, only ") and "'click' (" in line


def test_counts_thresholds_and_levels(tmp_path):
    rows = logged()
    folder = make(tmp_path, rows)
    columns = {"event": "event", "count": "number"}
    total = defaultdict(int)
    for row in rows:
        if row["event"] == "click":
            total[row["query"], row["item"]] += row["number"]
    levels = [2, 5, 8]
    found = judged(
        load(folder, columns=columns, grades={"click": 1}, combine="sum", levels=levels, min_count=3, repeated="each")
    )
    want = defaultdict(dict)
    for (query, item), count in total.items():
        grade = sum(count >= level for level in levels) if count >= 3 else 0
        if grade:
            want[query][item] = float(grade)
    assert found == want and len({grade for own in want.values() for grade in own.values()}) > 1


@pytest.mark.parametrize(("eta", "clip", "first"), [(1.0, 0.1, 1), (0.5, 0.4, 1), (1.0, 0.01, 0)])
def test_weights_by_position_and_by_a_column_of_propensities(tmp_path, eta, clip, first):
    rows = [row | {"position": row["position"] - 1 + first} for row in logged()]
    rows = [row | {"propensity": (1 / (row["position"] + 1 - first)) ** eta} for row in rows]
    shown_pairs = {(row["query"], row["item"]) for row in rows if row["event"] == "impression"}
    kept = [row for row in rows if (row["query"], row["item"]) in shown_pairs]
    folder, columns = make(tmp_path, kept), {"event": "event"}
    shared = {"combine": "rate", "clip": clip, "repeated": "each"}
    by_position = judged(
        load(folder, columns=columns | {"position": "position"}, position_bias=eta, first_position=first, **shared)
    )
    by_column = judged(load(folder, columns=columns | {"propensity": "propensity"}, **shared))
    value, shown = defaultdict(float), defaultdict(int)
    for row in kept:
        pair = row["query"], row["item"]
        weight = 1 / max(clip, (1 / (row["position"] + 1 - first)) ** eta)
        value[pair] += {"click": 1, "purchase": 3}.get(row["event"], 0) * weight
        shown[pair] += row["event"] == "impression"
    want = {pair: value[pair] / shown[pair] for pair in shown if value[pair]}
    for found in (by_position, by_column):
        assert flat(found) == pytest.approx(want)


def test_pairs_without_impressions_are_refused_for_a_rate(tmp_path):
    rows = [{"query": "a", "item": "1001", "event": "click"}, {"query": "b", "item": "1002", "event": "impression"}]
    (line,) = refused(make(tmp_path, rows), columns={"event": "event"}, combine="rate")
    assert line.startswith("clicks.csv: 1 pairs have events and no impression, such as 'a' and '1001': give each line")


def test_counts_in_columns_with_impressions_and_positions(tmp_path, caplog):
    rows = [
        {"query": f"query {q}", "item": str(1000 + q), "clicks": 2, "shown": 10, "position": place}
        for q in range(20)
        for place in (1, 4, "")
    ]
    columns = {"clicks": "clicks", "impressions": "shown", "position": "position"}
    found = judged(load(make(tmp_path, rows), columns=columns, combine="rate", position_bias=1))
    assert found["query 3"] == {"1003": pytest.approx((2 + 2 * 4 + 2) / 30)}
    assert "20 of 60 lines have no position and are not weighted" in caplog.text
    bad = [row | {"position": 0, "clicks": -1, "shown": "many"} for row in rows[::3]]
    lines = refused(make(tmp_path / "bad", bad), columns=columns, combine="rate", position_bias=1)
    assert any("20 cells of column 'position' are not whole numbers from 1, such as '0' at" in line for line in lines)
    assert any(
        "20 cells of column 'clicks' are no numbers from 0, such as '-1' at clicks.csv:2" in line for line in lines
    )
    assert any("20 cells of column 'shown' are no numbers from 0" in line for line in lines)


def test_every_line_is_a_click(tmp_path, caplog):
    rows = [{"query": f"query {q}", "item": str(1000 + q)} for q in range(20) for _ in range(3)]
    folder = make(tmp_path, rows)
    assert set(judged(load(folder, event="click", combine="sum"))["query 1"].values()) == {1.0}
    assert (
        "40 of 60 lines equal an earlier one and count once (task.params.repeated=each counts them all)" in caplog.text
    )
    assert set(judged(load(folder, event="click", combine="sum", repeated="each"))["query 1"].values()) == {3.0}


# ---- Splits


@pytest.mark.parametrize("seed", range(3))
def test_no_text_is_in_two_splits_however_it_is_spelled(tmp_path, seed):
    rows = [row | {"query": spelled} for row in GRADED for spelled in (row["query"], row["query"].upper() + " ")]
    task = load(make(tmp_path, rows), seed=seed, test_share=0.3, validation_share=0.3)
    texts = [{normal(query) for query in split.queries} for split in task.splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 20 == sum(map(len, task.splits.values()))
    again = load(make(tmp_path / "x", rows[::-1]), seed=seed, test_share=0.3, validation_share=0.3)
    assert {*again.test.ids} == {*task.test.ids} and {*again.train.ids} == {*task.train.ids}


@given(st.floats(0.2, 0.8), st.integers(0, 5))
def test_a_larger_test_share_keeps_the_smaller_one_s_queries(more, seed):
    pool = catalog.Pool()
    for n in range(400):
        pool.add(f"q{n}", f"query {n}", "x:1")
        pool.judge(f"q{n}", "d", 1, "x:1")
    small, large = (
        catalog._splits({"all": pool}, "x", Params(test_share=share, seed=seed))["test"].judgments.keys()
        for share in (0.2, more)
    )
    assert small <= large


def over_months() -> list[dict]:
    """Events of which a query's are all of one month, except for query 5, which is asked in January, too."""
    return [
        row | {"query": f"query {5 if n < 100 and n % 42 == 0 else n % 42}", "event": "click", "day": row["day"]}
        for n, row in enumerate(logged())
    ]


def test_split_by_date_keeps_the_test_s_texts_out_of_what_is_before(tmp_path, caplog):
    rows = over_months()
    columns = {"event": "event", "date": "day"}
    task = load(make(tmp_path, rows), columns=columns, test_from="2026-06-01", repeated="each", validation_share=0.3)
    late = {row["query"] for row in rows if row["day"] >= "2026-06"}
    early = {row["query"] for row in rows if row["day"] < "2026-06"}
    assert {*task.test.queries} == late and late & early == {"query 5"}
    assert {*task.train.queries, *task.validation.queries} == early - late
    assert "train: 1 queries have the text of a held-out query and are left out" in caplog.text
    wanted = {row["item"] for row in rows if row["query"] == "query 5" and row["day"] >= "2026-06"}
    assert judged(task)["query 5"].keys() == wanted < {row["item"] for row in rows if row["query"] == "query 5"}
    later = load(
        make(tmp_path, rows), columns=columns, test_from="2026-06-01", validation_from="2026-05-01", repeated="each"
    )
    assert later.test == task.test
    assert {*later.validation.queries} == {row["query"] for row in rows if "2026-05" <= row["day"] < "2026-06"}


def test_a_date_that_yaml_reads_as_a_date(tmp_path):
    folder = make(tmp_path, over_months())
    columns = {"event": "event", "date": "day"}
    one, other = (
        load(folder, columns=columns, test_from=day, validation_share=0.3)
        for day in ("2026-06-01", datetime.date(2026, 6, 1))
    )
    assert one.splits == other.splits


@pytest.mark.parametrize("has_validation", [True, False])
def test_split_by_a_column(tmp_path, has_validation):
    names = ["train", "Training", "dev", "TEST"] if has_validation else ["train", "train", "train", "test"]
    rows = [row | {"part": names[n // 3 % 4]} for n, row in enumerate(GRADED)]
    task = load(make(tmp_path, rows), columns={"split": "part"}, validation_share=0.3)
    given = {row["query"]: row["part"].lower() for row in rows}
    assert {*task.test.queries} == {query for query, part in given.items() if part == "test"}
    if has_validation:
        assert {*task.validation.queries} == {query for query, part in given.items() if part == "dev"}
    assert sum(map(len, task.splits.values())) == 20
    (line,) = refused(make(tmp_path / "b", [rows[0] | {"part": "later"}, *rows]), columns={"split": "part"})
    assert line.startswith(
        "clicks.csv: 1 cells of column 'part' name no split, such as 'later' at clicks.csv:2: write one"
    )
    only = [row | {"part": "train"} for row in rows]
    assert (
        "no judged query is in the test split (there are 20 train)"
        in refused(make(tmp_path / "c", only), columns={"split": "part"})[0]
    )


# ---- UBI


def ubi(folder: Path, wrapped: bool, ordinal_in_object: bool = False, ending: str = "ndjson") -> Path:
    """ubi_queries and ubi_events. The ordinal is a number, as OpenSearch writes it, or an object with an index,
    as in the JSON schema of UBI."""
    queries = [{"query_id": f"q-{n}", "user_query": f"query {n % 20}", "client_id": "c"} for n in range(40)]
    events = []
    for n, row in enumerate(logged()):
        place = {"index": row["position"]} if ordinal_in_object else row["position"]
        attributes = {"object": {"object_id": row["item"], "object_id_field": "id"}, "position": {"ordinal": place}}
        events.append(
            {
                "action_name": row["event"], "query_id": f"q-{n % 40}", "session_id": f"s{n}",
                "timestamp": f"{row['day']}T10:00:{n % 60:02}.5Z", "event_attributes": attributes,
            }
        )  # fmt: skip
    events.append({"action_name": "login", "timestamp": "2026-01-01T00:00:00Z", "client_id": "c"})
    for name, records in (("ubi_queries", queries), ("ubi_events", events)):
        if wrapped:
            records = [{"_index": name, "_id": str(n), "_source": record} for n, record in enumerate(records)]
        text = "".join(json.dumps(record) + "\n" for record in records) if ending == "ndjson" else json.dumps(records)
        (folder / f"{name}.{ending}").write_text(text)
    write(folder / "items.csv", ITEMS)
    return folder


@pytest.mark.parametrize(("wrapped", "in_object", "ending"), [(False, False, "ndjson"), (True, True, "json")])
def test_user_behavior_insights(tmp_path, wrapped, in_object, ending):
    folder = ubi(tmp_path, wrapped, in_object, ending)
    rows = logged()
    table = make(tmp_path / "table", rows)
    same = {"repeated": "each", "grades": {"click": 1, "purchase": 3}}
    assert judged(load(folder, layout="ubi", **same)) == judged(load(table, columns={"event": "event"}, **same))
    weighted = {"combine": "sum", "position_bias": 1.0, **same}
    assert judged(load(folder, layout="ubi", **weighted)) == judged(
        load(table, columns={"event": "event", "position": "position"}, **weighted)
    )


def test_user_behavior_insights_by_date(tmp_path):
    task = load(ubi(tmp_path, False), layout="ubi", test_from="2026-06-01", validation_share=0.2)
    want = {row["query"] for row in logged() if row["day"] >= "2026-06" and row["event"] in ("click", "purchase")}
    assert {*task.test.queries} == want


def test_events_outside_of_a_search_and_of_unknown_searches(tmp_path, caplog):
    folder = ubi(tmp_path, False)
    with (folder / "ubi_events.ndjson").open("a") as file:
        for query in (None, "q-999"):
            event = {"action_name": "click", "query_id": query, "event_attributes": {"object": {"object_id": "1001"}}}
            file.write(json.dumps(event) + "\n")
    lines = refused(folder, layout="ubi")
    assert lines[0].startswith("ubi_events.ndjson: 1 lines have no query or no item, such as ubi_events.ndjson:302")
    assert lines[1].startswith(
        "ubi_events.ndjson: 1 lines name a query that task.params.queries lacks, such as 'q-999' at"
    )
    load(folder, layout="ubi", unknown="drop", blank="drop")
    assert "1 of 303 lines name a query that task.params.queries lacks and are left out" in caplog.text
    assert "'login' (1)" in caplog.text


# ---- Cache and command


def test_the_second_time_it_comes_from_the_cache_with_the_same_warnings(tmp_path, monkeypatch, caplog):
    folder = make(tmp_path, [*GRADED, GRADED[0]])
    first = load(folder)
    monkeypatch.setattr(catalog, "_build", lambda *_: pytest.fail("read again"))
    caplog.clear()
    second = load(folder)
    assert second.splits == first.splits and "1 of 61 lines equal an earlier one" in caplog.text
    config = TaskConfig(name="catalog", path=str(folder), params={})
    sources = summary(folder_of(config, [folder / "items.csv", folder / "clicks.csv"]))["sources"]
    assert set(sources) == {"items.csv", "clicks.csv"}


@pytest.mark.slow
def test_prepare_and_check_on_the_command_line(tmp_path):
    given = [f"task.params.{key}={json.dumps(value)}" for key, value in SHOP_PARAMS.items()]
    words = ["quickstart", "task.name=catalog", f"task.path={SHOP}", *given, "task.train_filter.raw_ndcg_below=1.01"]
    for verb in ("prepare", "check"):
        ran = subprocess.run(
            [sys.executable, "-m", "rec_r1.cli", verb, *words], capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
        assert "300 documents" in ran.stdout
