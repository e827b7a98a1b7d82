"""Baselines, which a trained policy must beat: `rec-r1 baseline RECIPE NAME`.

A baseline answers the held-out queries. Its answers are scored like those of a policy, stored in the run's folder, and
compared with the other systems there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import retrievers
from rec_r1.baselines import prompt_search, rloo
from rec_r1.baselines.same_run import check_same_run
from rec_r1.config import Recipe, UserError, cache_folder, comparable, dump
from rec_r1.environment import Environment, excludes_history, open_environment, open_retriever
from rec_r1.evaluation import compare, records
from rec_r1.evaluation.answers import answered
from rec_r1.evaluation.budget import Used, of_run
from rec_r1.evaluation.evaluate import (
    all_metrics,
    compare_folder,
    metric_scorer,
    save_raw,
    score_answers,
    score_lists,
    score_raw,
)
from rec_r1.generation import answer_tokens, identity, sampling_of
from rec_r1.prompts import Prompt, up_to_end
from rec_r1.runs import best_policy, step_of, write_atomically
from rec_r1.runs.run_config import absolute
from rec_r1.scoring import Scored, Scorer
from rec_r1.scoring.grounding import without
from rec_r1.tasks import Split, Task, examples, popularity, prompts
from retrievers import Query, certain_hits
from retrievers.text.lucene_params import ANALYZERS

logger = logging.getLogger(__name__)
LIST_DEPTH = 1000  # The length of a baseline's lists, unless a metric looks deeper.
_EXAMPLE_WORDS = 4  # How many words an example shows where the recipe does not say it.
HISTORIES_TRIED = 100  # So many histories are asked, to see whether a retriever reads histories.


@dataclasses.dataclass(frozen=True)
class Answered:
    """The scored answers of a baseline to the queries of a split.

    scored: the scores.
    kind: what the answers are: query, list, policy or endpoint, see `records.System`.
    description: how they were made, for tables and reports.
    cost: the fields of `endpoint.Usage`. None = the answers were made without a server.
    identity: the hash of the policy that answered, see `generation.identity`. None = no policy answered.
    system: the name in the table. None = that of the baseline.
    reads_judgments: whether the judgments chose the answers, see `records.System`.
    used: what was used to make the answers. None = the system has no model.
    """

    scored: Scored
    kind: str
    description: str
    cost: dict[str, Any] | None = None
    identity: str | None = None
    system: str | None = None
    reads_judgments: bool = False
    used: Used | None = None


Baseline = Callable[[Recipe, Environment, Split, Scorer], Answered]


def run(recipe: Recipe, name: str, split_name: str, train: rloo.Train | None = None) -> dict[str, Any]:
    """Answer the queries of a split with a baseline, and compare it with all other systems in the folder.

    recipe: the recipe. Its output_dir gets the answers and the comparison.
    name: a key of BASELINES, or raw.
    split_name: train, validation or test.
    train: `rec_r1.train.train`, which trains the baseline rloo. No other baseline needs it.

    Returns the comparison. Raises UserError for an unknown baseline, for one that does not work with the task or the
    retriever, for an output folder that cannot be written, and for the folder of a run with other settings.
    """
    if name != "raw" and name not in BASELINES:
        raise UserError(f"baseline {name!r}: choose from raw, {', '.join(BASELINES)}, all")
    folder = Path(recipe.output_dir)
    check_same_run(recipe, name)
    records.check_writable(records.folder_of(folder, split_name), "output_dir")
    if name == "rloo" and train is not None:
        rloo.trained(recipe, train)
    env = open_environment(recipe)
    split = env.task.splits[split_name]
    known = all_metrics(folder, recipe, split_name)  # Metrics that the recipe lacks are computed from stored answers.
    scorer = metric_scorer(env.scorer, recipe.evaluation.metrics)
    result = BASELINES[name](recipe, env, split, scorer) if name != "raw" else None
    # Nothing is written before this line, so that a baseline that fails leaves the folder as it was.
    save_raw(folder, split_name, env, split, scorer)  # Every comparison needs the raw query.
    if not (folder / "config.yaml").is_file():  # No policy is trained yet. The report reads the recipe from here.
        write_atomically(folder / "evaluation" / "recipe.yaml", dump(absolute(recipe)))
    if result is not None:
        title = result.system or name.replace("_", " ")
        about = (title, result.kind, result.description, result.cost, result.identity)
        used, by_judgments = result.used or Used(completions=0), result.reads_judgments
        records.save(folder, split_name, env, split, result.scored, *about, reads_judgments=by_judgments, used=used)
    return compare_folder(folder, recipe, env, split_name, known)


def run_all(recipe: Recipe, split_name: str, train: rloo.Train) -> tuple[dict[str, Any], list[str]]:
    """:func:`run` for all baselines of ALL. What was trained or generated already is used again.

    Returns the comparison after the last one, and one line for each baseline that could not be made.
    """
    failed, result = [], {}
    for name in ALL:
        try:
            result = run(recipe, name, split_name, train)
        except (UserError, retrievers.RetrieverError) as error:
            failed.append(f"baseline {name} in {recipe.output_dir} was not made: {error}")
            logger.warning("%s", failed[-1])
    return result, failed


def _endpoint_name(model: str) -> str:
    """The name of an endpoint among the systems of a folder. It differs from the names of all other systems."""
    taken = {compare.RAW, compare.TRAINED, *(name.replace("_", " ") for name in BASELINES)}
    return f"{model} (endpoint)" if model in taken else model


def _last(count: int) -> Baseline:
    """The baseline that sends the last ``count`` titles of a history as the query."""

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
    """Send the history without any text, to a retriever that reads histories."""
    if not split.histories:
        raise UserError(f"task {env.task.name} has no histories: this baseline is for sequential tasks")
    kind = recipe.retriever.kind
    # A retriever that reads texts alone finds nothing for a query without a text.
    asked = [Query("", tuple(history)) for history in split.histories[:HISTORIES_TRIED]]
    if (certain_hits(env.retriever, asked, 1).rows < 0).all():
        raise UserError(
            f"retriever.kind: {kind!r} reads texts and no histories, so it would find nothing: set a retriever that "
            "reads histories, such as retriever.kind=ease, or use the baseline last_title"
        )
    scored = score_raw(dataclasses.replace(split, queries=[""] * len(split)), scorer)
    return Answered(scored, "query", "the history alone, without a text")


def _popularity(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    """List the catalogue by popularity, the same for all queries."""
    order = np.argsort(-popularity(env.task), kind="stable")
    lists = [_first(order, own, _depth(recipe)) for own in _left_out(recipe, env.task, split)]
    note = ", without the history's own" if excludes_history(recipe, env.task) else ""
    return Answered(score_lists(lists, split, scorer), "list", f"most chosen in training first{note}")


def _random(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    """List the catalogue in a random order, another one for each query."""
    rng = np.random.default_rng(recipe.seed)
    depth, n = _depth(recipe), len(env.task.catalog)
    lists = [_first(rng.permutation(n), own, depth) for own in _left_out(recipe, env.task, split)]
    return Answered(score_lists(lists, split, scorer), "list", f"documents in random order, seed {recipe.seed}")


def _left_out(recipe: Recipe, task: Task, split: Split) -> Sequence[tuple[int, ...]]:
    """The rows that each query's list leaves out: its history, where a retriever's rankings leave it out, too."""
    return split.histories if excludes_history(recipe, task) and split.histories else [()] * len(split)


def _depth(recipe: Recipe) -> int:
    """The length of a baseline's lists. A shorter list would score less in the deepest metric."""
    names = [*recipe.evaluation.metrics, *recipe.rewards]
    return max([LIST_DEPTH, *(int(k) for _, _, k in (name.partition("@") for name in names) if k.isdigit())])


