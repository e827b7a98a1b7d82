"""Open everything of a recipe but its model: the task, the retriever, the format and the Scorer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import retrievers
import rewards
from rec_r1 import tasks
from rec_r1.config import Recipe, UserError, cache_folder, refuse
from rec_r1.config.redaction import from_environment, settled
from rec_r1.environment.structured import schema_of, unserved
from rec_r1.prompts import GROUNDED_ACTIONS, Format
from rec_r1.runs import processes
from rec_r1.scoring import Scorer
from rec_r1.tasks import Task
from retrievers import Interactions, Judgments, Retriever
from retrievers.encoders.files import models_tuned_on

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Environment:
    """The parts of a run that training does not change."""

    task: Task  # The splits and the catalogue.
    retriever: Retriever  # Ranks the catalogue.
    format: Format  # Makes prompts, and parses completions.
    scorer: Scorer  # Turns completions into rewards.
    reads_text: bool  # Whether the retriever reads the text of a query. Some read only its history.
    fitted_on: set[str]  # The fingerprints of the interactions or judgments that the retriever was fitted on.


def open_environment(recipe: Recipe, transcript: Path | None = None, trains: bool = False) -> Environment:
    """Load the task, open or build the index, and make the Scorer. No model is loaded.

        env = open_environment(rec_r1.load_recipe("quickstart"))
        env.retriever.search([retrievers.Query("lecturer")], 5).rows

    recipe: the recipe.
    transcript: a JSONL file to which the Scorer appends one row per completion. None = no transcript.
    trains: whether a policy is to be trained. A retriever that would be fitted on the targets of the training prompts,
        or whose encoder was, is then refused before its index is built, which may take long.

    Raises UserError for a mistake in the recipe or the data, and RetrieverError for a broken index.
    """
    format_ = Format(recipe.format)
    refuse(unserved(recipe))  # Before the data are read and the index is built, which may take long.
    task = processes.first_on_each_machine(lambda: load_task(recipe), "read the data of the task")
    if recipe.evaluation.test_limit is not None:
        first = range(min(recipe.evaluation.test_limit, len(task.test)))
        task = dataclasses.replace(task, test=task.test.take(first))
    if trains:
        if retrievers.fit_data(recipe.retriever.kind, recipe.retriever.params):
            _refuse_known_targets(recipe, task)
        _refuse_other_data(recipe, task, models_tuned_on(recipe.retriever.params))
    backend = open_backend(recipe, task)
    retriever = wrap(recipe, backend, task)
    if recipe.format.action == "structured":
        format_ = dataclasses.replace(format_, schema=schema_of(recipe, retriever))
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
        causes=format_.cause if recipe.format.action == "structured" else None,
    )
    knows = retrievers.reads_text(backend), retrievers.fitted_on(backend)
    return Environment(task, retriever, format_, scorer, *knows)


def load_task(recipe: Recipe) -> Task:
    """The recipe's task. The settings of its retrievers are checked first, because reading data may take minutes.

    Raises UserError for a mistake in these settings, in the settings of the task, or in its data.
    """
    refuse(retriever_problems(recipe))
    return tasks.load(recipe.task)


def retriever_sections(recipe: Recipe) -> list[tuple[str, str, dict[str, Any]]]:
    """The name, the kind and the parameters of each section that names a retriever and is read."""
    sections = [("retriever", recipe.retriever.kind, recipe.retriever.params)]
    if recipe.grounding.kind is not None and recipe.format.action in GROUNDED_ACTIONS:
        sections.append(("grounding", recipe.grounding.kind, recipe.grounding.params))
    return sections


def retriever_problems(recipe: Recipe) -> list[str]:
    """One line for each parameter that the retriever of the recipe, or that of its grounding, refuses.

    Raises UserError for an environment variable that is not set.
    """
    found = []
    for section, kind, params in retriever_sections(recipe):
        try:
            retrievers.check_parameters(kind, _with_secrets(section, kind, params))
        except (ValueError, TypeError) as error:
            found += [line.replace("retriever.", f"{section}.", 1) for line in retrievers.problems_of(error)]
    return found


def _with_secrets(section: str, kind: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a retriever with the secrets that `$NAME` stands for. Raises UserError where one is not set."""
    found: dict[str, Any] = from_environment({"kind": kind, "params": dict(params)}, UserError, section)["params"]
    return found


def rewards_of(recipe: Recipe) -> rewards.WeightedSum:
    """The rewards that the recipe trains on. Secrets in their parameters are read from the environment.

    Raises UserError for an environment variable that is not set, and for a parameter that a reward refuses.
    """
    try:
        return rewards.from_spec(from_environment(recipe.rewards, UserError, "rewards"))
    except ValueError as error:
        raise UserError(f"rewards: {error}") from error


