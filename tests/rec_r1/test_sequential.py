"""Sequential tasks: files of the real formats, counts, splits, and nothing of the future in the past."""

import datetime
import itertools

import numpy as np
import pytest
from datasets_ import amazon_2023, movielens, plain_folder, sessions_folder, write_jsonl, write_lines
from hypothesis import given
from hypothesis import strategies as st

from rec_r1 import tasks
from rec_r1.config import TaskConfig, UserError
from rec_r1.tasks import sequences as histories
from rec_r1.tasks.leak_checks import check_no_leak, check_set_apart
from rec_r1.tasks.sequences import SPLIT_METHODS, Example, Interaction, Splitting, examples
from retrievers import Catalog

CATALOG = Catalog.from_records({"id": f"i{n}", "text": f"title {n}"} for n in range(30))


def load(folder, **params):
    return tasks.load(TaskConfig("sequential", str(folder), params))


def test_leave_one_out(tmp_path):
    task = load(plain_folder(tmp_path))
    assert len(task.catalog) == 30 and {part: len(split) for part, split in task.splits.items()} == {
        "train": 12 * 3, "validation": 12, "test": 12,
    }  # fmt: skip
    # user 0 chooses i0 i2 i4 i6 i8 i10: the last is test, the one before validation
    assert task.test.rows[0] == (10,) and task.test.histories[0] == (0, 2, 4, 6, 8)
    assert task.validation.rows[0] == (8,) and task.validation.histories[0] == (0, 2, 4, 6)
    assert [r for i, r in zip(task.train.ids, task.train.rows, strict=True) if i.startswith("u0:")] == [
        (2,),
        (4,),
        (6,),
    ]
    assert task.test.queries[0] == "title 8 Romance" and task.test.ids[0] == "u0:5"
    assert task.counts.sum() == 12 * 4  # two of each user's six are held out
    assert set(task.test.slices["target"]) <= {"warm", "tail", "cold"}
    for row, kind in zip(task.test.rows, task.test.slices["target"], strict=True):
        assert (kind == "cold") == (task.counts[row[0]] == 0)


@pytest.mark.parametrize(("last", "split", "warns"), [(3, None, True), (4, None, False), (3, "global_time", False)])
def test_equal_times_that_decide_what_is_held_out_are_said(tmp_path, caplog, last, split, warns):
    times = {"u1": (1, 2, 3, last), "u2": (1, 1, 4, 5, 6, 7)}  # The first two of the second user are not held out.
    folder = plain_folder(tmp_path)
    header = (folder / "interactions.csv").read_text().splitlines()[0]
    events = [f"{user},i{n},{time}" for user, own in times.items() for n, time in enumerate(own)]
    write_lines(folder / "interactions.csv", [header, *events])
    load(folder, split=split, test_share=0.4, validation_share=0.3)
    said = "1 of 2 users have equal times among their last three events"
    assert (said in caplog.text) == warns


def test_loading_twice_comes_from_the_cache_and_is_the_same(tmp_path, monkeypatch):
    first = load(plain_folder(tmp_path))
    monkeypatch.setattr(tasks.sequential if hasattr(tasks, "sequential") else histories, "examples", pytest.fail)
    again = load(tmp_path)
    assert again.folder == first.folder and again.catalog.fingerprint == first.catalog.fingerprint
    assert again.splits == first.splits and (again.counts == first.counts).all()


def test_global_time(tmp_path):
    task = load(plain_folder(tmp_path), split="global_time", validation_share=0.2, test_share=0.2)
    sizes = {part: len(split) for part, split in task.splits.items()}
    assert sum(sizes.values()) == 60 and sizes["validation"] == sizes["test"] == 12
    assert all(identifier.endswith(":5") for identifier in task.test.ids)  # the last round of everybody's
    assert task.counts.sum() == 60 - 12  # chosen before the validation's time; first items are no targets, and count


