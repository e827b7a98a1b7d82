"""Retrievers made of others: how a part is written in a recipe, checked and opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retrievers import registry
from retrievers.catalog import Catalog
from retrievers.interactions import Interactions
from retrievers.types import Retriever


def check_part(where: str, part: Any, *more: str) -> None:
    """Raises ValueError where ``part`` is no {kind, params} mapping; more: further keys it may have."""
    if not isinstance(part, Mapping) or not isinstance(part.get("kind"), str):
        raise ValueError(f"{where} must be a mapping with a kind, such as {{kind: bm25}}, got {part!r}")
    known = ("kind", "params", *more)
    unknown = sorted(set(part) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}: choose from {', '.join(known)}")


def open_part(
    name: str, part: Mapping[str, Any], catalog: Catalog, folder: str | Path | None, interactions: Interactions | None
) -> Retriever:
    """A part in a folder of its own inside ``folder`` (None: in memory). Raises what the part raises."""
    inside = None if folder is None else Path(folder) / f"{name}-{part['kind'].rpartition('.')[2]}"
    return registry.open(part["kind"], catalog, inside, interactions, **part.get("params") or {})


def reads_text(retriever: Any) -> bool:
    """Whether ``Query.text`` changes what it answers: of a made-up one, in any part."""
    parts = _inside(retriever)
    return any(map(reads_text, parts)) if parts else bool(getattr(retriever, "reads_text", True))


def fitted_on(retriever: Any) -> set[str]:
    """The fingerprints of the interactions that it, or a part of it, was fitted on; here or behind a server."""
    return set(getattr(retriever, "fitted_on", ())).union(*map(fitted_on, _inside(retriever)))


def fits(retriever: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(kind, what its fit found) of every part that was fitted on interactions; nothing for an index of documents."""
    if hasattr(retriever, "report"):
        yield retriever.kind, retriever.report
    for part in _inside(retriever):
        yield from fits(part)


def _inside(retriever: Any) -> Sequence[Any]:
    """What it is made of, or wrapped around."""
    wrapped = [retriever.retriever] if hasattr(retriever, "retriever") else []
    return getattr(retriever, "parts", wrapped)
