"""`rec-r1 serve RUN --policy` over a real socket: every request is answered, if need be with the raw query, marked."""

import asyncio
import dataclasses
import os
import signal
import threading
import time
from contextlib import contextmanager
from functools import partial

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from scripted_policy import load_nothing, load_scripted
from test_endpoint import running, server  # noqa: F401

from rec_r1 import Policy, UserError, config, runs
from rec_r1.environment import open_environment
from rec_r1.policy import recipe_of, service
from rec_r1.policy.completions import by_endpoint, endpoint_of, load_model
from rec_r1.policy.service import Asked, OtherServer, OwnProcess, app, parse
from rec_r1.policy.worker import Worker
from rec_r1.prompts import Format
from retrievers.serving import http_server
from retrievers.serving.http_server import Batcher, RefusedError

PATIENCE_S = 300  # A busy machine takes long to start a process; no test is about that.


@contextmanager
def served(application):
    """The address of an application that runs in a thread."""
    listening = http_server.listen("127.0.0.1", 0)
    runner = uvicorn.Server(http_server.server_config(application))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    runner.should_exit = True
    thread.join()
    listening.close()


def until(holds, what):
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def counts(url, **options):
    """The samples of /metrics: name and labels -> value."""
    text = httpx.get(url + "/metrics", **options).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# ---- Requests


def test_what_a_request_may_hold():
    assert parse(b'{"queries": ["a"]}', False) == Asked(["a"], None, 0)
    assert parse(b'{"queries": ["a"], "k": 3}', True) == Asked(["a"], None, 3)
    assert parse(b'{"histories": [["x", "y"]]}', True) == Asked(None, [["x", "y"]], 10)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b'{"k": 3}', b'{"queries": "a"}', b'{"queries": []}', b'{"queries": [1]}',
        b'{"queries": ["a"], "k": 0}', b'{"queries": ["a"], "k": true}', b'{"queries": ["a"], "more": 1}',
        b'{"histories": [[1]]}', b'{"queries": ["half \\ud83d"]}',
        b'{"queries": ["' + b"a" * 70_000 + b'"]}', b"[" * 100_000,
        b'{"queries": [' + b'"a",' * 256 + b'"a"]}',
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_answered_says_what_to_send(body):
    with pytest.raises(RefusedError, match=r'^send {"queries": \[text, …\], "k": 10}') as error:
        parse(body, True)
    assert error.value.status == 400 and len(str(error.value)) < 500


def test_who_waits_no_longer_is_not_asked_for():
    calls = []

    def call(asked):
        calls.append(asked)
        time.sleep(0.05)
        return asked

    async def main():
        batcher = Batcher(call, 2, 0.0)
        async with batcher.running():
            first = asyncio.create_task(batcher.ask("first", 2))
            await asyncio.sleep(0.01)  # its call is under way
            gone, kept = (asyncio.create_task(batcher.ask(name, 1)) for name in ("gone", "kept"))
            await asyncio.sleep(0)
            gone.cancel()
            assert (await first, await kept) == ("first", "kept")

    asyncio.run(main())
    assert calls == [["first"], ["kept"]]


# ---- The process, with a scripted generation


@pytest.fixture(scope="module")
def env():
    return open_environment(config.load("quickstart"))


@contextmanager
def scripted_service(env, timeout_s=PATIENCE_S, stuck_s=PATIENCE_S, token=None):
    worker = Worker(load_scripted, stuck_s=stuck_s, first_pause_s=0.05)
    worker.start()
    worker.wait()
    policy = Policy(config.load("quickstart"), env, worker.write)
    about = {"run": "runs/x", "task": "emoji", "retriever": "bm25", "documents": 1854}
    with served(app(policy, OwnProcess(worker, 64, 2.0), timeout_s, token, about)) as url:
        yield url, worker


def rewrite(url, *queries):
    return httpx.post(url + "/rewrite", json={"queries": queries}, timeout=PATIENCE_S)


