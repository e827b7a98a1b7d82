"""`rerank` and `late` behind the command: check, train, evaluate, ask and serve."""

import pytest
import tiny_models
from starlette.testclient import TestClient

import rec_r1
import retrievers
from rec_r1 import cli, config, train
from rec_r1.environment import open_environment
from retrievers.encoders.sentence import Encoder
from retrievers.encoders.tokens import TokenEncoder
from retrievers.serving import server

# They are slow because the trainer's libraries take seconds to import.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fewer_queries")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"rerank": tiny_models.cross_encoder(folder / "cross"), "late": tiny_models.encoder(folder / "encoder")}


def settings(tiny_model, kind, params):
    return [
        f"model.name={tiny_model}", f"retriever.kind={kind}", f"retriever.params={params}", "evaluation.test_limit=10",
        "evaluation.validation_limit=10", "grpo.max_steps=1", "prompts_per_step=2", "grpo.num_generations=2",
        "grpo.bf16=false", "lora={r: 4, target_modules: [q_proj, v_proj]}", "grpo.max_completion_length=6",
        "evaluation.every_steps=0",
    ]  # fmt: skip


def test_from_check_to_ask(models, tiny_model, tmp_path, capsys):
    inner = f"{{kind: late, params: {{model: {models['late']}}}}}"
    given = settings(tiny_model, "rerank", f"{{retriever: {inner}, model: {models['rerank']}, m: 3}}")
    out = f"output_dir={tmp_path / 'run'}"
    assert cli.main(["check", "quickstart", *given, out]) == 0
    assert "retriever  rerank, fingerprint" in capsys.readouterr().out
    assert cli.main(["index", "quickstart", *given]) == 0
    said = capsys.readouterr().out
    assert "rerank over 377 documents: was there already" in said
    assert train.main(["quickstart", *given, out]) == 0
    assert cli.main(["eval", str(tmp_path / "run"), "--metrics", "mrr@10"]) == 0
    capsys.readouterr()
    assert cli.main(["ask", str(tmp_path / "run"), "lecturer", "--k", "2"]) == 0
    assert len(rec_r1.Policy.load(tmp_path / "run").search(["lecturer"], k=3)[0].hits) <= 3


def test_it_is_served_inside_a_hybrid(models):
    part = f"{{kind: rerank, params: {{model: {models['rerank']}, m: 3}}}}"
    late = f"{{kind: late, params: {{model: {models['late']}}}}}"
    params = f"retriever.params={{retrievers: [{part}, {late}], depth: 20}}"
    env = open_environment(config.load("quickstart", ["retriever.kind=hybrid", params]))
    n = len(env.task.catalog)
    with TestClient(server.app(env.retriever, "hybrid", env.task.catalog.fingerprint, n, None)) as client:
        answer = client.post("/search", json={"queries": [["party", [], []]], "k": 3})
        assert answer.json()["rows"] == env.retriever.search([retrievers.Query("party")], 3).rows.tolist()


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("rerank", "{model: nobody/no-such-model}", "neither a folder nor found on the hub"),
        ("rerank", "{model: all-minilm-l6-v2}", "is no cross-encoder"),
        ("rerank", "{m: 0}", "retriever.params.m must be an integer >= 1"),
        ("rerank", "{retriever: bm25}", "retriever.params.retriever must be"),
        ("rerank", "{retriever: {kind: bm52}}", "did you mean 'bm25'"),
        ("rerank", "{retriever: {kind: bm25, m: 3}}", "unknown key 'm'"),
        ("late", "{model: nobody/no-such-model}", "neither a folder nor found on the hub"),
        ("late", "{max_gb: 0.000001}", "retriever.params.max_gb: the index needs"),
        ("late", "{document_length: many}", "retriever.params.document_length must be"),
        ("rerank", "{model: CROSS, max_length: 129}", "retriever.params.max_length: 129: the model reads at most 128"),
        ("late", "{document_length: 257}", "retriever.params.document_length: 257: the model reads at most 256"),
        ("late", "{device: meta}", "retriever.params.device: 'meta' is not available"),
        ("dense", "{device: meta}", "retriever.params.device: 'meta' is not available"),
    ],
)
def test_check_refuses_what_train_refuses(kind, params, message, models, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TokenEncoder, "slabs", lambda *_: pytest.fail("encoded"))
    monkeypatch.setattr(Encoder, "slabs", lambda *_: pytest.fail("encoded"))
    params = params.replace("CROSS", str(models["rerank"]))
    given = [*settings(tiny_model, kind, params), f"output_dir={tmp_path / 'run'}"]
    said = []
    for verb in (["check"], ["train"]):
        assert cli.main([*verb, "quickstart", *given]) == 2
        said.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert said[0] == said[1] and message in said[0] and "Traceback" not in said[0]
    assert not (tmp_path / "run").exists()
