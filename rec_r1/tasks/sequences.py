"""Make examples (history -> next item) of interactions, and split them so that training sees nothing of the future."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rec_r1.config import UserError
from rec_r1.tasks.integrity import SPLITS
from rec_r1.tasks.query_pools import limited, share
from rec_r1.tasks.splitting import Example, Interaction, Session, Splitting
from rec_r1.tasks.types import Split, Task
from retrievers import Catalog, Interactions

logger = logging.getLogger(__name__)
PUBLISHED = "published"  # The value of `Splitting.split` where the data have their own splits, see published.py.


def examples(name: str, catalog: Catalog, interactions: Sequence[Interaction], params: Splitting) -> Task:
    """Make a task of interactions with times.

    name: the name of the task.
    catalog: the items.
    interactions: the interactions, in any order.
    params: the parameters of the task.

    Raises UserError where a split is empty.
    """
    by_user: dict[str, list[Interaction]] = {}
    for interaction in interactions:
        by_user.setdefault(interaction.user, []).append(interaction)
    by_user = {user: in_order(own, params) for user, own in by_user.items()}
    params = dataclasses.replace(params, split=params.split or "leave_one_out")
    if params.split == "by_user":
        by_split = _by_user({user: _all(own, params) for user, own in by_user.items()}, params)
        seen = {user: own for user, own in by_user.items() if _split_of(user, params) == "train"}
    elif params.split == "global_time":
        by_split, first_held_out = _global_time({user: _all(own, params) for user, own in by_user.items()}, params)
        seen = {user: [i for i in own if i.time < first_held_out] for user, own in by_user.items()}
    else:
        by_split = _leave_one_out(by_user, params)
        # Users with fewer than three interactions have no held-out target: all their interactions are training data.
        seen = {user: own[:-2] if len(own) >= 3 else own for user, own in by_user.items()}
    return make(name, catalog, by_split, seen, params)


def in_order(own: Sequence[Interaction], params: Splitting) -> list[Interaction]:
    """One user's interactions sorted by time, and equal times by their order in the file.

    `Splitting.consecutive_repeats` says whether repeats are left out.
    """
    ordered = sorted(own, key=lambda interaction: interaction.time)
    if params.consecutive_repeats == "keep":
        return ordered
    return [next(run) for _, run in itertools.groupby(ordered, key=lambda interaction: interaction.row)]


def shown_history(rows: Sequence[int], params: Splitting) -> tuple[int, ...]:
    """The history that an example gets of all rows before its target, see `history` and `consecutive_repeats`."""
    kept = rows if params.consecutive_repeats == "keep" else [row for row, _ in itertools.groupby(rows)]
    return tuple(kept[-params.history :])


def from_sessions(name: str, catalog: Catalog, sessions: Iterable[Session], params: Splitting) -> Task:
    """Make a task of sessions. They have no times, so the number of the line is used as the time.

    With by_user and global_time, each line is an example. With leave_one_out, the lines of a user become one sequence,
    in which an item has the place where it appears first, and every item after the first is a target.

    name: the name of the task.
    catalog: the items.
    sessions: the lines, in the order of the file.
    params: the parameters of the task.

    Raises UserError where a split is empty, for global_time without `lines_in_order`, and where `lines_in_order` is
    set and the lines of a user are in another order.
    """
    by_user: dict[str, list[Example]] = {}
    latest: dict[str, str] = {}  # User -> file and line of the user's line before this one.
    for line, (user, history, target, _, where) in enumerate(sessions, start=1):
        own = by_user.setdefault(user, [])
        if params.lines_in_order and own and own[-1].target not in history:
            raise UserError(
                f"{where}: task.params.lines_in_order: the history of user {user!r} lacks the item that the user chose "
                f"in {latest[user]}, so the lines are in another order: leave lines_in_order out"
            )
        place, before, latest[user] = len(own), own[-1].time if own else 0.0, where
        kept = shown_history(history, params)
        own.append(Example(f"{user}:{place}", user, place, kept, target, before, float(line)))
    sequences = {}
    for user, own in by_user.items():
        shown: dict[int, float] = {}
        for e in own:
            for row in (*e.history, e.target):
                shown.setdefault(row, e.time)
        sequences[user] = [Interaction(user, row, time) for row, time in shown.items()]
    if params.split == "global_time":
        if not params.lines_in_order:
            raise UserError(
                "task.params.split: global_time: sessions have no times: use by_user or leave_one_out, or set "
                "task.params.lines_in_order=true if the lines of the file are in the order of time"
            )
        by_split, first_held_out = _global_time(by_user, params)
        seen = {user: [i for i in own if i.time < first_held_out] for user, own in sequences.items()}
        return make(name, catalog, by_split, seen, params)
    if params.split == "leave_one_out":
        return examples(name, catalog, [i for own in sequences.values() for i in own], params)
    params = dataclasses.replace(params, split="by_user")
    seen = {user: own for user, own in sequences.items() if _split_of(user, params) == "train"}
    return make(name, catalog, _by_user(by_user, params), seen, params)


def _all(own: Sequence[Interaction], params: Splitting, first: int = 1) -> list[Example]:
    """One example for each interaction from place ``first`` on, except a user's first one, which has no history.

    own: the interactions of one user, oldest first.
    """
    return [
        Example(
            f"{own[i].user}:{i}",
            own[i].user,
            i,
            tuple(interaction.row for interaction in own[max(0, i - params.history) : i]),
            own[i].row,
            own[i - 1].time,
            own[i].time,
        )
        for i in range(max(1, first), len(own))
    ]


def _train(found: list[Example], params: Splitting) -> list[Example]:
    """The training examples of one user that `Splitting.train_targets` keeps."""
    return found[-1:] if params.train_targets == "last" else found


def _leave_one_out(by_user: dict[str, list[Interaction]], params: Splitting) -> dict[str, list[Example]]:
    by_split: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for own in by_user.values():
        found = _all(own, params)
        if len(own) < 3:
            by_split["train"] += found
            continue
        by_split["test"].append(found[-1])
        if len(found) > 1:
            by_split["validation"].append(found[-2])
        by_split["train"] += _train(found[:-2], params)
    return by_split


def _global_time(by_user: dict[str, list[Example]], params: Splitting) -> tuple[dict[str, list[Example]], float]:
    """The examples of each split, and the time from which on targets are held out."""
    times = np.sort([e.time for found in by_user.values() for e in found])
    if not len(times):
        raise UserError("task: no user has two interactions, so that there is no history: give longer sequences")
    test_from = float(np.quantile(times, 1 - params.test_share, method="higher"))
    held_from = float(np.quantile(times, 1 - params.test_share - params.validation_share, method="higher"))
    by_split: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for found in by_user.values():
        by_split["train"] += _train([e for e in found if e.time < held_from], params)
        by_split["validation"] += [e for e in found if held_from <= e.time < test_from]
        by_split["test"] += [e for e in found if e.time >= test_from]
    return by_split, held_from


def _split_of(user: str, params: Splitting) -> str:
    """The split of a user, by a hash of the user's id. It does not depend on the other users in the file."""
    place = share(user, params.seed)
    if place < params.test_share:
        return "test"
    return "validation" if place < params.test_share + params.validation_share else "train"


