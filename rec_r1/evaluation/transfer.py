"""Evaluate policies on other retrievers than they were trained on, from their stored completions, without a model."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rec_r1 import config, runs
from rec_r1.config import Recipe, UserError
from rec_r1.config.redaction import redact, redact_text
from rec_r1.config.yaml_text import parse
from rec_r1.environment import (
    Environment,
    excludes_history,
    index_folder,
    metric_names,
    open_environment,
    open_retriever,
)
from rec_r1.environment.structured import check_covers
from rec_r1.evaluation import compare, evaluate, records
from rec_r1.evaluation.evaluate import check_metric, metric_scorer, score_raw
from rec_r1.evaluation.significance import bootstrap, holm, randomisation
from rec_r1.runs import check_run, write_atomically
from rec_r1.scoring import Scorer
from rec_r1.tasks import Split, Task
from retrievers import Retriever

logger = logging.getLogger(__name__)
UNTRAINED = "untrained"


class Run(NamedTuple):
    """A run whose completions are evaluated on other retrievers."""

    name: str  # Its name in the table.
    folder: Path
    recipe: Recipe
    env: Environment
    split: Split  # The Q queries.
    answers: Mapping[str, list[str]]  # "untrained" and "trained", as far as they were evaluated -> Q completions.


def matrix(runs: Sequence[Path], on: Sequence[str], split_name: str, metric: str | None = None) -> dict[str, Any]:
    """Evaluate the policies of several runs, and the raw query, on several retrievers.

    Only the retriever changes. The format, the grounder, the candidates, and whether the history is left out, are those
    of each run.

    runs: the folders of the runs, which are evaluated already.
    on: the retrievers: a kind such as "bm25", or a kind with parameters, "dense {model: intfloat/e5-base-v2}". A kind
        without parameters has those of the runs that were trained on it.
    split_name: the name of the split.
    metric: the metric. None = the first one of the first run.

    Returns `part` (the split), `metric`, `n` (the number of queries), `retrievers` and `cells`. A cell has `system`,
    `retriever`, `mean`, `low` and `high`. That of a policy also has `against_raw`, its difference from the raw query on
    the same retriever, with `p` and `p_holm`, which is corrected over the whole matrix; and that of a trained policy
    has `lift`, its difference from the untrained policy of the same run on the same retriever, where that was
    evaluated. Both differences have mean, low and high. An untrained policy that wrote the same completions in all
    runs, which read them in the same way, has one row.

    Writes `transfer.json` into the evaluation of the first run. Raises UserError where a run has no evaluation of the
    split, the runs have different queries, or a run or a retriever is given twice.
    """
    if metric is not None:
        check_metric("--metric", metric)
    recipes = [config.load(check_run(run) / config.RUN_FILE) for run in runs]
    _refuse_twice("runs", [(str(run), str(run.resolve())) for run in runs])
    _refuse_twice("--on", [(spec, repr(_parsed(spec))) for spec in on])
    wanted = {spec: _retriever_of(recipes, spec) for spec in on}
    opened = _open(runs, recipes, split_name)
    metric = metric or recipes[0].evaluation.metrics[0]
    cells = [cell for spec in on for cell in _column(opened, redact_text(spec), wanted[spec], metric)]
    tested = [cell["against_raw"] for cell in cells if "against_raw" in cell]
    for difference, corrected in zip(tested, holm([each["p"] for each in tested]), strict=True):
        difference["p_holm"] = corrected
    n, shown = len(opened[0].split), [redact_text(spec) for spec in on]
    result = {"part": split_name, "metric": metric, "n": n, "retrievers": shown, "cells": cells}
    folder = records.folder_of(runs[0], split_name)
    write_atomically(folder / "transfer.json", json.dumps(result, indent=1, ensure_ascii=False))
    return result


def _refuse_twice(what: str, given: Sequence[tuple[str, str]]) -> None:
    """Raise UserError where a run or a retriever is given twice. given: pairs (as the user wrote it, its meaning)."""
    seen: set[str] = set()
    for written, meaning in given:
        if meaning in seen:
            raise UserError(f"{what}: {written} is given twice: give it once")
        seen.add(meaning)


def _retriever_of(recipes: Sequence[Recipe], spec: str) -> Recipe:
    """A recipe with the retriever of ``spec``, for one column of the matrix.

    A kind without parameters has those of the runs that were trained on it. Raises UserError where these differ,
    because one column must have one retriever.
    """
    own = [r for r in recipes if with_retriever(r, spec) is r]
    for other in own[1:]:
        if other.retriever.params != own[0].retriever.params:
            raise UserError(
                f"--on {spec}: the runs were trained on {_shown(own[0])} and on {_shown(other)}: write out the "
                f"parameters, such as {spec} {{key: value}}"
            )
    return with_retriever(own[0] if own else recipes[0], spec)


def _shown(recipe: Recipe) -> dict[str, Any]:
    """The parameters of the recipe's retriever, without secrets."""
    found: dict[str, Any] = redact({"kind": recipe.retriever.kind, "params": recipe.retriever.params})["params"]
    return found


