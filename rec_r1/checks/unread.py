"""Refuses settings that nothing reads: they would have no effect."""

from __future__ import annotations

from collections.abc import Iterator

from rec_r1.config import CacheConfig, FormatConfig, Recipe
from rec_r1.prompts import Format

LISTS = ("items", "edit")  # actions whose titles are grounded to the catalogue


def unread(recipe: Recipe, format_: Format) -> Iterator[str]:
    """One line for every setting, changed from its default, that this recipe's task, action and retriever ignore.

    Settings of `task` are judged in :func:`rec_r1.tasks.find`. `format.title_words` counts as read, since the few-shot
    baseline writes titles for every action, and so do vLLM options, since a recipe may also run on a GPU machine.
    """
    usual, format_config = FormatConfig(), recipe.format
    action = format_config.action
    for name, given, default, read, by in (
        ("repeat", format_config.repeat, usual.repeat, action == "expand", "format.action=expand"),
        (
            "keep_query",
            format_config.keep_query,
            False,
            action in ("replace", "expand"),
            "format.action=replace or expand",
        ),
        ("max_items", format_config.max_items, usual.max_items, action in LISTS, "format.action=items or edit"),
        ("floor", format_config.floor, usual.floor, action in LISTS, "format.action=items or edit"),
        ("system", format_config.system, usual.system, format_config.chat, "format.chat=true"),
        (
            "example_words",
            format_config.example_words,
            usual.example_words,
            action in ("replace", "expand"),
            "format.action=replace or expand",
        ),
        ("titles", format_config.titles, usual.titles, "{history" in format_.template, "a prompt with {history}"),
    ):
        if given != default and not read:
            yield f"format.{name}: {given!r}: only {by} reads it: remove it, or set format.{name}={_yaml(default)}"
    if recipe.task.candidates and "{candidates}" not in format_.template:
        yield (
            f"task.candidates: {recipe.task.candidates}: only a prompt with {{candidates}} reads it: set "
            "task.candidates=0, or take such a prompt"
        )
    if action == "ranking" and format_config.examples:
        yield (
            f"format.examples: {format_config.examples}: a ranking has no examples, its numbers belong to one prompt: "
            "set format.examples=0"
        )
    grounding = recipe.grounding
    if grounding.kind is not None and action not in LISTS:
        yield f"grounding.kind: {grounding.kind!r}: only format.action=items or edit reads it: set grounding.kind=null"
    if grounding.params and grounding.kind is None:
        yield f"grounding.params: {grounding.params!r}: only read with grounding.kind: set that, or remove them"
    retriever = recipe.retriever
    if retriever.index is not None and retriever.kind == "remote":
        yield f"retriever.index: {retriever.index!r}: the server of kind remote has its own: set retriever.index=null"
    if retriever.cache.disk_mb != CacheConfig().disk_mb and retriever.cache.disk is None:
        yield f"retriever.cache.disk_mb: {retriever.cache.disk_mb}: only read with retriever.cache.disk: set a folder"


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
