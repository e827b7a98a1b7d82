"""A record of each training prompt's last groups: whether they were live, and otherwise why they were dead."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from rec_r1.scoring import Scorer
from rec_r1.scoring.earned import DEAD_CAUSES, LIVE, Earned, cause

STATE_KEY = "rec_r1.training.prompt_record"  # The key of the record among the callbacks' states in a checkpoint.


class PromptRecord(TrainerCallback):
    """Counts for each training query how many of its latest groups in a row were dead. 0 = the last one was live.

    The record is equal on all processes. Each checkpoint holds it, together with the record as it was when the current
    epoch began. That one decides the epoch's order (prompt_order.py), so a resumed run repeats the order.

    scorer: the Scorer of the training, which keeps the rewards of each batch for this record.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        scorer.keeps_earned = True
        self.dead: dict[str, int] = {}
        self.epoch, self.at_start = 0, dict[str, int]()
        self.last: dict[str, float] = {}  # The shares of live and dead groups, by cause, in the last generation.

    def when_began(self, epoch: int) -> dict[str, int]:
        """The counts as they were when ``epoch`` began. ``epoch`` is the current epoch or the one that begins now."""
        if epoch != self.epoch:
            self.epoch, self.at_start = epoch, dict(self.dead)
        return self.at_start

    def add(self, earned: Iterable[Earned]) -> None:
        """Update the counts with the completions of one generation, from all processes."""
        groups: dict[str, list[Earned]] = {}
        for one in earned:
            groups.setdefault(one.query_id, []).append(one)
        by_query = {query: found for query, group in groups.items() if (found := cause(group)) is not None}
        for query, found in by_query.items():
            self.dead[query] = 0 if found == LIVE else self.dead.get(query, 0) + 1
        causes = list(by_query.values())
        kinds = (LIVE, *DEAD_CAUSES)
        self.last = {f"groups/{kind}": causes.count(kind) / len(causes) for kind in kinds} if causes else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = state.stateful_callbacks.get(STATE_KEY)
        if kept is not None:  # The run was resumed.
            kept = copy.deepcopy(kept["attributes"])
            self.dead, self.epoch, self.at_start = kept["dead"], kept["epoch"], kept["at_start"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from accelerate.utils import gather_object

        earned = gather_object(self.scorer.take_earned())
        if earned:  # It is empty where a step uses the completions of an earlier one.
            self.add(earned)
        attributes = {"dead": self.dead, "epoch": self.epoch, "at_start": self.at_start}
        state.stateful_callbacks[STATE_KEY] = {"args": {}, "attributes": attributes}
