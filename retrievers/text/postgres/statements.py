"""The SQL of `search` and `ranks`. A statement answers a batch of queries, whose texts are parameters of it.

PostgreSQL orders by (score descending, row), as all backends do, and scores are its float4 numbers.

In mode text, the words of a query are the lexemes that `to_tsvector` makes of it. With the operator "or", a document is
scored for those words that it has. ts_rank_cd sets 32 kB of memory to zero for each word and each operator of a query,
for every document, and words that the document lacks do not change the result.

In mode hybrid, score(d) = 1 / (60 + rank by text) + vector_weight / (60 + rank by embedding), as in
`combine/hybrid.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from psycopg import sql

from retrievers.text.postgres.params import WEIGHTS, Params

MAX_TERMS = 256  # So many different words of a query are searched, the first ones.
RRF_CONSTANT = 60  # The constant of reciprocal rank fusion, as in `combine/hybrid.py`.
OPERATORS = {"inner_product": "<#>", "cosine": "<=>", "l2": "<->"}  # Distances of pgvector: smaller is nearer.
SIMILARITIES = {"inner_product": "-({})", "cosine": "1 - ({})", "l2": "-({})"}  # A score from a distance.
OPERATOR_CLASSES = {"inner_product": "ip", "cosine": "cosine", "l2": "l2"}  # The index for each distance.


@dataclass(frozen=True)
class Source:
    """Where the documents are.

    schema, table: the table.
    configuration: the text search configuration, as its quoted name with its schema.
    vector_type: the type of the embeddings, such as halfvec(384). "" where there are none.
    id_column: the column with the ids of an existing table. None = the table was made by this backend, and has rows.
    terms: the column with the texts as tsvector. None = `text`.
    text: the column with the texts.
    embedding: the column with the embeddings.
    filters: for structured queries: pairs of a field by which they filter, and its column.
    """

    schema: str
    table: str
    configuration: str
    vector_type: str = ""
    id_column: str | None = None
    terms: str | None = "terms"
    text: str | None = None
    embedding: str = "embedding"
    filters: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> sql.Identifier:
        """The table, with its schema."""
        return sql.Identifier(self.schema, self.table)

    @property
    def row(self) -> sql.Composable:
        """The row of the catalogue, in a statement with :meth:`documents`."""
        return sql.SQL("d.row") if self.id_column is None else sql.SQL("listed.row")

    @property
    def documents(self) -> sql.Composable:
        """The documents that the catalogue has, as the tables of a FROM."""
        if self.id_column is None:
            return sql.SQL("{} AS d").format(self.name)
        return sql.SQL("{} AS d JOIN listed ON listed.id = d.{}::text").format(
            self.name, sql.Identifier(self.id_column)
        )

    @property
    def lexemes(self) -> sql.Composable:
        """The tsvector of a document. For a column of texts it is the expression that an index may have."""
        if self.terms is not None:
            return sql.SQL("d.{}").format(sql.Identifier(self.terms))
        return sql.SQL("to_tsvector({}, d.{})").format(regconfig(self.configuration), sql.Identifier(self.text or ""))


def regconfig(configuration: str) -> sql.Composable:
    """A text search configuration as a constant, which an index on an expression needs."""
    return sql.SQL("{}::regconfig").format(sql.Literal(configuration))


class Parts(NamedTuple):
    """The two parts of a statement that differ between texts and structured queries.

    queries: the queries of a batch, as the common table expression `query`.
    scored: the row and the score of each document that `query` finds.
    exact: the same, without an approximate index.
    """

    queries: sql.Composable
    scored: sql.Composable
    exact: sql.Composable


def of_texts(source: Source, params: Params) -> Parts:
    """The parts for texts."""
    return Parts(_queries(source, params), _scored(source, params), _scored(source, params, exact=True))


def search(source: Source, parts: Parts) -> sql.Composed:
    """The statement of `search`. It returns (number of the query, place from 1, row, score)."""
    found = _best(parts.scored, sql.SQL("%(k)s"))
    return _for_each_query(source, parts.queries, sql.SQL("found.place, found.row, found.score"), found)


def ranks(source: Source, params: Params, parts: Parts) -> sql.Composed:
    """The statement of `ranks`. It returns (number of the query, row of a target, place from 1).

    The places are counted among the documents that score at least as high as the lowest target, so that only these are
    sorted. Mode vector compares all embeddings, with an index, too.
    """
    scored = parts.exact
    places = sql.SQL("SELECT s.row, row_number() OVER (ORDER BY s.score DESC, s.row) AS place FROM ({}) AS s").format(
        scored
    )
    if params.mode != "hybrid":  # A fused list is short.
        places += sql.SQL(
            " WHERE s.score >= (SELECT min(t.score) FROM ({}) AS t WHERE t.row = ANY(query.targets))"
        ).format(scored)
    wanted = sql.SQL("SELECT * FROM ({}) AS p WHERE p.row = ANY(query.targets)").format(places)
    return _for_each_query(source, parts.queries, sql.SQL("found.row, found.place"), wanted)


def refused(parts: Parts) -> sql.Composed:
    """A statement that makes PostgreSQL read the text of each query, and searches nothing."""
    return sql.SQL("WITH {} SELECT number, terms::text FROM query").format(parts.queries)


def _for_each_query(source: Source, queries: sql.Composable, columns: sql.SQL, found: sql.Composable) -> sql.Composed:
    listed = sql.SQL("")
    if source.id_column is not None:
        listed = sql.SQL(
            "listed AS MATERIALIZED (SELECT id, (place - 1)::int AS row "
            "FROM unnest(%(ids)s::text[]) WITH ORDINALITY AS given(id, place)), "
        )
    return sql.SQL(
        "WITH {listed}{query} SELECT query.number, {columns} FROM query CROSS JOIN LATERAL ({found}) AS found"
    ).format(listed=listed, query=queries, columns=columns, found=found)


def _queries(source: Source, params: Params) -> sql.Composed:
    """The queries of a batch as a common table expression, with what each mode needs of them."""
    config = regconfig(source.configuration)
    terms: sql.Composable = sql.SQL("NULL::tsquery")
    singles: sql.Composable = sql.SQL("NULL::tsquery[]")
    words: sql.Composable = sql.SQL("NULL::text[]")
    vector: sql.Composable = sql.SQL("NULL")
    if params.mode != "vector" and params.operator == "web":
        web = sql.SQL("websearch_to_tsquery({}, text)").format(config)
        terms = sql.SQL("CASE WHEN numnode({web}) < {most} THEN {web} END").format(web=web, most=2 * MAX_TERMS)
    elif params.mode != "vector":
        words = lexemes_of(config, sql.SQL("text"))
        joint = sql.Literal(" & " if params.operator == "and" else " | ")
        terms = sql.SQL("array_to_string(words, {})::tsquery").format(joint)
        singles = sql.SQL("words::tsquery[]")
    if params.mode != "text":
        vector = sql.SQL("vector::{}").format(sql.SQL(source.vector_type))
    return sql.SQL(
        "query AS MATERIALIZED (SELECT number, {terms} AS terms, {singles} AS singles, {vector} AS embedding, targets "
        "FROM (SELECT number, text, vector, targets::int[] AS targets, {words} AS words FROM "
        "unnest(%(numbers)s::int[], %(texts)s::text[], %(vectors)s::text[], %(targets)s::text[]) "
        "AS given(number, text, vector, targets)) AS analysed)"
    ).format(terms=terms, singles=singles, vector=vector, words=words)


def lexemes_of(config: sql.Composable, text: sql.Composable) -> sql.Composed:
    """The lexemes of a text as an array, each quoted as a tsquery has it."""
    # Quotation marks, chr(39), and backslashes, chr(92), are doubled.
    return sql.SQL(
        "ARRAY(SELECT chr(39) || replace(replace(lexeme, chr(92), chr(92) || chr(92)), chr(39), chr(39) || chr(39))"
        " || chr(39) FROM unnest(to_tsvector({}, {})) ORDER BY positions[1], lexeme LIMIT {})"
    ).format(config, text, sql.Literal(MAX_TERMS))


def _best(scored: sql.Composable, k: sql.Composable) -> sql.Composed:
    """The first k documents, with their places."""
    return sql.SQL(
        "SELECT b.row, b.score, row_number() OVER (ORDER BY b.score DESC, b.row) AS place "
        "FROM (SELECT s.row, s.score FROM ({}) AS s ORDER BY s.score DESC, s.row LIMIT {}) AS b"
    ).format(scored, k)


def _scored(source: Source, params: Params, exact: bool = False) -> sql.Composed:
    """The row and the score of each document that `query` finds.

    exact: whether mode vector compares all embeddings, with an approximate index, too.
    """
    if params.mode == "text":
        return _by_text(source, params)
    if params.mode == "vector":
        nearest = params.index == "hnsw" and not exact
        return _nearest(source, params, sql.SQL("%(k)s")) if nearest else _by_embedding(source, params)
    depth = sql.Literal(params.depth)
    by_embedding = _nearest(source, params, depth) if params.index == "hnsw" else _by_embedding(source, params)
    return sql.SQL(
        "SELECT row, (coalesce(1::float8 / ({c} + t.place), 0) + coalesce({w} * (1::float8 / ({c} + v.place)), 0))"
        "::float4 AS score FROM ({text}) AS t FULL JOIN ({vector}) AS v USING (row)"
    ).format(
        c=sql.Literal(RRF_CONSTANT),
        w=sql.SQL("{}::float8").format(sql.Literal(params.vector_weight)),
        text=_best(_by_text(source, params), depth),
        vector=_best(by_embedding, depth),
    )


def _by_text(source: Source, params: Params) -> sql.Composed:
    weights = [params.weights[name] for name in sorted(WEIGHTS, reverse=True)]  # The order of PostgreSQL is D to A.
    return by_text(source, params, sql.Literal(weights), sql.SQL("{} @@ query.terms").format(source.lexemes))


def by_text(source: Source, params: Params, weights: sql.Composable, found: sql.Composable) -> sql.Composed:
    """The row and the score by text of each document.

    weights: the weights D to A.
    found: the condition for a document.
    """
    asked: sql.Composable = sql.SQL("query.terms")
    if params.operator == "or" and params.function == "ts_rank_cd":
        asked = sql.SQL(
            "(SELECT string_agg(single::text, ' | ')::tsquery FROM unnest(query.singles) AS single "
            "WHERE t.terms @@ single)"
        )
    # The empty tsvector makes PostgreSQL decompress a long document once, and not once for each word.
    return sql.SQL(
        "SELECT {row} AS row, {function}({weights}::float4[], t.terms, {asked}, {normalization}) AS score "
        "FROM {documents} CROSS JOIN LATERAL (SELECT {lexemes} || ''::tsvector AS terms OFFSET 0) AS t "
        "WHERE {found}"
    ).format(
        row=source.row,
        function=sql.SQL(params.function),
        weights=weights,
        asked=asked,
        normalization=sql.Literal(params.normalization),
        documents=source.documents,
        lexemes=source.lexemes,
        found=found,
    )


def _score(distance: sql.Composable, params: Params) -> sql.Composed:
    return sql.SQL("(" + SIMILARITIES[params.distance] + ")::float4").format(distance)


def _distance(source: Source, params: Params) -> sql.Composed:
    column = sql.Identifier(source.embedding)
    return sql.SQL("d.{} {} query.embedding").format(column, sql.SQL(OPERATORS[params.distance]))


def _by_embedding(source: Source, params: Params) -> sql.Composed:
    """All documents. One without an embedding, and one whose cosine is not defined, is not found."""
    return sql.SQL(
        "SELECT a.row, a.score FROM (SELECT {row} AS row, {score} AS score FROM {documents}) AS a "
        "WHERE a.score < 'Infinity'::float4"
    ).format(row=source.row, score=_score(_distance(source, params), params), documents=source.documents)


def _nearest(source: Source, params: Params, k: sql.Composable) -> sql.Composed:
    """The first k documents by an approximate index, which PostgreSQL uses for a plain ORDER BY of the distance.

    All documents that are as near as the last one are returned, too, so that the smaller row can be taken.
    """
    key = sql.Identifier(source.id_column or "row")
    distance = _distance(source, params)
    first = sql.SQL(
        "(SELECT d.{key}, {distance} AS distance FROM {name} AS d WHERE d.{column} IS NOT NULL "
        "ORDER BY {distance} FETCH FIRST ({k}) ROWS WITH TIES)"
    ).format(key=key, distance=distance, name=source.name, column=sql.Identifier(source.embedding), k=k)
    joined: sql.Composable = sql.SQL("")
    if source.id_column is not None:
        joined = sql.SQL(" JOIN listed ON listed.id = d.{}::text").format(key)
    return sql.SQL("SELECT {row} AS row, {score} AS score FROM {first} AS d{joined}").format(
        row=source.row, score=_score(sql.SQL("d.distance"), params), first=first, joined=joined
    )
