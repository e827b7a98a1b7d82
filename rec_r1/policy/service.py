"""`rec-r1 serve RUN --policy`: a policy over HTTP, which falls back to the raw query where the policy does not answer.

POST /rewrite {queries, histories} -> {answers: [{query, completion, sent, fallback}, …]}.
POST /search {queries, histories, k} -> the same answers with hits: [{id, title, rank}, …].
GET /health -> status, policy, reason, restarts, run, task, retriever, documents. GET /metrics -> for Prometheus.

fallback is null, or why the raw query was sent: "timeout", "malformed" or "down". Errors are {error}.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from rec_r1 import runs
from rec_r1.config import UserError
from rec_r1.environment import open_environment
from rec_r1.environment.serving import serve_http
from rec_r1.generation.openai_http import RefusedRequestError
from rec_r1.policy import Policy, named, recipe_of
from rec_r1.policy.completions import Write, by_endpoint, endpoint_of, load_model
from rec_r1.policy.metrics import Metrics
from rec_r1.policy.worker import DOWN, READY, STUCK_S, DownError, RefusedPromptError, Worker
from rec_r1.prompts import Prompt
from rec_r1.tasks import Split
from retrievers import CatalogError, RetrieverError
from retrievers.serving import http_server
from retrievers.serving.http_server import Batcher, RefusedError

logger = logging.getLogger(__name__)
MAX_QUERIES = 256  # Queries of a request.
MAX_QUERY_CHARACTERS = 1 << 16  # Characters of a query.
MAX_HITS = 1000  # Hits of a query.
ENDPOINT_THREADS = 64  # Requests that wait for an endpoint at the same time.
T = TypeVar("T")


class Generation(Protocol):
    """What writes the completions of the service."""

    async def complete(self, asked: Sequence[Prompt], names: Sequence[str]) -> list[str]:
        """The completions of a request. Raises DownError, and ValueError for a prompt that is refused."""
        ...

    def status(self) -> dict[str, Any]:
        """For /health: policy (loading, ready or down), reason, restarts."""
        ...

    def running(self) -> contextlib.AbstractAsyncContextManager[None]:
        """The completions can be asked for while the block runs."""
        ...


class OwnProcess:
    """Completions from a :class:`Worker`. Requests that arrive together are written together.

    worker: the process, started.
    max_batch: queries of a batch, at most.
    wait_ms: for so many milliseconds requests are collected into one batch.
    """

    def __init__(self, worker: Worker, max_batch: int, wait_ms: float) -> None:
        self.worker = worker
        self._batcher = Batcher(self._call, max_batch, wait_ms)

    async def complete(self, asked: Sequence[Prompt], names: Sequence[str]) -> list[str]:
        written: list[str] = await self._batcher.ask((asked, names), len(asked))
        return written

    def status(self) -> dict[str, Any]:
        return {"policy": self.worker.state, "reason": self.worker.reason, "restarts": self.worker.restarts}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        try:
            async with self._batcher.running():
                yield
        finally:
            await asyncio.to_thread(self.worker.stop)

    def _call(self, requests: list[tuple[Sequence[Prompt], Sequence[str]]]) -> list[list[str]]:
        prompts = [prompt for asked, _ in requests for prompt in asked]
        written = iter(self.worker.write(prompts, [name for _, names in requests for name in names]))
        return [[next(written) for _ in asked] for asked, _ in requests]


class OtherServer:
    """Completions from an OpenAI-compatible server, which forms its own batches. write: from `by_endpoint`."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._pool = ThreadPoolExecutor(ENDPOINT_THREADS)
        self._reason = ""

    async def complete(self, asked: Sequence[Prompt], names: Sequence[str]) -> list[str]:
        try:
            written = await asyncio.get_running_loop().run_in_executor(self._pool, self._write, asked, names, None)
        except RefusedRequestError as error:
            raise RefusedPromptError(str(error)) from error
        except UserError as error:
            if not self._reason:  # Once, until the server answers again.
                logger.warning("%s: requests get the raw query", error)
            self._reason = str(error)
            raise DownError(self._reason) from error
        self._reason = ""
        return written

    def status(self) -> dict[str, Any]:
        return {"policy": DOWN if self._reason else READY, "reason": self._reason, "restarts": 0}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield
        self._pool.shutdown(wait=False, cancel_futures=True)


