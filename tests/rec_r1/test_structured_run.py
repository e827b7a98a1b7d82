"""The action structured in commands: who answers it, a training on bm25, and what is done with its run."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from structured_shop import BOOSTED, FILTERED, NO_JSON, SERVING, STRUCTURED, make_shop, settings

import rec_r1
import retrievers
from rec_r1 import cli, config, runs, tasks
from rec_r1.checks.rescore import rescore
from rec_r1.config import TaskConfig, UserError
from rec_r1.environment import open_environment
from rec_r1.environment.structured import schema_of, unserved
from rec_r1.evaluation import records
from rec_r1.evaluation.audit import audit
from rec_r1.evaluation.evaluate import save_raw
from rec_r1.evaluation.transfer import matrix
from rec_r1.prompts.structured import MALFORMED


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return make_shop(tmp_path_factory.mktemp("shop"))


def test_columns_of_items_are_kept_as_fields_of_the_catalogue(shop):
    task = tasks.load(TaskConfig("catalog", str(shop), {"text": ["description"], "fields": ["brand", "description"]}))
    row = task.catalog.row("p7")
    assert task.catalog.column("brand")[row] == "Solvei" and task.catalog.column("description")[row].startswith("boot")
    assert "brand" not in tasks.load(TaskConfig("catalog", str(shop), {})).catalog.fields
    with pytest.raises(UserError, match=r"task\.params\.fields: 'title': every catalogue has this field"):
        tasks.load(TaskConfig("catalog", str(shop), {"fields": ["title"]}))


def command(verb: str, capsys, *given: str, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main([verb, "quickstart", *given]) == code
    return "".join(capsys.readouterr())


CHOICES = "choose bm25, tantivy, opensearch, elasticsearch, postgres, with retriever.params.structured={}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["retriever.kind=bm25"],
            "retriever.kind=bm25 answers structured queries with retriever.params.structured only",
        ),
        (["retriever.kind=dense"], f"retriever.kind=dense answers no structured queries: {CHOICES}"),
        (["retriever.kind=hybrid"], f"retriever.kind=hybrid answers no structured queries: {CHOICES}"),
        (["retriever.kind=propagate"], f"retriever.kind=propagate answers no structured queries: {CHOICES}"),
        (["retriever.kind=rerank"], f"retriever.kind=rerank answers no structured queries: {CHOICES}"),
        ([SERVING, "format.answer=line"], "format.answer: line: a structured action is JSON: set format.answer=json"),
        ([SERVING, "format.keep_query=true"], "format.keep_query: True: only format.action=replace or expand reads it"),
        (
            [SERVING, "task.params.fields=[size]"],
            "items.csv: no column 'size', only id, title, brand, description: set task.params.fields",
        ),
        (["retriever.params.structured={filters: [size]}"], "the catalogue has no field 'size'"),
        (["retriever.params.structured={filter: []}"], "retriever.params.structured.filter: unknown key"),
    ],
)
def test_who_does_not_answer_is_refused_by_check_and_train_in_the_same_words(
    shop, tiny_model, tmp_path, capsys, given, message
):
    own = settings(shop, f"model.name={tiny_model}", f"output_dir={tmp_path / 'run'}", *given)
    said = [command(verb, capsys, *own, code=2) for verb in ("check", "train")]
    lines = [[line for line in text.splitlines() if line.startswith("rec-r1: ")] for text in said]
    assert lines[0] == lines[1] and message in "".join(lines[0]), said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_retriever_of_your_own_is_asked_for_its_schema(shop, tmp_path, monkeypatch):
    (tmp_path / "my_engine.py").write_text(
        "import retrievers\n"
        "def build(catalog, folder=None, serves=True):\n"
        "    return retrievers.open('bm25', catalog, structured={} if serves else None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = settings(shop, "retriever.kind=my_engine")
    env = open_environment(rec_r1.load_recipe("quickstart", own))
    assert env.format.schema == rec_r1.open_environment(rec_r1.load_recipe("quickstart", own)).format.schema
    with pytest.raises(UserError, match="my_engine answers no structured queries"):
        open_environment(rec_r1.load_recipe("quickstart", [*own, "retriever.params={serves: false}"]))


def test_a_server_that_answers_none_is_refused_when_it_is_open():
    catalog = retrievers.Catalog.from_records([{"id": "d", "text": "red"}])
    recipe = rec_r1.load_recipe("quickstart", [*STRUCTURED, "retriever.kind=remote"])
    assert not list(unserved(recipe))  # This depends on the server.
    assert schema_of(recipe, retrievers.open("bm25", catalog, structured={})) == retrievers.Schema(("text",))
    with pytest.raises(UserError, match=r"the server of retriever\.kind=remote answers no structured queries: start"):
        schema_of(recipe, retrievers.open("bm25", catalog))


@pytest.fixture(scope="module")
def run(shop, tiny_model, tmp_path_factory) -> Path:
    """A training of two steps, whose policies are then given completions that are well-formed."""
    out = tmp_path_factory.mktemp("structured") / "run"
    more = [f"model.name={tiny_model}", f"output_dir={out}", "grpo.max_steps=2", SERVING]
    recipe = rec_r1.load_recipe("quickstart", settings(shop, *more))
    assert rec_r1.train(recipe) == 0
    env = open_environment(recipe)
    for split_name in ("validation", "test"):
        split = env.task.splits[split_name]
        save_raw(out, split_name, env, split, env.scorer)
    return out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_training_counts_what_is_malformed_and_shows_the_schema(run):
    steps = [row for row in rows(run / "metrics.jsonl") if "scorer/malformed" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        causes = {cause: row[f"scorer/malformed/{cause}"] for cause in MALFORMED}
        assert sum(causes.values()) == pytest.approx(row["scorer/malformed"])
    recorded = rows(run / "rollouts.jsonl")
    assert all((row["malformed"] is None) == (row["action"] is not None) for row in recorded)
    shown = json.dumps(recorded[0]["prompt"], ensure_ascii=False)
    assert "Fields: brand (such as" in shown and "Ostrava Works" in shown and "Fields: title, text" in shown
    assert (run / "evaluation" / "test" / "comparison.json").is_file()


def stored(run: Path, split_name: str, completions: list[str]) -> None:
    """Give both policies of a run these completions, as if they had written them."""
    recipe = dataclasses.replace(config.load(run / config.RUN_FILE), output_dir=str(run))
    env = open_environment(recipe)
    split = env.task.splits[split_name]
    answers = [completions[q % len(completions)] for q in range(len(split))]
    scored = env.scorer.score_split(answers, split)
    for name in ("trained", "untrained"):
        step = runs.step_of(run, runs.best_policy(run)) if name == "trained" else None
        records.save(run, split_name, env, split, scored, name, "policy", name, None, "identity", answers, step)


COMPLETIONS = [FILTERED, BOOSTED, NO_JSON]


@pytest.mark.slow
def test_a_run_is_sent_to_other_retrievers_that_answer_the_same(run):
    stored(run, "test", COMPLETIONS)
    on = ["bm25", "tantivy {fields: {title: 2, text: 1}, structured: {filters: [brand]}}"]
    cells = matrix([run], on, "test")["cells"]
    means = {cell["retriever"]: cell["mean"] for cell in cells if cell["system"].startswith("trained")}
    assert means[on[0]] == pytest.approx(means[on[1]], abs=1e-3)  # The formula is the same.
    with pytest.raises(UserError, match=r"tantivy does not answer all .* of the run: it lacks filter brand"):
        matrix([run], ["tantivy {fields: {title: 2, text: 1}, structured: {}}"], "test")
    with pytest.raises(UserError, match=r"bm25 answers structured queries with retriever\.params\.structured only"):
        matrix([run], ["bm25 {k1: 2.0}"], "test")


@pytest.mark.slow
def test_rollouts_are_scored_again(run):
    again = rescore(run, "{ndcg@10: 1}")
    assert again["completions"] == 16 and again["ambiguous"] == 0
    other = rescore(run, "{ndcg@10: 1}", "tantivy", [SERVING])
    assert other["completions"] == 16 and other["all"]["new"]["mean"] == again["all"]["new"]["mean"]
    with pytest.raises(UserError, match="lucene answers no structured queries"):
        rescore(run, "{ndcg@10: 1}", "lucene")


@pytest.mark.slow
def test_a_run_is_audited(run):
    stored(run, "validation", COMPLETIONS)
    found = audit(run, "validation")
    systems = {row["system"]: row for row in found["systems"]}
    assert {"untrained", "trained", "copy of the query"} & set(systems) and found["equal_length"] is None
    assert found["completions"][0]["malformed"] == pytest.approx(1 / 3, abs=0.1)
    with pytest.raises(UserError, match="the run writes no plain queries"):
        audit(run, "validation", retriever="dense")


@pytest.mark.slow
def test_a_policy_in_use(run, monkeypatch):
    policy = rec_r1.Policy.load(run)
    monkeypatch.setattr(policy, "write", lambda prompts, *_: COMPLETIONS)
    queries = ["shoe by Acme 1", "boot by Solvei 2", "hat by Acme 3"]
    filtered, boosted, malformed = policy.search(queries, k=5)
    brand = policy.env.task.catalog.column("brand")
    assert {brand[hit.row] for hit in filtered.hits} == {"Acme"}
    assert json.loads(filtered.sent) == {"query": "shoe", "filters": {"brand": ["Acme"]}}
    assert boosted.hits and malformed.malformed and malformed.sent == queries[2] and malformed.hits
    assert policy.rewrite(queries) == [filtered.sent, boosted.sent, queries[2]]


@pytest.mark.slow
def test_preflight_and_try(shop, tiny_model, tmp_path, capsys, monkeypatch):
    own = settings(shop, f"model.name={tiny_model}", f"output_dir={tmp_path / 'run'}", SERVING)
    assert "format     structured queries; filters: brand; boosts: title, text" in command("check", capsys, *own)
    said = command("preflight", capsys, *own, "--queries", "4")
    assert "verdict" in said and "malformed: not_json 100%" in said
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{COMPLETIONS[0]}\n{COMPLETIONS[2]}\n"))
    said = command("try", capsys, *own)
    assert 'query sent: {"query": "shoe", "filters": {"brand": ["Acme"]}}' in said and "malformed: not_json" in said
