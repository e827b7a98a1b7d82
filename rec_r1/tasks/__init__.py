"""Load the task of a recipe. Every loader is a module with a function `load(config) -> Task`."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from rec_r1.config import TaskConfig, TrainFilter, UserError
from rec_r1.config.redaction import from_environment
from rec_r1.console import progress
from rec_r1.tasks.example_words import telling_examples
from rec_r1.tasks.integrity import check_documents, sound
from rec_r1.tasks.types import (
    AT_A_TIME,
    Split,
    Task,
    judged,
    make_split,
    pad,
    popularity,
    prompts,
    raw_scores,
    to_dataset,
)
from retrievers import Catalog, Retriever
from retrievers.core.choices import choose, not_imported
from rewards import RankingReward

__all__ = [
    "TASKS",
    "Split",
    "Task",
    "examples",
    "find",
    "keep_headroom",
    "load",
    "make_split",
    "pad",
    "popularity",
    "prompts",
    "raw_scores",
    "to_dataset",
    "with_candidates",
    "with_examples",
    "without_seen",
]

if TYPE_CHECKING:
    from rec_r1.prompts import Format

logger = logging.getLogger(__name__)
EXAMPLE_THOUGHT = "The customer needs this product."

TASKS = {
    "emoji": "rec_r1.tasks.emoji",
    "beir": "rec_r1.tasks.beir",
    "sequential": "rec_r1.tasks.sequential",
    "esci": "rec_r1.tasks.esci",
    "amazon_c4": "rec_r1.tasks.amazon_c4",
    "trec": "rec_r1.tasks.trec",
    "catalog": "rec_r1.tasks.catalog",
}


def find(config: TaskConfig) -> Any:
    """The module of the recipe's task, which has a function `load(config) -> Task`.

    config: the recipe's section `task`.

    Raises UserError for an unknown task, and for a setting that the task does not read. A module of the user's own may
    read all settings.
    """
    dotted = "." in config.name and not config.name.startswith(".")
    if config.name not in TASKS and not dotted and (config.name[:1] in ("", ".") or find_spec(config.name) is None):
        choices = choose(config.name, TASKS)
        raise UserError(f"task.name: unknown {config.name!r}: {choices}, or give the path of a module of yours")
    path = TASKS.get(config.name, config.name)
    try:
        module = importlib.import_module(path)
    except Exception as error:  # A module of the user's own may raise anything.
        raise UserError(f"task.name: cannot import {config.name!r} {not_imported(path, error)}") from error
    if not hasattr(module, "load"):
        raise UserError(f"task.name: {config.name!r} has no function load(config) -> Task: write one")
    if config.name in TASKS:
        for name, given, usual in (("path", config.path, None), ("splits", config.splits, TaskConfig().splits)):
            if given != usual and name not in module.READS:
                raise UserError(
                    f"task.{name}: {given!r}: task {config.name} does not read it: remove it, or name the task that "
                    "does, such as task.name=beir"
                )
    return module


def load(config: TaskConfig) -> Task:
    """Load a recipe's task, and check it.

    config: the recipe's section `task`.

    Raises UserError where :func:`find` does, and for data that cannot be used.
    """
    named = {"name": config.name, "params": config.params}
    params = from_environment(named, UserError, "task")["params"]
    task = find(config).load(dataclasses.replace(config, params=params))
    if not isinstance(task, Task):
        raise UserError(f"task.name: {config.name!r}: its load(config) returned {type(task).__name__}, not a Task")
    for name, split in task.splits.items():
        if not len(split):
            raise UserError(f"task {task.name}: the {name} split is empty: it needs at least one query")
    if task.folder is None:  # A prepared task was checked before it was stored.
        check_documents(f"task {task.name}", task.catalog)
        task = sound(task)
    if task.interactions is None and task.judgments is None:
        task = dataclasses.replace(task, judgments=judged(task.catalog, task.train, task.validation))
    return task


def with_candidates(task: Task, retriever: Retriever, n: int) -> Task:
    """``task`` with candidates: the first ``n`` hits of each raw query, best first.

    task: the task without candidates.
    retriever: ranks the catalogue for the raw queries.
    n: how many hits to take for each query.

    A training query without a relevant candidate is left out, because every order of its candidates earns 0. Every
    held-out query stays, and scores 0 where no candidate is relevant. Raises UserError where no query of a split is
    left.
    """
    splits: dict[str, Any] = {}
    for name, plain in task.splits.items():
        split = add_candidates(plain, retriever, n)
        kept = [q for q, found in enumerate(split.candidates) if name != "train" or set(found) & set(split.rows[q])]
        if not kept:
            raise UserError(f"task.candidates: no {name} query finds a relevant document among its first {n}: raise it")
        if name == "train":
            logger.info("%d of %d training queries have a relevant candidate", len(kept), len(split))
        splits[name] = split.take(kept)
    return dataclasses.replace(task, **splits)


def add_candidates(split: Split, retriever: Retriever, n: int) -> Split:
    """``split`` with candidates: the first ``n`` hits of each raw query, best first."""
    queries, candidates = split.raw(), []
    for i in progress(range(0, len(split), AT_A_TIME), "candidates of raw queries", f"x {AT_A_TIME} queries"):
        rows = retriever.search(queries[i : i + AT_A_TIME], n).rows
        candidates += [tuple(int(row) for row in found if row >= 0) for found in rows]
    return dataclasses.replace(split, candidates=candidates)


def without_seen(task: Task) -> Task:
    """``task`` with candidates that leave out the items of their query's history.

    A prompt then numbers the same candidates as the Scorer, which leaves out the history's items, too.
    """
    splits: dict[str, Any] = {
        name: dataclasses.replace(split, candidates=list(map(_unseen, split.candidates, split.histories)))
        for name, split in task.splits.items()
        if split.candidates and split.histories
    }
    return dataclasses.replace(task, **splits)


def _unseen(candidates: Sequence[int], history: Sequence[int]) -> tuple[int, ...]:
    seen = set(history)
    return tuple(row for row in candidates if row not in seen)


def examples(
    split: Split, catalog: Catalog, format_: Format, count: int, example_words: int | None = None
) -> tuple[list[int], Format]:
    """Choose queries of a split as examples, and add them to a format.

    An example is answered with the title of its most relevant document, or with the titles of all its relevant
    documents where the action is a list of items. With `format.example_words` it is answered with words that its
    relevant documents share. Examples of the format itself remain, and the new ones stand behind them.

    split: the split that the examples are taken from, evenly spaced among those that are suitable.
    catalog: the titles of the documents.
    format_: the format that gets the examples.
    count: how many examples to take. A smaller split gives all its queries.
    example_words: taken in place of `format.example_words`. None = the format's.

    Returns the indexes of the chosen queries in ``split``, ascending, and the format with the examples. Raises
    UserError for rankings.
    """
    number = format_.config.example_words if example_words is None else example_words
    if number:
        shared = telling_examples(split, catalog, count, number)
        places = sorted(shared)
    else:
        shared = {}
        places = sorted(set(np.linspace(0, len(split) - 1, min(count, len(split)), dtype=int).tolist()))
    chosen = split.take(places)
    bare = format_.of_examples()
    answers = []
    for place, rows, grades in zip(places, chosen.rows, chosen.grades, strict=True):
        best = sorted(zip(rows, grades, strict=True), key=lambda pair: -pair[1])
        titles = [format_.cut(catalog.titles[row]) for row, _ in best]
        if shared.get(place):
            titles = [", ".join(shared[place])]
        answers.append(bare.write(titles if format_.config.action == "items" else titles[:1], EXAMPLE_THOUGHT))
    shown = tuple(zip(prompts(chosen, catalog, bare), answers, strict=True))
    return places, dataclasses.replace(format_, examples=(*format_.examples, *shown))


def with_examples(task: Task, format_: Format, count: int) -> tuple[Task, Format]:
    """Take ``count`` training queries as examples for every prompt.

    Returns the task without these queries, because a prompt must not show its own answer, and the format with the
    examples. Raises UserError where no training query is left.
    """
    places, format_ = examples(task.train, task.catalog, format_, count)
    rest = sorted(set(range(len(task.train))) - set(places))
    if not rest:
        raise UserError(f"format.examples: {count} of {len(task.train)} training queries leave none to train on")
    return dataclasses.replace(task, train=task.train.take(rest)), format_


def keep_headroom(split: Split, retriever: Retriever, config: TrainFilter) -> Split:
    """The queries whose raw query leaves something to gain: its ndcg@k is below `raw_ndcg_below`.

    Where the raw query already ranks the targets first, most rewrites only lower the reward.

    split: the training split.
    retriever: ranks the catalogue for the raw queries.
    config: the recipe's section `task.train_filter`.

    Raises UserError where no query is left.
    """
    raw = raw_scores(split, retriever, RankingReward("ndcg", config.k))
    kept = np.flatnonzero(raw < config.raw_ndcg_below)
    if not len(kept):
        raise UserError(
            f"task.train_filter.raw_ndcg_below: {config.raw_ndcg_below} leaves no training query (the lowest raw "
            f"ndcg@{config.k} is {raw.min():.3f}): raise it"
        )
    if config.raw_ndcg_below <= 1:  # An ndcg is at most 1. Above that, nothing is filtered.
        message = "%d of %d training queries have a raw ndcg@%d below %s"
        logger.info(message, len(kept), len(split), config.k, config.raw_ndcg_below)
    return split.take(kept.tolist())
