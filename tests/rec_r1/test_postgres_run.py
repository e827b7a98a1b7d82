"""Commands over a real PostgreSQL: one line swaps the retriever, and a server that dies in mid-run costs no reward."""

import psycopg
import pytest
from outages import STOPS_SOON, TINY, assert_continued, assert_stopped_by_the_outage, killed_after_step, rows
from postgres_server import Server

from rec_r1 import cli, config, tasks

pytestmark = pytest.mark.slow


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


def test_a_server_killed_in_the_middle_of_a_run(run, running, url, tmp_path):
    out = tmp_path / "run"
    settings = ["retriever.kind=postgres", f"retriever.params.url={url}", "retriever.params.timeout=1", *STOPS_SOON]
    assert "ready, on its server" in run("index", *settings) and "ok" in run("check", *settings).splitlines()
    with killed_after_step(running.kill, out, 2):
        output = run("train", "grpo.max_steps=200", *settings, code=2)
    last = assert_stopped_by_the_outage(out, output, "PostgreSQL at postgresql://")

    refused = run("train", f"grpo.max_steps={last + 2}", *settings, "--resume", code=2)
    assert "no connection to PostgreSQL" in refused and "start it" in refused  # before the first step
    running.start()
    assert "Traceback" not in run("train", f"grpo.max_steps={last + 2}", *settings, "--resume")
    assert_continued(out, last)
    assert (out / "evaluation" / "test" / "comparison.json").is_file()
    # Every reward that was given is that of a server that answers.
    assert rescored(config.load("quickstart", settings), rows(out, "rollouts.jsonl")) == 0


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
