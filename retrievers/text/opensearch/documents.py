"""The documents of an index: building one from the catalogue, and joining an existing one to the catalogue by id."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import is_filled, new_folder, read_meta, write_meta
from retrievers.core.joined import named, warn
from retrievers.core.requests import OutageError
from retrievers.text.opensearch.cluster import Cluster, RefusedError, reason_of
from retrievers.text.opensearch.searches import Index
from retrievers.types import RetrieverError

logger = logging.getLogger(__name__)
BULK_DOCUMENTS, BULK_BYTES = (
    1000,
    4 << 20,
)  # A request of a build has at most so many documents, and about so many bytes.
PAGE = 5000  # The ids of an existing index are read so many at a time.
PAGE_KEPT = "5m"  # How long the engine keeps the pages that follow.
PROGRESS_FROM = 50_000  # Progress bars appear from so many documents on.
LEFTOVER_AFTER_MS = 24 * 3600 * 1000  # An index that a build has not finished is a leftover after so many milliseconds.
MAX_LEFT_OUT = 1000  # At most so many documents that the catalogue lacks can be left out of every search.


class Join(NamedTuple):
    """How an existing index and a catalogue of n documents fit together.

    absent: the rows that the index lacks, ascending.
    foreign: the ids of the index that the catalogue lacks, in the order of the index.
    """

    absent: list[int]
    foreign: list[str]


def build_index(
    cluster: Cluster, name: str, catalog: Catalog, columns: Sequence[str], settings: Mapping[str, Any], longest: int
) -> None:
    """Make an index of the catalogue under the alias ``name``, unless there is one.

    cluster: where the index is made.
    name: the alias. It is set when the index is complete, so an interrupted build leaves nothing that is opened.
    columns: the fields of the catalogue that are indexed.
    settings: the settings of the index: analysis and similarity.
    longest: a value of more UTF-16 code units is left out of the sub-field `keyword` of its field.

    The `_id` of a document is its row. Where two processes build at the same time, one of the two indexes is deleted.
    """
    if _behind(cluster, name):
        return
    _delete_leftovers(cluster, name)
    building = f"{name}-{uuid.uuid4().hex[:12]}"
    text = {"type": "text", "fields": {"keyword": {"type": "keyword", "ignore_above": longest}}}
    index = {
        "settings": {"index": {**settings, "number_of_shards": 1, "max_result_window": max(10_000, len(catalog))}},
        "mappings": {"dynamic": False, "properties": dict.fromkeys(columns, text)},
    }
    logger.info("building index %s of %d documents at %s", name, len(catalog), cluster.address.url)
    cluster.change("PUT", f"/{building}", index)
    try:
        for lines in _bulks(catalog, columns):
            _write(cluster, building, lines)
        cluster.change("POST", f"/{building}/_refresh")
        cluster.change("PUT", f"/{building}/_settings", {"index": {"blocks": {"write": True}}})
        _set_alias(cluster, building, name)
    except BaseException:
        with suppress(Exception):
            cluster.change("DELETE", f"/{building}")
        raise


def _set_alias(cluster: Cluster, index: str, alias: str) -> None:
    """Give ``index`` the alias, or delete it where another process has given it to its own index in the meantime.

    Of the indexes behind an alias, at most one can be the one to write to. So the engine accepts only the first.
    """
    try:
        cluster.change(
            "POST", "/_aliases", {"actions": [{"add": {"index": index, "alias": alias, "is_write_index": True}}]}
        )
    except (RetrieverError, OutageError):
        if not _behind(cluster, alias):
            raise
        logger.info("index %s was built by another process, too", alias)
        cluster.change("DELETE", f"/{index}")


def _behind(cluster: Cluster, alias: str) -> list[str]:
    """The names of the indexes that have an alias."""
    try:
        return list(cluster.ask("GET", f"/_alias/{alias}"))
    except RefusedError as error:
        if error.refused.status == 404:
            return []
        raise RetrieverError(f"{cluster.address.url}/_alias/{alias}: {error}: check your permissions") from error


def _delete_leftovers(cluster: Cluster, name: str) -> None:
    """Delete the indexes that killed builds of ``name`` have left."""
    with suppress(RefusedError):
        found = cluster.ask("GET", f"/{name}-*/_settings")
        for index, about in found.items():
            made = int(about["settings"]["index"]["creation_date"])
            if time.time() * 1000 - made > LEFTOVER_AFTER_MS and index.startswith(f"{name}-"):
                cluster.change("DELETE", f"/{index}")


def _bulks(catalog: Catalog, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Yield the lines of each request of a build: for each document its `_id` and its fields."""
    from tqdm import tqdm

    values = [catalog.column(name) for name in columns]
    lines: list[dict[str, Any]] = []
    size = 0
    rows = range(0, len(catalog), BULK_DOCUMENTS)
    for start in tqdm(rows, "indexing", unit_scale=BULK_DOCUMENTS, disable=len(catalog) <= PROGRESS_FROM, leave=False):
        parts = [column[start : start + BULK_DOCUMENTS] for column in values]
        for row, fields in enumerate(zip(*parts, strict=True), start):
            lines += [{"index": {"_id": str(row)}}, dict(zip(columns, fields, strict=True))]
            size += sum(map(len, fields))
            if size > BULK_BYTES:
                yield lines
                lines, size = [], 0
        if lines:
            yield lines
            lines, size = [], 0


