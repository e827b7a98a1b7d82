"""Held-out evaluation: answers through the same Scorer as training, beside the raw query.

What a policy wrote once is kept with the run (records.py) and scored again where a metric is added: the policy writes
again only where its weights, the prompts or the way it writes have changed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rewards
from rec_r1 import config, generation, runs
from rec_r1.config import Recipe, UserError
from rec_r1.environment import Environment, open_environment
from rec_r1.evaluation import compare, records
from rec_r1.evaluation.records import System
from rec_r1.generation import Sampling, sampling_of
from rec_r1.prompts import Action, Prompt
from rec_r1.scoring import Scored, Scorer
from rec_r1.scoring.grounding import list_ranks
from rec_r1.tasks import Split, pad, prompts
from retrievers.text.analysis import words
from rewards import Outcome

logger = logging.getLogger(__name__)


def _send_raw(completion: str, query: str) -> Action:
    return Action(query, "")


def score_raw(split: Split, scorer: Scorer) -> Scored:
    """The raw queries themselves, through the scorer's retriever and rewards. Raises RetrieverError where the
    retriever fails for any."""
    raw = Scorer(_send_raw, scorer.retriever, scorer.rewards, scorer.metrics)
    return raw.score_split(split.queries, split).whole()


def metric_scorer(scorer: Scorer, metrics: Sequence[str]) -> Scorer:
    """``scorer`` with the evaluation's metrics in place of the training rewards."""
    wanted = rewards.from_spec(dict.fromkeys(metrics, 1.0))
    return Scorer(
        scorer.parse,
        scorer.retriever,
        wanted,
        floor=scorer.floor,
        grounder=scorer.grounder,
        exclude_history=scorer.exclude_history,
    )


def score_lists(lists: Sequence[Sequence[int]], split: Split, scorer: Scorer) -> Scored:
    """Rankings that were made without a retriever (popularity, say), by the scorer's rewards. lists: Q of rows."""
    targets, grades = pad(split.rows, split.grades)
    ranks = np.stack([list_ranks(rows, t) for rows, t in zip(lists, targets, strict=True)])
    actions: list[Action | None] = [Action("", "") for _ in lists]
    outcome = Outcome([""] * len(lists), actions, ranks, grades, words)
    components = scorer.rewards.components(outcome)
    failed = np.zeros(len(lists), bool)
    return Scored(
        outcome,
        actions,
        components,
        scorer.rewards.combine(components),
        failed,
        [list(r) for r in lists],
        [None] * len(lists),
        {},
    )


def mean_of_samples(scored: Scored, samples: int) -> Scored:
    """Q x ``samples`` scored completions -> Q: the mean of every metric, and the first sample's words."""
    first = slice(None, None, samples)
    o = scored.outcome
    outcome = Outcome(o.completions[first], o.actions[first], o.ranks[first], o.grades[first], words)
    components = {name: v.reshape(-1, samples).mean(axis=1) for name, v in scored.components.items()}
    total = scored.rewards.reshape(-1, samples).mean(axis=1)
    failed, lists, asked = scored.failed[first], scored.lists[first], scored.asked[first]
    return Scored(outcome, scored.actions[first], components, total, failed, lists, asked, scored.retrieval)


def answered(
    recipe: Recipe,
    source: str,
    weights: Path | None,
    asked: Sequence[Prompt],
    progress: str,
    sampling: Sampling | None = None,
) -> tuple[list[str], str]:
    """What `generation.answer` returns, taken from the run's folder where the same policy answered the same prompts in
    the same way before; and the identity to keep them under."""
    sampling = sampling or sampling_of(recipe)
    identity = generation.identity(recipe, source, weights, asked, sampling)
    kept = records.answers_of(Path(recipe.output_dir), identity)
    if kept is not None:
        logger.info("%s: reusing stored answers; no model is loaded", progress)
        return kept, identity
    return generation.answer(recipe, source, weights, asked, progress, sampling), identity


def score_answers(answers: Sequence[str], split: Split, scorer: Scorer, samples: int = 1) -> Scored:
    """Score ``samples`` answers a query, those of a query one after the other. Raises RetrieverError where the
    retriever fails for any."""
    repeated = split.take([q for q in range(len(split)) for _ in range(samples)]) if samples > 1 else split
    scored = scorer.score_split(answers, repeated).whole()
    return mean_of_samples(scored, samples) if samples > 1 else scored


