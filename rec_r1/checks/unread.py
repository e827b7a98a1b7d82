"""Refuse settings that would have no effect, because nothing in the recipe reads them."""

from __future__ import annotations

from collections.abc import Iterator

from rec_r1.config import CacheConfig, FormatConfig, Recipe
from rec_r1.prompts import GROUNDED_ACTIONS, Format


def unread(recipe: Recipe, format_: Format) -> Iterator[str]:
    """One line for each setting with another value than its default that the recipe's action and retriever ignore.

    recipe: the recipe.
    format_: its format.

    :func:`rec_r1.tasks.find` checks the settings of `task`. `format.title_words` is never refused, because the few-shot
    baseline shows titles with every action. Options of vLLM are never refused, because the same recipe may run on a
    machine with a GPU.
    """
    defaults, format_config = FormatConfig(), recipe.format
    action = format_config.action
    is_query, grounds = action in ("replace", "expand"), action in GROUNDED_ACTIONS
    for name, given, default, read, by in (
        ("repeat", format_config.repeat, defaults.repeat, action == "expand", "format.action=expand"),
        ("keep_query", format_config.keep_query, False, is_query, "format.action=replace or expand"),
        ("max_items", format_config.max_items, defaults.max_items, grounds, "format.action=items or edit"),
        ("floor", format_config.floor, defaults.floor, grounds, "format.action=items or edit"),
        ("system", format_config.system, defaults.system, format_config.chat, "format.chat=true"),
        ("example_words", format_config.example_words, 0, is_query, "format.action=replace or expand"),
        ("titles", format_config.titles, defaults.titles, "{history" in format_.template, "a prompt with {history}"),
    ):
        if given != default and not read:
            yield f"format.{name}: {given!r}: only {by} reads it: remove it, or set format.{name}={_yaml(default)}"
    if recipe.task.candidates and "{candidates}" not in format_.template:
        yield (
            f"task.candidates: {recipe.task.candidates}: only a prompt with {{candidates}} reads it: set "
            "task.candidates=0, or use such a prompt"
        )
    if action == "ranking" and format_config.examples:
        yield (
            f"format.examples: {format_config.examples}: a ranking can have no examples, because its numbers belong to "
            "the candidates of one prompt: set format.examples=0"
        )
    grounding = recipe.grounding
    if grounding.kind is not None and not grounds:
        yield f"grounding.kind: {grounding.kind!r}: only format.action=items or edit reads it: set grounding.kind=null"
    if grounding.params and grounding.kind is None:
        yield f"grounding.params: {grounding.params!r}: read only with grounding.kind: set it, or remove the parameters"
    if recipe.warm_start.sft and not recipe.warm_start.samples:
        yield f"warm_start.sft: {recipe.warm_start.sft!r}: read only with warm_start.samples: set it, or remove sft"
    retriever = recipe.retriever
    if retriever.index is not None and retriever.kind == "remote":
        yield (
            f"retriever.index: {retriever.index!r}: the server of retriever.kind=remote has its own index: set "
            "retriever.index=null"
        )
    if retriever.cache.disk_mb != CacheConfig().disk_mb and retriever.cache.disk is None:
        yield (
            f"retriever.cache.disk_mb: {retriever.cache.disk_mb}: only retriever.cache.disk reads it: set "
            "retriever.cache.disk to a folder, or remove it"
        )


def _yaml(value: object) -> str:
    """The value as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
