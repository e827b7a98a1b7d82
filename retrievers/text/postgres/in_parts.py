"""The SQL of structured queries, and their parameters. See `retrievers.types.Structured` for what they mean.

A document is scored as for a text: by the ranking function, with all words of the query, of which a document needs one.
A boost multiplies the weight A to D of its field. PostgreSQL admits weights from 0 to 1, so all four are divided by the
largest where that is above 1. This changes no rank, because the ranking functions are linear in the weights for a query
of which a document needs any word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psycopg import sql

from retrievers.catalog import Catalog
from retrievers.text.postgres.connection import Connection
from retrievers.text.postgres.params import WEIGHTS, Params
from retrievers.text.postgres.statements import Parts, Source, by_text, lexemes_of, regconfig
from retrievers.text.postgres.storable import array, storable
from retrievers.text.structured import MOST_VALUES, boosted, first_examples
from retrievers.types import Schema, Structured

LABELS = sorted(WEIGHTS, reverse=True)  # The order of PostgreSQL is D to A.


def of_structured(source: Source, params: Params) -> Parts:
    """The parts of a statement for structured queries. Its parameters are those of :func:`parameters`."""
    condition: list[sql.Composable] = [
        sql.SQL("{} @@ query.base").format(source.lexemes),
        sql.SQL("(numnode(query.must) = 0 OR {} @@ query.must)").format(source.lexemes),
    ]
    for i, (_, column) in enumerate(source.filters):
        condition.append(
            # The collation of a column may take different characters for equal. "C" compares them one by one.
            sql.SQL('(query.{chosen} IS NULL OR d.{column}::text COLLATE "C" = ANY (query.{chosen}))').format(
                chosen=sql.Identifier(f"filter_{i}"), column=sql.Identifier(column)
            )
        )
    scored = by_text(source, params, sql.SQL("query.weights"), sql.SQL(" AND ").join(condition))
    return Parts(_queries(source), scored, scored)


def _queries(source: Source) -> sql.Composed:
    """The queries of a batch as a common table expression."""
    config = regconfig(source.configuration)
    chosen = [sql.Identifier(f"filter_{i}") for i in range(len(source.filters))]
    return sql.SQL(
        "query AS MATERIALIZED (SELECT number, targets, weights, {chosen}array_to_string(words, ' | ')::tsquery AS "
        "terms, words::tsquery[] AS singles, array_to_string(base, ' | ')::tsquery AS base, "
        "array_to_string(must, ' & ')::tsquery AS must FROM (SELECT number, targets::int[] AS targets, "
        "weights::float4[] AS weights, {arrays}{words} AS words, {base} AS base, {must} AS must FROM "
        "unnest(%(numbers)s::int[], %(texts)s::text[], %(bases)s::text[], %(musts)s::text[], %(weights)s::text[], "
        "%(targets)s::text[]{parameters}) AS given(number, text, base, must, weights, targets{names})) AS analysed)"
    ).format(
        chosen=sql.SQL("").join(sql.SQL("{}, ").format(name) for name in chosen),
        arrays=sql.SQL("").join(sql.SQL("{0}::text[] AS {0}, ").format(name) for name in chosen),
        parameters=sql.SQL("").join(sql.SQL(f", %(filter_{i})s::text[]") for i in range(len(chosen))),
        names=sql.SQL("").join(sql.SQL(", {}").format(name) for name in chosen),
        words=lexemes_of(config, sql.SQL("given.text")),
        base=lexemes_of(config, sql.SQL("given.base")),
        must=lexemes_of(config, sql.SQL("given.must")),
    )


def parameters(source: Source, params: Params, asked: Sequence[Structured]) -> dict[str, list[str | None]]:
    """The parameters of a statement for some queries, beside their numbers and targets: a list for each name."""
    found: dict[str, list[str | None]] = {
        "texts": [storable(one.text) for one in asked],
        "bases": [storable(one.base) for one in asked],
        "musts": [storable(" ".join(one.must)) for one in asked],
        "weights": [array(map(repr, _weights(params, one))) for one in asked],
    }
    for i, (name, _) in enumerate(source.filters):
        values: list[Mapping[str, Sequence[str]]] = [dict(one.filters) for one in asked]
        found[f"filter_{i}"] = [array(own[name]) if name in own else None for own in values]
    return found


def _weights(params: Params, asked: Structured) -> list[float]:
    """The weights D to A of a query."""
    labels = dict(params.columns)
    weights = dict(params.weights)
    boosts = boosted(dict.fromkeys(labels, 1.0), asked)
    for name, label in labels.items():
        if boosts[name] != 1:
            weights[label] *= boosts[name]
    largest = max(1.0, *weights.values())
    return [weights[label] / largest for label in LABELS]


def schema(connection: Connection, source: Source, catalog: Catalog, params: Params) -> Schema | None:
    """Which structured queries the table serves, with examples of the values of each filter. None = none."""
    if params.structured is None:
        return None
    filters = []
    for name, column in source.filters:
        statement = sql.SQL(
            'SELECT d.{column}::text COLLATE "C" FROM {name} AS d WHERE d.{key}::text = ANY (%(ids)s::text[]) '
            "AND d.{column} IS NOT NULL GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT %(most)s"
        ).format(column=sql.Identifier(column), name=source.name, key=sql.Identifier(source.id_column or "id"))
        asked = {"ids": [storable(one) for one in catalog.ids], "most": MOST_VALUES}
        filters.append((name, first_examples(value for (value,) in connection.execute(statement, asked))))
    fields = tuple(params.columns) if params.table is None else ()
    return Schema(fields, boosts(params), tuple(filters))


def boosts(params: Params) -> tuple[str, ...]:
    """The fields whose weight a query may change: those of a table that the backend makes, with a weight A to D of
    their own."""
    if params.table is not None or len(params.columns) < 2:
        return ()
    labels = list(params.columns.values())
    return tuple(name for name, label in params.columns.items() if labels.count(label) == 1)
