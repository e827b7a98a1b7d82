"""The baseline prompt_search: the best prompt for the untrained policy, found with as many rollouts as a training has.

The search begins with the recipe's prompt and with those of `prompts.PROMPTS` that fit. It changes one of its best
prompts (`prompt_changes.py`), and scores the policy's greedy completions by the recipe's reward, on the training
queries that the recipe's filter keeps. All prompts are scored on these queries in the same order, at first on a few: a
prompt that is behind the one that it comes from is given up. At the end the best prompts are compared on validation, as
the checkpoints of a training are.

It is a search like GEPA (arXiv:2507.19457), in which the policy itself writes new instructions. The package `gepa`
(0.1.4) is not used, because it stores the state of a search as a pickle.

All completions are in `search.jsonl` of the search's folder. A search that was stopped begins again with the same seed,
and takes the first completions from there.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rec_r1 import models, runs
from rec_r1.baselines import settings
from rec_r1.baselines.prompt_changes import Candidate, Shown, change, first_candidates, format_of, shows
from rec_r1.config import Recipe, UserError
from rec_r1.environment import Environment
from rec_r1.evaluation import budget
from rec_r1.evaluation.budget import Used
from rec_r1.evaluation.evaluate import metric_scorer, score_raw, validation_split
from rec_r1.generation import Sampling, generate, sampling_of, sampling_of_rollouts
from rec_r1.prompts import Format, Prompt
from rec_r1.tasks import Split, keep_headroom, prompts

logger = logging.getLogger(__name__)
FIRST = 32  # A prompt is scored on so many queries at first, and then on twice as many each time.
KEPT = 4  # So many of the best prompts are changed, and compared on validation at the end.
MOST_FAILURES = 50  # The search ends when so many changes in a row give no new prompt.
RESULT, LOG = "prompt.json", "search.jsonl"
Write = Callable[[Sequence[Prompt], Sampling], list[str]]


def found(recipe: Recipe, env: Environment) -> tuple[Format, Used]:
    """The prompt that a search finds, as a format, and what the search used. With the same settings it is made once.

    recipe: the recipe. Its output_dir gets the folder `baselines/prompt_search`.
    env: its task, format and Scorer.

    Raises UserError where that folder holds a search with other settings, and RetrieverError where the retriever fails.
    """
    folder = Path(recipe.output_dir) / "baselines" / "prompt_search"
    if settings.is_made(folder, recipe, "prompt_search") and (folder / RESULT).is_file():
        logger.info("a prompt was already found with these settings: %s", folder / RESULT)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        settings.write(folder, recipe, "prompt_search")
        _search(recipe, env, folder)
    result = runs.read_json(folder / RESULT, "delete its folder")
    try:
        best = Candidate(result["template"], tuple((identifier, text) for identifier, text in result["examples"]))
        return format_of(best, env), budget.read(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / RESULT}: damaged ({error!r}): delete its folder") from error


class Rollouts:
    """Scores prompts on training queries, and counts the completions.

    recipe: the recipe.
    env: its task, format and Scorer.
    split: the N training queries, in the order in which every prompt is scored on them.
    log: the file of all completions. Those of an earlier search are read from it.
    write: writes a completion for each prompt.
    bar: a progress bar.
    """

    def __init__(self, recipe: Recipe, env: Environment, split: Split, log: Path, write: Write, bar: Any) -> None:
        self.env, self.split, self.log, self.write, self.bar = env, split, log, write, bar
        self.greedy, self.drawn = sampling_of(recipe), sampling_of_rollouts(recipe)
        self.rewards: dict[Candidate, np.ndarray] = {}  # Those on the first queries, as many as have been scored.
        self.shown: dict[Candidate, list[Shown]] = {}
        self.best: dict[str, Shown] = {}  # Each query's best completion that earns more than the raw query.
        self.raw = score_raw(split, env.scorer).rewards
        self.count, self.seconds = 0, 0.0
        earlier = runs.read_rows(log) if log.is_file() else []
        # Without an incomplete last line, which a killed process may have left.
        runs.write_atomically(log, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in earlier))
        self.earlier = iter(earlier)

    def score(self, candidate: Candidate, size: int) -> np.ndarray:
        """(size,) rewards of a prompt on the first ``size`` queries. NaN = the prompt shows the query as an example."""
        known = self.rewards.get(candidate, np.zeros(0))
        places = list(range(len(known), size))
        if places:
            share = self.split.take(places)
            texts = self._written(prompts(share, self.env.task.catalog, format_of(candidate, self.env)), self.greedy)
            scored = self.env.scorer.score_split(texts, share).whole()
            for j, place in enumerate(places):
                one = Shown(share.ids[j], share.queries[j], texts[j].strip(), float(scored.rewards[j]))
                self.shown.setdefault(candidate, []).append(one)
                before = self.best.get(one.query_id)
                if one.reward > (before.reward if before else self.raw[place]):
                    self.best[one.query_id] = one
            own = np.where(shows(candidate, self.split, places), np.nan, scored.rewards)
            self.rewards[candidate] = known = np.concatenate([known, own])
        return known[:size]

    def needs(self, candidate: Candidate, size: int) -> int:
        """How many more completions :func:`score` would write."""
        return max(0, size - len(self.rewards.get(candidate, ())))

    def ask(self, prompt: Prompt, tokens: int) -> str:
        """A sampled completion of at most ``tokens`` tokens. It counts as a rollout, too."""
        options = {**self.drawn.options, "max_new_tokens": tokens}
        return self._written([prompt], Sampling(options, self.drawn.chat, seed=self.count))[0]

    def _written(self, asked: Sequence[Prompt], sampling: Sampling) -> list[str]:
        row = next(self.earlier, None)
        if row is None:
            started = time.monotonic()
            texts = self.write(asked, sampling)
            row = {"prompts": list(asked), "completions": texts, "seconds": time.monotonic() - started}
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        elif row.get("prompts") != list(asked) or len(row.get("completions", ())) != len(asked):
            raise UserError(f"{self.log}: it belongs to another search: delete its folder, and the search begins again")
        self.count += len(asked)
        self.seconds += float(row["seconds"])
        self.bar.update(len(asked))
        return list(row["completions"])


def climb(rollouts: Rollouts, begin: Sequence[Candidate], most: int, rng: np.random.Generator) -> list[Candidate]:
    """Search with at most ``most`` rollouts.

    rollouts: scores the prompts.
    begin: the first prompts. The first of them is scored on all queries in any case.
    rng: draws the prompts that are changed, and the changes.

    Returns the prompts that were scored on all queries, best first.
    """
    whole = len(rollouts.split)
    rollouts.score(begin[0], whole)
    ended = [begin[0]]
    waiting = list(begin[1:])
    failures = 0
    while rollouts.count + min(FIRST, whole) < most and failures < MOST_FAILURES:
        parent = begin[0] if waiting else best_first(rollouts, ended)[int(rng.integers(min(KEPT, len(ended))))]
        good, bad = list(rollouts.best.values()), rollouts.shown[parent]
        child = waiting.pop(0) if waiting else change(parent, good, bad, rollouts.env, rollouts.ask, rng)
        if child is None or child in rollouts.rewards:
            failures += 1
            continue
        failures = 0
        if _is_ahead(rollouts, child, parent, most):
            ended.append(child)
    return best_first(rollouts, ended)


def _is_ahead(rollouts: Rollouts, child: Candidate, parent: Candidate, most: int) -> bool:
    """Whether a prompt earns at least as much as its parent on all queries. It is given up as soon as it earns less."""
    size, whole = 0, len(rollouts.split)
    while size < whole:
        size = min(whole, max(FIRST, 2 * size))
        if rollouts.count + rollouts.needs(child, size) > most:
            return False
        difference = rollouts.score(child, size) - rollouts.score(parent, size)
        if np.nansum(difference) < 0:
            return False
    return True


def best_first(rollouts: Rollouts, ended: Sequence[Candidate]) -> list[Candidate]:
    """Prompts by their mean reward. Of equals the earlier one is first."""
    return sorted(ended, key=lambda one: -(mean_reward(rollouts.rewards[one]) or 0.0))


def mean_reward(rewards: np.ndarray) -> float | None:
    """The mean over the queries that a prompt does not show. None = it shows them all."""
    known = rewards[~np.isnan(rewards)]
    return float(known.mean()) if len(known) else None


def _search(recipe: Recipe, env: Environment, folder: Path) -> None:
    """Search for a prompt, and write it with all that were compared into ``folder``."""
    from tqdm import tqdm

    rng = np.random.default_rng(recipe.seed)
    kept = keep_headroom(env.task.train, env.retriever, recipe.task.train_filter)
    most = recipe.baselines.search_rollouts or budget.of_training(recipe, len(kept))
    # With few rollouts, fewer queries are used, so that several prompts can be scored on all of them.
    split = kept.take(rng.permutation(len(kept))[: max(1, most // (2 * KEPT))].tolist())
    source = models.resolve(recipe.model.name)
    tokenizer = models.load_tokenizer(source, recipe.model.trust_remote_code)
    policy = models.load_policy_for_evaluation(source, recipe, None)

    def write(asked: Sequence[Prompt], sampling: Sampling) -> list[str]:
        return generate(policy, tokenizer, asked, sampling, recipe.evaluation.batch_size)

    logger.info("searching for a prompt with %d rollouts on %d training queries, into %s", most, len(split), folder)
    quiet = bool(recipe.grpo.get("disable_tqdm"))
    with tqdm(total=most, desc="prompt search", unit=" rollouts", disable=quiet) as bar:
        rollouts = Rollouts(recipe, env, split, folder / LOG, write, bar)
        begin = first_candidates(env.format)
        ranked = climb(rollouts, begin, most, rng)
    compared = ranked[:KEPT]
    scores = [_on_validation(recipe, env, format_of(one, env), write) for one in compared]
    best = compared[int(np.argmax(scores))]  # Of equals the first, which earned more in the search.
    logger.info(
        "%d prompts were tried, and %s is the best on validation (%s %.4f)", len(rollouts.rewards),
        "the recipe's own" if best == begin[0] else "another than the recipe's", recipe.evaluation.metrics[0],
        max(scores),
    )  # fmt: skip
    tried = [
        {**one._asdict(), "reward": mean_reward(rollouts.rewards[one]), "validation": score}
        for one, score in zip(compared, scores, strict=True)
    ]
    budget.write(folder, Used(rollouts.count, rollouts.seconds))
    content = {**best._asdict(), "tried": len(rollouts.rewards), "compared": tried}
    runs.write_atomically(folder / RESULT, json.dumps(content, indent=1, ensure_ascii=False))


def _on_validation(recipe: Recipe, env: Environment, format_: Format, write: Write) -> float:
    """The mean score of a prompt on validation, in the metric that picks the best checkpoint of a training."""
    split = validation_split(recipe, env)
    texts = write(prompts(split, env.task.catalog, format_), sampling_of(recipe))
    scorer = metric_scorer(env.scorer, recipe.evaluation.metrics[:1])
    return float(np.nanmean(scorer.score_split(texts, split).whole().rewards))
