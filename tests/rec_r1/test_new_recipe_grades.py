"""`rec-r1 init`: where the grades of a table come from, and which of its rows and columns count for nothing."""

import logging
from pathlib import Path

import pytest

from rec_r1 import config, tasks
from rec_r1.checks.new_recipe import new_recipe, recognise
from rec_r1.checks.new_recipe.findings import findings
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
