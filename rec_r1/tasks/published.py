"""A split that was published with the data is kept: each line's part is given, by a column or by its file.

Overlaps are logged, not refused: results on this split are compared with published ones.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

from rec_r1.config import UserError
from rec_r1.tasks.integrity import PARTS
from rec_r1.tasks.sequences import PUBLISHED, Example, Interaction, Session, Splitting, in_order, make, shown_history
from rec_r1.tasks.types import Task
from retrievers import Catalog

logger = logging.getLogger(__name__)
NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "development": "validation", "test": "test", "testing": "test",
}  # fmt: skip


def part_of(given: object, where: str) -> str:
    """train, validation or test, by any of its usual names. Raises UserError for any other."""
    part = NAMES.get(str(given).strip().casefold())
    if part is None:
        raise UserError(f"{where}: {given!r} names no split: choose from {', '.join(NAMES)}")
    return part


def from_interactions(name: str, catalog: Catalog, found: Sequence[tuple[Interaction, str]], params: Splitting) -> Task:
    """A task from interactions with times, each in a part: every one that has others before it is a target there.

    A history holds what its user chose before, in training only what training has, and held out what the parts before
    and its own have. Raises UserError where a part ends up empty.
    """
    by_user: dict[str, list[tuple[Interaction, str]]] = {}
    for interaction, part in found:
        by_user.setdefault(interaction.user, []).append((interaction, part))
    parts: dict[str, list[Example]] = {part: [] for part in PARTS}
    seen = {user: in_order([i for i, part in own if part == "train"], params) for user, own in by_user.items()}
    for own in by_user.values():
        for part, made in _examples(own, params).items():
            parts[part] += made
    last = {user: own[-1].time for user, own in seen.items() if own}
    held_out = [*parts["validation"], *parts["test"]]
    early = sum(e.time < last.get(e.user, -math.inf) for e in held_out)
    if params.train_targets == "last":
        parts["train"] = list({e.user: e for e in parts["train"]}.values())
    return _made(name, catalog, parts, seen, early, params)


def _examples(own: Sequence[tuple[Interaction, str]], params: Splitting) -> dict[str, list[Example]]:
    """One user's examples, by part; their places are those in all that the user chose."""
    places = {id(i): place for place, (i, _) in enumerate(sorted(own, key=lambda pair: pair[0].time))}
    part_of_id = {id(i): part for i, part in own}
    parts: dict[str, list[Example]] = {}
    for number, part in enumerate(PARTS):
        known = in_order([i for i, other in own if PARTS.index(other) <= number], params)
        parts[part] = [
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
            if at and part_of_id[id(i)] == part
        ]
    return parts


def from_sessions(name: str, catalog: Catalog, sessions: Sequence[Session], params: Splitting) -> Task:
    """A task from lines of sessions: each is an example of its part."""
    parts: dict[str, list[Example]] = {part: [] for part in PARTS}
    shown: dict[str, dict[int, Interaction]] = {}
    places: dict[str, int] = {}
    for line, (user, history, target, part, _) in enumerate(sessions, start=1):
        place = places[user] = places.get(user, -1) + 1
        kept = shown_history(history, params)
        parts[part].append(Example(f"{user}:{place}", user, place, kept, target, float(line), float(line)))
        if part == "train":
            for row in (*history, target):
                shown.setdefault(user, {}).setdefault(row, Interaction(user, row, float(line)))
    if params.train_targets == "last":
        parts["train"] = list({e.user: e for e in parts["train"]}.values())
    seen = {user: list(own.values()) for user, own in shown.items()}
    return _made(name, catalog, parts, seen, 0, params)


def _made(
    name: str,
    catalog: Catalog,
    parts: dict[str, list[Example]],
    seen: Mapping[str, list[Interaction]],
    early: int,
    params: Splitting,
) -> Task:
    """The task; and what the parts share, in the log. early: held-out targets older than their user's training."""
    users = {part: {e.user for e in found} for part, found in parts.items()}
    asked = {part: {(e.history, e.target) for e in found} for part, found in parts.items()}
    for part in ("validation", "test"):
        shared = users["train"] & users[part]
        alike = asked["train"] & asked[part]
        logger.info("the published split: %d of %d %s users are in train too", len(shared), len(users[part]), part)
        if alike:
            logger.warning(
                "the published split: %d of %d %s examples (history and target) are in train too",
                len(alike), len(asked[part]), part,
            )  # fmt: skip
    if early:
        logger.warning(
            "the published split: %d held-out targets are older than their user's last training event: training knows "
            "what came after them",
            early,
        )
    return make(name, catalog, parts, seen, dataclasses.replace(params, split=PUBLISHED))
