"""Checks that the examples of sequential tasks do not leak targets, or the future. They guard against our own bugs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rec_r1.tasks.integrity import SPLITS

if TYPE_CHECKING:
    from rec_r1.tasks.sequences import Example, Interaction, Splitting


def check_set_apart(train: Sequence[Example], fit: Mapping[str, Sequence[Interaction]], params: Splitting) -> None:
    """Raise ValueError where a retriever would be fitted on the target of a training prompt, or on later interactions.

    With leave_one_out, the interactions of a user that are fitted on come before the user's first target. With
    global_time, all of them come before all targets. With by_user and published splits, no user is in both sets. The
    error is a ValueError, because it would be a bug of the toolkit.
    """
    latest = max((i.time for own in fit.values() for i in own), default=-math.inf)
    for e in train:
        own = fit.get(e.user, ())
        if params.split == "global_time":
            bad = e.time <= latest
        elif params.split == "leave_one_out":
            bad = e.place < len(own)
        else:
            bad = bool(own)
        if bad:
            raise ValueError(f"train example {e.id}: retrievers are fitted on its target or its user, or on later ones")


def check_no_leak(by_split: dict[str, list[Example]], params: Splitting) -> None:
    """Raise ValueError where a prompt shows its own target, or where the training data contain the future.

    In every example, the target is not in the history, and no item of the history is later than the target. With
    leave_one_out, each user's train examples come before the validation and test examples. With global_time, this is
    so for all users together. With by_user, no user is in two splits. The error is a ValueError, because it would be a
    bug of the toolkit.
    """
    for split, found in by_split.items():
        for e in found:
            if e.target in e.history:
                raise ValueError(f"{split} example {e.id}: its target is in its own history")
            if e.before > e.time:
                raise ValueError(f"{split} example {e.id}: its history is later than its target")
    if params.split == "leave_one_out":
        latest: dict[str, tuple[float, str]] = {}
        for split in SPLITS:
            for e in sorted(by_split[split], key=lambda e: e.time):
                when, where = latest.get(e.user, (e.time, split))
                if e.time < when:
                    raise ValueError(f"{split} example {e.id} is earlier than the same user's in {where}")
                latest[e.user] = (e.time, split)
    elif params.split == "global_time":
        for earlier, later in itertools.pairwise(SPLITS):
            if max(e.time for e in by_split[earlier]) >= min(e.time for e in by_split[later]):
                raise ValueError(f"the {earlier} split reaches into the time of {later}")
    elif params.split == "by_user":
        users = [{e.user for e in by_split[split]} for split in SPLITS]
        if users[0] & users[1] or users[0] & users[2] or users[1] & users[2]:
            raise ValueError("a user is in two splits")
