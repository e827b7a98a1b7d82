"""Score the recorded rollouts of a run under other rewards or with another retriever. No model is loaded.

Where the recorded ranks suffice, no retriever is opened: a metric of another depth needs ranks and grades only. The
rows are read, scored and dropped in batches, because a long run has gigabytes of them.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import retrievers
import rewards
from rec_r1 import config, runs, tasks
from rec_r1.checks import reward_probe
from rec_r1.checks.rescore_text import sentences
from rec_r1.config import Recipe, UserError, refuse
from rec_r1.config.redaction import redact
from rec_r1.console import progress
from rec_r1.environment import (
    check_trainable,
    excludes_history,
    load_task,
    open_backend,
    open_environment,
    rewards_of,
    wrap,
)
from rec_r1.environment.structured import check_covers
from rec_r1.prompts import GROUNDED_ACTIONS, Format
from rec_r1.runs import rollouts
from rec_r1.runs.jsonl import Row
from rec_r1.scoring import Scorer
from rec_r1.scoring.earned import LIVE, Earned, cause
from rec_r1.tasks import Split, Task, pad
from retrievers.text.analysis import words
from rewards import Lift, Outcome, RankingReward, RecR1, WeightedSum

DEPTHS = (10, 100, 1000)  # The depths that are compared where one reward has a depth.
AT_A_TIME = 1024  # Rows that are scored in one call.
PERIODS = 10
_KEYS = {"step", "query", "prompt", "completion", "action", "failed", "ranks", "rewards", "reward"}
_MAY_CHANGE = ("retriever.", "task.path")

FAILED, AMBIGUOUS = "failed", "ambiguous"  # The reasons for which a completion is left out.
Scored = Iterable[tuple[Sequence[Row], Outcome]]  # Batches of rows with their outcomes.


class Replay(NamedTuple):
    """The rewards of R recorded completions.

    groups: the indexes of the completions of each group.
    steps: for each group, the step in which it was generated.
    recorded, new: (R,) float64 rewards, rounded to six decimals as they are recorded. NaN = no reward applies.
    depths: depth -> (R,) float64 new rewards at this depth. Empty where not exactly one reward has a depth.
    """

    groups: Sequence[Sequence[int]]
    steps: Sequence[int]
    recorded: np.ndarray
    new: np.ndarray
    depths: dict[int, np.ndarray]


def rescore(folder: Path, spec: str, retriever: str | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compare the recorded rewards of a run's rollouts with new ones.

        result = rescore(Path("runs/quickstart"), "{ndcg@1000: 1}")
        result["all"]["new"]["live"]  # the number of groups whose new rewards differ

    folder: the run's folder.
    spec: the new rewards as YAML, as in a recipe.
    retriever: the kind of the retriever. None = the run's own.
    overrides: settings of the retriever, and task.path where the data were moved.

    Returns `run`, `rewards` (`recorded` and `new`), `retriever` (None = the recorded ranks), `completions`, `failed`
    and `ambiguous` (how many completions were scored, and left out), `all` and `periods` (see `_statistics`), `depths`
    (depth -> number of live groups) and `sentences`. Raises UserError for a folder that is no run or has no rollouts,
    for wrong rewards or settings, and for data that have changed, and RetrieverError where the retriever fails.
    """
    runs.check_run(folder)
    own, asked = _recipes(folder, spec, retriever, overrides)
    refuse(reward_probe.problems(asked))
    total = rewards_of(asked)
    rows, left_out = _read(folder), Counter[str]()
    opens = asked.retriever != own.retriever or retriever is not None
    replayed = _retrieved if opens or total.reads_raw else _from_ranks
    replay = _replay(total, replayed(folder, own, asked, _batches(rows, left_out), left_out))
    completions = len(replay.recorded)
    if not completions and not left_out[AMBIGUOUS]:
        raise UserError(f"{folder}: the retriever failed for all {left_out[FAILED]} rollouts: give another run")
    if not completions:
        raise UserError(f"{folder}: every prompt has several sets of targets, so none can be scored: give another run")
    result: dict[str, Any] = {
        "run": str(folder),
        "rewards": {"recorded": redact(own.rewards), "new": redact(asked.rewards)},
        "retriever": asked.retriever.kind if opens or total.reads_raw else None,
        "completions": completions,
        "failed": left_out[FAILED],
        "ambiguous": left_out[AMBIGUOUS],
        "all": _statistics(replay, range(len(replay.groups))),
        "periods": [_statistics(replay, period) for period in _periods(replay.steps)],
        "depths": {str(k): _live(replay.groups, values) for k, values in replay.depths.items()},
    }
    return result | {"sentences": list(sentences(result))}


