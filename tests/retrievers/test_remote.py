"""Client and server over a real socket: connecting, refusals, outages, the circuit breaker, and combined requests."""

import json
import multiprocessing
import pickle
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from serving import serve, start

import retrievers
from retrievers import Catalog, Interactions, Query, RetrieverError
from retrievers.combine.propagate import Propagate
from retrievers.core.requests import Breaker, CircuitOpenError, OutageError
from retrievers.serving import http_server, server

CATALOG = Catalog.from_records({"id": str(i), "text": f"party {i} {'face ' * (i % 4)}"} for i in range(40))
BM25 = retrievers.open("bm25", CATALOG)
QUERIES = [Query(f"party {i}") for i in range(30)]
TARGETS = np.arange(30)[:, None]
QUICK = {"retries": 1, "timeout": 5.0}


class Slow:
    """BM25 that counts its calls, waits some seconds, and raises an error if it has one."""

    def __init__(self, seconds=0.0, error=None):
        self.fingerprint = BM25.fingerprint
        self.seconds, self.error, self.calls = seconds, error, []

    def ranks(self, queries, targets):
        self.calls.append(len(queries))
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        return BM25.ranks(queries, targets)

    def search(self, queries, k):
        return BM25.search(queries, k)


def connect(url, **params):
    return retrievers.open("remote", CATALOG, url=url, **QUICK | params)


def application(retriever=BM25, catalog=CATALOG, **options):
    return server.app(retriever, "bm25", catalog.fingerprint, len(catalog), **options)


def test_health_says_what_is_served():
    health = httpx.get(serve(BM25, CATALOG) + "/health").json()
    assert health == {
        "status": "ok", "kind": "bm25", "fingerprint": BM25.fingerprint, "catalog": CATALOG.fingerprint,
        "documents": 40, "reads_text": True, "fitted_on": [], "absent": [], "structured": None,
    }  # fmt: skip


def ask_forked(remote, answers) -> None:
    ssl.SSLContext = None  # OpenSSL may be locked here, by a thread of the parent at the fork.
    answers.put(remote.ranks(QUERIES, TARGETS).tolist())


def test_a_forked_process_has_connections_of_its_own():
    """Two processes on one connection would read the answers to each other's queries."""
    ports = []

    class Recording:
        def __init__(self, inner):
            self.inner = inner

        async def __call__(self, scope, receive, send):
            ports.append(scope["client"][1]) if scope["type"] == "http" else None
            await self.inner(scope, receive, send)

    url, _ = start(Recording(application()))
    remote = connect(url, connections=1)
    expected = remote.ranks(QUERIES, TARGETS).tolist()
    ours = set(ports)
    ports.clear()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=ask_forked, args=(remote, answers))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and answers.get() == expected
    assert ports and not ours & set(ports)


def test_halves_of_characters_travel():
    remote = connect(serve(BM25, CATALOG))
    queries = [Query("\ud83d party 3"), Query("party\udfff 🎉")]
    assert remote.ranks(queries, TARGETS[:2]).tolist() == BM25.ranks(queries, TARGETS[:2]).tolist()


@pytest.mark.slow
def test_huge_texts_are_cut_and_do_not_spoil_the_others():
    """A server reads neither a longer text nor a larger request, and its refusal would end a run."""
    longer = "party 5 " + "\U0001f600 " * 550_000  # 1.1 million characters, and 7 MB of JSON.
    huge = [Query(longer if i % 2 else f"party {i}") for i in range(20)] + [Query("\0" * 1_000_000), Query("party 7")]
    assert len(longer) > server.MAX_QUERY_CHARACTERS and 12 * 7 * len(longer) > http_server.MAX_REQUEST_BYTES
    remote = connect(serve(BM25, CATALOG), timeout=60.0)
    targets = np.arange(22)[:, None]
    assert remote.ranks(huge, targets).tolist() == BM25.ranks(huge, targets).tolist()
    assert remote.search(huge[:2], 3).rows.tolist() == BM25.search(huge[:2], 3).rows.tolist()
    assert len(remote._spans(huge)) > 1 and [span.start for span in remote._spans(QUERIES * 10)] == [0, 128, 256]


