"""Answers of an endpoint over a real socket: order, cache, retries, refusals, costs, and where the key goes."""

import asyncio
import importlib.util
import json
import logging
import os
import signal
import socket
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from rec_r1.config import UserError
from rec_r1.generation import endpoint as module
from rec_r1.generation.endpoint import Endpoint, answers
from retrievers.core.requests import retry_after
from retrievers.serving.http_server import listen

KEY = "sk-very-secret-0123456789"


class Server:
    """An endpoint that answers a prompt with its capitals, and each request as ``play(number, body)`` says."""

    def __init__(self):
        self.play = lambda number, body: None  # None = the usual answer; else a response, or an awaitable of one
        self.seen, self.busy, self.most_busy = [], 0, 0
        routes = [Route(f"/v1/{path}", self.answer, methods=["POST"]) for path in ("chat/completions", "completions")]
        listening = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    async def answer(self, request):
        body = await request.json()
        self.seen.append((request.url.path, request.headers.get("authorization"), body))
        self.busy += 1
        self.most_busy = max(self.busy, self.most_busy)
        try:
            played = self.play(len(self.seen), body)
            if asyncio.iscoroutine(played):
                played = await played
            return played or usual(body)
        finally:
            self.busy -= 1

    def stop(self):
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()


def usual(body, content="", **fields):
    """The completion object that vLLM and OpenAI send: 10 tokens of prompt, 3 of completion."""
    text = content if content != "" else (body.get("prompt") or body["messages"][-1]["content"]).upper()
    choice = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    return ascii_({"choices": [choice | {"finish_reason": "stop"}], "usage": usage} | fields)


def ascii_(value):
    """A JSON response in which half a character passes, as it does from many a server."""
    return Response(json.dumps(value), media_type="application/json")


def says(status, message="", **headers):
    return JSONResponse({"error": {"message": message}}, status, {k.replace("_", "-"): v for k, v in headers.items()})


async def later(seconds):
    await asyncio.sleep(seconds)


@pytest.fixture(scope="module")
def running():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(module, "BACKOFF_S", 0.005)
    running.play, running.most_busy = lambda number, body: None, 0
    running.seen.clear()
    return running


def chat(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def at(server, **options):
    return Endpoint(server.url, "m1", **options)


def test_order_distinct_requests_and_the_cache(server, tmp_path):
    words = ["a", "b", "a", "c", "b", *map(str, range(20))]
    got, usage = answers(chat(*words), at(server), tmp_path / "deep" / "cache", progress="asking")
    assert got == [word.upper() for word in words]
    assert (usage.requests, usage.cached, len(server.seen)) == (23, 0, 23)
    again, usage = answers(chat(*words, "new"), at(server), tmp_path / "deep" / "cache")
    assert again == [*got, "NEW"]
    assert (usage.requests, usage.cached, len(server.seen)) == (1, 23, 24)
    assert (usage.prompt_tokens, usage.completion_tokens) == (240, 72)
    assert usage.dollars is usage.dollars_all is None and usage.seconds > 0


def test_another_request_is_another_answer(server, tmp_path):
    one = at(server)
    others = [
        Endpoint(server.url, "m2"),
        at(server, max_tokens=9),
        at(server, extra={"seed": 1}),
        at(server, top_p=0.9),
    ]
    for there in (one, *others):
        assert answers(chat("a"), there, tmp_path)[1].requests == 1
    for there in (one, at(server, concurrency=1, timeout_s=9.0, retries=0)):  # how it is asked changes no answer
        assert answers(chat("a"), there, tmp_path)[1].requests == 0


def test_no_cache_and_no_prompts(server):
    assert answers(chat("a"), at(server), None)[1].requests == 1
    assert answers(chat("a"), at(server), None)[1].requests == 1
    got, usage = answers([], at(server, dollars_per_million=(1, 1)), None)
    assert got == [] and (usage.requests, usage.prompt_tokens, usage.dollars) == (0, 0, 0.0)


def test_what_is_sent(server):
    there = Endpoint(server.url + "/", "m1", extra={"max_tokens": None, "max_completion_tokens": 7, "temperature": 1})
    prompts = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "tea ☕ \ud83d"}], "go on: "]
    assert answers(prompts, there, None)[0] == ["TEA ☕ ?", "GO ON: "]
    common = {"model": "m1", "max_completion_tokens": 7, "temperature": 1}
    sent = {path: body for path, _, body in server.seen}
    assert sent == {
        "/v1/chat/completions": common | {"messages": prompts[0]},
        "/v1/completions": common | {"prompt": prompts[1]},
    }


