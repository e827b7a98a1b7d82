"""Retrievers that share one contract: ``search`` returns the best documents, ``ranks`` the ranks of given documents.

    import retrievers
    catalog = retrievers.Catalog.from_records([{"id": "🎉", "text": "party popper"}])
    bm25 = retrievers.open("bm25", catalog)
    bm25.search([retrievers.Query("party")], k=3)

Importing this package loads neither an index library nor torch, because a backend is imported when it is opened.
"""

from retrievers.catalog import Catalog
from retrievers.combine.cache import Cache
from retrievers.combine.capabilities import absent, fits, fitted_on, reads_text, schema_of
from retrievers.combine.exclude_history import Unseen
from retrievers.core.parameters import problems_of
from retrievers.core.ranking import certain_hits, certain_ranks, no_hits, rank, ranks_from_search, top
from retrievers.encoders.unsharded import unsharded
from retrievers.interactions import Interactions, Judgments
from retrievers.registry import (
    BACKENDS,
    BackendModule,
    check_parameters,
    content_hashes,
    fit_data,
    format_of,
    index_backends,
    languages,
    mismatches,
    open,
    parameters,
    takes_interactions,
)
from retrievers.types import (
    CatalogError,
    HasTraits,
    Hits,
    Query,
    Retriever,
    RetrieverError,
    Schema,
    Structured,
    ToolkitError,
    Traits,
    UnavailableError,
)

__all__ = [
    "BACKENDS",
    "BackendModule",
    "Cache",
    "Catalog",
    "CatalogError",
    "HasTraits",
    "Hits",
    "Interactions",
    "Judgments",
    "Query",
    "Retriever",
    "RetrieverError",
    "Schema",
    "Structured",
    "ToolkitError",
    "Traits",
    "UnavailableError",
    "Unseen",
    "absent",
    "certain_hits",
    "certain_ranks",
    "check_parameters",
    "content_hashes",
    "fit_data",
    "fits",
    "fitted_on",
    "format_of",
    "index_backends",
    "languages",
    "mismatches",
    "no_hits",
    "open",
    "parameters",
    "problems_of",
    "rank",
    "ranks_from_search",
    "reads_text",
    "schema_of",
    "takes_interactions",
    "top",
    "unsharded",
]
