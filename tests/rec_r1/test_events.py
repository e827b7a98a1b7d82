"""Logs as they come: events that are repeated, times of several kinds, splits that were published with the data."""

import datetime
import gzip
import itertools

import pytest
from datasets_ import interactions, plain_folder, sessions_folder, write_jsonl, write_lines
from hypothesis import given
from hypothesis import strategies as st

from rec_r1 import tasks
from rec_r1.config import TaskConfig, UserError
from rec_r1.tasks.events import Times, once
from rec_r1.tasks.integrity import SPLITS
from rec_r1.tasks.sequences import Interaction, Splitting, in_order

START = 1_700_000_000  # November 2023


def load(folder, **params):
    return tasks.load(TaskConfig("sequential", str(folder), params))


def log(folder, rows, header="user,item,timestamp"):
    """interactions.csv of ``rows``, with thirty items."""
    plain_folder(folder)
    write_lines(folder / "interactions.csv", [header, *(",".join(map(str, row)) for row in rows)])
    return folder


@pytest.mark.slow
def test_a_log_that_says_everything_twice_is_the_log_that_says_it_once(tmp_path, caplog):
    rows = interactions()
    expected = load(log(tmp_path / "once", rows))
    for name, twice in (("beside", [r for r in rows for _ in range(2)]), ("behind", [*rows, *rows])):
        caplog.clear()
        task = load(log(tmp_path / name, twice))
        assert task.splits == expected.splits and (task.counts == expected.counts).all()
        assert f"{len(rows)} of {2 * len(rows)} events (user, item, time) repeat an earlier one" in caplog.text


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 4)), max_size=30))
def test_once_keeps_the_first_of_each_in_order(found):
    kept = once(found, "log", "events")
    assert len(set(kept)) == len(kept) and set(kept) == set(found) and once(found + found, "log", "events") == kept
    assert [found.index(each) for each in kept] == sorted(found.index(each) for each in kept)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=30))
def test_consecutive_repeats_collapse_to_the_first(found):
    own = [Interaction("u", row, float(time)) for row, time in found]
    kept = in_order(own, Splitting(consecutive_repeats="collapse"))
    rows = [i.row for i in in_order(own, Splitting())]
    assert len(rows) == len(own) and [i.row for i in kept] == [row for row, _ in itertools.groupby(rows)]


def test_consecutive_repeats_are_a_setting(tmp_path):
    rows = [(u, i, t + late) for u, i, t in interactions() for late in (0, 1)]  # each event again a second later
    folder = log(tmp_path, rows)
    with pytest.raises(
        UserError, match=r"split is empty .*repeat an item of their history.*consecutive_repeats=collapse"
    ):
        load(folder)
    expected = load(log(tmp_path / "once", interactions()))
    assert load(folder, consecutive_repeats="collapse").splits == expected.splits
    with pytest.raises(UserError, match="consecutive_repeats: 'drop': choose from keep, collapse"):
        load(folder, consecutive_repeats="drop")


def test_ids_that_look_alike_are_named(tmp_path, caplog):
    rows = [(f"{n % 4}", f"i{n}", n) for n in range(28)]
    load(log(tmp_path / "users", [*rows, ("3.0", "i1", 99)]))
    assert "1 pair of ids differs only in white space, unicode form or a .0, first '3' and '3.0'" in caplog.text
    folder = log(tmp_path / "items", rows)
    write_jsonl(folder / "items.jsonl", ({"id": str(n), "title": f"t{n}"} for n in range(30)))
    write_lines(folder / "interactions.csv", ["user,item,timestamp", "1,7.0,5"])
    with pytest.raises(UserError, match=r"csv:2: item '7\.0' \('7\.0' is there as '7': write the ids alike\) is not"):
        load(folder)


def test_sessions_that_stand_twice_count_once(tmp_path, caplog):
    expected = load(sessions_folder(tmp_path / "a"), layout="sessions", test_share=0.3, validation_share=0.3)
    folder = sessions_folder(tmp_path / "b")
    path = folder / "interactions.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    path.write_bytes(gzip.compress("\n".join(line for line in lines for _ in range(2)).encode()))
    task = load(folder, layout="sessions", test_share=0.3, validation_share=0.3)
    assert task.splits == expected.splits and "80 of 160 lines repeat an earlier one" in caplog.text


