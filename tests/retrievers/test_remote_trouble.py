"""Gateways and servers with invalid answers. They count as outages, and never as a wrong rank or a traceback."""

import json
import logging
import socket
import threading
import time

import httpx
import numpy as np
import pytest
from serving import start
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

import retrievers
from retrievers import Catalog, Query, RetrieverError
from retrievers.core.requests import OutageError
from retrievers.serving import server
from retrievers.serving.answers import read_hits, read_ranks

CATALOG = Catalog.from_records({"id": str(i), "text": f"party {i}"} for i in range(9))
BM25 = retrievers.open("bm25", CATALOG)
QUERIES = [Query("party 3"), Query("party 4")]
TARGETS = np.array([[3, 4], [4, -1]])
GOOD = {"ranks": BM25.ranks(QUERIES, TARGETS).tolist()}

# Answers to /ranks for these two queries, and the error of each.
ODD_RANKS = [
    ({"ranks": [[1.0, 2.0], [1, 0]]}, "table of int"),
    ({"ranks": [["1", 2], [1, 0]]}, "table of int"),
    ({"ranks": [[True, 2], [1, 0]]}, "table of int"),
    ({"ranks": [[None, 2], [1, 0]]}, "table of int"),
    ({"ranks": [[1, 2]]}, "table of int"),
    ({"ranks": [[1, 2, 3], [1, 0, 0]]}, "table of int"),
    ({"ranks": [[1, 2], [1, 0], [1, 0]]}, "table of int"),
    ({"ranks": "1200"}, "table of int"),
    ({"ranks": {"0": [1, 2], "1": [1, 0]}}, "table of int"),
    ({"ranks": [1, 2, 1, 0]}, "table of int"),
    ({"rank": [[1, 2], [1, 0]]}, "table of int"),
    ({}, "table of int"),
    ({"ranks": [[1, 10], [1, 0]]}, "rank of 10 among 9"),
    ({"ranks": [[1, -2], [1, 0]]}, "rank of -2"),
    ({"ranks": [[1, -1], [1, 0]]}, "rank of -1"),
    ({"ranks": [[10**30, 2], [1, 0]]}, "rank of 1000"),
    ({"ranks": [[2, 2], [1, 0]]}, "two documents at rank 2"),
    ({"ranks": [[1, 2], [1, 1]]}, "rank of 1 among"),  # Padding has no rank.
]


@pytest.mark.parametrize(("answer", "message"), ODD_RANKS)
def test_ranks_that_cannot_be_are_an_outage(answer, message):
    with pytest.raises(OutageError, match=message):
        read_ranks(answer, TARGETS, 9)


def test_ranks_that_can_be_are_read():
    assert read_ranks(GOOD, TARGETS, 9).tolist() == GOOD["ranks"]
    assert read_ranks({"ranks": [[-1, -1], [1, 0]]}, TARGETS, 9).tolist() == [[-1, -1], [1, 0]]
    assert read_ranks({"ranks": [[0, 0], [0, 0]]}, TARGETS, 9).tolist() == [[0, 0], [0, 0]]
    assert read_ranks({"ranks": [[2, 2]]}, np.array([[3, 3]]), 9).tolist() == [[2, 2]]  # A repeated target.
    with pytest.raises(OutageError, match="one at two ranks"):
        read_ranks({"ranks": [[2, 3]]}, np.array([[3, 3]]), 9)
    assert read_ranks({"ranks": [[], []]}, np.zeros((2, 0), int), 9).shape == (2, 0)
    assert read_ranks({"ranks": []}, np.zeros((0, 3), int), 9).shape == (0, 3)


