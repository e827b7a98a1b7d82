"""The verdict of a preflight, in one sentence."""

from __future__ import annotations

from typing import NamedTuple

from rec_r1.checks.preflight.groups import Groups, no_live_group, wilson
from rec_r1.evaluation.number_format import percent, signed
from rec_r1.evaluation.significance import bootstrap

SIGNAL, SPARSE, NOTHING = "there is signal", "sparse", "nothing to learn here with this policy"
SMALL_HEADROOM = 0.05  # A headroom below this is small, if the ranking metrics of the reward have weights of 1 in all.
MOST_EMPTY_STEPS = 0.05  # In a training with signal, at most this share of the steps has no live group.


class Verdict(NamedTuple):
    """A verdict.

    kind: SIGNAL, SPARSE or NOTHING.
    reason: the numbers that decided it, in words.
    """

    kind: str
    reason: str

    def sentence(self, setting: str | None) -> str:
        """The verdict as one sentence. setting: the first proposed setting, or None."""
        if self.kind == SIGNAL:
            return f"{self.kind}: {self.reason}"
        do = "change the prompt, the model or the data before you train"
        if self.kind == SPARSE:
            do = f"set {setting}" if setting else "ask more queries (--queries), or take another prompt or model"
        return f"{self.kind}: {self.reason}: {do}"


def judge(groups: Groups, prompts: int, scale: float = 1.0) -> Verdict:
    """The verdict on a recipe, from the groups under the reward that it trains on.

    The *headroom* of a prompt is what the best of its G completions earns more than their mean. Training makes the
    better completions of a group more likely, so the mean can rise at most about as far. The first rule that holds
    decides. Intervals of means are 95% bootstrap intervals over prompts, that of the share of live groups is Wilson's.

    1. NOTHING where no group is live.
    2. NOTHING where the best of G is not shown to earn more than the raw query: the interval of the difference is not
       above 0. Even a policy that always wrote its best completion would then not be better than no policy.
    3. NOTHING where the headroom is small: its interval is below SMALL_HEADROOM.
    4. SPARSE where more than MOST_EMPTY_STEPS of the steps would have no live group, and so no gradient, if the share
       of live groups is at the lower end of its interval: (1 - share) ^ prompts.
    5. SPARSE where the headroom is not shown to be above SMALL_HEADROOM.
    6. SIGNAL otherwise.

    The rules do not see whether the prompt tells which completion will be the best, so that it can be learnt, or
    whether the best one is mere luck. SMALL_HEADROOM was set after the trainings in tests/benchmarks/README.md.

    groups: the groups under the recipe's reward, of at least one prompt.
    prompts: the number of prompts of a step.
    scale: what a perfect ranking earns: the weights of the ranking metrics in the reward, or 1 where it has none.
    """
    gain, headroom = bootstrap(groups.best - groups.raw), bootstrap(groups.best - groups.mean)
    low, high = wilson(groups.live, groups.known)
    small, empty = SMALL_HEADROOM * scale, no_live_group(low, prompts)
    best = f"the best of {groups.values.shape[1]} completions"
    share = f"{percent(groups.share)} [{percent(low)}, {percent(high)}] of the groups are live"
    over_mean = f"{best} earns {_interval(headroom)} more than their mean"
    if not groups.live:
        return Verdict(NOTHING, f"none of {groups.known} groups is live")
    if not gain["low"] > 0:
        return Verdict(NOTHING, f"{best} is not shown to earn more than the raw query ({_interval(gain)})")
    if headroom["high"] < small:
        return Verdict(NOTHING, f"{over_mean}, which is less than {small:g}")
    if empty > MOST_EMPTY_STEPS:
        return Verdict(SPARSE, f"{share}, so that up to {percent(empty)} of the steps may have none")
    if headroom["low"] < small:
        return Verdict(SPARSE, f"{over_mean}, which is not shown to be more than {small:g}")
    return Verdict(SIGNAL, f"{share}, and {over_mean} and {_interval(gain)} more than the raw query")


def _interval(found: dict[str, float]) -> str:
    return f"{signed(found['mean'])} [{signed(found['low'])}, {signed(found['high'])}]"