class Asked(NamedTuple):
    """The content of a request. k: hits of a query; 0 = none are wanted."""

    queries: list[str] | None
    histories: list[list[str]] | None
    k: int


class Answering:
    """Answers requests with a policy, or with the raw query where the policy does not answer.

    policy: makes prompts, parses completions and ranks the catalogue. Its own ``write`` is not called.
    generation: writes the completions.
    timeout_s: seconds that the policy has for a request.
    metrics: where requests are counted.
    """

    def __init__(self, policy: Policy, generation: Generation, timeout_s: float, metrics: Metrics) -> None:
        self.policy = policy
        self.generation = generation
        self.timeout_s = timeout_s
        self.metrics = metrics
        self._retrieval = ThreadPoolExecutor(1)  # One call at a time, as in a training.

    async def answer(self, asked: Asked) -> list[dict[str, Any]]:
        """One JSON object for each query. Raises RefusedError for a request that cannot be answered."""
        try:
            split = await self._in_thread(partial(self.policy.split, asked.queries, asked.histories))
            completions, cause = await self._complete(split)
            if asked.k:
                answers = await self._in_thread(partial(self.policy.answers, split, completions, asked.k))
            else:
                answers = self.policy.rewrites(split, completions)
        except RetrieverError as error:
            raise RefusedError(503, str(error)) from error
        except (UserError, CatalogError, ValueError) as error:
            raise RefusedError(400, str(error)) from error
        rows = []
        for each in answers:
            fallback = cause or ("malformed" if each.malformed else None)
            self.metrics.count_query(fallback)
            completion = None if cause else each.completion
            row: dict[str, Any] = {"query": each.query, "completion": completion, "sent": each.sent}
            if asked.k:
                row["hits"] = [{"id": h.id, "title": h.title, "rank": rank} for rank, h in enumerate(each.hits, 1)]
            rows.append(row | {"fallback": fallback})
        return rows

    async def _complete(self, split: Split) -> tuple[list[str], str | None]:
        """The completions, and None; or empty ones, and why the policy wrote none."""
        asked = self.policy.prompts_of(split)
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self.generation.complete(asked, [named(query) for query in split.queries]), None
        except TimeoutError:
            return [""] * len(split), "timeout"
        except DownError:
            return [""] * len(split), "down"

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._retrieval, function)


def app(policy: Policy, generation: Generation, timeout_s: float, token: str | None, about: dict[str, Any]) -> Any:
    """The Starlette application.

    policy, generation, timeout_s: see :class:`Answering`.
    token: what clients must show. None = nothing.
    about: facts about the run, for /health.
    """
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    metrics = Metrics()
    answering = Answering(policy, generation, timeout_s, metrics)

    async def respond(request: Request) -> Response:
        http_server.check_token(request, token)
        status = generation.status()
        if request.url.path == "/metrics":
            content, kind = metrics.text(status["policy"] == READY, status["restarts"])
            return Response(content, media_type=kind)
        if request.url.path == "/health":
            return JSONResponse({"status": "ok" if status["policy"] == READY else "degraded", **status, **about})
        asked = parse(await http_server.read_body(request), request.url.path == "/search")
        return JSONResponse({"answers": await answering.answer(asked)})

    async def handle(request: Request) -> Response:
        started = time.perf_counter()
        try:
            response = await respond(request)
        except RefusedError as error:
            response = error.response()
        except Exception as error:
            logger.exception("the service fails")
            response = JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)
        if request.method == "POST":
            metrics.count_request(request.url.path, response.status_code, time.perf_counter() - started)
        return response

    posts = [Route(path, handle, methods=["POST"]) for path in ("/rewrite", "/search")]
    gets = [Route(path, handle) for path in ("/health", "/metrics")]
    return Starlette(routes=[*gets, *posts], lifespan=lambda _: generation.running())