def _write(cluster: Cluster, index: str, lines: list[dict[str, Any]]) -> None:
    """Write documents. Those for which the engine has no capacity are sent again.

    Raises OutageError where it keeps having none, and RetrieverError where it refuses a document.
    """
    for _ in range(1 + cluster.address.retries):
        answer = cluster.change("POST", f"/{index}/_bulk", lines)
        items = [next(iter(item.values())) for item in answer["items"]]
        refused = [i for i, item in enumerate(items) if item["status"] >= 300]
        if not refused:
            return
        hard = [i for i in refused if items[i]["status"] not in (429, 503)]
        if hard:
            raise RetrieverError(
                f"{cluster.address.url}/{index} refuses document {lines[2 * hard[0]]['index']['_id']}: "
                f"{reason_of(items[hard[0]])}"
            )
        lines = [line for i in refused for line in lines[2 * i : 2 * i + 2]]
        time.sleep(1)
    raise OutageError(f"{cluster.address.url}/{index} has no capacity for {len(lines) // 2} documents")


def check_fields(cluster: Cluster, index: Index, names: Sequence[str]) -> None:
    """Raise ValueError where an existing index lacks one of the fields, or where its id_field cannot be read.

    names: the fields that are searched. A name with * is not checked.

    Raises RetrieverError where no index has the name, which may be a pattern.
    """
    answer = cluster.change("GET", f"{index.path}/_field_caps", fields="*")
    if answer.get("indices") == []:
        raise RetrieverError(f"{cluster.address.url} has no index {index.name!r}: correct retriever.params.index")
    known = answer["fields"]
    searched = [name for name, kinds in known.items() if {"text", "keyword"} & set(kinds) and not name.startswith("_")]
    for name in names:
        if name not in known and "*" not in name:
            raise ValueError(
                f"retriever.params.fields: {index.name} has no field {name!r}: choose from {', '.join(searched)}"
            )
        # A query of a field inside a nested object finds nothing, because each such object is a document of its own.
        outer = [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)]
        nested = next((one for one in outer if "nested" in known.get(one, {})), None)
        if nested is not None:
            raise ValueError(
                f"retriever.params.fields: {name!r} is inside the nested field {nested!r} of {index.name}, and only a "
                f"nested query finds it: set retriever.params.template to {{nested: {{path: {nested}, query: {{match: "
                f"{{{name}: '{{query}}'}}}}}}}}"
            )
    field = index.id_field
    if field is not None and not all(kind.get("aggregatable") for kind in known.get(field, {"": {}}).values()):
        readable = [name for name in searched if all(kind.get("aggregatable") for kind in known[name].values())]
        raise ValueError(
            f"retriever.params.id_field: {index.name} has no field {field!r} of type keyword: choose from "
            f"{', '.join(readable)}, or leave it out for _id"
        )


