"""The commands over Elasticsearch and OpenSearch, by stand-ins in processes of their own, one of which is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rec_r1 import cli, config, tasks
from rec_r1.config import cache_folder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TINY = [
    "lora.layers_to_transform=0-1", "evaluation.validation_limit=4", "evaluation.test_limit=20",
    "evaluation.metrics=[ndcg@10]", "evaluation.every_steps=0", "prompts_per_step=2",
    "grpo.max_completion_length=4", "grpo.num_generations=4", "grpo.disable_tqdm=true", "grpo.logging_steps=1",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(port: int, product: str = "opensearch", *index: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / "tests" / "retrievers" / "standin.py", str(port), product, *index]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().startswith("http://")
    return process


@pytest.fixture
def run(tiny_model, tmp_path, capsys):
    """Runs a command on the quickstart in this process; returns all that it printed."""

    def run(verb: str, *settings: str, code: int = 0, own: bool = True) -> str:
        capsys.readouterr()
        mine = [f"output_dir={tmp_path / 'run'}", f"model.name={tiny_model}", *TINY] if own else []
        assert cli.main([verb, *(["quickstart"] if own else []), *mine, *settings]) == code
        return "".join(capsys.readouterr())

    return run


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_one_line_indexes_checks_trains_and_evaluates(run, tmp_path):
    port, product = free_port(), "elasticsearch"
    engine = start(port, product)
    try:
        settings = [f"retriever.kind={product}", f"retriever.params.url=http://127.0.0.1:{port}"]
        built = run("index", *settings)
        assert f"{product} over 1,854 documents: ready, on its server" in built
        checked = run("check", *settings)
        usual = run("check")
        fingerprint = re.search(r"fingerprint (\w+)", built)[1]
        assert f"retriever  {product}, fingerprint {fingerprint[:16]}" in checked
        # The stand-in ranks by our bm25, so the raw queries score the same.
        scores = [[line for line in text.splitlines() if line.startswith("raw query")] for text in (checked, usual)]
        assert len(scores[0]) == 3 and scores[0] == scores[1]
        output = run("train", *settings, "grpo.max_steps=2")
        assert "Traceback" not in output
        steps = [row for row in rows(tmp_path / "run") if "retrieval/queries" in row]
        assert [row["step"] for row in steps] == [1, 2] and all(row["retrieval/error_rate"] == 0 for row in steps)
        assert "ndcg@10" in run("eval", str(tmp_path / "run"), own=False)
        assert run("ask", str(tmp_path / "run"), "lecturer", own=False).strip()
    finally:
        engine.kill()
        engine.communicate(timeout=30)


def test_inside_a_fusion(run):
    port = free_port()
    engine = start(port)
    try:
        inner = f"{{kind: opensearch, params: {{url: 'http://127.0.0.1:{port}'}}}}"
        checked = run("check", "retriever.kind=hybrid", f"retriever.params.retrievers=[{{kind: bm25}}, {inner}]")
        assert "retriever  hybrid" in checked and "\nok\n" in checked
    finally:
        engine.kill()
        engine.communicate(timeout=30)


def test_check_says_which_targets_the_index_lacks(run):
    task = tasks.load(config.load("quickstart").task)
    lost = [task.test.rows[0][0], task.train.rows[0][0]]
    port = free_port()
    index = cache_folder() / "opensearch-index.json"
    index.parent.mkdir(parents=True, exist_ok=True)
    sources = {
        one: {"text": text}
        for row, (one, text) in enumerate(zip(task.catalog.ids, task.catalog.texts, strict=True))
        if row not in lost
    }
    index.write_text(json.dumps(sources))
    engine = start(port, "opensearch", str(index))
    settings = [
        "retriever.kind=opensearch",
        "retriever.params.index=shop",
        f"retriever.params.url=http://127.0.0.1:{port}",
    ]
    try:
        checked = run("check", *settings)
        first = ", ".join(repr(task.catalog.ids[row]) for row in sorted(set(lost)))
        assert f"lacks {len(set(lost))} of the 1854 documents of the catalogue" in checked
        assert f"the first: {first}" in checked
        for name in ("test", "train"):
            rows = task.splits[name].rows
            own = [task.catalog.ids[row] for row in sorted(set(lost)) if any(row in one for one in rows)]
            message = f"the index lacks {len(own)} of the targets in {name}, whose rank is therefore 0: "
            assert message + ", ".join(map(repr, own)) in checked
        assert "\nok\n" in checked
        refused = run("check", *settings, "retriever.params.id_field=code", code=2)
        assert "retriever.params.id_field: shop has no field 'code' of type keyword" in refused
    finally:
        engine.kill()
        engine.communicate(timeout=30)


def kill_after_step(server: subprocess.Popen, log: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.02)
    server.send_signal(signal.SIGKILL)
    server.wait()


def test_an_engine_killed_in_the_middle_of_a_run(run, tmp_path):
    port, out = free_port(), tmp_path / "run"
    engine = start(port)
    settings = [
        "retriever.kind=opensearch", f"retriever.params.url=http://127.0.0.1:{port}", "retriever.params.retries=1",
        "retriever.params.breaker_failures=3", "retriever.error_steps=3", "grpo.save_steps=100",
        "retriever.cache.memory_mb=0",
    ]  # fmt: skip
    killer = threading.Thread(target=kill_after_step, args=(engine, out / "metrics.jsonl", 2))
    killer.start()
    output = run("train", "grpo.max_steps=200", *settings, code=2)
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

    refused = run("train", f"grpo.max_steps={last + 2}", *settings, "--resume", code=2)
    assert "no Elasticsearch or OpenSearch answers at" in refused and "Traceback" not in refused
    engine = start(port)  # It has lost its indexes, so that the run builds its own again.
    try:
        run("train", f"grpo.max_steps={last + 2}", *settings, "--resume")
    finally:
        engine.kill()
        engine.communicate(timeout=30)
    again = {row["step"]: row["retrieval/error_rate"] for row in rows(out) if "retrieval/error_rate" in row}
    assert again[last + 1] == again[last + 2] == 0.0