def test_the_key_goes_into_the_header_and_nowhere_else(server, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    there = at(server)
    server.play = lambda number, body: says(429, f"slow down, {KEY}", retry_after="0") if number == 1 else None
    answers(chat("a", "b"), there, tmp_path)
    assert {key for _, key, _ in server.seen} == {f"Bearer {KEY}"}
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in kept and b"sk-very" not in kept and len(kept) > 0
    server.play = lambda number, body: says(401, "x" * 290 + f" bad key {KEY}")  # cut in the middle of the key
    with pytest.raises(UserError) as error:
        answers(chat("c"), there, tmp_path)
    assert "sk-very" not in str(error.value) + caplog.text + repr(there)
    assert "slow down, $OPENAI_API_KEY" in caplog.text and "trying again" in caplog.text
    monkeypatch.delenv("OPENAI_API_KEY")
    server.play = lambda number, body: None
    answers(chat("d"), there, tmp_path)
    assert server.seen[-1][1] is None
    monkeypatch.setenv("VENDOR", KEY + "\n")  # as `export VENDOR="$(cat file)"` never makes it, but a .env file does
    answers(chat("e"), at(server, key_variable="VENDOR"), tmp_path)
    assert server.seen[-1][1] == f"Bearer {KEY}"
    monkeypatch.setenv("VENDOR", KEY + " and\nmore")
    with pytest.raises(UserError, match=r"^\$VENDOR holds an invalid character") as error:
        answers(chat("f"), at(server, key_variable="VENDOR"), tmp_path)
    assert "sk-very" not in str(error.value)


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_what_passes_is_tried_again(server, code):
    server.play = lambda number, body: says(code, "busy", retry_after="0") if number <= 2 else None
    assert answers(chat("a"), at(server, retries=2), None)[0] == ["A"]
    assert len(server.seen) == 3


def test_retry_after_is_honoured(server):
    server.play = lambda number, body: says(429, retry_after="0.2") if number == 1 else None
    _, usage = answers(chat("a"), at(server), None)
    assert 0.2 <= usage.seconds < 2
    server.play = lambda number, body: says(429, "out of quota", retry_after="86400")
    with pytest.raises(UserError, match="out of quota: the server asks for a pause of 86400 s: run again later"):
        answers(chat("a"), at(server), None)


def test_retry_after_holds_seconds_or_a_date():
    assert [retry_after(value) for value in ("", "soon", "nan", "inf")] == [None] * 4
    assert [retry_after(value) for value in ("0", "1.5", "-3", formatdate(0, usegmt=True))] == [0, 1.5, 0, 0]
    assert 55 < retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60


def test_a_lasting_failure_says_where_the_answers_are(server, tmp_path):
    server.play = lambda number, body: says(500, "out of memory") if body["messages"][0]["content"] == "bad" else None
    with pytest.raises(UserError) as error:
        answers(chat("a", "b", "bad"), at(server, retries=2, concurrency=1), tmp_path)
    assert str(error.value) == (
        f"endpoint {server.url}/chat/completions: status 500: out of memory (3 attempts): "
        f"run again later (the completions so far are kept in {tmp_path})"
    )
    assert len(server.seen) == 5
    server.play = lambda number, body: None
    assert answers(chat("a", "b", "bad"), at(server), tmp_path)[1].cached == 2


def test_nobody_there_and_too_slow(server, tmp_path):
    with socket.socket() as bound:  # bound, but nobody listens
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=r"ConnectError.*2 attempts"):
            answers(chat("a"), Endpoint(f"http://127.0.0.1:{bound.getsockname()[1]}/v1", "m", retries=1), tmp_path)
    server.play = lambda number, body: later(0.3) if number == 1 else None
    assert answers(chat("a"), at(server, timeout_s=0.15), tmp_path)[0] == ["A"]
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (says(401, "no such key"), "status 401: no such key: check the key in $OPENAI_API_KEY"),
        (says(403, "not yours"), "status 403: not yours: check the key in $OPENAI_API_KEY"),
        (says(404, "no model m1"), "status 404: no model m1: check the model's name ('m1'), the url (it usually ends"),
        (JSONResponse({"detail": [{"msg": "max_tokens"}]}, 422), "status 422: [{'msg': 'max_tokens'}]: check the"),
        (JSONResponse({"error": "two\nlines \x1b[31m"}, 400), "status 400: two lines: check the model's name"),
        (says(400, "y" * 999), f"status 400: {'y' * 300}: check the model's name"),
        (RedirectResponse("http://elsewhere.invalid/"), "status 307: no completion: check the url"),
        (PlainTextResponse("<h1>Welcome</h1>"), "status 200: <h1>Welcome</h1>: check the url, which usually ends"),
        (JSONResponse({"choices": []}), 'status 200: {"choices":[]}: check the url, which usually ends with /v1'),
    ],
)
def test_a_refusal_stops_at_once(server, response, message):
    server.play = lambda number, body: response
    with pytest.raises(UserError) as error:
        answers(chat("a", "b", "c"), at(server, concurrency=1), None)
    assert str(error.value).startswith(f"endpoint {server.url}/chat/completions: {message}")
    assert "\n" not in str(error.value) and len(server.seen) == 1