def evaluate(
    run: str | Path,
    split: str = "test",
    metrics: Sequence[str] = (),
    samples: int = 1,
    against: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Let a run's best policy and the untrained policy answer held-out queries, and compare them with the raw query.

        result = evaluate("runs/quickstart", metrics=["mrr@10"])

    run: the folder of a training.
    split: test, validation or train.
    metrics: names of further metrics, added to the recipe's and to those of earlier evaluations.
    samples: 1 = greedy answers; more = the mean of so many a query, drawn as in training, beside the greedy ones.
    against: folders of other runs of the task, whose trained policies are compared, too.

    Returns what it writes to `evaluation/SPLIT/comparison.json`. Answers that are there already are scored again and
    not written again. Raises UserError for a folder that is no run or holds no trained policy, and for a metric,
    number or run that cannot be.
    """
    folder, others = runs.check_run(Path(run)), [Path(other) for other in against]
    for metric in metrics:
        check_metric("--metrics", metric)
    if samples < 1:
        raise UserError(f"--samples must be at least 1, got {samples}")
    recipe = config.load(folder / config.RUN_FILE)
    env = open_environment(recipe)
    check_against(others, split, env.task.splits[split])  # before the policies write anything
    result = evaluate_run(folder, split, metrics, env, samples)
    if not others:
        return result
    return compare_folder(folder, recipe, env, split, result["metrics"], others, result["policy"])


def check_metric(option: str, name: str) -> None:
    """Raise UserError, naming the option, for a name that is no metric of a ranking."""
    try:
        beside_raw = rewards.from_spec({name: 1.0}).reads_raw
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error
    if beside_raw:
        raise UserError(f"{option}: {name} is a reward; tables compare with the raw query anyway: name a metric")


def evaluate_run(
    folder: Path,
    part: str = "test",
    metrics: Sequence[str] | None = None,
    env: Environment | None = None,
    samples: int = 1,
) -> dict[str, Any]:
    """Evaluate the raw query, the untrained policy and the run's best checkpoint on one split, and compare all systems.

    Greedily, or the mean of ``samples`` drawn as in training, which is kept beside the greedy answers under names of
    its own. metrics: further ones, added to the recipe's and to those of earlier evaluations. Writes
    `evaluation/PART/`, see records.py and compare.py. env: the run's environment where it is open already. Returns the
    comparison. Raises UserError where the folder holds no trained policy.
    """
    # The folder may have been moved since: answers are looked up where it lies now.
    recipe = dataclasses.replace(config.load(folder / "config.yaml"), output_dir=str(folder))
    best = runs.best_policy(folder)
    env = env or open_environment(recipe)
    split = env.task.splits[part]
    scorer = metric_scorer(env.scorer, all_metrics(folder, recipe, part, metrics or ()))
    source = runs.model_source(folder, recipe)
    asked = prompts(split, env.task.catalog, env.format)
    sampling = sampling_of(recipe, samples)
    save_raw(folder, part, env, split, scorer)
    trained_at = runs.step_of(folder, best)
    for policy, weights, what, step in (
        ("untrained", None, recipe.model.name, None),
        (compare.TRAINED, best, f"{best.relative_to(folder)}, step {trained_at}", trained_at),
    ):
        answers, identity = answered(recipe, source, weights, asked, f"{policy} policy, {part}", sampling)
        scored = score_answers(answers, split, scorer, samples)
        name = records.sampled_name(policy, samples)
        what = f"{what}, {sampling.description}"
        records.save(folder, part, env, split, scored, name, "policy", what, None, identity, answers, step)
    where = str(best.relative_to(folder))
    return compare_folder(folder, recipe, env, part, scorer.rewards.names, policy=where)


def all_metrics(folder: Path, recipe: Recipe, part: str, more: Sequence[str] = ()) -> list[str]:
    """The recipe's metrics first, then those that the part's systems were scored by before, then ``more``."""
    stored = [m for s in records.load_all(folder, part).values() for row in s.rows[:1] for m in row["metrics"]]
    return list(dict.fromkeys([*recipe.evaluation.metrics, *filter(_can_be_made, stored), *more]))


def _can_be_made(metric: str) -> bool:
    """Whether the metric can be rebuilt from its name alone; a user-defined one is stored under its function name,
    without its module."""
    try:
        return list(rewards.from_spec({metric: 1.0}).names) == [metric]
    except ValueError:
        return False


def save_raw(folder: Path, part: str, env: Environment, split: Split, scorer: Scorer) -> System:
    scored = score_raw(split, scorer)
    return records.save(folder, part, env, split, scored, compare.RAW, "query", "the query as it is, no model")


def how_to(folder: Path, part: str) -> str:
    """The command that evaluates a run's part."""
    return f"rec-r1 eval {folder}" + (f" --split {part}" if part != "test" else "")


def check_against(others: Sequence[Path], part: str, split: Split) -> dict[str, System]:
    """The trained policies of other runs, by the names that a comparison calls them. A command asks before it lets
    policies write. Raises UserError where a run has no evaluation of the part, or one of other queries."""
    found = {}
    for name, other in zip(runs.names(others), others, strict=True):
        theirs = records.load_all(other, part).get(compare.TRAINED)
        if theirs is None:
            raise UserError(f"--against {other}: no evaluation of its {part} split: run {how_to(other, part)} first")
        if [row["query_id"] for row in theirs.rows] != list(split.ids):
            raise UserError(f"--against {other}: it was evaluated on other queries: compare runs of one task")
        found[f"{compare.TRAINED} of {name}"] = theirs
    return found


def compare_folder(
    folder: Path,
    recipe: Recipe,
    env: Environment,
    part: str,
    metrics: Sequence[str],
    against: Sequence[Path] = (),
    policy: str | None = None,
) -> dict[str, Any]:
    """Compare all systems of a folder's part, and the trained policies of other runs; writes comparison.json.

    The recipe's metrics come first whatever ``metrics`` adds, and its first decides the mismatch slice. A system that
    lacks one is scored by it from its stored answers. Policies that answered with samples are compared among
    themselves and with the raw query, one result for each number of samples in "sampled": they leave the tests of the
    others as they are. Raises UserError where another run has no evaluation of the part, or one of other queries.
    """
    split = env.task.splits[part]
    found = _of_best_policy(folder, part, records.load_all(folder, part, records.belongs_to(env, split)))
    scorer = metric_scorer(env.scorer, all_metrics(folder, recipe, part, metrics))
    names = list(scorer.rewards.names)
    found = {name: _completed(folder, part, env, split, system, scorer) for name, system in found.items()}
    order = [compare.TRAINED, compare.RAW, "untrained"]
    places = {n: order.index(n) if n in order else len(order) + (system.samples > 1) for n, system in found.items()}
    found = {name: found[name] for name in sorted(found, key=lambda n: (places[n], n))}
    counts = sorted({system.samples for system in found.values()} - {1})
    found |= check_against(against, part, split)
    below = recipe.evaluation.mismatch_below
    result = compare.compare(found, names, below)
    result["sampled"] = [compare.compare_samples(found, names, below, samples) for samples in counts]
    about = {"task": env.task.name, "retriever": recipe.retriever.kind, "policy": policy}
    compare.write(folder, part, found, result, about)
    return {**result, **about}


def _of_best_policy(folder: Path, part: str, found: Mapping[str, System]) -> dict[str, System]:
    """``found`` without answers of the run's policy from another step than its best policy's, with a warning: greedy
    and sampled answers of one comparison come from the same weights."""
    stored = {name: system for name, system in found.items() if system.step is not None}
    step = runs.step_of(folder, runs.best_policy(folder)) if stored else None
    old = {name: system for name, system in stored.items() if system.step != step}
    for name, system in old.items():
        again = how_to(folder, part) + (f" --samples {system.samples}" if system.samples > 1 else "")
        logger.warning(
            "%s: its answers are those of step %s, and the best policy is of step %s: left out; %s answers again",
            name, system.step, step, again,
        )  # fmt: skip
    return {name: system for name, system in found.items() if name not in old}


def _completed(folder: Path, part: str, env: Environment, split: Split, system: System, scorer: Scorer) -> System:
    """``system`` with all metrics of ``scorer``: those it lacks are computed from its stored answers, and stored."""
    missing = [m for m in scorer.rewards.names if m not in system.rows[0]["metrics"]] if system.rows else []
    if not missing:
        return system
    if system.kind == "list":
        kept = records.read_lists(folder, part, env, split, system.name)
        shallow = [m for m in missing if not records.deep_enough(kept, m)]
        if shallow:
            logger.warning("%s: its stored lists are too short for %s: make it again", system.name, ", ".join(shallow))
        missing = [m for m in missing if m not in shallow]
        scored = score_lists(kept, split, scorer)
    elif system.kind == "query":
        sent = [row["completion"] for row in system.rows]
        scored = score_raw(dataclasses.replace(split, queries=sent), scorer)
    else:
        scored = score_answers(records.answers_in(system), split, scorer, system.samples)
    return records.add_metrics(folder, part, system, {m: scored.components[m] for m in missing})


def below_untrained(folder: Path) -> str:
    """A sentence where the run's best checkpoint is below the untrained policy on validation, by the evaluations while
    training; else ""."""
    record = folder / "best.json"
    if not record.is_file():
        return ""
    best = runs.best_record(folder)
    rows: list[Mapping[str, Any]] = [row for row in runs.read_metrics(folder) if row.get("step") == 0]
    key = f"eval/{best['metric']}"
    before = next((row[key] for row in rows if key in row and not row.get("retrieval/held_out_error_rate")), None)
    if before is None or best["value"] >= before:
        return ""
    return (
        f"On validation the best checkpoint (step {best['step']}) has {best['metric']} {best['value']:.4f}, which is "
        f"below the untrained policy's {before:.4f}."
    )