def parse(body: bytes, search: bool) -> Asked:
    """The content of a request. Raises RefusedError that says what to send."""
    known = ("queries", "histories", *(["k"] if search else []))
    shape = '{"queries": [text, …]' + (', "k": 10}' if search else "}")
    try:
        tree = json.loads(body)
        if not isinstance(tree, dict) or set(tree) - set(known) or not {"queries", "histories"} & set(tree):
            raise TypeError(f"an object with {', '.join(known)} and nothing else")
        queries, histories, k = tree.get("queries"), tree.get("histories"), tree.get("k", 10 if search else 0)
        for name, given in (("queries", queries), ("histories", histories)):
            if given is not None and not (isinstance(given, list) and 0 < len(given) <= MAX_QUERIES):
                raise TypeError(f"{name} must be a list of 1 to {MAX_QUERIES}")
        if not all(isinstance(query, str) and len(query) <= MAX_QUERY_CHARACTERS for query in queries or []):
            raise TypeError(f"a query is a text of at most {MAX_QUERY_CHARACTERS} characters")
        for query in queries or []:
            query.encode()  # JSON can hold half a character, which no tokenizer reads: it is a ValueError.
        if not all(isinstance(ids, list) and all(isinstance(i, str) for i in ids) for ids in histories or []):
            raise TypeError("a history is a list of ids, which are texts")
        if type(k) is not int or not (1 if search else 0) <= k <= MAX_HITS:
            raise TypeError(f"k must be an integer from 1 to {MAX_HITS}")
    except (TypeError, ValueError, RecursionError) as error:
        raise RefusedError(400, f"send {shape}, or histories of ids where the task has them ({error})") from error
    return Asked(queries, histories, k)


def serve(
    run: Path, overrides: Sequence[str], host: str, port: int, wait_ms: float, timeout_s: float,
    url: str | None = None, model: str | None = None,
) -> None:  # fmt: skip
    """Serve the policy of a run over HTTP until Ctrl-C.

    run: the run's folder.
    overrides: settings of the command line. None are allowed, because a policy is served as it was trained.
    host, port: the address to bind. Any host but the loopback interface needs $REC_R1_TOKEN.
    wait_ms: for so many milliseconds requests are collected into one batch.
    timeout_s: seconds that the policy has for a request, before the raw query is sent.
    url, model: an OpenAI-compatible server that holds the weights, and their name there. None = the run's folder.

    Raises UserError for a folder that is no run or has no trained policy, and for an address that cannot be bound.
    """
    if overrides:
        raise UserError(f"--policy: {overrides[0]}: a policy is served with the settings of its run: leave it out")
    if not 0 < timeout_s < float("inf"):
        raise UserError(f"--timeout {timeout_s:g}: give a number of seconds above 0")
    if (url is None) != (model is None):
        raise UserError("--endpoint and --model belong together: give both, or none")
    http_server.check_installed("prometheus_client")

    def make(token: str | None) -> tuple[Any, str, str]:
        recipe = recipe_of(run)
        about = {"run": str(run), "retriever": recipe.retriever.kind}
        if url is not None and model is not None:
            write = by_endpoint(recipe, endpoint_of(recipe, url, model, timeout_s=timeout_s, retries=0))
            policy, generation = Policy(recipe, open_environment(recipe), write), OtherServer(write)
            return _made(policy, generation, timeout_s, token, about, f"{model} at {url}")
        weights = runs.best_policy(run)
        load = partial(load_model, recipe, runs.model_source(run, recipe), weights)
        worker = Worker(load, stuck_s=max(STUCK_S, 5 * timeout_s))  # A slow batch is not killed.
        worker.start()
        try:
            policy = Policy(recipe, open_environment(recipe), worker.write)
            worker.wait()
        except BaseException:
            worker.stop()
            raise
        own = OwnProcess(worker, recipe.evaluation.batch_size, wait_ms)
        return _made(policy, own, timeout_s, token, about, f"the policy of step {runs.step_of(run, weights)} of {run}")

    serve_http(make, host, port)


def _made(
    policy: Policy, generation: Generation, timeout_s: float, token: str | None, about: dict[str, Any], what: str
) -> tuple[Any, str, str]:
    """The application, what it serves, and a note, for `environment.serve_http`."""
    task = policy.env.task
    about = about | {"task": task.name, "documents": len(task.catalog)}
    return app(policy, generation, timeout_s, token, about), f"{what}, {about['retriever']} of {task.name},", ""
