"""The types of this package: queries, hits, the retriever's contract, and the errors.

Shapes: Q queries, k hits per query, T targets per query, n documents in the catalogue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(one, str) for one in value)


def _are_pairs(value: Any) -> bool:
    """Whether a value is a tuple of pairs whose first is a text."""
    return isinstance(value, tuple) and all(
        isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) for one in value
    )


@dataclass(frozen=True)
class Structured:
    """A query in parts, for a retriever that declares a :class:`Schema`. The parts mean the same in all of these.

    query: a bag of words.
    must: texts; a hit has every word of each of them, in any of the searched fields.
    should: texts whose words only raise the score.
    filters: pairs of a field and values; a hit has one of these values in the field, character by character.
    boosts: pairs of a field and a number; the weight of the field is multiplied by it.

    A hit has at least one word of ``query`` or ``must`` or, where both are empty, of ``should``; it has all words of
    ``must``; and it passes all filters. Its score is that of all words of the three parts together. A word that the
    engine drops, such as a stop word, is in no document and is required of none.

    Raises TypeError for parts of another shape, and ValueError for a field that is named twice. The schema of a
    retriever says which fields, values and numbers are allowed.
    """

    query: str = ""
    must: tuple[str, ...] = ()
    should: tuple[str, ...] = ()
    filters: tuple[tuple[str, tuple[str, ...]], ...] = ()
    boosts: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.query, str) and _are_texts(self.must) and _are_texts(self.should)):
            raise TypeError(f"Structured: query must be a text, must and should tuples of texts, got {self!r:.200}")
        if not _are_pairs(self.filters) or not all(_are_texts(values) for _, values in self.filters):
            raise TypeError(f'Structured.filters must be like (("brand", ("Acme",)),), got {self.filters!r:.200}')
        if not _are_pairs(self.boosts):
            raise TypeError(f'Structured.boosts must be like (("title", 2),), got {self.boosts!r:.200}')
        for name in ("filters", "boosts"):
            pairs = getattr(self, name)
            if len({field for field, _ in pairs}) < len(pairs):
                raise ValueError(f"Structured.{name} names a field twice: {pairs!r}: name it once")
            object.__setattr__(self, name, tuple(sorted(pairs)))  # Equal queries are then equal, and share a cache.

    @property
    def base(self) -> str:
        """The text of which a hit has at least one word."""
        return " ".join(filter(None, [self.query, *self.must])) or " ".join(self.should)

    @property
    def extra(self) -> str:
        """The text whose words only raise the score."""
        return " ".join(self.should) if self.query or self.must else ""

    @property
    def text(self) -> str:
        """All words as one text."""
        return " ".join(filter(None, [self.base, self.extra]))


LIMITS = ("max_characters", "max_words", "max_must", "max_values", "max_value_characters")  # Of a Schema.


@dataclass(frozen=True)
class Schema:
    """Which parts of a :class:`Structured` query a retriever serves.

    fields: the names of the searched fields. () = they have no names.
    boosts: the fields of which a query may change the weight.
    filters: pairs of a field by which a query may filter, and some of its values, as examples for a prompt.
    least_boost, most_boost: the range of a boost.
    max_characters, max_words: the most characters, and words, of `query`, `must` and `should` together.
    max_must: the most words of `must`.
    max_values, max_value_characters: the most values of all filters together, and the most characters of each.

    Raises TypeError or ValueError for a limit that is no finite number.
    """

    fields: tuple[str, ...] = ()
    boosts: tuple[str, ...] = ()
    filters: tuple[tuple[str, tuple[str, ...]], ...] = ()
    least_boost: float = 0.1
    most_boost: float = 10.0
    max_characters: int = 1000
    max_words: int = 64
    max_must: int = 16
    max_values: int = 16
    max_value_characters: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.least_boost <= self.most_boost < math.inf:
            raise ValueError(
                f"Schema: the boosts are from {self.least_boost!r} to {self.most_boost!r}: set least_boost and "
                "most_boost to finite numbers above 0, the smaller one first"
            )
        for name in LIMITS:
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"Schema.{name} must be an integer >= 0, got {getattr(self, name)!r}")

    def lacks(self, other: Schema) -> list[str]:
        """What queries of another schema may have, and those of this one may not, such as "filter brand"."""
        own = {name for name, _ in self.filters}
        return [
            *(f"filter {name}" for name, _ in other.filters if name not in own),
            *(f"boost {name}" for name in other.boosts if name not in self.boosts),
            *(["least_boost"] if other.boosts and other.least_boost < self.least_boost else []),
            *(["most_boost"] if other.boosts and other.most_boost > self.most_boost else []),
            *(name for name in LIMITS if getattr(other, name) > getattr(self, name)),
        ]


class Query(NamedTuple):
    """One query. A text backend reads ``text``; a recommender reads ``history`` and ``weights``.

    text: a bag of words; query syntax is not interpreted.
    history: catalogue rows, oldest first.
    weights: signed, one per row of the history; () = all 1. A negative weight means that the user dislikes the item.
    seen: rows that `retrievers.Unseen` leaves out of the ranking; None = the rows of the history. It differs from the
        history where a policy edits the history: an item that the policy adds was not chosen by the user.
    structured: the query in parts, in place of ``text``, which then has the same words for retrievers that are asked
        for something else. None = the query is ``text``. A retriever without a :class:`Schema` raises ValueError.
    """

    text: str = ""
    history: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    seen: tuple[int, ...] | None = None
    structured: Structured | None = None


class Hits(NamedTuple):
    """One ranked list per query.

    rows: (Q, min(k, n)) int32 catalogue rows, best first; -1 = no hit.
    scores: (Q, min(k, n)) float32, descending; -inf where rows is -1.
    """

    rows: np.ndarray
    scores: np.ndarray


class Retriever(Protocol):
    """The contract of a retriever: it ranks the rows of the catalogue for a text or a history.

    `search` and `ranks` use the same order: by score, then by row. A document that matches nothing in the query, such
    as none of its terms, is not retrieved.

    Errors: ValueError for bad arguments. RetrieverError for an index that is broken or was replaced; it ends a run.
    Any other exception (ConnectionError, TimeoutError, …) is an outage: the Scorer leaves the affected rows out, counts
    them, and ends the run if the outage lasts.

    A class of your own needs no base class. If it can only list the best documents, like a search engine behind HTTP,
    `retrievers.ranks_from_search` computes `ranks` from `search`::

        import httpx
        import retrievers

        class Engine:
            def __init__(self, url, catalog):
                self.url, self.catalog = url, catalog
                self.fingerprint = f"engine-{catalog.fingerprint}"

            def search(self, queries, k):
                hits = retrievers.no_hits(len(queries), min(k, len(self.catalog)))
                for q, query in enumerate(queries):
                    answer = httpx.get(self.url, params={"text": query.text, "size": hits.rows.shape[1]})
                    found = answer.raise_for_status().json()
                    hits.rows[q, : len(found)] = self.catalog.rows([hit["id"] for hit in found])
                    hits.scores[q, : len(found)] = [hit["score"] for hit in found]
                return hits

            def ranks(self, queries, targets):
                return retrievers.ranks_from_search(self.search, queries, targets, len(self.catalog), depth=100)

    A class may also define a method `retriever_traits`, see :class:`HasTraits`. No other attribute of it is read.
    """

    @property
    def fingerprint(self) -> str:
        """A string that changes with the catalogue, the parameters and the version of the index.

        It is part of the key of every cached answer, and a resumed run compares it with its own.
        """
        ...

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """The best k documents of each of Q queries.

        k: the number of hits per query, at least 1. A k above the size of the catalogue is lowered to it.

        Raises ValueError for k < 1.
        """
        ...

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """The rank of each target: (Q, T) int32, counted from 1; 0 = the target is not retrieved, or is padding.

        targets: (Q, T) integer catalogue rows, T for each query; -1 = padding.

        The ranks are exact at any depth: a rank is the position of the target in ``search(queries, k=n)``, unless the
        backend says otherwise. A backend that can fail for single queries, such as a client of a server, returns -1
        for all targets of those queries.

        Raises ValueError for targets of another shape or type, and for a row outside the catalogue.
        """
        ...


@dataclass(frozen=True)
class Traits:
    """What a retriever declares about itself beyond `search` and `ranks`.

    The defaults describe a class that declares nothing.

    inner: the retrievers that it asks; a wrapper names one, a fusion names several. Default ().
    reads_text: whether ``Query.text`` changes its answers. None, the default, means that it reads text if one of
        ``inner`` does; a retriever without inner ones then reads text.
    fitted_on: the fingerprints of the interactions or judgments that this retriever itself was fitted on. Default ().
    fit_reports: a pair (kind, report) for each fit of this retriever itself; a report is plain JSON. Default ().
    absent: the rows of the catalogue that its own index lacks, as an existing index of an engine may. Default ().
    structured: which structured queries it serves. None, the default, = it serves none, and raises ValueError for
        them. Unlike the others, this is never taken from ``inner``: a wrapper that passes queries on declares it.

    `retrievers.fitted_on`, `retrievers.fits` and `retrievers.absent` add those of ``inner``.

    Raises TypeError for a value of another type.
    """

    inner: Sequence[Retriever] = ()
    reads_text: bool | None = None
    fitted_on: Sequence[str] = ()
    fit_reports: Sequence[tuple[str, Mapping[str, Any]]] = ()
    absent: Sequence[int] = ()
    structured: Schema | None = None

    def __post_init__(self) -> None:
        for name in ("inner", "fitted_on", "fit_reports", "absent"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list):
                raise TypeError(f"Traits.{name} must be a tuple or a list, got {value!r}: write ({value!r},) for one")
        if self.reads_text is not None and type(self.reads_text) is not bool:
            raise TypeError(f"Traits.reads_text must be True, False or None, got {self.reads_text!r}: write one")
        if not all(isinstance(fingerprint, str) for fingerprint in self.fitted_on):
            raise TypeError(f"Traits.fitted_on must hold strings, got {self.fitted_on!r}: see Interactions.fingerprint")
        if self.structured is not None and not isinstance(self.structured, Schema):
            raise TypeError(f"Traits.structured must be a Schema or None, got {self.structured!r}: write one")


@runtime_checkable
class HasTraits(Protocol):
    """A retriever whose class defines `retriever_traits`: a wrapper, a fusion, or one that is fitted on interactions.

    A class without this method is a plain retriever: it has no inner retrievers, reads text, and is fitted on nothing.
    The method has to be defined by the class or a base class of it; `__getattr__` and attributes of the instance do
    not count. A wrapper of your own declares itself so::

        class Reranked:
            def retriever_traits(self):
                return retrievers.Traits(inner=[self.first_stage])
    """

    def retriever_traits(self) -> Traits:
        """The traits of this retriever."""
        ...


class ToolkitError(Exception):
    """The base class of errors that a user can fix. The message is one line: what is wrong, and the fix."""


class RetrieverError(ToolkitError, RuntimeError):
    """The index is missing, corrupt, or built for another catalogue, or the retriever cannot be used at all.

    The message is one line: the folder, what is wrong, and the fix.
    """


class UnavailableError(ToolkitError, RuntimeError):
    """The retriever did not answer this time. Another attempt may succeed. See `retrievers.core.outage`."""


class CatalogError(ToolkitError, KeyError, ValueError):
    """Ids that the catalogue does not have. It is a KeyError and a ValueError; the message is ``args[0]``."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError alone would put the sentence in quotation marks