@pytest.mark.slow
def test_a_malformed_completion_sends_the_raw_query(env):
    with scripted_service(env) as (url, _):
        good, bad = rewrite(url, "birthday", "blank").json()["answers"]
        raw = " ".join(["birthday"] * 10)  # format.repeat of the quickstart
        assert good == {"query": "birthday", "completion": "party popper", "sent": f"{raw} party popper",
                        "fallback": None}  # fmt: skip
        assert bad == {"query": "blank", "completion": "", "sent": "blank", "fallback": "malformed"}
        found = httpx.post(url + "/search", json={"queries": ["birthday", "blank"], "k": 4}, timeout=PATIENCE_S)
        for answer, sent in zip(found.json()["answers"], (f"{raw} party popper", "blank"), strict=True):
            query = env.task.test.raw()[0]._replace(text=sent)
            rows = [int(row) for row in env.retriever.search([query], 4).rows[0] if row >= 0]
            ids = [env.task.catalog.ids[row] for row in rows]
            assert [(hit["id"], hit["rank"]) for hit in answer["hits"]] == list(zip(ids, range(1, 5), strict=False))
        seen = counts(url)
        assert seen["rec_r1_queries_total",] == 4 and seen["rec_r1_fallbacks_total", "malformed"] == 2
        assert seen["rec_r1_fallbacks_total", "down"] == seen["rec_r1_fallbacks_total", "timeout"] == 0
        assert seen["rec_r1_requests_total", "/rewrite", "200"] == seen["rec_r1_requests_total", "/search", "200"] == 1
        assert seen["rec_r1_request_seconds_count", "/search"] == 1 and seen["rec_r1_policy_up",] == 1


@pytest.mark.slow
def test_a_refused_prompt_fails_its_own_request_alone(env):
    with scripted_service(env) as (url, worker):

        async def both():
            async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
                asked = [client.post(url + "/rewrite", json={"queries": [q]}) for q in ("too long", "birthday") * 5]
                return await asyncio.gather(*asked)

        responses = asyncio.run(both())
        assert [response.status_code for response in responses] == [400, 200] * 5
        assert responses[0].json() == {"error": "query 'too long': shorten it"}
        assert all(response.json()["answers"][0]["fallback"] is None for response in responses[1::2])
        assert worker.restarts == 0


@pytest.mark.slow
def test_a_process_that_dies_is_restarted_and_meanwhile_raw_queries_are_sent(env):
    with scripted_service(env) as (url, worker):
        assert rewrite(url, "die", "birthday").json()["answers"] == [
            {"query": query, "completion": None, "sent": query, "fallback": "down"} for query in ("die", "birthday")
        ]
        until(lambda: httpx.get(url + "/health").json()["status"] == "ok" and worker.restarts, "it is not restarted")
        assert rewrite(url, "birthday").json()["answers"][0]["fallback"] is None
        assert httpx.get(url + "/health").json() == {
            "status": "ok", "policy": "ready", "reason": "", "restarts": 1, "run": "runs/x", "task": "emoji",
            "retriever": "bm25", "documents": 1854,
        }  # fmt: skip
        worker.load = load_nothing  # the next process finds no weights
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda: "no such model" in httpx.get(url + "/health").json()["reason"], "the failure is not told")
        health = httpx.get(url + "/health").json()
        assert health["status"] == "degraded" and health["policy"] in ("down", "loading")
        assert rewrite(url, "birthday").json()["answers"][0]["fallback"] == "down"
        assert counts(url)["rec_r1_policy_up",] == 0
        worker.load = load_scripted
        until(lambda: httpx.get(url + "/health").json()["status"] == "ok", "it does not come back")


@pytest.mark.slow
def test_a_process_that_hangs_times_out_and_is_killed(env):
    with scripted_service(env, timeout_s=0.5, stuck_s=2.0) as (url, worker):
        hung = worker.pid
        assert rewrite(url, "hang").json()["answers"][0] == {
            "query": "hang", "completion": None, "sent": "hang", "fallback": "timeout"
        }  # fmt: skip
        until(lambda: worker.restarts and worker.state == "ready" and worker.pid != hung, "it is not restarted")
        until(lambda: rewrite(url, "birthday").json()["answers"][0]["fallback"] is None, "it does not come back")
        assert counts(url)["rec_r1_fallbacks_total", "timeout"] >= 1


@pytest.mark.slow
def test_the_token_opens_every_path(env):
    with scripted_service(env, token="s3cret") as (url, _):
        for key, status in (("", 401), ("Bearer wrong", 401), ("Bearer s3cret", 200)):
            headers = {"authorization": key}
            for path in ("/health", "/metrics"):
                assert httpx.get(url + path, headers=headers).status_code == status
            for path in ("/rewrite", "/search"):
                body = {"queries": ["rain"]}
                assert httpx.post(url + path, json=body, headers=headers, timeout=PATIENCE_S).status_code == status


@pytest.mark.slow
def test_a_policy_that_does_not_load_is_refused_at_the_start():
    worker = Worker(load_nothing)
    worker.start()
    with pytest.raises(UserError, match=r"model\.name: no such model"):
        worker.wait()
    worker.stop()


