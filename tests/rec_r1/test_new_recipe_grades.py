"""`rec-r1 init`: where the grades of a table come from, and which of its rows and columns count for nothing."""

import logging
from pathlib import Path

import pytest

from rec_r1 import config, tasks
from rec_r1.checks.new_recipe import new_recipe, recognise
from rec_r1.checks.new_recipe.findings import findings
from rec_r1.config import UserError
from tests.rec_r1.datasets_ import write_jsonl, write_lines

WORDS = ("red shoe", "blue shoe", "green hat", "warm scarf", "rain coat", "wool sock", "silk tie", "straw hat")
ITEMS = ["id,title,description", *(f"p{i},{WORDS[i % 8]} {i},made of {i} parts" for i in range(40))]
QUERIES = 60


def folder_of(folder: Path, events: list[dict], ending: str = "csv") -> Path:
    """A folder with items.csv and a table of events, without the ending `events`."""
    write_lines(folder / "items.csv", ITEMS)
    if ending == "csv":
        columns = list(events[0])
        rows = [",".join(str(event[column]) for column in columns) for event in events]
        write_lines(folder / "events.csv", [",".join(columns), *rows])
    else:
        write_jsonl(folder / "events.jsonl", events)
    return folder


def pairs(**columns) -> list[dict]:
    """Two rows for each query, whose items are the right one and another. columns: name -> values of these two."""
    return [
        {"query": f"needed thing {i}", "item": f"p{(i + 7 * other) % 40}", **{c: v[other] for c, v in columns.items()}}
        for i in range(QUERIES)
        for other in (0, 1)
    ]


def init(folder: Path, tmp_path: Path) -> tuple[str, dict, tasks.Task]:
    """What init prints for a folder, the parameters of its recipe, and the task that the recipe describes."""
    output = tmp_path / "mine.yaml"
    output.unlink(missing_ok=True)
    said = "\n".join(new_recipe(folder, output, on_gpu=False, ask=None))
    recipe = config.load(output)
    return said, recipe.task.params, tasks.load(recipe.task)


def relevant(task: tasks.Task) -> dict[str, dict[str, float]]:
    """Query -> its items with a grade above 0."""
    return {
        query: {task.catalog.ids[row]: grade for row, grade in zip(rows, grades, strict=True) if grade > 0}
        for split in task.splits.values()
        for query, rows, grades in zip(split.queries, split.rows, split.grades, strict=True)
    }


def test_events_of_one_pair_are_no_repeated_rows(tmp_path):
    events = [{**pair, "event": name} for pair in pairs() for name in ("view", "click", "purchase")]
    assert findings(recognise(folder_of(tmp_path / "data", events)), "en") == []


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_repeated_rows_are_counted_as_the_task_drops_them(tmp_path, caplog, ending):
    rows = [{**pair, "clicks": 1} for pair in pairs()]
    rows += [rows[0], rows[0], {**rows[1], "clicks": 2}]
    if ending == "jsonl":  # A key with nothing is the same as no key, and another key is another cell.
        rows += [{**rows[2], "clicks": 1, "day": None}, {**rows[3], "purchases": 1}]
        del rows[-1]["clicks"]
    folder = folder_of(tmp_path / "data", rows, ending)
    (found,) = [finding for finding in findings(recognise(folder), "en") if "repeat" in finding.what]
    dropped = 3 if ending == "jsonl" else 2
    assert found.what == f"{dropped} rows repeat an earlier row"
    if ending == "csv":
        with caplog.at_level(logging.WARNING):
            init(folder, tmp_path)
        assert f"{dropped} of {len(rows)} lines equal an earlier one" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("column", "values", "ending", "role"),
    [
        ("relevant", (1, 0), "csv", "grade"),
        ("rel", (1, 0), "csv", "grade"),
        ("judgement", (2, 0), "csv", "grade"),
        ("is_relevant", (1, 0), "csv", "grade"),
        ("relevance_label", (1, 0), "csv", "grade"),
        ("isRelevant", ("TRUE", "FALSE"), "csv", "grade"),
        ("relevant", (True, False), "jsonl", "grade"),
        ("is_clicked", (1, 0), "csv", "clicks"),
        ("n_clicks", (3, 0), "csv", "clicks"),
        ("was_purchased", (True, False), "jsonl", "purchases"),
    ],
)
def test_irrelevant_rows_stay_irrelevant(tmp_path, column, values, ending, role):
    folder = folder_of(tmp_path / "data", pairs(**{column: values}), ending)
    said, params, task = init(folder, tmp_path)
    assert params["columns"][role] == column and "event" not in params and "no findings" in said
    grades = relevant(task)
    assert len(grades) == QUERIES
    assert all(grades[f"needed thing {i}"].keys() == {f"p{i % 40}"} for i in range(QUERIES))