@pytest.mark.slow
def test_many_small_requests_are_one_answer():
    remote = connect(serve(BM25, CATALOG), batch_size=7, connections=3)
    assert remote.fingerprint == BM25.fingerprint
    assert remote.ranks(QUERIES, TARGETS).tolist() == BM25.ranks(QUERIES, TARGETS).tolist()
    ours, theirs = BM25.search(QUERIES, 5), remote.search(QUERIES, 5)
    assert theirs.rows.tolist() == ours.rows.tolist() and theirs.scores.tolist() == ours.scores.tolist()


def test_history_and_weights_travel():
    class Echo(Slow):
        def ranks(self, queries, targets):
            self.calls += queries
            return np.ones(targets.shape, np.int32)

    echo = Echo()
    query = Query("日本 \x00", (np.int32(3), 4), (np.float32(0.5), -1.0))
    connect(serve(echo, CATALOG)).ranks([query], np.array([[1]]))
    assert echo.calls == [Query("日本 \x00", (3, 4), (0.5, -1.0))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("nobody", r"no retriever answers at http://127\.0\.0\.1:\d+ .*start one with `rec-r1 serve RECIPE`"),
        ("other catalogue", r"serves another catalogue \(1 documents.*this task has 40"),
        ("token", r"refuses the token: set \$REC_R1_TOKEN"),
        ("other program", "is no `rec-r1 serve`"),
    ],
)
def test_what_is_refused_before_the_first_step(setup, message, monkeypatch):
    from starlette.applications import Starlette

    if setup == "nobody":
        url, stop = start(application())
        stop()
    elif setup == "other catalogue":
        url = serve(BM25, Catalog.from_records([{"id": "a", "text": "b"}]))
    elif setup == "token":
        monkeypatch.setenv("REC_R1_TOKEN", "wrong")
        url = serve(BM25, CATALOG, token="right")
    else:
        url, _ = start(Starlette())
    with pytest.raises(RetrieverError, match=message):
        connect(url, retries=0)


def test_the_token_opens(monkeypatch):
    url = serve(BM25, CATALOG, token="s3cret")
    assert httpx.get(url + "/health").status_code == 401
    assert httpx.post(url + "/ranks", json={"queries": [], "targets": []}).status_code == 401
    monkeypatch.setenv("REC_R1_TOKEN", "s3cret")
    assert connect(url).search(QUERIES, 2).rows.shape == (30, 2)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", "192.168.1.4"])
def test_other_machines_need_a_token(host):
    with pytest.raises(ValueError, match=r"set \$REC_R1_TOKEN to a secret"):
        http_server.check_address(host, None)
    http_server.check_address(host, "s3cret")
    for local in ("127.0.0.1", "::1", "localhost"):
        http_server.check_address(local, None)


@pytest.mark.slow
def test_an_outage_and_its_end():
    url, stop = start(application())
    remote = connect(url, breaker_seconds=0.2)
    expected = remote.ranks(QUERIES, TARGETS).tolist()
    stop()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        remote.ranks(QUERIES, TARGETS)
    with pytest.raises(ConnectionError):
        remote.search(QUERIES, 3)
    _, stop = start(application(), int(url.rpartition(":")[2]))
    time.sleep(0.3)  # The breaker lets a request through again.
    assert remote.ranks(QUERIES, TARGETS).tolist() == expected
    stop()


@pytest.mark.slow
def test_a_server_that_came_back_with_another_index_is_refused():
    url, stop = start(application())
    remote = connect(url)
    stop()
    other = retrievers.open("bm25", CATALOG, k1=2.0)
    _, stop = start(application(other), int(url.rpartition(":")[2]))
    with pytest.raises(RetrieverError, match="the server has another index now"):
        remote.ranks(QUERIES, TARGETS)
    stop()


@pytest.mark.slow
def test_only_the_queries_of_a_failed_request_are_lost():
    class Picky(Slow):
        def ranks(self, queries, targets):
            if any(query.text == "party 12" for query in queries):
                raise TimeoutError("this one takes too long")
            return BM25.ranks(queries, targets)

    remote = connect(serve(Picky(), CATALOG, wait_ms=0.0, max_batch=1), batch_size=10, connections=1, retries=0)
    ranks = remote.ranks(QUERIES, TARGETS)
    assert (ranks[10:20] == -1).all()
    expected = BM25.ranks(QUERIES, TARGETS)
    assert ranks[:10].tolist() == expected[:10].tolist() and ranks[20:].tolist() == expected[20:].tolist()


