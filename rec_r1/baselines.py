"""What a trained policy must beat, in the same harness: `rec-r1 baseline RECIPE NAME`.

A baseline answers the held-out queries; its answers are scored and kept beside the run's, and compared with them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rec_r1 import systems
from rec_r1.config import Recipe, UserError, cache_folder, dump
from rec_r1.environment import Environment, open_environment, open_retriever
from rec_r1.evaluate import answer, compare_folder, metric_scorer, save_raw, score_answers, score_lists, score_raw
from rec_r1.options import answer_tokens
from rec_r1.prompts import Prompt
from rec_r1.runs import write_atomically
from rec_r1.scoring import Scored, Scorer
from rec_r1.tasks import Split, Task, examples, prompts

logger = logging.getLogger(__name__)
LIST_DEPTH = 1000


@dataclasses.dataclass(frozen=True)
class Answered:
    """A baseline's scored answers to one part, and what is said of it."""

    scored: Scored
    kind: str
    description: str
    cost: dict[str, Any] | None = None


Baseline = Callable[[Recipe, Environment, Split, Scorer], Answered]


def run(recipe: Recipe, name: str, part: str) -> dict[str, Any]:
    """Answer one part with baseline ``name``, keep it in `output_dir`, and compare all that lies there.

    Returns the comparison. Raises UserError for an unknown name, or a baseline that the task has nothing for.
    """
    if name != "raw" and name not in BASELINES:
        raise UserError(f"baseline {name!r}: choose from raw, {', '.join(BASELINES)}")
    env = open_environment(recipe)
    split = env.task.splits[part]
    scorer = metric_scorer(env.scorer, recipe.evaluation.metrics)
    folder = Path(recipe.output_dir)
    save_raw(folder, part, env, split, scorer)  # every comparison needs it
    if not (folder / "config.yaml").is_file():  # nothing is trained yet: the report says what this was
        write_atomically(folder / "evaluation" / "recipe.yaml", dump(recipe))
    if name != "raw":
        made = BASELINES[name](recipe, env, split, scorer)
        title = recipe.baselines.endpoint.model if name == "endpoint" else name.replace("_", " ")
        systems.save(folder, part, env, split, made.scored, str(title), made.kind, made.description, made.cost)
    return compare_folder(folder, recipe, env, part, scorer.rewards.names)