def test_targets_that_training_never_shows(tmp_path):
    folder = plain_folder(tmp_path)
    lines = (folder / "interactions.csv").read_text().splitlines()
    write_jsonl(folder / "items.jsonl", ({"id": f"i{n}", "title": f"title {n}"} for n in range(32)))
    new = [f"u{u},i30,9000{u}" for u in range(4)] + [f"u{u},i31,8000{u}" for u in range(4)]
    write_lines(folder / "interactions.csv", lines + new)
    both = {"split": "global_time", "validation_share": 0.15, "test_share": 0.15}
    task = load(folder, targets="inductive", **both)
    shown = {row for rows in task.test.rows for row in rows}
    assert {30, 31} <= shown and not any(task.counts[row] for row in shown)
    assert set(task.test.slices["target"]) == {"cold"} and not task.counts[30:].any()
    other = load(folder, targets="all", **both)
    assert len(other.validation) > len(task.validation)


def test_by_user_and_sessions(tmp_path):
    task = load(sessions_folder(tmp_path), layout="sessions", test_share=0.3, validation_share=0.3)
    users = [{identifier.partition(":")[0] for identifier in split.ids} for split in task.splits.values()]
    assert all(users) and not any(a & b for a, b in itertools.combinations(users, 2))
    assert all(target[0] not in h for s in task.splits.values() for target, h in zip(s.rows, s.histories, strict=True))
    assert task.counts.max() >= 1 and task.test.queries[0].startswith("thing ")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ml-100k", "ml-1m", "ml-latest", "recbole"])
def test_movielens_as_it_comes(tmp_path, layout):
    task = load(movielens(tmp_path, layout), layout=layout)
    assert len(task.catalog) == 30 and len(task.test) == 12 and task.test.rows[0] == (10,)
    assert task.catalog.titles[3] == "Amélie 3, The (1963)"
    assert task.catalog.texts[3].endswith("Romance") == (layout != "ml-100k")


def test_amazon_reviews_2023(tmp_path, caplog):
    task = load(amazon_2023(tmp_path), layout="amazon2023", category="All_Beauty", text=["features", "details"])
    assert task.name.endswith("-All_Beauty") and len(task.test) == 12
    assert task.catalog.texts[1] == "Serum 1 & cream vegan 30 ml Brand: Acme"
    assert task.catalog.titles[0] == "Bi0" and "1 item has no title" in caplog.text


@pytest.mark.slow
def test_dates_are_times(tmp_path):
    folder = plain_folder(tmp_path / "numbers")
    expected = load(folder)
    dated = plain_folder(tmp_path / "dates")
    lines = (folder / "interactions.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    start = datetime.datetime(2024, 1, 1)
    stamps = [(start + datetime.timedelta(seconds=int(t))).isoformat(" ") for *_, t in rows]
    write_lines(
        dated / "interactions.csv", [lines[0], *(f"{u},{i},{s}" for (u, i, _), s in zip(rows, stamps, strict=True))]
    )
    assert load(dated).splits == expected.splits
    days = [f"{u},{i},2024-01-{1 + int(t) // 1000:02}" for u, i, t in rows]
    write_lines(dated / "interactions.csv", [lines[0], *days])
    assert load(dated).splits == expected.splits


@pytest.mark.slow
def test_limits_are_drawn_and_the_same_each_time(tmp_path):
    folder = plain_folder(tmp_path)
    task = load(folder, limits={"train": 5, "test": 3})
    assert (len(task.train), len(task.validation), len(task.test)) == (5, 12, 3)
    whole = load(folder)
    assert set(task.train.ids) < set(whole.train.ids) and task.train.ids == load(folder, limits={"train": 5}).train.ids


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("u1,i99,5", r"interactions\.csv:74: item 'i99' is not in the catalogue: .*drop_unknown"),
        ("u1,i1", r"interactions\.csv:74: 2 fields instead of 3"),
        ("u1,i1,noon", r"interactions\.csv:74: 'timestamp' must be a number or a date, got 'noon'"),
        ("u1,i1,nan", r"interactions\.csv:74: 'timestamp' must be a number"),
        (",i1,5", r"interactions\.csv:74: 'user' is empty"),
    ],
)
def test_a_broken_row_is_named(tmp_path, line, message):
    folder = plain_folder(tmp_path)
    write_lines(folder / "interactions.csv", [*(folder / "interactions.csv").read_text().splitlines(), line])
    with pytest.raises(UserError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"columns": {"user": "customer"}}, r"interactions\.csv:2: no column 'customer', only user, item, timestamp"),
        ({"columns": {"title": "name"}}, r"items\.jsonl:1: no column 'name'"),
        ({"columns": {"price": "p"}}, r"columns\.price: unknown"),
        ({"layout": "netflix"}, "choose from interactions, sessions"),
        ({"layout": "amazon2023"}, "params.category: not set"),
        (
            {"layout": "ml-1m"},
            r"no interactions \(ratings\.dat, or with \.gz\); the folder has interactions\.csv, items\.jsonl",
        ),
        ({"split": "random"}, "choose from leave_one_out, global_time, by_user"),
        ({"histroy": 3}, r"unknown key task\.params\.histroy: did you mean 'history'"),
        ({"history": 0}, "at least 1"),
        ({"test_share": 0.95}, "leave something for training"),
        ({"limits": {"tests": 3}}, "limits: tests"),
        ({"limits": {"test": True}}, "limits must be a mapping to integers, got {'test': True}"),
        ({"columns": {"user": ["a"]}}, "columns must be a mapping to texts"),
        ({"min_rating": 4.0}, "needs a column rating"),
        ({"history": 1, "targets": "inductive", "split": "by_user"}, "split is empty"),
    ],
)
def test_wrong_settings_are_named(tmp_path, params, message):
    with pytest.raises(UserError, match=message):
        load(plain_folder(tmp_path), **params)


