"""Completions of any OpenAI-compatible endpoint, such as a local vLLM or Ollama, or a vendor's server.

Completions cost money or hours, so each is written to disk as soon as it arrives, and an interrupted evaluation
continues where it stopped. An empty or truncated completion is a completion. A failure of the server never is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import random
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from rec_r1.config import Recipe, UserError
from rec_r1.config.redaction import from_environment, settled, shown
from rec_r1.generation.openai_http import Answer, Client, TroubleError, request
from rec_r1.prompts import Prompt
from retrievers.core.disk import open_disk

logger = logging.getLogger(__name__)
HOW_TO_INSTALL = "pip install 'rec-r1[endpoint]'"
# The first pause between attempts, in seconds. It doubles each time, up to 60 s. A random share is added, so that the
# threads do not all send again at the same moment.
BACKOFF_S = 1.0
RESERVED_FIELDS = {"model", "messages", "prompt", "stream", "n"}  # `extra` must not change these fields.


@dataclass(frozen=True)
class Endpoint:
    """A server, a model on it, and the options of its requests.

    url: the base address, which usually ends with /v1.
    model: the name under which the server knows the model.
    key_variable: the environment variable that holds the key. Where it is not set, no key is sent.
    max_tokens: the largest number of tokens of a completion.
    temperature: the temperature. 0 = greedy.
    top_p: the nucleus of sampling. None = the server's default.
    extra: further fields of the request. They replace the toolkit's own fields, and None leaves a field out, as in
        {"max_tokens": None, "max_completion_tokens": 512}.
    concurrency: how many requests are sent at the same time.
    timeout_s: how many seconds a request may take.
    retries: how many further attempts follow a failed one.
    dollars_per_million: the prices of prompt and completion tokens. None = unknown.

    Raises UserError for invalid values.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    max_tokens: int = 512
    temperature: float = 0.0  # Greedy, as for the other policies.
    top_p: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    timeout_s: float = 120.0
    retries: int = 5
    dollars_per_million: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        prices = self.dollars_per_million
        checks = {
            "url": (_is_base(self.url), "http(s)://HOST/v1, without password, ?query and /chat/completions"),
            "key_variable": (re.fullmatch(r"[A-Za-z_]\w*", self.key_variable), "the name of a variable, not the key"),
            "model": (self.model, "the name that the endpoint has for the model"),
            "max_tokens": (type(self.max_tokens) is int and self.max_tokens > 0, "an integer above 0"),
            "temperature": (0 <= self.temperature < math.inf, "a number of at least 0"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "a number above 0, at most 1"),
            "extra": (_is_extra(self.extra), f"a JSON object without {', '.join(sorted(RESERVED_FIELDS))}"),
            "concurrency": (type(self.concurrency) is int and self.concurrency > 0, "an integer above 0"),
            "timeout_s": (0 < self.timeout_s < math.inf, "a number of seconds above 0"),
            "retries": (type(self.retries) is int and self.retries >= 0, "an integer of at least 0"),
            "dollars_per_million": (
                prices is None or (len(prices) == 2 and all(0 <= price < math.inf for price in prices)),
                "two prices of at least 0, of prompt and completion",
            ),
        }
        for name, (valid, allowed) in checks.items():
            if not valid:  # url and key_variable may hold a secret by mistake, so they are not shown.
                got = "" if name in ("url", "key_variable") else f", got {shown(name, getattr(self, name))}"
                raise UserError(f"endpoint.{name} must be {allowed}{got}")


def of_recipe(recipe: Recipe, max_tokens: int) -> Endpoint:
    """The endpoint of the recipe's section `baselines.endpoint`, which answers greedily.

    recipe: the recipe.
    max_tokens: the largest number of tokens of a completion.

    Raises UserError where no model is named, for prices that are not two, and for an environment variable that is not
    set.
    """
    config = recipe.baselines.endpoint
    if not config.model:
        raise UserError("baselines.endpoint.model: not set: name the model that the endpoint serves")
    prices = config.dollars_per_million
    if prices is not None and len(prices) != 2:
        raise UserError(
            f"baselines.endpoint.dollars_per_million: {prices}: give two prices, of prompt and of completion tokens"
        )
    return Endpoint(
        config.url,
        config.model,
        config.key_variable,
        max_tokens=max_tokens,
        extra=from_environment(config.extra, UserError, "baselines.endpoint.extra"),
        concurrency=config.concurrency,
        dollars_per_million=None if prices is None else (prices[0], prices[1]),
    )


