"""Retrievers made of others: how a part is written in a recipe, checked and opened, and what is known of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retrievers import registry
from retrievers.catalog import Catalog
from retrievers.interactions import Interactions
from retrievers.types import HasTraits, Retriever, Traits


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


def traits_of(retriever: Any) -> Traits:
    """What ``retriever`` declares about itself; the defaults if its class does not define `retriever_traits`. Raises
    TypeError if that method returns anything but Traits."""
    # The class is asked, not the object: an object with a __getattr__ may have an attribute of any name.
    if not issubclass(type(retriever), HasTraits):
        return Traits()
    traits = retriever.retriever_traits()
    if not isinstance(traits, Traits):
        raise TypeError(
            f"{type(retriever).__name__}.retriever_traits() returned {traits!r}: return retrievers.Traits(…)"
        )
    return traits


def reads_text(retriever: Retriever) -> bool:
    """Whether ``Query.text`` changes what ``retriever`` answers: as it declares, else whether an inner one reads it."""
    traits = traits_of(retriever)
    if traits.reads_text is not None:
        return traits.reads_text
    return any(map(reads_text, traits.inner)) if traits.inner else True


def fitted_on(retriever: Retriever) -> set[str]:
    """The fingerprints of the interactions that ``retriever`` and its inner retrievers were fitted on, here or behind
    a server."""
    traits = traits_of(retriever)
    return set(traits.fitted_on).union(*map(fitted_on, traits.inner))


def fits(retriever: Retriever) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(kind, report) of each fit of ``retriever`` and its inner retrievers; nothing for an index of documents."""
    traits = traits_of(retriever)
    yield from traits.fit_reports
    for inner in traits.inner:
        yield from fits(inner)
