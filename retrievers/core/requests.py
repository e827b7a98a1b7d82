"""What the clients of servers share: outages, a circuit breaker, retries, a client for each process, and the message of
a server as one line."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Lock
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")


class OutageError(ConnectionError):
    """The server did not answer, or its answer is not valid. Another attempt may succeed.

    reason: what went wrong.
    pause: the seconds that the server asks the client to wait. None, the default, = it does not say.
    """

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class CircuitOpenError(OutageError):
    """The request was not sent, because too many requests have failed. Another attempt now would fail, too."""


class Breaker:
    """A circuit breaker: after several failures in a row it blocks all requests for a while.

    failures: so many failures in a row open the breaker.
    seconds: how long it then blocks requests. After that, one request is let through: if it succeeds, the breaker
        closes; if it fails, the breaker blocks requests again.
    """

    def __init__(self, failures: int, seconds: float) -> None:
        self.failures, self.seconds = failures, seconds
        self._lock = Lock()
        self._in_a_row = 0
        self._reason = ""
        self._closed_again = 0.0

    def check(self) -> None:
        """Raises CircuitOpenError while requests are blocked."""
        with self._lock:
            left = self._closed_again - time.monotonic()
            if left > 0:
                failed = f"{self._in_a_row} requests in a row have failed"
                raise CircuitOpenError(f"{failed}, the next attempt is in {left:.0f} s; {self._reason}")
            if self._in_a_row >= self.failures:  # This request is let through, and all others stay blocked.
                self._closed_again = time.monotonic() + self.seconds

    def record(self, succeeded: bool, reason: str = "") -> None:
        """Count the result of a request. reason: why it failed."""
        with self._lock:
            self._reason = reason
            self._in_a_row = 0 if succeeded else self._in_a_row + 1
            open_ = self._in_a_row >= self.failures
            self._closed_again = time.monotonic() + self.seconds if open_ else 0.0


class PerProcess(Generic[T]):
    """An object that each process makes for itself, such as a client. A forked process that used the connections of its
    parent would read the answers to the other's requests.

    make: makes the object.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: tuple[int, T] | None = None

    def get(self) -> T:
        """The object of this process. Raises what ``make`` raises."""
        if self._made is None or self._made[0] != os.getpid():
            self._made = os.getpid(), self._make()
        return self._made[1]


def retried(attempt: Callable[[], Any], retries: int, longest_pause: float) -> Any:
    """The result of ``attempt``, which is called again after random pauses where it raises OutageError.

    attempt: it takes no arguments.
    retries: how often it is called again.
    longest_pause: the most seconds that are waited because a server asks for a pause.

    Raises the last OutageError, and at once a CircuitOpenError and every other exception.
    """
    import tenacity

    # Random pauses keep the clients from sending their requests at the same moment again.
    backoff = tenacity.wait_random_exponential(multiplier=0.25, max=5)

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        pause = error.pause if isinstance(error, OutageError) else None
        return backoff(state) + min(pause or 0.0, longest_pause)

    again = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(1 + retries),
        wait=wait,
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, OutageError) and not isinstance(e, CircuitOpenError)),
        reraise=True,
    )
    return again(attempt)


def one_line(value: Any, longest: int) -> str:
    """A value from a server as one line of at most ``longest`` printable characters. A server may send anything."""
    return "".join(filter(str.isprintable, " ".join(str(value).split())))[:longest]


def retry_after(value: str) -> float | None:
    """The seconds to wait, from a Retry-After header with seconds or a date. None where it is neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def is_plain_address(url: str) -> bool:
    """Whether a URL has a host, and no user, password, query or fragment."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname and parts.port != 0) and not {"@", "?", "#"} & set(url)
    except ValueError:
        return False