@dataclass(frozen=True)
class Usage:
    """The cost of completions. Failed attempts are not included.

    requests: the number of distinct prompts that the server completed in this call.
    cached: the number of distinct prompts whose completion was on disk.
    prompt_tokens, completion_tokens: the tokens of all distinct prompts and completions, including those from disk.
    dollars: the price of this call. None = unknown, because the prices or the numbers of tokens are not known.
    dollars_all: the price of all completions, including those from disk. None = unknown.
    seconds: the time that this call took.
    """

    requests: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float | None
    dollars_all: float | None
    seconds: float


def answers(
    prompts: Sequence[Prompt], endpoint: Endpoint, cache: Path | None, progress: str | None = None
) -> tuple[list[str], Usage]:
    """The completions of an endpoint in the order of the prompts, and their cost. Each distinct prompt is sent once.

    prompts: the prompts.
    endpoint: the server, the model and the options.
    cache: a folder to which each completion is written when it arrives. Several endpoints, processes and runs may share
        it. None = nothing is written.
    progress: the label of the progress bar. None = no bar.

    Raises UserError where the server refuses a request, where it still fails after the retries, where the cache does
    not work, and where a package is not installed. Before that error, and after Ctrl-C, the requests in progress are
    completed, because they have been paid for.
    """
    from tqdm import tqdm

    started = time.monotonic()
    requests = [request(prompt, endpoint) for prompt in prompts]
    without_secrets = replace(endpoint, extra=settled(endpoint.extra))  # Another key finds the same completions.
    digests = [_digest(*request(prompt, without_secrets)) for prompt in prompts]
    distinct = dict(zip(digests, requests, strict=True))
    with closing(_Session(endpoint, cache)) as session:
        known = {digest: found for digest in distinct if (found := session.look_up(digest)) is not None}
        missing = {digest: sent for digest, sent in distinct.items() if digest not in known}
        with tqdm(
            total=len(distinct), initial=len(known), desc=progress, unit=" completions", disable=progress is None
        ) as bar:
            fresh = session.ask(missing, bar)
    completions = known | fresh
    tokens = [completion.tokens or (0, 0) for completion in completions.values()]
    return [completions[digest].text for digest in digests], Usage(
        requests=len(fresh),
        cached=len(known),
        prompt_tokens=sum(prompt for prompt, _ in tokens),
        completion_tokens=sum(completion for _, completion in tokens),
        dollars=_dollars(fresh, endpoint),
        dollars_all=_dollars(completions, endpoint),
        seconds=time.monotonic() - started,
    )


def _digest(url: str, body: bytes) -> str:
    """The key under which the completion of a request is kept on disk."""
    return hashlib.sha256(url.encode() + b"\0" + body).hexdigest()


