"""One rule for leaks, ids, texts and grades, whichever loader a task comes from."""

import gzip
import json
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_r1 import tasks
from rec_r1.config import TaskConfig, UserError
from rec_r1.tasks import task_cache
from rec_r1.tasks.integrity import leaking, normal, sound
from rec_r1.tasks.query_pools import Pool, keep_apart
from rec_r1.tasks.types import Split, Task, make_split
from retrievers import Catalog

CATALOG = Catalog.from_records({"id": f"d{n}", "text": f"thing {n}"} for n in range(6))
PARTS = ("train", "validation", "test")


def beir(folder, queries, judged, documents=None):
    """A BEIR folder; judged: part -> lines of qrels."""
    (folder / "qrels").mkdir(parents=True)
    documents = documents or [{"_id": f"d{n}", "title": "", "text": f"thing {n}"} for n in range(6)]
    for name, records in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for part, lines in judged.items():
        (folder / "qrels" / f"{part}.tsv").write_text("".join(f"{line}\n" for line in lines))
    return folder


def trec(folder, queries, judged):
    folder.mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(f'{{"id": "d{n}", "text": "thing {n}"}}\n' for n in range(6)))
    for part, name in zip(PARTS, ("train", "dev", "test"), strict=True):
        ids = {line.split("\t")[0] for line in judged[name]}
        lines = [f"{q['_id']}\t{q['text']}\n" for q in queries if q["_id"] in ids]
        (folder / f"topics.{part}.tsv").write_text("".join(lines))
        (folder / f"qrels.{part}.txt").write_text(
            "".join("{} 0 {} {}\n".format(*line.split("\t")) for line in judged[name])
        )
    return folder


SHOES = [
    {"_id": "a", "text": "shoes"}, {"_id": "b", "text": "hats"}, {"_id": "c", "text": "Shoes "},
    {"_id": "d", "text": "socks"}, {"_id": "e", "text": "shoes"},
]  # fmt: skip
IN_THREE = {"train": ["a\td0\t1", "b\td1\t1"], "dev": ["c\td2\t1", "d\td3\t1"], "test": ["e\td4\t1"]}


def own_module(monkeypatch, **parts):
    """A task module of the user's, named my.task."""
    splits = {part: Split(*zip(*parts[part], strict=True)) for part in PARTS}
    module = types.ModuleType("my_task")
    module.load = lambda config: Task("mine", CATALOG, **splits)
    monkeypatch.setitem(sys.modules, "my_task", module)
    monkeypatch.setattr(tasks, "find_spec", lambda name: module)
    return TaskConfig("my_task")


def all_loaders(tmp_path, monkeypatch):
    split_of = {q: part for part, name in zip(PARTS, ("train", "dev", "test"), strict=True)
                for q in [line.split("\t")[0] for line in IN_THREE[name]]}  # fmt: skip
    rows = {part: [] for part in PARTS}
    for n, query in enumerate(SHOES):
        rows[split_of[query["_id"]]].append((query["_id"], query["text"], (n,), (1.0,)))
    yield TaskConfig("beir", str(beir(tmp_path / "beir", SHOES, IN_THREE)))
    yield TaskConfig("trec", str(trec(tmp_path / "trec", SHOES, IN_THREE)))
    yield own_module(monkeypatch, **rows)


@pytest.mark.slow
def test_every_loader_keeps_a_held_out_text_out_of_training(tmp_path, monkeypatch, caplog):
    for config in all_loaders(tmp_path, monkeypatch):
        for _ in range(2):  # what was left out is said again where the task comes from the cache
            caplog.clear()
            task = tasks.load(config)
            assert [list(split.ids) for split in task.splits.values()] == [["b"], ["d"], ["e"]], config.name
            assert "train: 1 query has the text of a held-out query and is left out, first 'a' ('shoes')" in caplog.text
            assert "which is test query 'e' ('shoes')" in caplog.text


def test_a_part_that_is_all_leaks_is_refused(tmp_path):
    only = {"train": ["a\td0\t1"], "dev": ["d\td3\t1"], "test": ["e\td4\t1"]}
    with pytest.raises(UserError, match=r"train: all queries .1. have the text of a held-out query, first 'a'"):
        tasks.load(TaskConfig("beir", str(beir(tmp_path / "x", SHOES, only))))


