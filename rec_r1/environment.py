"""From a recipe to the frozen half of the environment: task, retriever, format, scorer. Needs no model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import retrievers
import rewards
from rec_r1 import tasks
from rec_r1.config import Recipe, UserError, cache_folder
from rec_r1.config.redaction import from_environment, settled
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
    reads_text: bool  # whether what a policy writes reaches the retriever
    fitted_on: set[str]  # fingerprints of the interactions that the retriever was fitted on


def open_environment(recipe: Recipe, transcript: Path | None = None) -> Environment:
    """Load the task, open (or build) the index, and put the Scorer together.

    Raises UserError for what the recipe or the data has wrong, RetrieverError for a broken index.
    """
    format_ = Format(recipe.format)
    with _main_process_first():
        task = tasks.load(recipe.task)
    if recipe.evaluation.test_limit is not None:
        first = range(min(recipe.evaluation.test_limit, len(task.test)))
        task = dataclasses.replace(task, test=task.test.take(first))
    backend = open_backend(recipe, task)
    retriever = wrap(recipe, backend, task)
    if recipe.task.candidates:
        task = tasks.with_candidates(task, retriever, recipe.task.candidates)
    elif excludes_history(recipe, task):
        task = tasks.without_seen(task)
    if recipe.format.examples:
        task, format_ = tasks.with_examples(task, format_, recipe.format.examples)
    for place, given in (("history", task.train.histories), ("candidates", task.train.candidates)):
        if f"{{{place}" in format_.template and not given:
            fix = "set task.candidates" if place == "candidates" else "take a sequential task, or another prompt"
            raise UserError(f"format.prompt asks for {{{place}}}, and task {task.name} has none: {fix}")
    trained_on = rewards_of(recipe)
    metrics = recipe.evaluation.metrics
    watched = [m for m, name in zip(metrics, metric_names(metrics), strict=True) if name not in trained_on.names]
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
        grounder=_grounder(recipe, task, backend),
        exclude_history=excludes_history(recipe, task),
    )
    knows = retrievers.reads_text(backend), retrievers.fitted_on(backend)
    return Environment(task, retriever, format_, scorer, *knows)


def rewards_of(recipe: Recipe) -> rewards.WeightedSum:
    """The rewards that the recipe trains on, with the secrets that their parameters name. Raises UserError for a
    variable that is not set, or a value that a reward refuses."""
    try:
        return rewards.from_spec(from_environment(recipe.rewards, UserError, "rewards"))
    except ValueError as error:
        raise UserError(f"rewards: {error}") from error


def metric_names(metrics: Sequence[str]) -> list[str]:
    """The names under which scores of ``metrics`` are kept: a metric of the user's own goes by its `__name__`, without
    its module. Raises ValueError for what is no metric."""
    return list(rewards.from_spec(dict.fromkeys(metrics, 1.0)).names)


def check_trainable(recipe: Recipe, env: Environment) -> None:
    """Refuse what would run and teach nothing, or teach what no user has. Raises UserError."""
    kind = recipe.retriever.kind
    if not env.reads_text and recipe.format.action in ("replace", "expand"):
        raise UserError(
            f"retriever.kind: {kind!r} reads histories, not what the model writes: every answer would earn the same: "
            f"set retriever.kind=propagate retriever.params='{{backend: {{kind: {kind}}}}}', or format.action=edit"
        )
    given = env.task.interactions
    if env.fitted_on - ({given.fingerprint} if given is not None else set()):  # behind a server, which has its own task
        raise UserError(
            f"retriever.kind: {kind!r} was fitted on other choices than this recipe's task gives for that: start "
            "rec-r1 serve with the same task settings, fit_share included"
        )
    if env.fitted_on and not env.task.set_apart:
        raise UserError(
            f"task.params.fit_share: 0: {kind} was fitted on the very choices that the training prompts ask for: set "
            "task.params.fit_share=0.5, so that it knows only what came before"
        )


def _grounder(recipe: Recipe, task: Task, backend: Retriever) -> Retriever | None:
    """What titles are grounded by, where the recipe says so. Raises UserError where nothing looks them up."""
    kind = recipe.grounding.kind
    if kind is None:
        # What was fitted on interactions, in any part, answers a title with what goes with it.
        if recipe.format.action in ("items", "edit") and retrievers.fitted_on(backend):
            raise UserError(
                f"grounding.kind: not set, and {recipe.retriever.kind} does not look titles up: set grounding.kind=bm25"
            )
        return None
    config = dataclasses.replace(recipe.retriever, kind=kind, params=recipe.grounding.params, index=None)
    return open_backend(dataclasses.replace(recipe, retriever=config), task)


def index_folder(recipe: Recipe, task: Task) -> Path:
    """Where the recipe's index lies: as it says, or in the cache under a name made of all that shapes it."""
    if recipe.retriever.index:
        return Path(recipe.retriever.index)
    config = recipe.retriever
    parts = [config.kind, settled(config.params), task.catalog.fingerprint, retrievers.format_of(config.kind)]
    if task.interactions is not None and is_fitted(recipe):
        parts.append(task.interactions.fingerprint)
    shape = json.dumps(parts, sort_keys=True)
    key = hashlib.sha256(shape.encode()).hexdigest()[:16]
    kind = recipe.retriever.kind.rpartition(".")[2]
    return cache_folder() / "indexes" / f"{task.name}-{kind}-{key}"


