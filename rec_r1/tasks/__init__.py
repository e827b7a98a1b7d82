"""Tasks: one dataset loader a file, each with `load(config) -> Task`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from rec_r1.config import TaskConfig, TrainFilter, UserError
from rec_r1.config.redaction import from_environment
from rec_r1.tasks.example_words import telling_examples
from rec_r1.tasks.integrity import check_documents, sound
from rec_r1.tasks.types import Split, Task, make_split, pad, prompts, raw_scores, to_dataset
from retrievers import Catalog, Retriever
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
    """The module of the task that a recipe names, with `load(config) -> Task`.

    Raises UserError for an unknown one, naming the nearest, and for a setting that one of TASKS does not read; a module
    of the user's own may read all of them.
    """
    dotted = "." in config.name and not config.name.startswith(".")
    if config.name not in TASKS and not dotted and (config.name[:1] in ("", ".") or find_spec(config.name) is None):
        nearest = difflib.get_close_matches(config.name, TASKS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"task.name: unknown {config.name!r}: did you mean {nearest!r}? Choose from {', '.join(TASKS)}, or "
            "give the path of a module of yours"
        )
    try:
        module = importlib.import_module(TASKS.get(config.name, config.name))
    except Exception as error:  # a module of the user's own may raise anything
        said = " ".join(str(error).split())
        raise UserError(f"task.name: cannot import {config.name!r} ({said}): check the path and PYTHONPATH") from error
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
    """Load the task that a recipe names. Raises what :func:`find` raises, and UserError for bad data."""
    params = from_environment(config.params, UserError, "task.params")
    task = find(config).load(dataclasses.replace(config, params=params))
    if not isinstance(task, Task):
        raise UserError(f"task.name: {config.name!r}: its load(config) returned {type(task).__name__}, not a Task")
    for part, split in task.splits.items():
        if not len(split):
            raise UserError(f"task {task.name}: the {part} split is empty: it needs at least one query")
    if task.folder is not None:  # it was checked before it was stored
        return task
    check_documents(f"task {task.name}", task.catalog)
    return sound(task)


def with_candidates(task: Task, retriever: Retriever, n: int) -> Task:
    """``task`` with the raw query's first ``n`` hits as every query's candidates, in that order.

    Training queries none of whose relevant documents is among them are dropped: no order of them earns anything.
    Held-out queries all stay, and score what they score, which is 0 where nothing is found. Raises UserError where no
    training query is left.
    """
    splits: dict[str, Any] = {}
    for part, without in task.splits.items():
        split = add_candidates(without, retriever, n)
        kept = [q for q, found in enumerate(split.candidates) if part != "train" or set(found) & set(split.rows[q])]
        if not kept:
            raise UserError(f"task.candidates: no {part} query finds a relevant document among its first {n}: raise it")
        if part == "train":
            logger.info("%d of %d training queries have a relevant candidate", len(kept), len(split))
        splits[part] = split.take(kept)
    return dataclasses.replace(task, **splits)


def add_candidates(split: Split, retriever: Retriever, n: int) -> Split:
    """``split`` with the raw query's first ``n`` hits as every query's candidates, in that order."""
    rows = retriever.search(split.raw(), n).rows
    return dataclasses.replace(split, candidates=[tuple(int(row) for row in found if row >= 0) for found in rows])


def without_seen(task: Task) -> Task:
    """``task`` whose candidates leave out the items of their query's history, so that the numbers in a prompt are those
    of the candidates that rankings are made of."""
    splits: dict[str, Any] = {
        part: dataclasses.replace(split, candidates=list(map(_unseen, split.candidates, split.histories)))
        for part, split in task.splits.items()
        if split.candidates and split.histories
    }
    return dataclasses.replace(task, **splits)


def _unseen(candidates: Sequence[int], history: Sequence[int]) -> tuple[int, ...]:
    seen = set(history)
    return tuple(row for row in candidates if row not in seen)


def examples(split: Split, catalog: Catalog, format_: Format, count: int) -> tuple[list[int], Format]:
    """``count`` queries spread over ``split``, and the format whose prompts begin with them.

    Each is answered with the title of its best relevant document, a list of items with the titles of all of them. With
    `format.example_words` it is answered with words that its relevant documents share. Raises UserError for rankings.
    """
    number = format_.config.example_words
    if number:
        shared = telling_examples(split, catalog, count, number)
        places = sorted(shared)
    else:
        shared = {}
        places = sorted(set(np.linspace(0, len(split) - 1, min(count, len(split)), dtype=int).tolist()))
    chosen = split.take(places)
    bare = dataclasses.replace(format_, examples=())
    answers = []
    for place, rows, grades in zip(places, chosen.rows, chosen.grades, strict=True):
        best = sorted(zip(rows, grades, strict=True), key=lambda pair: -pair[1])
        titles = [format_.cut(catalog.titles[row]) for row, _ in best]
        if shared.get(place):
            titles = [", ".join(shared[place])]
        answers.append(bare.write(titles if format_.config.action == "items" else titles[:1], EXAMPLE_THOUGHT))
    shown = tuple(zip(prompts(chosen, catalog, bare), answers, strict=True))
    return places, dataclasses.replace(format_, examples=shown)


def with_examples(task: Task, format_: Format, count: int) -> tuple[Task, Format]:
    """The format whose prompts begin with ``count`` training queries, and the task without these: a prompt must not
    show its own answer. Raises UserError where nothing is left to train on."""
    places, format_ = examples(task.train, task.catalog, format_, count)
    rest = sorted(set(range(len(task.train))) - set(places))
    if not rest:
        raise UserError(f"format.examples: {count} of {len(task.train)} training queries leave none to train on")
    return dataclasses.replace(task, train=task.train.take(rest)), format_


def keep_headroom(split: Split, retriever: Retriever, config: TrainFilter) -> Split:
    """Training queries whose raw query scores ndcg@k below the filter: where a rewrite has something to gain.

    A query that the retriever already answers can mostly be hurt, and those gradients pull hardest. Raises
    UserError where nothing is left.
    """
    raw = raw_scores(split, retriever, RankingReward("ndcg", config.k))
    kept = np.flatnonzero(raw < config.raw_ndcg_below)
    if not len(kept):
        raise UserError(
            f"task.train_filter.raw_ndcg_below: {config.raw_ndcg_below} leaves no training query (the lowest raw "
            f"ndcg@{config.k} is {raw.min():.3f}): raise it"
        )
    logger.info(
        "%d of %d training queries have a raw ndcg@%d below %s",
        len(kept),
        len(split),
        config.k,
        config.raw_ndcg_below,
    )
    return split.take(kept.tolist())