def _recipes(folder: Path, spec: str, retriever: str | None, overrides: Sequence[str]) -> tuple[Recipe, Recipe]:
    """The run's recipe, and the same with the new rewards and retriever. Raises UserError for other overrides."""
    for override in overrides:
        if not override.startswith(_MAY_CHANGE):
            raise UserError(
                f"rescore: {override.partition('=')[0]}: only retriever.… and task.path may be changed: leave it out"
            )
    file = folder / config.RUN_FILE
    own = config.load(file, [override for override in overrides if override.startswith("task.path")])
    changes = [f"rewards={spec}"]
    if retriever is not None:
        changes.append(f"retriever.kind={retriever}")
        if retriever != own.retriever.kind:
            changes += ["retriever.params={}", "retriever.index=null"]
    return own, config.load(file, [*changes, *overrides])


def _read(folder: Path) -> Iterator[Row]:
    """The rows of all processes, one by one, in the order of their steps.

    Raises UserError where there are none, and for a row that lacks a key.
    """

    def complete(file: Path) -> Iterator[Row]:
        for row, place in rollouts.rows(file):
            if not row.keys() >= _KEYS:
                missing = ", ".join(sorted(_KEYS - row.keys()))
                raise UserError(f"{place} is damaged (no {missing}): delete that line")
            yield row

    rows = heapq.merge(*map(complete, rollouts.files(folder)), key=lambda row: int(row["step"]))
    first = next(rows, None)
    if first is None:
        raise UserError(
            f"{folder}: no rollouts (rollouts.jsonl is missing or empty): give a run that has trained a step"
        )
    return itertools.chain([first], rows)


def _batches(rows: Iterable[Row], left_out: Counter[str]) -> Iterator[list[Row]]:
    """Batches of rows that are scored in one call each, with a progress bar.

    Rows for which the retriever failed are left out, and counted in ``left_out``.
    """

    def batches() -> Iterator[list[Row]]:
        remaining = iter(rows)
        while batch := list(itertools.islice(remaining, AT_A_TIME)):
            known = [row for row in batch if not row["failed"]]
            left_out[FAILED] += len(batch) - len(known)
            yield known

    yield from progress(batches(), "scoring", f"x {AT_A_TIME} completions")


class _Prompts:
    """Finds the training queries of recorded rows.

    folder: the run's folder, for messages.
    task, format_: the run's.
    """

    def __init__(self, folder: Path, task: Task, format_: Format) -> None:
        self.folder = folder
        self.ids = task.train.ids
        self.places: dict[tuple[str, str], list[int]] = {}
        for place, prompt in enumerate(tasks.prompts(task.train, task.catalog, format_)):
            self.places.setdefault((task.train.queries[place], json.dumps(prompt)), []).append(place)

    def of(self, row: Row) -> list[int]:
        """The places of the training queries that have a row's query and prompt.

        If one of them has the row's query_id, only that one is returned. Rows of older versions have no query_id.

        Raises UserError where there are none.
        """
        found = self.places.get((row["query"], json.dumps(row["prompt"])), [])
        if not found:
            raise UserError(
                f"{self.folder}: the prompt of query {row['query']!r} is no training prompt of its recipe any more: "
                "restore the data of the run, or name their folder by task.path"
            )
        return [place for place in found if self.ids[place] == row.get("query_id")] or found


def _from_ranks(
    folder: Path, own: Recipe, asked: Recipe, batches: Iterable[Sequence[Row]], left_out: Counter[str]
) -> Scored:
    """The rows whose grades are known, and their outcomes, from the recorded ranks.

    The others are counted in ``left_out``.
    """
    format_ = Format(own.format)
    if own.task.candidates or own.format.action == "structured":  # The retriever decides what a prompt shows.
        env = open_environment(own)
        task, format_ = env.task, env.format
    else:
        task = load_task(own)
        if own.format.examples:
            task, format_ = tasks.with_examples(task, format_, own.format.examples)
    # The Scorer records ranks in the order of padded targets, without those of grade 0.
    padded = [tuple(map(float, found[found > 0])) for found in pad(task.train.rows, task.train.grades)[1]]
    prompts = _Prompts(folder, task, format_)
    for batch in batches:
        choices = [{padded[place] for place in prompts.of(row)} for row in batch]
        kept = [(row, found.pop()) for row, found in zip(batch, choices, strict=True) if len(found) == 1]
        left_out[AMBIGUOUS] += len(batch) - len(kept)
        if kept:
            yield [row for row, _ in kept], _recorded_outcome(folder, format_, kept)


