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

import retrievers
from rec_r1.config import Recipe, UserError, cache_folder, comparable, dump, load
from rec_r1.config.redaction import from_environment
from rec_r1.environment import Environment, excludes_history, open_environment, open_retriever
from rec_r1.evaluation import compare, records
from rec_r1.evaluation.evaluate import (
    all_metrics,
    answered,
    compare_folder,
    metric_scorer,
    save_raw,
    score_answers,
    score_lists,
    score_raw,
)
from rec_r1.generation import OPTIONS, Sampling, answer_tokens, sampling_of
from rec_r1.prompts import Prompt, up_to_end
from rec_r1.runs import write_atomically
from rec_r1.runs.run_config import absolute, differences
from rec_r1.scoring import Scored, Scorer
from rec_r1.scoring.grounding import without
from rec_r1.tasks import Split, Task, examples, prompts
from retrievers import BACKENDS
from retrievers.text.lucene import ANALYZERS

logger = logging.getLogger(__name__)
LIST_DEPTH = 1000  # documents of a list, at least; the deepest metric's k if that is more
# What must be the run's own, so that a baseline stands beside it; and, for those that ask its model, the model.
_OF_A_RUN = ("task", "retriever", "format", "grounding", "evaluation")
_FREE = (  # of these, what changes no score
    "retriever.cache", "retriever.max_error_rate", "retriever.error_steps", "evaluation.every_steps",
    "evaluation.batch_size", "evaluation.validation_limit", "evaluation.transcript_hits",
)  # fmt: skip
_OF_THE_MODEL = ("untrained", "few_shot", "sft", "dpo")


@dataclasses.dataclass(frozen=True)
class Answered:
    """A baseline's scored answers to one part, and their description."""

    scored: Scored
    kind: str
    description: str
    cost: dict[str, Any] | None = None
    identity: str | None = None  # of the policy that answered, see generation.py


Baseline = Callable[[Recipe, Environment, Split, Scorer], Answered]


def run(recipe: Recipe, name: str, part: str) -> dict[str, Any]:
    """Answer one split with baseline ``name``, keep it in `output_dir`, and compare all systems of that folder.

    Returns the comparison. Raises UserError for an unknown name, a baseline that the task or the retriever has nothing
    for, an output folder that cannot be written, or one whose run was made with other settings.
    """
    if name != "raw" and name not in BASELINES:
        raise UserError(f"baseline {name!r}: choose from raw, {', '.join(BASELINES)}")
    folder = Path(recipe.output_dir)
    check_same_run(recipe, name)
    records.check_writable(records.folder_of(folder, part), "output_dir")
    env = open_environment(recipe)
    split = env.task.splits[part]
    known = all_metrics(folder, recipe, part)  # those beyond the recipe's are added from what is stored
    scorer = metric_scorer(env.scorer, recipe.evaluation.metrics)
    made = BASELINES[name](recipe, env, split, scorer) if name != "raw" else None
    # Written only now: a baseline that fails leaves the folder as it was.
    save_raw(folder, part, env, split, scorer)  # every comparison needs it
    if not (folder / "config.yaml").is_file():  # nothing is trained yet: the report says what this was
        write_atomically(folder / "evaluation" / "recipe.yaml", dump(absolute(recipe)))
    if made is not None:
        title = name.replace("_", " ") if name != "endpoint" else _endpoint_name(str(recipe.baselines.endpoint.model))
        about = (title, made.kind, made.description, made.cost, made.identity)
        records.save(folder, part, env, split, made.scored, *about)
    return compare_folder(folder, recipe, env, part, known)


def _endpoint_name(model: str) -> str:
    """What an endpoint's answers are called: never as another system of the folder."""
    ours = {compare.RAW, compare.TRAINED, *(name.replace("_", " ") for name in BASELINES)}
    return f"{model} (endpoint)" if model in ours else model


