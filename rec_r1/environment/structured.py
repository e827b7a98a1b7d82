"""Which retrievers answer the structured queries of a recipe, and the errors for all others."""

from __future__ import annotations

from collections.abc import Iterator

import retrievers
from rec_r1.config import Recipe, UserError
from retrievers import Retriever, Schema


def unserved(recipe: Recipe) -> Iterator[str]:
    """One line where the recipe's action is a structured query that its retriever certainly does not answer.

    Nothing is opened. A server, or a retriever of the user's own, is checked when it is open: :func:`schema_of`.
    """
    kind = recipe.retriever.kind
    if recipe.format.action != "structured" or kind == "remote" or kind not in retrievers.BACKENDS:
        return
    if not _serves(kind) or recipe.retriever.params.get("structured") is None:
        yield _refusal(kind)


def schema_of(recipe: Recipe, retriever: Retriever) -> Schema:
    """Which structured queries an open retriever answers. Raises UserError where it answers none."""
    found = retrievers.schema_of(retriever)
    if found is None:
        raise UserError(_refusal(recipe.retriever.kind))
    return found


def check_covers(recipe: Recipe, retriever: Retriever, own: Schema | None, where: str) -> None:
    """Raise UserError where a policy's structured queries cannot be sent to another retriever.

    recipe: a recipe with that retriever.
    retriever: the retriever.
    own: what the policy's own retriever allows. None = the action is no structured query.
    where: the option or the setting that names the retriever.
    """
    if own is None:
        return
    lacks = schema_of(recipe, retriever).lacks(own)
    if lacks:
        raise UserError(
            f"{where}: {recipe.retriever.kind} does not answer all structured queries of the run: it lacks "
            f"{', '.join(lacks)}: add the filters to retriever.params.structured.filters, and the fields to "
            "retriever.params.fields; limits are those of the retriever's Schema"
        )


def _refusal(kind: str) -> str:
    if kind in retrievers.BACKENDS and _serves(kind):
        return (
            f"format.action: structured: retriever.kind={kind} answers structured queries with retriever.params."
            "structured only: set retriever.params.structured={}, or name fields to filter by: {filters: [brand]}"
        )
    if kind == "remote":
        return (
            "format.action: structured: the server of retriever.kind=remote answers no structured queries: start "
            "`rec-r1 serve` with a recipe that sets retriever.params.structured"
        )
    serving = [name for name in retrievers.BACKENDS if _serves(name)]
    return (
        f"format.action: structured: retriever.kind={kind} answers no structured queries: choose "
        f"{', '.join(serving)}, with retriever.params.structured={{}}, or set format.action=replace"
    )


def _serves(kind: str) -> bool:
    return "structured" in retrievers.parameters(kind)