def _by_user(by_user: dict[str, list[Example]], params: Splitting) -> dict[str, list[Example]]:
    by_split: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for user, found in by_user.items():
        split = _split_of(user, params)
        by_split[split] += _train(found, params) if split == "train" else found
    return by_split


def _set_apart(
    train: list[Example], seen: Mapping[str, list[Interaction]], params: Splitting
) -> tuple[list[Example], dict[str, list[Interaction]]]:
    """Divide the training data as `Splitting.fit_share` says.

    Returns the examples that remain for prompts, and the interactions of each user that retrievers are fitted on.
    """
    if params.split in ("by_user", PUBLISHED):
        fit = {user: own for user, own in seen.items() if share(user, params.seed + 1) < params.fit_share}
        return [e for e in train if e.user not in fit], fit
    if params.split == "global_time":
        moment = float(np.quantile([e.time for e in train], params.fit_share, method="higher")) if train else 0.0
        fit = {user: [i for i in own if i.time < moment] for user, own in seen.items()}
        return [e for e in train if e.time >= moment], fit
    fit = {user: own[: math.ceil(params.fit_share * len(own))] for user, own in seen.items()}
    return [e for e in train if e.place >= len(fit[e.user])], fit


def make(
    name: str,
    catalog: Catalog,
    by_split: dict[str, list[Example]],
    seen: Mapping[str, list[Interaction]],
    params: Splitting,
) -> Task:
    """Make a task of examples that are divided into splits.

    name: the name of the task.
    catalog: the items.
    by_split: split -> its examples.
    seen: user -> the training interactions, oldest first.
    params: the parameters of the task.

    Raises UserError where a split is empty.
    """
    counts = np.bincount([i.row for own in seen.values() for i in own], minlength=len(catalog)).astype(np.int64)
    fit = dict(seen)
    if params.fit_share:
        remaining, fit = _set_apart(by_split["train"], seen, params)
        by_split = by_split | {"train": remaining}
    kept: dict[str, list[Example]] = {}
    for split, found in by_split.items():
        # A target that is in its history need not be predicted, because the model could copy it from the prompt.
        new = [e for e in found if e.target not in e.history]
        if split != "train" and params.targets != "all":
            new = [e for e in new if (counts[e.target] == 0) == (params.targets == "inductive")]
        logger.info(
            "%s: %d of %d examples kept (%d repeat an item of their history)",
            split, len(new), len(found), sum(e.target in e.history for e in found),
        )  # fmt: skip
        kept[split] = limited(new, params.limits.get(split), params.seed)
        if not kept[split]:
            repeats = sum(e.target in e.history for e in found)
            raise UserError(
                f"task {name}: the {split} split is empty with split={params.split}, targets={params.targets}, "
                f"fit_share={params.fit_share:g} ({len(found)} examples, of which {repeats} repeat an item of their "
                "history): change these settings or the shares, give longer histories, or set "
                "task.params.consecutive_repeats=collapse if the log has every event twice"
            )
    check_no_leak(kept, params)
    if params.fit_share:
        check_set_apart(kept["train"], fit, params)
    titles = catalog.titles
    splits: dict[str, Any] = {split: _split(found, titles, counts, params) for split, found in kept.items()}
    held_out = splits["validation"].histories, [e.target for e in kept["validation"]]
    chosen = [[i.row for i in own] for own in fit.values() if own]
    interactions = Interactions.from_sequences(len(catalog), chosen, held_out)
    return Task(name, catalog, **splits, counts=counts, interactions=interactions, set_apart=params.fit_share > 0)


