"""The commands over Elasticsearch and OpenSearch, by stand-ins in processes of their own, one of which is killed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import outages
import pytest

from rec_r1 import cli, config, tasks
from rec_r1.config import cache_folder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


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
        mine = [f"output_dir={tmp_path / 'run'}", f"model.name={tiny_model}", *outages.TINY] if own else []
        assert cli.main([verb, *(["quickstart"] if own else []), *mine, *settings]) == code
        return "".join(capsys.readouterr())

    return run


def test_one_line_indexes_checks_trains_and_evaluates(run, tmp_path):
    port, product = outages.free_port(), "elasticsearch"
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
        steps = [row for row in outages.rows(tmp_path / "run") if "retrieval/queries" in row]
        assert [row["step"] for row in steps] == [1, 2] and all(row["retrieval/error_rate"] == 0 for row in steps)
        assert "ndcg@10" in run("eval", str(tmp_path / "run"), own=False)
        assert run("ask", str(tmp_path / "run"), "lecturer", own=False).strip()
    finally:
        outages.end(engine)


def test_inside_a_fusion(run):
    port = outages.free_port()
    engine = start(port)
    try:
        inner = f"{{kind: opensearch, params: {{url: 'http://127.0.0.1:{port}'}}}}"
        checked = run("check", "retriever.kind=hybrid", f"retriever.params.retrievers=[{{kind: bm25}}, {inner}]")
        assert "retriever  hybrid" in checked and "\nok\n" in checked
    finally:
        outages.end(engine)


def test_check_says_which_targets_the_index_lacks(run):
    task = tasks.load(config.load("quickstart").task)
    lost = [task.test.rows[0][0], task.train.rows[0][0]]
    port = outages.free_port()
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
            message = f"the index lacks {len(own)} of the targets in {name}, which it therefore never finds: "
            assert message + ", ".join(map(repr, own)) in checked
        assert "\nok\n" in checked
        served_at = outages.free_port()
        server = outages.serve(served_at, *settings)
        try:
            remote = run("check", "retriever.kind=remote", f"retriever.params.url=http://127.0.0.1:{served_at}")
        finally:
            outages.end(server)
        warnings = [[line for line in text.splitlines() if " of the targets in " in line] for text in (checked, remote)]
        assert len(warnings[0]) >= 2 and warnings[0] == warnings[1]
        refused = run("check", *settings, "retriever.params.id_field=code", code=2)
        assert "retriever.params.id_field: shop has no field 'code' of type keyword" in refused
    finally:
        outages.end(engine)


def test_an_engine_killed_in_the_middle_of_a_run(run, tmp_path):
    port, out = outages.free_port(), tmp_path / "run"
    engine = start(port)
    settings = [
        "retriever.kind=opensearch", f"retriever.params.url=http://127.0.0.1:{port}", "retriever.params.retries=1",
        "retriever.params.breaker_failures=3", *outages.STOPS_SOON,
    ]  # fmt: skip
    with outages.killed_after_step(lambda: outages.end(engine), out, 2):
        output = run("train", "grpo.max_steps=200", *settings, code=2)
    last = outages.assert_stopped_by_the_outage(out, output, f"127.0.0.1:{port}")

    refused = run("train", f"grpo.max_steps={last + 2}", *settings, "--resume", code=2)
    assert "no Elasticsearch or OpenSearch answers at" in refused and "Traceback" not in refused
    engine = start(port)  # It has lost its indexes, so that the run builds its own again.
    try:
        run("train", f"grpo.max_steps={last + 2}", *settings, "--resume")
    finally:
        outages.end(engine)
    outages.assert_continued(out, last)