def _recorded_outcome(folder: Path, format_: Format, kept: Sequence[tuple[Row, Sequence[float]]]) -> Outcome:
    """The outcome of rows with the grades of their targets. Raises UserError where they do not fit together."""
    width = max(len(own) for _, own in kept)
    ranks, grades = (np.zeros((len(kept), width), kind) for kind in (np.int32, np.float32))
    for b, (row, own) in enumerate(kept):
        if len(row["ranks"]) != len(own):
            raise _changed(folder, row)
        ranks[b, : len(own)], grades[b, : len(own)] = row["ranks"], own
    rows = [row for row, _ in kept]
    # The order of candidates of an action may have been malformed although it could be parsed.
    actions = [None if row["action"] is None else format_.parse(row["completion"], row["query"]) for row in rows]
    queries, written = [row["query"] for row in rows], [action.written if action else "" for action in actions]
    outcome = Outcome([row["completion"] for row in rows], actions, ranks, grades, words, None, queries, written)
    _check_grades(folder, rows, outcome)
    return outcome


def _check_grades(folder: Path, rows: Sequence[Row], outcome: Outcome) -> None:
    """Raise UserError where ranks and grades do not give the recorded metrics, because the grades have changed."""
    names = {name for row in rows for name in row["rewards"]}
    for name in names:
        metric = re.fullmatch(r"(\w+)@(\d+)", name)
        if metric is None or metric[1] not in rewards.METRICS:
            continue
        values = RankingReward(metric[1], int(metric[2]))(outcome)
        for row, value in zip(rows, values, strict=True):
            recorded = row["rewards"].get(name)
            if recorded is not None and abs(recorded - value) > 1e-5:
                raise _changed(folder, row)


def _changed(folder: Path, row: Row) -> UserError:
    return UserError(
        f"{folder}: the targets of query {row['query']!r} are not those that its rollouts were scored by: restore the "
        "data of the run, or name their folder by task.path"
    )


def _retrieved(
    folder: Path, own: Recipe, asked: Recipe, batches: Iterable[Sequence[Row]], left_out: Counter[str]
) -> Scored:
    """The rows whose targets are known, and their outcomes, from completions that are parsed and scored again.

    The others are counted in ``left_out``.
    Only the retriever changes: the run's own grounds titles and finds candidates, as in `rec-r1 transfer`.
    """
    if own.task.candidates or own.format.action in (*GROUNDED_ACTIONS, "structured"):
        env = open_environment(own)
        backend = open_backend(asked, env.task)
        check_covers(asked, backend, env.format.schema, "--retriever")
        grounder = env.scorer.grounder or env.retriever
        env = dataclasses.replace(
            env,
            retriever=wrap(asked, backend, env.task),
            reads_text=retrievers.reads_text(backend),
            fitted_on=retrievers.fitted_on(backend),
        )
    else:
        env, grounder = open_environment(asked), None
    check_trainable(asked, env)
    scorer = Scorer(
        env.format.parse,
        env.retriever,
        rewards_of(asked),
        floor=own.format.floor,
        grounder=grounder,
        exclude_history=excludes_history(asked, env.task),
    )
    train, prompts = env.task.train, _Prompts(folder, env.task, env.format)
    for batch in batches:
        places = [prompts.of(row) for row in batch]
        kept = [(row, found[0]) for row, found in zip(batch, places, strict=True) if _same_targets(train, found)]
        left_out[AMBIGUOUS] += len(batch) - len(kept)
        if kept:
            split = train.take([place for _, place in kept])
            scored = scorer.score_split([row["completion"] for row, _ in kept], split)
            yield [row for row, _ in kept], scored.whole().outcome


def _same_targets(train: Split, places: Sequence[int]) -> bool:
    histories = train.histories or [()] * len(train)
    return len({(tuple(train.rows[q]), tuple(train.grades[q]), tuple(histories[q])) for q in places}) == 1