# ---- Another server


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_another_server_completes_or_is_down(env, server, chat):  # noqa: F811
    recipe = config.load("quickstart", [f"format.chat={chat}"])
    env = dataclasses.replace(env, format=Format(recipe.format))
    endpoint = endpoint_of(recipe, server.url, "mine", timeout_s=30.0, retries=0)
    write = by_endpoint(recipe, endpoint)
    with served(app(Policy(recipe, env, write), OtherServer(write), PATIENCE_S, None, {})) as url:
        (answer,) = rewrite(url, "rain").json()["answers"]
        ((path, _, body),) = server.seen
        assert path == ("/v1/chat/completions" if chat else "/v1/completions")
        asked = env.format.prompt("rain")
        assert body["messages" if chat else "prompt"] == asked
        wrote = (asked[-1]["content"] if chat else asked).upper()
        assert answer["completion"] == wrote.partition("\n")[0] + "\n" and answer["fallback"] is None
        server.play = lambda number, body: failing()
        assert rewrite(url, "rain").json()["answers"][0]["fallback"] == "down"
        health = httpx.get(url + "/health").json()
        assert health["status"] == "degraded" and "status 500" in health["reason"]
        server.play = lambda number, body: None
        assert rewrite(url, "rain").json()["answers"][0]["fallback"] is None
        assert httpx.get(url + "/health").json()["status"] == "ok"
        server.play = lambda number, body: refusing()  # A prompt that is too long says nothing about the others.
        refused = rewrite(url, "snow")
        assert refused.status_code == 400 and "maximum context length" in refused.text
        assert httpx.get(url + "/health").json()["status"] == "ok"


def failing():
    from starlette.responses import JSONResponse

    return JSONResponse({"error": "out of memory"}, 500)


def refusing():
    from starlette.responses import JSONResponse

    return JSONResponse({"error": {"message": "the maximum context length is 2048 tokens"}}, 400)


# ---- A real run


def test_what_cannot_be_served_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delenv("REC_R1_TOKEN", raising=False)
    for host in ("0.0.0.0", "192.168.1.4", "example.org"):
        with pytest.raises(UserError, match=r"set \$REC_R1_TOKEN to a secret"):
            service.serve(tmp_path, [], host, 0, 2.0, 5.0)
    with pytest.raises(UserError, match="not a run"):
        service.serve(tmp_path, [], "127.0.0.1", 0, 2.0, 5.0)
    with pytest.raises(UserError, match="a policy is served with the settings of its run"):
        service.serve(tmp_path, ["retriever.kind=bm25"], "127.0.0.1", 0, 2.0, 5.0)
    with pytest.raises(UserError, match="--timeout 0: give a number of seconds above 0"):
        service.serve(tmp_path, [], "127.0.0.1", 0, 2.0, 0.0)
    with pytest.raises(UserError, match="--endpoint and --model belong together"):
        service.serve(tmp_path, [], "127.0.0.1", 0, 2.0, 5.0, "http://localhost:1/v1")


@pytest.mark.slow
def test_no_request_is_lost_when_the_process_is_killed(lora_run):
    recipe = recipe_of(lora_run)
    load = partial(load_model, recipe, runs.model_source(lora_run, recipe), runs.best_policy(lora_run))
    worker = Worker(load, first_pause_s=0.05)
    worker.start()
    policy = Policy(recipe, open_environment(recipe), worker.write)
    worker.wait()
    queries = [f"query {number}" for number in range(200)]

    async def all_at_once(url):
        async with httpx.AsyncClient(timeout=PATIENCE_S, limits=httpx.Limits(max_connections=None)) as client:
            sent = [asyncio.create_task(client.post(url + "/rewrite", json={"queries": [q]})) for q in queries]
            await asyncio.wait(sent, return_when=asyncio.FIRST_COMPLETED)
            os.kill(worker.pid, signal.SIGKILL)
            return await asyncio.gather(*sent)

    with served(app(policy, OwnProcess(worker, 8, 2.0), PATIENCE_S, None, {})) as url:
        responses = asyncio.run(all_at_once(url))
        assert [response.status_code for response in responses] == [200] * 200
        answers = [response.json()["answers"] for response in responses]
        assert [[answer["query"] for answer in each] for each in answers] == [[query] for query in queries]
        marks = [answer["fallback"] for (answer,) in answers]
        assert marks.count("down") > 0 and len(marks) - marks.count("down") > 0
        for (answer,) in answers:
            if answer["fallback"] == "down":
                assert answer["sent"] == answer["query"] and answer["completion"] is None
        until(lambda: httpx.get(url + "/health").json()["status"] == "ok", "the policy does not come back")
        assert httpx.get(url + "/health").json()["restarts"] == 1
        again = [answer["completion"] for answer in rewrite(url, *queries[:3]).json()["answers"]]
        assert again == Policy.load(lora_run).complete(queries[:3])
        assert counts(url)["rec_r1_fallbacks_total", "down"] == marks.count("down")
