"""The front door: a policy that is asked as it was trained, and the functions behind the command's verbs."""

import json

import pytest

import rec_r1
from rec_r1 import Policy, UserError
from rec_r1.prompts import Format
from retrievers import CatalogError

pytestmark = pytest.mark.slow  # real trainings of a tiny model


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A quickstart of two steps with a tiny model, through the front door."""
    out = tmp_path_factory.mktemp("front-door") / "run"
    recipe = rec_r1.load_recipe("quickstart", [
        f"model.name={tiny_model}", "model.dtype=float32", "lora=null", f"output_dir={out}", "grpo.max_steps=2",
        "grpo.save_steps=2", "prompts_per_step=2", "grpo.num_generations=4", "grpo.bf16=false",
        "grpo.max_completion_length=6", "evaluation.every_steps=0", "evaluation.test_limit=20",
    ])  # fmt: skip
    assert rec_r1.train(recipe) == 0
    return out


@pytest.fixture(scope="module")
def policy(run):
    return Policy.load(str(run))


def test_evaluate_gives_the_comparison_that_it_writes(run):
    result = rec_r1.evaluate(run, metrics=["mrr@10"])
    assert result["metrics"] == ["ndcg@10", "recall@100", "mrr@10"]
    assert json.loads((run / "evaluation/test/comparison.json").read_text())["metrics"] == result["metrics"]
    with pytest.raises(UserError, match="not a run"):
        rec_r1.evaluate(run.parent)
    with pytest.raises(UserError, match="--samples must be at least 1, got 0"):
        rec_r1.evaluate(run, samples=0)


def test_a_policy_answers_queries_that_no_split_holds(policy):
    answers = policy.search(["a feline on a keyboard", "birthday"], k=4)
    assert [answer.query for answer in answers] == ["a feline on a keyboard", "birthday"]
    for answer, text in zip(answers, policy.rewrite(["a feline on a keyboard", "birthday"]), strict=True):
        assert answer.sent == text and text.startswith(answer.query)  # format.action is expand: the query stays
        assert len(answer.hits) <= 4
        rows = policy.env.task.catalog.rows([hit.id for hit in answer.hits]).tolist()
        assert rows == [hit.row for hit in answer.hits]
    assert policy.complete([]) == [] and policy.search([]) == []


def test_a_malformed_completion_falls_back_to_the_raw_query(policy, monkeypatch):
    monkeypatch.setattr(Format, "parse", lambda self, completion, query: None)
    monkeypatch.setattr(policy.env.scorer, "parse", lambda completion, query: None)
    (answer,) = policy.search(["birthday"], k=3)
    assert answer.malformed and answer.sent == "birthday"
    raw = policy.env.retriever.search([policy.env.task.test.raw()[0]._replace(text="birthday")], 3).rows[0]
    assert [hit.row for hit in answer.hits] == [int(row) for row in raw if row >= 0] != []
    assert policy.rewrite(["birthday"]) == ["birthday"]


def test_what_cannot_be_asked_is_refused_with_the_fix(policy, run):
    with pytest.raises(UserError, match=r"write \['lecturer'\]"):
        policy.rewrite("lecturer")
    with pytest.raises(UserError, match="leave histories out"):
        policy.rewrite(["lecturer"], [["x"]])
    with pytest.raises(UserError, match="give queries"):
        policy.rewrite()
    with pytest.raises(UserError, match="exceeds the model's context of 2048"):
        policy.rewrite(["word " * 3000])
    with pytest.raises(ValueError, match="k must be at least 1"):
        policy.search(["lecturer"], k=0)
    with pytest.raises(UserError, match="not a run"):
        Policy.load(run / "best")


def test_the_untrained_policy_can_be_asked(run):
    untrained = Policy.load(run, trained=False)
    kept = [json.loads(line) for line in (run / "evaluation/test/untrained.jsonl").read_text().splitlines()]
    assert untrained.complete(untrained.env.task.test.queries) == [row["completion"] for row in kept]


def test_histories_are_ids_of_the_catalogue(tiny_model, tmp_path):
    from datasets_ import plain_folder

    out = tmp_path / "run"
    recipe = rec_r1.load_recipe("cpu/sequential", [
        f"model.name={tiny_model}", "model.dtype=float32", "lora=null", f"output_dir={out}", "grpo.max_steps=1",
        "grpo.save_steps=1", "prompts_per_step=2",
        "grpo.num_generations=2", "grpo.bf16=false", "grpo.max_completion_length=4", "evaluation.every_steps=0",
        f"task.path={plain_folder(tmp_path)}",
    ])  # fmt: skip
    assert rec_r1.train(recipe) == 0
    policy = Policy.load(out)
    ids = policy.env.task.catalog.ids
    (answer,) = policy.search(histories=[[ids[0], ids[1]]], k=5)
    assert answer.query == policy.env.task.catalog.titles[1]
    assert not {hit.id for hit in answer.hits} & {ids[0], ids[1]}  # what a history holds cannot be the next purchase
    with pytest.raises(UserError, match="give histories"):
        policy.search(["shoes"])
    with pytest.raises(UserError, match="2 queries and 1 histories"):
        policy.search(["a", "b"], [[ids[0]]])
    with pytest.raises(CatalogError, match="'ghost'"):
        policy.search(histories=[["ghost"]])
