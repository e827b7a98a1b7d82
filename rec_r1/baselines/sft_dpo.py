"""The baselines SFT, reward-weighted SFT and DPO: the recipe's policy, trained with TRL's other trainers.

The completions to train on are samples of the untrained policy, or the rollouts of a run, with their rewards. SFT takes
the best completion of each group, and DPO the best and the worst one. SFT can also train on a file of completions.
Reward-weighted SFT takes the rollouts of the run in the recipe's output_dir, so that it sees what RL saw.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rec_r1.baselines.post_training import Training, section_of
from rec_r1.baselines.settings import is_made, write
from rec_r1.baselines.training_examples import Group, as_written, best_answers, pairs, resampled
from rec_r1.config import Recipe, UserError
from rec_r1.environment import Environment
from rec_r1.evaluation import budget
from rec_r1.evaluation.budget import Used
from rec_r1.evaluation.evaluate import score_raw
from rec_r1.generation import answer, sampling_of
from rec_r1.prompts import Prompt
from rec_r1.runs import processes, rollouts
from rec_r1.tasks import Split, keep_headroom, prompts
from rec_r1.tasks.raw_files import read, value
from retrievers.core.index_folder import new_folder

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A policy that another trainer trained.

    weights: its folder.
    method: how it was trained, in words.
    used: what its training used. Nothing is known of a folder of an older version.
    """

    weights: Path
    method: str
    used: Used


class Examples(NamedTuple):
    """Training examples.

    rows: prompts and completions, as TRL's trainers read them.
    used: what was used to make them.
    queries: how many training queries pass the recipe's filter. None = they were not counted.
    """

    rows: list[dict[str, Any]]
    used: Used
    queries: int | None = None


def sft(recipe: Recipe, env: Environment) -> Trained:
    """Train a policy by supervised fine-tuning on good completions.

    Raises UserError for options that TRL refuses, for a folder that was trained with other settings, and where no
    training example is left.
    """
    if recipe.baselines.outputs:
        method = f"SFT on {Path(recipe.baselines.outputs).name}"
        return _trained(recipe, env, "sft", method, lambda: Examples(_given(recipe, env), Used(None, None)))

    def examples() -> Examples:
        groups, used, queries = _groups(recipe, env)
        return Examples(best_answers(groups), used, queries)

    return _trained(recipe, env, "sft", f"SFT on the best of {_source(recipe)}", examples)


def dpo(recipe: Recipe, env: Environment) -> Trained:
    """Train a policy by direct preference optimisation on pairs of completions.

    Result and errors are those of :func:`sft`.
    """

    def examples() -> Examples:
        groups, used, queries = _groups(recipe, env)
        return Examples(pairs(groups), used, queries)

    return _trained(recipe, env, "dpo", f"DPO on best and worst of {_source(recipe)}", examples)


def warm_start(recipe: Recipe, env: Environment) -> Trained:
    """Train the policy of a warm start, with the settings of the recipe's section `warm_start`, as in :func:`sft`.

    Result and errors are those of :func:`sft`. Its folder is `warm_start` in the recipe's output_dir.
    """

    def examples() -> Examples:
        groups, used = _sampled(recipe, env, _training_queries(recipe, env), recipe.warm_start.samples)
        return Examples(best_answers(groups), used)

    return _trained(recipe, env, "warm_start", "a warm start by SFT", examples)


def reward_weighted_sft(recipe: Recipe, env: Environment) -> Trained:
    """Train a policy by SFT on the rollouts of the run in the recipe's output_dir, weighted by their rewards.

    TRL's SFTTrainer has no weights of examples. So the rollouts are resampled in proportion to their weights, see
    `training_examples.weights` and `training_examples.resampled`.

    Result and errors are those of :func:`sft`. Raises UserError, too, where there are no rollouts, where all groups are
    dead, and for a policy that was trained on other rollouts.
    """
    temperature = recipe.baselines.reward_temperature
    method = f"SFT on the run's rollouts, resampled in proportion to exp(reward / {temperature:g})"
    files = rollouts.files(Path(recipe.output_dir))
    if not files:
        raise UserError(
            f"output_dir: {recipe.output_dir} has no rollouts.jsonl, and reward_weighted_sft trains on the rollouts of "
            "a run: train the recipe first (rec-r1 train RECIPE), or set output_dir to the folder of its run"
        )

    def examples() -> Examples:
        rows = resampled(_recorded(files), temperature, recipe.seed)
        if not rows:
            raise UserError(
                f"baseline reward_weighted_sft: all completions of each prompt in {files[0]} earn the same reward, so "
                "there is nothing to weight: train with other rewards, or with a larger grpo.num_generations"
            )
        return Examples(rows, budget.of_run(Path(recipe.output_dir)))

    return _trained(recipe, env, "reward_weighted_sft", method, examples, rollouts.digest(files))


