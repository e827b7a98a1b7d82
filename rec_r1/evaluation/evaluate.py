"""Evaluate policies on held-out queries, with the same Scorer as in training, and compare them with the raw query.

A policy's completions are stored in the run's folder (see records.py), and are scored again where a metric is added.
The policy writes new completions only if its weights, the prompts or its sampling have changed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rewards
from rec_r1 import config, runs
from rec_r1.config import Recipe, UserError
from rec_r1.environment import Environment, metric_names, open_environment
from rec_r1.evaluation import budget, compare, records, trained_queries
from rec_r1.evaluation.answers import answered
from rec_r1.evaluation.records import System
from rec_r1.generation import sampling_of
from rec_r1.prompts import Action
from rec_r1.scoring import Scored, Scorer
from rec_r1.scoring.grounding import list_ranks
from rec_r1.tasks import Split, pad, prompts
from retrievers.text.analysis import words
from rewards import Outcome

logger = logging.getLogger(__name__)


def _send_raw(completion: str, query: str) -> Action:
    return Action(query, "")


def score_raw(split: Split, scorer: Scorer) -> Scored:
    """Score the Q raw queries of a split with the retriever and the rewards of a scorer.

    Raises RetrieverError where the retriever fails for any query.
    """
    raw = Scorer(_send_raw, scorer.retriever, scorer.rewards, scorer.metrics)
    return raw.score_split(split.queries, split).whole()


def metric_scorer(scorer: Scorer, metrics: Sequence[str]) -> Scorer:
    """``scorer`` with metrics in place of the training rewards."""
    wanted = rewards.from_spec(dict.fromkeys(metrics, 1.0))
    return Scorer(
        scorer.parse,
        scorer.retriever,
        wanted,
        floor=scorer.floor,
        grounder=scorer.grounder,
        exclude_history=scorer.exclude_history,
    )


def validation_split(recipe: Recipe, env: Environment) -> Split:
    """The validation queries that choose policies and prompts: all, or the first `evaluation.validation_limit`."""
    limit, split = recipe.evaluation.validation_limit, env.task.validation
    return split if limit is None else split.take(range(min(limit, len(split))))


def score_lists(lists: Sequence[Sequence[int]], split: Split, scorer: Scorer) -> Scored:
    """Score rankings that no retriever made, such as that by popularity.

    lists: Q lists of catalogue rows, best first.
    split: the Q queries.
    scorer: its rewards are computed.
    """
    targets, grades = pad(split.rows, split.grades)
    ranks = np.stack([list_ranks(rows, t) for rows, t in zip(lists, targets, strict=True)])
    actions: list[Action | None] = [Action("", "") for _ in lists]
    nothing = [""] * len(lists)
    outcome = Outcome(nothing, actions, ranks, grades, words, queries=split.queries, written=nothing)
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
    """Average the scores over the samples of each query.

    scored: Q x ``samples`` scored completions. Those of a query follow each other.
    samples: how many completions each query has.

    Returns Q scored completions: the first sample of each query, with the mean rewards and metrics.
    """
    first = slice(None, None, samples)
    o = scored.outcome
    outcome = Outcome(o.completions[first], o.actions[first], o.ranks[first], o.grades[first], words)
    components = {name: v.reshape(-1, samples).mean(axis=1) for name, v in scored.components.items()}
    total = scored.rewards.reshape(-1, samples).mean(axis=1)
    failed, lists, asked = scored.failed[first], scored.lists[first], scored.asked[first]
    return Scored(outcome, scored.actions[first], components, total, failed, lists, asked, scored.retrieval)


def score_answers(answers: Sequence[str], split: Split, scorer: Scorer, samples: int = 1) -> Scored:
    """Score the completions of a split, and average over the samples of each query.

    answers: Q x ``samples`` completions. Those of a query follow each other.
    split: the Q queries.
    scorer: scores the completions.
    samples: how many completions each query has.

    Raises RetrieverError where the retriever fails for any completion.
    """
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
    metrics: names of further metrics, which are added to the recipe's and to those of earlier evaluations.
    samples: 1 = greedy completions. More = so many completions per query, sampled as in training, whose mean scores are
        stored beside those of the greedy completions.
    against: folders of other runs of the same task and retriever, whose trained policies are compared, too.

    Returns the content of `evaluation/SPLIT/comparison.json`, see :func:`rec_r1.evaluation.compare.compare`. Stored
    completions are scored again, and not written again. Raises UserError for a folder that is no run or has no trained
    policy, for an unknown metric, for a number of samples below 1, and for another run that has no evaluation of the
    same queries with the same judgments and retriever.
    """
    folder, others = runs.check_run(Path(run)), [Path(other) for other in against]
    for metric in metrics:
        check_metric("--metrics", metric)
    if samples < 1:
        raise UserError(f"--samples must be at least 1, got {samples}")
    env = open_environment(config.load(folder / config.RUN_FILE))
    check_against(others, split, env)  # A mistake must be reported before the policies write.
    trained_queries.warn(folder, split, env)
    return evaluate_run(folder, split, metrics, env, samples, others)


