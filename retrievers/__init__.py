"""Frozen retrievers behind one contract: ``search`` for people, ``ranks`` for rewards.

    import retrievers
    catalog = retrievers.Catalog.from_records([{"id": "🎉", "text": "party popper"}])
    bm25 = retrievers.open("bm25", catalog)
    bm25.search([retrievers.Query("party")], k=3)

Importing this package loads neither an index library nor torch: a backend is imported when it is opened.
"""

from retrievers.catalog import Catalog
from retrievers.combine.cache import Cache
from retrievers.combine.capabilities import fits, fitted_on, reads_text
from retrievers.combine.exclude_history import Unseen
from retrievers.core.ranking import certain_hits, certain_ranks, rank, top
from retrievers.interactions import Interactions
from retrievers.registry import BACKENDS, format_of, languages, mismatches, open, parameters, takes_interactions
from retrievers.types import CatalogError, Hits, Query, Retriever, RetrieverError, ToolkitError, UnavailableError

__all__ = [
    "BACKENDS",
    "Cache",
    "Catalog",
    "CatalogError",
    "Hits",
    "Interactions",
    "Query",
    "Retriever",
    "RetrieverError",
    "ToolkitError",
    "UnavailableError",
    "Unseen",
    "certain_hits",
    "certain_ranks",
    "fits",
    "fitted_on",
    "format_of",
    "languages",
    "mismatches",
    "open",
    "parameters",
    "rank",
    "reads_text",
    "takes_interactions",
    "top",
]
