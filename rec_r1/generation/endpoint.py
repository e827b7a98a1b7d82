"""Answers of any OpenAI-compatible endpoint (a local vLLM or Ollama, a vendor): a policy to hold a trained one against.

Answers cost money or hours, so each is kept on disk as soon as it arrives: an interrupted evaluation goes on where it
stopped. What the model does wrong (no content, cut off) is its answer; what the server does wrong never becomes one.
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

from rec_r1.config import UserError
from rec_r1.config.redaction import settled, shown
from rec_r1.generation.openai_http import Answer, Client, TroubleError, request
from rec_r1.prompts import Prompt
from retrievers.core.disk import open_disk

logger = logging.getLogger(__name__)
INSTALL = "pip install 'rec-r1[endpoint]'"
BACKOFF_S = 1.0  # the first pause; doubled each time, up to 60 s, and some more by chance: threads must not keep step
RESERVED_FIELDS = {"model", "messages", "prompt", "stream", "n"}  # `extra` must not change these fields.


@dataclass(frozen=True)
class Endpoint:
    """url: up to and with /v1. key_variable: the environment variable that holds the key; not set = no key is sent.
    extra: further fields of the request; they win over ours, and None leaves a field out (``{"max_tokens": None,
    "max_completion_tokens": 512}``). retries: further attempts at a request. dollars_per_million: prices of prompt and
    completion tokens; None = unknown. Raises UserError for values that cannot be."""

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    max_tokens: int = 512
    temperature: float = 0.0  # greedy, as the other policies are evaluated
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
        for name, (well, wanted) in checks.items():
            if not well:  # a secret may have slipped into either of the two: they are not repeated
                got = "" if name in ("url", "key_variable") else f", got {shown(name, getattr(self, name))}"
                raise UserError(f"endpoint.{name} must be {wanted}{got}")


@dataclass(frozen=True)
class Usage:
    """What answers took. requests: prompts that the server answered in this call; cached: prompts whose answer was on
    disk; identical prompts are one. Tokens: of all answers, those from disk included. dollars: spent in this call;
    dollars_all: what making all answers anew would cost; None = unknown, for want of prices or because the server
    counts no tokens. Attempts that failed are in none of them."""

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
    """The endpoint's answers in the order of ``prompts``, each distinct prompt asked once, and what they took.

    cache: a folder that keeps every answer at once; several endpoints, processes and runs may share it. None = nothing
    is kept. progress: what the bar is called; None = no bar.

    Raises UserError where the server refuses, where it still fails after the retries, where the cache does not work
    and where an extra is missing. Then, and on Ctrl-C, requests under way are waited for: they are paid for.
    """
    from tqdm import tqdm

    started = time.monotonic()
    requests = [request(prompt, endpoint) for prompt in prompts]
    named = replace(endpoint, extra=settled(endpoint.extra))  # another key finds the answers that were paid for
    digests = [_digest(*request(prompt, named)) for prompt in prompts]
    distinct = dict(zip(digests, requests, strict=True))
    with closing(_Session(endpoint, cache)) as session:
        known = {digest: answer for digest in distinct if (answer := session.look_up(digest)) is not None}
        missing = {digest: sent for digest, sent in distinct.items() if digest not in known}
        with tqdm(
            total=len(distinct), initial=len(known), desc=progress, unit=" answers", disable=progress is None
        ) as bar:
            fresh = session.ask(missing, bar)
    found = known | fresh
    tokens = [answer.tokens or (0, 0) for answer in found.values()]
    return [found[digest].text for digest in digests], Usage(
        requests=len(fresh),
        cached=len(known),
        prompt_tokens=sum(prompt for prompt, _ in tokens),
        completion_tokens=sum(completion for _, completion in tokens),
        dollars=_dollars(fresh, endpoint),
        dollars_all=_dollars(found, endpoint),
        seconds=time.monotonic() - started,
    )


def _digest(url: str, body: bytes) -> str:
    return hashlib.sha256(url.encode() + b"\0" + body).hexdigest()


class _Session:
    """One call's connection and cache, shared by its threads."""

    def __init__(self, endpoint: Endpoint, folder: Path | None) -> None:
        needed = ["httpx", "tenacity"] + ["diskcache"] * (folder is not None)
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"an endpoint needs its extra ({missing[0]} is missing): {INSTALL}")
        self.endpoint, self.folder, self.stop, self.warned = endpoint, folder, Event(), False
        self.client, self.disk = Client(endpoint), None
        if folder is not None:
            with _working(folder):  # answers were paid for: none is ever thrown out for space
                self.disk = open_disk(folder, eviction_policy="none")

    def close(self) -> None:
        self.client.close()
        if self.disk is not None:
            self.disk.close()

    def look_up(self, digest: str) -> Answer | None:
        """The answer that the disk has for a request."""
        with _working(self.folder):
            kept = self.disk.get(digest, retry=True) if self.disk is not None else None
        return None if kept is None else _kept(kept)

    def ask(self, requests: Mapping[str, tuple[str, bytes]], bar: Any) -> dict[str, Answer]:
        """The server's answer to each request, on disk as soon as it is there."""
        found = {}
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            try:
                pending = {pool.submit(self._one, digest, *sent): digest for digest, sent in requests.items()}
                for done in as_completed(pending):
                    with suppress(CancelledError):  # for a failure that this loop still comes to
                        found[pending[done]] = done.result()
                        bar.update()
            except BaseException:  # Ctrl-C, too
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _one(self, digest: str, url: str, body: bytes) -> Answer:
        """The answer, on disk. Its failure stops the others here: until the main thread knows, they would go on."""
        try:
            answer = self._asked(url, body)
            if self.disk is not None:
                with _working(self.folder):  # JSON: the disk takes no tuple, see retrievers/core/disk.py
                    self.disk.set(digest, json.dumps(answer), retry=True)
            return answer
        except UserError:
            self.stop.set()
            raise

    def _asked(self, url: str, body: bytes) -> Answer:
        import tenacity

        backoff = tenacity.wait_exponential(BACKOFF_S, max=60) + tenacity.wait_random(0, BACKOFF_S)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            if not self.warned:  # once: it explains a bar that stands still
                self.warned = True
                logger.warning("endpoint %s: %s; trying again", url, error)
            pause = getattr(error, "pause", None)
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
            kept = f"answers so far are kept in {self.folder}" if self.folder else "no cache keeps the answers so far"
            raise UserError(
                f"endpoint {url}: {error} ({1 + self.endpoint.retries} attempts): {kept}, run again"
            ) from error

    def _attempt(self, url: str, body: bytes) -> Answer:
        if self.stop.is_set():
            raise CancelledError
        return self.client.post(url, body)