def test_consecutive_repeats_of_a_session_s_history(tmp_path):
    write_jsonl(tmp_path / "items.jsonl", ({"id": str(n), "title": f"t{n}"} for n in range(9)))
    lines = [{"user": f"u{u}", "history": ["1", "1", "2", "2", "1"], "next": "3"} for u in range(20)]
    write_jsonl(tmp_path / "interactions.jsonl", lines)
    usual = {"layout": "sessions", "test_share": 0.3, "validation_share": 0.3}
    assert set(load(tmp_path, **usual).test.histories) == {(1, 1, 2, 2, 1)}
    assert set(load(tmp_path, **usual, consecutive_repeats="collapse").test.histories) == {(1, 2, 1)}


def day(n: int) -> str:
    return (datetime.date(2024, 1, 1) + datetime.timedelta(days=n)).isoformat()


SECONDS = [START + 86_400 * n for n in range(20)]
MIXED = [
    (
        [*SECONDS, 1_700_000_000_000],
        "seconds since 1970 .20 values.* milliseconds since 1970 .1, such as '1700000000000'",
    ),
    ([*SECONDS[:3], *(1000 * t for t in SECONDS)], "milliseconds since 1970 .20 values.* with seconds since 1970 .3,"),
    ([*SECONDS, 1_700_000_000_000_000], "microseconds since 1970"),
    ([*SECONDS, 1_700_000_000 * 10**9], "nanoseconds since 1970"),
    ([*map(day, range(20)), 20240131], "dates .20 values.* dates written as YYYYMMDD .1, such as '20240131'"),
    ([*map(day, range(20)), START], "dates .20 values.* seconds since 1970 .1"),
    ([20240101, 20240102, 20240131, START], "YYYYMMDD .3 values.* seconds since 1970"),
    ([*SECONDS, 0], "numbers that are no time since 1970 .1, such as '0'"),
    ([*SECONDS, -1], "no time since 1970 .1, such as '-1'"),
    ([*SECONDS, 20231115], "YYYYMMDD .1"),
    ([*SECONDS, 20231115101112], "YYYYMMDDHHMMSS .1"),
    ([*SECONDS, 2023], "no time since 1970 .1"),
    ([*SECONDS, 486_000_000], "1 of 21 times, seconds since 1970, are before 1990 or after 2040, such as '486000000'"),
    (
        [*SECONDS, 4_070_908_800],
        "1 of 21 times, seconds .* such as '4070908800' at .*:22, and the others are not, such as '1700000000'",
    ),
    ([*map(day, range(20)), "1970-01-01"], "1 of 21 times, dates, are before 1990 .* '1970-01-01'"),
    ([*map(day, range(20)), "9999-12-31"], "1 of 21 times, dates, .* '9999-12-31'"),
    ([20240101, 20240102, 19000101], "1 of 3 times, dates written as YYYYMMDD"),
]


@pytest.mark.parametrize(("times", "message"), MIXED)
def test_times_of_several_kinds_are_refused(tmp_path, times, message):
    rows = [(f"u{n % 3}", f"i{n}", time) for n, time in enumerate(times)]
    with pytest.raises(UserError, match=f"column 'timestamp'.*{message}") as error:
        load(log(tmp_path, rows))
    assert "interactions.csv:" in str(error.value) and "\n" not in str(error.value)


ONE_KIND = [
    SECONDS,
    [t + 0.5 for t in SECONDS],
    [1000 * t for t in SECONDS],
    [f" {t} " for t in SECONDS],
    [*map(day, range(20))],
    [f"{day(n)}T10:11:12Z" for n in range(20)],
    [20240101 + n for n in range(20)],
    [2000 + n for n in range(20)],
    [*range(20)],
    [10_000_000 + 500_000 * n for n in range(30)],  # line numbers that pass through what could be dates
    [486_000_000 + 20_000_000 * n for n in range(20)],  # 1985 to 1997, year by year
    [100_000_000 * n for n in range(1, 4)],
    [START] * 6,
]


@pytest.mark.parametrize("times", ONE_KIND)
def test_times_of_one_kind_pass(times):
    column = Times("log.csv", "timestamp")
    read = [column.read({"timestamp": time}, f"log.csv:{n}") for n, time in enumerate(map(str, times))]
    column.check()
    assert read == sorted(read)


@given(st.lists(st.integers(631_152_000, 2_208_988_799), min_size=1, max_size=30), st.sampled_from([1, 10**3, 10**6]))
def test_any_times_since_1990_in_one_unit_pass_and_two_units_do_not(seconds, unit):
    for second_unit in (unit, 10**3 * unit):
        column = Times("log.csv", "t")
        for n, time in enumerate(seconds):
            column.read({"t": time * unit}, f"log.csv:{n}")
        column.read({"t": seconds[0] * second_unit}, "log.csv:last")
        if second_unit == unit:
            column.check()
        else:
            with pytest.raises(UserError, match="cannot be put into one order"):
                column.check()