def test_whole_numbers_that_were_stored_as_floats_are_ids(tmp_path):
    import pandas

    folder = tmp_path / "floats"
    folder.mkdir()
    rows = [(float(user), float((user + step) % 30), step) for user in range(12) for step in range(6)]
    table = pandas.DataFrame(rows, columns=["user", "item", "timestamp"])
    table.to_parquet(folder / "interactions.parquet")
    pandas.DataFrame({"id": range(30), "title": [f"title {i}" for i in range(30)]}).to_parquet(folder / "items.parquet")
    assert load(folder).train.ids[0].startswith("0")
    table.loc[5, "user"] = float("nan")
    table.to_parquet(folder / "interactions.parquet")
    with pytest.raises(UserError, match=r"interactions\.parquet: row 6: 'user' is empty"):
        load(folder)


def test_a_broken_item_is_named(tmp_path):
    folder = plain_folder(tmp_path)
    with (folder / "items.jsonl").open("a") as file:
        file.write('{"id": "i1", "title": "again"}\n')
    with pytest.raises(UserError, match=r"items\.jsonl: document id 'i1' occurs twice"):
        load(folder)
    (folder / "items.jsonl").write_text('{"id": "i1", "title": "a"}\n{"id": \n')
    with pytest.raises(UserError, match=r"items\.jsonl:2: not valid JSON"):
        load(folder)


def test_a_hub_that_is_not_there_is_a_user_s_matter():
    with pytest.raises(UserError, match="hub:nobody/nothing cannot be downloaded"):
        load("hub:nobody/nothing")


choices = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 29), st.integers(0, 40)), min_size=30, max_size=80).map(
    lambda rows: [Interaction(f"u{u}", row, float(t)) for u, row, t in rows]
)


@pytest.mark.slow
@given(choices, st.sampled_from(SPLIT_METHODS), st.sampled_from(["all", "last"]), st.integers(1, 4))
def test_whatever_the_interactions_nothing_leaks(rows, split, train_targets, kept):
    params = Splitting(split=split, train_targets=train_targets, history=kept, validation_share=0.3, test_share=0.3)
    try:
        task = examples("any", CATALOG, rows, params)  # checks itself, and so do we, from the interactions alone
    except UserError as error:
        assert "split is empty" in str(error) or "no user" in str(error)
        return
    times = {}
    for u, row, t in rows:
        times.setdefault(u, []).append((t, row))
    latest_train = {}
    for part, s in task.splits.items():
        for identifier, target, history in zip(s.ids, s.rows, s.histories, strict=True):
            user, _, place = identifier.partition(":")
            own = sorted(times[user], key=lambda pair: pair[0])
            assert own[int(place)][1] == target[0] and target[0] not in history and len(history) <= kept
            assert list(history) == [row for _, row in own[max(0, int(place) - kept) : int(place)]]
            if part == "train":
                latest_train[user] = max(latest_train.get(user, -1), own[int(place)][0])
            elif split == "leave_one_out":
                assert own[int(place)][0] >= latest_train.get(user, -1)
            elif split == "global_time":
                assert own[int(place)][0] > max(latest_train.values())
            else:
                assert user not in latest_train