def check_set_apart(train: Sequence[Example], fit: Mapping[str, Sequence[Interaction]], params: Splitting) -> None:
    """Raise ValueError where a retriever would be fitted on the target of a training prompt, or on later interactions.

    With leave_one_out, the interactions of a user that are fitted on come before the user's first target. With
    global_time, all of them come before all targets. With by_user and published splits, no user has both. The error is
    a ValueError, because it would be a bug of the toolkit.
    """
    latest = max((i.time for own in fit.values() for i in own), default=-math.inf)
    for e in train:
        own = fit.get(e.user, ())
        if params.split in ("by_user", PUBLISHED):
            bad = bool(own)
        elif params.split == "global_time":
            bad = e.time <= latest
        else:
            bad = e.place < len(own)
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


def label(count: int, warm_from: int) -> str:
    """The label of a target that was chosen ``count`` times in training: cold, tail or warm, see `warm_from`."""
    return "cold" if count == 0 else "warm" if count >= warm_from else "tail"


def raw_query(titles: Sequence[str], history: Sequence[int], last: int) -> str:
    """The raw query of a history: the titles of its ``last`` items, oldest first."""
    return " ".join(titles[row] for row in history[-last:])


def _split(found: Sequence[Example], titles: Sequence[str], counts: np.ndarray, params: Splitting) -> Split:
    return Split(
        [e.id for e in found],
        [raw_query(titles, e.history, params.raw_titles) for e in found],
        [(e.target,) for e in found],
        [(1.0,) for _ in found],
        histories=[e.history for e in found],
        slices={"target": [label(counts[e.target], params.warm_from) for e in found]},
    )
