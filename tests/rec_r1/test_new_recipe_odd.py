"""`rec-r1 init` on folders that mislead it: a recipe that reads the right files, or a message that says what to do."""

import json
import re
import shlex
from pathlib import Path

import pytest

from rec_r1 import config, tasks
from rec_r1.checks.new_recipe import new_recipe, recognise
from rec_r1.checks.new_recipe.findings import findings, guess_language, settings_for
from rec_r1.checks.new_recipe.layouts import Item
from rec_r1.checks.new_recipe.tables import open_table, simple
from rec_r1.config import UserError
from tests.rec_r1.datasets_ import amazon_2023, write_jsonl, write_lines

WORDS = ("red shoe", "blue shoe", "green hat", "warm scarf", "rain coat", "wool sock", "silk tie", "straw hat")
ITEMS = ["id,title,description", *(f"p{i},{WORDS[i % 8]} {i},made of {i} parts" for i in range(40))]
CLICKS = ["query,product_id", *(f"needed thing {i},p{i % 40}" for i in range(60))]
LOG = ["user,item,timestamp", *(f"u{u},p{(u + 3 * n) % 40},{n * 1000 + u}" for u in range(20) for n in range(6))]


def tables(folder: Path, **files: list[str]) -> Path:
    """A folder with tables of comma-separated values: the name without ending -> its lines."""
    for name, lines in files.items():
        write_lines(folder / f"{name}.csv", lines)
    return folder


def load(folder: Path, tmp_path: Path) -> tuple[dict, tasks.Task]:
    """The parameters of the recipe that init writes for a folder, and the task that it describes."""
    list(new_recipe(folder, tmp_path / "mine.yaml", on_gpu=False, ask=None))
    recipe = config.load(tmp_path / "mine.yaml")
    return recipe.task.params, tasks.load(recipe.task)


def test_the_table_of_items_is_found_among_those_of_a_whole_shop(tmp_path):
    """Numbers from 0 are ids of all tables, and the queries of a log look like titles."""
    folder = tables(
        tmp_path / "data",
        categories=["category_id,name", *(f"{i},category number {i}" for i in range(40))],
        clicks=["id,query,customer_id,product_id", *(f"{i},needed thing {i},{i % 30},{i % 40}" for i in range(60))],
        customers=["id,name", *(f"{i},Ann Number {i}" for i in range(40))],
        orders=["id,customer_id,product_id,created_at", *(f"{i},{i % 30},{i % 40},2024-01-01" for i in range(60))],
        products=["id,name,category_id", *(f"{i},{WORDS[i % 8]} {i},{i % 5}" for i in range(40))],
    )
    params, task = load(folder, tmp_path)
    assert (params["items"], params["judgments"], params.get("queries")) == ("products.csv", "clicks.csv", None)
    assert (params["columns"]["query"], params["columns"]["item"]) == ("query", "product_id")
    assert len(task.catalog) == 40


@pytest.mark.parametrize("second", ["purchases", "zz_clicks_of_may"])
def test_a_second_log_is_no_table_of_items(tmp_path, second):
    params, task = load(tables(tmp_path / "data", products=ITEMS, clicks=CLICKS, **{second: CLICKS}), tmp_path)
    assert params["items"] == "products.csv" and len(task.catalog) == 40


def test_a_log_that_does_not_fit_the_items_is_not_taken_for_both(tmp_path):
    clicks = [line.replace(",p", ",x") for line in CLICKS]
    with pytest.raises(UserError, match=r"no column of clicks.csv holds ids of items.csv \(such as 'p0' in its column"):
        load(tables(tmp_path / "data", items=ITEMS, clicks=clicks), tmp_path)


def test_fields_inside_objects_are_columns(tmp_path):
    folder = tmp_path / "data"
    products = [{"product": {"id": f"p{i}", "title": f"{WORDS[i % 8]} {i}", "description": "good"}} for i in range(40)]
    write_jsonl(folder / "items.jsonl", products)
    write_jsonl(folder / "clicks.jsonl", [{"query": f"thing {i}", "product": {"id": f"p{i % 40}"}} for i in range(60)])
    params, task = load(folder, tmp_path)
    assert params["columns"]["id"] == params["columns"]["item"] == "product.id"
    assert params["text"] == ["product.description"] and "good" in task.catalog.texts[0]
    log = [{"user": f"u{i % 9}", "product": {"id": f"p{i % 40}"}, "timestamp": i} for i in range(60)]
    write_jsonl(folder / "clicks.jsonl", log)
    with pytest.raises(UserError, match=r"product.id, product.id, .*: the task sequential reads no fields inside"):
        recognise(folder)