def metric_names(metrics: Sequence[str]) -> list[str]:
    """The names under which scores of ``metrics`` are kept: a metric of the user's own goes by its `__name__`, without
    its module. Raises ValueError for what is no metric."""
    return list(rewards.from_spec(dict.fromkeys(metrics, 1.0)).names)


def check_trainable(recipe: Recipe, env: Environment) -> None:
    """Raise UserError for a retriever whose rewards would be useless.

    That is a retriever that does not read what the model writes, so that all completions earn the same, and one that
    was fitted on the targets of the training prompts, so that it already knows them.
    """
    kind = recipe.retriever.kind
    if not env.reads_text and recipe.format.action in ("replace", "expand"):
        raise UserError(
            f"retriever.kind: {kind!r} reads histories, and not what the model writes, so every completion would earn "
            f"the same: set retriever.kind=propagate retriever.params='{{backend: {{kind: {kind}}}}}', or "
            "format.action=edit"
        )
    _refuse_other_data(recipe, env.task, env.fitted_on)


def _refuse_other_data(recipe: Recipe, task: Task, fitted_on: set[str]) -> None:
    """Raise UserError where the retriever was fitted on something else than the task sets apart.

    fitted_on: the fingerprints of what it was fitted on.
    """
    given = fit_data(task)
    if fitted_on - {data.fingerprint for data in given.values()}:  # A server loads its own task.
        what = " or ".join(given) or "interactions"
        raise UserError(
            f"retriever.kind: {recipe.retriever.kind!r} was fitted on other {what} than those of this recipe's task: "
            "start rec-r1 serve with the same task settings, including fit_share; where retriever.params.model is an "
            "encoder that was tuned before, tune it with them, too, or see tuned_on.json in retrievers/README.md"
        )
    if fitted_on:
        _refuse_known_targets(recipe, task)


def _refuse_known_targets(recipe: Recipe, task: Task) -> None:
    """Raise UserError where what retrievers are fitted on has targets of the training prompts."""
    if not task.set_apart:
        instead = "earlier interactions only" if task.interactions is not None else "queries that no prompt has"
        raise UserError(
            f"task.params.fit_share: 0: {recipe.retriever.kind} was fitted on the targets of the training prompts: set "
            f"task.params.fit_share=0.5, so that it is fitted on {instead}"
        )


def fit_data(task: Task) -> dict[str, Interactions | Judgments]:
    """What retrievers are fitted on in a task, by the name that `retrievers.fit_data` has for it."""
    found: dict[str, Interactions | Judgments | None] = {
        "interactions": task.interactions,
        "judgments": task.judgments,
    }
    return {name: data for name, data in found.items() if data is not None}


def _grounder(recipe: Recipe, task: Task, backend: Retriever) -> Retriever | None:
    """The retriever of the section `grounding`. None = the recipe's own. Raises UserError where that finds no title."""
    kind = recipe.grounding.kind
    if kind is None:
        # A fitted retriever returns items that go with a title, and not the item that has this title.
        if recipe.format.action in ("items", "edit") and retrievers.fitted_on(backend):
            raise UserError(
                f"grounding.kind: not set, and {recipe.retriever.kind} does not look titles up: set grounding.kind=bm25"
            )
        return None
    config = dataclasses.replace(recipe.retriever, kind=kind, params=recipe.grounding.params, index=None)
    grounder = open_backend(dataclasses.replace(recipe, retriever=config), task)
    if retrievers.fitted_on(grounder):
        raise UserError(f"grounding.kind: {kind} is fitted on {task.name}, so it does not look titles up: set bm25")
    return grounder


def index_folder(recipe: Recipe, task: Task) -> Path:
    """The folder of the recipe's index: `retriever.index`, or :func:`cached_index`."""
    if recipe.retriever.index:
        return Path(recipe.retriever.index)
    return cached_index(task, recipe.retriever.kind, recipe.retriever.params)


def cached_index(task: Task, kind: str, params: Mapping[str, Any]) -> Path:
    """The folder in the cache that holds the index of a backend.

    Its name is a hash of everything that the index depends on. So an index is built once: a recipe whose retriever is
    the backend shares it with a recipe whose retriever opens the backend, as `hybrid` does.

    Raises UserError for a kind or a parameter that does not exist.
    """
    without_secrets = settled({"kind": kind, "params": dict(params)})["params"]
    parts = [kind, without_secrets, task.catalog.fingerprint, retrievers.format_of(kind)]
    try:
        wanted = retrievers.fit_data(kind, params)
        parts += [data.fingerprint for name, data in fit_data(task).items() if name in wanted]
        parts += retrievers.content_hashes(kind, params)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    shape = json.dumps(parts, sort_keys=True, default=str)  # A program may give a date.
    key = hashlib.sha256(shape.encode()).hexdigest()[:16]
    return cache_folder() / "indexes" / f"{task.name}-{kind.rpartition('.')[2]}-{key}"


