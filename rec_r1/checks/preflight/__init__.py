"""The command `preflight`: what a training could learn from, measured on completions of the untrained policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rewards
from rec_r1 import models
from rec_r1.checks.policy_check import check_policy
from rec_r1.checks.preflight import report
from rec_r1.checks.preflight.groups import Groups, groups_of
from rec_r1.checks.preflight.sampling import Sampled, draw, sample
from rec_r1.checks.preflight.settings import settings
from rec_r1.checks.preflight.verdict import NOTHING, SIGNAL, SPARSE, Verdict, judge
from rec_r1.checks.steps import Steps
from rec_r1.checks.validate import check_data, check_recipe, warnings
from rec_r1.config import Recipe, UserError
from rec_r1.environment import Environment, open_environment
from rec_r1.scoring.batch_summary import summary
from rec_r1.trl_options import check_vllm, steps_a_generation
from rewards import WeightedSum

QUERIES = 36  # So many training queries are asked. The quickstart then takes less than two minutes on two cores.
DEPTHS = {"ndcg": (10, 100, 1000), "recall": (10, 100, 1000), "mrr": (10,)}  # The metrics beside the recipe's reward.


def preflight(recipe: Recipe, queries: int = QUERIES, samples: int | None = None) -> Iterator[str]:
    """Measure what a training could learn from. Nothing is trained, and no file is written but an index in the cache.

        for line in preflight(rec_r1.load_recipe("quickstart")):
            print(line)

    recipe: the recipe.
    queries: how many training queries are asked. They are drawn from those that pass `task.train_filter`.
    samples: how many completions each query gets. None = `grpo.num_generations`.

    Yields the lines of the report. Raises what `check` raises, and UserError for fewer than one query or two samples.
    """
    if queries < 1:
        raise UserError(f"--queries must be at least 1, got {queries}")
    if samples is not None and samples < 2:
        raise UserError(f"--samples must be at least 2, because rewards are compared within a group, got {samples}")
    args = check_recipe(recipe)
    check_vllm(args)
    env = open_environment(recipe, trains=True)
    kept, steps = check_data(recipe, env, args)
    source = models.resolve(recipe.model.name)
    checked = check_policy(recipe, env, args, steps, source)
    for line in (*warnings(recipe, args, steps), *checked.warnings):
        yield f"warning      {line}"
    group, chosen = samples or args.num_generations, draw(kept, queries, recipe.seed)
    yield (
        f"preflight    the untrained {recipe.model.name} writes {group} completions for each of {len(chosen)} training "
        f"queries (of {len(kept)} that pass the filter), as in training; nothing is trained"
    )
    models.keep_freed_memory()
    at_once = args.per_device_train_batch_size * args.steps_per_generation
    yield from _report(recipe, args, env, steps, sample(recipe, env, chosen, group, source, at_once))


def _report(recipe: Recipe, args: Any, env: Environment, steps: Steps, sampled: Sampled) -> Iterator[str]:
    reward = env.scorer.rewards
    own = _groups(report.RECIPE, reward, sampled)
    others = {name: rewards.from_spec({name: 1.0}) for name in metrics(recipe, len(env.task.catalog))}
    yield from report.table([own, *(_groups(name, one, sampled) for name, one in others.items())])
    asked = [query for query in sampled.split.queries for _ in range(sampled.samples)]
    yield from report.completions(sampled, summary(sampled.scored, asked), args.max_completion_length)
    yield from report.steps(own, steps)
    yield from report.seconds(sampled, args, steps, steps_a_generation(args))
    found = judge(own, steps.prompts, scale(reward))
    wanted = (SIGNAL,) if found.kind == NOTHING else (SIGNAL, SPARSE)
    able = _other_rewards(reward, others, steps, sampled, wanted)
    proposed = list(settings(recipe, args, steps, own, {text: one for text, (one, _) in able.items()}, sampled))
    yield from report.proposals(proposed)
    better = next((one.text for one in proposed if one.text in able), None)
    if found.kind == NOTHING and better is not None:
        found = Verdict(SPARSE, f"{found.reason}; with {better}, {able[better][1].reason}")
    yield f"verdict      {found.sentence(proposed[0].text if proposed else None)}"


def _other_rewards(
    reward: WeightedSum, others: Mapping[str, WeightedSum], steps: Steps, sampled: Sampled, kinds: Sequence[str]
) -> dict[str, tuple[Groups, Verdict]]:
    """Further rewards with which the verdict is one of ``kinds``: `rewards.NAME=weight` -> groups and verdict."""
    weight, able = max(map(abs, reward.weights)), {}
    for name, one in others.items():
        text, added = f"rewards.{name}={weight:g}", plus(reward, one, weight)
        found = _groups(text, added, sampled)
        then = judge(found, steps.prompts, scale(added))
        if then.kind in kinds:
            able[text] = found, then
    return able


def metrics(recipe: Recipe, documents: int) -> list[str]:
    """The metrics that are measured beside the recipe's reward, such as ndcg@100.

    A depth at which every ranking ends earlier is left out, and so is what the recipe trains on alone.

    recipe: the recipe.
    documents: the size of the catalogue.
    """
    longest = {"items": recipe.format.max_items, "ranking": recipe.task.candidates}.get(recipe.format.action, documents)
    found = []
    for name, depths in DEPTHS.items():
        shallower = [0, *depths]
        found += [f"{name}@{k}" for k, before in zip(depths, shallower, strict=False) if before < longest]
    return [name for name in found if [name] != list(recipe.rewards)]


def plus(reward: WeightedSum, another: WeightedSum, weight: float) -> WeightedSum:
    """``reward`` as `rewards.NAME=weight` changes it: another one is added, or takes the place of that of its name."""
    given = zip(reward.names, reward.rewards, reward.weights, strict=True)
    kept = [(one, each) for name, one, each in given if name not in another.names]
    pairs = [*kept, *((one, weight) for one in another.rewards)]
    return WeightedSum(tuple(one for one, _ in pairs), tuple(each for _, each in pairs))


def scale(reward: WeightedSum) -> float:
    """What a perfect ranking earns in a reward: the sum of the weights of its ranking metrics, or 1 if it has none."""
    pairs = zip(reward.names, reward.weights, strict=True)
    return sum(weight for name, weight in pairs if name in reward.ranking_names) or 1.0


def _groups(name: str, reward: WeightedSum, sampled: Sampled) -> Groups:
    return groups_of(name, reward, sampled.scored.outcome, sampled.raw.outcome, sampled.split.ids)
