"""The other side of `remote`: any retriever over HTTP, with the requests of many clients combined into one call.

GET /health -> status, kind, fingerprint, catalog, documents, reads_text, fitted_on.
POST /ranks {queries, targets} -> {ranks}. POST /search {queries, k} -> {rows, scores}.
A query is [text, history, weights]. Errors are {error}.
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
MAX_REQUEST_BYTES = 64 << 20  # bytes of a request
MAX_QUERY_CHARACTERS = 1 << 20  # characters of a query
MAX_ANSWER_PLACES = 20_000_000  # places of an answer: queries x k, or queries x targets
BODY_TIMEOUT_S = 30.0  # seconds for a body to arrive
HEADERS_TIMEOUT_S = 10.0  # and for the headers before it


@dataclass
class _Job:
    """One request: its queries and targets or k, and where its answer goes."""

    queries: list[Query]
    targets: np.ndarray | None
    k: int
    answer: asyncio.Future[dict[str, Any]]


class Batcher:
    """Collects jobs for ``wait_ms`` or until ``max_batch`` queries, and answers them by one call of the retriever."""

    def __init__(self, retriever: Retriever, max_batch: int, wait_ms: float) -> None:
        self.retriever = retriever
        self.max_batch = max_batch
        self.wait = wait_ms / 1000
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()

    async def ask(self, queries: list[Query], targets: np.ndarray | None = None, k: int = 0) -> dict[str, Any]:
        """The answer as JSON has it. Raises what the retriever raises for these queries."""
        job = _Job(queries, targets, k, asyncio.get_running_loop().create_future())
        await self._jobs.put(job)
        return await job.answer

    async def run(self) -> None:
        """Answer jobs until cancelled."""
        while True:
            jobs = [await self._jobs.get()]
            until = asyncio.get_running_loop().time() + self.wait
            while sum(len(job.queries) for job in jobs) < self.max_batch:
                try:
                    left = until - asyncio.get_running_loop().time()
                    jobs.append(await asyncio.wait_for(self._jobs.get(), max(0.0, left)))
                except TimeoutError:
                    break
            for k in sorted({job.k for job in jobs}):  # k = 0 are those that ask for ranks
                await self._answer([job for job in jobs if job.k == k])

    async def _answer(self, jobs: list[_Job]) -> None:
        try:
            answers = await asyncio.to_thread(self._call, jobs)
        except ValueError as error:
            if len(jobs) > 1:  # one bad request must not fail the others
                for job in jobs:
                    await self._answer([job])
                return
            answers = [error]
        except Exception as error:
            answers = [error for _ in jobs]
        for job, answer in zip(jobs, answers, strict=True):
            if job.answer.done():  # the client has gone
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
            scores = np.where(hits.rows < 0, 0, hits.scores)  # JSON has no infinity; the client puts it back
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
    """The Starlette application. catalog: the catalogue's fingerprint. token: what clients must show; None: nothing.
    body_s: seconds for a request's body to arrive."""
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
            return refuse(409, f"another index is served by now ({retriever.fingerprint[:16]}, not {meant[:16]})")
        body = bytearray()
        try:
            async with asyncio.timeout(body_s):
                async for part in request.stream():
                    body += part
                    if len(body) > MAX_REQUEST_BYTES:
                        return refuse(413, f"more than {MAX_REQUEST_BYTES >> 20} MiB")
        except ClientDisconnect:
            return Response(status_code=400)  # the client has disconnected
        except TimeoutError:
            return JSONResponse({"error": f"no whole request in {body_s:g} s"}, 408, {"connection": "close"})
        try:
            arguments = _parse(bytes(body), request.url.path == "/ranks", documents)
            return JSONResponse(await batcher.ask(*arguments))
        except ValueError as error:
            return refuse(400, str(error))
        except RetrieverError as error:
            return refuse(500, str(error), fatal=True)
        except Exception as error:
            logger.exception("the retriever fails")
            return refuse(503, f"{type(error).__name__}: {error}")

    posts = [Route(path, handle, methods=["POST"]) for path in ("/ranks", "/search")]
    return Starlette(routes=[Route("/health", handle), *posts], lifespan=lifespan)


def _parse(body: bytes, ranks: bool, documents: int) -> tuple[list[Query], np.ndarray | None, int]:
    """Queries, targets, k. Raises ValueError that says what to send; nothing is converted."""
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
            raise ValueError("targets must be one list a query, all of one length")
        if not all(type(row) is int and -1 <= row < 2**31 for each in rows for row in each):
            raise TypeError("a target is no row")
        width = len(rows[0]) if rows else 0
        _check_size(len(queries), width)
        return queries, np.array(rows, np.int64).reshape(len(queries), width), 0
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"send {shape} ({type(error).__name__}: {str(error)[:200]})") from error


def _query(sent: Any, documents: int) -> Query:
    text, history, weights = sent
    if not isinstance(text, str) or len(text) > MAX_QUERY_CHARACTERS:
        raise TypeError(f"a text is no string of at most {MAX_QUERY_CHARACTERS} characters")
    if not all(type(row) is int and 0 <= row < documents for row in history):
        raise TypeError("a history holds something else than rows of the catalogue")
    if not all(type(weight) in (int, float) and -1e30 < weight < 1e30 for weight in weights):
        raise TypeError("a weight is no finite number")
    return Query(text, tuple(history), tuple(map(float, weights)))


def _check_size(queries: int, width: int) -> None:
    if queries * width > MAX_ANSWER_PLACES:
        raise ValueError(
            f"{queries} queries x {width}: at most {MAX_ANSWER_PLACES:,} places: send fewer queries at a time"
        )


def check_address(host: str, token: str | None) -> None:
    """Raises ValueError for an address that others can reach, without a token."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: whoever can resolve it
        local = False
    if not local and not token:
        raise ValueError(
            f"--host {host} can be reached from other machines: set ${TOKEN_VARIABLE} to a secret, "
            "here and where the training runs"
        )


def serve(
    application: Any,
    host: str = "127.0.0.1",
    port: int = 8077,
    token: str | None = None,
    ready: Callable[[], Any] = int,
) -> None:
    """Serve until a signal comes; requests under way are answered first. ready: called once the port is ours.

    Raises ValueError as `check_address`, OSError where the port is taken.
    """
    import uvicorn

    check_address(host, token)
    with listen(host, port) as listening:
        ready()
        config = server_config(application)
        with contextlib.suppress(KeyboardInterrupt):  # how it ends; uvicorn raises it again once all is answered
            uvicorn.Server(config).run([listening])


def server_config(application: Any, headers_s: float = HEADERS_TIMEOUT_S) -> Any:
    """uvicorn's settings. Headers that do not come within ``headers_s`` seconds end their connection: uvicorn bounds
    their size and the time between requests, and would wait for the rest of a header for ever."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class HeaderTimeout(H11Protocol):
        """uvicorn's own protocol, with a timer that runs while a request's headers are incomplete."""

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
    """A bound socket (0 = a free port); here, not in uvicorn, whose complaint would end the process. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its full name: asyncio sends small packets at once only where the socket says that it is TCP; else each
    # answer waits 40 ms for the acknowledgement of its header.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening


def check_installed() -> None:
    """Raises RetrieverError naming the extra where it is missing."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise RetrieverError(f"rec-r1 serve needs its extra ({missing[0]} is missing): {INSTALL}")
