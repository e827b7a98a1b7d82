"""Queries of tantivy, made of terms. No text is ever parsed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from retrievers.text import bm25
from retrievers.text.structured import boosted, in_order
from retrievers.text.tantivy_params import Params
from retrievers.types import Query, Structured


def made_of(queries: Sequence[Query], params: Params, schema: Any) -> list[Any]:
    """Each query as tantivy's: the words of its text, or its parts. schema: that of the index."""
    import tantivy

    parts = [(query.text, "", "") if (one := query.structured) is None else in_order(one) for query in queries]
    analyzed = iter(bm25.analyze([text for own in parts for text in own], params.analysis()))
    weights = dict(params.columns().values())
    out = []
    for query in queries:
        base, extra, must = next(analyzed), next(analyzed), next(analyzed)
        if query.structured is None:
            out.append(tantivy.Query.boolean_query(_clauses(base, weights, params, schema)))
        else:
            out.append(_in_parts(query.structured, base, extra, must, params, schema))
    return out


def _clauses(terms: Sequence[str], weights: Mapping[str, float], params: Params, schema: Any) -> list[tuple[Any, Any]]:
    """One optional clause per field and distinct term, with the weight and the number of times.

    The clauses are sorted, because tantivy adds their float32 scores in this order. Queries of the same words then
    have the same scores.
    """
    import tantivy

    make = tantivy.Query
    clauses = []
    counted = sorted(Counter(terms).items())
    for name, (field, _) in params.columns().items():
        for term, count in counted:
            clause, factor = make.term_query(schema, name, term, "freq"), count * weights[field]
            clauses.append((tantivy.Occur.Should, clause if factor == 1 else make.boost_query(clause, factor)))
    return clauses


def _in_parts(
    asked: Structured, base: Sequence[str], extra: Sequence[str], must: Sequence[str], params: Params, schema: Any
) -> Any:
    """A structured query as tantivy's. base, extra, must: the terms of these parts of it."""
    import tantivy

    make, occur = tantivy.Query, tantivy.Occur
    weights = boosted(dict(params.columns().values()), asked)
    wanted = make.boolean_query(_clauses(base, weights, params, schema))
    clauses = [(occur.Must, wanted), *_clauses(extra, weights, params, schema)]
    required = [[(name, term) for name in params.columns()] for term in dict.fromkeys(must)]
    required += [[(params.filters()[name], value) for value in values] for name, values in asked.filters]
    for group in required:
        any_of = [(occur.Should, make.term_query(schema, name, term, "basic")) for name, term in group]
        clauses.append((occur.Must, make.const_score_query(make.boolean_query(any_of), 0.0)))
    return make.boolean_query(clauses)