@pytest.mark.slow
def test_retries_are_bounded_and_mistakes_are_not_retried():
    slow = Slow(error=OSError("disk"))
    with pytest.raises(OutageError, match=r"503.*OSError: disk"):
        connect(serve(slow, CATALOG), retries=2).ranks(QUERIES, TARGETS)
    assert len(slow.calls) == 3
    for error in (ValueError("target row 99"), RetrieverError("damaged")):
        slow = Slow(error=error)
        with pytest.raises(RetrieverError, match=str(error)):
            connect(serve(slow, CATALOG), retries=2).ranks(QUERIES, TARGETS)
        assert len(slow.calls) == 1


@pytest.mark.slow
def test_a_timeout_is_an_outage():
    with pytest.raises(ConnectionError, match="Timeout"):
        connect(serve(Slow(seconds=1.0), CATALOG), timeout=0.2, retries=0).ranks(QUERIES, TARGETS)


@pytest.mark.slow
def test_the_breaker_fails_fast_and_closes_again():
    slow = Slow(error=OSError("disk"))
    remote = connect(serve(slow, CATALOG), retries=0, breaker_failures=2, breaker_seconds=0.4)
    for _ in range(2):
        with pytest.raises(OutageError, match="disk"):
            remote.ranks(QUERIES, TARGETS)
    with pytest.raises(CircuitOpenError, match="2 requests in a row have failed"):
        remote.ranks(QUERIES, TARGETS)
    assert len(slow.calls) == 2
    slow.error = None
    time.sleep(0.45)
    assert remote.ranks(QUERIES, TARGETS).tolist() == BM25.ranks(QUERIES, TARGETS).tolist()
    assert remote.ranks(QUERIES, TARGETS).shape == (30, 1)


@pytest.mark.slow
def test_one_attempt_decides_while_the_others_wait():
    breaker = Breaker(1, 0.1)
    breaker.record(False)
    with pytest.raises(CircuitOpenError):
        breaker.check()
    time.sleep(0.12)
    breaker.check()
    with pytest.raises(CircuitOpenError):
        breaker.check()
    breaker.record(True)
    breaker.check()


@pytest.mark.slow
def test_requests_of_many_clients_are_one_call():
    slow = Slow(seconds=0.1)
    url = serve(slow, CATALOG, wait_ms=500)  # Long enough for eight threads on a busy machine.
    clients = [connect(url) for _ in range(8)]
    together = threading.Barrier(8)

    def ask(i):
        together.wait()
        mine = slice(i * 3, i * 3 + 3)
        targets = np.tile(TARGETS[mine], (1, 1 + i % 3))  # They have different widths.
        return clients[i].ranks(QUERIES[mine], targets).tolist() == BM25.ranks(QUERIES[mine], targets).tolist()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    assert sum(slow.calls) == 24 and len(slow.calls) <= 4


@pytest.mark.slow
def test_a_bad_request_does_not_fail_its_neighbours():
    url = serve(BM25, CATALOG, wait_ms=200)
    good, bad = connect(url), connect(url)

    def ask_badly():
        with pytest.raises(RetrieverError, match="target row 40 is outside"):
            # This skips the client's own check.
            bad._documents = 99
            bad.ranks(QUERIES[:1], np.array([[40]]))

    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(ask_badly)
        assert good.ranks(QUERIES, TARGETS).tolist() == BM25.ranks(QUERIES, TARGETS).tolist()
        failing.result()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/ranks", b"{", 400),
        ("/ranks", b'{"queries": [["a", [], []]]}', 400),
        ("/ranks", b'{"queries": [[1, [], []]], "targets": [[0]]}', 400),
        ("/ranks", b'{"queries": [["a", [], []]], "targets": [["x"]]}', 400),
        ("/ranks", b'{"queries": [["a", [], []]], "targets": [[40]]}', 400),
        ("/ranks", b"[" * 100_000, 400),
        ("/search", b'{"queries": [["a", [], []]], "k": 0}', 400),
        ("/search", b'{"queries": [["a", [], []]], "k": true}', 400),
        ("/search", b'{"queries": "a", "k": 3}', 400),
        ("/search", b'{"queries": [["a", ["1"], []]], "k": 3}', 400),  # No value is converted.
        ("/search", b'{"queries": [["a", [1.5], []]], "k": 3}', 400),
        ("/search", b'{"queries": [["a", [40], []]], "k": 3}', 400),
        ("/search", b'{"queries": [["a", [1], [NaN]]], "k": 3}', 400),
        ("/search", b'{"queries": [["a", [1], [true]]], "k": 3}', 400),
        ("/search", b'{"queries": [["a", []]], "k": 3}', 400),
        ("/search", b'{"queries": [["' + b"a" * (server.MAX_QUERY_CHARACTERS + 1) + b'", [], []]], "k": 3}', 400),
        ("/ranks", b'{"queries": [["a", [], []]], "targets": [["3"]]}', 400),
        ("/ranks", b'{"queries": [["a", [], []]], "targets": [[3.0]]}', 400),
        ("/ranks", b'{"queries": [["a", [], []]], "targets": [[true]]}', 400),
        ("/ranks", b'{"queries": [["a", [], []]], "targets": [[99999999999999999999]]}', 400),
        ("/ranks", b'{"queries": [["a", [], []], ["b", [], []]], "targets": [[1, 2], [3]]}', 400),
        ("/nothing", b"{}", 404),
        ("/ranks", b" " * (http_server.MAX_REQUEST_BYTES + 1), 413),
    ],
)
def test_malformed_requests(path, body, code):
    response = httpx.post(serve(BM25, CATALOG) + path, content=body)
    assert response.status_code == code
    if code == 400:
        assert set(json.loads(response.text)) == {"error"}