def _recorded(files: Sequence[Path]) -> list[Group]:
    """The rollouts in the files of a run as groups, one per prompt. Rollouts without a reward are left out."""
    found: dict[str, tuple[Prompt, list[str], list[float]]] = {}
    for path in files:
        for row, place in rollouts.rows(path):
            if not row.keys() >= {"prompt", "completion", "reward"}:
                raise UserError(f"{place} is damaged (it lacks prompt, completion or reward): delete that line")
            if row["completion"] and row["reward"] is not None:
                # Two queries may have the same prompt. Rows of older versions have no id of the query.
                key = json.dumps([row.get("query_id"), row["prompt"]])
                _, answers, rewards = found.setdefault(key, (row["prompt"], [], []))
                answers.append(row["completion"])
                rewards.append(row["reward"])
    return [Group(prompt, answers, np.array(rewards), math.nan) for prompt, answers, rewards in found.values()]


def _source(recipe: Recipe) -> str:
    """Where the completions of SFT and DPO come from, in words."""
    baselines = recipe.baselines
    if baselines.rollouts:
        return Path(baselines.rollouts).as_posix()
    return f"{baselines.samples} own samples a prompt" if baselines.samples else "as many own samples as RL has"


def _groups(recipe: Recipe, env: Environment) -> tuple[list[Group], Used, int]:
    """The training prompts that pass the recipe's filter, with their scored completions, what these used, and how many
    queries pass the filter."""
    split = _training_queries(recipe, env)
    if recipe.baselines.rollouts:
        asked, raw = prompts(split, env.task.catalog, env.format), score_raw(split, env.scorer).rewards
        found = _from_rollouts(Path(recipe.baselines.rollouts), split, asked, raw)
        return found, Used(sum(len(group.answers) for group in found), None), len(split)
    found, used = _sampled(recipe, env, split, recipe.baselines.samples or _samples_of_training(recipe, split))
    return found, used, len(split)


def _samples_of_training(recipe: Recipe, split: Split) -> int:
    """How many samples of each query of ``split`` make about as many as the training has, at least two."""
    return max(2, round(budget.of_training(recipe, len(split)) / len(split)))


def _check_budget(recipe: Recipe, env: Environment, kind: str, folder: Path) -> None:
    """Raise UserError for a policy that was trained on fewer or more samples than the training now has."""
    baselines, used = recipe.baselines, budget.read(folder).rollouts
    given = baselines.samples or baselines.rollouts or (kind == "sft" and baselines.outputs)
    if kind not in ("sft", "dpo") or given or used is None:
        return
    split = _training_queries(recipe, env)
    wanted = _samples_of_training(recipe, split) * len(split)
    if used != wanted:
        raise UserError(
            f"{folder}: trained on {used:,} samples, but {wanted:,} would be as many as the training has: delete it, "
            "and it is trained again"
        )


def _training_queries(recipe: Recipe, env: Environment) -> Split:
    """The training queries that pass the recipe's filter. Raises UserError where none is left."""
    return keep_headroom(env.task.train, env.retriever, recipe.task.train_filter)


def _sampled(recipe: Recipe, env: Environment, split: Split, count: int) -> tuple[list[Group], Used]:
    """Groups of ``count`` samples of the untrained policy for the prompts of ``split``, and what these used."""
    from rec_r1 import models

    raw = score_raw(split, env.scorer).rewards
    asked = prompts(split, env.task.catalog, env.format)
    sampling, source = sampling_of(recipe, count), models.resolve(recipe.model.name)
    completions, seconds = answer(recipe, source, None, asked, "sampling", sampling)
    started = time.monotonic()
    repeated = split.take([q for q in range(len(split)) for _ in range(count)])
    earned = env.scorer.score_split(completions, repeated).whole().rewards
    seconds += time.monotonic() - started
    groups = [
        Group(prompt, completions[q * count : (q + 1) * count], earned[q * count : (q + 1) * count], float(raw[q]))
        for q, prompt in enumerate(asked)
    ]
    return groups, Used(len(completions), seconds)


