"""Elasticsearch 8 and 9, and OpenSearch 2 and 3: an index that a cluster has, or one that is built from the catalogue.

Ranks need no deep paging. One request of many searches asks for the scores of the targets (the query and a filter for
their ids). A second one asks, for each of these scores, how many documents score at least as much (`min_score`), and
for the lowest of them, which are the documents with an equal score. Equal scores are ordered by row, as everywhere.

The ranks are exact for every query whose score of a document does not depend on the other hits. A template with a
nearest-neighbour clause (knn, neural, semantic) retrieves only the nearest documents that its settings allow; all
others count as not retrieved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import fingerprint_of
from retrievers.core.ranking import check_k, check_targets, no_hits
from retrievers.core.requests import OutageError
from retrievers.text import structured
from retrievers.text.opensearch.clients import check_installed
from retrievers.text.opensearch.cluster import Cluster, Refused
from retrievers.text.opensearch.documents import Join, check_fields, join
from retrievers.text.opensearch.opening import INDEX_FORMAT, built, check_complete, parts
from retrievers.text.opensearch.params import Params
from retrievers.text.opensearch.queries import Form, canonical, clean, only, these
from retrievers.text.opensearch.searches import Found, Index, Searches, state_of
from retrievers.types import Hits, Query, RetrieverError, Schema, Structured, Traits

logger = logging.getLogger(__name__)
WINDOW = 10_000  # A search of an existing index returns at most so many hits, the default of both engines.
TIE_MARGIN = 64  # So many hits beyond k are requested, to see whether more documents have the k-th best score.
FIRST_TIES = 16  # So many documents at the score of a target are requested first, and more where all are equal.
NOTHING = Found([], np.zeros(0, np.float32), 0)  # The result of a query that the engine refuses.
Asked = str | Structured  # What a query asks for.
PROBE = "a"  # A query that is refused only where the settings are wrong. It need not find anything.


class OpenSearch:
    """An index of a cluster as a retriever; see :class:`retrievers.types.Retriever` for the contract.

    It reads ``Query.text``, and with the parameter `structured` also ``Query.structured``. It may be shared between
    threads, and connects again in a child process. A query that the engine refuses, such as one with a syntax error for
    a template with `query_string`, retrieves nothing.

    searches: the snapshot that is searched.
    form: what is asked for a text.
    window: the most hits of a search.
    fingerprint: see :func:`build`.
    documents: the number of documents in the catalogue.
    absent: the rows that the index lacks.
    catalog: for an existing index, whose hits have the catalogue's ids. None = the ids of the hits are rows.
    schema: which structured queries are answered. None = none.
    """

    def __init__(
        self,
        searches: Searches,
        form: Form,
        window: int,
        fingerprint: str,
        documents: int,
        absent: Collection[int] = (),
        catalog: Catalog | None = None,
        schema: Schema | None = None,
    ) -> None:
        self._searches, self._form, self._window = searches, form, window
        self.fingerprint = fingerprint
        self._documents, self._absent, self._catalog = documents, frozenset(absent), catalog
        self._schema = schema
        self._warned = False

    def __reduce__(self) -> tuple[Callable[..., OpenSearch], tuple[Any, ...]]:
        about = self.fingerprint, self._documents, self._absent, self._catalog, self._schema
        return OpenSearch, (self._searches, self._form, self._window, *about)

    def __len__(self) -> int:
        return self._documents

    def retriever_traits(self) -> Traits:
        """The documents of the catalogue that the index lacks, and which structured queries it serves."""
        return Traits(absent=sorted(self._absent), structured=self._schema)

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """See the protocol. Of an existing index there are at most 10,000 hits; the rest is padding.

        Raises ConnectionError where a query gets no answer.
        """
        k = check_k(k, len(self))
        structured.check(queries, self._schema)
        hits = no_hits(len(queries), k)
        texts = _asked(queries)
        depth = min(k, self._window)
        while texts:
            depth = min(depth + TIE_MARGIN, self._window)
            again = {}
            for q, found in self._ask(texts, {q: {"size": depth, "track_total_hits": False} for q in texts}).items():
                if isinstance(found, OutageError):
                    raise found
                # The engine orders equal scores by its own numbers, so all documents with the k-th best are needed.
                if len(found.ids) == depth < self._window and found.scores[k - 1] == found.scores[-1]:
                    again[q] = texts[q]
                    continue
                rows = self._rows(found.ids)
                order = np.lexsort((rows, -found.scores))[:k]
                hits.rows[q, : len(order)], hits.scores[q, : len(order)] = rows[order], found.scores[order]
            texts, depth = again, 2 * depth
        return hits

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """See the protocol. The ranks of queries that get no answer are -1.

        Where more than 10,000 documents of an existing index have the score of a target, its rank is that of the last
        of them. Several such targets of a query get the last ranks. Raises ConnectionError where no query gets an
        answer.
        """
        targets = check_targets(queries, targets, len(self), structured=True)
        structured.check(queries, self._schema)
        ranks = np.zeros(targets.shape, np.int32)
        wanted = {q: sorted({*targets[q].tolist()} - self._absent - {-1}) for q in range(len(queries))}
        texts = {q: text for q, text in _asked(queries).items() if wanted[q]}
        if not texts:
            return ranks
        found = self._scores(texts, {q: wanted[q] for q in texts})
        outages = {q: one for q, one in found.items() if isinstance(one, OutageError)}
        scores = {q: one for q, one in found.items() if not isinstance(one, OutageError)}
        for q, one in self._counted({q: texts[q] for q in scores}, scores).items():
            if isinstance(one, OutageError):
                outages[q] = one
            else:
                ranks[q] = [one.get(row, 0) for row in targets[q].tolist()]
        for q in outages:
            ranks[q] = -1
        if outages:
            first = next(iter(outages.values()))
            if len(outages) == len(texts):
                raise first
            logger.warning("%d of %d queries failed, the first: %s", len(outages), len(texts), first)
        return ranks

    def _scores(
        self, texts: dict[int, Asked], wanted: Mapping[int, Sequence[int]]
    ) -> dict[int, dict[int, np.float32] | OutageError]:
        """The score of each wanted row that a text retrieves, by the number of the query."""
        bodies = {q: {"size": len(rows), "track_total_hits": False} for q, rows in wanted.items()}
        answers = self._ask(texts, bodies, {q: [self._id(row) for row in rows] for q, rows in wanted.items()})
        return {
            q: one if isinstance(one, OutageError) else dict(zip(self._rows(one.ids).tolist(), one.scores, strict=True))
            for q, one in answers.items()
        }

    def _counted(
        self, texts: Mapping[int, Asked], scores: Mapping[int, dict[int, np.float32]]
    ) -> dict[int, dict[int, int] | OutageError]:
        """The rank of each row that has a score, by the number of the query.

        Each distinct score is one search: how many documents score at least as much, and which are the lowest of them.
        More of these are requested while all have the score of the target.
        """
        ranks: dict[int, Any] = {q: {} for q in texts}
        left = {(q, score): FIRST_TIES for q in texts for score in sorted({*scores[q].values()})}
        unordered: list[tuple[int, np.float32, int]] = []  # The query, the score and the row of targets in long ties.
        while left:
            asked = {place: min(size, self._window) for place, size in left.items()}
            bodies = {place: _lowest(place[1], size) for place, size in asked.items()}
            left = {}
            for place, found in self._ask({place: texts[place[0]] for place in asked}, bodies).items():
                q, score = place
                if isinstance(found, OutageError):
                    ranks[q] = found
                    continue
                # Where the last hit scores more than the target, all documents with an equal score are among the hits.
                cut = len(found.ids) == asked[place] < found.total
                tied = cut and found.scores[-1] <= np.nextafter(score, np.float32(np.inf))
                if tied and asked[place] < self._window:
                    left[place] = 8 * asked[place]
                elif not isinstance(ranks[q], OutageError):
                    rows = [row for row, one in scores[q].items() if one == score]
                    hits = self._rows(found.ids)
                    ranks[q] |= {row: found.total if tied else _rank(row, found, hits) for row in rows}
                    unordered += [(q, score, -row) for row in rows if tied]
        # No two documents have one rank: of several that would be the last, each is before the one behind it.
        for (q, _, behind), (other, _, row) in pairwise(sorted(unordered)):
            if q == other and not isinstance(ranks[q], OutageError):
                ranks[q][-row] = min(ranks[q][-row], ranks[q][-behind] - 1)
        return ranks

    def _ask(
        self,
        texts: dict[Any, Asked],
        bodies: Mapping[Any, Mapping[str, Any]],
        only_ids: Mapping[Any, Sequence[str]] | None = None,
    ) -> dict[Any, Found | OutageError]:
        """What each text or structured query finds. A text with more terms than the engine allows is halved, in
        ``texts``, too. Raises RetrieverError for a structured query with more.

        texts: by any key.
        bodies: the settings of the search of each text.
        only_ids: the ids among which each text searches. None, the default, = all documents.
        """
        answers: dict[Any, Found | OutageError] = {}
        left = list(texts)
        while left:
            asked = []
            for key in left:
                query = self._form.query(texts[key])
                ids = only_ids[key] if only_ids is not None else None
                field_ = self._searches.index.id_field
                asked.append({**bodies[key], "query": query if ids is None else only(query, field_, ids)})
            again, refused = [], {}
            for key, answer in zip(left, self._searches.run(asked), strict=True):
                if not isinstance(answer, Refused):
                    answers[key] = answer
                elif answer.too_many_clauses and isinstance(text := texts[key], str) and len(text) > 1:
                    texts[key] = text[: len(text) // 2]
                    again.append(key)
                elif answer.too_many_clauses and isinstance(texts[key], Structured):
                    raise RetrieverError(
                        f"{self._searches.cluster.address.url} allows fewer clauses than a structured query may have "
                        f"({answer.reason}): raise indices.query.bool.max_clause_count there, or name fewer "
                        "retriever.params.fields"
                    )
                else:
                    refused[key] = answer
            if refused:
                answers |= dict.fromkeys(refused, self._found_by_refused(next(iter(refused.values()))))
            left = again
        return answers

    def _found_by_refused(self, refused: Refused) -> Found | OutageError:
        """What queries find that the engine refuses: nothing, if the engine accepts another one.

        Raises RetrieverError where it accepts no query: then the settings are wrong, and not what a model wrote.
        """
        outage = self._probe()
        if outage is not None:
            return outage
        if not self._warned:
            logger.warning("the engine refuses a query, which therefore retrieves nothing: %s", refused.reason)
            self._warned = True
        return NOTHING

    def _probe(self) -> OutageError | None:
        """Ask a query that only wrong settings can refuse. Raises RetrieverError where the engine refuses it."""
        (answer,) = self._searches.run([{"query": self._form.query(PROBE), "size": 1, "track_total_hits": False}])
        if isinstance(answer, Refused):
            raise RetrieverError(
                f"{self._searches.cluster.address.url} refuses every query: {answer.reason}: check retriever.params: "
                "template, fields and filter"
            )
        return answer if isinstance(answer, OutageError) else None

    def check(self) -> None:
        """Raise RetrieverError where the engine refuses every query or the largest structured one, and OutageError
        where it does not answer."""
        outage = self._probe()
        if outage is None and self._schema is not None:
            words, most = [f"a{number}" for number in range(self._schema.max_words)], self._schema.max_must
            largest = Structured(" ".join(words[most:]), (" ".join(words[:most]),))
            found = self._ask({0: largest}, {0: {"size": 1, "track_total_hits": False}})[0]
            outage = found if isinstance(found, OutageError) else None
        if outage is not None:
            raise outage

    def _id(self, row: int) -> str:
        return str(row) if self._catalog is None else self._catalog.ids[row]

    def _rows(self, ids: Sequence[str]) -> np.ndarray:
        """The rows of hits: (hits,) int64. Raises RetrieverError for a document that the catalogue does not have."""
        try:
            rows = np.array([int(one) for one in ids], np.int64) if self._catalog is None else self._catalog.rows(ids)
            if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
                raise ValueError(f"row {rows.max()}")
        except ValueError as error:  # The catalogue's error is one, too.
            raise RetrieverError(
                f"{self._searches.cluster.address.url}/{self._searches.index.name} holds a document that the catalogue "
                f"lacks ({error}): the index was changed: start the run again"
            ) from error
        return rows.astype(np.int64)


def _asked(queries: Sequence[Query]) -> dict[int, Asked]:
    """Of each query its structured part or its text, by the number of the query. A query without a text has none."""
    asked: dict[int, Asked] = {q: query.structured or clean(query.text) for q, query in enumerate(queries)}
    return {q: one for q, one in asked.items() if one}


def _lowest(score: np.float32, size: int) -> dict[str, Any]:
    """A search for the number of documents that score at least ``score``, and for the ``size`` lowest of them."""
    # Engines add the scores of terms in an order that depends on how they search, so the last bit may differ. Some hits
    # are always requested, because not every version applies min_score to a search without hits.
    least = float(np.nextafter(score, np.float32(0)))
    return {
        "min_score": least,
        "size": size,
        "sort": [{"_score": "asc"}],
        "track_scores": True,
        "track_total_hits": True,
    }


def _rank(row: int, found: Found, rows: np.ndarray) -> int:
    """The rank of a row: the number of documents that score at least as much, less those of them that come after it.

    row: a catalogue row.
    found: the result of :func:`_lowest` for its score.
    rows: the rows of the hits.
    """
    place = np.flatnonzero(rows == row)
    if not len(place):  # More than the last bit of its score differs from that in the first request.
        return found.total + 1
    own = found.scores[place[0]]
    after = (found.scores < own) | ((found.scores == own) & (rows > row))
    return found.total - int(after.sum())


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> OpenSearch:
    """Open an existing index, or the one of this catalogue, which is built if the cluster does not have it.

    catalog: the documents.
    folder: where the comparison of an existing index with the catalogue is kept. None, the default, = nowhere.
    params: see :class:`Params`.

    The fingerprint changes with the catalogue, with what is asked (fields, template, filter), with the product and the
    version of its Lucene, and with the index: for an existing one, with its uuids and the last operation of each shard,
    or the name in ``snapshot``; for a built one, with its analysis.

    Raises RetrieverError where no cluster answers, where it refuses the credentials, and where the index does not fit
    the catalogue. Raises ValueError for a bad parameter.
    """
    check_installed()
    settings = Params(**params)
    cluster = Cluster(settings.address())
    try:
        retriever = _open(catalog, folder, settings, cluster)
        retriever.check()
    except OutageError as error:
        raise RetrieverError(
            f"no Elasticsearch or OpenSearch answers at {settings.url} ({error}): start it, or set retriever.params.url"
        ) from error
    if retriever._form.approximate:
        logger.warning(
            "the template has a %s clause: documents beyond the nearest that it returns count as not retrieved",
            " and a ".join(retriever._form.approximate),
        )
    return retriever


def _open(catalog: Catalog, folder: str | Path | None, settings: Params, cluster: Cluster) -> OpenSearch:
    product = cluster.product
    meta = {
        "kind": "opensearch",
        "format": INDEX_FORMAT,
        "product": product.name,
        "lucene": product.lucene,
        "catalog": catalog.fingerprint,
        "documents": len(catalog),
        "filter": canonical(settings.filter),
        "query": canonical(settings.template if settings.template is not None else dict(settings.fields)),
    }
    if settings.index is None:
        name, meta["index"] = built(catalog, settings, cluster)
        index = Index(name, None, None, settings.keep_alive, settings.batch_size)
        index = replace(index, state=state_of(cluster, index))
        check_complete(cluster, index, len(catalog))
        found, window = Join([], []), max(WINDOW, len(catalog))
    else:
        index = Index(settings.index, settings.id_field, None, settings.keep_alive, settings.batch_size)
        if settings.template is None:
            check_fields(cluster, index, list(settings.fields))
        if settings.snapshot is None:
            index = replace(index, state=state_of(cluster, index))
        found, window = join(cluster, index, catalog, settings.filter or [], folder), WINDOW
        meta["index"] = {"state": settings.snapshot or index.state, "id_field": settings.id_field}
    left_out = these(index.id_field, found.foreign) if found.foreign else None
    served = parts(catalog, settings, cluster, index, left_out)
    form = Form(settings.fields, settings.template, settings.filter or [], left_out, served.keywords)
    own = None if settings.index is None else catalog
    about = (fingerprint_of(meta), len(catalog), found.absent, own, served.schema)
    return OpenSearch(Searches(cluster, index), form, window, *about)


def analysis_language(params: Mapping[str, Any]) -> str | None:
    """The code of the language that the analyzer of a built index is for. None = no language, or an existing index."""
    settings = Params(**params)
    return settings.language if settings.index is None else None