@pytest.mark.parametrize("query", ["lecturer", "abc", ["a", []], ["a", [], [], None, 1], None])
def test_a_query_that_is_no_list_of_parts_is_refused(query):
    body = json.dumps({"queries": [query], "k": 3}).encode()
    with pytest.raises(ValueError, match="a query must be a list of three parts, or of four with a structured query"):
        server._parse(body, False, 40)


@pytest.mark.slow
def test_an_answer_too_large_to_make_is_refused(monkeypatch):
    body = b'{"queries": [["a", [], []], ["b", [], []], ["c", [], []]], "k": 99999999999999999999}'
    with pytest.raises(ValueError, match="at most 20,000,000 places: send fewer queries at a time"):
        server._parse(body, False, 10_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(server, "MAX_ANSWER_PLACES", 2000)  # More than 20,000,000 targets would be a request of 80 MB.
        allowed, more = (
            json.dumps({"queries": [["a", [], []]] * 20, "targets": [[-1] * width] * 20}).encode()
            for width in (100, 101)
        )
        assert server._parse(allowed, True, 10_000_000).targets.shape == (20, 100)
        with pytest.raises(ValueError, match="20 queries x 101: at most 2,000 places: send fewer queries at a time"):
            server._parse(more, True, 10_000_000)
    assert server._parse(b'{"queries": [["a", [], []]], "k": 99999999999999999999}', False, 40)[2] == 40


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"url": "127.0.0.1:80"}, "must be http\\(s\\)://HOST:PORT"),
        (
            {"url": "http://me:pass@127.0.0.1:80"},
            r"without user, password and \?query: set the token in \$REC_R1_TOKEN$",
        ),
        ({"url": "http://127.0.0.1:80?token=x"}, "without user, password"),
        ({"url": "http://"}, "must be http"),
        ({"url": "http://[::1"}, "must be http"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"retries": -1}, "retries must be an integer >= 0"),
        ({"timeout": 0}, "timeout must be a number above 0, got 0: 30.0 is usual"),
        ({"urls": "x"}, "did you mean 'url'"),
    ],
)
def test_mistakes_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        retrievers.open("remote", CATALOG, **params)


def test_a_served_recommender_says_what_it_was_fitted_on():
    choices = Interactions.from_sequences(40, [[0, 1], [0, 2], [1, 2]])
    ease = retrievers.open("ease", CATALOG, interactions=choices, regularization=1.0)
    assert not retrievers.reads_text(ease) and retrievers.fitted_on(ease) == {choices.fingerprint}
    for given in (ease, retrievers.Cache(ease, 40), retrievers.Unseen(ease, 40)):
        remote = connect(serve(given, CATALOG))
        for client in (remote, pickle.loads(pickle.dumps(remote))):
            assert not retrievers.reads_text(client) and retrievers.fitted_on(client) == {choices.fingerprint}
    both = Propagate(BM25, ease, 1, 0.5)
    remote = connect(serve(both, CATALOG))
    assert retrievers.reads_text(remote) and retrievers.fitted_on(remote) == {choices.fingerprint}
    assert retrievers.fitted_on(connect(serve(BM25, CATALOG))) == set()