@pytest.mark.parametrize(
    "other",
    ["shoes ", "SHOES", "\ufeffshoes", "sho\u200bes", "ｓｈｏｅｓ", "shoes\u00a0", "\tshoes"],
)
def test_spellings_of_one_text(other):
    assert normal(other) == "shoes"


def test_composed_and_decomposed_letters_are_one_text():
    assert normal("cafe\u0301") == normal("caf\u00e9") == normal("CAFÉ") and normal("Straße") == normal("STRASSE")
    assert normal("❤\ufe0f") == normal("❤")


@given(st.text(max_size=12))
def test_normal_is_idempotent_and_blind_to_case_and_space(text):
    assert normal(normal(text)) == normal(text) == normal(f"  {text}\n")


texts = st.lists(st.sampled_from(["a", "A ", "b", "B", "c", "ｃ", "d", "e", "f"]), min_size=1, max_size=5)


@pytest.mark.slow
@given(texts, texts, texts)
def test_no_text_is_left_in_two_parts_and_the_test_stays_whole(train, validation, test):
    given_texts = {
        part: {f"{part}{n}": text for n, text in enumerate(own)}
        for part, own in zip(PARTS, (train, validation, test), strict=True)
    }
    try:
        leaks = leaking(given_texts)
    except UserError as error:
        held = {normal(t) for t in (*validation, *test)}
        assert {normal(t) for t in train} <= held or {normal(t) for t in validation} <= {normal(t) for t in test}
        assert "all" in str(error)
        return
    left = {
        part: {normal(t) for query, t in own.items() if query not in leaks[part]} for part, own in given_texts.items()
    }
    assert not leaks["test"] and not left["train"] & left["validation"] and not left["train"] & left["test"]
    assert not left["validation"] & left["test"]
    everything = {normal(t) for own in given_texts.values() for t in own.values()}
    assert left["train"] | left["validation"] | left["test"] == everything  # nothing more than needed goes


def test_one_query_id_with_two_texts_is_refused_with_both_places(tmp_path):
    twice = [*SHOES, {"_id": "b", "text": "gloves"}]
    with pytest.raises(
        UserError, match=r"queries\.jsonl:6: query 'b' is 'gloves' here and 'hats' before \(.*jsonl:2\)"
    ):
        tasks.load(TaskConfig("beir", str(beir(tmp_path / "a", twice, IN_THREE))))
    folder = trec(tmp_path / "b", SHOES, IN_THREE)
    with (folder / "topics.test.tsv").open("a") as file:
        file.write("b\tgloves\n")
    assert len(tasks.load(TaskConfig("trec", str(folder))).test) == 1  # judged in training alone
    pools = {"train": Pool(), "test": Pool()}
    for part, text in (("train", "hats"), ("test", "gloves")):
        pools[part].add("b", text, f"{part}.tsv:1")
        pools[part].judge("b", "d1", 1, f"{part}.txt:1")
    with pytest.raises(UserError, match=r"test\.tsv:1: query 'b' is 'gloves' here and 'hats' before \(train\.tsv:1\)"):
        keep_apart(pools)


def test_a_query_that_stands_twice_with_one_text_counts_once(tmp_path):
    task = tasks.load(TaskConfig("beir", str(beir(tmp_path / "a", [*SHOES, {"_id": "b", "text": " Hats"}], IN_THREE))))
    assert task.train.queries == ["hats"]


@pytest.mark.parametrize("text", ["", "  ", "\ufeff", None])
def test_a_judged_query_without_a_text_is_refused(tmp_path, text):
    queries = [{**query, "text": text} if query["_id"] == "b" else query for query in SHOES]
    with pytest.raises(UserError, match=r"queries\.jsonl:2: query 'b' has no text"):
        tasks.load(TaskConfig("beir", str(beir(tmp_path / "a", queries, IN_THREE))))


def test_judgments_that_stand_twice_are_said(tmp_path, caplog):
    judged = IN_THREE | {"train": ["b\td1\t1", "b\td1\t1", "b\td2\t1", "b\td2\t3", "b\td3\t-1"]}
    task = tasks.load(TaskConfig("beir", str(beir(tmp_path / "a", SHOES, judged))))
    assert task.train.grades == [(1.0, 3.0)]
    assert "train.tsv: 1 judgment is repeated, first query 'b', document 'd1': 1 and 1 at" in caplog.text
    assert "1 judgment has two grades, of which the best counts, first query 'b', document 'd2': 1 and 3" in caplog.text
    assert "1 grade below 0 counts as irrelevant, first query 'b', document 'd3'" in caplog.text