def join(
    cluster: Cluster, index: Index, catalog: Catalog, filters: Sequence[Mapping[str, Any]], folder: str | Path | None
) -> Join:
    """Compare the ids of an existing index with those of the catalogue, and warn of the differences.

    filters: only the documents that match these clauses are compared.
    folder: where the result is kept, for each state of the index. None = nowhere.

    Raises RetrieverError where the two have no document in common, where two documents have the same id, and where the
    catalogue lacks too many documents of the index.
    """
    meta = {
        "kind": "opensearch-join",
        "catalog": catalog.fingerprint,
        "index": index.name,
        "id_field": index.id_field,
        "state": index.state,
        "filter": list(filters),
    }
    key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    kept = Path(folder) / key if folder is not None and index.state is not None else None
    if kept is not None and is_filled(kept):
        known = read_meta(kept, meta | {"absent": None, "foreign": None})
        found = Join(known["absent"], known["foreign"])
    else:
        found = _compare(cluster, index, catalog, filters)
        if kept is not None:
            with new_folder(kept) as temporary:
                write_meta(temporary, meta | found._asdict())
    warn(f"{cluster.address.url}/{index.name}", catalog.ids, found.absent, len(found.foreign), found.foreign)
    return found


def _compare(cluster: Cluster, index: Index, catalog: Catalog, filters: Sequence[Mapping[str, Any]]) -> Join:
    where = f"{cluster.address.url}/{index.name}"
    present = np.zeros(len(catalog), bool)
    foreign: list[str] = []
    count = 0
    for ids in _all_ids(cluster, index, filters):
        count += len(ids)
        known = [one for one in ids if one in catalog]
        rows = catalog.rows(known)
        twice = [one for one, row, n in zip(known, rows, _seen(rows), strict=True) if present[row] or n]
        if twice:
            raise RetrieverError(
                f"{where}: several documents have the id {twice[0]!r}: set retriever.params.id_field to a field with "
                "one id for each document, or leave the others out with retriever.params.filter"
            )
        present[rows] = True
        foreign += [one for one in ids if one not in catalog]
    if not present.any():
        first = f" (the first has the id {foreign[0]!r})" if foreign else ""
        raise RetrieverError(
            f"{where}: none of its {count} documents{first} is in the catalogue, whose first id is {catalog.ids[0]!r}: "
            "set retriever.params.id_field to the field that holds the catalogue's ids"
        )
    if len(foreign) > MAX_LEFT_OUT:
        raise RetrieverError(
            f"{where} holds {len(foreign)} documents that the catalogue lacks, and at most {MAX_LEFT_OUT} can be left "
            f"out of the rankings; the first: {named(foreign)}: set retriever.params.filter to a clause that "
            "leaves them out, or add them to the catalogue"
        )
    return Join(np.flatnonzero(~present).tolist(), foreign)


def _seen(rows: np.ndarray) -> np.ndarray:
    """Whether each row occurs earlier in ``rows``."""
    first = np.zeros(len(rows), bool)
    first[np.unique(rows, return_index=True)[1]] = True
    return ~first


def _all_ids(cluster: Cluster, index: Index, filters: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield the ids of all documents of an index that match the filters, a page at a time."""
    from tqdm import tqdm

    body: dict[str, Any] = {"size": PAGE, "_source": False, "sort": ["_doc"], "track_total_hits": True}
    body["query"] = {"bool": {"filter": list(filters)}} if filters else {"match_all": {}}
    if index.id_field is not None:
        body["docvalue_fields"] = [index.id_field]
    answer = cluster.change("POST", f"{index.path}/_search", body, scroll=PAGE_KEPT)
    total = answer["hits"]["total"]["value"]
    with tqdm(total=total, desc="ids", disable=total < PROGRESS_FROM, leave=False) as bar:
        while answer["hits"]["hits"]:
            if answer["_shards"]["failed"] or answer["timed_out"]:
                raise OutageError(f"{cluster.address.url}/{index.name}: a result without the hits of some shards")
            try:
                hits = answer["hits"]["hits"]
                yield [str(hit["_id"] if index.id_field is None else hit["fields"][index.id_field][0]) for hit in hits]
            except KeyError as error:
                raise RetrieverError(
                    f"{cluster.address.url}/{index.name}: a document has no {index.id_field}: set "
                    "retriever.params.filter to {exists: {field: …}} with this field, or take another id_field"
                ) from error
            bar.update(len(hits))
            answer = cluster.change("POST", "/_search/scroll", {"scroll": PAGE_KEPT, "scroll_id": answer["_scroll_id"]})
    with suppress(Exception):
        cluster.ask_once("DELETE", "/_search/scroll", {"scroll_id": answer["_scroll_id"]})
