"""From a recipe to the frozen half of the environment: task, retriever, format, scorer. Needs no model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import retrievers
import rewards
from rec_r1 import tasks
from rec_r1.config import Recipe, UserError, cache_folder
from rec_r1.prompts import Format
from rec_r1.scoring import Scorer
from rec_r1.tasks import Task
from retrievers import Retriever

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Environment:
    task: Task
    retriever: Retriever
    format: Format
    scorer: Scorer


def open_environment(recipe: Recipe, transcript: Path | None = None) -> Environment:
    """Load the task, open (or build) the index, and put the Scorer together.

    Raises UserError for what the recipe or the data has wrong, RetrieverError for a broken index.
    """
    format_ = Format(recipe.format)
    with _main_process_first():
        task = tasks.load(recipe.task)
    retriever = open_retriever(recipe, task)
    if recipe.task.candidates:
        task = tasks.with_candidates(task, retriever, recipe.task.candidates)
    if recipe.format.examples:
        task, format_ = tasks.with_examples(task, format_, recipe.format.examples)
    for place, given in (("history", task.train.histories), ("candidates", task.train.candidates)):
        if f"{{{place}" in format_.template and not given:
            fix = "set task.candidates" if place == "candidates" else "take a sequential task, or another prompt"
            raise UserError(f"format.prompt asks for {{{place}}}, and task {task.name} has none: {fix}")
    trained_on = rewards.from_spec(recipe.rewards)
    watched = [m for m in recipe.evaluation.metrics if m not in trained_on.names]
    scorer = Scorer(
        format_.parse,
        retriever,
        trained_on,
        metrics=rewards.from_spec(dict.fromkeys(watched, 1.0)) if watched else None,
        transcript=transcript,
        catalog=task.catalog,
        hits=recipe.evaluation.transcript_hits,
        max_error_rate=recipe.retriever.max_error_rate,
        error_steps=recipe.retriever.error_steps,
        floor=recipe.format.floor,
    )
    return Environment(task, retriever, format_, scorer)


def index_folder(recipe: Recipe, task: Task) -> Path:
    """Where the recipe's index lies: as it says, or in the cache under a name made of all that shapes it."""
    if recipe.retriever.index:
        return Path(recipe.retriever.index)
    config = recipe.retriever
    parts = [config.kind, config.params, task.catalog.fingerprint, retrievers.format_of(config.kind)]
    shape = json.dumps(parts, sort_keys=True)
    key = hashlib.sha256(shape.encode()).hexdigest()[:16]
    kind = recipe.retriever.kind.rpartition(".")[2]
    return cache_folder() / "indexes" / f"{task.name}-{kind}-{key}"


def open_retriever(recipe: Recipe, task: Task) -> Retriever:
    """The recipe's retriever in its cache, built by the first process of a node if it is not there yet."""
    config, memory = recipe.retriever, recipe.retriever.cache
    with _main_process_first():
        try:
            retriever = retrievers.open(config.kind, task.catalog, index_folder(recipe, task), **config.params)
            if memory.memory_mb or memory.disk:
                n = len(task.catalog)
                return retrievers.Cache(retriever, n, memory.memory_mb, memory.disk, memory.disk_mb)
            return retriever
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error


def _main_process_first() -> contextlib.AbstractContextManager[None]:
    """Under `accelerate launch` with several processes, one builds and the others open; else nothing."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return contextlib.nullcontext()
    from accelerate import PartialState

    return PartialState().local_main_process_first()
