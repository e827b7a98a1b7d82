"""Frozen retrievers behind one contract: ``search`` for people, ``ranks`` for rewards.

    import retrievers
    catalog = retrievers.Catalog.from_records([{"id": "🎉", "text": "party popper"}])
    bm25 = retrievers.open("bm25", catalog)
    bm25.search([retrievers.Query("party")], k=3)

Importing this package loads neither an index library nor torch: a backend is imported when it is opened.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from retrievers.catalog import Catalog
from retrievers.scores import rank, top
from retrievers.types import Hits, Query, Retriever, RetrieverError

__all__ = ["BACKENDS", "Catalog", "Hits", "Query", "Retriever", "RetrieverError", "open", "rank", "top"]

# kind -> module with `build(catalog, folder, **params) -> Retriever`. A backend of your own is the path of
# such a module.
BACKENDS = {"bm25": "retrievers.bm25"}


def open(kind: str, catalog: Catalog, folder: str | Path | None = None, **params: Any) -> Retriever:
    """Open ``kind`` over ``catalog`` from ``folder``; what is not there yet is built (None: in memory).

    Raises ValueError for an unknown kind or parameter (naming the nearest), RetrieverError for a folder that
    holds something else or something broken.
    """
    return _build_function(kind, params)(catalog, folder, **params)


def _build_function(kind: str, params: dict[str, Any]) -> Callable[..., Retriever]:
    if kind not in BACKENDS and "." not in kind and importlib.util.find_spec(kind) is None:
        nearest = difflib.get_close_matches(kind, BACKENDS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"retriever.kind: unknown {kind!r}: did you mean {nearest!r}? Choose from {', '.join(BACKENDS)}, "
            "or give the path of a module of yours"
        )
    try:
        module = importlib.import_module(BACKENDS.get(kind, kind))
    except ImportError as error:
        raise ValueError(
            f"retriever.kind: cannot import {kind!r} ({error}): check the path, and that it is on PYTHONPATH"
        ) from error
    if not hasattr(module, "build"):
        raise ValueError(f"retriever.kind: {kind!r} has no function build(catalog, folder, **params): write one")
    # A backend with a `Params` dataclass has its parameters checked by name.
    known = (
        [field.name for field in fields(module.Params)] if inspect.isclass(getattr(module, "Params", None)) else None
    )
    for name in params:
        if known is not None and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"retriever.params.{name}: unknown parameter of {kind!r}: did you mean {nearest!r}? "
                f"Choose from {', '.join(known)}"
            )
    return module.build
