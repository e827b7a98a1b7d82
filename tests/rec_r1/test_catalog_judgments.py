"""The task `catalog`: grades from columns and events, splits, OpenSearch's logs, and the cache."""

import datetime
import json
from collections import defaultdict
from pathlib import Path

import pytest
from catalog_files import GRADED, ITEMS, SHOP, SHOP_PARAMS, flat, judged, load, make, refused, write
from hypothesis import given
from hypothesis import strategies as st

from rec_r1 import cli
from rec_r1.config import TaskConfig
from rec_r1.tasks import catalog
from rec_r1.tasks.catalog_settings import Params
from rec_r1.tasks.integrity import normal
from rec_r1.tasks.task_cache import folder_of, summary

# ---- Grades


def test_grades_from_labels(tmp_path):
    rows = [row | {"grade": {3: "Exact", 2: "Substitute", 1: "Irrelevant"}[row["grade"]]} for row in GRADED]
    folder = make(tmp_path, rows)
    grades = {"Exact": 1, "Substitute": 0.1, "Irrelevant": 0}
    found = judged(load(folder, grades=grades))
    assert found["query 4"] == {"1004": 1.0, "1005": 0.1}
    (line,) = refused(folder, grades={"Exact": 1, "Substitute": 0.1})
    assert line.startswith("clicks.csv: 20 grades are not in task.params.grades, such as 'Irrelevant' at clicks.csv:4")


@pytest.mark.parametrize("name", ["clicks.csv", "clicks.jsonl", "clicks.parquet"])
def test_grades_of_numbers_and_of_booleans_are_named_as_yaml_writes_them(tmp_path, name):
    write(tmp_path / "items.csv", ITEMS)
    write(tmp_path / name, GRADED)
    for grades in ({3: 10, 2: 5, 1: 0}, {3.0: 10, 2.0: 5, 1.0: 0}, {"3": 10, "2": 5, "1": 0}):
        assert judged(load(tmp_path, grades=grades))["query 4"] == {"1004": 10.0, "1005": 5.0}
    write(tmp_path / name, [row | {"grade": row["grade"] > 2} for row in GRADED])
    for grades in ({True: 1, False: 0}, {"true": 1, "false": 0}, {"True": 1, "False": 0}):
        assert judged(load(tmp_path, grades=grades))["query 4"] == {"1004": 1.0}


def test_lines_of_json_with_other_keys_are_not_equal(tmp_path, caplog):
    """A purchase is no click, and a missing key is a blank cell."""
    rows = [{"query": f"query {q}", "item": str(1000 + q), "clicks": 1} for q in range(20)]
    rows += [{"query": row["query"], "item": row["item"], "purchases": 1} for row in rows[:10]]
    rows += [{"clicks": 1, "purchases": None, "item": row["item"], "query": row["query"]} for row in rows[:5]]
    write(tmp_path / "items.csv", ITEMS)
    write(tmp_path / "clicks.jsonl", rows)
    found = judged(load(tmp_path, columns={"clicks": "clicks", "purchases": "purchases"}))
    assert [found[f"query {q}"] for q in range(20)] == [{str(1000 + q): 3.0 if q < 10 else 1.0} for q in range(20)]
    assert "5 of 35 lines equal an earlier one and count once" in caplog.text


def test_a_seed_below_0_is_refused(tmp_path):
    (line,) = refused(make(tmp_path, GRADED), seed=-3, limits={"train": 5})
    assert line == "task.params.seed: -3: must be at least 0"


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


@pytest.mark.slow
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
    assert line.startswith("clicks.csv: 1 pair has events and no impression, such as 'a' and '1001': give each line")


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


@pytest.mark.slow
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
    assert "train: 1 query has the text of a held-out query and is left out" in caplog.text
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
        "clicks.csv: 1 cell of column 'part' names no split, such as 'later' at clicks.csv:2: write one"
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


@pytest.mark.slow
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
    assert lines[0].startswith("ubi_events.ndjson: 1 line has no query or no item, such as ubi_events.ndjson:302")
    assert lines[1].startswith(
        "ubi_events.ndjson: 1 line names a query that task.params.queries lacks, such as 'q-999' at"
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
def test_prepare_and_check_on_the_command_line(capsys, tiny_model):
    given = [f"task.params.{key}={json.dumps(value)}" for key, value in SHOP_PARAMS.items()]
    words = ["quickstart", "task.name=catalog", f"task.path={SHOP}", *given, "task.train_filter.raw_ndcg_below=1.01"]
    words += [f"model.name={tiny_model}", "lora=null"]
    for verb in ("prepare", "check"):
        assert cli.main([verb, *words]) == 0
        assert "300 documents" in capsys.readouterr().out
