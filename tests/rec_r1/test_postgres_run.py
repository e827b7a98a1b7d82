"""Commands over a real PostgreSQL: one line swaps the retriever, and a server that dies in mid-run costs no reward."""

import json
import threading
import time
from pathlib import Path

import psycopg
import pytest
from postgres_server import Server

from rec_r1 import cli, config, tasks

pytestmark = pytest.mark.slow
TINY = [
    "lora.layers_to_transform=0-1", "evaluation.validation_limit=4", "evaluation.test_limit=20",
    "evaluation.metrics=[ndcg@10]", "evaluation.every_steps=0", "prompts_per_step=2",
    "grpo.max_completion_length=4", "grpo.num_generations=4", "grpo.disable_tqdm=true", "grpo.logging_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def running():
    """A server that the tests may kill."""
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def url(running) -> str:
    return running.database("shop")


@pytest.fixture
def run(tiny_model, tmp_path, capsys):
    """Calls a command for the quickstart with a tiny model, in the folder `run`; returns all that it printed."""

    def call(verb: str, *settings: str, code: int = 0) -> str:
        capsys.readouterr()
        own = [f"output_dir={tmp_path / 'run'}", f"model.name={tiny_model}"]
        assert cli.main([verb, "quickstart", *own, *TINY, *settings]) == code
        return "".join(capsys.readouterr())

    return call


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kill_after_step(server: Server, log: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.02)
    server.kill()


def test_a_server_killed_in_the_middle_of_a_run(run, running, url, tmp_path):
    out = tmp_path / "run"
    settings = [
        "retriever.kind=postgres", f"retriever.params.url={url}", "retriever.params.timeout=1",
        "retriever.error_steps=3", "grpo.save_steps=100", "retriever.cache.memory_mb=0",
    ]  # fmt: skip
    assert "ready, on its server" in run("index", *settings) and "ok" in run("check", *settings).splitlines()
    killer = threading.Thread(target=kill_after_step, args=(running, out / "metrics.jsonl", 2))
    killer.start()
    output = run("train", "grpo.max_steps=200", *settings, code=2)
    killer.join()
    message = output.strip().splitlines()[-1]
    assert message.startswith("rec-r1: the retriever failed for 100% of the completions in the last 3 batches")
    assert "--resume" in message and "PostgreSQL at postgresql://" in message and "Traceback" not in output

    rates = {
        row["step"]: row["retrieval/error_rate"] for row in rows(out / "metrics.jsonl") if "retrieval/error_rate" in row
    }
    last = max(rates)
    assert [rates[step] for step in range(last - 2, last + 1)] == [1.0] * 3 and rates[1] == 0.0
    rollouts = rows(out / "rollouts.jsonl")
    assert any(row["failed"] for row in rollouts)
    assert all((row["reward"] is None) == row["failed"] for row in rollouts)
    assert (out / f"checkpoint-{last}").is_dir()

    refused = run("train", f"grpo.max_steps={last + 2}", *settings, "--resume", code=2)
    assert "no connection to PostgreSQL" in refused and "start it" in refused  # before the first step
    running.start()
    resumed = run("train", f"grpo.max_steps={last + 2}", *settings, "--resume")
    again = {
        row["step"]: row["retrieval/error_rate"] for row in rows(out / "metrics.jsonl") if "retrieval/error_rate" in row
    }
    assert again[last + 1] == again[last + 2] == 0.0 and "Traceback" not in resumed
    assert (out / "evaluation" / "test" / "comparison.json").is_file()
    # Every reward that was given is that of a server that answers.
    assert rescored(config.load("quickstart", settings), rows(out / "rollouts.jsonl")) == 0


def rescored(recipe, rollouts) -> int:
    """How many recorded rewards differ from those that the completions earn now."""
    from rec_r1.environment import open_environment

    env = open_environment(recipe)
    split = env.task.train
    place = {query_id: i for i, query_id in enumerate(split.ids)}
    given = [row for row in rollouts if not row["failed"]]
    assert len(given) >= 8
    scored = env.scorer.score_split(
        [row["completion"] for row in given], split.take([place[row["query_id"]] for row in given])
    )
    return sum(abs(a - b["reward"]) > 1e-6 for a, b in zip(scored.rewards.tolist(), given, strict=True))


def test_targets_that_a_table_lacks_are_named_by_check(run, url):
    task = tasks.load(config.load("quickstart").task)
    held_out = {row for rows in task.test.rows for row in rows}
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE emoji (id text PRIMARY KEY, terms tsvector)")
        with connection.cursor() as cursor:
            lacking = sorted(held_out)[:12]
            cursor.executemany(
                "INSERT INTO emoji VALUES (%s, to_tsvector('english', %s))",
                [
                    (i, text)
                    for row, (i, text) in enumerate(zip(task.catalog.ids, task.catalog.texts, strict=True))
                    if row not in lacking
                ],
            )
    settings = ["retriever.kind=postgres", f"retriever.params.url={url}", "retriever.params.table=emoji"]
    output = run("check", *settings, "retriever.params.tsvector_column=terms", "evaluation.test_limit=null")
    (line,) = [line for line in output.splitlines() if "targets in test" in line]
    assert (
        "lacks 12 of the targets in test" in line
        and " and 2 more" in line
        and repr(task.catalog.ids[lacking[0]]) in line
    )
    inner = f"[{{kind: bm25}}, {{kind: postgres, params: {{url: '{url}', table: emoji, tsvector_column: terms}}}}]"
    fused = run("check", "retriever.kind=hybrid", f"retriever.params.retrievers={inner}", "evaluation.test_limit=null")
    assert line in fused
