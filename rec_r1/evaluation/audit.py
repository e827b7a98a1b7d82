"""Audit a run: does something without a model earn what the trained policy earns, and does the policy copy or stuff?

The adversaries are those of adversaries.py. They are scored with the run's own retriever, format and rewards, beside
the stored completions of its policies.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rec_r1 import config, runs
from rec_r1.config import Recipe, UserError
from rec_r1.config.redaction import redact_text
from rec_r1.console import progress
from rec_r1.environment import Environment, metric_names, open_environment, open_retriever
from rec_r1.evaluation import compare, records, trained_queries
from rec_r1.evaluation.adversaries import adversaries
from rec_r1.evaluation.audit_text import verdict
from rec_r1.evaluation.completion_words import cut, definition, described, floor_of
from rec_r1.evaluation.evaluate import eval_command, evaluate_run, metric_scorer, of_best_policy, score_raw
from rec_r1.evaluation.significance import bootstrap, holm, randomisation
from rec_r1.evaluation.transfer import with_retriever
from rec_r1.runs import rollouts, write_atomically
from rec_r1.scoring import Scored
from rec_r1.tasks import Split
from rec_r1.tasks.example_words import CatalogWords
from retrievers import Retriever
from retrievers.text.analysis import words
from rewards import StuffingPenalty

logger = logging.getLogger(__name__)
UNTRAINED, CUT = "untrained", "trained, cut to the untrained length"
# k1 and b of the other BM25, which needs no download: Anserini's defaults, or Lucene's where the run has Anserini's.
OTHER_BM25: tuple[dict[str, float], ...] = ({"k1": 0.9, "b": 0.4}, {"k1": 1.2, "b": 0.75})


@dataclasses.dataclass(frozen=True)
class _Audit:
    """What all measurements of an audit read."""

    recipe: Recipe
    env: Environment
    split: Split  # The Q queries.
    metric: str  # The name of the first held-out metric.
    floor: StuffingPenalty
    known: CatalogWords


def audit(
    run: Path, split_name: str = "validation", queries: int | None = None, retriever: str | None = None
) -> dict[str, Any]:
    """Score adversaries that need no model beside the policies of a run, and describe what the policies write.

    run: the run's folder.
    split_name: train, validation or test. If its policies have not answered the split yet, they do so first, as in
        `rec-r1 eval`; otherwise no model is loaded.
    queries: only the first so many queries of the split are used. None = all.
    retriever: the other retriever on which the gain is measured, such as "bm25" or "dense {model: NAME}". None =
        bm25, with k1 and b of OTHER_BM25 where the run has bm25, too.

    Writes `evaluation/audit.json` of the run atomically, and returns its content: "systems" and "comparisons" (the
    table), "completions" (statistics of completion_words.py), "equal_length" and "retention" (None where the action is
    no plain query), "verdict" (sentences). Raises UserError for a folder that is no run or has no trained policy, a
    number of queries below 1, a retriever that is the run's own or cannot be opened, and one for an action that is no
    plain query.
    """
    folder = runs.check_run(run)
    if queries is not None and queries < 1:
        raise UserError(f"--queries must be at least 1, got {queries}")
    # The folder may have been moved since the training.
    recipe = dataclasses.replace(config.load(folder / config.RUN_FILE), output_dir=str(folder))
    runs.best_policy(folder)
    is_query = recipe.format.action in ("replace", "expand")
    if retriever is not None and not is_query:
        raise UserError(
            f"--retriever: the run writes no plain queries (format.action={recipe.format.action}): leave it out"
        )
    spec, other = _other_retriever(recipe, retriever)
    records.check_writable(folder / "evaluation", "RUN")
    logger.info("auditing %s on its %s queries: adversaries without a model beside its policies", folder, split_name)
    env = open_environment(recipe)
    # It is opened before the policies answer, because its settings may be wrong.
    elsewhere = (spec, open_retriever(other, env.task)) if is_query else None
    if elsewhere is not None and elsewhere[1].fingerprint == env.retriever.fingerprint:
        raise UserError(
            f"--retriever {spec}: it ranks exactly like the run's own retriever ({recipe.retriever.kind}): give other "
            "parameters, or another kind"
        )
    trained_queries.warn(folder, split_name, env)
    stored = _policies(folder, split_name, env)
    whole = env.task.splits[split_name]
    split = whole.take(range(min(queries or len(whole), len(whole))))
    (metric,) = metric_names(recipe.evaluation.metrics[:1])
    opened = _Audit(recipe, env, split, metric, floor_of(recipe), CatalogWords(env.task.catalog))
    answers = {name: stored[name][: len(split)] for name in (compare.TRAINED, UNTRAINED)}
    result = {
        "part": split_name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "queries": len(split),
        "metric": metric,
        "definition": definition(opened.floor),
        **_measured(opened, answers, elsewhere),
    }
    result["completions"] += _rollouts(opened, folder)
    result["verdict"] = verdict(result)
    text = json.dumps(compare.without_nan(result), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "evaluation" / "audit.json", text)
    return result


def _other_retriever(recipe: Recipe, spec: str | None) -> tuple[str, Recipe]:
    """The other retriever as the user wrote it, and a recipe that has it."""
    own = recipe.retriever
    if spec is None and own.kind == "bm25":
        changed = next(given for given in OTHER_BM25 if {**own.params, **given} != own.params)
        other = dataclasses.replace(own, params={**own.params, **changed}, index=None)
        shown = ", ".join(f"{key}: {value:g}" for key, value in changed.items())
        return f"bm25 {{{shown}}}", dataclasses.replace(recipe, retriever=other)
    spec = spec or "bm25"
    other_recipe = with_retriever(recipe, spec, "--retriever")
    if (other_recipe.retriever.kind, other_recipe.retriever.params) == (own.kind, own.params):
        fix = f"give other parameters, such as '{own.kind} {{key: value}}', or another kind"
        raise UserError(f"--retriever {redact_text(spec)}: it is the run's own retriever: {fix}")
    return redact_text(spec), other_recipe


def _policies(folder: Path, split_name: str, env: Environment) -> dict[str, list[str]]:
    """The completions of the trained and of the untrained policy to a split. They are written where none are stored."""

    def stored() -> dict[str, list[str]]:
        kept = of_best_policy(folder, split_name, records.belongs_to(env, env.task.splits[split_name]))
        return {name: records.answers_in(kept[name]) for name in (compare.TRAINED, UNTRAINED) if name in kept}

    found = stored()
    if len(found) < 2:
        logger.info(
            "the completions of both policies are not stored yet: they are generated now, as by %s",
            eval_command(folder, split_name),
        )
        evaluate_run(folder, split_name, env=env)
        found = stored()
    return found


def _measured(
    opened: _Audit, answers: Mapping[str, list[str]], elsewhere: tuple[str, Retriever] | None
) -> dict[str, Any]:
    """The table, the statistics of the policies, and the gain at equal length and on another retriever.

    answers: the Q completions of the trained and of the untrained policy.
    elsewhere: the other retriever with its name. None = the action is no plain query, so there is no such gain.
    """
    env, split = opened.env, opened.split
    scored = {name: env.scorer.score_split(own, split).whole() for name, own in answers.items()}
    completions = [
        {"of": name, **described(scored[name].actions, split.queries, opened.known, opened.floor)}
        for name in (UNTRAINED, compare.TRAINED)
    ]
    if elsewhere is not None:
        lengths = [0 if a is None else len(words(a.written)) for a in scored[UNTRAINED].actions]
        shorter = cut(env, scored[compare.TRAINED].actions, lengths, answers[compare.TRAINED])
        scored[CUT] = env.scorer.score_split(shorter, split).whole()
    scored[compare.RAW] = score_raw(split, env.scorer)
    written = adversaries(opened.recipe, env, split, opened.known)
    for name, own in progress(written.items(), "adversaries", "adversaries", len(written)):
        scored[name] = env.scorer.score_split(own, split).whole()
    return {
        "systems": [_row(opened, name, one, name in written) for name, one in scored.items()],
        "comparisons": _comparisons(opened, scored, list(written)),
        "completions": completions,
        "equal_length": _equal_length(opened, scored) if elsewhere is not None else None,
        "retention": _retention(opened, answers, scored, *elsewhere) if elsewhere is not None else None,
    }


def _row(opened: _Audit, name: str, scored: Scored, is_adversary: bool) -> dict[str, Any]:
    """A row of the table: the means of a system with their intervals."""
    users = records.users_of(opened.split)
    pairs = [
        (words("" if action is None else action.written), words(query), action is not None and bool(action.text))
        for action, query in zip(scored.actions, opened.split.queries, strict=True)
    ]
    values = {
        "reward": scored.rewards,
        "metric": scored.components[opened.metric],
        "words": np.array([len(written) for written, _, _ in pairs]),
    }
    shown = {key: bootstrap(np.asarray(v, np.float64), groups=users) for key, v in values.items()}
    stuffing = [opened.floor.of(written, query) if sent else 0.0 for written, query, sent in pairs]
    return {"system": name, "adversary": is_adversary, **shown, "stuffing": float(np.mean(stuffing))}


def _difference(opened: _Audit, values: np.ndarray) -> dict[str, float]:
    """The mean of (Q,) differences with its interval, and the p of the paired test."""
    users = records.users_of(opened.split)
    found = bootstrap(values, groups=users)
    p = randomisation(values, groups=users)
    return {"difference": found["mean"], "low": found["low"], "high": found["high"], "p": p}


def _comparisons(opened: _Audit, scored: Mapping[str, Scored], others: Sequence[str]) -> list[dict[str, Any]]:
    """The difference of the trained policy's reward from that of each adversary, corrected by Holm over all of them."""
    trained = scored[compare.TRAINED].rewards.astype(np.float64)
    found: list[dict[str, Any]] = [
        {"against": name, **_difference(opened, trained - scored[name].rewards)} for name in others
    ]
    for comparison, corrected in zip(found, holm([c["p"] for c in found]), strict=True):
        comparison["p_holm"] = corrected
    return found


