"""The task `catalog`: tables as people have them, and everything that is wrong with them in one message."""

import csv
import logging
import sys
import unicodedata
from collections import defaultdict

import pytest
from catalog_files import GRADED, ITEMS, SHOP, SHOP_PARAMS, expected, flat, judged, load, make, refused, write

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
        "clicks.csv: 7 judged items are not in products.csv; 7 lines of judgments are left out",
        "ids are written in two ways and count as the same",
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


@pytest.mark.slow
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


def test_parquet_whose_texts_are_bytes(tmp_path):
    """Some programs write texts without saying that they are texts."""

    def as_bytes(row):
        return {key: value.encode() if isinstance(value, str) else value for key, value in row.items()}

    write(tmp_path / "items.parquet", [as_bytes(item) for item in ITEMS])
    write(tmp_path / "judgments.parquet", [as_bytes(row) for row in GRADED])
    task = load(tmp_path)
    assert judged(task) == expected(GRADED)
    assert list(task.catalog.titles) == [item["title"] for item in ITEMS]


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


def test_a_long_cell_is_read_and_an_open_quotation_mark_is_not(tmp_path):
    long = [ITEMS[0] | {"text": "word " * 60_000}, *ITEMS[1:]]
    write(tmp_path / "clicks.csv", GRADED)
    write(tmp_path / "items.csv", long)
    assert len(load(tmp_path, text=["text"]).catalog.texts[0].split()) == 60_002
    head, rest = (tmp_path / "items.csv").read_text().split("\n", 1)
    (tmp_path / "items.csv").write_text(f'{head}\n"9,open,quotation\n' + rest * 60)
    (line,) = refused(tmp_path)
    assert "items.csv: cannot be read" in line and "close the quotation mark that opens before this cell" in line


@pytest.mark.parametrize("rest", [20, 20_000], ids=["short", "long"])
def test_a_quotation_mark_that_stays_open_in_the_last_column_is_named(tmp_path, rest):
    """It takes all rows after it into one cell, and the number of cells is right."""
    write(tmp_path / "clicks.csv", GRADED)
    lines = ["id,title,text", '7,open,"a text', *(f"{n},thing {n},some text" for n in range(1000, 1000 + rest))]
    (tmp_path / "items.csv").write_text("\n".join(lines) + "\n")
    (line, *_) = refused(tmp_path)
    assert (
        "items.csv: cannot be read (the cell that begins with 'a text' in line 2 is not closed): close the quotation"
        in line
    )
    lines[1] = '7,closed,"a text'  # The same over two lines is a cell, in the last row as well.
    (tmp_path / "items.csv").write_text("\n".join([lines[0], *lines[2:], lines[1], 'of two lines"', ""]))
    assert load(tmp_path, text=["text"]).catalog.texts[-1].endswith("a text of two lines")


def test_a_quotation_mark_that_a_later_one_closes_is_named(tmp_path):
    """It takes the rows in between into one cell, and the number of cells is right."""
    write(tmp_path / "clicks.csv", GRADED)
    lines = ["id,title", *(f"{n},thing {n}" for n in range(1000, 1060))]
    lines[6], lines[36] = '1005,"running kettle 5', '1035,"oak" table'
    (tmp_path / "items.csv").write_text("\n".join(lines) + "\n")
    (line, *_) = refused(tmp_path)
    assert "items.csv: cannot be read (the cell that begins with 'running kettle 5' in line 7 is not closed)" in line
    # Within one line nothing is lost, and files that are written by hand have such cells.
    lines[6], lines[37] = "1005,running kettle 5", '1036,"oak" '
    (tmp_path / "items.csv").write_text("\n".join(lines) + "\n")
    assert load(tmp_path).catalog.titles[35:37] == ["oak table", "oak"]


def test_two_columns_of_one_name_are_refused(tmp_path):
    rows = [{"id": item["id"], "title": item["title"], "label": item["title"]} for item in ITEMS]
    write(tmp_path / "clicks.csv", GRADED)
    write(tmp_path / "items.csv", rows)
    text = (tmp_path / "items.csv").read_text()
    (tmp_path / "items.csv").write_text(text.replace("id,title,label", "id,title,title", 1))
    (line,) = refused(tmp_path)
    assert line.endswith("items.csv: several columns have the name 'title': rename all but one")


# ---- Ids and duplicates


