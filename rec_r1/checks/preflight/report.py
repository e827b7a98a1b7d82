"""The lines that a preflight prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rec_r1.checks.preflight.groups import Groups, live_share_at_twice, no_live_group, wilson
from rec_r1.checks.preflight.sampling import Sampled
from rec_r1.checks.preflight.settings import Setting
from rec_r1.checks.steps import Steps
from rec_r1.evaluation.number_format import number, percent
from rec_r1.prompts import sent
from rec_r1.prompts.structured import MALFORMED
from rec_r1.scoring.earned import DEAD_CAUSES

RECIPE = "the recipe's"  # The name of the recipe's reward in the table.


def table(rows: Sequence[Groups]) -> Iterator[str]:
    """A table with one row for each reward.

    It has the share of live groups with its 95% interval, the means over prompts of the group's mean, of its best
    completion and of the raw query, and the shares of dead groups by cause.

    rows: the groups of the same prompts under each reward.
    """
    causes = [cause.replace("_", " ") for cause in DEAD_CAUSES]
    best, heads = f"best of {rows[0].values.shape[1]}", "".join(f"{cause:>15}" for cause in causes)
    yield f"{'reward':<13}{'live groups':<17}{'mean':>6}{best:>12}{'raw query':>11}{heads}"
    for one in rows:
        low, high = wilson(one.live, one.known)
        share = f"{percent(one.share):>4} [{percent(low)}, {percent(high)}]"
        mean, top, raw = (number(float(np.nanmean(values))) for values in (one.mean, one.best, one.raw))
        dead = "".join(f"{percent(one.causes.count(cause) / max(1, one.known)):>15}" for cause in DEAD_CAUSES)
        yield f"{one.name:<13}{share:<17}{mean:>6}{top:>12}{raw:>11}{dead}"


def completions(sampled: Sampled, numbers: Mapping[str, float], limit: int) -> Iterator[str]:
    """Lines about the completions.

    sampled: the completions.
    numbers: what `batch_summary.summary` says of them.
    limit: `grpo.max_completion_length`.
    """
    actions, size = sampled.scored.actions, sampled.samples
    groups = [actions[start : start + size] for start in range(0, len(actions), size)]
    distinct = np.mean([len({sent(action) for action in group if action is not None}) for group in groups])
    yield (
        f"completions  {percent(numbers['scorer/malformed'])} malformed, {percent(sampled.clipped.mean())} clipped at "
        f"{limit} tokens, {sampled.lengths.mean():.1f} tokens on average"
    )
    shares = {name: numbers.get(f"scorer/malformed/{name}", 0.0) for name in MALFORMED}
    causes = [
        f"{name} {percent(shares[name])}" for name in sorted(MALFORMED, key=lambda one: -shares[one]) if shares[name]
    ]
    if causes:
        yield f"             malformed: {', '.join(causes)}"
    yield (
        f"             echo share {percent(numbers['scorer/echo'])}, {distinct:.1f} distinct actions in a group of "
        f"{size}, entropy {sampled.entropy:.2f} nats a token"
    )


def steps(groups: Groups, planned: Steps) -> Iterator[str]:
    """Lines about the live groups of a step, and about groups of twice the size.

    groups: the groups under the recipe's reward.
    planned: the steps of the training.
    """
    twice, n = 2 * groups.values.shape[1], planned.prompts
    low = wilson(groups.live, groups.known)[0]
    yield (
        f"steps        {groups.share * n:.1f} of the {n} groups of a step are live on average; "
        f"{percent(no_live_group(groups.share, n), 1)} of the steps have no live group (at most "
        f"{percent(no_live_group(low, n), 1)})"
    )
    yield f"             about {percent(live_share_at_twice(groups))} of groups of {twice} would be live (an estimate)"


def seconds(sampled: Sampled, args: Any, planned: Steps, steps_a_generation: int) -> Iterator[str]:
    """Lines about the time of the training, estimated from the seconds of the generation.

    sampled: the completions.
    args: the `trl.GRPOConfig`.
    planned: the steps of the training.
    steps_a_generation: how many steps use the completions of one generation.
    """
    written = len(sampled.lengths)
    step = sampled.seconds / written * args.per_device_train_batch_size * args.steps_per_generation / steps_a_generation
    engine = " (by transformers, not by vLLM)" if args.use_vllm else ""
    yield (
        f"time         generation{engine} takes {step:.1f} s a step, and {step * planned.total:.0f} s in "
        f"{planned.total} steps: estimated from {written} completions in {sampled.seconds:.0f} s"
    )
    yield "             not in it: the loss and its gradient, validation, and the evaluation on test"


def proposals(found: Sequence[Setting]) -> Iterator[str]:
    """Lines with the settings to copy, each with its reason."""
    if found:
        yield "settings to copy:"
    for setting in found:
        yield f"  {setting.text}    # {setting.reason}"
