"""What the service counts, in the text format of Prometheus."""

from __future__ import annotations

# The upper bounds of the latency histogram, in seconds.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CAUSES = ("timeout", "malformed", "down")


class Metrics:
    """Counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = registry = CollectorRegistry()
        self._requests = Counter("rec_r1_requests", "Requests.", ["path", "status"], registry=registry)
        self._queries = Counter("rec_r1_queries", "Queries that were answered.", registry=registry)
        self._fallbacks = Counter("rec_r1_fallbacks", "Queries sent as they are.", ["cause"], registry=registry)
        self._seconds = Histogram(
            "rec_r1_request_seconds", "Seconds of a request.", ["path"], buckets=BUCKETS, registry=registry
        )
        self._up = Gauge("rec_r1_policy_up", "1 where the policy can write now, else 0.", registry=registry)
        self._restarts = Gauge("rec_r1_policy_restarts", "Restarts of the policy's process.", registry=registry)
        for cause in CAUSES:
            self._fallbacks.labels(cause)  # A cause that has not occurred is shown as 0.

    def count_request(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def count_query(self, fallback: str | None) -> None:
        """Count an answered query. fallback: one of `CAUSES`, or None."""
        self._queries.inc()
        if fallback is not None:
            self._fallbacks.labels(fallback).inc()

    def text(self, up: bool, restarts: int) -> tuple[bytes, str]:
        """The content and the content type of an answer to /metrics."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        self._up.set(up)
        self._restarts.set(restarts)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