@pytest.mark.parametrize(("items_end", "clicks_end"), [("", ".0"), (".0", ""), (".0", ".0")])
def test_ids_that_pandas_made_floats(tmp_path, caplog, items_end, clicks_end):
    items = [item | {"id": item["id"] + items_end} for item in ITEMS]
    rows = [row | {"item": row["item"] + clicks_end} for row in GRADED]
    with caplog.at_level(logging.WARNING):
        task = load(make(tmp_path, rows, items))
    assert list(task.catalog.ids) == [item["id"] for item in items]
    assert judged(task) == expected([row | {"item": row["item"] + items_end} for row in GRADED])
    said = f"20 ids are written in two ways and count as the same, such as '1000{clicks_end}' in clicks.csv"
    assert (said in caplog.text) == (items_end != clicks_end)


def test_two_forms_of_an_id_among_the_items_stay_two(tmp_path):
    both = [*GRADED, {"query": "other", "item": "1003.0", "grade": 1}]
    items = [*ITEMS, {"id": "1003.0", "title": "version 3", "text": ""}]
    assert judged(load(make(tmp_path / "b", both, items)))["other"] == {"1003.0": 1.0}
    one = [row | {"item": "1003.00"} if row["item"] == "1003" else row for row in GRADED]
    assert "1003.00" in refused(make(tmp_path / "c", one, items))[0]


def test_two_forms_of_an_id_among_the_judgments_are_one_item(tmp_path):
    """Two exports were joined, of which pandas wrote one with ids as floats. The events of both count."""
    twice = [row | {"item": f"{row['item']}.0", "grade": 3} for row in GRADED[:4]]
    best = {(row["query"], row["item"]): 3 for row in GRADED[:4]}
    wanted = [row | {"grade": best.get((row["query"], row["item"]), row["grade"])} for row in GRADED]
    assert judged(load(make(tmp_path / "grades", [*GRADED, *twice]))) == expected(wanted)
    clicks = [{"query": row["query"], "item": row["item"] + end} for row in GRADED for end in ("", ".0", ".00")]
    summed = judged(load(make(tmp_path / "clicks", clicks), event="click", combine="sum"))
    assert summed and all(grade == 3.0 for own in summed.values() for grade in own.values())


def test_ids_in_decomposed_unicode(tmp_path):
    items = [item | {"id": f"café-{item['id']}"} for item in ITEMS]
    rows = [row | {"item": unicodedata.normalize("NFD", f"café-{row['item']}")} for row in GRADED]
    assert judged(load(make(tmp_path, rows, items))) == expected([r | {"item": f"café-{r['item']}"} for r in GRADED])


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_events_that_differ_in_a_column_without_a_use_are_two(tmp_path, ending):
    """In every format, also in Parquet, of which only some columns would be needed."""
    rows = [{"query": row["query"], "item": row["item"]} for row in GRADED]
    clicks = [row | {"session": f"s{n}", "vector": [0.5, float(n)]} for row in rows for n in (1, 2, 2)]
    if ending == "csv":
        clicks = [{key: value for key, value in row.items() if key != "vector"} for row in clicks]
    write(tmp_path / "items.csv", ITEMS)
    write(tmp_path / f"clicks.{ending}", clicks)
    summed = judged(load(tmp_path, event="click", combine="sum"))
    assert summed and all(grade == 2.0 for own in summed.values() for grade in own.values())


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
    assert "items.csv: 1 item equals an earlier item and counts once" in caplog.text


def test_discontinued_items(tmp_path, caplog):
    gone = [*GRADED, *({"query": f"query {n}", "item": f"x{n}", "grade": 9} for n in range(5))]
    gone.append({"query": "only what is gone", "item": "x0", "grade": 1})
    folder = make(tmp_path, gone)
    assert refused(folder) == [
        "clicks.csv: 5 of 25 judged items are not in items.csv (6 lines), first: 'x0', 'x1', 'x2': add them to it, or "
        "set task.params.unknown=drop to leave their judgments out"
    ]
    assert judged(load(folder, unknown="drop")) == expected(GRADED)
    assert "clicks.csv: 5 judged items are not in items.csv; 6 lines of judgments are left out" in caplog.text


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
        "clicks.csv: 1 of 21 judged items are not in items.csv (1 line)",
        "items.csv: 1 item without an id",
        "items.csv: 1 item has the id of a different item",
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
