"""Every mistake a user can make ends in one line with file, field, value and fix; exit code 2; nothing written."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rec_r1 import cli, models, train
from rec_r1.config import UserError

pytestmark = pytest.mark.slow  # the trainer's libraries take seconds to import


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
    assert "override 'modle.name=x'" in message and "modle" in message and "'model'" in message


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
    settings.append("prompts_per_step=1")  # five training queries fill no larger step
    message = fails(capsys, out, *settings, f"model.name={tiny_model}")
    assert repr(records[0]["_id"]) in message and "context of 2048" in message


def test_group_size_that_does_not_divide_the_batch(capsys, out):
    sizes = ["prompts_per_step=null", "grpo.per_device_train_batch_size=10", "grpo.gradient_accumulation_steps=2"]
    message = fails(capsys, out, "grpo.num_generations=7", *sizes)
    assert "grpo.num_generations: 7 does not divide the 20 completions" in message


def test_model_that_cannot_be_found(capsys, out):
    message = fails(capsys, out, "model.name=nobody/nothing-135m")
    assert "model.name: 'nobody/nothing-135m'" in message and "smollm2-135m" in message


def test_bad_retriever_parameter(capsys, out):
    message = fails(capsys, out, "retriever.params={k2: 1.0}")
    assert "retriever.params.k2: unknown parameter" in message and "choose from k1, b, " in message
    assert "b must be a number from 0 to 1" in fails(capsys, out, "retriever.params={b: 3}")


def test_all_bad_parameters_of_retrievers_are_named_at_once(capsys):
    parts = "[{kind: bm25, params: {k1: -1, b: 7}}, {kind: dense, params: {engine: x}}]"
    for command in ("check", "train"):
        assert (
            cli.main([command, "quickstart", "retriever.kind=hybrid", f"retriever.params={{retrievers: {parts}}}"]) == 2
        )
        named = [line.split()[1].rstrip(":") for line in capsys.readouterr().err.splitlines() if "rec-r1: " in line]
        assert named == [f"retriever.params.{name}" for name in ("k1", "b", "engine")]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed(capsys, out, tiny_model):
    setting = "grpo.use_vllm=true"
    assert "grpo.use_vllm: true, but vLLM is not installed: pip install" in fails(capsys, out, setting)
    model = f"model.name={tiny_model}"
    assert cli.main(["check", "quickstart", setting, model]) == 2
    assert "has no layer 29: choose from 0 to" in capsys.readouterr().err  # the recipe's layers are another model's
    assert cli.main(["check", "quickstart", setting, model, "lora=null"]) == 2
    shown = capsys.readouterr()
    assert "memory     about" in shown.out and "grpo.use_vllm: true" in shown.err


@pytest.mark.parametrize("there", [True, False])
def test_a_check_downloads_no_weights(monkeypatch, tmp_path, there):
    asked = []

    def download(repository, allow_patterns, etag_timeout):
        asked.append(allow_patterns)
        if there:
            (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    if there:
        assert models.resolve("somebody/large", weights=False) == str(tmp_path)
    with pytest.raises(UserError, match="neither a local folder nor found on the hub"):
        models.resolve("somebody/large", weights=there)
    assert "*.safetensors" not in asked[0] and ("*.safetensors" in asked[-1]) == there


def test_a_place_that_cannot_be_written_to(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["index", "quickstart", f"retriever.index={tmp_path}/file/index"]) == 2
    assert f"rec-r1: {tmp_path}/file" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("kind", "missing", "extra"),
    [
        ("lucene", "pyserini", "lucene"),
        ("tantivy", "tantivy", "tantivy"),
        ("dense", "sentence_transformers", "dense"),
        ("milvus", "pymilvus", "milvus"),
        ("milvus", "milvus_lite", "milvus"),
        ("postgres retriever.params.url=postgresql://me@localhost/shop", "psycopg", "postgres"),
        ("postgres retriever.params.url=postgresql://me@localhost/shop", "psycopg_pool", "postgres"),
        ("remote", "httpx", "remote"),
    ],
)
def test_a_missing_extra_names_the_pip_command(capsys, out, monkeypatch, kind, missing, extra):
    import importlib.util

    from retrievers.text import jvm

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else real(name, *a))
    monkeypatch.setattr(jvm, "_process", None)
    message = fails(capsys, out, *f"retriever.kind={kind}".split())
    assert f"pip install 'rec-r1[{extra}]'" in message and missing in message.replace("-", "_")


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("retriever.kind=lucen", ["unknown 'lucen'", "did you mean 'lucene'"]),
        ("retriever.max_error_rate=1.5", ["retriever.max_error_rate must lie in [0, 1]", "1.5"]),
        ("retriever.error_steps=0", ["retriever.error_steps must be at least 1"]),
        ("retriever.cache.memory_mb=-1", ["retriever.cache.memory_mb must be at least 0"]),
        ("retriever.cache.size=1", ["unknown key retriever.cache.size"]),
        ("retriever.params={fields: {titel: 2}}", ["no field 'titel'", "title"]),
    ],
)
def test_retriever_settings(capsys, out, setting, parts):
    message = fails(capsys, out, setting)
    assert all(part in message for part in parts), message


def test_a_server_that_is_not_there(capsys, out):
    message = fails(capsys, out, "retriever.kind=remote", "retriever.params.url=http://127.0.0.1:9")
    assert "no retriever answers at http://127.0.0.1:9" in message and "rec-r1 serve" in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--host", "0.0.0.0"], ["--host 0.0.0.0 can be reached from other machines", "REC_R1_TOKEN"]),
        (["--port", "99999"], ["--port 99999", "choose another"]),
        (["retriever.kind=remote"], ["remote is the client"]),
        (["retriever.params.k3=1"], ["unknown parameter", "choose from k1, b, "]),
    ],
)
def test_serve_refuses(capsys, arguments, parts, monkeypatch):
    monkeypatch.delenv("REC_R1_TOKEN", raising=False)
    assert cli.main(["serve", "quickstart", *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("rec-r1: ") and all(part in message for part in parts), message


def test_serve_on_a_port_that_is_taken(capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", "quickstart", "--port", str(port)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--port {port}" in message and "choose another" in message


def test_index_says_what_it_did(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("REC_R1_CACHE", str(tmp_path))  # An index of the same documents may lie in the shared one.
    arguments = ["index", "quickstart", "retriever.kind=hybrid", "retriever.params={retrievers: [{kind: bm25}]}"]
    for done in ("built in", "was there already"):
        assert cli.main(arguments) == 0
        output = capsys.readouterr().out
        assert f"hybrid over 1,854 documents: {done}" in output and "fingerprint" in output


def test_a_reader_who_has_seen_enough_gets_no_traceback():
    """As `rec-r1 recipes | head -1` may find it."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "import sys; from rec_r1 import cli; sys.exit(cli.main(['recipes']))"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