def _from_rollouts(path: Path, split: Split, asked: Sequence[Prompt], raw: np.ndarray) -> list[Group]:
    """The scored rollouts of a run as groups, one per query. Raises UserError where none is of a training query.

    A rollout belongs to the query with its id and text. Where there is none, as for rollouts of older versions, which
    have no id, it belongs to all queries with its text.
    """
    by_id = {pair: q for q, pair in enumerate(zip(split.ids, split.queries, strict=True))}
    by_text: dict[str, list[int]] = {}
    for q, text in enumerate(split.queries):
        by_text.setdefault(text, []).append(q)
    found: dict[int, list[tuple[str, float]]] = {}
    for record, where in _rollouts_of(path):
        if record.get("completion") == "":
            continue  # The model ended at once, so there is nothing to train on.
        if value(record, "completion", where) and record.get("reward") is not None:
            text = str(value(record, "query", where))
            own = by_id.get((str(record.get("query_id")), text))
            for q in by_text.get(text, ()) if own is None else (own,):
                found.setdefault(q, []).append((record["completion"], record["reward"]))
    groups = [
        Group(asked[q], [a for a, _ in answers], np.array([r for _, r in answers], np.float32), float(raw[q]))
        for q, answers in sorted(found.items())
    ]
    if not groups:
        raise UserError(
            f"baselines.rollouts: {path}: none of its queries is a training query of this task: give the "
            "folder of a run on this task"
        )
    return groups


def _rollouts_of(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of baselines.rollouts, each with its place.

    path: a run's folder, one of its files of rollouts, or a file of the user's own.

    Raises UserError for a folder without rollouts, and for a file that is missing or damaged.
    """
    if path.is_dir():
        files = rollouts.files(path)
        if not files:
            raise UserError(f"baselines.rollouts: {path} has no rollouts.jsonl: give the folder of a run")
        return (row for file in files for row in rollouts.rows(file))
    return rollouts.rows(path) if rollouts.is_in_parts(path) else read(path)


def _given(recipe: Recipe, env: Environment) -> list[dict[str, Any]]:
    """Training examples for SFT from the file baselines.outputs.

    Raises UserError for a query that is no training query, and for a completion that is malformed.
    """
    path = Path(str(recipe.baselines.outputs))
    train = env.task.train
    asked = prompts(train, env.task.catalog, env.format)
    by_query = dict(zip((*train.queries, *train.ids), (*asked, *asked), strict=True))
    rows = []
    for record, where in read(path):
        query, completion = str(value(record, "query", where)), str(value(record, "completion", where))
        if query not in by_query:
            raise UserError(f"{where}: {query!r} is no training query: give training queries (or their ids) only")
        if env.format.parse(completion, query) is None:
            raise UserError(
                f"{where}: {completion[:80]!r} is malformed in format.answer={recipe.format.answer}: remove it"
            )
        rows.append({"prompt": by_query[query], "completion": as_written(by_query[query], completion)})
    return rows


def _trained(
    recipe: Recipe, env: Environment, kind: str, method: str, examples: Callable[[], Examples], digest: str = ""
) -> Trained:
    """Train a policy, unless it was trained with the same settings before.

    recipe, env: the recipe, and its task, format and Scorer.
    kind: a key of METHODS, or warm_start.
    method: a description of the training.
    examples: returns the training examples.
    digest: the hash of the run's rollouts. "" = the policy does not depend on them.

    Raises UserError as :func:`sft`.
    """
    folder = Path(recipe.output_dir) / ("warm_start" if kind == "warm_start" else f"baselines/{kind}")
    if is_made(folder, recipe, kind, digest):
        _check_budget(recipe, env, kind, folder)
        logger.info("%s was already trained with these settings: %s", kind, folder)
        return Trained(folder, method, budget.read(folder))
    if processes.launched() > 1:
        raise UserError(
            f"baseline {kind}: one process trains it, and several were started: run rec-r1 baseline without accelerate "
            "launch"
        )
    trainer = Training(recipe, env, kind)
    rows, used, queries = examples()
    if not rows:
        key = "warm_start.samples" if kind == "warm_start" else "baselines.samples"
        raise UserError(f"{section_of(recipe, kind)[0]}: no training example is left: raise {key}")
    with new_folder(folder) as temporary:
        seconds = trainer.train(rows, temporary, queries)
        if used.seconds is not None:
            used = dataclasses.replace(used, seconds=used.seconds + seconds)
        budget.write(temporary, used)
        write(temporary, recipe, kind, digest)
    return Trained(folder, method, used)


METHODS: dict[str, Callable[[Recipe, Environment], Trained]] = {
    "sft": sft,
    "reward_weighted_sft": reward_weighted_sft,
    "dpo": dpo,
}