@pytest.mark.parametrize(
    ("split", "bad", "message"),
    [
        ("leave_one_out", {"test": [Example("a:9", "a", 9, (3,), 3, 0, 1)]}, "in its own history"),
        ("leave_one_out", {"test": [Example("a:9", "a", 9, (3,), 4, 9, 1)]}, "later than its target"),
        ("leave_one_out", {"train": [Example("a:1", "a", 1, (3,), 4, 1, 9)]}, "earlier than the same user's in train"),
        (
            "global_time",
            {"train": [Example("b:1", "b", 1, (3,), 4, 1, 6)]},
            "train split reaches into the time of validation",
        ),
        ("by_user", {"train": [Example("b:1", "c", 1, (3,), 4, 1, 1)]}, "a user is in two splits"),
    ],
)
def test_the_check_finds_leaks(split, bad, message):
    fine = {
        "train": [Example("a:1", "a", 1, (1,), 2, 0, 1)],
        "validation": [Example("b:5", "b", 5, (1,), 2, 4, 5)],
        "test": [Example("c:8", "c", 8, (1,), 2, 7, 8)],
    }
    check_no_leak(fine, Splitting(split=split))
    a_later = {"validation": [Example("a:2", "a", 2, (1,), 5, 2, 3)]} if "earlier" in message else {}
    with pytest.raises(ValueError, match=message):
        check_no_leak({**fine, **a_later, **bad}, Splitting(split=split))


@pytest.mark.slow
@given(choices, st.sampled_from(SPLIT_METHODS), st.sampled_from([0.0, 0.3, 0.7]))
def test_backends_are_fitted_on_nothing_that_a_prompt_asks_for(rows, split, fit_share):
    rows = [i._replace(row=5 * int(i.user[1:]) + i.row % 5) for i in rows]  # whose a choice is can be told by its row
    params = Splitting(split=split, fit_share=fit_share, validation_share=0.3, test_share=0.3)
    try:
        task = examples("any", CATALOG, rows, params)
    except UserError:
        return
    ordered = {}
    for user, row, time in sorted(rows, key=lambda i: i.time):
        ordered.setdefault(user, []).append((row, time))
    known = [task.interactions.sequence(u).tolist() for u in range(len(task.interactions))]
    fitted = {f"u{sequence[0] // 5}": sequence for sequence in known}
    assert len(fitted) == len(known) and task.set_apart == (fit_share > 0)
    for user, sequence in fitted.items():
        assert sequence == [row for row, _ in ordered[user][: len(sequence)]]
    latest = max((ordered[user][len(sequence) - 1][1] for user, sequence in fitted.items()), default=-1)
    for part in ("train", "validation", "test") if fit_share else ("validation", "test"):
        for identifier in task.splits[part].ids:
            user, _, place = identifier.partition(":")
            if split == "by_user":
                assert user not in fitted
            elif split == "leave_one_out":
                assert len(fitted.get(user, ())) <= int(place)
            else:
                assert latest < ordered[user][int(place)][1]
    held = zip(task.interactions.validation_histories, task.interactions.validation_targets, strict=True)
    assert [(h, (t,)) for h, t in held] == [*zip(task.validation.histories, task.validation.rows, strict=True)]


def test_the_check_finds_a_backend_that_knows_too_much():
    prompt = [Example("a:2", "a", 2, (1, 2), 3, 1, 2)]
    before = {"a": [Interaction("a", 1, 0), Interaction("a", 2, 1)]}
    with_target = {"a": [*before["a"], Interaction("a", 3, 2)]}
    check_set_apart(prompt, before, Splitting(split="leave_one_out"))
    check_set_apart(prompt, before, Splitting(split="global_time"))
    check_set_apart(prompt, {"b": with_target["a"]}, Splitting(split="by_user"))
    for split, fit in (
        ("leave_one_out", with_target),
        ("global_time", {"b": [Interaction("b", 9, 2)]}),
        ("by_user", before),
    ):
        with pytest.raises(ValueError, match="train example a:2: retrievers are fitted on"):
            check_set_apart(prompt, fit, Splitting(split=split))


