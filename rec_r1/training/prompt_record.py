"""What each training prompt last earned: which prompts still teach something, and why the others do not."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from transformers import TrainerCallback

from rec_r1.scoring import Scorer

LIVE = "live"
# Why a group teaches nothing: every completion earned the same, because …
CAUSES = ("all_malformed", "all_zero", "all_perfect", "all_equal")
STATE = "rec_r1.training.prompt_record"  # its place among the callbacks' states in a checkpoint


class Earned(NamedTuple):
    """One completion. reward: as the trainer got it, None where the retriever failed. quality: the first ranking
    metric of the rewards, NaN where there is none."""

    query_id: str
    reward: float | None
    malformed: bool
    quality: float


def cause(group: Sequence[Earned]) -> str | None:
    """LIVE where rewards differ, else one of CAUSES; None where fewer than two completions have a reward. The Scorer
    rounds rewards to multiples of 2^-20: those that are closer count as equal."""
    known = [one for one in group if one.reward is not None]
    if len(known) < 2:
        return None
    if len({one.reward for one in known}) > 1:
        return LIVE
    if all(one.malformed for one in known):
        return "all_malformed"
    if all(one.quality == 0 for one in known):
        return "all_zero"
    return "all_perfect" if all(one.quality > 1 - 1e-6 for one in known) else "all_equal"


class PromptRecord(TrainerCallback):
    """For every training query how many times in a row its completions all earned the same: 0 = they taught something.

    The same on every process, and in every checkpoint, with the record as it was when the running epoch began: that
    one decides the epoch's order (prompt_order.py), so that a resumed run repeats it.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        scorer.keeps_earned = True
        self.dead: dict[str, int] = {}
        self.epoch, self.at_start = 0, dict[str, int]()
        self.last: dict[str, float] = {}  # of the last generation: share of its groups by cause

    def when_began(self, epoch: int) -> dict[str, int]:
        """The record as it was when ``epoch``, which begins or goes on, began."""
        if epoch != self.epoch:
            self.epoch, self.at_start = epoch, dict(self.dead)
        return self.at_start

    def add(self, earned: Iterable[Earned]) -> None:
        """Take in what the completions of one generation earned, those of all processes."""
        groups: dict[str, list[Earned]] = {}
        for one in earned:
            groups.setdefault(one.query_id, []).append(one)
        found = {query: why for query, group in groups.items() if (why := cause(group)) is not None}
        for query, why in found.items():
            self.dead[query] = 0 if why == LIVE else self.dead.get(query, 0) + 1
        causes = list(found.values())
        self.last = {f"groups/{name}": causes.count(name) / len(causes) for name in (LIVE, *CAUSES)} if causes else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = state.stateful_callbacks.get(STATE)
        if kept is not None:  # resumed
            kept = copy.deepcopy(kept["attributes"])
            self.dead, self.epoch, self.at_start = kept["dead"], kept["epoch"], kept["at_start"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from accelerate.utils import gather_object

        earned = [Earned(*row) for row in gather_object(self.scorer.take_earned())]
        if earned:  # a step may use the completions of an earlier one
            self.add(earned)
        attributes = {"dead": self.dead, "epoch": self.epoch, "at_start": self.at_start}
        state.stateful_callbacks[STATE] = {"args": {}, "attributes": attributes}