def check_same_run(recipe: Recipe, name: str) -> None:
    """Raise UserError where `output_dir` holds a run with other settings: its evaluation would be written over."""
    source = Path(recipe.output_dir) / "config.yaml"
    if not source.is_file():
        return
    run = load(source)
    was, now = (comparable(absolute(one)) for one in (run, recipe))
    for section in (*_OF_A_RUN, *(("model",) if name in _OF_THE_MODEL else ())):
        for key, before, here in differences(section, was[section], now[section]):
            if key.startswith(_FREE):
                continue
            raise UserError(
                f"{key}: {here!r}, and the run in {recipe.output_dir} has {before!r}: give {key} as the run has it, or "
                "choose another folder with output_dir=FOLDER"
            )
    if name in (*_OF_THE_MODEL, "endpoint") and _written(run) != _written(recipe):
        was, now = (_how_written(one) for one in (run, recipe))
        key = next((key for key in was if was[key] != now[key]), "grpo.use_vllm")
        raise UserError(
            f"{key}: {now[key]!r}, and the run in {recipe.output_dir} has {was[key]!r}, so that its policies write "
            f"otherwise: give {key} as the run has it, or choose another folder with output_dir=FOLDER"
        )


def _written(recipe: Recipe) -> Sampling:
    """How a policy writes, but for what changes no answer."""
    return dataclasses.replace(sampling_of(recipe), share=True)


