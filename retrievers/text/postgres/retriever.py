"""The retriever over a table of PostgreSQL."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import psycopg
from psycopg import sql

from retrievers.catalog import Catalog
from retrievers.core.index_folder import fingerprint_of
from retrievers.core.ranking import check_k, check_targets, no_hits
from retrievers.encoders.sentence import Encoder
from retrievers.text import structured
from retrievers.text.postgres import statements, tables
from retrievers.text.postgres.connection import Sessions, connect, errors
from retrievers.text.postgres.in_parts import of_structured, schema
from retrievers.text.postgres.in_parts import parameters as of_queries
from retrievers.text.postgres.params import Params
from retrievers.text.postgres.statements import Parts, Source, of_texts
from retrievers.text.postgres.storable import array, storable
from retrievers.types import Hits, Query, RetrieverError, Schema, Traits

logger = logging.getLogger(__name__)
MAX_CHARACTERS = 16_384  # So many characters of a query are searched by text. PostgreSQL's parsers take quadratic time.
# The errors of PostgreSQL for a text that it cannot read, such as thousands of operators of websearch_to_tsquery.
UNREADABLE = (
    psycopg.DataError,
    psycopg.InternalError,
    psycopg.errors.ProgramLimitExceeded,
    psycopg.errors.StatementTooComplex,
)
OF_TEXT = ("language", "operator", "function", "normalization", "weights", "fields")
OF_VECTORS = ("distance", "index", "ef_search")
OF_HYBRID = ("depth", "vector_weight")


class Postgres:
    """A table of PostgreSQL as a retriever; see :class:`retrievers.types.Retriever` for the contract.

    It reads ``Query.text``, and with the parameter `structured` also ``Query.structured``. Ranks and hits are exact and
    agree, with these exceptions for `index: hnsw`: in mode vector, `search` may miss documents, and `ranks` compares
    all embeddings; in mode hybrid, both use what the index finds. A query that PostgreSQL cannot read finds nothing. It
    may be shared between threads, and connects again in a child process.

    params: the parameters.
    source: the table.
    documents: the number of documents in the catalogue.
    catalog: the catalogue, whose ids are joined with those of an existing table. None = the table has its rows.
    fingerprint: a hash of what the table holds and of the parameters.
    settings: settings of the sessions.
    absent: the rows that the table lacks.
    served: which structured queries are answered. None = none.
    """

    def __init__(
        self,
        params: Params,
        source: Source,
        documents: int,
        catalog: Catalog | None,
        fingerprint: str,
        settings: Mapping[str, str],
        absent: Sequence[int],
        served: Schema | None = None,
    ) -> None:
        self.params, self.fingerprint = params, fingerprint
        self._source, self._documents, self._catalog = source, documents, catalog
        self._settings, self._absent, self._schema = dict(settings), list(absent), served
        self._sessions = Sessions(str(params.url), params.timeout, params.connections, settings)
        self._texts = _made(source, params, of_texts(source, params))
        self._structured = _made(source, params, of_structured(source, params)) if served is not None else None

    def __reduce__(self) -> tuple[Callable[..., Postgres], tuple[Any, ...]]:
        about = self.params, self._source, self._documents, self._catalog
        return Postgres, (*about, self.fingerprint, self._settings, self._absent, self._schema)

    def __len__(self) -> int:
        return self._documents

    def retriever_traits(self) -> Traits:
        """The documents that the table lacks, what the encoder was tuned on, and which structured queries it serves."""
        fitted_on = self._encoder.model.tuned_on() if self.params.mode != "text" else ()
        return Traits(absent=self._absent, fitted_on=fitted_on, structured=self._schema)

    @cached_property
    def _encoder(self) -> Encoder:
        return self.params.encoder()

    @cached_property
    def _ids(self) -> str | None:
        """The ids of the catalogue as an array of PostgreSQL, for a table that has no rows."""
        if self._catalog is None:
            return None
        return array(self._catalog.ids)

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol. All queries are sent together."""
        hits = no_hits(len(queries), check_k(k, len(self)))
        found = self._found(queries, {"k": hits.rows.shape[1]})
        if found:
            query, place, row, score = (np.array(column) for column in zip(*found, strict=True))
            hits.rows[query, place - 1], hits.scores[query, place - 1] = row, score
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol. All queries are sent together."""
        targets = check_targets(queries, targets, len(self), structured=True)
        ranks = np.zeros(targets.shape, np.int32)
        wanted = [np.unique(row[row >= 0]).tolist() for row in targets]
        for query, row, place in self._found(queries, {}, wanted):
            ranks[query, targets[query] == row] = place
        return ranks

    def _found(
        self, queries: Sequence[Query], parameters: Mapping[str, Any], targets: Sequence[list[int]] | None = None
    ) -> list[tuple[Any, ...]]:
        """What the statement of `search` or, with ``targets``, of `ranks` returns for the queries that have a text and,
        of ``targets``, at least one."""
        structured.check(queries, self._schema)
        asked = [q for q, query in enumerate(queries) if targets is None or targets[q]]
        in_parts = {q: one for q in asked if (one := queries[q].structured) is not None}
        texts = [q for q in asked if q not in in_parts and queries[q].text.strip()]
        found = self._ask(self._texts, texts, self._of_texts([queries[q].text for q in texts]), parameters, targets)
        if self._structured is not None:
            own = of_queries(self._source, self.params, list(in_parts.values()))
            found += self._ask(self._structured, list(in_parts), own, parameters, targets)
        return found

    def _of_texts(self, texts: Sequence[str]) -> dict[str, list[str | None]]:
        """The parameters of a statement for some texts."""
        vectors: list[str | None] = [None] * len(texts)
        if self.params.mode != "text" and texts:
            embeddings = self._encoder.queries([storable(text) for text in texts])
            vectors = [json.dumps(vector.tolist()) for vector in embeddings]
        return {"texts": [storable(text[:MAX_CHARACTERS]) for text in texts], "vectors": vectors}

    def _ask(
        self,
        made: _Statements,
        numbers: Sequence[int],
        own: Mapping[str, Sequence[str | None]],
        parameters: Mapping[str, Any],
        targets: Sequence[list[int]] | None,
    ) -> list[tuple[Any, ...]]:
        """The rows that a statement returns for some queries.

        made: the statements for queries of this kind.
        numbers: the numbers of the queries.
        own: the parameters that have a value for each of these queries.
        parameters: the other parameters.
        targets: the targets of all queries. None = `search`.
        """
        size, batches = self.params.batch_size, []
        each: dict[str, Sequence[Any]] = {
            "numbers": numbers,
            **own,
            "targets": [None if targets is None else f"{{{','.join(map(str, targets[q]))}}}" for q in numbers],
        }
        for start in range(0, len(numbers), size):
            batch = {name: list(values[start : start + size]) for name, values in each.items()} | dict(parameters)
            batches.append(batch if self._ids is None else batch | {"ids": self._ids})
        statement = made.search if targets is None else made.ranks
        return [row for answer in self._answers(statement, made.refused, batches, list(each)) for row in answer]

    def _answers(
        self, statement: sql.Composed, refused: sql.Composed, batches: Sequence[dict[str, Any]], each: Sequence[str]
    ) -> list[list[tuple[Any, ...]]]:
        """The answers to all batches. A query whose text PostgreSQL cannot read is left out and so finds nothing.

        refused: a statement that only reads the texts.
        each: the names of the parameters that have a value for each query.
        """
        if not batches:
            return []
        try:
            return self._sessions.ask(statement, batches)
        except (RetrieverError, ConnectionError) as error:
            if self.params.mode == "vector" or not isinstance(error.__cause__, UNREADABLE):
                raise
            kept = [self._readable(refused, batch, each) for batch in batches]
            if sum(len(batch["numbers"]) for batch in kept) == sum(len(batch["numbers"]) for batch in batches):
                raise  # Each of the texts can be read, so the error is not the fault of a query.
            return self._sessions.ask(statement, kept)

    def _readable(self, refused: sql.Composed, batch: dict[str, Any], each: Sequence[str]) -> dict[str, Any]:
        """The queries of a batch whose text PostgreSQL can read."""
        kept = []
        for i in range(len(batch["numbers"])):
            one = {name: batch[name][i : i + 1] for name in each}
            try:
                self._sessions.ask(refused, [one])
                kept.append(i)
            except (RetrieverError, ConnectionError) as error:
                if not isinstance(error.__cause__, UNREADABLE):
                    raise
                logger.info("PostgreSQL cannot read a query, which therefore finds nothing: %s", error)
        return batch | {name: [batch[name][i] for i in kept] for name in each}


class _Statements(NamedTuple):
    """The statements for queries of one kind. refused: one that only reads their texts."""

    search: sql.Composed
    ranks: sql.Composed
    refused: sql.Composed


def _made(source: Source, params: Params, parts: Parts) -> _Statements:
    return _Statements(
        statements.search(source, parts), statements.ranks(source, params, parts), statements.refused(parts)
    )


def opened(catalog: Catalog, params: Params, index_format: int) -> Postgres:
    """The retriever, whose table is made if it does not exist.

    Raises RetrieverError where the database or the table cannot be used, and ValueError for a language that it lacks.
    """
    url = str(params.url)
    with errors(url), connect(url, params.timeout) as connection:
        server = tables.inspect(connection, params)
        settings = {"search_path": f"pg_catalog, {server.vector_schema}" if server.vector_schema else "pg_catalog"}
        connection.execute(  # A build may take longer than the database allows for a statement.
            "SELECT set_config('search_path', %s, false), set_config('statement_timeout', '0', false)",
            (settings["search_path"],),
        )
        if params.table is not None:
            source = tables.existing_table(connection, params, server)
            content = tables.content(connection, source, catalog, params)
            settings["enable_nestloop"] = "off"  # The ids are joined by hashes, whatever PostgreSQL estimates.
        else:
            source, meta = tables.own_table(catalog, params, server)
            if not tables.exists(connection, source):
                tables.build(connection, source, meta, catalog, params)
            content = tables.check_own(connection, source, catalog, params)
        served = schema(connection, source, catalog, params)
    if params.index == "hnsw" and params.mode != "text":
        # The index goes on until it has found k documents, instead of ending with ef_search ones.
        settings |= {"hnsw.ef_search": str(params.ef_search), "hnsw.iterative_scan": "strict_order"}
    fingerprint = _fingerprint(catalog, params, server, content, index_format)
    joined = catalog if params.table is not None else None
    return Postgres(params, source, len(catalog), joined, fingerprint, settings, content.absent, served)


def _fingerprint(
    catalog: Catalog, params: Params, server: tables.Server, content: tables.Content, index_format: int
) -> str:
    """A hash of everything that changes a ranking. The place does not."""
    values, text, vectors = asdict(params), params.mode != "vector", params.mode != "text"
    shaping = ["mode", *(OF_TEXT if text else ()), *(OF_VECTORS if vectors else ())]
    shaping += OF_HYBRID if params.mode == "hybrid" else ()
    return fingerprint_of(
        {
            "kind": "postgres",
            "format": index_format,
            "catalog": catalog.fingerprint,
            "documents": len(catalog),
            "content": content.checksum,
            "params": {name: values[name] for name in shaping},
            "text": [server.version, server.configuration, server.dictionaries] if text else None,
            "encoder": params.encoder().describe() if vectors else None,
            "pgvector": server.pgvector if vectors else None,
        }
    )