def test_sessions_left_one_out_are_put_together(tmp_path):
    lines = [("a", ["1", "2"], "3"), ("a", ["2", "3"], "4"), ("b", ["5"], "6"), ("b", ["5", "6"], "7")]
    write_jsonl(tmp_path / "items.jsonl", ({"id": str(n), "title": f"t{n}"} for n in range(9)))
    write_jsonl(tmp_path / "interactions.jsonl", ({"user": u, "history": h, "next": n} for u, h, n in lines))
    task = load(tmp_path, layout="sessions", split="leave_one_out")
    assert task.test.histories == [(1, 2, 3), (5, 6)] and task.test.rows == [(4,), (7,)]
    assert task.train.ids == ["a:1"] and [task.interactions.sequence(u).tolist() for u in (0, 1)] == [[1, 2], [5]]
    with pytest.raises(UserError, match=r"sessions have no times: use by_user or leave_one_out, or .*lines_in_ord"):
        load(tmp_path, layout="sessions", split="global_time")


def test_sessions_in_order_split_by_one_moment(tmp_path):
    """What the file does not show before the held-out time, training does not know: neither item 9 nor 8 here."""
    lines = [
        ("a", ["1", "2"], "3"), ("b", ["4"], "5"), ("a", ["1", "2", "3"], "6"), ("c", ["1"], "2"),
        ("b", ["4", "5"], "6"), ("c", ["1", "2"], "7"),
        ("d", ["9", "1"], "2"), ("a", ["2", "3", "6"], "8"),  # validation
        ("e", ["8"], "4"), ("d", ["9", "1", "2"], "5"),  # test
    ]  # fmt: skip
    write_jsonl(tmp_path / "items.jsonl", ({"id": str(n), "title": f"t{n}"} for n in range(10)))
    write_jsonl(tmp_path / "interactions.jsonl", ({"user": u, "history": h, "next": n} for u, h, n in lines))
    usual = {"layout": "sessions", "split": "global_time", "lines_in_order": True}
    task = load(tmp_path, **usual, validation_share=0.2, test_share=0.15)
    assert task.train.ids == ["a:0", "a:1", "b:0", "b:1", "c:0", "c:1"]
    assert task.validation.ids == ["a:2", "d:0"] and task.test.ids == ["d:1", "e:0"]
    assert task.validation.histories == [(2, 3, 6), (9, 1)] and task.test.rows == [(5,), (4,)]
    sequences = [task.interactions.sequence(u).tolist() for u in range(len(task.interactions))]
    assert sequences == [[1, 2, 3, 6], [4, 5, 6], [1, 2, 7]] and not task.counts[[8, 9]].any()
    apart = load(tmp_path, **usual, validation_share=0.2, test_share=0.15, fit_share=0.5)
    assert apart.train.ids == ["b:1", "c:0", "c:1"]
    fitted_on = [apart.interactions.sequence(u).tolist() for u in range(len(apart.interactions))]
    assert fitted_on == [[1, 2, 3, 6], [4, 5]]
    (tmp_path / "interactions.jsonl").unlink()
    write_jsonl(
        tmp_path / "interactions.jsonl", ({"user": u, "history": h, "next": n} for u, h, n in [lines[-1], *lines[::-1]])
    )
    message = r"s\.jsonl:5: task.params.lines_in_order: the history of user 'd' lacks the item .* in .*s\.jsonl:1,"
    with pytest.raises(UserError, match=message):  # the second line repeats the first, and is counted
        load(tmp_path, **usual)
    with pytest.raises(UserError, match="it is for layout sessions only"):
        load(plain_folder(tmp_path / "plain"), lines_in_order=True)


def test_popularity_counts_only_training(tmp_path):
    task = load(plain_folder(tmp_path))
    held_out = np.bincount([r for s in (task.validation, task.test) for (r,) in s.rows], minlength=30)
    everything = np.zeros(30, int)
    for line in (tmp_path / "interactions.csv").read_text().splitlines()[1:]:
        everything[int(line.split(",")[1][1:])] += 1
    assert (task.counts == everything - held_out).all()