def _first(order: np.ndarray, left_out: Sequence[int], depth: int) -> list[int]:
    """The first ``depth`` rows of ``order`` that are not in ``left_out``."""
    return without(order[: depth + len(set(left_out))].tolist(), left_out)[:depth]


def _rm3(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    """Expand the raw queries by pseudo-relevance feedback in Lucene, with the same catalogue and BM25 parameters."""
    config = dataclasses.replace(recipe.retriever, kind="lucene", params=_rm3_params(recipe), index=None)
    retriever = open_retriever(dataclasses.replace(recipe, retriever=config), env.task)
    scored = score_raw(split, Scorer(scorer.parse, retriever, scorer.rewards))
    # The rankings are stored as lists, because the run's own retriever would rank the same queries differently.
    other = dataclasses.replace(env, retriever=retriever)
    return Answered(
        dataclasses.replace(scored, lists=records.ranked_rows(other, scored, _depth(recipe))),
        "list",
        "the raw query expanded by RM3 (Lucene)",
    )


def _rm3_params(recipe: Recipe) -> dict[str, Any]:
    """Lucene's parameters with RM3.

    They are the recipe's own for kind lucene, and otherwise k1, b and the language of the recipe's text retriever.

    Raises UserError where Lucene has no analyzer for that language.
    """
    given, kind = recipe.retriever.params, recipe.retriever.kind
    params: dict[str, Any] = {"rm3": given.get("rm3") or True}
    if kind == "lucene":
        return {**given, **params}
    try:
        (code, *_) = retrievers.languages(kind, given) or ["en"]
    except ValueError as error:
        raise UserError(str(error)) from error
    if code not in ANALYZERS:
        raise UserError(
            f"baseline rm3: Lucene has no analyzer for retriever.params.language {code!r}: use another baseline"
        )
    return {**{key: given[key] for key in ("k1", "b") if key in given}, "language": code, **params}


def _untrained(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    """The completions of the untrained policy."""
    asked = prompts(split, env.task.catalog, env.format)
    return _policy(recipe, asked, split, scorer, "untrained", recipe.model.name, Used())


def _few_shot(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    """The completions of the untrained policy for prompts with more examples than the recipe's own.

    Where a completion is added to the query, an example shows words to add, and not a title.
    """
    count, format_ = recipe.baselines.few_shot, env.format
    number = _EXAMPLE_WORDS if format_.config.action == "expand" and not format_.config.example_words else None
    _, format_ = examples(env.task.train, env.task.catalog, format_, count, number)
    asked = prompts(split, env.task.catalog, format_)
    return _policy(
        recipe, asked, split, scorer, "few-shot", f"{recipe.model.name} with {len(format_.examples)} examples", Used()
    )


def _policy(
    recipe: Recipe, asked: Sequence[Prompt], split: Split, scorer: Scorer, name: str, what: str, before: Used,
    weights: Path | None = None,
) -> Answered:  # fmt: skip
    """The greedy completions of a policy.

    asked: the prompts.
    name: the label of the progress bar.
    what: the policy in words.
    before: what was used before it answers.
    weights: the folder of its weights. None = the untrained policy.
    """
    from rec_r1 import models

    answers = answered(recipe, models.resolve(recipe.model.name), weights, asked, name)
    scored, what = score_answers(answers.texts, split, scorer), f"{what}, {sampling_of(recipe).description}"
    used = dataclasses.replace(before, query_seconds=answers.query_seconds)
    return Answered(scored, "policy", what, identity=answers.identity, used=used)


def _endpoint(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    """The completions of the server in the recipe's section baselines.endpoint."""
    from rec_r1.generation.endpoint import answers, of_recipe

    endpoint = of_recipe(recipe, answer_tokens(recipe))
    asked = prompts(split, env.task.catalog, env.format)
    texts, usage = answers(asked, endpoint, cache_folder() / "endpoint", endpoint.model)
    texts = [up_to_end(text, sampling_of(recipe).end) for text in texts]
    scored = score_answers(texts, split, scorer)
    # The cost includes completions from disk, which an earlier call paid for.
    cost = dataclasses.asdict(usage) | {"dollars": usage.dollars_all, "requests": usage.requests + usage.cached}
    description = f"{endpoint.model} at {endpoint.url}, zero-shot"
    return Answered(scored, "endpoint", description, cost, system=_endpoint_name(endpoint.model), used=Used())


def _best_of(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    """Of several samples of the untrained policy, the one that earns the best reward of the recipe.

    The reward reads the judgments of the held-out query, so no real system can choose like this.
    """
    from rec_r1 import models

    count = recipe.baselines.samples or recipe.grpo.get("num_generations", 8)  # TRL's own default is 8.
    sampling = sampling_of(recipe, count)
    asked = prompts(split, env.task.catalog, env.format)
    source = models.resolve(recipe.model.name)
    name = f"best of {count}, upper bound"
    # Its identity differs from that of its samples, because it stands for one completion a query.
    whole = json.dumps([identity(recipe, source, None, asked, sampling), comparable(recipe)["rewards"], name])
    own = hashlib.sha256(whole.encode()).hexdigest()
    kept = records.stored(Path(recipe.output_dir), own)
    if kept is not None:
        chosen, seconds = records.answers_in(kept), (kept.used or {}).get("query_seconds")
    else:
        answers = answered(recipe, source, None, asked, f"best of {count}", sampling)
        repeated = split.take([q for q in range(len(split)) for _ in range(count)])
        earned = env.scorer.score_split(answers.texts, repeated).whole().rewards
        chosen, seconds = best_of(answers.texts, earned, count), answers.query_seconds
    description = (
        f"{recipe.model.name}, of {count} samples at temperature {sampling.options['temperature']:g} the one with the "
        "best reward: an upper bound, because the reward reads the judgments"
    )
    used = Used(completions=count, query_seconds=seconds)
    scored = score_answers(chosen, split, scorer)
    return Answered(scored, "policy", description, None, own, name, reads_judgments=True, used=used)


def best_of(completions: Sequence[str], earned: np.ndarray, count: int) -> list[str]:
    """The completion of each of Q queries that earns most. Of equals it is the first.

    completions: Q x ``count`` completions. Those of a query follow each other.
    earned: (Q x ``count``,) their rewards.
    count: how many completions each query has.
    """
    places = np.argmax(earned.reshape(-1, count), axis=1)
    return [completions[q * count + int(place)] for q, place in enumerate(places)]


def _post_trained(kind: str) -> Baseline:
    """The baseline of a policy that another trainer trained. ``kind``: a key of `sft_dpo.METHODS`."""

    def baseline(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
        from rec_r1.baselines.sft_dpo import METHODS

        weights, method, used = METHODS[kind](recipe, env)
        asked = prompts(split, env.task.catalog, env.format)
        return _policy(recipe, asked, split, scorer, kind, f"{recipe.model.name}, {method}", used, weights)

    return baseline


def _rloo(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    """The best policy of the RLOO training, see rloo.py."""
    own = rloo.recipe_of(recipe)
    folder = Path(own.output_dir)
    weights = best_policy(folder)
    what = f"{recipe.model.name}, RLOO, step {step_of(folder, weights)}"
    asked = prompts(split, env.task.catalog, env.format)
    return _policy(own, asked, split, scorer, "rloo", what, of_run(folder), weights)


def _prompt_search(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    """The untrained policy with the prompt that was found by a search, see prompt_search.py."""
    format_, used = prompt_search.found(recipe, env)
    asked = prompts(split, env.task.catalog, format_)
    return _policy(recipe, asked, split, scorer, "prompt search", f"{recipe.model.name} with the found prompt", used)


BASELINES: dict[str, Baseline] = {
    "last_title": _last(1),
    "last_three": _last(3),
    "history": _history,
    "popularity": _popularity,
    "random": _random,
    "rm3": _rm3,
    "untrained": _untrained,
    "few_shot": _few_shot,
    "best_of": _best_of,
    "endpoint": _endpoint,
    "sft": _post_trained("sft"),
    "reward_weighted_sft": _post_trained("reward_weighted_sft"),
    "dpo": _post_trained("dpo"),
    "rloo": _rloo,
    "prompt_search": _prompt_search,
}
# The systems that a trained policy must beat, in the order in which `rec-r1 baseline RECIPE all` makes them.
ALL = ("rm3", "few_shot", "best_of", "sft", "reward_weighted_sft", "dpo", "rloo", "prompt_search")