@pytest.mark.parametrize(
    ("rows", "scores", "message"),
    [
        ([[1, 2, -1]], [[2.0, float("nan"), 0.0]], "not finite"),
        ([[1, 2, -1]], [[float("inf"), 1.0, 0.0]], "not finite"),
        ([[1, 2, -1]], [[1e39, 1.0, 0.0]], "not finite"),
        ([[1, 2, -1]], [[10**400, 1.0, 0.0]], "not finite"),
        ([[1, 2, -1]], [[1.0, 2.0, 0.0]], "not in descending order"),
        ([[1, 1, -1]], [[2.0, 1.0, 0.0]], "a document twice"),
        ([[1, 9, -1]], [[2.0, 1.0, 0.0]], "outside a catalogue of 9"),
        ([[1, -2, -1]], [[2.0, 1.0, 0.0]], "outside a catalogue of 9"),
        ([[1, -1, 2]], [[2.0, 1.0, 0.0]], "-1 before a row"),
        ([[1.0, 2, -1]], [[2.0, 1.0, 0.0]], "table of int"),
        ([[1, 2, -1]], [["2", 1.0, 0.0]], "table of int or float"),
        ([[1, 2, -1]], [[True, 0, 0.0]], "table of int or float"),
        ([[1, 2, 3, 4]], [[4.0, 3.0, 2.0, 1.0]], "table of int"),
        ([[1, 2, -1], [1, 2, -1]], [[2.0, 1.0, 0.0]] * 2, "table of int"),
        (None, None, "table of int"),
    ],
)
def test_hits_that_cannot_be_are_an_outage(rows, scores, message):
    with pytest.raises(OutageError, match=message):
        read_hits({"rows": rows, "scores": scores}, 1, 3, 9)


def test_hits_that_can_be_are_read():
    hits = read_hits({"rows": [[1, 2, -1]], "scores": [[2, 2.0, 0.0]]}, 1, 3, 9)
    assert hits.rows.tolist() == [[1, 2, -1]] and hits.scores.tolist() == [[2.0, 2.0, -np.inf]]
    beside_nothing = read_hits({"rows": [[0, -1, -1]], "scores": [[1, 10**400, float("nan")]]}, 1, 3, 9)
    assert beside_nothing.scores.tolist() == [[1.0, -np.inf, -np.inf]]  # The score of a row -1 is not read.