def _open(folders: Sequence[Path], recipes: Sequence[Recipe], split_name: str) -> list[Run]:
    """Open the runs. Raises UserError where one is not evaluated, and where they have different queries."""
    opened: list[Run] = []
    for name, folder, recipe in zip(runs.names(folders), folders, recipes, strict=True):
        kept = evaluate.of_best_policy(folder, split_name)
        if compare.TRAINED not in kept:
            hint = evaluate.eval_command(folder, split_name)
            raise UserError(f"{folder}: no evaluation of its {split_name} split: run {hint} first")
        # Seeds of one recipe share an environment, because an index may be large.
        same = next((run for run in opened if _same_environment(run.recipe, recipe)), None)
        env = same.env if same else open_environment(recipe)
        split = env.task.splits[split_name]
        asked = list(zip(split.ids, split.queries, strict=True))  # A file of queries may have been edited since.
        for system in (UNTRAINED, compare.TRAINED):
            if system in kept and [(row["query_id"], row["query"]) for row in kept[system].rows] != asked:
                raise UserError(
                    f"{folder}: {system} was evaluated on other queries than those of its config.yaml: run "
                    f"{evaluate.eval_command(folder, split_name)} again"
                )
        if opened and _content(env.task, split) != _content(opened[0].env.task, opened[0].split):
            raise UserError(
                f"{folder}: its {split_name} split has other queries, histories or judgments than that of "
                f"{folders[0]}: give runs of one task"
            )
        rows = {system: kept[system].rows for system in (UNTRAINED, compare.TRAINED) if system in kept}
        answers = {system: [row["completion"] for row in found] for system, found in rows.items() if found}
        opened.append(Run(name, folder, recipe, env, split, answers))
    return opened


