"""Every mistake a user can make ends in one line with file, field, value and fix; exit code 2; nothing written."""

import json
from pathlib import Path

import pytest

from rec_r1 import cli, train


def fails(capsys, out: Path, *arguments: str, recipe: str = "quickstart") -> str:
    """Run `train`, assert the manner of failure, return the message."""
    assert train.main([recipe, f"output_dir={out}", *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("rec-r1: ")
    assert "Traceback" not in message
    assert not out.exists()
    return message


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "run"


def test_unknown_recipe_key(capsys, out):
    message = fails(capsys, out, "modle.name=x")
    assert "quickstart.yaml" in message and "modle" in message and "'model'" in message


def test_unknown_trainer_option(capsys, out):
    assert "'learning_rate'" in fails(capsys, out, "grpo.learning_rat=1e-4")


def test_unknown_lora_option(capsys, out, tiny_model):
    assert "'lora_alpha'" in fails(capsys, out, f"model.name={tiny_model}", "lora.lora_alpah=4")


def test_unknown_reward(capsys, out):
    message = fails(capsys, out, "rewards={ndgc@10: 1.0}")
    assert "'ndgc'" in message and "'ndcg'" in message


@pytest.mark.parametrize("name", ["ndcg@0", "ndcg@-1", "recall@x"])
def test_k_below_one(capsys, out, name):
    assert "k must be an integer >= 1" in fails(capsys, out, f"rewards={{{name}: 1.0}}")


def test_missing_recipe(capsys, out):
    assert "no such file" in fails(capsys, out, recipe="nowhere.yaml")


def test_missing_file(capsys, out, beir_folder):
    (beir_folder / "queries.jsonl").unlink()
    assert "queries.jsonl: no such file" in fails(capsys, out, "task.name=beir", f"task.path={beir_folder}")


def test_judged_document_that_the_corpus_lacks(capsys, out, beir_folder):
    qrels = beir_folder / "qrels" / "train.tsv"
    query = qrels.read_text().splitlines()[1].split("\t")[0]
    with qrels.open("a") as file:
        file.write(f"{query}\tghost\t1\n")
    message = fails(capsys, out, "task.name=beir", f"task.path={beir_folder}")
    assert "train.tsv" in message and "'ghost'" in message


def test_empty_corpus(capsys, out, beir_folder):
    (beir_folder / "corpus.jsonl").write_text("")
    message = fails(capsys, out, "task.name=beir", f"task.path={beir_folder}")
    assert "corpus.jsonl" in message and "empty" in message


def test_empty_train_set(capsys, out, beir_folder):
    (beir_folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n")
    message = fails(capsys, out, "task.name=beir", f"task.path={beir_folder}")
    assert "train.tsv" in message and "no judgments" in message


def test_filter_that_leaves_nothing(capsys, out):
    assert "raw_ndcg_below: -1.0 leaves no training query" in fails(capsys, out, "task.train_filter.raw_ndcg_below=-1")


def test_query_longer_than_the_context(capsys, out, beir_folder, tiny_model):
    queries = beir_folder / "queries.jsonl"
    records = [json.loads(line) for line in queries.read_text().splitlines()]
    records[0]["text"] = "word " * 2000
    queries.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = ["task.name=beir", f"task.path={beir_folder}", "task.train_filter.raw_ndcg_below=1.01"]
    message = fails(capsys, out, *settings, f"model.name={tiny_model}")
    assert repr(records[0]["_id"]) in message and "context of 256" in message


def test_group_size_that_does_not_divide_the_batch(capsys, out):
    sizes = ["grpo.per_device_train_batch_size=10", "grpo.gradient_accumulation_steps=2"]
    message = fails(capsys, out, "grpo.num_generations=7", *sizes)
    assert "grpo.num_generations: 7 does not divide the 20 completions" in message


def test_model_that_cannot_be_found(capsys, out):
    message = fails(capsys, out, "model.name=nobody/nothing-135m")
    assert "model.name: 'nobody/nothing-135m'" in message and "smollm2-135m" in message


def test_bad_retriever_parameter(capsys, out):
    assert "'k1'" in fails(capsys, out, "retriever.params={k2: 1.0}")
    assert "b must lie in [0, 1]" in fails(capsys, out, "retriever.params={b: 3}")


def test_a_started_run_is_not_written_over(capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n")
    assert train.main(["quickstart", f"output_dir={run}"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]
    assert (run / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "quickstart", "nonsense"],
        ["eval", "nowhere"],
        ["eval", "nowhere", "--metrics", "ndgc@10"],
        ["plot", "nowhere"],
        ["try", "quickstart", "--query", "no such query"],
        ["index", "nowhere.yaml"],
    ],
)
def test_other_verbs(capsys, arguments):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("rec-r1: ")