def is_fitted(recipe: Recipe) -> bool:
    """Whether the recipe's retriever, or a part of it, is fitted on interactions. Raises UserError for one that does
    not exist."""
    try:
        return retrievers.takes_interactions(recipe.retriever.kind, recipe.retriever.params)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def open_retriever(recipe: Recipe, task: Task) -> Retriever:
    """The recipe's retriever as a Scorer asks it: `excludes_history` says whether without the history's items."""
    return wrap(recipe, open_backend(recipe, task), task)


def open_backend(recipe: Recipe, task: Task) -> Retriever:
    """The bare backend, built by the first process of a node if it is not there yet."""
    config = recipe.retriever
    with _main_process_first():
        try:
            folder = index_folder(recipe, task)
            params = from_environment(config.params, UserError, "retriever.params")
            return retrievers.open(config.kind, task.catalog, folder, task.interactions, **params)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error


def excludes_history(recipe: Recipe, task: Task) -> bool:
    """Whether rankings and lists leave out the items of a query's history: as the task says, unless the recipe does."""
    given = recipe.retriever.exclude_history
    return task.excludes_history if given is None else given


def leave_out_history(recipe: Recipe, retriever: Retriever, task: Task) -> Retriever:
    """``retriever``, without the items of a query's history where `excludes_history` says so."""
    return retrievers.Unseen(retriever, len(task.catalog)) if excludes_history(recipe, task) else retriever


def wrap(recipe: Recipe, retriever: Retriever, task: Task) -> Retriever:
    """``retriever`` behind what the task and the recipe put around it."""
    memory, n = recipe.retriever.cache, len(task.catalog)
    retriever = leave_out_history(recipe, retriever, task)
    if memory.memory_mb or memory.disk:
        try:
            return retrievers.Cache(retriever, n, memory.memory_mb, memory.disk, memory.disk_mb)
        except ValueError as error:
            raise UserError(str(error)) from error
    return retriever


def _main_process_first() -> contextlib.AbstractContextManager[None]:
    """Under `accelerate launch` with several processes, one builds and the others open; else nothing."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return contextlib.nullcontext()
    from accelerate import PartialState

    return PartialState().local_main_process_first()


def build_index(recipe: Recipe) -> list[str]:
    """Build the recipe's index, or open it where it is there already; what there is now, one fact a line.

    Raises UserError for a recipe or data that are wrong, RetrieverError for a folder that holds something broken.
    """
    task = tasks.load(recipe.task)
    folder = index_folder(recipe, task)
    there = folder.exists()
    started = time.monotonic()
    retriever = open_retriever(recipe, task)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    done = "was there already" if there else f"built in {time.monotonic() - started:.1f} s"
    where = f"{done}, {size / 1e6:.2f} MB, {folder}" if folder.exists() else "ready, on its server"
    return [
        f"{recipe.retriever.kind} over {len(task.catalog):,} documents: {where}",
        f"fingerprint {retriever.fingerprint}",
    ]


def fit(recipe: Recipe) -> list[str]:
    """Fit the recipe's history backend on the task's interactions; what the fit found, one fact a line.

    Raises UserError for a backend that is not fitted on interactions, and as :func:`build_index`.
    """
    task = tasks.load(recipe.task)
    retriever = open_backend(recipe, task)
    found = list(retrievers.fits(retriever))
    if not found:
        raise UserError(
            f"retriever.kind: {recipe.retriever.kind} is not fitted on interactions: rec-r1 index builds it"
        )
    given = task.interactions
    assert given is not None
    if task.set_apart:
        apart = "set apart from the training prompts"
    else:
        apart = "all of training (fit_share=0: not for rewards)"
    return [
        f"{task.name}: {len(given.rows):,} choices of {len(given):,} users, {apart}",
        *(f"{kind:<12} {json.dumps(report, ensure_ascii=False)}" for kind, report in found),
        f"fingerprint {retriever.fingerprint}",
        f"in {index_folder(recipe, task)}",
    ]


def serve(load: Callable[[], Recipe], host: str, port: int, wait_ms: float) -> None:
    """Serve a recipe's retriever over HTTP until Ctrl-C.

    load: gives the recipe, after the address was checked.
    host, port: the address to bind; off the loopback interface $REC_R1_TOKEN must be set.
    wait_ms: milliseconds for which requests are collected for one call of the retriever.

    Raises UserError for an address that cannot be bound, and for a recipe that names the client.
    """
    from retrievers.serving import server
    from retrievers.serving.client import TOKEN

    token = os.environ.get(TOKEN)
    server.check_installed()
    try:
        server.check_address(host, token)
        recipe = load()
        if recipe.retriever.kind == "remote":
            raise UserError("retriever.kind: remote is the client: name what shall be served, such as bm25")
        task = tasks.load(recipe.task)
        recipe.retriever.exclude_history = False  # the client does that: it alone knows what was seen
        retriever = open_retriever(recipe, task)
        kind, documents = recipe.retriever.kind, len(task.catalog)
        application = server.app(retriever, kind, task.catalog.fingerprint, documents, token, wait_ms=wait_ms)
        shown = f"[{host}]" if ":" in host else host
        what = f"{kind} over {documents:,} documents of {task.name}"
        line = f"{what} at http://{shown}:{port}, fingerprint {retriever.fingerprint[:16]}; Ctrl-C ends it"
        server.serve(application, host, port, token, lambda: print(line, flush=True))  # noqa: T201
    except ValueError as error:
        raise UserError(str(error)) from error
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}: choose another") from error