@pytest.mark.parametrize("grade", ["nan", "inf", "True", "", "good"])
def test_a_grade_that_is_no_number_names_its_line(tmp_path, grade):
    judged = IN_THREE | {"train": ["b\td1\t1", f"b\td2\t{grade}"]}
    with pytest.raises(UserError, match=r"train\.tsv:2: "):
        tasks.load(TaskConfig("beir", str(beir(tmp_path / "a", SHOES, judged))))


@pytest.mark.parametrize("grade", [float("nan"), float("inf"), True, "1", None])
def test_make_split_refuses_what_is_no_grade(grade):
    with pytest.raises(UserError, match=r"mine: query 'q', document 'd1': grade .* a finite number"):
        make_split("mine", CATALOG, {"q": "x"}, {"q": {"d0": 1.0, "d1": grade}})


@pytest.mark.parametrize("grade", [1e300, 1e-50, 3.5e38])
def test_a_grade_that_float32_cannot_hold_is_refused(grade):
    with pytest.raises(UserError, match=r"mine: query 'q', document 'd1': grade .* is from 1.2e-38 to 3.4e\+38"):
        make_split("mine", CATALOG, {"q": "x"}, {"q": {"d0": 1.0, "d1": grade}})


@pytest.mark.parametrize(("there", "asked"), [("1014", "1014.0"), ("a b", "a  b"), ("caf\u00e9", "cafe\u0301")])
def test_an_unknown_id_that_looks_alike_is_named(there, asked):
    catalog = Catalog.from_records([{"id": there, "text": "x"}])
    with pytest.raises(UserError, match="is there as"):
        make_split("mine", catalog, {"q": "x"}, {"q": {asked: 1.0}})
    with pytest.raises(UserError, match="is there as"):
        make_split("mine", catalog, {there: "x"}, {asked: {there: 1.0}})


def test_documents_without_text_and_ids_that_look_alike_are_said(tmp_path, caplog):
    texts = {"d0": "thing", "d1": "  ", "1014": "x", "1014.0": "y", "d2": "z", "d3": "a", "d4": "b"}
    documents = [{"_id": i, "title": "", "text": text} for i, text in texts.items()]
    tasks.load(TaskConfig("beir", str(beir(tmp_path / "a", SHOES, IN_THREE, documents))))
    assert "1 of 7 documents have no text, so that a search by text cannot find them, first 'd1'" in caplog.text
    assert "1 pair of ids differs only in white space, unicode form or a .0, first '1014' and '1014.0'" in caplog.text


def test_beir_reads_gz_and_byte_order_marks(tmp_path):
    folder = beir(tmp_path / "a", SHOES, IN_THREE)
    expected = tasks.load(TaskConfig("beir", str(folder)))
    for path in [*folder.glob("*.jsonl"), *folder.glob("qrels/*.tsv")]:
        header = b"query-id\tcorpus-id\tscore\n" if path.suffix == ".tsv" else b""
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + header + path.read_bytes()))
        path.unlink()
    again = tasks.load(TaskConfig("beir", str(folder)))
    assert again.splits == expected.splits and again.catalog.fingerprint == expected.catalog.fingerprint


def test_blank_ids_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"queries\.jsonl:1: '_id' is empty"):
        tasks.load(TaskConfig("beir", str(beir(tmp_path / "a", [{"_id": " ", "text": "x"}, *SHOES], IN_THREE))))
    with pytest.raises(UserError, match=r"dev\.tsv:3: "):
        judged = IN_THREE | {"dev": [*IN_THREE["dev"], " \td1\t1"]}
        tasks.load(TaskConfig("beir", str(beir(tmp_path / "b", SHOES, judged))))