def check_metric(option: str, name: str) -> None:
    """Raise UserError, naming the option, for a name that is no metric of a ranking."""
    try:
        beside_raw = rewards.from_spec({name: 1.0}).reads_raw
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error
    if beside_raw:
        raise UserError(
            f"{option}: {name} is a reward that compares with the raw query, which tables do for every metric: name a "
            "metric, such as ndcg@10"
        )


def evaluate_run(
    folder: Path,
    split_name: str = "test",
    metrics: Sequence[str] | None = None,
    env: Environment | None = None,
    samples: int = 1,
    against: Sequence[Path] = (),
) -> dict[str, Any]:
    """Evaluate the raw query, the untrained policy and the run's best checkpoint on one split, and compare all systems.

    folder: the run's folder.
    split_name: test, validation or train.
    metrics: names of further metrics, which are added to the recipe's and to those of earlier evaluations.
    env: the run's environment. None = it is opened.
    samples: 1 = greedy completions. More = so many sampled completions per query, stored under a name of their own.
    against: the folders of other runs, whose trained policies are compared, too.

    Writes the files of `evaluation/SPLIT/` (see records.py and compare.py), and returns the comparison. Raises
    UserError where the folder has no trained policy.
    """
    # The folder may have been moved since the training, so completions are searched in its present place.
    recipe = dataclasses.replace(config.load(folder / "config.yaml"), output_dir=str(folder))
    best = runs.best_policy(folder)
    env = env or open_environment(recipe)
    split = env.task.splits[split_name]
    wanted = all_metrics(folder, recipe, split_name, metrics or ())
    scorer = metric_scorer(env.scorer, wanted)
    source = runs.model_source(folder, recipe)
    asked = prompts(split, env.task.catalog, env.format)
    sampling = sampling_of(recipe, samples)
    save_raw(folder, split_name, env, split, scorer)
    trained_at = runs.step_of(folder, best)
    for policy, weights, what, step in (
        ("untrained", None, recipe.model.name, None),
        (compare.TRAINED, best, f"{best.relative_to(folder)}, step {trained_at}", trained_at),
    ):
        answers = answered(recipe, source, weights, asked, f"{policy} policy, {split_name}", sampling)
        scored = score_answers(answers.texts, split, scorer, samples)
        before = budget.of_run(folder) if weights else budget.Used()
        used = dataclasses.replace(before, completions=samples, query_seconds=answers.query_seconds)
        name = records.sampled_name(policy, samples)
        what = f"{what}, {sampling.description}"
        about = ("policy", what, None, answers.identity, answers.texts, step)
        records.save(folder, split_name, env, split, scored, name, *about, used=used)
    where = str(best.relative_to(folder))
    return compare_folder(folder, recipe, env, split_name, wanted, against, where)


