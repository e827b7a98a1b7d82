"""Messages that name what to do: layouts, columns, dates, datasets of the hub, and settings that need no data."""

import csv
import datetime
import logging

import pytest

from rec_r1 import cli, config, console, environment, tasks
from rec_r1.config import TaskConfig, UserError
from rec_r1.tasks import columns, known_files, raw_files
from rec_r1.tasks.dates import read_date

UTC = datetime.UTC


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (["ml-100k.inter"], "task.name=sequential task.params.layout=recbole"),
        (["u.data", "u.item"], "task.name=sequential task.params.layout=ml-100k"),
        (["ratings.dat"], "task.name=sequential task.params.layout=ml-1m"),
        (["ratings.csv", "movies.csv"], "task.name=sequential task.params.layout=ml-latest"),
        (["meta_All_Beauty.jsonl.gz"], "layout=amazon2023 task.params.category=CATEGORY"),
        (["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"], "task.name=beir"),
        (["corpus.jsonl", "topics.test.tsv", "qrels.test.txt"], "task.name=trec"),
        (["shopping_queries_dataset_examples.parquet"], "task.name=esci"),
        (["sampled_item_metadata_1M.jsonl"], "task.name=amazon_c4"),
        (["sessions.jsonl"], "layout=sessions"),
        (["products.csv", "clicks.csv"], "task.name=catalog"),
        (["items.csv", "ubi_events.csv", "ubi_queries.csv"], "task.name=catalog task.params.layout=ubi"),
    ],
)
def test_a_folder_of_another_layout_is_recognised(tmp_path, names, settings):
    touch(tmp_path, *names)
    for task in ("sequential", "trec", "beir", "esci", "amazon_c4"):
        if f"task.name={task}" in settings and "layout" not in settings:
            continue
        with pytest.raises(UserError) as error:
            tasks.load(TaskConfig(name=task, path=str(tmp_path)))
        assert settings in str(error.value), task


def test_files_in_a_subfolder_are_recognised_too(tmp_path):
    touch(tmp_path, "ml-1m/ratings.dat", "ml-1m/movies.dat")
    with pytest.raises(
        UserError, match=rf"task.path={tmp_path / 'ml-1m'} task.name=sequential .*layout=ml-1m: set that"
    ):
        tasks.load(TaskConfig(name="sequential", path=str(tmp_path)))


def test_what_the_user_named_already_is_no_hint(tmp_path):
    touch(tmp_path, "ml-1m.inter")
    params = {"layout": "recbole"}
    with pytest.raises(UserError, match=r"no items .*name the right folder") as error:
        tasks.load(TaskConfig(name="sequential", path=str(tmp_path), params=params))
    assert "layout=" not in str(error.value)
    assert known_files.hint(tmp_path / "..", ["x"]) is not None  # A folder with nothing known raises nothing.


def write_shop(folder, header, item_header=("id", "title")):
    with (folder / "interactions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *(["u1", f"i{n}", str(1_700_000_000 + n)] for n in range(6))])
    with (folder / "items.csv").open("w", newline="") as file:
        csv.writer(file).writerows([item_header, *([f"i{n}", f"item {n}"] for n in range(6))])


def test_every_missing_column_is_named_with_its_setting_and_the_nearest(tmp_path, capsys):
    write_shop(tmp_path, ["customer_id", "sku", "created_at"], ["product", "name"])
    words = ["cpu/sequential", f"task.path={tmp_path}"]
    assert cli.main(["prepare", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "no column 'id', only product, name: set task.params.columns.id=product" in lines[-2]
    assert "no column 'title', only product, name: set task.params.columns.title=name" in lines[-1]
    with pytest.raises(UserError) as error:
        tasks.load(
            TaskConfig(name="sequential", path=str(tmp_path), params={"columns": {"id": "product", "title": "name"}})
        )
    said = config.problems_of(str(error.value))
    assert [line.rpartition(": ")[2] for line in said] == [
        "set task.params.columns.user=customer_id",
        "set task.params.columns.item=sku",
        "set task.params.columns.time=created_at",
    ]


@pytest.mark.parametrize(
    ("column", "holds", "there", "expected"),
    [
        ("user", "user", ["item", "user_id"], "user_id"),
        ("user", "user", ["customer", "used"], "used"),  # A similar name comes before a usual one.
        ("timestamp", "time", ["a", "date"], "date"),
        ("genres", "text", ["genre", "year"], "genre"),
        ("xyz", "text", ["only"], "only"),
    ],
)
def test_the_nearest_column(column, holds, there, expected):
    assert columns.nearest(column, holds, there) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-01-31", datetime.datetime(2024, 1, 31)),
        ("2024-01-31 12:00:00", datetime.datetime(2024, 1, 31, 12)),
        ("2024-01-31T12:00:00Z", datetime.datetime(2024, 1, 31, 12, tzinfo=UTC)),
        ("2024-01-31 12:00:00.5 UTC", datetime.datetime(2024, 1, 31, 12, 0, 0, 500_000, tzinfo=UTC)),
        ("31.01.2024", datetime.datetime(2024, 1, 31)),
        ("1.2.2024 08:30", datetime.datetime(2024, 2, 1, 8, 30)),
        ("01/31/2024", datetime.datetime(2024, 1, 31)),
        ("31/01/2024 23:59:59", datetime.datetime(2024, 1, 31, 23, 59, 59)),
        ("31-01-2024", datetime.datetime(2024, 1, 31)),
        ("02/02/2024", datetime.datetime(2024, 2, 2)),
        ("1/31/2024 1:05 PM", datetime.datetime(2024, 1, 31, 13, 5)),
        ("2024/01/31", datetime.datetime(2024, 1, 31)),
    ],
)
def test_dates_in_the_usual_forms(text, expected):
    assert read_date(text) == expected
    whole = expected if expected.tzinfo else expected.replace(tzinfo=UTC)
    assert raw_files.moment({"t": text}, "t", "f:1") == whole.timestamp()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("03/04/2024", "it may be day/month or month/day"),
        ("3-4-2024", "it may be day-month or month-day"),
        ("31.01.24", "its year has two digits"),
        ("31.02.2024", "day"),
        ("13/13/2024", "month must be in 1..12"),
        ("31.01.2024 25:00", "'25:00' is no time of day"),
        ("noon", "it is no date in a known form"),
    ],
)
def test_other_dates_are_refused_with_the_reason(text, reason):
    with pytest.raises(UserError) as error:
        raw_files.moment({"t": text}, "t", "f:1")
    assert reason in str(error.value) and repr(text) in str(error.value) and "2024-01-31" in str(error.value)