def test_columns_in_other_languages(tmp_path):
    items = ["Artikelnummer,Bezeichnung", *(f"p{i},Lampe aus Stahl {i}" for i in range(40))]
    clicks = ["Suchbegriff,Artikelnummer,Datum", *(f"helle lampe {i},p{i % 40},2024-01-01 10:00" for i in range(60))]
    params, _ = load(tables(tmp_path / "data", artikel=items, klicks=clicks), tmp_path)
    assert params["columns"] == {
        "id": "Artikelnummer", "title": "Bezeichnung", "query": "Suchbegriff", "item": "Artikelnummer",
    }  # fmt: skip
    assert simple("商品名") == "商品名" and simple("Référence no.") == "référence_no"
    log = ["Kunde,Artikelnummer,Datum", *(f"k{i % 9},p{i % 40},2024-01-01" for i in range(60))]
    folder = tables(tmp_path / "other", artikel=items, log=log)
    with pytest.raises(UserError, match=r"Kunde, Artikelnummer, Datum is called query or user: rename the column"):
        recognise(folder)


def test_ascii_beside_utf_16_is_another_encoding(tmp_path):
    folder = tables(tmp_path / "data", clicks=CLICKS)
    write_lines(folder / "items.csv", ITEMS, "utf-16")
    with pytest.raises(UserError, match=r"files differ in their encoding .*utf-16.*: write them in one way"):
        recognise(folder)


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["straw hat", "top hat", "man in a hat"], "en"),  # hat and man are stop words of German.
        (["Czerwone buty z wełny", "Lampa na stół"], "en"),  # z, na: nothing that bm25 knows Polish by.
        (["防水登山靴メンズ", "赤色運動靴セール"], "ja"),  # Most letters are Han characters, but some are kana.
        (["防水登山鞋", "红色连衣裙"], "zh"),
        (["Красные туфли"], "ru"),
    ],
)
def test_a_language_needs_more_than_a_word(texts, language):
    assert guess_language([Item(str(i), texts[i % len(texts)], "", "here") for i in range(30)]) == language


def test_a_guessed_language_is_said(tmp_path):
    items = ["id,title", *(f"p{i},Die Lampe für den Tisch mit dem Fuß aus Holz {i}" for i in range(40))]
    folder = tables(tmp_path / "data", items=items, clicks=CLICKS)
    lines = list(new_recipe(folder, tmp_path / "mine.yaml", on_gpu=False, ask=None, dry_run=True))
    assert any(line.startswith("language of the texts: german, a guess") for line in lines)


@pytest.mark.parametrize(
    ("items", "clicks", "said"),
    [
        (ITEMS[:2], [line.partition(",")[0] + ",p0" for line in CLICKS[1:]], "only 1 item: there is nothing to rank"),
        (ITEMS, CLICKS[1:6], "only 5 different queries"),
        (ITEMS, [f"RED  shoe,p{i}" for i in range(40)], "only 1 different query"),
    ],
)
def test_too_little_to_train_on(tmp_path, items, clicks, said):
    folder = tables(tmp_path / "data", items=items, clicks=["query,product_id", *clicks])
    with pytest.raises(UserError, match=said):
        load(folder, tmp_path)


def test_rows_without_an_item_are_left_out_and_said(tmp_path):
    folder = tables(tmp_path / "data", items=ITEMS, clicks=[*CLICKS, "needed thing 70,"])
    assert "1 row has no item" in {finding.what for finding in findings(recognise(folder), "en")}
    assert load(folder, tmp_path)[0]["blank"] == "drop"


def test_judgments_of_queries_that_are_not_there_are_left_out(tmp_path):
    folder = tables(
        tmp_path / "data",
        docs=["doc_id,text", *(f"d{i},{WORDS[i % 8]} {i}" for i in range(40))],
        queries=["query_id,query", *(f"q{i},needed thing {i}" for i in range(60))],
        qrels=["query_id,doc_id,relevance", *(f"q{i},d{i % 40},1" for i in range(60)), "other,d1,1"],
    )
    params, task = load(folder, tmp_path)
    assert params["unknown"] == "drop" and sum(map(len, task.splits.values())) <= 60