def published_rows():
    """u0 … u9 choose i0 i1 … i5 each from its own place; the last is test, the one before valid."""
    for u in range(10):
        for n in range(6):
            yield (
                f"u{u}",
                f"i{(3 * u + n) % 30}",
                START + 100 * n + u,
                "test" if n == 5 else "valid" if n == 4 else "train",
            )


@pytest.mark.slow
def test_a_column_that_names_the_part_is_kept(tmp_path, caplog):
    rows = [*published_rows()]
    folder = log(tmp_path / "column", rows, "user,item,timestamp,part")
    task = load(folder, part_column="part")
    expected = load(log(tmp_path / "none", [row[:3] for row in rows]))  # leave one out makes the very same parts
    assert task.splits == expected.splits and (task.counts == expected.counts).all()
    files = tmp_path / "files"
    plain_folder(files)
    for name, part in (("train", "train"), ("dev", "valid"), ("held", "test")):
        write_lines(
            files / f"{name}.csv", ["user,item,timestamp", *(f"{u},{i},{t}" for u, i, t, p in rows if p == part)]
        )
    parts = {"train": "train.csv", "validation": "dev.csv", "test": "held.csv"}
    assert load(files, parts=parts).splits == expected.splits
    names = {2: "TEST", 3: "dev"}
    shifted = [(u, i, t, names.get((t - START) // 100, "Training")) for u, i, t, _ in rows]
    odd = load(log(tmp_path / "odd", shifted, "user,item,timestamp,part"), part_column="part")
    assert set(odd.test.ids) and "held-out targets are older than their user's last training event" in caplog.text
    held_out = {(u, i) for u, i, _, p in shifted if p != "Training"}
    shown = {(q.partition(":")[0], f"i{r}") for q, h in zip(odd.train.ids, odd.train.histories, strict=True) for r in h}
    assert not shown & held_out  # a training prompt shows no held-out choice


def test_published_sessions(tmp_path, caplog):
    write_jsonl(tmp_path / "items.jsonl", ({"id": str(n), "title": f"t{n}"} for n in range(9)))
    lines = [("a", ["1", "2"], "3", "train"), ("b", ["4"], "5", "train"), ("a", ["2", "3"], "4", "validation"),
             ("c", ["1", "2"], "3", "test"), ("b", ["5"], "6", "test")]  # fmt: skip
    records = [{"user": u, "history": h, "next": n, "fold": p} for u, h, n, p in lines]
    write_jsonl(tmp_path / "interactions.jsonl", records)
    task = load(tmp_path, layout="sessions", part_column="fold")
    assert task.train.histories == [(1, 2), (4,)] and task.validation.rows == [(4,)] and task.test.rows == [(3,), (6,)]
    assert [task.interactions.sequence(u).tolist() for u in (0, 1)] == [[1, 2, 3], [4, 5]]
    assert "1 of 2 test examples (history and target) are in train too" in caplog.text
    records[3]["fold"] = "held"
    write_jsonl(tmp_path / "interactions.jsonl", records)
    with pytest.raises(UserError, match=r"interactions\.jsonl:4: 'held' names no split: choose from train, training"):
        load(tmp_path, layout="sessions", part_column="fold")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"parts": {"train": "a.csv"}}, "name a file for each of train, validation, test"),
        (
            {"parts": dict.fromkeys(SPLITS, "interactions.csv"), "split": "by_user"},
            "leave split out",
        ),
        ({"part_column": "part", "split": "by_user"}, "leave split out"),
        ({"part_column": "part"}, r"interactions\.csv:2: no column 'part'"),
        ({"parts": dict.fromkeys(SPLITS, "no.csv")}, "no train interactions"),
    ],
)
def test_wrong_parts_are_named(tmp_path, params, message):
    with pytest.raises(UserError, match=message):
        load(plain_folder(tmp_path), **params)


def test_a_published_split_with_fit_share(tmp_path):
    folder = log(tmp_path, published_rows(), "user,item,timestamp,part")
    task = load(folder, part_column="part", fit_share=0.5)
    assert task.set_apart and 0 < len(task.interactions) < 10
    fitted = {tuple(task.interactions.sequence(u).tolist()) for u in range(len(task.interactions))}
    assert not fitted & {(*h, t) for h, (t,) in zip(task.train.histories, task.train.rows, strict=True)}
