"""The server of `remote`: any retriever over HTTP. It combines the requests of many clients into one call.

GET /health returns {status, kind, fingerprint, catalog, documents, reads_text, fitted_on}.
POST /ranks takes {queries, targets}, and returns {ranks}.
POST /search takes {queries, k}, and returns {rows, scores}.
A query is a list [text, history, weights]. An error is {error}.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.util
import ipaddress
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrievers.combine.capabilities import fitted_on, reads_text
from retrievers.serving.client import FINGERPRINT_HEADER, INSTALL, TOKEN_VARIABLE
from retrievers.types import Query, Retriever, RetrieverError

logger = logging.getLogger(__name__)
MAX_REQUEST_BYTES = 64 << 20  # Larger requests are refused.
MAX_QUERY_CHARACTERS = 1 << 20  # Longer queries are refused.
MAX_ANSWER_PLACES = 20_000_000  # An answer may have so many numbers: queries x k, or queries x targets.
BODY_TIMEOUT_S = 30.0  # The body of a request must arrive within so many seconds.
HEADERS_TIMEOUT_S = 10.0  # Its headers must arrive within so many seconds.


@dataclass
class _Job:
    """One request that waits for its answer."""

    queries: list[Query]
    targets: np.ndarray | None  # (Q, T) rows of /ranks. None for /search.
    k: int  # The k of /search. 0 for /ranks.
    answer: asyncio.Future[dict[str, Any]]


class Batcher:
    """Collects requests, and answers them with one call of the retriever.

    retriever: the retriever.
    max_batch: a batch is complete once it has so many queries.
    wait_ms: the milliseconds that a batch waits for further requests.
    """

    def __init__(self, retriever: Retriever, max_batch: int, wait_ms: float) -> None:
        self.retriever = retriever
        self.max_batch = max_batch
        self.wait = wait_ms / 1000
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()

    async def ask(self, queries: list[Query], targets: np.ndarray | None = None, k: int = 0) -> dict[str, Any]:
        """The answer to one request, as a JSON object. Exceptions of the retriever pass through.

        queries: Q queries.
        targets: (Q, T) rows of /ranks. None for /search.
        k: the k of /search. 0 for /ranks.
        """
        job = _Job(queries, targets, k, asyncio.get_running_loop().create_future())
        await self._jobs.put(job)
        return await job.answer

    async def run(self) -> None:
        """Answer requests until the task is cancelled."""
        while True:
            jobs = [await self._jobs.get()]
            until = asyncio.get_running_loop().time() + self.wait
            while sum(len(job.queries) for job in jobs) < self.max_batch:
                try:
                    left = until - asyncio.get_running_loop().time()
                    jobs.append(await asyncio.wait_for(self._jobs.get(), max(0.0, left)))
                except TimeoutError:
                    break
            for k in sorted({job.k for job in jobs}):  # k is 0 for requests of /ranks.
                await self._answer([job for job in jobs if job.k == k])

    async def _answer(self, jobs: list[_Job]) -> None:
        try:
            answers = await asyncio.to_thread(self._call, jobs)
        except ValueError as error:
            if len(jobs) > 1:  # A bad request must not make the others fail, so each is answered alone.
                for job in jobs:
                    await self._answer([job])
                return
            answers = [error]
        except Exception as error:
            answers = [error for _ in jobs]
        for job, answer in zip(jobs, answers, strict=True):
            if job.answer.done():  # The client has disconnected.
                continue
            if isinstance(answer, Exception):
                job.answer.set_exception(answer)
            else:
                job.answer.set_result(answer)

    def _call(self, jobs: list[_Job]) -> list[Any]:
        queries = [query for job in jobs for query in job.queries]
        ends = np.cumsum([len(job.queries) for job in jobs])
        spans = [slice(end - len(job.queries), end) for job, end in zip(jobs, ends, strict=True)]
        if jobs[0].k:
            hits = self.retriever.search(queries, jobs[0].k)
            scores = np.where(hits.rows < 0, 0, hits.scores)  # JSON has no infinity. The client restores -inf.
            return [{"rows": hits.rows[span].tolist(), "scores": scores[span].tolist()} for span in spans]
        tables = [job.targets for job in jobs if job.targets is not None]
        targets = np.full((len(queries), max(table.shape[1] for table in tables)), -1, np.int64)
        for span, table in zip(spans, tables, strict=True):
            targets[span, : table.shape[1]] = table
        ranks = self.retriever.ranks(queries, targets)
        return [{"ranks": ranks[span, : table.shape[1]].tolist()} for span, table in zip(spans, tables, strict=True)]


def app(
    retriever: Retriever,
    kind: str,
    catalog: str,
    documents: int,
    token: str | None = None,
    max_batch: int = 1024,
    wait_ms: float = 2.0,
    body_s: float = BODY_TIMEOUT_S,
) -> Any:
    """The Starlette application that serves a retriever.

    retriever: the retriever.
    kind: the name of its backend.
    catalog: the fingerprint of its catalogue.
    documents: the number of documents in the catalogue.
    token: the token that requests must contain. None, the default, = requests need no token.
    max_batch, wait_ms: see :class:`Batcher`.
    body_s: the seconds within which the body of a request must arrive. Default 30.
    """
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    batcher = Batcher(retriever, max_batch, wait_ms)
    about: dict[str, Any] = {"status": "ok", "kind": kind, "fingerprint": retriever.fingerprint}
    about |= {"catalog": catalog, "documents": documents}
    about |= {"reads_text": reads_text(retriever), "fitted_on": sorted(fitted_on(retriever))}

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    def refuse(code: int, reason: str, **more: Any) -> Response:
        return JSONResponse({"error": reason, **more}, code)

    async def handle(request: Request) -> Response:
        shown = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
            return refuse(401, "wrong or missing token")
        if request.url.path == "/health":
            return JSONResponse(about)
        meant = request.headers.get(FINGERPRINT_HEADER, retriever.fingerprint)
        if meant != retriever.fingerprint:
            return refuse(409, f"the server now has another index ({retriever.fingerprint[:16]}, not {meant[:16]})")
        body = bytearray()
        try:
            async with asyncio.timeout(body_s):
                async for part in request.stream():
                    body += part
                    if len(body) > MAX_REQUEST_BYTES:
                        return refuse(413, f"more than {MAX_REQUEST_BYTES >> 20} MiB")
        except ClientDisconnect:
            return Response(status_code=400)
        except TimeoutError:
            reason = f"the request was not complete after {body_s:g} s"
            return JSONResponse({"error": reason}, 408, {"connection": "close"})
        try:
            arguments = _parse(bytes(body), request.url.path == "/ranks", documents)
            return JSONResponse(await batcher.ask(*arguments))
        except ValueError as error:
            return refuse(400, str(error))
        except RetrieverError as error:
            return refuse(500, str(error), fatal=True)
        except Exception as error:
            logger.exception("the retriever failed")
            return refuse(503, f"{type(error).__name__}: {error}")

    posts = [Route(path, handle, methods=["POST"]) for path in ("/ranks", "/search")]
    return Starlette(routes=[Route("/health", handle), *posts], lifespan=lifespan)


def _parse(body: bytes, ranks: bool, documents: int) -> tuple[list[Query], np.ndarray | None, int]:
    """The queries, the targets and the k of a request; targets are None for /search, and k is 0 for /ranks.

    body: the JSON text.
    ranks: whether the request is for /ranks.
    documents: the number of documents in the catalogue.

    No value is converted. Raises ValueError, which describes a valid request, for anything else.
    """
    shape = '{"queries": [[text, history, weights], …], ' + ('"targets": [[row, …], …]}' if ranks else '"k": 10}')
    try:
        tree = json.loads(body)
        queries = [_query(each, documents) for each in tree["queries"]]
        if not ranks:
            k = tree["k"]
            if type(k) is not int or k < 1:
                raise ValueError(f"k must be an integer >= 1, got {str(k)[:20]}")
            _check_size(len(queries), min(k, documents))
            return queries, None, min(k, documents)
        rows = tree["targets"]
        if len(rows) != len(queries) or len({len(row) for row in rows}) > 1:
            raise ValueError("targets must be one list per query, all of the same length")
        if not all(type(row) is int and -1 <= row < 2**31 for each in rows for row in each):
            raise TypeError("a target is not a row")
        width = len(rows[0]) if rows else 0
        _check_size(len(queries), width)
        return queries, np.array(rows, np.int64).reshape(len(queries), width), 0
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"send {shape} ({type(error).__name__}: {str(error)[:200]})") from error


def _query(sent: Any, documents: int) -> Query:
    """The query in a list [text, history, weights]. Raises TypeError or ValueError for anything else."""
    text, history, weights = sent
    if not isinstance(text, str) or len(text) > MAX_QUERY_CHARACTERS:
        raise TypeError(f"a text is not a string of at most {MAX_QUERY_CHARACTERS} characters")
    if not all(type(row) is int and 0 <= row < documents for row in history):
        raise TypeError("a history contains values that are not rows of the catalogue")
    if not all(type(weight) in (int, float) and -1e30 < weight < 1e30 for weight in weights):
        raise TypeError("a weight is not a finite number")
    return Query(text, tuple(history), tuple(map(float, weights)))


def _check_size(queries: int, width: int) -> None:
    if queries * width > MAX_ANSWER_PLACES:
        raise ValueError(
            f"an answer to {queries} queries x {width} would have more than {MAX_ANSWER_PLACES:,} numbers: send fewer "
            "queries at a time"
        )


def check_address(host: str, token: str | None) -> None:
    """Raises ValueError for an address that other machines can reach, where there is no token."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # A host name may be reachable from other machines.
        local = False
    if not local and not token:
        raise ValueError(
            f"--host {host} can be reached from other machines: set ${TOKEN_VARIABLE} to a secret, "
            "on this machine and where the training runs"
        )