def _how_written(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide how a policy writes, by name."""
    grpo = {f"grpo.{key}": recipe.grpo.get(key) for key in (*OPTIONS, "use_vllm")}
    return grpo | {"speed.end_at_answer": recipe.speed.end_at_answer}


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
    kind = recipe.retriever.kind
    # Retrievers that read histories are fitted on choices, or read no text. A user's own module may do otherwise.
    if kind in BACKENDS and env.reads_text and not env.fitted_on:
        raise UserError(
            f"retriever.kind: {kind!r} reads texts and no history, so that nothing would be found: take one that does, "
            "such as retriever.kind=ease, or the baseline last_title"
        )
    scored = score_raw(dataclasses.replace(split, queries=[""] * len(split)), scorer)
    return Answered(scored, "query", "the history alone, without a text")


def _popularity(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    order = np.argsort(-popularity(env.task), kind="stable")
    lists = [_first(order, own, _depth(recipe)) for own in _left_out(recipe, env.task, split)]
    note = ", without the history's own" if excludes_history(recipe, env.task) else ""
    return Answered(score_lists(lists, split, scorer), "list", f"most chosen in training first{note}")


def _random(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    rng = np.random.default_rng(recipe.seed)
    depth, n = _depth(recipe), len(env.task.catalog)
    lists = [_first(rng.permutation(n), own, depth) for own in _left_out(recipe, env.task, split)]
    return Answered(score_lists(lists, split, scorer), "list", f"documents in random order, seed {recipe.seed}")


def popularity(task: Task) -> np.ndarray:
    """(n,) how often each document was chosen in training: as the task counted, else as its training judgments say."""
    if task.counts is not None:
        return task.counts
    rows = [row for judged in task.train.rows for row in judged]
    return np.bincount(np.array(rows, np.int64), minlength=len(task.catalog))


def _left_out(recipe: Recipe, task: Task, split: Split) -> Sequence[tuple[int, ...]]:
    """What the list of each query leaves out: its history, by the same rule as a retriever's rankings."""
    return split.histories if excludes_history(recipe, task) and split.histories else [()] * len(split)


def _depth(recipe: Recipe) -> int:
    """How many documents of a list are kept: a shorter one would score less than it is worth."""
    names = [*recipe.evaluation.metrics, *recipe.rewards]
    return max([LIST_DEPTH, *(int(k) for _, _, k in (name.partition("@") for name in names) if k.isdigit())])


def _first(order: np.ndarray, left_out: Sequence[int], depth: int) -> list[int]:
    """The first ``depth`` documents of ``order`` that are not among ``left_out``."""
    return without(order[: depth + len(set(left_out))].tolist(), left_out)[:depth]


def _rm3(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    """Pseudo-relevance feedback by Lucene, over the same documents and queries; its BM25 is the recipe's."""
    config = dataclasses.replace(recipe.retriever, kind="lucene", params=_rm3_params(recipe), index=None)
    retriever = open_retriever(dataclasses.replace(recipe, retriever=config), env.task)
    scored = score_raw(split, Scorer(scorer.parse, retriever, scorer.rewards))
    # What it ranks is its own retriever's: kept as lists, since the run's retriever would rank its query otherwise.
    other = dataclasses.replace(env, retriever=retriever)
    return Answered(
        dataclasses.replace(scored, lists=records.ranked_rows(other, scored, _depth(recipe))),
        "list",
        "the raw query expanded by RM3 (Lucene)",
    )


def _rm3_params(recipe: Recipe) -> dict[str, Any]:
    """Lucene's parameters with RM3: the recipe's own, or k1, b and the language of its text retriever. Raises UserError
    where Lucene has no analyzer for that language."""
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
            f"baseline rm3: Lucene has no analyzer for retriever.params.language {code!r}: take another baseline"
        )
    return {**{key: given[key] for key in ("k1", "b") if key in given}, "language": code, **params}


def _untrained(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    asked = prompts(split, env.task.catalog, env.format)
    return _policy(recipe, asked, split, scorer, "untrained", recipe.model.name)


def _few_shot(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    count = recipe.baselines.few_shot
    _, format_ = examples(env.task.train, env.task.catalog, env.format, count)
    asked = prompts(split, env.task.catalog, format_)
    return _policy(recipe, asked, split, scorer, "few-shot", f"{recipe.model.name} with {count} examples")


def _policy(recipe: Recipe, asked: Sequence[Prompt], split: Split, scorer: Scorer, name: str, what: str) -> Answered:
    from rec_r1 import models

    answers, identity = answered(recipe, models.resolve(recipe.model.name), None, asked, name)
    what = f"{what}, {sampling_of(recipe).description}"
    return Answered(score_answers(answers, split, scorer), "policy", what, identity=identity)


def _endpoint(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    from rec_r1.generation.endpoint import Endpoint, answers

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
        extra=from_environment(config.extra, UserError, "baselines.endpoint.extra"),
        concurrency=config.concurrency,
        dollars_per_million=None if prices is None else (prices[0], prices[1]),
    )
    asked = prompts(split, env.task.catalog, env.format)
    texts, usage = answers(asked, endpoint, cache_folder() / "endpoint", config.model)
    texts = [up_to_end(text, sampling_of(recipe).end) for text in texts]
    scored = score_answers(texts, split, scorer)
    # What the answers cost, not what this call spent: those kept from an earlier one were paid for, too.
    cost = dataclasses.asdict(usage) | {"dollars": usage.dollars_all, "requests": usage.requests + usage.cached}
    return Answered(scored, "endpoint", f"{config.model} at {config.url}, zero-shot", cost)


def _sft(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    from rec_r1.baselines.sft_dpo import sft

    return _post_trained(recipe, env, split, scorer, "sft", sft(recipe, env))


def _dpo(recipe: Recipe, env: Environment, split: Split, scorer: Scorer) -> Answered:
    from rec_r1.baselines.sft_dpo import dpo

    return _post_trained(recipe, env, split, scorer, "dpo", dpo(recipe, env))


def _post_trained(
    recipe: Recipe, env: Environment, split: Split, scorer: Scorer, name: str, trained: tuple[Path, str]
) -> Answered:
    from rec_r1 import models

    weights, what = trained
    asked = prompts(split, env.task.catalog, env.format)
    answers, identity = answered(recipe, models.resolve(recipe.model.name), weights, asked, name)
    about = f"{recipe.model.name}, {what}, {sampling_of(recipe).description}"
    return Answered(score_answers(answers, split, scorer), "policy", about, identity=identity)


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
