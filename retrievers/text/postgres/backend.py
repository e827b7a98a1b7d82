"""A PostgreSQL table as a retriever; the README of this package says how to choose its parameters.

Mode "text" is full text search, "vector" compares embeddings by pgvector, and "hybrid" fuses both in one statement. The
backend makes a table of the catalogue, or searches an existing one, whose ids are those of the catalogue.

This file needs no driver, so that a missing one is reported in one line.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrievers.catalog import Catalog
from retrievers.text.languages import LANGUAGES
from retrievers.text.postgres.params import Params
from retrievers.types import RetrieverError

if TYPE_CHECKING:
    from retrievers.text.postgres.retriever import Postgres

__all__ = ["INDEX_FORMAT", "Params", "analysis_language", "build"]
INSTALL = "pip install 'rec-r1[postgres]'"
INDEX_FORMAT = 1  # The version of the statements, which is part of the fingerprint.


def build(catalog: Catalog, folder: str | Path | None = None, **params: Any) -> Postgres:
    """Open a table of a database, and make it of the catalogue if it does not exist.

    catalog: the documents.
    folder: it is not used, because the database has the index.
    params: see :class:`Params`.

    Raises RetrieverError where a package, the database, the table or a permission is missing, and where the table was
    changed after it was built. Raises ValueError for a bad parameter.
    """
    settings = Params(**params)
    missing = [name for name in ("psycopg", "psycopg_pool") if importlib.util.find_spec(name) is None]
    if missing:
        raise RetrieverError(f"retriever.kind: postgres needs {missing[0]}, which is not installed: {INSTALL}")
    from retrievers.text.postgres.retriever import opened

    return opened(catalog, settings, INDEX_FORMAT)


def analysis_language(params: Mapping[str, Any]) -> str | None:
    """The code of the language whose words are analysed. None = no language, a configuration of the database that is
    none of a language, or mode "vector"."""
    settings = Params(**params)
    return settings.language if settings.mode != "vector" and settings.language in LANGUAGES else None