FINE = {
    "train": [("a", "red", (0,), (1.0,)), ("b", "blue", (1,), (1.0,))],
    "validation": [("c", "green", (2,), (1.0,))],
    "test": [("d", "grey", (3,), (1.0,))],
}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("d", "x", (0,), (1.0,)), "1 queries are in both train .train. and test .test., first 'd'"),
        (("a", "other", (0,), (1.0,)), "query id 'a' appears twice"),
        (("", "x", (0,), (1.0,)), "'' is no query id"),
        ((7, "x", (0,), (1.0,)), "7 is no query id"),
        (("e", " ", (0,), (1.0,)), "query 'e' has no text"),
        (("e", None, (0,), (1.0,)), "None is no text"),
        (("e", "x", (6,), (1.0,)), "rows: 6 is no row of the catalogue"),
        (("e", "x", (-1,), (1.0,)), "rows: -1 is no row"),
        (("e", "x", (True,), (1.0,)), "rows: True is no row"),
        (("e", "x", (0, 1), (1.0,)), "2 rows and 1 grades"),
        (("e", "x", (0,), (float("nan"),)), "grade nan"),
        (("e", "x", (0,), (True,)), "grade True"),
    ],
)
def test_a_module_of_the_user_s_own_is_checked(monkeypatch, row, message):
    assert len(tasks.load(own_module(monkeypatch, **FINE)).train) == 2
    with pytest.raises(UserError, match=f"task mine: (train)?.*{message}" if "both" not in message else message):
        tasks.load(own_module(monkeypatch, **FINE | {"train": [*FINE["train"], row]}))


def test_what_is_left_out_of_one_s_own_task_is_said(monkeypatch, caplog):
    more = [("e", "x", (0, 0, 1), (1.0, 2.0, 0.0)), ("f", "y", (1,), (-1.0,)), ("g", "GREEN", (1,), (1.0,))]
    task = tasks.load(own_module(monkeypatch, **FINE | {"train": [*FINE["train"], *more]}))
    assert list(task.train.ids) == ["a", "b", "e"] and (task.train.rows[2], task.train.grades[2]) == ((0,), (2.0,))
    assert "1 judgment repeats a document of its query; the best grade counts" in caplog.text
    assert "2 judgments of grade 0 or less count as irrelevant" in caplog.text
    assert "1 query has no relevant document" in caplog.text and "train: 1 query has the text" in caplog.text


def test_a_load_that_returns_no_task_is_refused(monkeypatch):
    config = own_module(monkeypatch, **FINE)
    sys.modules["my_task"].load = lambda config: None
    with pytest.raises(UserError, match="returned NoneType, not a Task"):
        tasks.load(config)


def test_targets_in_the_history_are_refused_unless_the_task_repeats():
    def task(target: int, **more) -> Task:
        splits = {part: Split([part], ["x"], [(target,)], [(1.0,)], histories=[(1, 2)]) for part in PARTS}
        return Task("mine", CATALOG, **splits, **more)

    assert sound(task(3)).excludes_history and not sound(task(2, repeats=True)).excludes_history
    with pytest.raises(UserError, match=r"1 of 1 queries have a target that is in their history, .*repeats=True"):
        sound(task(2))


@pytest.mark.parametrize(
    ("candidates", "message"),
    [((0, 99), "candidates: 99 is no row of the catalogue"), ((-1,), "candidates: -1 is no row"),
     ((1, 2, 1), "candidates: a row appears twice")],
)  # fmt: skip
def test_candidates_of_one_s_own_are_checked(candidates, message):
    def task(given) -> Task:
        return Task("mine", CATALOG, **{p: Split([p], [p], [(3,)], [(1.0,)], candidates=[given]) for p in PARTS})

    assert sound(task((3, 1))).train.candidates == [(3, 1)]
    with pytest.raises(UserError, match=f"task mine: train query 'train': {message}"):
        sound(task(candidates))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :]


DAMAGES = [flipped, lambda content: content[: len(content) // 2], lambda _: b"", lambda content: content[:-1]]


@pytest.mark.slow
def test_a_damaged_prepared_copy_is_made_again(tmp_path, caplog):
    config = TaskConfig("beir", str(beir(tmp_path / "a", SHOES, IN_THREE)))
    first = tasks.load(config)
    names = sorted(path.relative_to(first.folder) for path in first.folder.rglob("*") if path.is_file())
    assert len(names) > 8 and task_cache.damage(first.folder) is None
    (first.folder / "task.json").unlink()
    tasks.load(config)
    assert "task.json" in caplog.text
    for n, name in enumerate(names):
        path = first.folder / name
        path.write_bytes(DAMAGES[n % len(DAMAGES)](path.read_bytes()))
        caplog.clear()
        again = tasks.load(config)
        assert again.splits == first.splits and again.catalog.fingerprint == first.catalog.fingerprint, name
        said = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
        assert len(said) == 1 and "is made again" in said[0] and "\n" not in said[0], name
        assert task_cache.damage(again.folder) is None
