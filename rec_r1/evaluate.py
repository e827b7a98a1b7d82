"""Held-out evaluation: greedy answers through the same Scorer as training, beside the raw query."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rewards
from rec_r1 import compare, plots, systems
from rec_r1.config import Recipe, UserError
from rec_r1.environment import Environment, open_environment
from rec_r1.grounding import list_ranks
from rec_r1.options import answer_tokens
from rec_r1.prompts import Action, Prompt
from rec_r1.scoring import Scored, Scorer
from rec_r1.systems import System
from rec_r1.tasks import Split, pad, prompts
from rewards import Outcome

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a policy answers: ``samples`` drawn a prompt at ``temperature`` and ``top_p``; one at 0 is greedy."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def render(prompt: Prompt, tokenizer: Any, chat_options: Mapping[str, Any]) -> list[int]:
    """Token ids of a prompt as TRL makes them: chat messages through the template, a string as it is."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_options
    )
    return list(encoded["input_ids"])


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int,
    chat_options: Mapping[str, Any] | None = None,
    progress: str | None = None,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """Completions of a causal LM (transformers, or PEFT around one), in the order of ``prompts``; of several samples
    those of a prompt follow each other.

    Batches are cut from the prompts sorted by length, so that little is padded.

    progress: what the bar is called; None = no bar. Greedy, it draws no random numbers, so training before and after
    an evaluation goes on as it would have without.
    """
    import torch
    from tqdm import tqdm

    ids = [render(prompt, tokenizer, chat_options or {}) for prompt in prompts for _ in range(sampling.samples)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    completions = [""] * len(ids)
    drawn = sampling.temperature > 0
    how: dict[str, Any] = {"do_sample": drawn, "temperature": None, "top_p": None, "top_k": None}
    if drawn:
        torch.manual_seed(sampling.seed)
        how |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    bar = tqdm(total=len(ids), desc=progress, unit=" queries", disable=progress is None)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt").to(model.device)
        with torch.no_grad():
            out = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                **how,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            completions[i] = text
        bar.update(len(chosen))
    bar.close()
    return completions


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
    return Scorer(scorer.parse, scorer.retriever, wanted, floor=scorer.floor, grounder=scorer.grounder)


def score_lists(lists: Sequence[Sequence[int]], split: Split, scorer: Scorer) -> Scored:
    """Rankings that were made without a retriever (popularity, say), by the scorer's rewards. lists: Q of rows."""
    targets, grades = pad(split.rows, split.grades)
    ranks = np.stack([list_ranks(rows, t) for rows, t in zip(lists, targets, strict=True)])
    actions: list[Action | None] = [Action("", "") for _ in lists]
    outcome = Outcome([""] * len(lists), actions, ranks, grades)
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
    outcome = Outcome(o.completions[first], o.actions[first], o.ranks[first], o.grades[first])
    components = {name: v.reshape(-1, samples).mean(axis=1) for name, v in scored.components.items()}
    total = scored.rewards.reshape(-1, samples).mean(axis=1)
    failed, lists, asked = scored.failed[first], scored.lists[first], scored.asked[first]
    return Scored(outcome, scored.actions[first], components, total, failed, lists, asked, scored.retrieval)


def answer(
    recipe: Recipe,
    source: str,
    weights: Path | None,
    asked: Sequence[Prompt],
    progress: str,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """What a policy writes: the model ``source`` as it was (``weights`` None), or with what training saved."""
    from rec_r1 import models

    tokenizer = models.load_tokenizer(source)
    model = models.load_policy_for_evaluation(source, recipe, weights)
    length = answer_tokens(recipe)
    options = recipe.grpo.get("chat_template_kwargs") or {}
    answers = generate(model, tokenizer, asked, length, recipe.evaluation.batch_size, options, progress, sampling)
    del model
    gc.collect()
    return answers


def score_answers(answers: Sequence[str], split: Split, scorer: Scorer, samples: int = 1) -> Scored:
    """Score ``samples`` answers a query, those of a query one after the other. Raises RetrieverError where the
    retriever fails for any."""
    repeated = split.take([q for q in range(len(split)) for _ in range(samples)]) if samples > 1 else split
    scored = scorer.score_split(answers, repeated).whole()
    return mean_of_samples(scored, samples) if samples > 1 else scored


def evaluate_run(
    folder: Path,
    part: str = "test",
    metrics: Sequence[str] | None = None,
    env: Environment | None = None,
    samples: int = 1,
) -> dict[str, Any]:
    """Raw query, untrained policy and the run's best checkpoint on one part; then everything that lies there compared.

    Greedily, or the mean of ``samples`` drawn as in training. Writes `evaluation/PART/`, see systems.py and compare.py.
    env: the run's environment where it is open already. Returns the comparison. Raises UserError where the folder
    holds no trained policy.
    """
    from rec_r1 import config, runs

    recipe = config.load(folder / "config.yaml")
    best = runs.best_policy(folder)
    env = env or open_environment(recipe)
    split = env.task.splits[part]
    shown = list(metrics or recipe.evaluation.metrics)
    # The recipe's own are kept beside those asked for: the baselines' rows have them.
    scorer = metric_scorer(env.scorer, list(dict.fromkeys([*shown, *recipe.evaluation.metrics])))
    source = runs.model_source(folder, recipe)
    asked = prompts(split, env.task.catalog, env.format)
    sampling = GREEDY if samples == 1 else sampling_of(recipe, samples)
    how = "greedy" if samples == 1 else f"mean of {samples} samples at temperature {sampling.temperature:g}"
    save_raw(folder, part, env, split, scorer)
    for policy, weights, what in (
        ("untrained", None, recipe.model.name),
        (compare.TRAINED, best, f"{best.relative_to(folder)}, step {runs.step_of(folder, best)}"),
    ):
        answers = answer(recipe, source, weights, asked, f"{policy} policy, {part}", sampling)
        scored = score_answers(answers, split, scorer, samples)
        systems.save(folder, part, env, split, scored, policy, "policy", f"{what}, {how}")
    return compare_folder(folder, recipe, env, part, shown, policy=str(best.relative_to(folder)))


def sampling_of(recipe: Recipe, samples: int) -> Sampling:
    """The training's own temperature and top_p."""
    return Sampling(samples, recipe.grpo.get("temperature", 1.0), recipe.grpo.get("top_p", 1.0), recipe.seed)


def save_raw(folder: Path, part: str, env: Environment, split: Split, scorer: Scorer) -> System:
    scored = score_raw(split, scorer)
    return systems.save(folder, part, env, split, scored, compare.RAW, "query", "the query as it is, no model")


def how_to(folder: Path, part: str) -> str:
    """The command that evaluates a run's part."""
    return f"rec-r1 eval {folder}" + (f" --split {part}" if part != "test" else "")


def check_against(others: Sequence[Path], part: str, split: Split) -> dict[str, System]:
    """The trained policies of other runs, by the names that a comparison calls them. A command asks before it lets
    policies write. Raises UserError where a run has no evaluation of the part, or one of other queries."""
    found = {}
    for name, other in zip(plots.names(others), others, strict=True):
        theirs = systems.load_all(other, part).get(compare.TRAINED)
        if theirs is None:
            raise UserError(f"--against {other}: no evaluation of its {part} part: run {how_to(other, part)} first")
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

    Raises UserError where another run has no evaluation of the part, or one of other queries.
    """
    split = env.task.splits[part]
    found = systems.load_all(folder, part, systems.belongs_to(env, split))
    order = [compare.TRAINED, compare.RAW, "untrained"]
    found = {name: found[name] for name in sorted(found, key=lambda n: (order.index(n) if n in order else 9, n))}
    found |= check_against(against, part, split)
    result = compare.compare(found, list(metrics), recipe.evaluation.mismatch_below)
    about = {"task": env.task.name, "retriever": recipe.retriever.kind, "policy": policy}
    compare.write(folder, part, found, result, about)
    return {**result, **about}