def serve(
    application: Any,
    host: str = "127.0.0.1",
    port: int = 8077,
    token: str | None = None,
    ready: Callable[[], Any] = int,
) -> None:
    """Serve an application until Ctrl-C or SIGTERM. Requests that have arrived are still answered.

    application: from :func:`app`.
    host, port: the address to listen on. Default 127.0.0.1:8077.
    token: the token of the application, which :func:`check_address` needs.
    ready: called without arguments once the port is open.

    Raises ValueError as :func:`check_address` does, and OSError where the port is in use.
    """
    import uvicorn

    check_address(host, token)
    with listen(host, port) as listening:
        ready()
        config = server_config(application)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after all requests are answered.
            uvicorn.Server(config).run([listening])


def server_config(application: Any, headers_s: float = HEADERS_TIMEOUT_S) -> Any:
    """The configuration of uvicorn.

    headers_s: a connection is closed where the headers of a request are not complete after so many seconds. uvicorn
        limits the size of headers and the time between requests, but would wait forever for the rest of a header.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class HeaderTimeout(H11Protocol):
        """uvicorn's protocol, with a timer that runs while the headers of a request are incomplete."""

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.timer is not None:
                self.timer.cancel()
            super().connection_lost(exc)

        def _watch(self) -> None:
            waits = self.cycle is None or self.cycle.response_complete
            if waits and self.timer is None:
                self.timer = self.loop.call_later(headers_s, self.transport.close)
            elif not waits and self.timer is not None:
                self.timer.cancel()
                self.timer = None

    return uvicorn.Config(
        application, log_level="warning", lifespan="on", timeout_graceful_shutdown=10, http=HeaderTimeout
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address. Port 0 = any free port. Raises OSError where the port is in use.

    uvicorn does not bind the socket itself, because it ends the process where that fails.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, because asyncio sends small packets at once only where the socket says that it is TCP.
    # Otherwise each answer would wait 40 ms for the acknowledgement of its header.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening


def check_installed() -> None:
    """Raises RetrieverError, naming what to install, where a package of the server is missing."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise RetrieverError(f"rec-r1 serve needs {missing[0]}, which is not installed: {INSTALL}")