class _Session:
    """The connections and the cache of one call of :func:`answers`. Its threads share them."""

    def __init__(self, endpoint: Endpoint, folder: Path | None) -> None:
        needed = ["httpx", "tenacity"] + ["diskcache"] * (folder is not None)
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"baseline endpoint: the package {missing[0]} is not installed: {HOW_TO_INSTALL}")
        self.endpoint, self.folder, self.stop, self.warned = endpoint, folder, Event(), False
        self.client, self.disk = Client(endpoint), None
        if folder is not None:
            with _cache_errors(folder):  # Completions have been paid for, so none is removed to save space.
                self.disk = open_disk(folder, eviction_policy="none")

    def close(self) -> None:
        self.client.close()
        if self.disk is not None:
            self.disk.close()

    def look_up(self, digest: str) -> Answer | None:
        """The completion on disk for a request. None = there is none."""
        with _cache_errors(self.folder):
            text = self.disk.get(digest, retry=True) if self.disk is not None else None
        return None if text is None else _parsed(text)

    def ask(self, requests: Mapping[str, tuple[str, bytes]], bar: Any) -> dict[str, Answer]:
        """The server's completion for each request. Each is written to disk when it arrives."""
        found = {}
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            try:
                pending = {pool.submit(self._one, digest, *sent): digest for digest, sent in requests.items()}
                for done in as_completed(pending):
                    with suppress(CancelledError):  # Another request failed. The loop will reach its error.
                        found[pending[done]] = done.result()
                        bar.update()
            except BaseException:  # This includes Ctrl-C.
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _one(self, digest: str, url: str, body: bytes) -> Answer:
        """The completion for one request, which is also written to disk.

        A failure stops the other threads at once, before the main thread learns of it.
        """
        try:
            answer = self._with_retries(url, body)
            if self.disk is not None:
                with _cache_errors(self.folder):  # As JSON, because the disk takes no tuple (retrievers/core/disk.py).
                    self.disk.set(digest, json.dumps(answer), retry=True)
            return answer
        except UserError:
            self.stop.set()
            raise

    def _with_retries(self, url: str, body: bytes) -> Answer:
        """The completion for one request, after as many attempts as the endpoint allows."""
        import tenacity

        backoff = tenacity.wait_exponential(BACKOFF_S, max=60) + tenacity.wait_random(0, BACKOFF_S)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            if not self.warned:  # One warning is enough to explain why the progress bar does not move.
                self.warned = True
                logger.warning("endpoint %s: %s; trying again", url, error)
            pause = error.pause if isinstance(error, TroubleError) else None
            return backoff(state) if pause is None else pause + random.uniform(0, BACKOFF_S)

        again = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(1 + self.endpoint.retries) | tenacity.stop_when_event_set(self.stop),
            wait=wait,
            retry=tenacity.retry_if_exception_type(TroubleError),
            sleep=tenacity.sleep_using_event(self.stop),
            reraise=True,
        )
        try:
            return again(self._attempt, url, body)
        except TroubleError as error:
            if self.stop.is_set():
                raise CancelledError from error
            kept = f" (the completions so far are kept in {self.folder})" if self.folder else ""
            attempts = 1 + self.endpoint.retries
            raise UserError(f"endpoint {url}: {error} ({attempts} attempts): run again later{kept}") from error

    def _attempt(self, url: str, body: bytes) -> Answer:
        if self.stop.is_set():
            raise CancelledError
        return self.client.post(url, body)


def _parsed(written: Any) -> Answer | None:
    """A completion as it was written to disk. None = no release of this toolkit wrote it."""
    try:
        text, tokens = json.loads(written)
    except (ValueError, TypeError, RecursionError):
        return None
    counted = tokens is None or (isinstance(tokens, list) and [type(n) for n in tokens] == [int, int])
    return Answer(text, tokens) if isinstance(text, str) and counted else None


@contextmanager
def _cache_errors(folder: Path | None) -> Iterator[None]:
    """Raise UserError for an error of the cache."""
    try:
        yield
    except (OSError, sqlite3.Error, LookupError, TypeError, ValueError) as error:  # The last three: damaged settings.
        raise UserError(
            f"cache {folder} does not work ({error}): free disk space, or choose another folder with $REC_R1_CACHE"
        ) from error


def _dollars(found: Mapping[str, Answer], endpoint: Endpoint) -> float | None:
    """The price of completions in dollars. None = unknown."""
    if endpoint.dollars_per_million is None or any(answer.tokens is None for answer in found.values()):
        return None
    prices = endpoint.dollars_per_million
    return sum(p * n for a in found.values() for p, n in zip(prices, a.tokens or (), strict=True)) / 1e6


def _is_base(url: str) -> bool:
    """Whether a URL can be the base address of a server: without password, query, fragment, and /completions."""
    try:
        parts = urlsplit(url)
        known = bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:
        return False
    plain = not re.search(r"[^!-~]", url) and not {"@", "?", "#"} & set(url)
    return known and plain and not parts.path.rstrip("/").endswith("/completions")


def _is_extra(value: Any) -> bool:
    """Whether a value can be the endpoint's `extra`: a JSON object without reserved fields."""
    try:
        json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return isinstance(value, dict) and not RESERVED_FIELDS & set(value)
