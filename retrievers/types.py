"""Every noun of this package. Shapes: Q queries, k depth, T targets a query, n documents in the catalogue."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Query(NamedTuple):
    """What a retriever is asked. A text backend reads ``text``; a history backend reads the other two.

    text: a bag of words; no query syntax is interpreted.
    history: catalogue rows, oldest first.
    weights: signed, one per history row; () means all 1. Negative = "not this".
    seen: rows that `retrievers.Unseen` leaves out; None = the history's. Another set where the history was edited: what
        a model only wishes for is no purchase.
    """

    text: str = ""
    history: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    seen: tuple[int, ...] | None = None


class Hits(NamedTuple):
    """A ranked list a query.

    rows: (Q, min(k, n)) int32 catalogue rows, best first; -1 = no hit.
    scores: (Q, min(k, n)) float32, descending; -inf where rows is -1.
    """

    rows: np.ndarray
    scores: np.ndarray


class Retriever(Protocol):
    """The frozen half of the environment: text or history in, ranked catalogue rows out.

    Both methods rank alike: by score, ties by row, and a document that nothing in the query speaks for
    (no matching term) is not retrieved.

    Errors: ValueError for bad arguments, RetrieverError for an index that is broken or another one by now, which ends
    a run. Anything else (ConnectionError, TimeoutError, …) is an outage: the Scorer leaves those rows out, counts
    them, and ends the run where it lasts.
    """

    @property
    def fingerprint(self) -> str:
        """Hex digest of catalogue + parameters + index version: cache key and resume check."""
        ...

    def search(self, queries: Sequence[Query], k: int) -> Hits:
        """The best k documents of each query; k is clamped to the catalogue. Raises ValueError for k < 1."""
        ...

    def ranks(self, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
        """Where the targets stand: (Q, T) rows, -1 = padding -> (Q, T) int32 ranks from 1; 0 = not retrieved.

        Exact at any depth: equals the position in ``search(queries, k=n)``, unless the backend says otherwise.
        A backend that can fail for some queries only (a server, say) puts -1 in all places of those.
        """
        ...


class ToolkitError(Exception):
    """What every error of this toolkit that a user can act on is: one line that says what is wrong, and the fix."""


class RetrieverError(ToolkitError, RuntimeError):
    """The index is missing, corrupt, or built for another catalogue; or no number would be true without it. One line:
    folder, finding, fix."""


class UnavailableError(ToolkitError, RuntimeError):
    """The retriever did not answer this time; asking again may help. See `retrievers.core.outage`."""


class CatalogError(ToolkitError, KeyError, ValueError):
    """Ids that the catalogue lacks. A failed look-up and a wrong value both; the message is ``args[0]``."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError alone would put the sentence in quotation marks
