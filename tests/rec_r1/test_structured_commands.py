"""The action structured in the commands that a person uses, with a policy that writes queries in parts: train on every
engine, ask, serve, baseline, and a run whose retriever is a server."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from outages import end, free_port, start
from postgres_server import shared_database
from structured_shop import ANSWERS, BOOSTED, FILTERED, NARROW, SERVING, make_shop, settings, writer
from test_endpoint import running, server, usual  # noqa: F401
from test_opensearch_run import start as start_engine

from rec_r1 import Policy, cli
from retrievers import RetrieverError

pytestmark = pytest.mark.slow

GREEDY = {last: pair[0] for last, pair in ANSWERS.items()}
SENT = {
    FILTERED: '{"query": "shoe", "filters": {"brand": ["Acme"]}}',
    BOOSTED: '{"query": "boot rain", "boosts": {"title": 4}}',
    NARROW: '{"query": "hat", "must": ["red"], "filters": {"brand": ["Solvei", "Ostrava Works"]}}',
}
QUERIES = ["shoe by Acme 0", "boot by Solvei 1", "hat by Acme 2", "coat by Acme 3"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return make_shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    return writer(tmp_path_factory.mktemp("writer"), tiny_model)


def recipe_of(shop: Path, model: Path, out: Path, *more: str) -> list[str]:
    return settings(shop, f"model.name={model}", f"output_dir={out}", "grpo.max_steps=2", SERVING, *more)


@pytest.fixture(scope="module")
def run(shop, model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("structured") / "run"
    assert cli.main(["train", "quickstart", *recipe_of(shop, model, out)]) == 0
    return out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_answers(answers: list[dict], brand_of: dict[str, str], queries=QUERIES) -> None:
    """Each query has the completion of its last character, and the hits pass the filter of what was sent."""
    assert [answer["query"] for answer in answers] == list(queries)
    for answer in answers:
        assert answer["completion"] == GREEDY[answer["query"][-1]]
        sent = SENT.get(answer["completion"])
        assert answer["sent"] == (sent or answer["query"])
        hits = [hit["id"] for hit in answer["hits"]]
        assert hits and [hit["rank"] for hit in answer["hits"]] == list(range(1, len(hits) + 1))
        if "filters" in answer["sent"]:
            assert {brand_of[one] for one in hits} <= set(json.loads(answer["sent"])["filters"]["brand"])


@pytest.fixture(scope="module")
def brand_of(run) -> dict[str, str]:
    catalog = Policy.load(run).env.task.catalog
    return dict(zip(catalog.ids, catalog.column("brand"), strict=True))


def check_rollouts(out: Path, brand_of: dict[str, str]) -> None:
    """A training scored queries in parts and counted what is malformed, and no hit passes by a filter."""
    recorded = rows(out / "rollouts.jsonl")
    assert len(recorded) == 16 and not any(row["failed"] for row in recorded)
    causes = {SENT.get(row["completion"]): row["malformed"] for row in recorded}
    assert causes.pop(None) in ("not_json", "unknown_field") and causes and set(causes.values()) == {None}
    for row in recorded:
        assert row["action"] == SENT.get(row["completion"]) and row["reward"] is not None
        if row["action"] is not None and "filters" in row["action"] and row["hits"]:
            brands = json.loads(row["action"])["filters"]["brand"]
            assert {brand_of[hit["id"]] for hit in row["hits"]} <= set(brands)


def test_a_training_scores_queries_in_parts(run, brand_of):
    check_rollouts(run, brand_of)
    trained = rows(run / "evaluation" / "test" / "trained.jsonl")
    assert {row["action"] for row in trained} == {None, SENT[FILTERED], SENT[BOOSTED]}


@pytest.fixture(scope="module")
def engine():
    """The address of a stand-in for a cluster."""
    port = free_port()
    process = start_engine(port)
    yield f"http://127.0.0.1:{port}"
    end(process)


@pytest.mark.parametrize("kind", ["tantivy", "postgres", "opensearch"])
def test_a_training_on_every_engine(shop, model, brand_of, engine, tmp_path, kind):
    params = {
        "tantivy": "{fields: {title: 2, text: 1}, structured: {filters: [brand]}}",
        "postgres": f"{{url: '{shared_database()}', fields: {{title: A, text: D}}, structured: {{filters: [brand]}}}}",
        "opensearch": f"{{url: '{engine}', fields: {{title: 2, text: 1}}, structured: {{filters: [brand]}}}}",
    }[kind]
    own = recipe_of(shop, model, tmp_path / "run", f"retriever.kind={kind}", f"retriever.params={params}")
    assert cli.main(["train", "quickstart", *own]) == 0
    check_rollouts(tmp_path / "run", brand_of)
    with ThreadPoolExecutor(4) as pool:
        policy = Policy.load(tmp_path / "run")
        split = policy.split(QUERIES)
        written = policy.complete(QUERIES)
        several = list(pool.map(lambda _: policy.answers(split, written, 5), range(8)))
    assert all(answers == several[0] for answers in several)
    filtered, boosted, *malformed = several[0]
    assert {brand_of[hit.id] for hit in filtered.hits} == {"Acme"} and boosted.hits[0].title.endswith("boot")
    assert all(answer.malformed and answer.hits for answer in malformed)


def test_ask(run, brand_of, tmp_path, capsys):
    capsys.readouterr()
    assert cli.main(["ask", str(run), *QUERIES, "--json", "--k", "4"]) == 0
    check_answers(list(map(json.loads, capsys.readouterr().out.splitlines())), brand_of)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": query}) + "\n" for query in QUERIES))
    given = ["--file", str(tmp_path / "q.jsonl"), "-o", str(tmp_path / "a.jsonl")]
    assert cli.main(["ask", str(run), *given, "--untrained"]) == 0
    check_answers(rows(tmp_path / "a.jsonl"), brand_of)
    capsys.readouterr()
    assert cli.main(["ask", str(run), QUERIES[0], QUERIES[3], "--k", "1"]) == 0
    shown = capsys.readouterr().out
    assert f"sent        {SENT[FILTERED]}\n" in shown and "sent        coat by Acme 3  (malformed, so the raw" in shown


def test_ask_an_endpoint_whose_answers_are_hostile(run, server, brand_of, tmp_path):  # noqa: F811
    """A server may write anything: what the schema does not allow is malformed, and the raw query is sent."""
    hostile = [
        FILTERED, '<answer>{"query": "shoe", "filters": {"brand": "Acme", "brand": "Solvei"}}</answer>',
        '<answer>{"query": "shoe", "boosts": {"title": 1e400}}</answer>', "<answer>" + "[" * 100_000 + "</answer>",
        '<answer>{"query": "shoe", "boosts": {"title": ' + "9" * 5_000 + "}}</answer>",
        '<answer>{"query": "\\ud83d shoe"}</answer>', "half \ud83d",
        f'<answer>{{"query": "{"x" * 1_000_000}"}}</answer>',
        '<answer>{"query": "shoe", "filters": {"brand": [true]}}</answer>', "<answer>null</answer>", "",
        '<answer>{"query": "shoe", "filters": {"bra\\u0301nd": "x"}}</answer>',
        '<answer>{"query": "\'; DROP TABLE items; --", "filters": {"brand": "Acme"}}</answer>', NARROW,
    ]  # fmt: skip
    asked = [f"query {number}" for number in range(len(hostile))]

    server.play = lambda number, body: usual(body, hostile[int(body["prompt"].rpartition(" ")[2])] or " ")
    out = tmp_path / "a.jsonl"
    words = ["ask", str(run), *asked, "--endpoint", server.url, "--model", "m", "-o", str(out), "--k", "3"]
    assert cli.main(words) == 0
    answers = rows(out)
    well_formed = [number for number, answer in enumerate(answers) if not answer["malformed"]]
    assert well_formed == [0, 1, 12, 13]
    assert answers[1]["sent"] == '{"query": "shoe", "filters": {"brand": ["Solvei"]}}'  # The last of two equal keys.
    for number in well_formed:
        brands = json.loads(answers[number]["sent"])["filters"]["brand"]
        assert {brand_of[hit["id"]] for hit in answers[number]["hits"]} <= set(brands)
    assert all(answer["sent"] == answer["query"] for answer in answers if answer["malformed"])


def started(*words: str):
    """Start a command that serves, and wait until it does. Returns its process and its address."""
    port = free_port()
    process = start("serve", *words, "--port", str(port))
    for line in process.stdout:
        if "Ctrl-C ends it" in line:
            return process, f"http://127.0.0.1:{port}"
    raise AssertionError(f"the server ended with {process.wait()}")


def test_a_served_policy_answers_many_at_once(run, brand_of):
    """Its completions are written by a spawned process."""
    process, url = started(str(run), "--policy", "--timeout", "300")
    try:
        requests = [QUERIES[i % 4 :] + QUERIES[: i % 4] for i in range(12)]
        requests.append(["nul \0 0", "{query} 0", "<answer> 1", "é\u0301 2"])
        with ThreadPoolExecutor(6) as pool:
            bodies = [{"queries": queries, "k": 3} for queries in requests]
            answered = list(pool.map(lambda body: httpx.post(url + "/search", json=body, timeout=300), bodies))
        for queries, response in zip(requests, answered, strict=True):
            answers = response.json()["answers"]
            for answer in answers:
                malformed = GREEDY[answer["query"][-1]] not in SENT
                assert answer["fallback"] == ("malformed" if malformed else None)
            kept = [answer for answer in answers if answer["hits"]]
            check_answers(kept, brand_of, [query for query, one in zip(queries, answers, strict=True) if one["hits"]])
        sent = httpx.post(url + "/rewrite", json={"queries": QUERIES}, timeout=300).json()["answers"]
        assert [answer["sent"] for answer in sent] == [SENT[FILTERED], SENT[BOOSTED], *QUERIES[2:]]
    finally:
        end(process)


def test_a_run_whose_retriever_is_a_server(run, shop, model, brand_of, tmp_path, capsys):
    """`serve RECIPE`, `check` and `train` with `remote`, `ask` with other words, and a server that is gone."""
    process, url = started(str(run / "config.yaml"))
    out = tmp_path / "run"
    own = recipe_of(shop, model, out, "retriever.kind=remote", f"retriever.params={{url: '{url}', retries: 0}}")
    try:
        capsys.readouterr()
        assert cli.main(["check", "quickstart", *own]) == 0
        assert "structured queries; filters: brand; boosts: title, text" in capsys.readouterr().out
        assert cli.main(["train", "quickstart", *own]) == 0
        here, there = rows(run / "rollouts.jsonl"), rows(out / "rollouts.jsonl")
        names = ("query", "completion", "action", "malformed", "hits", "ranks", "reward")
        assert [[row[name] for name in names] for row in here] == [[row[name] for name in names] for row in there]
        capsys.readouterr()
        assert cli.main(["ask", str(out), *QUERIES, "--json"]) == 0
        check_answers(list(map(json.loads, capsys.readouterr().out.splitlines())), brand_of)
        policy = Policy.load(out)
    finally:
        end(process)
    # The malformed ones are answered from the cache: their raw queries were asked before.
    with pytest.raises(RetrieverError, match="the retriever failed for 2 of 4 queries"):
        policy.search(QUERIES)
    assert cli.main(["ask", str(out), *QUERIES]) == 2
    said = capsys.readouterr().err
    assert "no retriever answers at" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("raw", "raw query"), ("random", "random"), ("untrained", "untrained"), ("few_shot", "few shot"),
        ("best_of", "best of 2, upper bound"), ("reward_weighted_sft", "reward weighted sft"), ("sft", "sft"),
        ("dpo", "dpo"), ("prompt_search", "prompt search"),
    ],
)  # fmt: skip
def test_baselines(run, shop, model, name, system):
    more = [
        "baselines.samples=2",
        "baselines.search_rollouts=40",
        "baselines.sft.max_steps=1",
        "baselines.dpo.max_steps=1",
    ]
    assert cli.main(["baseline", "quickstart", name, *recipe_of(shop, model, run, *more)]) == 0
    table = json.loads((run / "evaluation" / "test" / "comparison.json").read_text())["tables"][0]["rows"]
    assert system in {row["system"] for row in table}
    if name == "untrained":
        own = rows(run / "evaluation" / "test" / "untrained.jsonl")
        assert [row["completion"] for row in own] == [GREEDY[row["query"][-1]] for row in own]
        assert all(row["action"] == SENT.get(row["completion"]) for row in own)