@pytest.mark.parametrize("text", ["1e9", "-5", "1700000000", "1700000000123", "1700000000.5"])
def test_numbers_stay_what_they_are(text):
    assert raw_files.moment({"t": text}, "t", "f:1") == float(text)


def test_a_dataset_that_cannot_be_downloaded_names_files_and_source(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        raw_files.task_folder(TaskConfig(path="hub:nobody/nothing"), "files", ["a.csv", "b.csv"])
    said = str(error.value)
    assert "or download a.csv, b.csv from https://huggingface.co/datasets/nobody/nothing and set task.path" in said


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("retriever.params.b=2", "retriever.params.b must be a number from 0 to 1, got 2"),
        ("retriever.params.kk=2", "retriever.params.kk: unknown parameter of 'bm25'"),
        ("retriever.kind=bm26", "retriever.kind: unknown 'bm26'"),
    ],
)
@pytest.mark.parametrize("verb", ["index", "fit", "serve", "try", "check"])
def test_the_retriever_is_checked_before_data_are_read(monkeypatch, capsys, verb, setting, said):
    def read(config):
        raise AssertionError("the data were read")

    monkeypatch.setattr(environment.tasks, "load", read)
    assert (
        cli.main([verb, "quickstart", setting, "--port=0"] if verb == "serve" else [verb, "quickstart", setting]) == 2
    )
    assert said in capsys.readouterr().err


def test_parameters_of_inner_backends_are_checked_too():
    import retrievers

    params = {"retrievers": [{"kind": "bm25", "params": {"k1": -1}}]}
    with pytest.raises(ValueError, match="k1 must be a number >= 0"):
        retrievers.check_parameters("hybrid", params)
    retrievers.check_parameters("hybrid", {"retrievers": [{"kind": "bm25"}]})


@pytest.mark.slow
@pytest.mark.parametrize(("below", "logged"), [(1.01, False), (0.9, True)])
def test_a_filter_is_mentioned_where_there_is_one(caplog, below, logged):
    env = environment.open_environment(config.load("quickstart"))
    with caplog.at_level(logging.INFO):
        tasks.keep_headroom(env.task.train, env.retriever, config.TrainFilter(below))
    assert ("training queries have a raw ndcg" in caplog.text) == logged


def test_a_progress_bar_appears_after_a_while(capsys, monkeypatch):
    assert list(console.progress(range(3), "counting", "things")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    assert list(console.progress(iter("ab"), "counting", "things", 2)) == ["a", "b"]
    assert "counting" in capsys.readouterr().err


def test_all_mistakes_of_a_file_are_named_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: abc\nfoo: 1\ntask: 3\nevaluation: {mismatch_below: x, every_step: 1}\n")
    with pytest.raises(UserError) as error:
        config.load(path)
    found = config.problems_of(str(error.value))
    named = (
        "seed must be",
        "unknown key foo",
        "task must be a section",
        "mismatch_below must",
        "evaluation.every_step",
    )
    assert len(found) == len(named) and all(line.startswith(f"{path}: ") for line in found)
    assert all(part in line for part, line in zip(named, found, strict=True))


def test_all_mistakes_of_overrides_are_named_at_once():
    for mistakes in (
        ["seed=abc", "foo=1", "output_dir=x", "task.nam=emoji"],
        ["seed", "output_dir=[", "task.name.x=1"],
    ):
        with pytest.raises(UserError) as error:
            config.load("quickstart", mistakes)
        found = config.problems_of(str(error.value))
        assert sorted(line.split("'")[1] for line in found) == sorted(set(mistakes) - {"output_dir=x"})