def all_metrics(folder: Path, recipe: Recipe, split_name: str, more: Sequence[str] = ()) -> list[str]:
    """The metrics of an evaluation: the recipe's, those of the stored systems, and ``more``, without repeats."""
    stored = [m for s in records.load_all(folder, split_name).values() for row in s.rows[:1] for m in row["metrics"]]
    return list(dict.fromkeys([*recipe.evaluation.metrics, *filter(_can_be_made, stored), *more]))


def _can_be_made(metric: str) -> bool:
    """Whether a metric can be made from its name. A user's own metric cannot: its stored name lacks the module."""
    try:
        return list(rewards.from_spec({metric: 1.0}).names) == [metric]
    except ValueError:
        return False


def save_raw(folder: Path, split_name: str, env: Environment, split: Split, scorer: Scorer) -> System:
    """Score the raw queries of a split, and store them as a system, together with the split's judgments.

    Every evaluation begins with it. Raises RetrieverError where the retriever fails.
    """
    scored = score_raw(split, scorer)
    records.save_qrels(folder, split_name, env, split)
    about = ("query", "the query as it is, no model")
    return records.save(folder, split_name, env, split, scored, compare.RAW, *about, used=budget.Used(completions=0))


def eval_command(folder: Path, split_name: str) -> str:
    """The command that evaluates a run on a split, for messages."""
    return f"rec-r1 eval {folder}" + (f" --split {split_name}" if split_name != "test" else "")


def check_against(others: Sequence[Path], split_name: str, env: Environment) -> dict[str, System]:
    """The trained policies of other runs, for a comparison.

    others: the folders of the runs.
    split_name: the name of the split.
    env: the environment of the run that they are compared with.

    Returns name in the comparison -> system. Raises UserError where a run has no evaluation of its best policy on the
    split, and where it was evaluated on other queries, with other judgments or with another retriever.
    """
    split, found = env.task.splits[split_name], {}
    for name, other in zip(runs.names(others), others, strict=True):
        command = eval_command(other, split_name)
        theirs = of_best_policy(other, split_name).get(compare.TRAINED)
        if theirs is None:
            raise UserError(
                f"--against {other}: no evaluation of its best policy on its {split_name} split: run {command} first"
            )
        if [row["query_id"] for row in theirs.rows] != list(split.ids):
            raise UserError(
                f"--against {other}: it was evaluated on other queries: compare runs of one task "
                "with the same evaluation.test_limit"
            )
        if theirs.belongs_to != records.belongs_to(env, split):
            raise UserError(
                f"--against {other}: it was evaluated with other queries, other judgments or another retriever: "
                f"compare runs of one task and retriever, and if it is one, run {command} again"
            )
        found[f"{compare.TRAINED} of {name}"] = theirs
    return found


def compare_folder(
    folder: Path,
    recipe: Recipe,
    env: Environment,
    split_name: str,
    metrics: Sequence[str],
    against: Sequence[Path] = (),
    policy: str | None = None,
) -> dict[str, Any]:
    """Compare all stored systems of a split with each other, and with the trained policies of other runs.

    A system that lacks a metric is scored from its stored answers. Policies with several samples per query are compared
    apart, with each other and the raw query, so that they do not change the correction of the other tests.

    folder: the folder of the run or of a baseline.
    recipe: its recipe. Its first metric chooses the mismatch slice.
    env: its environment.
    split_name: the name of the split.
    metrics: the names of the metrics, from `all_metrics`. Those of the recipe come first in any case.
    against: the folders of the other runs.
    policy: the description of the trained policy, which is written, too.

    Writes comparison.json, and returns its content. "sampled" in it has one comparison for each number of samples.
    Raises UserError as :func:`check_against`.
    """
    split = env.task.splits[split_name]
    found = of_best_policy(folder, split_name, records.belongs_to(env, split))
    wanted = list(dict.fromkeys([*recipe.evaluation.metrics, *metrics]))
    names = metric_names(wanted)
    found = {name: _completed(folder, split_name, env, split, system, wanted) for name, system in found.items()}
    order = [compare.TRAINED, compare.RAW, "untrained"]
    places = {n: order.index(n) if n in order else len(order) + (system.samples > 1) for n, system in found.items()}
    found = {name: found[name] for name in sorted(found, key=lambda n: (places[n], n))}
    counts = sorted({system.samples for system in found.values()} - {1})
    found |= check_against(against, split_name, env)
    below = recipe.evaluation.mismatch_below
    result = compare.compare(found, names, below)
    result["sampled"] = [compare.compare_samples(found, names, below, samples) for samples in counts]
    about = {"task": env.task.name, "retriever": recipe.retriever.kind, "policy": policy}
    return compare.write(folder, split_name, found, result, about)


