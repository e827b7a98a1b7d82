"""One line of the recipe swaps the retriever; a server that dies in the middle of a run costs no run."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from datasets_ import movielens

import retrievers
from rec_r1 import cli, config, tasks
from rec_r1.environment import open_retriever

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TINY = [
    "lora.layers_to_transform=0-1", "evaluation.validation_limit=4", "evaluation.test_limit=20",
    "evaluation.metrics=[ndcg@10]",
    "evaluation.every_steps=0", "prompts_per_step=2",
    "grpo.max_completion_length=4", "grpo.num_generations=4", "grpo.disable_tqdm=true", "grpo.logging_steps=1",
]  # fmt: skip


def start(*arguments: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "rec_r1.cli", *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


@pytest.fixture
def train(tiny_model, tmp_path, capsys):
    """Trains the quickstart in this process, in the folder `run`; returns all that it printed."""

    def run(*settings: str, recipe: str = "quickstart", code: int = 0) -> str:
        capsys.readouterr()
        own = [f"output_dir={tmp_path / 'run'}", f"model.name={tiny_model}"]
        assert cli.main(["train", recipe, *own, *TINY, *settings]) == code
        return "".join(capsys.readouterr())

    return run


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def serve(port: int, *settings: str) -> subprocess.Popen:
    process = start("serve", "quickstart", "--port", str(port), *settings)
    assert process.stdout is not None
    for line in process.stdout:
        if "over 1,854 documents" in line:
            return process
    raise AssertionError(f"the server ended with {process.wait()}")


RECOMMENDERS = [kind for kind in retrievers.BACKENDS if kind != "hybrid" and retrievers.takes_interactions(kind, {})]
RECOMMENDERS.remove("propagate")


def assert_two_steps(out: Path, output: str) -> None:
    """Both asked the retriever and were evaluated."""
    assert "Traceback" not in output
    steps = [row for row in rows(out) if "retrieval/queries" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert 1 <= row["retrieval/queries"] <= 8 and 0 < row["retrieval/distinct"] <= 1
        assert row["retrieval/error_rate"] == 0 and 0 <= row["retrieval/cache_hits"] <= 1
        assert 0 < row["retrieval/seconds/p50"] <= row["retrieval/seconds/p95"]
    assert (out / "evaluation" / "test" / "comparison.json").is_file()
    held_out = [key for row in rows(out) for key in row if key.startswith("eval/")]
    assert held_out[0] == "eval/ndcg@10"  # the picture takes the first for its metric


def kinds():
    # test_opensearch_run.py and test_postgres_run.py train with these engines, which need a server, and
    # test_rerank_and_late.py with `rerank` around `late`, whose models it makes.
    elsewhere = {"remote", "propagate", "opensearch", "elasticsearch", "postgres", "rerank", "late"}
    yield from sorted(set(retrievers.BACKENDS) - elsewhere - set(RECOMMENDERS))
    yield "dense retriever.params.engine=faiss retriever.params.factory=HNSW32"


@pytest.mark.parametrize("kind", kinds())
def test_any_backend_trains_the_quickstart_with_no_other_change(kind, train, tmp_path):
    output = train("grpo.max_steps=2", *f"retriever.kind={kind}".split())
    assert_two_steps(tmp_path / "run", output)


def test_the_recommenders_are_these():
    assert RECOMMENDERS == ["popularity", "itemknn", "ease", "l3ae", "sansa", "sasrec", "vqrec", "personas"]


@pytest.mark.parametrize("kind", RECOMMENDERS)
def test_any_recommender_trains_by_one_line(kind, train, tmp_path):
    """Through ground-then-propagate: the recipe's settings but for a tiny model, which writes a plain line, and small
    batches; and that one line."""
    if kind == "sansa":
        pytest.importorskip("sansa")
    films = movielens(tmp_path / "films", "ml-1m")
    small = ["lora=null", "model.dtype=float32", "format.answer=line", "grpo.bf16=false", "grpo.use_vllm=false"]
    settings = [f"task.path={films}", "grpo.max_steps=2", *small]
    output = train(*settings, f"retriever.params.backend={{kind: {kind}}}", recipe="propagate")
    assert_two_steps(tmp_path / "run", output)


def kill_after_step(server: subprocess.Popen, log: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.02)
    server.send_signal(signal.SIGKILL)
    server.wait()


def test_a_server_killed_in_the_middle_of_a_run(train, tmp_path):
    port, out = free_port(), tmp_path / "run"
    server = serve(port)
    settings = [
        "retriever.kind=remote", f"retriever.params.url=http://127.0.0.1:{port}", "retriever.params.retries=1",
        "retriever.error_steps=3", "grpo.save_steps=100", "retriever.cache.memory_mb=0",
    ]  # fmt: skip
    killer = threading.Thread(target=kill_after_step, args=(server, out / "metrics.jsonl", 2))
    killer.start()
    output = train("grpo.max_steps=200", *settings, code=2)
    killer.join()
    message = output.strip().splitlines()[-1]
    assert message.startswith("rec-r1: the retriever failed for 100% of the completions in the last 3 batches")
    assert "--resume" in message and f"127.0.0.1:{port}" in message and "Traceback" not in output

    rates = {row["step"]: row["retrieval/error_rate"] for row in rows(out) if "retrieval/error_rate" in row}
    last = max(rates)
    assert [rates[step] for step in range(last - 2, last + 1)] == [1.0] * 3 and rates[1] == 0.0
    rollouts = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    failed = [row for row in rollouts if row["failed"]]
    assert failed and all(row["reward"] is None for row in failed)
    assert all(row["reward"] is not None for row in rollouts if not row["failed"])
    assert (out / f"checkpoint-{last}").is_dir()

    refused = train(f"grpo.max_steps={last + 2}", *settings, "--resume", code=2)
    assert "no retriever answers" in refused and "rec-r1 serve" in refused  # before the first step
    server = serve(port)
    try:
        train(f"grpo.max_steps={last + 2}", *settings, "--resume")
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    again = {row["step"]: row["retrieval/error_rate"] for row in rows(out) if "retrieval/error_rate" in row}
    assert again[last + 1] == again[last + 2] == 0.0


def test_a_server_with_another_index_is_refused(tiny_model):
    port = free_port()
    server = serve(port, "retriever.params.k1=2.0")
    try:
        recipe = config.load("quickstart", ["retriever.kind=remote", f"retriever.params.url=http://127.0.0.1:{port}"])
        task = tasks.load(recipe.task)
        remote = open_retriever(recipe, task)
        local = retrievers.open("bm25", task.catalog, k1=2.0)
        assert remote.fingerprint == local.fingerprint
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    server = serve(port)
    try:
        with pytest.raises(retrievers.RetrieverError, match="the server has another index now"):
            remote.search([retrievers.Query("party")], 3)
    finally:
        server.send_signal(signal.SIGINT)
        assert "Traceback" not in server.communicate(timeout=30)[0] and server.returncode == 0  # Ctrl-C is how it ends
