"""The backends by name, and how one is found, asked for its parameters, and opened."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from retrievers.catalog import Catalog
from retrievers.interactions import Interactions
from retrievers.text.languages import mismatch
from retrievers.types import Retriever

# kind -> module with `build(catalog, folder, **params) -> Retriever`, which opens what `folder` already holds; one
# that is fitted on interactions takes them as `interactions`, after `folder`.
# A backend of your own is the path of such a module, or of a class with such a function.
BACKENDS = {
    "bm25": "retrievers.text.bm25",
    "lucene": "retrievers.text.lucene",
    "dense": "retrievers.text.dense",
    "hybrid": "retrievers.combine.hybrid",
    "milvus": "retrievers.text.milvus",
    "remote": "retrievers.serving.client",
    "popularity": "retrievers.recommenders.popularity",
    "propagate": "retrievers.combine.propagate",
    "itemknn": "retrievers.recommenders.itemknn",
    "ease": "retrievers.recommenders.ease",
    "l3ae": "retrievers.recommenders.l3ae",
    "sansa": "retrievers.recommenders.sansa",
    "vqrec": "retrievers.recommenders.vqrec.backend",
    "personas": "retrievers.recommenders.personas.backend",
}


def open(
    kind: str,
    catalog: Catalog,
    folder: str | Path | None = None,
    interactions: Interactions | None = None,
    **params: Any,
) -> Retriever:
    """Open ``kind`` over ``catalog`` from ``folder``; what is not there yet is built (None: in memory).

    interactions: what a history backend is fitted on; the others are not given it. Raises ValueError for an unknown
    kind or parameter (naming the nearest), RetrieverError for a folder that holds something else or something broken.
    """
    function = _build_function(kind, params)
    if _takes(function):
        return function(catalog, folder, interactions, **params)
    return function(catalog, folder, **params)


def takes_interactions(kind: str, params: Mapping[str, Any]) -> bool:
    """Whether what ``kind`` builds depends on interactions; one made of others, whether any of these does. Raises
    ValueError for an unknown kind or parameter."""
    function, parts = _build_function(kind, dict(params)), getattr(find(kind), "parts", None)
    if parts is None:
        return _takes(function)
    return any(takes_interactions(part["kind"], part.get("params") or {}) for part in parts(params))


def _takes(function: Callable[..., Retriever]) -> bool:
    return "interactions" in inspect.signature(function).parameters


def mismatches(kind: str, params: Mapping[str, Any], catalog: Catalog) -> list[str]:
    """A sentence for each of :func:`languages` that the texts' script does not belong to. Raises ValueError for an
    unknown kind or parameter."""
    found = [mismatch(catalog.texts, code) for code in dict.fromkeys(languages(kind, params))]
    return [line for line in found if line is not None]


def languages(kind: str, params: Mapping[str, Any]) -> list[str | None]:
    """The language code of ``kind``, or of each of its parts, that analyses words; None = words as they are written.
    Empty where nothing does. Raises ValueError for an unknown kind or parameter."""
    _build_function(kind, dict(params))
    backend = find(kind)
    parts, language = getattr(backend, "parts", None), getattr(backend, "language", None)
    if parts is not None:
        return [code for part in parts(params) for code in languages(part["kind"], part.get("params") or {})]
    return [] if language is None else [language(params)]


def parameters(kind: str) -> dict[str, Any]:
    """What ``kind`` takes, name -> annotation; what it takes without an annotation is not listed. Raises ValueError for
    an unknown kind."""
    backend = find(kind)
    declared = getattr(backend, "Params", None)
    if inspect.isclass(declared) and is_dataclass(declared):
        return get_type_hints(declared)
    names = _parameters(backend, _build_function(kind, {})) or []
    return {name: hint for name, hint in get_type_hints(backend.build).items() if name in names}


def format_of(kind: str) -> int | None:
    """The version of what ``kind`` writes: part of a cached index's name, so that a newer release builds its own.
    None for a backend without one, or a kind that does not exist."""
    try:
        version: int | None = getattr(find(kind), "FORMAT", None)
    except ValueError:
        return None
    return version


def _build_function(kind: str, params: dict[str, Any]) -> Callable[..., Retriever]:
    backend = find(kind)
    function: Callable[..., Retriever] | None = getattr(backend, "build", None)
    if function is None:
        raise ValueError(f"retriever.kind: {kind!r} has no function build(catalog, folder, **params): write one")
    known = _parameters(backend, function)
    for name in params:
        if known is not None and name not in known:
            nearest = "".join(difflib.get_close_matches(name, known, n=1, cutoff=0.0))
            choices = f"did you mean {nearest!r}? Choose from {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"retriever.params.{name}: unknown parameter of {kind!r}: {choices}")
    return function


def find(kind: str) -> Any:
    """The module, or the class in a module, that ``kind`` names."""
    if kind[:1] in ("", ".") or (kind not in BACKENDS and "." not in kind and importlib.util.find_spec(kind) is None):
        nearest = difflib.get_close_matches(kind, BACKENDS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"retriever.kind: unknown {kind!r}: did you mean {nearest!r}? Choose from {', '.join(BACKENDS)}, "
            "or give the path of a module of yours"
        )
    path = BACKENDS.get(kind, kind)
    try:
        return importlib.import_module(path)
    except Exception as error:  # a module of the user's own may raise anything
        # "module.Class" has no module of that name; an import that fails inside the module has another one.
        parent, _, name = path.rpartition(".")
        if parent and getattr(error, "name", None) == path:
            attribute = getattr(importlib.import_module(parent), name, None)
            if attribute is not None:
                return attribute
        raise ValueError(
            f"retriever.kind: cannot import {kind!r} ({error}): check the path, and that it is on PYTHONPATH"
        ) from error


def _parameters(backend: Any, function: Callable[..., Retriever]) -> list[str] | None:
    """The names a backend takes: its `Params` dataclass's fields, or those after catalog and folder in `build`'s
    signature. None = any (**params without `Params`)."""
    declared = getattr(backend, "Params", None)
    if inspect.isclass(declared) and is_dataclass(declared):
        return [field.name for field in fields(declared)]
    signature = list(inspect.signature(function).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
        return None
    return [parameter.name for parameter in signature[2:] if parameter.name != "interactions"]