def test_a_missing_key_is_named(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server.play = lambda number, body: says(401, "who are you")
    with pytest.raises(UserError, match=r"check the key in \$OPENAI_API_KEY, which is not set$"):
        answers(chat("a"), at(server), None)


def test_an_error_inside_a_200_is_tried_again(server):
    server.play = lambda number, body: says(200, "upstream is busy") if number == 1 else None
    assert answers(chat("a"), at(server), None)[0] == ["A"]


def test_ctrl_c_keeps_what_arrived_and_what_is_under_way(server, tmp_path):
    def play(number, body):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
            return later(0.1)

    server.play = play
    prompts = chat(*"abcdefgh")
    with pytest.raises(KeyboardInterrupt):
        answers(prompts, at(server, concurrency=1), tmp_path)
    assert len(server.seen) == 3
    got, usage = answers(prompts, at(server), tmp_path)
    assert got == list("ABCDEFGH") and (usage.cached, usage.requests) == (3, 5)


def test_ctrl_c_does_not_wait_for_the_pause(server, monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_S", 30.0)

    def play(number, body):
        if number == 2:  # both requests have failed once and wait soon
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        return says(503)

    server.play = play
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        answers(chat("a", "b"), at(server), None)
    assert time.monotonic() - started < 3 and len(server.seen) == 2


def test_as_many_at_a_time_as_told(server):
    server.play = lambda number, body: later(0.03)
    answers(chat(*"abcdefghijkl"), at(server, concurrency=4), None)
    assert server.most_busy == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ([{"type": "thinking", "thinking": []}, {"type": "text", "text": "te"}, {"type": "text", "text": "a"}], "tea"),
        ("half \ud83d", "half ?"),
        ("cut of", "cut of"),
    ],
)
def test_what_the_model_writes_is_its_answer(server, tmp_path, content, text):
    message = {"role": "assistant", "content": content, "reasoning_content": "let me think"}
    usage = {"prompt_tokens": 10, "completion_tokens": 512}
    raw = {"choices": [{"message": message, "finish_reason": "length"}], "usage": usage}
    server.play = lambda number, body: ascii_(raw)
    for requests in (1, 0):
        got, used = answers(chat("a"), at(server), tmp_path)
        assert got == [text] and used.requests == requests and used.completion_tokens == 512


def test_costs(server, tmp_path):
    there = at(server, dollars_per_million=(2.0, 5.0))
    _, usage = answers(chat("a", "b"), there, tmp_path)
    each = (10 * 2.0 + 3 * 5.0) / 1e6
    assert usage.dollars == usage.dollars_all == pytest.approx(2 * each)
    _, usage = answers(chat("a", "b", "c", "c"), there, tmp_path)
    assert usage.dollars == pytest.approx(each) and usage.dollars_all == pytest.approx(3 * each)
    _, usage = answers(chat("a"), at(server), tmp_path)  # prices are no part of the request
    assert usage.requests == 0 and usage.dollars is usage.dollars_all is None
    server.play = lambda number, body: usual(body, usage=None)
    _, usage = answers(chat("a", "silent"), there, tmp_path)
    assert (usage.prompt_tokens, usage.completion_tokens) == (10, 3) and usage.dollars is usage.dollars_all is None
    _, usage = answers(chat("a", "silent"), there, tmp_path)
    assert usage.dollars == 0.0 and usage.dollars_all is None


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"url": "localhost:8000/v1"}, "url"),
        ({"url": f"http://me:{KEY}@host/v1"}, "url"),
        ({"url": f"http://host/v1?key={KEY}"}, "url"),
        ({"url": "http://host/v1/chat/completions"}, "url"),
        ({"url": "http://host:port/v1"}, "url"),
        ({"model": ""}, "model"),
        ({"key_variable": KEY}, "key_variable"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"extra": {"stream": True}}, "extra"),
        ({"extra": {"x": float("inf")}}, "extra"),
        ({"extra": [{}]}, "extra"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"retries": -1}, "retries"),
        ({"dollars_per_million": (1,)}, "dollars_per_million"),
        ({"dollars_per_million": (1, -1)}, "dollars_per_million"),
    ],
)
def test_values_that_cannot_be(options, field):
    with pytest.raises(UserError, match=rf"^endpoint\.{field} must be ") as error:
        Endpoint(**{"url": "http://host/v1", "model": "m"} | options)
    assert KEY not in str(error.value)


def test_an_address_that_is_none():
    with pytest.raises(UserError, match="not a valid address"):
        answers(["a"], Endpoint(f"http://{'a' * 70}.invalid/v1", "m"), None)


@pytest.mark.parametrize("name", ["httpx", "tenacity", "diskcache"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else real(n, *a))
    with pytest.raises(UserError, match=rf"the package {name} is not installed: pip install 'rec-r1\[endpoint\]'"):
        answers([], Endpoint("http://localhost:1/v1", "m"), tmp_path)


def test_a_cache_that_does_not_work_is_named(server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cache.db").write_bytes(b"not a database" * 100)
    for name in ("file", "broken"):
        with pytest.raises(UserError, match=rf"^cache .*{name} does not work .*: free disk space, or choose another"):
            answers(chat("a"), at(server), Path(tmp_path / name))
    assert not server.seen
