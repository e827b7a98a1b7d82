"""The parameters of the backend, and the checks of their values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from retrievers.core.parameters import Checks, check_address, check_number, is_name, wrong
from retrievers.text import bm25, structured
from retrievers.text.languages import LANGUAGES
from retrievers.text.opensearch.queries import checked_filters, checked_template
from retrievers.text.structured import Serving

# The environment variables with the credentials. A recipe must not contain secrets.
USER, PASSWORD, API_KEY = "REC_R1_OPENSEARCH_USER", "REC_R1_OPENSEARCH_PASSWORD", "REC_R1_OPENSEARCH_API_KEY"
# The analyzers of both engines, by language. Other languages are split into words, and not stemmed.
ANALYZERS = {
    **{
        code: LANGUAGES[code].name
        for code in (
            *("ar", "bg", "bn", "ca", "cs", "da", "de", "el", "en", "es", "et", "eu", "fa", "fi", "fr", "ga", "hi"),
            *("hu", "hy", "id", "it", "lt", "lv", "nl", "no", "pt", "ro", "ru", "sv", "th", "tr"),
        )
    },
    **dict.fromkeys(("ja", "ko", "zh"), "cjk"),
}


@dataclass(frozen=True)
class Address:
    """How a cluster is asked. :class:`Params` checks the values.

    url: http(s)://HOST:PORT, without user and password.
    ca_certs: a file with the certificate authorities that are trusted. None = those of the system.
    connections: how many requests are sent at the same time.
    requests_per_second: the most requests per second of all threads together. None = no limit.
    timeout: how many seconds a request may take.
    retries: how often a failed request is sent again.
    breaker_failures, breaker_seconds: after so many failures in a row, no request is sent for so many seconds.
    """

    url: str
    ca_certs: str | None
    connections: int
    requests_per_second: float | None
    timeout: float
    retries: int
    breaker_failures: int
    breaker_seconds: float

    @property
    def with_port(self) -> str:
        """The URL with its port: where it has none, 443 for https and 9200 for http."""
        scheme, _, rest = self.url.rstrip("/").partition("://")
        host, slash, path = rest.partition("/")
        if not re.search(r":\d+$", host):
            host += ":443" if scheme == "https" else ":9200"
        return f"{scheme}://{host}{slash}{path}"


def _is_file(path: Any) -> bool:
    try:
        return isinstance(path, str) and Path(path).is_file()
    except OSError:  # Its name is too long, as the text of a certificate is.
        return False


@dataclass(frozen=True)
class Params:
    """The parameters of `opensearch` and `elasticsearch`. Raises ValueError, naming the field, for a bad value."""

    # The address of the cluster. $REC_R1_OPENSEARCH_USER and $REC_R1_OPENSEARCH_PASSWORD, or
    # $REC_R1_OPENSEARCH_API_KEY, hold the credentials. Without a port it is 9200, and 443 for https.
    url: str = "http://127.0.0.1:9200"
    # An index, alias or pattern that the cluster has. null: an index is built from the catalogue.
    index: str | None = None
    # The field of an existing index that holds the catalogue's ids; a keyword. null: they are its _id.
    id_field: str | None = None
    # The fields that are searched, with their weights: {title: 3, text: 1}.
    fields: dict[str, float] = field(default_factory=lambda: {"text": 1.0})
    # A query in the engine's language with "{query}" in its values, in place of `fields`.
    template: dict[str, Any] | None = None
    # Clauses in the engine's language that every hit must match: [{term: {brand: acme}}].
    filter: list[dict[str, Any]] | None = None
    # Which structured queries are answered, such as {filters: [brand]}, see `format.action`. null: none.
    structured: Serving | None = None
    # A name of your own for the state of an existing index. null: what the engine reports, so that every change counts.
    snapshot: str | None = None
    # Of a built index: a code or an English name of a language, which brings the engine's analyzer. null: words only.
    language: str | None = "en"
    k1: float = 1.2  # Of a built index: k1 of BM25: how fast repetitions of a term stop counting; at least 0.
    b: float = 0.75  # Of a built index: b of BM25: how much long documents are discounted; from 0 to 1.
    keep_alive: str = "10m"  # How long the engine keeps the snapshot between two requests, such as 90s, 10m or 2h.
    batch_size: int = 128  # How many searches one request holds.
    connections: int = 4  # How many requests are sent at the same time.
    requests_per_second: float | None = None  # The most requests per second of a process. null: no limit.
    timeout: float = 30.0  # How many seconds a request may take.
    retries: int = 3  # How often a failed request is sent again.
    breaker_failures: int = 5  # After so many failed requests in a row, none is sent for `breaker_seconds`.
    breaker_seconds: float = 30.0  # How many seconds no request is sent then.
    ca_certs: str | None = None  # A file of certificate authorities for https. null: those of the system.

    def __post_init__(self) -> None:
        checks = Checks(self)
        with checks:
            credentials = f"set the user in ${USER} and ${PASSWORD}, or a key in ${API_KEY}"
            check_address("url", self.url, credentials)
        checks.integers("connections", "breaker_failures", "batch_size")
        checks.integers("retries", least=0)
        checks.numbers("timeout", "breaker_seconds", above=True)
        for check in (self._check_rate, self._check_file, self._check_fields, self._check_query):
            with checks:
                check()
        with checks:
            bm25.set_analysis(self, ("k1", "b", "language"))
        for name in ("index", "id_field", "snapshot"):
            with checks:
                value = vars(self)[name]
                if value is not None and not (isinstance(value, str) and value):
                    raise ValueError(f"retriever.params.{name} must be a name or null, got {value!r}: correct it")
        with checks:
            object.__setattr__(self, "filter", checked_filters(self.filter))
        with checks:
            if not isinstance(self.keep_alive, str) or not re.fullmatch(r"[1-9][0-9]*[smh]", self.keep_alive):
                raise wrong("keep_alive", "a time such as 90s, 10m or 2h", self.keep_alive, "10m")
        checks.raise_all()
        self._check_unread()

    def _check_rate(self) -> None:
        if self.requests_per_second is not None:
            check_number("requests_per_second", self.requests_per_second, None, above=True)

    def _check_file(self) -> None:
        if self.ca_certs is not None and not _is_file(self.ca_certs):
            raise ValueError(
                f"retriever.params.ca_certs: there is no file {self.ca_certs!r:.100}: give the path of a .pem file"
            )

    def _check_query(self) -> None:
        """Check `template` and `structured`, which exclude each other."""
        object.__setattr__(self, "structured", structured.read(self.structured))  # A recipe has a mapping.
        if self.template is None:
            return
        object.__setattr__(self, "template", checked_template(self.template))
        if self.structured is not None:
            raise ValueError(
                "retriever.params.structured: a template has places for one text only: leave out one of the two"
            )

    def _check_fields(self) -> None:
        weights = self.fields
        numbers = isinstance(weights, Mapping) and [type(w) in (int, float) and 0 < w < 1e6 for w in weights.values()]
        names = [is_name(name) and "^" not in name for name in weights] if numbers else []
        if not numbers or not all(numbers) or not all(names):
            raise ValueError(
                f"retriever.params.fields must map fields to weights above 0 and below 1e6, got {weights!r:.200}: "
                "write them as {title: 3, text: 1}"
            )
        object.__setattr__(self, "fields", {name: float(weight) for name, weight in weights.items()})

    def _check_unread(self) -> None:
        """Raise ValueError for a parameter that has no effect."""
        if self.index is None:
            unread = [name for name in ("id_field", "snapshot") if getattr(self, name) is not None]
            which, fix = "an index that is built", "set retriever.params.index, or remove it"
        else:
            usual = {one.name: one.default for one in fields(self)}
            unread = [name for name in ("language", "k1", "b") if getattr(self, name) != usual[name]]
            which, fix = f"the existing index {self.index!r}, which has its own analysis", "remove it"
        if self.template is not None and self.fields != {"text": 1.0}:
            unread, which, fix = ["fields"], "a template, which names its own", "remove it"
        if unread:
            raise ValueError(f"retriever.params.{unread[0]} is not read for {which}: {fix}")

    def address(self) -> Address:
        """How the cluster is asked."""
        return Address(**{one.name: vars(self)[one.name] for one in fields(Address)})

    def analyzer(self) -> str:
        """The name of the analyzer of a built index."""
        return ANALYZERS.get(self.language or "", "standard")
