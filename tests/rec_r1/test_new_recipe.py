"""`rec-r1 init`: what it finds in a folder, and that the recipe it writes reads that folder."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from rec_r1 import config, tasks
from rec_r1.checks.new_recipe import new_recipe, recognise
from rec_r1.checks.new_recipe.findings import findings, guess_language
from rec_r1.checks.new_recipe.layouts import Item, split_of
from rec_r1.config import UserError
from tests.rec_r1.datasets_ import movielens, plain_folder, write_jsonl, write_lines

SHOP = Path(__file__).parents[1] / "data" / "shop"
WORDS = ("red shoe", "blue shoe", "green hat", "warm scarf", "rain coat", "wool sock", "silk tie", "straw hat")
QUERIES = {"train": 30, "dev": 12, "test": 24}


def init(folder: Path, output: Path, **options) -> list[str]:
    return list(new_recipe(folder, output, on_gpu=False, ask=None, **options))


def written(folder: Path, tmp_path: Path) -> config.Recipe:
    """The recipe that init writes for a folder, after its task was loaded."""
    init(folder, tmp_path / "mine.yaml")
    recipe = config.load(tmp_path / "mine.yaml")
    assert len(tasks.load(recipe.task).train) > 0
    return recipe


def corpus() -> list[dict]:
    return [
        {"_id": f"d{i}", "title": f"{WORDS[i % 8]} {i}", "text": f"a {WORDS[i % 8]} of make {i}, kind {'abcd'[i % 4]}"}
        for i in range(48)
    ]


def beir_folder(folder: Path, splits=tuple(QUERIES)) -> Path:
    write_jsonl(folder / "corpus.jsonl", corpus())
    names = [f"{split}-{i}" for split in splits for i in range(QUERIES[split])]
    write_jsonl(folder / "queries.jsonl", [{"_id": name, "text": f"something {name}"} for name in names])
    (folder / "qrels").mkdir()
    for split in splits:
        own = [name for name in names if name.startswith(split)]
        lines = [f"{name}\td{i % 48}\t1" for i, name in enumerate(own)]
        write_lines(folder / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *lines])
    return folder


@pytest.mark.slow
def test_the_shop_with_all_its_defects(tmp_path):
    lines = init(SHOP, tmp_path / "shop.yaml")
    said = "\n".join(lines)
    for what in (
        "4 rows repeat an item",
        "3 rows have the id of an earlier item and other texts",
        "6 items have no title",
        "items contain HTML",
        "393 rows write the id of an item in another way than the table of items",
        "7 rows refer to 7 items that the catalogue lacks",
        "5 rows repeat an earlier row",
        "times are written in several ways (302 as dates, 98 as milliseconds since 1970)",
        "3 rows have no query",
        "items have no description",
    ):
        assert what in said, what
    recipe = config.load(tmp_path / "shop.yaml")
    task = tasks.load(recipe.task)
    assert len(task.catalog) == 300
    assert not any(markup in text for text in task.catalog.texts for markup in ("<p>", "<li>", "<br", "&nbsp;"))
    assert {len(split) > 0 for split in task.splits.values()} == {True}


@pytest.mark.slow
def test_the_main_page_shows_what_init_prints(tmp_path, monkeypatch):
    shutil.copytree(SHOP, tmp_path / "my_shop")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "\n".join(init(Path("my_shop"), Path("my_shop.yaml"))) in page


def test_numbers_of_the_findings_are_those_of_the_files():
    """Counted again by hand, with the csv module alone."""
    import csv

    with (SHOP / "products.csv").open(encoding="utf-8-sig", newline="") as file:
        products = list(csv.DictReader(file))
    with (SHOP / "clicks.csv").open(encoding="utf-8-sig", newline="") as file:
        clicks = list(csv.DictReader(file))
    ids = {row["product_id"] for row in products}
    unknown = [row for row in clicks if row["product_id"].removesuffix(".0") not in ids]
    blank = [row for row in clicks if not row["search_term"].strip()]
    found = {str(finding.what) for finding in findings(recognise(SHOP), "en")}
    missing = len({row["product_id"] for row in unknown})
    assert f"{len(unknown)} rows refer to {missing} items that the catalogue lacks" in found
    assert f"{len(blank)} rows have no query" in found
    same = len(products) - len({tuple(row.values()) for row in products})
    assert f"{same} rows repeat an item" in found


def test_a_beir_folder(tmp_path):
    recipe = written(beir_folder(tmp_path / "data"), tmp_path)
    assert recipe.task.name == "beir"
    assert recipe.task.splits == {"train": "train", "validation": "dev", "test": "test"}


@pytest.mark.slow
@pytest.mark.parametrize("splits", [("train",), ("test",), ("train", "test")])
def test_a_beir_folder_without_all_splits(tmp_path, splits):
    task = tasks.load(written(beir_folder(tmp_path / "data", splits), tmp_path).task)
    queries = [set(split.queries) for split in task.splits.values()]
    assert not queries[0] & queries[1] and not queries[0] & queries[2] and not queries[1] & queries[2]
    assert sum(map(len, queries)) == sum(QUERIES[split] for split in splits)


@pytest.mark.slow
@pytest.mark.parametrize("one_file", [False, True])
def test_a_trec_folder(tmp_path, one_file):
    folder = tmp_path / "data"
    write_jsonl(folder / "corpus.jsonl", [{**document, "id": document["_id"]} for document in corpus()])
    numbers = {"all": 40} if one_file else QUERIES
    for split, count in numbers.items():
        name = "" if one_file else f".{split}"
        write_lines(folder / f"topics{name}.tsv", [f"{split}{i}\tneed {i} of {split}" for i in range(count)])
        write_lines(folder / f"qrels{name}.txt", [f"{split}{i} 0 d{i % 48} 2" for i in range(count)])
    recipe = written(folder, tmp_path)
    assert recipe.task.name == "trec"
    assert sum(map(len, tasks.load(recipe.task).splits.values())) == sum(numbers.values())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ml-100k", "ml-1m", "ml-latest", "recbole"])
def test_movielens_as_it_comes(tmp_path, layout):
    recipe = written(movielens(tmp_path / "data", layout), tmp_path)
    assert recipe.task.name == "sequential" and recipe.task.params["layout"] == layout


@pytest.mark.slow
def test_interactions_and_sessions(tmp_path):
    plain = written(plain_folder(tmp_path / "plain"), tmp_path)
    assert plain.task.params["interactions"].startswith("interactions")
    folder = tmp_path / "sessions"
    write_jsonl(folder / "items.jsonl", [{"id": f"p{i}", "title": f"{WORDS[i % 8]} {i}"} for i in range(40)])
    lines = [
        {"user": f"u{i}", "history": [f"p{i % 40}", f"p{(i + 1) % 40}"], "next": f"p{(i + 3) % 40}"} for i in range(200)
    ]
    write_jsonl(folder / "sessions.jsonl", lines)
    (tmp_path / "other").mkdir()
    assert written(folder, tmp_path / "other").task.params["layout"] == "sessions"


def shop(folder: Path, separator: str = ",", encoding: str = "utf-8", packed: bool = False) -> Path:
    """A small clean shop in tables of the given kind."""
    folder.mkdir()
    products = ([f"p{i}", f"{WORDS[i % 8]} {i}", f"made of {i} parts"] for i in range(40))
    items = [["sku", "label", "description"], *products]
    clicks = [["keyword", "sku", "clicks"], *([f"needed thing {i}", f"p{i % 40}", str(i % 3 + 1)] for i in range(80))]
    for name, rows in (("items.csv", items), ("search_log.csv", clicks)):
        text = "\n".join(separator.join(row) for row in rows).replace("made", "fabriqué").encode(encoding)
        (folder / f"{name}.gz").write_bytes(gzip.compress(text)) if packed else (folder / name).write_bytes(text)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("separator", "encoding", "packed"), [(",", "utf-8", True), (";", "cp1252", False), ("\t", "utf-16", False)]
)
def test_tables_as_programs_export_them(tmp_path, separator, encoding, packed):
    recipe = written(shop(tmp_path / "data", separator, encoding, packed), tmp_path)
    columns = recipe.task.params["columns"]
    assert (columns["id"], columns["title"], columns["query"], columns["item"]) == ("sku", "label", "keyword", "sku")
    assert "fabriqué" in tasks.load(recipe.task).catalog.texts[0]


def test_the_columns_are_found_by_their_contents_too(tmp_path):
    """No column of the items has a usual name, and the log refers to them by a column that says something else."""
    folder = tmp_path / "data"
    write_lines(folder / "a.csv", ["nr,was", *(f"x{i},{WORDS[i % 8]} number {i}" for i in range(40))])
    write_lines(folder / "b.csv", ["query,ziel", *(f"thing {i},x{i % 40}" for i in range(60))])
    columns = written(folder, tmp_path).task.params["columns"]
    assert (columns["id"], columns["title"], columns["item"]) == ("nr", "was", "ziel")


def test_one_table_with_everything(tmp_path):
    records = [
        {"query": f"thing {i}", "product_id": f"p{i % 20}", "product_title": f"{WORDS[i % 8]} {i % 20}", "relevance": 1}
        for i in range(60)
    ]
    write_jsonl(tmp_path / "data" / "judged.jsonl", records)
    assert written(tmp_path / "data", tmp_path).task.params["judgments"] == "judged.jsonl"


def test_judgments_that_name_queries_by_ids(tmp_path):
    folder = tmp_path / "data"
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": f"a {WORDS[i % 8]} of make {i}"} for i in range(40)])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"thing number {i}"} for i in range(60)])
    lines = [{"query-id": f"q{i}", "corpus-id": f"d{i % 40}", "score": 1} for i in range(60)]
    write_jsonl(folder / "qrels.jsonl", lines)
    task = tasks.load(written(folder, tmp_path).task)
    assert len(task.catalog) == 40
    queries = {query for split in task.splits.values() for query in split.queries}
    assert queries == {f"thing number {i}" for i in range(60)}


def test_logs_of_user_behavior_insights(tmp_path):
    folder = tmp_path / "data"
    write_jsonl(folder / "products.jsonl", [{"id": f"p{i}", "title": f"{WORDS[i % 8]} {i}"} for i in range(40)])
    write_jsonl(folder / "ubi_queries.jsonl", [{"query_id": f"q{i}", "user_query": f"thing {i}"} for i in range(60)])
    events = [
        {
            "query_id": f"q{i}",
            "action_name": "click",
            "timestamp": 1_700_000_000_000 + i,
            "event_attributes": {"object": {"object_id": f"p{i % 40}"}, "position": {"ordinal": 1 + i % 5}},
        }
        for i in range(60)
    ]
    write_jsonl(folder / "ubi_events.jsonl", events)
    assert written(folder, tmp_path).task.params["layout"] == "ubi"


def test_what_is_open_is_asked_or_written_down(tmp_path):
    folder = tmp_path / "data"
    write_lines(folder / "items.csv", ["id,title,name", *(f"p{i},{WORDS[i % 8]} {i},article {i}" for i in range(40))])
    write_lines(folder / "clicks.csv", ["query,item", *(f"thing {i},p{i % 40}" for i in range(60))])
    init(folder, tmp_path / "open.yaml")
    assert "title: title  # or name" in (tmp_path / "open.yaml").read_text()
    asked = []

    def ask(choice):
        asked.append(choice.question)
        return choice.options[1]

    list(new_recipe(folder, tmp_path / "asked.yaml", on_gpu=False, ask=ask))
    assert asked == ["Which column of items.csv is the title?"]
    params = config.load(tmp_path / "asked.yaml").task.params
    assert params["columns"]["title"] == "name" and "title" in params["text"]


def test_a_dry_run_writes_nothing(tmp_path):
    lines = init(shop(tmp_path / "data"), tmp_path / "mine.yaml", dry_run=True)
    assert not (tmp_path / "mine.yaml").exists() and "task:" in "\n".join(lines)


def test_a_recipe_that_is_there_is_kept(tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(UserError, match="it exists already"):
        init(shop(tmp_path / "data"), tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "the folder is empty"),
        ({"notes.txt": "hello"}, "found no items that queries or users refer to"),
        ({"items.csv": "id,title\n1,red shoe"}, "the only table: add one of judgments or clicks"),
        ({"items.csv": "id,title\n1,red shoe", "log.csv": "user,item\nu,1"}, "no column with times"),
        ({"items.csv": ""}, "it has no records"),
        ({"items.parquet": "no parquet"}, "cannot be read as Parquet"),
        ({"items.jsonl": "{broken"}, "not valid JSON"),
    ],
)
def test_a_folder_that_no_task_reads(tmp_path, files, said):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=said):
        init(folder, tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The lamp for the table is made of steel and glass", "en"),
        ("Die Lampe für den Tisch ist aus Stahl und mit dem Glas", "de"),
        ("La lampe pour la table est en acier et avec du verre", "fr"),
        ("防水登山鞋 男款", "zh"),
        ("رف الكتب الخشبي", "ar"),
        ("mug", "en"),
    ],
)
def test_the_language_is_guessed(text, language):
    assert guess_language([Item(str(i), text, "", "here") for i in range(20)]) == language


@pytest.mark.parametrize(
    ("name", "split"),
    [("train.tsv", "train"), ("qrels.dev.txt", "validation"), ("topics-test.tsv", "test"), ("contest.tsv", None)],
)
def test_the_split_that_a_file_name_says(name, split):
    assert split_of(name) == split


def test_a_recipe_for_a_gpu(tmp_path):
    list(new_recipe(beir_folder(tmp_path / "data"), tmp_path / "gpu.yaml", on_gpu=True, ask=None))
    recipe = config.load(tmp_path / "gpu.yaml")
    assert recipe.grpo["use_vllm"] and recipe.lora and json.dumps(recipe.task.splits)
    assert recipe.prompts_per_step == QUERIES["train"] and "gradient_accumulation_steps" not in recipe.grpo


def test_a_step_takes_no_more_prompts_than_there_are(tmp_path):
    folder = beir_folder(tmp_path / "data")
    train = folder / "qrels" / "train.tsv"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:8]))
    for on_gpu, prompts in ((True, 7), (False, 3)):  # Four of the seven are examples in the prompts for a laptop.
        output = tmp_path / f"{on_gpu}.yaml"
        list(new_recipe(folder, output, on_gpu=on_gpu, ask=None))
        assert config.load(output).prompts_per_step == prompts
        assert f"prompts_per_step: {prompts}  # all training queries" in output.read_text()


def small(tiny_model: Path) -> list[str]:
    """Overrides with which a recipe for a laptop trains a tiny model for three steps."""
    return [
        *(f"model.name={tiny_model}", "model.dtype=float32", "lora={r: 4, target_modules: [q_proj, v_proj]}"),
        *("grpo.max_steps=3", "grpo.save_steps=3", "prompts_per_step=2", "grpo.num_generations=2"),
        *("evaluation.every_steps=0", "evaluation.test_limit=5", "evaluation.validation_limit=5"),
    ]


def cli(*words: object) -> int:
    from rec_r1.cli import main

    return main([str(word) for word in words])


@pytest.mark.slow
def test_from_files_to_an_answer_in_three_commands(tmp_path, tiny_model, monkeypatch, capsys):
    shutil.copytree(SHOP, tmp_path / "my_shop")
    monkeypatch.chdir(tmp_path)
    assert cli("init", "my_shop") == 0
    assert cli("check", "my_shop.yaml", *small(tiny_model)) == 0
    assert capsys.readouterr().out.rstrip().endswith("ok")
    assert cli("train", "my_shop.yaml", *small(tiny_model)) == 0
    capsys.readouterr()
    query = "something that no split holds"
    assert cli("ask", "runs/my_shop", query, "--k", "5", "--json") == 0
    (answer,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert answer["query"] == query and query in answer["sent"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["beir", "trec", "recbole"])
def test_other_folders_train_too(tmp_path, tiny_model, monkeypatch, capsys, kind):
    if kind == "recbole":
        movielens(tmp_path / "data", "recbole")
    elif kind == "beir":
        beir_folder(tmp_path / "data")
    else:
        write_jsonl(tmp_path / "data" / "corpus.jsonl", [{**one, "id": one["_id"]} for one in corpus()])
        write_lines(tmp_path / "data" / "topics.tsv", [f"q{i}\tneed {i} of it" for i in range(60)])
        write_lines(tmp_path / "data" / "qrels.txt", [f"q{i} 0 d{i % 48} 2" for i in range(60)])
    monkeypatch.chdir(tmp_path)
    assert cli("init", "data", "--out", "mine.yaml") == 0
    assert cli("train", "mine.yaml", *small(tiny_model)) == 0
    capsys.readouterr()
    asked = (
        ["--history", tasks.load(config.load("mine.yaml").task).catalog.ids[0]] if kind == "recbole" else ["a query"]
    )
    assert cli("ask", "runs/mine", *asked, "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
