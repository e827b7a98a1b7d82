"""What is found out about an index when it is opened: its name, whether it is complete, and its structured queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from retrievers.catalog import Catalog
from retrievers.core.index_folder import fingerprint_of
from retrievers.text.opensearch.cluster import Cluster
from retrievers.text.opensearch.documents import build_index
from retrievers.text.opensearch.params import Params
from retrievers.text.opensearch.searches import Index
from retrievers.text.structured import MOST_VALUES, boostable, examples_of, first_examples
from retrievers.types import RetrieverError, Schema

INDEX_FORMAT = 1  # The version of the indexes that are built.
LONGEST = 256  # The sub-field `keyword` has values of at most so many UTF-16 code units, the default of both engines.


class Parts(NamedTuple):
    """The structured queries of an index.

    schema: which of them are answered. None = none.
    keywords: a field by which they filter -> the engine's field with its whole values.
    """

    schema: Schema | None
    keywords: Mapping[str, str]


def built(catalog: Catalog, settings: Params, cluster: Cluster) -> tuple[str, dict[str, Any]]:
    """The name of the index of this catalogue, which is built if the cluster lacks it, and what it is made of."""
    for name in [*settings.fields, *(settings.structured.filters if settings.structured is not None else [])]:
        catalog.column(name)  # This names the fields that there are.
    columns = list(settings.fields)
    if settings.structured is not None:
        columns += [name for name in settings.structured.filters if name not in columns]
    if settings.template is not None or settings.filter:
        columns = [name for name in catalog.fields if name != "id"]
    analysis = {
        "analysis": {"analyzer": {"default": {"type": settings.analyzer()}}},
        "similarity": {"default": {"type": "BM25", "k1": settings.k1, "b": settings.b}},
    }
    made_of = {"format": INDEX_FORMAT, "catalog": catalog.fingerprint, "columns": sorted(columns), "settings": analysis}
    longest = LONGEST
    if settings.structured is not None and settings.structured.filters:  # Other indexes keep their names.
        # A filter must find every value that a query may name. A character has at most two UTF-16 code units.
        made_of["longest"] = longest = 2 * Schema.max_value_characters
    name = f"rec-r1-{fingerprint_of(made_of)[:32]}"
    build_index(cluster, name, catalog, columns, analysis, longest)
    return name, made_of


def check_complete(cluster: Cluster, index: Index, documents: int) -> None:
    """Raise RetrieverError where a built index does not hold ``documents`` documents."""
    count = cluster.change("GET", f"{index.path}/_count")["count"]
    if count != documents:
        raise RetrieverError(
            f"{cluster.address.url}/{index.name} holds {count} instead of {documents} documents: delete this index, "
            "and build it again with `rec-r1 index RECIPE`"
        )


def parts(
    catalog: Catalog, settings: Params, cluster: Cluster, index: Index, left_out: Mapping[str, Any] | None
) -> Parts:
    """The structured queries of an index.

    left_out: a clause for the documents that the catalogue lacks. None = there are none.

    Raises ValueError for a filter that the index cannot have.
    """
    if settings.structured is None:
        return Parts(None, {})
    names = settings.structured.filters
    if settings.index is None:
        keywords = {name: f"{name}.keyword" for name in names}
        examples = {name: examples_of(catalog.column(name)) for name in names}
    else:
        keywords = _keywords(cluster, index, names)
        examples = _examples(cluster, index, keywords, settings.filter or [], left_out)
    fields = tuple(settings.fields)
    return Parts(Schema(fields, boostable(fields), tuple((name, examples[name]) for name in names)), keywords)


def _keywords(cluster: Cluster, index: Index, names: Sequence[str]) -> dict[str, str]:
    """The field of type keyword for each name: the field itself, or its sub-field `keyword`."""
    known = cluster.change("GET", f"{index.path}/_field_caps", fields="*")["fields"]
    whole = [name for name, kinds in known.items() if "keyword" in kinds and not name.startswith("_")]
    found = {}
    for name in names:
        field = next((one for one in (name, f"{name}.keyword") if one in whole), None)
        if field is None:
            raise ValueError(
                f"retriever.params.structured.filters: {index.name} has no field {name!r} of type keyword: choose from "
                f"{', '.join(whole)}"
            )
        found[name] = field
    _refuse_normalizers(cluster, index, found)
    return found


def _refuse_normalizers(cluster: Cluster, index: Index, keywords: Mapping[str, str]) -> None:
    """Raise ValueError for a field that the engine changes before it compares values, such as to lower case."""
    if not keywords:
        return
    names = ",".join(quote(field, safe="") for field in keywords.values())
    answer = cluster.change("GET", f"{index.path}/_mapping/field/{names}")
    for one in answer.values():  # Several indexes may have the name.
        for field, about in one["mappings"].items():
            normalizers = [kind["normalizer"] for kind in about["mapping"].values() if "normalizer" in kind]
            if normalizers:
                raise ValueError(
                    f"retriever.params.structured.filters: {index.name} compares the values of {field!r} by the "
                    f"normalizer {normalizers[0]!r}, and a filter compares them character by character: name a field "
                    "of type keyword without one"
                )


def _examples(
    cluster: Cluster,
    index: Index,
    keywords: Mapping[str, str],
    filters: Sequence[Mapping[str, Any]],
    left_out: Mapping[str, Any] | None,
) -> dict[str, tuple[str, ...]]:
    """Some of the most frequent values of each field, among the documents that a query can find."""
    if not keywords:
        return {}
    order = [{"_count": "desc"}, {"_key": "asc"}]
    body = {
        "size": 0,
        "query": {"bool": {"filter": list(filters), "must_not": [] if left_out is None else [left_out]}},
        "aggs": {
            str(i): {"terms": {"field": field, "size": MOST_VALUES, "order": order}}
            for i, field in enumerate(keywords.values())
        },
    }
    found = cluster.change("POST", f"{index.path}/_search", body)["aggregations"]
    values = [[str(bucket["key"]) for bucket in found[str(i)]["buckets"]] for i in range(len(keywords))]
    return {name: first_examples(own) for name, own in zip(keywords, values, strict=True)}