def index_folders(recipe: Recipe, task: Task) -> list[Path]:
    """The existing folders of the recipe's index and of the indexes of its inner backends.

    Raises UserError for a kind or a parameter that does not exist.
    """
    config = recipe.retriever
    folders = [index_folder(recipe, task)]
    if not config.index:  # A folder that the user names holds the inner indexes, too.
        params = _with_secrets("retriever", config.kind, config.params)
        try:
            inner = retrievers.index_backends(config.kind, params)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        folders += [cached_index(task, kind, given) for kind, given in inner]
    return [folder for folder in dict.fromkeys(folders) if folder.exists()]


def open_retriever(recipe: Recipe, task: Task) -> Retriever:
    """The recipe's retriever as the Scorer uses it: with the cache, and without the history's items where
    `excludes_history` says so. Raises UserError and RetrieverError."""
    return wrap(recipe, open_backend(recipe, task), task)


def open_backend(recipe: Recipe, task: Task) -> Retriever:
    """The recipe's retriever without a cache. The first process of a machine builds its index if there is none.

    Raises UserError for a wrong kind or parameter, and RetrieverError for a broken index.
    """
    config = recipe.retriever
    folder = index_folder(recipe, task)
    params = _with_secrets("retriever", config.kind, config.params)
    # A folder that the user names holds the inner indexes, too.
    inner = None if config.index else partial(cached_index, task)

    def opened() -> Retriever:
        try:
            data = task.interactions, inner, task.judgments
            return retrievers.open(config.kind, task.catalog, folder, *data, **params)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error

    return processes.first_on_each_machine(opened, f"open the index of {config.kind}, or build it")


def excludes_history(recipe: Recipe, task: Task) -> bool:
    """Whether rankings and lists leave out the items of a query's history.

    It is `retriever.exclude_history`, or the task's own setting where that is None.
    """
    given = recipe.retriever.exclude_history
    return task.excludes_history if given is None else given


def leave_out_history(recipe: Recipe, retriever: Retriever, task: Task) -> Retriever:
    """``retriever``, which leaves out the items of a query's history where `excludes_history` says so."""
    return retrievers.Unseen(retriever, len(task.catalog)) if excludes_history(recipe, task) else retriever


def wrap(recipe: Recipe, retriever: Retriever, task: Task) -> Retriever:
    """``retriever`` with the recipe's cache, and without the history's items where `excludes_history` says so."""
    memory, n = recipe.retriever.cache, len(task.catalog)
    retriever = leave_out_history(recipe, retriever, task)
    if memory.memory_mb or memory.disk:
        try:
            return retrievers.Cache(retriever, n, memory.memory_mb, memory.disk, memory.disk_mb)
        except ValueError as error:
            raise UserError(str(error)) from error
    return retriever


def build_index(recipe: Recipe) -> list[str]:
    """Build the recipe's index, or open it if it exists.

    Returns lines that describe the index. Raises UserError for a mistake in the recipe or the data, and RetrieverError
    for a broken index.
    """
    task = load_task(recipe)
    before = index_folders(recipe, task)
    started = time.monotonic()
    retriever = open_retriever(recipe, task)
    folders = index_folders(recipe, task)
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    done = "was there already" if folders == before else f"built in {time.monotonic() - started:.1f} s"
    where = f"{done}, {size / 1e6:.2f} MB, {', '.join(map(str, folders))}" if folders else "ready, on its server"
    return [
        f"{recipe.retriever.kind} over {len(task.catalog):,} documents: {where}",
        f"fingerprint {retriever.fingerprint}",
    ]


def fit(recipe: Recipe) -> list[str]:
    """Fit the recipe's retriever on the task's interactions or judgments.

    Returns lines that describe the fit. Raises UserError for a retriever that is not fitted, and the errors of
    :func:`build_index`.
    """
    task = load_task(recipe)
    retriever = open_backend(recipe, task)
    found = list(retrievers.fits(retriever))
    if not found:
        raise UserError(
            f"retriever.kind: {recipe.retriever.kind} is not fitted on interactions: rec-r1 index builds it"
        )
    if task.set_apart:
        apart = "set apart from the training prompts"
    else:
        apart = "all of training (fit_share=0: not for rewards)"
    if task.interactions is not None:
        counted = f"{len(task.interactions.rows):,} choices of {len(task.interactions):,} users"
    else:
        assert task.judgments is not None
        relevant = sum(map(len, task.judgments.rows))
        counted = f"{len(task.judgments):,} training queries with {relevant:,} relevant documents"
    return [
        f"{task.name}: {counted}, {apart}",
        *(f"{kind:<12} {json.dumps(report, ensure_ascii=False)}" for kind, report in found),
        f"fingerprint {retriever.fingerprint}",
        *(f"in {folder}" for folder in index_folders(recipe, task)),
    ]
