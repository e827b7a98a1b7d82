"""Make tasks whose splits were published with the data: a column or a file says to which split a line belongs.

Overlaps between the splits are logged, and not refused, because results on these splits are compared with published
ones.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

from rec_r1.config import UserError
from rec_r1.tasks.integrity import SPLITS
from rec_r1.tasks.sequences import PUBLISHED, Example, Interaction, Session, Splitting, in_order, make, shown_history
from rec_r1.tasks.types import Task
from retrievers import Catalog

logger = logging.getLogger(__name__)
NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "development": "validation", "test": "test", "testing": "test",
}  # fmt: skip


def split_of(given: object, where: str) -> str:
    """The split that one of its usual names means: train, validation or test.

    given: the name.
    where: file and line, for the message.

    Raises UserError for any other name.
    """
    split = NAMES.get(str(given).strip().casefold())
    if split is None:
        raise UserError(f"{where}: {given!r} names no split: choose from {', '.join(NAMES)}")
    return split


def from_interactions(name: str, catalog: Catalog, found: Sequence[tuple[Interaction, str]], params: Splitting) -> Task:
    """Make a task of interactions with times. Every interaction with a history is a target of its split.

    A history holds the earlier interactions of the user, except those of later splits.

    name: the name of the task.
    catalog: the items.
    found: pairs of an interaction and its split.
    params: the parameters of the task.

    Raises UserError where a split is empty.
    """
    by_user: dict[str, list[tuple[Interaction, str]]] = {}
    for interaction, split in found:
        by_user.setdefault(interaction.user, []).append((interaction, split))
    by_split: dict[str, list[Example]] = {split: [] for split in SPLITS}
    seen = {user: in_order([i for i, split in own if split == "train"], params) for user, own in by_user.items()}
    for own in by_user.values():
        for split, made in _examples(own, params).items():
            by_split[split] += made
    last = {user: own[-1].time for user, own in seen.items() if own}
    held_out = [*by_split["validation"], *by_split["test"]]
    early = sum(e.time < last.get(e.user, -math.inf) for e in held_out)
    if params.train_targets == "last":
        by_split["train"] = list({e.user: e for e in by_split["train"]}.values())
    return _make_task(name, catalog, by_split, seen, early, params)


def _examples(own: Sequence[tuple[Interaction, str]], params: Splitting) -> dict[str, list[Example]]:
    """The examples of one user, for each split. A place counts all interactions of the user, whatever their split."""
    places = {id(i): place for place, (i, _) in enumerate(sorted(own, key=lambda pair: pair[0].time))}
    split_of_id = {id(i): split for i, split in own}
    by_split: dict[str, list[Example]] = {}
    for number, split in enumerate(SPLITS):
        known = in_order([i for i, other in own if SPLITS.index(other) <= number], params)
        by_split[split] = [
            Example(
                f"{i.user}:{places[id(i)]}",
                i.user,
                places[id(i)],
                shown_history([earlier.row for earlier in known[:at]], params),
                i.row,
                known[at - 1].time,
                i.time,
            )
            for at, i in enumerate(known)
            if at and split_of_id[id(i)] == split
        ]
    return by_split


def from_sessions(name: str, catalog: Catalog, sessions: Sequence[Session], params: Splitting) -> Task:
    """Make a task of sessions. Every line is an example of its split.

    name: the name of the task.
    catalog: the items.
    sessions: the lines, in the order of the files.
    params: the parameters of the task.

    Raises UserError where a split is empty.
    """
    by_split: dict[str, list[Example]] = {split: [] for split in SPLITS}
    shown: dict[str, dict[int, Interaction]] = {}
    places: dict[str, int] = {}
    for line, (user, history, target, split, _) in enumerate(sessions, start=1):
        place = places[user] = places.get(user, -1) + 1
        kept = shown_history(history, params)
        by_split[split].append(Example(f"{user}:{place}", user, place, kept, target, float(line), float(line)))
        if split == "train":
            for row in (*history, target):
                shown.setdefault(user, {}).setdefault(row, Interaction(user, row, float(line)))
    if params.train_targets == "last":
        by_split["train"] = list({e.user: e for e in by_split["train"]}.values())
    seen = {user: list(own.values()) for user, own in shown.items()}
    return _make_task(name, catalog, by_split, seen, 0, params)


def _make_task(
    name: str,
    catalog: Catalog,
    by_split: dict[str, list[Example]],
    seen: Mapping[str, list[Interaction]],
    early: int,
    params: Splitting,
) -> Task:
    """Make the task, and log the users and examples that the splits have in common.

    seen: the training interactions of each user.
    early: how many held-out targets are older than the last training interaction of their user.

    The other arguments and the errors are those of :func:`rec_r1.tasks.sequences.make`.
    """
    users = {split: {e.user for e in found} for split, found in by_split.items()}
    examples = {split: {(e.history, e.target) for e in found} for split, found in by_split.items()}
    for split in ("validation", "test"):
        shared = users["train"] & users[split]
        common = examples["train"] & examples[split]
        logger.info("the published split: %d of %d %s users are in train too", len(shared), len(users[split]), split)
        if common:
            logger.warning(
                "the published split: %d of %d %s examples (history and target) are in train too",
                len(common), len(examples[split]), split,
            )  # fmt: skip
    if early:
        logger.warning(
            "the published split: %d held-out targets are older than their user's last training event, so the training "
            "data contain events from after these targets",
            early,
        )
    return make(name, catalog, by_split, seen, dataclasses.replace(params, split=PUBLISHED))
