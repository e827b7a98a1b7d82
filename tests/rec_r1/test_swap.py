"""One line of the recipe swaps the retriever; a server that dies in the middle of a run costs no run."""

import signal
from pathlib import Path

import outages
import pytest
from datasets_ import few_emoji, movielens

import retrievers
from rec_r1 import cli, config, tasks
from rec_r1.environment import open_retriever

pytestmark = pytest.mark.slow


@pytest.fixture
def train(tiny_model, tmp_path, capsys):
    """Trains the quickstart in this process, in the folder `run`; returns all that it printed."""

    def run(*settings: str, recipe: str = "quickstart", code: int = 0) -> str:
        capsys.readouterr()
        own = [f"output_dir={tmp_path / 'run'}", f"model.name={tiny_model}"]
        assert cli.main(["train", recipe, *own, *outages.TINY, *settings]) == code
        return "".join(capsys.readouterr())

    return run


RECOMMENDERS = [kind for kind in retrievers.BACKENDS if kind != "hybrid" and retrievers.takes_interactions(kind, {})]
RECOMMENDERS.remove("propagate")


def assert_two_steps(out: Path, output: str) -> None:
    """Both asked the retriever and were evaluated."""
    assert "Traceback" not in output
    steps = [row for row in outages.rows(out) if "retrieval/queries" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert 1 <= row["retrieval/queries"] <= 8 and 0 < row["retrieval/distinct"] <= 1
        assert row["retrieval/error_rate"] == 0 and 0 <= row["retrieval/cache_hits"] <= 1
        assert 0 < row["retrieval/seconds/p50"] <= row["retrieval/seconds/p95"]
    assert (out / "evaluation" / "test" / "comparison.json").is_file()
    held_out = [key for row in outages.rows(out) for key in row if key.startswith("eval/")]
    assert held_out[0] == "eval/ndcg@10"  # the picture takes the first for its metric


def kinds():
    # test_opensearch_run.py and test_postgres_run.py train with these engines, which need a server, and
    # test_rerank_and_late.py with `rerank` around `late`, whose models it makes.
    elsewhere = {"remote", "propagate", "opensearch", "elasticsearch", "postgres", "rerank", "late"}
    yield from sorted(set(retrievers.BACKENDS) - elsewhere - set(RECOMMENDERS))
    yield "dense retriever.params.engine=faiss retriever.params.factory=HNSW32"


@pytest.mark.parametrize("kind", kinds())
def test_any_backend_trains_the_quickstart_with_no_other_change(kind, train, tmp_path):
    with few_emoji(tmp_path / "emoji"):
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


def test_a_server_killed_in_the_middle_of_a_run(train, tmp_path):
    port, out = outages.free_port(), tmp_path / "run"
    server = outages.serve(port)
    settings = [
        "retriever.kind=remote", f"retriever.params.url=http://127.0.0.1:{port}", "retriever.params.retries=1",
        *outages.STOPS_SOON,
    ]  # fmt: skip
    with outages.killed_after_step(lambda: outages.end(server), out, 2):
        output = train("grpo.max_steps=200", *settings, code=2)
    last = outages.assert_stopped_by_the_outage(out, output, f"127.0.0.1:{port}")

    refused = train(f"grpo.max_steps={last + 2}", *settings, "--resume", code=2)
    assert "no retriever answers" in refused and "rec-r1 serve" in refused  # before the first step
    server = outages.serve(port)
    try:
        train(f"grpo.max_steps={last + 2}", *settings, "--resume")
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    outages.assert_continued(out, last)


def test_a_server_with_another_index_is_refused(tiny_model):
    port = outages.free_port()
    server = outages.serve(port, "retriever.params.k1=2.0")
    try:
        recipe = config.load("quickstart", ["retriever.kind=remote", f"retriever.params.url=http://127.0.0.1:{port}"])
        task = tasks.load(recipe.task)
        remote = open_retriever(recipe, task)
        local = retrievers.open("bm25", task.catalog, k1=2.0)
        assert remote.fingerprint == local.fingerprint
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    server = outages.serve(port)
    try:
        with pytest.raises(retrievers.RetrieverError, match="the server has another index now"):
            remote.search([retrievers.Query("party")], 3)
    finally:
        server.send_signal(signal.SIGINT)
        assert "Traceback" not in server.communicate(timeout=30)[0] and server.returncode == 0  # Ctrl-C is how it ends