def _kept(kept: Any) -> Answer | None:
    """An answer as it was kept; None for what no release of this toolkit wrote."""
    try:
        text, tokens = json.loads(kept)
    except (ValueError, TypeError, RecursionError):
        return None
    counted = tokens is None or (isinstance(tokens, list) and [type(n) for n in tokens] == [int, int])
    return Answer(text, tokens) if isinstance(text, str) and counted else None


@contextmanager
def _working(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error, LookupError, TypeError, ValueError) as error:  # the last three: damaged settings
        raise UserError(f"cache {folder} does not work ({error}): free space, or name another folder") from error


def _dollars(found: Mapping[str, Answer], endpoint: Endpoint) -> float | None:
    if endpoint.dollars_per_million is None or any(answer.tokens is None for answer in found.values()):
        return None
    prices = endpoint.dollars_per_million
    return sum(p * n for a in found.values() for p, n in zip(prices, a.tokens or (), strict=True)) / 1e6


def _is_base(url: str) -> bool:
    try:
        parts = urlsplit(url)
        known = bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:
        return False
    plain = not re.search(r"[^!-~]", url) and not {"@", "?", "#"} & set(url)
    return known and plain and not parts.path.rstrip("/").endswith("/completions")


def _is_extra(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return isinstance(value, dict) and not RESERVED_FIELDS & set(value)
