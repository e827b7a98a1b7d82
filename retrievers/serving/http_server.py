"""Used by all HTTP services of the toolkit: batches of requests, the token, limits, and uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.util
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from retrievers.serving.client import INSTALL, TOKEN_VARIABLE
from retrievers.types import RetrieverError

logger = logging.getLogger(__name__)
MAX_REQUEST_BYTES = 64 << 20  # bytes of a request
BODY_TIMEOUT_S = 30.0  # seconds for a body to arrive
HEADERS_TIMEOUT_S = 10.0  # seconds for the headers to arrive


class RefusedError(Exception):
    """A request is refused. status: the HTTP status. more: further fields of the error's JSON."""

    def __init__(self, status: int, reason: str, **more: Any) -> None:
        super().__init__(reason)
        self.status = status
        self.more = more

    def response(self) -> Any:
        """The Starlette response."""
        from starlette.responses import JSONResponse

        headers = {"connection": "close"} if self.status == 408 else None
        return JSONResponse({"error": str(self), **self.more}, self.status, headers)


def check_token(request: Any, token: str | None) -> None:
    """Raise RefusedError for a request without the service's token. token: None = the service has none."""
    shown = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
        raise RefusedError(401, "wrong or missing token")


async def read_body(request: Any, body_s: float = BODY_TIMEOUT_S) -> bytes:
    """The body of a Starlette request. body_s: seconds for it to arrive.

    Raises RefusedError where it is too large or too slow, and where the client has disconnected.
    """
    from starlette.requests import ClientDisconnect

    body = bytearray()
    try:
        async with asyncio.timeout(body_s):
            async for part in request.stream():
                body += part
                if len(body) > MAX_REQUEST_BYTES:
                    raise RefusedError(413, f"more than {MAX_REQUEST_BYTES >> 20} MiB")
    except ClientDisconnect as error:
        raise RefusedError(400, "the client has disconnected") from error
    except TimeoutError as error:
        raise RefusedError(408, f"no whole request in {body_s:g} s") from error
    return bytes(body)


@dataclass
class _Job:
    """One request: its content, its number of queries, the kind of call that answers it, and its future answer."""

    asked: Any
    size: int
    kind: int
    answer: asyncio.Future[Any]


class Batcher:
    """Collects requests for ``wait_ms`` or until ``max_batch`` queries, and answers them by one call.

    call: a list of what was asked -> the list of answers. It runs in a thread, one call at a time. Where it raises
        ValueError for several, each is asked alone, because one bad request must not fail the others.
    """

    def __init__(self, call: Callable[[list[Any]], list[Any]], max_batch: int, wait_ms: float) -> None:
        self.call = call
        self.max_batch = max_batch
        self.wait = wait_ms / 1000
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()

    async def ask(self, asked: Any, size: int, kind: int = 0) -> Any:
        """The answer of the call. Raises what it raises for this request.

        size: how many queries are asked. kind: requests of one kind share a call.
        """
        job = _Job(asked, size, kind, asyncio.get_running_loop().create_future())
        await self._jobs.put(job)
        return await job.answer

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer requests while the block runs."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()

    async def _run(self) -> None:
        while True:
            jobs = [await self._jobs.get()]
            until = asyncio.get_running_loop().time() + self.wait
            while sum(job.size for job in jobs) < self.max_batch:
                try:
                    left = until - asyncio.get_running_loop().time()
                    jobs.append(await asyncio.wait_for(self._jobs.get(), max(0.0, left)))
                except TimeoutError:
                    break
            for kind in sorted({job.kind for job in jobs}):
                await self._answer([job for job in jobs if job.kind == kind])

    async def _answer(self, jobs: list[_Job]) -> None:
        jobs = [job for job in jobs if not job.answer.done()]  # the clients of the others have gone
        if not jobs:
            return
        try:
            answers = await asyncio.to_thread(self.call, [job.asked for job in jobs])
        except ValueError as error:
            if len(jobs) > 1:
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


def check_address(host: str, token: str | None) -> None:
    """Raises ValueError for an address that others can reach, without a token."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name, which other machines may reach
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
    """Serve until a signal comes; running requests are answered first. ready: is called once the port is bound.

    Raises ValueError as `check_address`, OSError where the port is taken.
    """
    import uvicorn

    check_address(host, token)
    with listen(host, port) as listening:
        ready()
        config = server_config(application)
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends it; uvicorn raises it again after the last answer
            uvicorn.Server(config).run([listening])


def server_config(application: Any, headers_s: float = HEADERS_TIMEOUT_S) -> Any:
    """uvicorn's settings. A connection whose headers do not arrive within ``headers_s`` seconds is closed: uvicorn
    itself limits their size and the time between requests, but not the time that they take."""
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
    """A socket that is bound to an address. port: 0 = any free port.

    uvicorn does not bind it, because it would end the process where it fails. Raises OSError where the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, because asyncio sends small packets at once only if the socket names TCP. Otherwise each
    # answer waits 40 ms for the acknowledgement of its header.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening


def check_installed(*more: str) -> None:
    """Raises RetrieverError naming the extra where a package of it is missing. more: packages beside the usual two."""
    missing = [name for name in ("starlette", "uvicorn", *more) if importlib.util.find_spec(name) is None]
    if missing:
        raise RetrieverError(f"rec-r1 serve needs its extra ({missing[0]} is missing): {INSTALL}")