def _replay(total: WeightedSum, scored: Scored) -> Replay:
    """The rewards of rows, and their groups."""
    by_depth = _at_depths(total)
    sums = [total, *by_depth.values()]
    found: list[list[np.ndarray]] = [[] for _ in sums]
    recorded: list[float] = []
    prompts: dict[tuple[str | None, str, str], int] = {}
    groups: dict[tuple[int, int], list[int]] = {}  # (step, number of the prompt) -> indexes
    for rows, outcome in scored:
        for values, one in zip(found, sums, strict=True):
            values.append(np.round(one(outcome).astype(np.float64), 6))
        for row in rows:
            prompt = row.get("query_id"), json.dumps(row["prompt"]), row["query"]
            group = int(row["step"]), prompts.setdefault(prompt, len(prompts))
            groups.setdefault(group, []).append(len(recorded))
            recorded.append(np.nan if row["reward"] is None else row["reward"])
    new, *deep = (np.concatenate(parts) if parts else np.zeros(0) for parts in found)
    depths = dict(zip(by_depth, deep, strict=True))
    return Replay(list(groups.values()), [step for step, _ in groups], np.array(recorded, np.float64), new, depths)


def _at_depths(total: WeightedSum) -> dict[int, WeightedSum]:
    """The sum with its only depth replaced, for its own depth and for each of DEPTHS, in ascending order. Empty where
    not exactly one reward has a depth."""
    deep = [i for i, reward in enumerate(total.rewards) if isinstance(reward, RankingReward | RecR1 | Lift)]
    if len(deep) != 1:
        return {}
    (place,) = deep
    reward: Any = total.rewards[place]
    found = {}
    for k in sorted({*DEPTHS, reward.k}):
        changed = (*total.rewards[:place], dataclasses.replace(reward, k=k), *total.rewards[place + 1 :])
        found[k] = WeightedSum(changed, total.weights)
    return found


def _periods(steps: Sequence[int]) -> list[list[int]]:
    """The groups of each step, or of each tenth of the steps where there are more than ten."""
    distinct = sorted(set(steps))
    parts = np.array_split(distinct, min(PERIODS, len(distinct)))
    return [[g for g, step in enumerate(steps) if part[0] <= step <= part[-1]] for part in parts]


def _live(groups: Sequence[Sequence[int]], values: np.ndarray) -> dict[str, int]:
    """How many groups are live, and how many are live or dead, by the definition of the training's own record."""
    causes = []
    for group in groups:
        earned = [None if np.isnan(values[i]) else float(values[i]) for i in group]
        causes.append(cause([Earned("", reward, False, float("nan")) for reward in earned]))
    return {"live": causes.count(LIVE), "groups": len(causes) - causes.count(None)}


def _statistics(replay: Replay, chosen: Sequence[int]) -> dict[str, Any]:
    """Statistics of some groups.

    first, last: their first and last step.
    groups: how many there are.
    recorded, new: the mean of these rewards, the number of live groups, the number of groups that are live or dead,
        and the share of dead groups among those.
    correlation: the mean of the correlations of both rewards within groups that are live under both. None = there is
        no such group.
    correlated: how many such groups there are.
    """
    groups = [replay.groups[g] for g in chosen]
    of_rewards = {}
    for name, values in (("recorded", replay.recorded), ("new", replay.new)):
        mine = values[[i for group in groups for i in group]]
        counts = _live(groups, values)
        dead = 1 - counts["live"] / counts["groups"] if counts["groups"] else None
        of_rewards[name] = {"mean": None if np.isnan(mine).all() else float(np.nanmean(mine)), **counts, "dead": dead}
    together = [found for group in groups if (found := _correlation(replay, group)) is not None]
    steps = [replay.steps[g] for g in chosen]
    return {
        "first": min(steps, default=None),
        "last": max(steps, default=None),
        "groups": len(groups),
        **of_rewards,
        "correlation": float(np.mean(together)) if together else None,
        "correlated": len(together),
    }


def _correlation(replay: Replay, group: Sequence[int]) -> float | None:
    """Pearson's correlation of recorded and new rewards in a group. None where one of them does not vary."""
    pairs = np.stack([replay.recorded[list(group)], replay.new[list(group)]])
    pairs = pairs[:, ~np.isnan(pairs).any(axis=0)]
    if pairs.shape[1] < 2 or (pairs.max(axis=1) == pairs.min(axis=1)).any():
        return None
    return float(np.corrcoef(pairs)[0, 1])