def beir(folder: Path, unknown: str = "") -> Path:
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "a", "text": WORDS[i % 8]} for i in range(40)])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"need {i}"} for i in range(60)])
    rows = [f"q{i}\td{i % 40}\t1" for i in range(60)]
    write_lines(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *rows, *unknown.splitlines()])
    return folder


def test_few_queries_give_beir_folders_a_larger_validation_split(tmp_path):
    assert settings_for(recognise(beir(tmp_path / "data")))["validation_share"] == 0.3
    _, task = load(tmp_path / "data", tmp_path)
    assert len(task.validation) > 6


def test_a_finding_does_not_promise_what_the_task_refuses(tmp_path):
    folder = beir(tmp_path / "data", "q1\tx1\t1\nnosuch\td1\t1")
    said = {finding.what: finding.then for finding in findings(recognise(folder), "en")}
    assert said["1 row refers to 1 item that the catalogue lacks"] == "Add these items, or remove the rows."
    assert said["1 row has no query"] == "Add their queries, or remove the rows."
    with pytest.raises(UserError, match=r"1 judged query is not in the query file, first: 'nosuch': add them"):
        load(folder, tmp_path)


def test_amazon_reviews_as_they_lie_on_the_hub(tmp_path):
    params, task = load(amazon_2023(tmp_path / "data"), tmp_path)
    assert (params["layout"], params["category"]) == ("amazon2023", "All_Beauty")
    assert len(task.catalog) == 30
    amazon_2023(tmp_path / "data", "Toys")
    with pytest.raises(UserError, match="several data sets"):
        recognise(tmp_path / "data")


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_corpus_beside_topics_in_any_table(tmp_path, ending):
    folder = tmp_path / "data"
    if ending == "csv":
        write_lines(folder / "corpus.csv", ["docno,title,body", *(f"d{i},t {i},{WORDS[i % 8]} {i}" for i in range(40))])
    else:
        documents = [{"docno": f"d{i}", "title": f"t {i}", "body": WORDS[i % 8]} for i in range(40)]
        write_jsonl(folder / "corpus.jsonl", documents)
    write_lines(folder / "topics.tsv", [f"{i}\tneed {i}" for i in range(60)])
    write_lines(folder / "qrels.txt", [f"{i} 0 d{i % 40} 1" for i in range(60)])
    params, task = load(folder, tmp_path)
    assert (params["id"], params["text"]) == ("docno", ["body"]) and len(task.catalog) == 40


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"corpus.jsonl": "", "topics.tsv": "1\ta", "qrels.txt": "1 0 d 1"}, "it has no record"),
        ({"corpus.jsonl": '{"id": "d", "n": 1}', "topics.tsv": "1\ta", "qrels.txt": "1 0 d 1"}, "no text among its"),
        (
            {
                "corpus.jsonl": '{"id": "d", "text": "a"}',
                "topics.train.tsv": "1\ta",
                "topics.test.tsv": "2\tb",
                "qrels.test.txt": "2 0 d 1",
            },
            "give topics and qrels for the same splits",
        ),
        (
            {"items.csv": 'id,title\n"p1,red\np2,blue\n'},
            r"items.csv: .*'p1,red' in line 2 is not closed.*: close the quotation mark that opens",
        ),
        ({"items.csv": "id,price\np1,3", "clicks.csv": "query,item\na,p1"}, "no table with an id and with titles"),
    ],
)
def test_what_is_missing_is_said(tmp_path, files, said):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=said):
        recognise(folder)


def behaviour(folder: Path, attributes: object, items: dict | None) -> Path:
    write_jsonl(folder / "ubi_queries.jsonl", [{"query_id": f"q{i}", "user_query": f"thing {i}"} for i in range(40)])
    events = [{"query_id": f"q{i}", "action_name": "click", "event_attributes": attributes} for i in range(40)]
    write_jsonl(folder / "ubi_events.jsonl", events)
    if items:
        write_jsonl(folder / "products.jsonl", [items])
    return folder


