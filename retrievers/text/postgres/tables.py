"""The table of a retriever: one that the backend makes of the catalogue, or an existing one."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from psycopg import sql

from retrievers.catalog import Catalog
from retrievers.core.index_folder import fingerprint_of
from retrievers.core.joined import NAMED, named, warn
from retrievers.text.postgres.connection import Connection
from retrievers.text.postgres.params import Params
from retrievers.text.postgres.statements import OPERATOR_CLASSES, Source, regconfig
from retrievers.text.postgres.storable import storable
from retrievers.types import RetrieverError

logger = logging.getLogger(__name__)
TABLE_FORMAT = 1  # The version of the tables that the backend makes. It is part of their names.
MAX_TEXT_BYTES = 1 << 18  # A tsvector has at most 1 MB, which texts of this length together cannot exceed.
MAX_DIMENSIONS = 4000  # pgvector's index of halfvec has at most so many dimensions.
OLDEST = 13  # The oldest version of PostgreSQL that has all that the statements need, such as FETCH FIRST … WITH TIES.
OLDEST_HALFVEC, OLDEST_HNSW = (0, 7), (0, 8)  # Of pgvector: with an index that goes on until it has k documents.
PROGRESS_FROM = 50_000  # A build shows a progress bar from so many documents on.


class Server(NamedTuple):
    """What a database is, as far as it changes rankings.

    version: the major version of PostgreSQL.
    pgvector: the version of the extension. None = the database does not have it.
    vector_schema: the quoted name of the schema of the extension, for the search path. "" where there is none.
    configuration: the quoted name of the text search configuration, with its schema.
    dictionaries: a hash of the parser and the dictionaries of this configuration.
    """

    version: int
    pgvector: str | None
    vector_schema: str
    configuration: str
    dictionaries: str


class Content(NamedTuple):
    """What a table holds.

    documents: the number of its documents.
    checksum: a hash over the id and the searched columns of every document.
    absent: the rows of the catalogue that it lacks, ascending.
    """

    documents: int
    checksum: str
    absent: list[int]


def inspect(connection: Connection, params: Params) -> Server:
    """What the database is.

    Raises RetrieverError for a database that cannot be used, and ValueError for a language that it does not have.
    """
    version, encoding, pgvector, vector_schema = _one(
        connection,
        "SELECT current_setting('server_version_num')::int / 10000, current_setting('server_encoding'), "
        "(SELECT extversion FROM pg_extension WHERE extname = 'vector'), "
        "(SELECT quote_ident(nspname) FROM pg_extension JOIN pg_namespace AS n ON n.oid = extnamespace "
        "WHERE extname = 'vector')",
    )
    _check_versions(version, pgvector if params.mode != "text" else None, params)
    if encoding != "UTF8":
        raise RetrieverError(
            f"the database of retriever.params.url stores its texts in {encoding}, which lacks characters that a "
            "query may have: use a database with the encoding UTF8"
        )
    if params.mode != "text" and pgvector is None:
        raise RetrieverError(
            f"retriever.params.mode: {params.mode} needs pgvector, which the database of retriever.params.url does not "
            "have: run CREATE EXTENSION vector there, or set retriever.params.mode=text"
        )
    found = connection.execute(
        "SELECT quote_ident(nspname) || '.' || quote_ident(cfgname), "
        "encode(sha256(convert_to(cfgparser::text || (SELECT coalesce("
        "string_agg(concat_ws(' ', maptokentype, mapseqno, dictname, dicttemplate::regproc, dictinitoption), ';' "
        "ORDER BY maptokentype, mapseqno), '') FROM pg_ts_config_map JOIN pg_ts_dict AS d ON d.oid = mapdict "
        "WHERE mapcfg = c.oid), 'UTF8')), 'hex') FROM pg_ts_config AS c JOIN pg_namespace AS n ON n.oid = cfgnamespace "
        "WHERE cfgname = %(name)s OR nspname || '.' || cfgname = %(name)s "
        "ORDER BY pg_ts_config_is_visible(c.oid) DESC LIMIT 1",
        {"name": params.configuration},
    ).fetchone()
    if found is None:
        names = [name for (name,) in connection.execute("SELECT DISTINCT cfgname FROM pg_ts_config ORDER BY 1")]
        raise ValueError(
            f"retriever.params.language: {params.language!r} has no text search configuration in this database, which "
            f"has {', '.join(names)}: choose one of them, or null for words as they are written"
        )
    return Server(version, pgvector, vector_schema or "", *found)


def _check_versions(version: int, pgvector: str | None, params: Params) -> None:
    """Raise RetrieverError for versions that are too old. pgvector: None = it is not used, or not there."""
    if version < OLDEST:
        raise RetrieverError(f"retriever.params.url: PostgreSQL {version} is too old: upgrade it to {OLDEST} or later")
    least = OLDEST_HNSW if params.index == "hnsw" else OLDEST_HALFVEC if params.table is None else (0,)
    if pgvector is not None and tuple(map(int, re.findall(r"\d+", pgvector)[:2])) < least:
        wanted = ".".join(map(str, least))
        raise RetrieverError(
            f"retriever.params.mode: {params.mode} with index={params.index} needs pgvector {wanted} or later, and the "
            f"database of retriever.params.url has {pgvector}: run ALTER EXTENSION vector UPDATE there"
        )


def own_table(catalog: Catalog, params: Params, server: Server) -> tuple[Source, dict[str, Any]]:
    """The table that the backend makes of a catalogue, and its description. Its name is a hash of the description."""
    encoder = params.encoder() if params.mode != "text" else None
    meta = {
        "kind": "postgres",
        "format": TABLE_FORMAT,
        "catalog": catalog.fingerprint,
        "text": None
        if params.mode == "vector"
        else [server.configuration, server.dictionaries, sorted((params.fields or {}).items())],
        "encoder": encoder.describe() if encoder is not None else None,
        "index": [params.index, params.distance] if params.index != "exact" and encoder is not None else None,
    }
    names = params.structured.filters if params.structured is not None else []
    if names:  # The name of a table of an older version stays.
        meta["filters"] = names
    kind = ""
    if encoder is not None:
        if encoder.dimension > MAX_DIMENSIONS:
            raise RetrieverError(
                f"retriever.params.model: {params.model} has {encoder.dimension} dimensions, and an index of pgvector "
                f"at most {MAX_DIMENSIONS}: take another encoder"
            )
        kind = f"halfvec({encoder.dimension})"
    name = f"rec_r1_{fingerprint_of(meta)[:32]}"
    filters = tuple((one, f"filter_{i}") for i, one in enumerate(names))
    return Source(params.schema, name, server.configuration, kind, filters=filters), meta


def build(connection: Connection, source: Source, meta: Mapping[str, Any], catalog: Catalog, params: Params) -> None:
    """Make the table of a catalogue, unless it exists.

    Everything happens in one transaction, so that an interrupted build leaves nothing, and others see the whole table
    or none. Where two processes build the same table, the second waits for the first.
    """
    vectors = None
    if params.mode != "text":
        vectors = params.encoder().documents(catalog.texts)
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (source.table,))
        if exists(connection, source):
            return
        logger.info("writing %d documents into the table %s.%s", len(catalog), source.schema, source.table)
        columns: list[sql.Composable] = [sql.SQL("row int PRIMARY KEY"), sql.SQL("id text NOT NULL")]
        names = list(params.columns) if params.mode != "vector" else []
        columns += [sql.SQL("text_{} text NOT NULL").format(sql.SQL(str(i))) for i in range(len(names))]
        if names:
            parts = [
                sql.SQL("setweight(to_tsvector({}, text_{}), {})").format(
                    regconfig(source.configuration), sql.SQL(str(i)), sql.Literal(weight)
                )
                for i, weight in enumerate(params.columns.values())
            ]
            columns.append(
                sql.SQL("terms tsvector GENERATED ALWAYS AS ({}) STORED").format(sql.SQL(" || ").join(parts))
            )
        columns += [sql.SQL("{} text NOT NULL").format(sql.Identifier(one)) for _, one in source.filters]
        if vectors is not None:
            columns.append(sql.SQL("embedding {} NOT NULL").format(sql.SQL(source.vector_type)))
        connection.execute(sql.SQL("CREATE TABLE {} ({})").format(source.name, sql.SQL(", ").join(columns)))
        _copy(connection, source, catalog, names, vectors)
        if names:
            connection.execute(sql.SQL("CREATE INDEX ON {} USING gin (terms)").format(source.name))
        if vectors is not None and params.index == "hnsw":
            operators = sql.SQL(f"halfvec_{OPERATOR_CLASSES[params.distance]}_ops")
            connection.execute(sql.SQL("CREATE INDEX ON {} USING hnsw (embedding {})").format(source.name, operators))
        connection.execute(sql.SQL("ANALYZE {}").format(source.name))
        # The checksum shows later whether the table is still what was built.
        described = json.dumps({**meta, "checksum": content(connection, source, catalog, params).checksum})
        connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(source.name, sql.Literal(described)))


def _copy(
    connection: Connection, source: Source, catalog: Catalog, names: Sequence[str], vectors: np.ndarray | None
) -> None:
    """Write ids, texts and embeddings by COPY."""
    from tqdm import tqdm

    texts = [catalog.column(name) for name in (*names, *(one for one, _ in source.filters))]
    columns = ["row", "id", *(f"text_{i}" for i in range(len(names))), *(one for _, one in source.filters)]
    columns += ["embedding"] if vectors is not None else []
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        source.name, sql.SQL(", ").join(sql.Identifier(column) for column in columns)
    )
    cut, most = 0, MAX_TEXT_BYTES // max(1, len(names))
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        documents = zip(catalog.ids, *texts, strict=True)
        hidden = len(catalog) <= PROGRESS_FROM
        for row, (identifier, *values) in enumerate(
            tqdm(documents, "writing", total=len(catalog), disable=hidden, leave=False)
        ):
            stored = [storable(value, most) for value in values]
            cut += any(len(value.encode()) > most for value in values)
            more = [json.dumps(vectors[row].astype(float).tolist())] if vectors is not None else []
            copy.write_row((row, storable(identifier), *stored, *more))
    if cut:
        logger.warning("%d documents were cut to %d bytes, because a tsvector has a limit", cut, most)


def exists(connection: Connection, source: Source) -> bool:
    """Whether the table exists."""
    # to_regclass would use a cache, which may not know yet what another session has just made.
    (found,) = _one(
        connection,
        "SELECT count(*) FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace "
        "WHERE nspname = %s AND relname = %s AND relkind IN ('r', 'p', 'v', 'm', 'f')",
        (source.schema, source.table),
    )
    return bool(found)


def check_own(connection: Connection, source: Source, catalog: Catalog, params: Params) -> Content:
    """What the table that the backend made holds. Raises RetrieverError where that is not what was built."""
    found = content(connection, source, catalog, params)
    (comment,) = _one(connection, "SELECT obj_description(%s::regclass, 'pg_class')", source.name.as_string(connection))
    try:
        built = json.loads(comment or "")["checksum"]
    except (ValueError, KeyError, TypeError):
        built = None
    if (found.documents, found.checksum) != (len(catalog), built):
        raise RetrieverError(
            f"the table {source.schema}.{source.table} was changed after it was built ({found.documents} of "
            f"{len(catalog)} documents): run DROP TABLE on it, and build it again with `rec-r1 index RECIPE`"
        )
    return found


def existing_table(connection: Connection, params: Params, server: Server) -> Source:
    """The table that a recipe names. Raises RetrieverError where it or a column is missing or has another type."""
    source = Source(
        params.schema,
        str(params.table),
        server.configuration,
        "",
        params.id_column,
        params.tsvector_column,
        params.text_column,
        str(params.embedding_column),
        tuple((one, one) for one in params.structured.filters) if params.structured is not None else (),
    )
    where = f"the table {source.schema}.{source.table}"
    if not exists(connection, source):
        similar = _like(connection, source)
        raise RetrieverError(
            f"{where} does not exist: correct retriever.params.table or retriever.params.schema{similar}"
        )
    columns = connection.execute(  # Every kind of text is called text.
        "SELECT attname, CASE typcategory WHEN 'S' THEN 'text' ELSE format_type(atttypid, atttypmod) END "
        "FROM pg_attribute JOIN pg_type AS t ON t.oid = atttypid "
        "WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        (source.name.as_string(connection),),
    )
    types: dict[str, str] = dict(columns.fetchall())
    asked = {"id_column": "", "text_column": "text", "tsvector_column": "tsvector"}
    if params.mode == "vector":
        asked = {"id_column": ""}
    if params.mode != "text":
        asked["embedding_column"] = r"(?:.*\.)?(halfvec|vector)\(\d+\)"
    for one, _ in source.filters:
        if one not in types:
            raise RetrieverError(
                f"retriever.params.structured.filters: {where} has no column {one!r}: choose from {', '.join(types)}"
            )
    for name, pattern in asked.items():
        column = getattr(params, name)
        if column is None:
            continue
        if column not in types:
            raise RetrieverError(
                f"retriever.params.{name}: {where} has no column {column!r}: choose from {', '.join(types)}"
            )
        if pattern and not re.fullmatch(pattern, types[column]):
            wanted = pattern if pattern.isalpha() else "vector(N) or halfvec(N)"
            raise RetrieverError(
                f"retriever.params.{name}: {column!r} in {where} is {types[column]}, not {wanted}: name another column"
            )
    if params.mode == "text":
        return source
    kind = types[source.embedding].rpartition(".")[2]
    dimension = params.encoder().dimension
    if not kind.endswith(f"({dimension})"):
        raise RetrieverError(
            f"retriever.params.model: {params.model} has {dimension} dimensions, and {source.embedding!r} in {where} "
            f"is {kind}: take the encoder that made the embeddings"
        )
    if params.index == "hnsw":
        _check_hnsw(connection, source, params, where)
    return replace(source, vector_type=kind)


def _like(connection: Connection, source: Source) -> str:
    """The end of a message that a table does not exist: the first one whose name differs in its schema or in case."""
    wanted = source.table.replace('"', "").lower()
    found = connection.execute(
        "SELECT nspname, relname FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace WHERE relkind IN "
        "('r', 'p', 'v', 'm', 'f') AND nspname <> 'pg_catalog' AND lower(relname) = ANY(%s) ORDER BY 1, 2 LIMIT 1",
        ([wanted, wanted.rpartition(".")[2]],),
    ).fetchone()
    return "" if found is None else f": did you mean schema={found[0]} and table={found[1]}?"


def _check_hnsw(connection: Connection, source: Source, params: Params, where: str) -> None:
    """Raise RetrieverError where the embeddings have no HNSW index for the distance."""
    found = [
        name
        for (name,) in connection.execute(
            "SELECT opcname FROM pg_index JOIN pg_class AS i ON i.oid = indexrelid JOIN pg_am AS m ON m.oid = i.relam "
            "JOIN pg_opclass AS o ON o.oid = indclass[0] JOIN pg_attribute AS a ON attrelid = indrelid "
            "AND attnum = indkey[0] WHERE indrelid = %s::regclass AND amname = 'hnsw' AND attname = %s AND indisvalid",
            (source.name.as_string(connection), source.embedding),
        )
    ]
    if not any(name.endswith(f"_{OPERATOR_CLASSES[params.distance]}_ops") for name in found):
        has = f"only {', '.join(found)}" if found else "none"
        raise RetrieverError(
            f"retriever.params.index: {where} has no HNSW index of {source.embedding!r} for "
            f"distance={params.distance} (it has {has}): create one, set another distance, or set index=exact"
        )


def content(connection: Connection, source: Source, catalog: Catalog, params: Params) -> Content:
    """What the table holds of the catalogue. It reads the whole table once.

    Raises RetrieverError for an id that occurs twice, and where the table holds no document of the catalogue.
    """
    key = sql.SQL("d.{}").format(sql.Identifier(source.id_column or "id"))
    hashed: list[sql.Composable] = []
    searched: list[sql.Composable] = []
    if params.mode != "vector":
        column = sql.SQL("d.{}").format(sql.Identifier(source.terms or source.text or ""))
        read = sql.SQL("tsvectorsend({})" if source.terms is not None else "convert_to({}, 'UTF8')")
        hashed.append(read.format(column))
        searched.append(column)
    if params.mode != "text":
        column = sql.SQL("d.{}").format(sql.Identifier(source.embedding))
        hashed.append(sql.SQL(f"{source.vector_type.partition('(')[0]}_send({{}})").format(column))
        searched.append(column)
    for _, one in source.filters:
        hashed.append(sql.SQL("convert_to(d.{}::text, 'UTF8')").format(sql.Identifier(one)))
    # A hash over (id, columns) gives 64 bits for a document, and their exclusive or does not depend on the order.
    statement = sql.SQL(
        "SELECT count(*), count(DISTINCT {key}::text), to_hex(coalesce(bit_xor(('x' || encode(substr(sha256("
        "sha256(convert_to({key}::text, 'UTF8')) || {hashed}), 1, 8), 'hex'))::bit(64)::bigint), 0)), "
        "(SELECT array_agg(listed.place - 1 ORDER BY listed.place) FROM unnest(%(ids)s::text[]) WITH ORDINALITY "
        "AS listed(id, place) WHERE NOT EXISTS (SELECT FROM {name} AS d WHERE {key}::text = listed.id AND ({there}))), "
        "(SELECT count(*) FROM {name} AS d WHERE {key}::text <> ALL (%(ids)s::text[])), "
        "(SELECT array_agg(id) FROM (SELECT {key}::text AS id FROM {name} AS d WHERE {key}::text <> ALL "
        "(%(ids)s::text[]) ORDER BY 1 LIMIT %(named)s) AS f) FROM {name} AS d WHERE {key} IS NOT NULL"
    ).format(
        key=key,
        hashed=sql.SQL(" || ").join(sql.SQL("coalesce(sha256({}), '')").format(each) for each in hashed),
        name=source.name,
        # A document without a text is found by its embedding, and the other way round.
        there=sql.SQL(" OR ").join(sql.SQL("{} IS NOT NULL").format(each) for each in searched),
    )
    row = _one(connection, statement, {"ids": [storable(one) for one in catalog.ids], "named": NAMED})
    documents, distinct, checksum, absent, foreign, first = row
    where = f"the table {source.schema}.{source.table}"
    if distinct != documents:
        raise RetrieverError(
            f"{where} has {documents} documents with only {distinct} different ids: name a view with one row for each "
            "id, or correct retriever.params.id_column"
        )
    _report(where, catalog, absent or [], foreign, first or [])
    return Content(documents, f"{documents}-{checksum}", absent or [])


def _report(where: str, catalog: Catalog, absent: list[int], foreign: int, first: list[str]) -> None:
    if len(absent) == len(catalog):
        raise RetrieverError(
            f"{where} holds none of the {len(catalog)} documents of the catalogue; the first ids of the catalogue: "
            f"{named(catalog.ids)}; of the table: {named(first)}: correct retriever.params.id_column"
        )
    warn(where, catalog.ids, absent, foreign, first)


def _one(connection: Connection, statement: Any, parameters: Any = ()) -> tuple[Any, ...]:
    """The only row that a statement returns. parameters: a mapping, or the value of the only parameter."""
    given = parameters if isinstance(parameters, dict | tuple) else (parameters,)
    row = connection.execute(statement, given).fetchone()
    assert row is not None
    return row
