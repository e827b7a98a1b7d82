"""Retrievers that ask other retrievers: how an inner one is written in a recipe, checked and opened, and how the traits
of all of them are put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retrievers import registry
from retrievers.catalog import Catalog
from retrievers.core.index_folder import is_filled
from retrievers.interactions import Interactions, Judgments
from retrievers.registry import InnerFolder
from retrievers.types import HasTraits, Retriever, Schema, Traits


def check_part(where: str, part: Any, *more: str) -> None:
    """Raise ValueError if ``part`` is not a {kind, params} mapping.

    where: the name of the setting, for the message.
    part: what the recipe has there.
    more: further keys that it may have.
    """
    if not isinstance(part, Mapping) or not isinstance(part.get("kind"), str):
        raise ValueError(f"{where} must be a mapping with a kind, such as {{kind: bm25}}, got {part!r}")
    known = ("kind", "params", *more)
    unknown = sorted(set(part) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}: choose from {', '.join(known)}")


def open_part(
    name: str,
    part: Mapping[str, Any],
    catalog: Catalog,
    folder: str | Path | None,
    interactions: Interactions | None,
    inner_folder: InnerFolder | None,
    judgments: Judgments | None = None,
) -> Retriever:
    """Open one inner backend, and build its index if there is none.

    name: distinguishes it from the other inner backends of the same retriever.
    part: its {kind, params} mapping.
    catalog, folder, interactions, inner_folder, judgments: what the retriever around it was opened with, see
        `retrievers.open`.

    Raises what the backend raises.
    """
    kind, params = part["kind"], part.get("params") or {}
    inside = None if folder is None else Path(folder) / f"{name}-{kind.rpartition('.')[2]}"
    if inner_folder is not None and not (inside is not None and is_filled(inside)):
        inside = inner_folder(kind, params)
    return registry.open(kind, catalog, inside, interactions, inner_folder, judgments, **params)


def traits_of(retriever: Any) -> Traits:
    """What ``retriever`` declares about itself; the defaults if its class does not define `retriever_traits`.

    Raises TypeError if that method returns anything but Traits.
    """
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
    """Whether ``Query.text`` changes what ``retriever`` answers.

    It is what the retriever declares, or else whether one of its inner retrievers reads the text.
    """
    traits = traits_of(retriever)
    if traits.reads_text is not None:
        return traits.reads_text
    return any(map(reads_text, traits.inner)) if traits.inner else True


def fitted_on(retriever: Retriever) -> set[str]:
    """The fingerprints of the data that ``retriever`` and its inner retrievers were fitted on, here or on a server."""
    traits = traits_of(retriever)
    return set(traits.fitted_on).union(*map(fitted_on, traits.inner))


def fits(retriever: Retriever) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(kind, report) of each fit of ``retriever`` and its inner retrievers. An index of documents has none."""
    traits = traits_of(retriever)
    yield from traits.fit_reports
    for inner in traits.inner:
        yield from fits(inner)


def absent(retriever: Retriever) -> set[int]:
    """The rows of the catalogue that the index of ``retriever``, or of any of its inner retrievers, lacks."""
    traits = traits_of(retriever)
    return set(traits.absent).union(*map(absent, traits.inner))


def schema_of(retriever: Retriever) -> Schema | None:
    """Which structured queries ``retriever`` serves. None = none. `Cache` and `Unseen` serve what theirs does."""
    return traits_of(retriever).structured