def of_best_policy(folder: Path, split_name: str, expected: str | None = None) -> dict[str, System]:
    """The stored systems of a run, without the trained policy's completions of another step than the best policy's.

    All completions of a policy in one comparison, greedy or sampled, must come from the same weights. The log warns of
    those that are left out. Where the weights were deleted to save disk space, nothing is left out. The arguments and
    errors are those of `records.load_all`.
    """
    found = records.load_all(folder, split_name, expected)
    stored = {name: system for name, system in found.items() if system.step is not None}
    best = runs.find_policy(folder) if stored else None
    if best is None:
        return found
    step = runs.step_of(folder, best)
    old = {name: system for name, system in stored.items() if system.step != step}
    for name, system in old.items():
        again = eval_command(folder, split_name) + (f" --samples {system.samples}" if system.samples > 1 else "")
        logger.warning(
            "%s: left out, because its completions are of step %s, and the best policy is of step %s: run %s",
            name, system.step, step, again,
        )  # fmt: skip
    return {name: system for name, system in found.items() if name not in old}


def _completed(
    folder: Path, split_name: str, env: Environment, split: Split, system: System, metrics: Sequence[str]
) -> System:
    """``system`` with all of ``metrics``. Missing ones are computed from its stored answers, and stored."""
    missing = [m for m in metric_names(metrics) if m not in system.rows[0]["metrics"]] if system.rows else []
    if not missing:
        return system
    scorer = metric_scorer(env.scorer, metrics)
    if system.kind == "list":
        kept = records.read_lists(folder, split_name, env, split, system.name)
        shallow = [m for m in missing if not records.deep_enough(kept, m)]
        if shallow:
            logger.warning(
                "%s: its stored lists are too short for %s: run the baseline again", system.name, ", ".join(shallow)
            )
        missing = [m for m in missing if m not in shallow]
        scored = score_lists(kept, split, scorer)
    elif system.kind == "query":
        sent = [row["completion"] for row in system.rows]
        scored = score_raw(dataclasses.replace(split, queries=sent), scorer)
    else:
        scored = score_answers(records.answers_in(system), split, scorer, system.samples)
    return records.add_metrics(folder, split_name, system, {m: scored.components[m] for m in missing})


def below_untrained(folder: Path) -> str:
    """A sentence that says that the best checkpoint is below the policy that GRPO began with, or "" where it is not.

    Both were evaluated on validation queries during the training.
    """
    record = folder / "best.json"
    if not record.is_file():
        return ""
    best = runs.best_record(folder)
    rows: list[Mapping[str, Any]] = [row for row in runs.read_metrics(folder) if row.get("step") == 0]
    key = f"eval/{best['metric']}"
    before = next((row[key] for row in rows if key in row and not row.get("retrieval/held_out_error_rate")), None)
    if before is None or best["value"] >= before:
        return ""
    first = "the warm start's" if config.load(folder / config.RUN_FILE).warm_start.samples else "the untrained policy's"
    return (
        f"On validation the best checkpoint (step {best['step']}) has {best['metric']} {best['value']:.4f}, which is "
        f"below {first} {before:.4f}."
    )