@pytest.mark.parametrize(
    ("attributes", "items", "said"),
    [
        ({"object": {"object_id": "p1"}}, None, "no table of items with an id and a title"),
        (None, {"id": "p1", "title": "red shoe"}, "no event has event_attributes.object.object_id"),
        (
            json.dumps({"object": {"object_id": "p1"}}),
            {"id": "p1", "title": "red shoe"},
            "no event has event_attributes",
        ),
    ],
)
def test_behaviour_logs_that_lack_something(tmp_path, attributes, items, said):
    with pytest.raises(UserError, match=said):
        recognise(behaviour(tmp_path / "data", attributes, items))


def test_a_list_is_a_history_only_under_that_name(tmp_path):
    folder = tables(tmp_path / "data", items=ITEMS)
    rows = [{"user": f"u{i % 20}", "tags": ["a"], "item": f"p{i % 40}", "timestamp": i} for i in range(120)]
    write_jsonl(folder / "log.jsonl", rows)
    assert "layout" not in recognise(folder).params
    write_jsonl(folder / "log.jsonl", [{"user": f"u{i}", "past": ["p1"], "item": "p2"} for i in range(40)])
    with pytest.raises(UserError, match="or rename past to history"):
        recognise(folder)


def test_unknown_items_of_histories_are_found(tmp_path):
    folder = tables(tmp_path / "data", items=ITEMS)
    write_jsonl(
        folder / "sessions.jsonl", [{"user": f"u{i}", "history": ["p1", "zz"], "next": "p2"} for i in range(40)]
    )
    found = {finding.what for finding in findings(recognise(folder), "en")}
    assert "40 times a history names an item that is not among the items" in found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["my shop #1", "shop: new", 'it\'s "x"', "läden 商店", "yes", "~", "*a", "a\nb", "[x] {y}"]
)
def test_names_that_yaml_and_the_shell_read_otherwise(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    tables(Path(name), items=ITEMS, clicks=CLICKS)
    lines = list(new_recipe(Path(name), Path(f"{name}.yaml"), on_gpu=False, ask=None))
    recipe = config.load(Path(f"{name}.yaml"))
    assert recipe.task.path == name and recipe.output_dir == f"runs/{name}"
    assert shlex.split(lines[-1].partition("next: ")[2])[2] == f"{name}.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("names", [("1", "null", "yes"), ("~", "title: x", "a # b"), ("item.id", "item.title", "no")])
def test_columns_that_yaml_reads_otherwise(tmp_path, names):
    items = [",".join(names), *ITEMS[1:]]
    folder = tables(tmp_path / "data", items=items, clicks=[f"query,{names[0]}", *CLICKS[1:]])
    params, _ = load(folder, tmp_path)
    assert (params["columns"]["id"], params["columns"]["item"]) == (names[0], names[0])
    assert {params["columns"]["title"], *params["text"]} == set(names[1:])


def test_a_table_has_a_name_without_its_endings(tmp_path):
    path = write_lines(tmp_path / "My Products.csv.gz", ITEMS)
    assert open_table(path).stem == "my_products"
    assert re.fullmatch(r"\w+", open_table(path).stem)


def test_a_folder_is_no_output(tmp_path):
    folder = tables(tmp_path / "data", items=ITEMS, clicks=CLICKS)
    with pytest.raises(UserError, match="a folder: name a file in it"):
        list(new_recipe(folder, tmp_path, on_gpu=False, ask=None, dry_run=True))
    with pytest.raises(UserError, match="missing is no folder: make it first"):
        list(new_recipe(folder, tmp_path / "missing" / "mine.yaml", on_gpu=False, ask=None))
    with pytest.raises(UserError, match="--out: cannot write into /proc"):
        next(new_recipe(folder, Path("/proc/mine.yaml"), on_gpu=False, ask=None))


def test_a_column_of_splits_names_splits(tmp_path):
    """The test split is behind the rows that guesses are made from; a column `set` of another meaning is none."""
    rows = [f"needed thing {i % 2500},p{i % 40},{'test' if i > 2300 else 'train'},cutlery" for i in range(2500)]
    folder = tables(tmp_path / "data", items=ITEMS, clicks=["query,item,fold,set", *rows])
    assert recognise(folder).params["columns"]["split"] == "fold"
    for values in ("train", "cutlery"):
        lines = [f"{line},{values}" for line in CLICKS[1:]]
        tables(folder, clicks=["query,product_id,set", *lines])
        assert "split" not in recognise(folder).params["columns"]


def test_events_that_come_late_in_a_file_get_their_grade(tmp_path):
    rows = [f"needed thing {i},p{i % 40},{'purchase' if i > 2300 else 'click'}" for i in range(2500)]
    folder = tables(tmp_path / "data", items=ITEMS, clicks=["query,item,event", *rows])
    assert recognise(folder).params["grades"] == {"click": 1.0, "purchase": 3.0}


def test_only_the_task_catalog_keeps_one_of_two_rows(tmp_path):
    folder = tables(tmp_path / "data", items=[*ITEMS, ITEMS[1]], clicks=CLICKS)
    said = {finding.what: finding.then for finding in findings(recognise(folder), "en")}
    assert said["1 row repeats an item"] == "One of each is kept."
    folder = tables(tmp_path / "other", items=[*ITEMS, ITEMS[1]], log=LOG)
    said = {finding.what: finding.then for finding in findings(recognise(folder), "en")}
    assert "the task refuses a second one" in said["1 row repeats an item"]
    with pytest.raises(UserError, match="p0"):
        load(folder, tmp_path)


def test_files_without_names_of_columns_are_refused(tmp_path):
    folder = tables(tmp_path / "data", items=ITEMS[1:], clicks=CLICKS[1:])
    with pytest.raises(UserError, match="'p0' and 'p0' look like ids: write the names of the columns above"):
        recognise(folder)


def test_the_unnamed_index_of_pandas_is_no_column(tmp_path):
    def numbered(lines):
        return [f",{lines[0]}", *(f"{i},{line}" for i, line in enumerate(lines[1:]))]

    params, _ = load(tables(tmp_path / "data", items=numbered(ITEMS), clicks=numbered(CLICKS)), tmp_path)
    assert (params["columns"]["id"], params["columns"]["item"]) == ("id", "product_id")


def test_queries_that_no_comment_holds_are_shown_without_what_yaml_refuses(tmp_path):
    clicks = [line.replace("needed thing", "bell \x07 and \u2028 line " + "x" * 2000) for line in CLICKS]
    load(tables(tmp_path / "data", items=ITEMS, clicks=clicks), tmp_path)
    assert max(map(len, (tmp_path / "mine.yaml").read_text().splitlines())) < 320


def test_ids_in_two_spellings_are_one_id_for_the_task_catalog_alone(tmp_path):
    items = ["id,title", *(f"{i},{WORDS[i % 8]} {i}" for i in range(40))]
    log = [LOG[0], *(line.replace(",p", ",") for line in LOG[1:]), "u1,7.0,9000"]
    folder = tables(tmp_path / "data", items=items, log=log)
    said = {finding.what: finding.then for finding in findings(recognise(folder), "en")}
    (then,) = [then for what, then in said.items() if "the id of an item in another way" in what]
    assert "the task takes them for two" in then
    with pytest.raises(UserError, match=r"'7.0' is there as '7': write the ids alike"):
        load(folder, tmp_path)


@pytest.mark.parametrize("lacking", [[], ["needed thing 1,p99"]], ids=["all there", "one is missing"])
def test_what_init_says_about_ids_is_what_the_task_does(tmp_path, lacking):
    """Clicks of two joined exports, one of them with ids as floats, and ids in both forms of Unicode."""
    items = ["id,title", *(f"{1000 + i},{WORDS[i % 8]} {i}" for i in range(20))]
    items += [f"caf\u00e9-{i},{WORDS[i % 8]} {i}" for i in range(20)]
    clicks = ["query,id"]
    clicks += [f"needed thing {i},{1000 + i % 20}{end}" for i in range(30) for end in ("", ".0")]
    clicks += [f"other thing {i},cafe\u0301-{i % 20}" for i in range(30)]
    folder = tables(tmp_path / "data", items=items, clicks=[*clicks, *lacking])
    (then,) = [f.then for f in findings(recognise(folder), "en") if "id of an item in another way" in f.what]
    assert then == "Both forms count as one id."
    assert settings_for(recognise(folder)).get("unknown") == ("drop" if lacking else None)
    _, task = load(folder, tmp_path)
    assert sum(len(split) for split in task.splits.values()) == 60