def _gain(opened: _Audit, after: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """The gain in the first held-out metric. after, before: (Q,) values of two systems."""
    found = _difference(opened, after.astype(np.float64) - before)
    return {**found, "p_holm": found["p"]}  # It is one comparison, so there is nothing to correct.


def _equal_length(opened: _Audit, scored: Mapping[str, Scored]) -> dict[str, Any]:
    """The gain over the untrained policy as it is, and with completions cut to the untrained policy's lengths."""
    values = {name: scored[name].components[opened.metric] for name in (compare.TRAINED, UNTRAINED, CUT)}
    return {
        "whole": _gain(opened, values[compare.TRAINED], values[UNTRAINED]),
        "cut": _gain(opened, values[CUT], values[UNTRAINED]),
    }


def _retention(
    opened: _Audit, answers: Mapping[str, list[str]], scored: Mapping[str, Scored], name: str, retriever: Retriever
) -> dict[str, Any]:
    """The gain over the untrained policy on the run's own retriever and on another one."""
    scorer = metric_scorer(opened.env.scorer, opened.recipe.evaluation.metrics[:1])
    scorer.retriever = retriever
    there = {
        name: scorer.score_split(own, opened.split).whole().components[opened.metric] for name, own in answers.items()
    }
    own = [scored[name].components[opened.metric] for name in (compare.TRAINED, UNTRAINED)]
    return {
        "retriever": name,
        "own": _gain(opened, *own),
        "other": _gain(opened, there[compare.TRAINED], there[UNTRAINED]),
    }


def _rollouts(opened: _Audit, folder: Path) -> list[dict[str, Any]]:
    """The statistics of the first and of the last step that were recorded, or nothing where none was."""
    of_step: dict[int, list[dict[str, Any]]] = {}
    for path in rollouts.files(folder):
        for row, _ in rollouts.rows(path):
            if isinstance(step := row.get("step"), int):
                of_step.setdefault(step, []).append(row)
                for between in sorted(of_step)[1:-1]:
                    del of_step[between]
    found = []
    for step, own in sorted(of_step.items()):
        queries = [row["query"] for row in own]
        actions = [opened.env.format.parse(row["completion"], row["query"]) for row in own]
        found.append({"of": f"rollouts, step {step}", **described(actions, queries, opened.known, opened.floor)})
    return found