class Gateway:
    """A gateway in front of a real server. It gives the answers in ``play`` in place of the server's, so many times."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.play, self.times, self.asked = None, 0, 0
        self.health = {
            "status": "ok", "kind": "bm25", "fingerprint": "f", "catalog": CATALOG.fingerprint, "documents": 9,
            "reads_text": True, "fitted_on": [],
        }  # fmt: skip

    def app(self):
        async def answer(request):
            self.asked += 1
            if self.play is not None and self.asked <= self.times:
                return self.play()
            return JSONResponse(self.health if request.url.path == "/health" else GOOD)

        return Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])


@pytest.fixture(scope="module")
def running_gateway():
    gateway = Gateway()
    gateway.url, stop = start(gateway.app())
    yield gateway
    stop()


@pytest.fixture
def gateway(running_gateway):
    running_gateway.reset()
    return running_gateway


def connect(gateway, **params):
    remote = retrievers.open("remote", CATALOG, url=gateway.url, **{"retries": 2, "breaker_seconds": 0.2} | params)
    gateway.asked = 0
    return remote


def test_what_a_server_says_is_shown_as_one_printable_line(gateway):
    gateway.health |= {"catalog": "\x1b[2Jother\n\u202e", "documents": "9\x07\n9"}
    with pytest.raises(RetrieverError, match="another catalogue") as caught:
        connect(gateway)
    assert str(caught.value).isprintable()
    gateway.play, gateway.times = lambda: JSONResponse({"error": "bad\x1b[31m\nrequest\x9b"}, 400), 9
    with pytest.raises(RetrieverError, match="bad") as caught:
        connect(gateway)
    assert str(caught.value).isprintable()


def odd(code, headers=None):
    return lambda: Response("<html>\x1b[31mbusy</html>", code, headers)


TROUBLE = {
    "302": lambda: RedirectResponse("/login"),
    "429": odd(429, {"retry-after": "0.1"}),
    "429 for an hour": odd(429, {"retry-after": "3600"}),
    "page with 200": lambda: PlainTextResponse("<html>redeploying</html>"),
    "list with 200": lambda: JSONResponse([1]),
    "deep": lambda: PlainTextResponse("[" * 100_000),
    "400 of a gateway": odd(400),
    "409 of a gateway": odd(409),
    "500 with a word": lambda: JSONResponse({"error": {"fatal": True}, "fatal": "yes"}, 500),
    "equal ranks": lambda: JSONResponse({"ranks": [[2, 2], [1, 0]]}),
    **{str(code): odd(code) for code in (301, 307, 308, 404, 405, 408, 410, 418, 421, 425, 500, 502, 503, 504, 524)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TROUBLE)
def test_what_is_no_answer_is_waited_out(gateway, name, no_pauses):
    remote = connect(gateway)
    gateway.play, gateway.times = TROUBLE[name], 2
    assert remote.ranks(QUERIES, TARGETS).tolist() == GOOD["ranks"] and gateway.asked == 3
    gateway.asked, gateway.times = 0, 99
    with pytest.raises(OutageError):
        remote.ranks(QUERIES, TARGETS)
    assert gateway.asked == 3
    asked_for = {"429": 0.1, "429 for an hour": 0.2}.get(name, 0)  # An hour is cut to the seconds of the breaker.
    assert len(no_pauses) == 4 and min(no_pauses) >= asked_for and max(no_pauses) < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["302", "404", "429", "503", "page with 200", "list with 200", "deep"])
def test_at_the_start_it_is_one_clear_line(gateway, name):
    gateway.play, gateway.times = TROUBLE[name], 99
    with pytest.raises(
        RetrieverError, match=r"no retriever answers at .*start one with `rec-r1 serve RECIPE`"
    ) as error:
        connect(gateway)
    assert "\n" not in str(error.value) and gateway.asked == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"fingerprint": 3}, {"reads_text": "false"}, {"fitted_on": "abc"}, {"fitted_on": [1]}, {"fitted_on": None}],
)
def test_a_handshake_of_other_types_is_refused(gateway, change):
    gateway.health |= change
    with pytest.raises(RetrieverError, match="is no `rec-r1 serve`"):
        connect(gateway)


@pytest.mark.slow
def test_what_the_server_refuses_is_not_tried_again(gateway):
    remote = connect(gateway)
    for code, said in ((400, "send something else"), (409, "another index"), (401, "wrong")):
        gateway.asked, gateway.times = 0, 99
        gateway.play = lambda code=code, said=said: JSONResponse({"error": said}, code)
        with pytest.raises(RetrieverError):
            remote.ranks(QUERIES, TARGETS)
        assert gateway.asked == 1


@pytest.mark.slow
def test_a_token_that_no_header_takes_is_named_not_shown(monkeypatch, gateway):
    monkeypatch.setenv("REC_R1_TOKEN", "s3cret\nx")
    with pytest.raises(RetrieverError, match=r"\$REC_R1_TOKEN has a character that a token cannot have") as error:
        connect(gateway)
    assert "s3cret" not in str(error.value)


def closed_within(connection, seconds) -> bool:
    connection.settimeout(seconds)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.fixture(scope="module")
def impatient():
    application = server.app(BM25, "bm25", CATALOG.fingerprint, 9, body_s=0.3)
    url, stop = start(application, headers_s=0.3)
    yield url
    stop()


def open_socket(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /ranks HT", *(b"POST /ranks HTTP/1.1\r\nhost: a\r\nx: " + b"a" * size for size in (0, 200_000))],
)
def test_headers_that_never_end_are_given_up(impatient, sent):
    with open_socket(impatient) as connection:
        connection.sendall(sent)
        assert closed_within(connection, 10)


@pytest.mark.slow
def test_a_second_request_that_never_ends_is_given_up(impatient):
    with open_socket(impatient) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        assert b"200 OK" in connection.recv(4096)
        connection.sendall(b"GET /hea")
        stop = time.monotonic() + 3
        dripping = threading.Thread(target=drip, args=(connection, stop))
        dripping.start()
        assert closed_within(connection, 10)
        dripping.join()


def drip(connection, stop):
    while time.monotonic() < stop:
        try:
            connection.send(b"x")
        except OSError:
            return
        time.sleep(0.05)


@pytest.mark.slow
def test_a_body_that_never_ends_is_given_up(impatient):
    with open_socket(impatient) as connection:
        connection.sendall(b"POST /ranks HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n{")
        connection.settimeout(10)
        assert b" 408 " in connection.recv(4096).split(b"\r\n")[0] + b" "
        assert closed_within(connection, 10)


@pytest.mark.slow
def test_an_upload_that_is_broken_off_logs_nothing(impatient, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(5):
        connection = open_socket(impatient)
        connection.sendall(b"POST /ranks HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n{")
        time.sleep(0.05)
        connection.close()
    time.sleep(0.3)
    assert httpx.get(impatient + "/health").status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]


@pytest.mark.slow
def test_idle_clients_are_served_on(impatient):
    with httpx.Client(base_url=impatient) as client:
        for pause in (0, 0.5, 0.5):  # Longer than the headers of a request may take.
            time.sleep(pause)
            body = {"queries": [["party 3", [], []]], "targets": [[3]]}
            assert json.loads(client.post("/ranks", json=body).text)["ranks"] == [[1]]