@pytest.mark.slow
@pytest.mark.parametrize(("values", "ending"), [((1, 0), "csv"), ((True, False), "jsonl"), ((True, None), "jsonl")])
def test_a_flag_with_an_unusual_name_is_a_finding_that_says_what_to_set(tmp_path, values, ending):
    folder = folder_of(tmp_path / "data", pairs(hit=values, rank=(1, 2)), ending)
    said, params, _ = init(folder, tmp_path)
    assert params["event"] == "click" and "columns that are not used: hit, rank" in said
    assert "1 column of 0 and 1, or of true and false, is not used; first: hit. Rows with 0 count like" in said
    assert "add hit as clicks to columns" in (tmp_path / "mine.yaml").read_text()
    del params["event"]
    params["columns"]["clicks"] = "hit"
    task = tasks.load(config.TaskConfig(name="catalog", path=str(folder), params=params))
    assert {len(items) for items in relevant(task).values()} == {1}


@pytest.mark.slow
def test_a_flag_beside_events_without_a_usual_name_is_a_finding(tmp_path):
    folder = folder_of(tmp_path / "data", pairs(action=("shown", "shown"), hit=(1, 0)))
    assert "replace task.params.event and columns.event" in init(folder, tmp_path)[0]


@pytest.mark.parametrize(
    ("columns", "used"),
    [
        ({"score": (12.5, 3.2), "clicks": (1, 0)}, {"clicks": "clicks"}),
        ({"label": ("a", "b"), "event": ("click", "view")}, {"event": "event"}),
        ({"rating": (5, 1), "purchases": (1, 0)}, {"purchases": "purchases"}),
        ({"score": (2, 0)}, {"grade": "score"}),
        ({"relevance": (2, 0), "clicks": (1, 0)}, {"grade": "relevance"}),
        ({"type": ("shoe", "hat"), "clicks": (1, 0)}, {"clicks": "clicks"}),
        ({"purchased": ("2024-01-01", "2024-01-02"), "clicks": (1, 0)}, {"clicks": "clicks"}),
        ({"clicks": (1, 1), "add_to_carts": (1, 0)}, {"clicks": "clicks"}),
    ],
)
def test_a_score_is_a_grade_only_where_nothing_else_says_what_people_did(tmp_path, columns, used):
    folder = folder_of(tmp_path / "data", pairs(**columns))
    layout = recognise(folder)
    roles = {role: column for role, column in layout.params["columns"].items() if role not in ("id", "title")}
    assert roles == {"query": "query", "item": "item", **used}
    unused = [column for column in columns if column not in used.values()]
    assert unused == [] or layout.files[1].endswith(f"columns that are not used: {', '.join(unused)}")


def test_the_grades_of_a_table_of_everything_are_no_text_of_its_items(tmp_path):
    rows = [
        {**pair, "title": f"{WORDS[i % 8]} {i}", "label": ("very relevant", "not relevant")[i % 2]}
        for i, pair in enumerate(pairs())
    ]
    write_jsonl(tmp_path / "data" / "judged.jsonl", rows)
    layout = recognise(tmp_path / "data")
    assert layout.params["columns"]["grade"] == "label" and layout.params["text"] == []


@pytest.mark.slow
def test_what_is_taken_back_earns_nothing_and_is_named(tmp_path):
    names = ("click", "add_to_cart", "remove_from_cart", "OrderCancelled", "purchase", "unsave", "refund_of_order")
    events = [{**pair, "event": names[i % len(names)]} for i, pair in enumerate(pairs())]
    said, params, task = init(folder_of(tmp_path / "data", events), tmp_path)
    assert params["grades"] == {"click": 1.0, "add_to_cart": 2.0, "purchase": 3.0}
    assert "events that count for nothing: remove_from_cart (17), OrderCancelled (17), unsave (17)" in said
    assert sum(map(len, relevant(task).values())) == sum(event["event"] in params["grades"] for event in events)


def test_events_that_only_take_back_are_refused(tmp_path):
    folder = folder_of(tmp_path / "data", pairs(event=("remove_from_cart", "refund")))
    with pytest.raises(UserError, match=r"column event: only remove_from_cart, refund, which take something back: add"):
        recognise(folder)