def _same_environment(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes have the same environment."""
    sections = ("task", "format", "retriever", "grounding", "rewards", "evaluation")
    return all(getattr(one, section) == getattr(other, section) for section in sections)


def _content(task: Task, split: Split) -> tuple[Any, ...]:
    """The catalogue, queries, judgments and histories, for comparing the tasks of two runs.

    Candidates are left out, because they are hits of each run's own retriever.
    """
    lists = (split.rows, split.grades, split.histories)
    return task.catalog.fingerprint, list(split.ids), list(split.queries), *([tuple(x) for x in each] for each in lists)


def _column(opened: Sequence[Run], spec: str, wanted: Recipe, metric: str) -> list[dict[str, Any]]:
    """The cells of one retriever: those of the raw query, then those of each run.

    opened: the runs.
    spec: the retriever as the user wrote it, without secrets.
    wanted: a recipe with the retriever.
    metric: the name of the metric.
    """
    cells: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, bool], tuple[Retriever, np.ndarray]] = {}
    scores: dict[str, np.ndarray] = {}
    users, names = records.users_of(opened[0].split), _names(opened)
    for run in opened:
        recipe = _with(run.recipe, wanted)
        key = str(index_folder(recipe, run.env.task)), excludes_history(recipe, run.env.task)
        if key not in found:
            retriever = open_retriever(recipe, run.env.task)
            raw = _scores(score_raw(run.split, _scorer(run.env, retriever, metric)), metric)
            # A run whose retriever is fitted on other interactions, or leaves out the history, has its own raw query.
            name = compare.RAW if not found else f"{compare.RAW} of {run.name}"
            cells.append({"system": name, "retriever": spec, **bootstrap(raw, groups=users)})
            found[key] = retriever, raw
        retriever, raw = found[key]
        check_covers(recipe, retriever, run.env.format.schema, f"--on {spec}")
        scorer = _scorer(run.env, retriever, metric)
        for system, completions in run.answers.items():
            label = names[run.name, system]
            if label in scores:
                continue  # It is the untrained policy of an earlier run, too.
            scored = scores[label] = _scores(scorer.score_split(completions, run.split).whole(), metric)
            difference = scored - raw
            against = {**bootstrap(difference, groups=users), "p": randomisation(difference, groups=users)}
            row = {"system": label, "retriever": spec, **bootstrap(scored, groups=users), "against_raw": against}
            if system != UNTRAINED and UNTRAINED in run.answers:
                row["lift"] = bootstrap(scored - scores[names[run.name, UNTRAINED]], groups=users)
            rows.append(row)
    return cells + rows


def _names(opened: Sequence[Run]) -> dict[tuple[str, str], str]:
    """The name of each policy in the table, by the name of its run and its system.

    Untrained policies share a row where their completions, and all settings by which these are read, are the same.
    """
    several = len(opened) > 1
    names = {
        (run.name, system): f"{system} on {run.recipe.retriever.kind}" + (f" ({run.name})" if several else "")
        for run in opened
        for system in run.answers
    }
    first = opened[0]
    if several and all(_same_untrained(first, run) for run in opened):
        names |= {(run.name, UNTRAINED): UNTRAINED for run in opened}
    return names


def _same_untrained(one: Run, other: Run) -> bool:
    """Whether the untrained policies of two runs wrote the same completions, which are read in the same way."""
    a, b = one.recipe, other.recipe
    history = excludes_history(a, one.env.task) == excludes_history(b, other.env.task)
    # Titles are grounded by the run's own retriever, unless the recipe names another.
    grounded = (a.format.action in ("replace", "expand") or a.retriever == b.retriever) and a.grounding == b.grounding
    same = history and grounded and a.format == b.format and a.task == b.task
    return same and UNTRAINED in one.answers and one.answers[UNTRAINED] == other.answers.get(UNTRAINED)


def _scores(scored: Any, metric: str) -> np.ndarray:
    (name,) = metric_names([metric])
    return np.asarray(scored.components[name], np.float64)


def _with(recipe: Recipe, wanted: Recipe) -> Recipe:
    """``recipe`` with the kind, parameters and index of the retriever of ``wanted``. All other keys stay."""
    given = wanted.retriever
    changed = dataclasses.replace(recipe.retriever, kind=given.kind, params=given.params, index=given.index)
    return dataclasses.replace(recipe, retriever=changed)


def _scorer(env: Environment, retriever: Retriever, metric: str) -> Scorer:
    """The run's scorer with another retriever, and one metric."""
    made = metric_scorer(env.scorer, [metric])
    # Titles are grounded by the run's own retriever, because the other one may not read text.
    made.grounder = env.scorer.grounder or env.retriever
    made.retriever = retriever
    return made


def _parsed(spec: str, option: str = "--on") -> tuple[str, dict[str, Any]]:
    """The kind and the parameters in an option's value. Raises UserError for parameters that are no YAML mapping."""
    kind, _, text = spec.strip().partition(" ")
    try:
        params = parse(text) if text.strip() else {}
    except ValueError as error:
        raise UserError(
            f"{option} {redact_text(spec)!r}: the parameters are not valid YAML ({error}): write KIND {{key: value}}"
        ) from error
    if not isinstance(params, dict):
        raise UserError(f"{option} {redact_text(spec)!r}: the parameters are no mapping: write KIND {{key: value}}")
    return kind, params


def with_retriever(recipe: Recipe, spec: str, option: str = "--on") -> Recipe:
    """``recipe`` with the retriever of an option.

    recipe: the recipe. It is returned unchanged where the option names the kind of its retriever without parameters.
    spec: the option's value, such as "bm25", or "dense {model: NAME}".
    option: the option, for messages.

    Raises UserError for parameters that are no YAML mapping.
    """
    kind, params = _parsed(spec, option)
    if kind == recipe.retriever.kind and not params:
        return recipe
    return dataclasses.replace(
        recipe, retriever=dataclasses.replace(recipe.retriever, kind=kind, params=params, index=None)
    )
