"""Settings that a preflight proposes, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from rec_r1.checks.preflight.groups import Groups, live_share_at_twice, no_live_group, wilson
from rec_r1.checks.preflight.sampling import Sampled
from rec_r1.checks.preflight.verdict import MOST_EMPTY_STEPS
from rec_r1.checks.steps import Steps
from rec_r1.config import Recipe
from rec_r1.evaluation.number_format import percent
from rec_r1.scoring.earned import LIVE
from rewards import RankingReward

RAW_BELOW = (0.2, 0.5, 1.0)  # The thresholds of the filter that are tried.
MANY_CLIPPED = 0.5  # More tokens are proposed where a larger share of the completions is clipped,
CLIPPED_AND_MALFORMED = 0.1  # or where a larger share is clipped and malformed, as an unfinished JSON is.


class Setting(NamedTuple):
    """A setting to copy.

    text: `key=value`, for the command line. Several are separated by blanks.
    reason: why, with the numbers.
    """

    text: str
    reason: str


def settings(
    recipe: Recipe, args: Any, steps: Steps, groups: Groups, with_another: Mapping[str, Groups], sampled: Sampled
) -> Iterator[Setting]:
    """The settings to copy, those that cost no time first.

    Another reward or a larger group is proposed where the share of live groups is then above the 95% interval of the
    recipe's own; a filter, where the interval of the prompts that it keeps is above the share of all.

    recipe: the recipe.
    args: its `trl.GRPOConfig`.
    steps: the steps of the training.
    groups: the groups of N prompts under its reward.
    with_another: further rewards as `key=value` -> the groups under the recipe's reward with that one added.
    sampled: the completions.
    """
    high = wilson(groups.live, groups.known)[1]
    if with_another:
        text, best = max(with_another.items(), key=lambda pair: pair[1].share)  # The first of equal ones.
        if best.share > high:
            yield Setting(text, f"{percent(best.share)} of the groups are live then, and {percent(groups.share)} now")
    yield from _filter(recipe, steps, groups, sampled)
    malformed = np.array([action is None for action in sampled.scored.actions])
    if sampled.clipped.mean() > MANY_CLIPPED or (sampled.clipped & malformed).mean() > CLIPPED_AND_MALFORMED:
        length = args.max_completion_length
        reason = f"{percent(sampled.clipped.mean())} of the completions have no end within {length} tokens"
        yield Setting(f"grpo.max_completion_length={2 * length}", reason)
    if groups.live and no_live_group(wilson(groups.live, groups.known)[0], steps.prompts) > MOST_EMPTY_STEPS:
        yield from _larger_steps(recipe, args, steps, groups, high)


def _filter(recipe: Recipe, steps: Steps, groups: Groups, sampled: Sampled) -> Iterator[Setting]:
    """A filter that leaves out prompts whose raw query already scores so well that their groups are dead."""
    given = recipe.task.train_filter
    raw = RankingReward("ndcg", given.k)(sampled.raw.outcome)
    live = np.array([cause == LIVE for cause in groups.causes])
    for below in RAW_BELOW:
        kept = raw < below
        fills_a_step = kept.mean() * steps.queries >= steps.prompts
        clearly = wilson(int(live[kept].sum()), int(kept.sum()))[0] > groups.share
        if below < given.raw_ndcg_below and fills_a_step and clearly:
            then, now = percent(live[kept].mean()), percent(groups.share)
            reason = f"{then} of the groups of these prompts are live, and {now} of all groups"
            yield Setting(f"task.train_filter.raw_ndcg_below={below:g}", reason)
            return


def _larger_steps(recipe: Recipe, args: Any, steps: Steps, groups: Groups, high: float) -> Iterator[Setting]:
    """More completions for each prompt, and more prompts, for a step that often has no live group."""
    prompts, size, group = recipe.prompts_per_step, args.per_device_train_batch_size, args.num_generations
    twice = live_share_at_twice(groups)
    if group == groups.values.shape[1] and twice > high:
        reason = f"about {percent(twice)} of the groups would be live (an estimate), at twice the completions a step"
        batch = "" if prompts is not None else f" grpo.per_device_train_batch_size={2 * size}"
        yield Setting(f"grpo.num_generations={2 * group}{batch}", reason)
    if groups.share < 1:
        factor = math.ceil(math.log(MOST_EMPTY_STEPS) / math.log(1 - groups.share) / steps.prompts)
        if factor > 1 and factor * steps.prompts <= steps.queries:
            reason = (
                f"of steps of {factor * steps.prompts} prompts, at most {percent(MOST_EMPTY_STEPS)} have no live group"
            )
            own = f"grpo.per_device_train_batch_size={factor * size}"
            yield Setting(own if prompts is None else f"prompts_per_step={factor * prompts}", reason)