def _last(count: int) -> Baseline:
    def baseline(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
        if not split.histories:
            raise UserError(f"task {env.task.name} has no histories: this baseline is for sequential tasks")
        titles = env.task.catalog.titles
        texts = [" ".join(titles[row] for row in history[-count:]) for history in split.histories]
        scored = score_raw(dataclasses.replace(split, queries=texts), scorer)
        return Answered(
            scored,
            "query",
            f"the last {count} titles of the history as the query"
            if count > 1
            else "the last title of the history as the query",
        )

    return baseline


def _history(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    if not split.histories:
        raise UserError(f"task {env.task.name} has no histories: this baseline is for sequential tasks")
    scored = score_raw(dataclasses.replace(split, queries=[""] * len(split)), scorer)
    return Answered(scored, "query", "the history alone, without a text")


def _popularity(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    order = np.argsort(-popularity(env.task), kind="stable")
    lists = [_without(order, history) for history in _histories(split)]
    return Answered(
        score_lists(lists, split, scorer), "list", "most chosen in training first, without the history's own"
    )


def _random(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    rng = np.random.default_rng(recipe.seed)
    lists = [_without(rng.permutation(len(env.task.catalog)), history) for history in _histories(split)]
    return Answered(score_lists(lists, split, scorer), "list", f"documents in random order, seed {recipe.seed}")


def popularity(task: Task) -> np.ndarray:
    """(n,) how often each document was chosen in training: as the task counted, else as its training judgments say."""
    if task.counts is not None:
        return task.counts
    rows = [row for judged in task.train.rows for row in judged]
    return np.bincount(np.array(rows, np.int64), minlength=len(task.catalog))


def _histories(split: Split) -> Sequence[tuple[int, ...]]:
    return split.histories or [()] * len(split)


def _without(order: np.ndarray, history: Sequence[int]) -> list[int]:
    """The first documents of ``order`` that are not in the history: what was chosen is no target (see histories.py)."""
    own = set(history)
    return [row for row in order[: LIST_DEPTH + len(own)].tolist() if row not in own][:LIST_DEPTH]


def _rm3(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    """Pseudo-relevance feedback by Lucene, over the same documents and queries; its BM25 is the recipe's."""
    given = recipe.retriever.params
    kept = given if recipe.retriever.kind == "lucene" else [key for key in ("k1", "b") if key in given]
    params: dict[str, Any] = {**{key: given[key] for key in kept}, "rm3": given.get("rm3") or True}
    config = dataclasses.replace(recipe.retriever, kind="lucene", params=params, index=None)
    retriever = open_retriever(dataclasses.replace(recipe, retriever=config), env.task)
    scored = score_raw(split, Scorer(scorer.parse, retriever, scorer.rewards))
    # What it ranks is its own retriever's: kept as lists, since the run's retriever would rank its query otherwise.
    other = dataclasses.replace(env, retriever=retriever)
    return Answered(
        dataclasses.replace(scored, lists=systems.ranked_rows(other, scored, LIST_DEPTH)),
        "list",
        "the raw query expanded by RM3 (Lucene)",
    )


def _untrained(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    asked = prompts(split, env.task.catalog, env.format)
    return _policy(recipe, asked, split, scorer, "untrained", f"{recipe.model.name}, greedy")


def _few_shot(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    count = recipe.baselines.few_shot
    _, format_ = examples(env.task.train, env.task.catalog, env.format, count)
    asked = prompts(split, env.task.catalog, format_)
    return _policy(recipe, asked, split, scorer, "few-shot", f"{recipe.model.name} with {count} examples, greedy")


def _policy(recipe: Recipe, asked: Sequence[Prompt], split: Split, scorer: Scorer, name: str, what: str) -> Answered:
    from rec_r1 import models

    answers = answer(recipe, models.resolve(recipe.model.name), None, asked, name)
    return Answered(score_answers(answers, split, scorer), "policy", what)


def _endpoint(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    from rec_r1.endpoint import Endpoint, answers

    config = recipe.baselines.endpoint
    if not config.model:
        raise UserError("baselines.endpoint.model: not set: name the model that the endpoint serves")
    prices = config.dollars_per_million
    if prices is not None and len(prices) != 2:
        raise UserError(f"baselines.endpoint.dollars_per_million: {prices}: give two, of prompt and completion tokens")
    endpoint = Endpoint(
        config.url,
        config.model,
        config.key_variable,
        max_tokens=answer_tokens(recipe),
        extra=config.extra,
        concurrency=config.concurrency,
        dollars_per_million=None if prices is None else (prices[0], prices[1]),
    )
    asked = prompts(split, env.task.catalog, env.format)
    texts, usage = answers(asked, endpoint, cache_folder() / "endpoint", config.model)
    scored = score_answers(texts, split, scorer)
    # What the answers cost, not what this call spent: those kept from an earlier one were paid for, too.
    cost = dataclasses.asdict(usage) | {"dollars": usage.dollars_all, "requests": usage.requests + usage.cached}
    return Answered(scored, "endpoint", f"{config.model} at {config.url}, zero-shot", cost)


def _sft(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    from rec_r1.posttraining import sft

    return _post_trained(recipe, env, split, scorer, "sft", sft(recipe, env))


def _dpo(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    from rec_r1.posttraining import dpo

    return _post_trained(recipe, env, split, scorer, "dpo", dpo(recipe, env))


def _post_trained(
    recipe: Recipe, env: Environment, split: Split, scorer: Scorer, name: str, trained: tuple[Path, str]
) -> Answered:
    from rec_r1 import models

    weights, what = trained
    asked = prompts(split, env.task.catalog, env.format)
    answers = answer(recipe, models.resolve(recipe.model.name), weights, asked, name)
    return Answered(score_answers(answers, split, scorer), "policy", f"{recipe.model.name}, {what}, greedy")


BASELINES: dict[str, Baseline] = {
    "last_title": _last(1),
    "last_three": _last(3),
    "history": _history,
    "popularity": _popularity,
    "random": _random,
    "rm3": _rm3,
    "untrained": _untrained,
    "few_shot": _few_shot,
    "endpoint": _endpoint,
    "sft": _sft,
    "dpo": _dpo,
}
