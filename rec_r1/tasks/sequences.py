"""From interactions to examples (history -> next item), split without letting the future into the past."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rec_r1.config import UserError
from rec_r1.tasks.integrity import PARTS
from rec_r1.tasks.query_pools import check_limits, limited, share
from rec_r1.tasks.types import Split, Task
from retrievers import Catalog, Interactions

logger = logging.getLogger(__name__)
SPLITS = ("leave_one_out", "global_time", "by_user")
PUBLISHED = "published"  # the parts are the data's own, see published.py


@dataclass(frozen=True)
class Splitting:
    """How examples are made and split."""

    # leave_one_out: the last item of each user is for test, the one before it for validation. global_time: two
    # moments split the choices of all users, so that training knows nothing of later ones. by_user: each user is
    # in one split. null: by_user for sessions, which have no times, else leave_one_out.
    split: str | None = None
    # For sessions: whether the lines of the file are in the order of time, as far as days or hours go. global_time
    # then splits by line, and an item counts as chosen when a history shows it first.
    lines_in_order: bool = False
    # The share of the time (global_time) or of the users (by_user) that is for validation.
    validation_share: float = 0.1
    test_share: float = 0.1  # The share that is for test.
    # The share of the training choices, the earliest, or of the training users (by_user), that recommenders are
    # fitted on. Prompts are made of the others, so that the recommender has not seen what a prompt asks for. 0: it
    # is fitted on all of them, which is for evaluations and not for rewards.
    fit_share: float = 0.0
    # Whether an item that a user chooses several times in a row stays in the history as often (keep) or once
    # (collapse). A target is in no history either way.
    consecutive_repeats: str = "keep"
    # Which held-out targets are kept: all, inductive (training never shows them) or transductive (it does).
    targets: str = "all"
    # all: every item after the first is a target of a training prompt. last: only the last one is.
    train_targets: str = "all"
    # How many items before the target are kept. `format.titles` says how many of them a prompt shows.
    history: int = 50
    raw_titles: int = 1  # The raw query is the last so many titles of the history.
    # The slices by target: cold (training never shows it), warm (at least so often) and tail (in between).
    warm_from: int = 5
    # At most so many examples of a split are drawn: {train: 1000, validation: 200, test: 200}.
    limits: dict[str, int] = field(default_factory=dict)
    # Whether interactions with items that are not in the catalogue are left out instead of refused.
    drop_unknown: bool = False
    seed: int = 0  # The seed of what is drawn.

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        for name, given, choices in (
            ("split", self.split, (None, *SPLITS)),
            ("targets", self.targets, ("all", "inductive", "transductive")),
            ("train_targets", self.train_targets, ("all", "last")),
            ("consecutive_repeats", self.consecutive_repeats, ("keep", "collapse")),
        ):
            if given not in choices:
                raise UserError(f"task.params.{name}: {given!r}: choose from {', '.join(filter(None, choices))}")
        for name in ("history", "raw_titles", "warm_from"):
            if getattr(self, name) < 1:
                raise UserError(f"task.params.{name} must be at least 1, got {getattr(self, name)}")
        if min(self.validation_share, self.test_share) <= 0 or self.validation_share + self.test_share >= 1:
            raise UserError(
                f"task.params: validation_share {self.validation_share} and test_share {self.test_share} must be above "
                "0 and leave something for training: 0.1 each is usual"
            )
        if not 0 <= self.fit_share < 1:
            raise UserError(f"task.params.fit_share: {self.fit_share}: at least 0 and below 1, 0.5 is usual")
        check_limits(self.limits)


class Interaction(NamedTuple):
    user: str
    row: int
    time: float


class Session(NamedTuple):
    """A line of a file of sessions. history: rows, oldest first; target: the row chosen next; part: as the data say, ""
    where they do not; where: file and line, for messages."""

    user: str
    history: tuple[int, ...]
    target: int
    part: str
    where: str


class Example(NamedTuple):
    """history: rows, oldest first. place: the target's, in all its user chose. before, time: when the history's last
    item and the target were chosen."""

    id: str
    user: str
    place: int
    history: tuple[int, ...]
    target: int
    before: float
    time: float


def examples(name: str, catalog: Catalog, interactions: Sequence[Interaction], params: Splitting) -> Task:
    """A task from interactions with times. Raises UserError where a part ends up empty."""
    by_user: dict[str, list[Interaction]] = {}
    for interaction in interactions:
        by_user.setdefault(interaction.user, []).append(interaction)
    by_user = {user: in_order(own, params) for user, own in by_user.items()}
    params = dataclasses.replace(params, split=params.split or "leave_one_out")
    if params.split == "by_user":
        parts = _by_user({user: _all(own, params) for user, own in by_user.items()}, params)
        seen = {user: own for user, own in by_user.items() if _part_of(user, params) == "train"}
    elif params.split == "global_time":
        parts, first_held_out = _global_time({user: _all(own, params) for user, own in by_user.items()}, params)
        seen = {user: [i for i in own if i.time < first_held_out] for user, own in by_user.items()}
    else:
        parts = _leave_one_out(by_user, params)
        # Users with fewer than three interactions give no held-out target, and all of theirs is training.
        seen = {user: own[:-2] if len(own) >= 3 else own for user, own in by_user.items()}
    return make(name, catalog, parts, seen, params)


def in_order(own: Sequence[Interaction], params: Splitting) -> list[Interaction]:
    """One user's interactions by time, equal times in the file's order; see `Splitting.consecutive_repeats`."""
    ordered = sorted(own, key=lambda interaction: interaction.time)
    if params.consecutive_repeats == "keep":
        return ordered
    return [next(run) for _, run in itertools.groupby(ordered, key=lambda interaction: interaction.row)]


def shown_history(rows: Sequence[int], params: Splitting) -> tuple[int, ...]:
    """What an example keeps of the rows before its target."""
    kept = rows if params.consecutive_repeats == "keep" else [row for row, _ in itertools.groupby(rows)]
    return tuple(kept[-params.history :])


def from_sessions(name: str, catalog: Catalog, sessions: Iterable[Session], params: Splitting) -> Task:
    """A task from lines of sessions, which have no times: the line number serves as the time.

    Split by user or by line, each line is an example. Left one out, a user's lines are put together to one sequence
    (each item at the place where it is named first), and every item after the first is a target. Raises UserError as
    `examples`, and where lines that are said to be in order are not.
    """
    by_user: dict[str, list[Example]] = {}
    latest: dict[str, str] = {}  # user -> where their line before this one is
    for line, (user, history, target, _, where) in enumerate(sessions, start=1):
        own = by_user.setdefault(user, [])
        if params.lines_in_order and own and own[-1].target not in history:
            raise UserError(
                f"{where}: task.params.lines_in_order: the history of user {user!r} lacks what {latest[user]} says "
                "they chose: the lines are in another order: leave lines_in_order out"
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
                "task.params.split: global_time: sessions have no times: take by_user or leave_one_out, or set "
                "task.params.lines_in_order=true where the file's lines are in the order of time"
            )
        parts, first_held_out = _global_time(by_user, params)
        seen = {user: [i for i in own if i.time < first_held_out] for user, own in sequences.items()}
        return make(name, catalog, parts, seen, params)
    if params.split == "leave_one_out":
        return examples(name, catalog, [i for own in sequences.values() for i in own], params)
    params = dataclasses.replace(params, split="by_user")
    seen = {user: own for user, own in sequences.items() if _part_of(user, params) == "train"}
    return make(name, catalog, _by_user(by_user, params), seen, params)


def _all(own: Sequence[Interaction], params: Splitting, first: int = 1) -> list[Example]:
    """One example for each interaction from place ``first`` on that has one before it."""
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
    return found[-1:] if params.train_targets == "last" else found


def _leave_one_out(by_user: dict[str, list[Interaction]], params: Splitting) -> dict[str, list[Example]]:
    parts: dict[str, list[Example]] = {part: [] for part in PARTS}
    for own in by_user.values():
        found = _all(own, params)
        if len(own) < 3:
            parts["train"] += found
            continue
        parts["test"].append(found[-1])
        if len(found) > 1:
            parts["validation"].append(found[-2])
        parts["train"] += _train(found[:-2], params)
    return parts


def _global_time(by_user: dict[str, list[Example]], params: Splitting) -> tuple[dict[str, list[Example]], float]:
    """The parts, and the moment from which on targets are held out."""
    times = np.sort([e.time for found in by_user.values() for e in found])
    if not len(times):
        raise UserError("task: no user has two interactions: nothing can be predicted from a history")
    test_from = float(np.quantile(times, 1 - params.test_share, method="higher"))
    held_from = float(np.quantile(times, 1 - params.test_share - params.validation_share, method="higher"))
    parts: dict[str, list[Example]] = {part: [] for part in PARTS}
    for found in by_user.values():
        parts["train"] += _train([e for e in found if e.time < held_from], params)
        parts["validation"] += [e for e in found if held_from <= e.time < test_from]
        parts["test"] += [e for e in found if e.time >= test_from]
    return parts, held_from


def _part_of(user: str, params: Splitting) -> str:
    """The part a user belongs to, by a hash of the name: the same whatever the file's order, or other users in it."""
    place = share(user, params.seed)
    if place < params.test_share:
        return "test"
    return "validation" if place < params.test_share + params.validation_share else "train"


def _by_user(by_user: dict[str, list[Example]], params: Splitting) -> dict[str, list[Example]]:
    parts: dict[str, list[Example]] = {part: [] for part in PARTS}
    for user, found in by_user.items():
        part = _part_of(user, params)
        parts[part] += _train(found, params) if part == "train" else found
    return parts


def _set_apart(
    train: list[Example], seen: Mapping[str, list[Interaction]], params: Splitting
) -> tuple[list[Example], dict[str, list[Interaction]]]:
    """The training examples that remain, and what history backends are fitted on: see `Splitting.fit_share`."""
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
    parts: dict[str, list[Example]],
    seen: Mapping[str, list[Interaction]],
    params: Splitting,
) -> Task:
    """The task of examples in parts. seen: all that training knows, by user. Raises UserError where a part ends up
    empty."""
    counts = np.bincount([i.row for own in seen.values() for i in own], minlength=len(catalog)).astype(np.int64)
    fit = dict(seen)
    if params.fit_share:
        remaining, fit = _set_apart(parts["train"], seen, params)
        parts = parts | {"train": remaining}
    kept: dict[str, list[Example]] = {}
    for part, found in parts.items():
        # A target that the history shows is no prediction: a repeated purchase could be copied from the prompt.
        new = [e for e in found if e.target not in e.history]
        if part != "train" and params.targets != "all":
            new = [e for e in new if (counts[e.target] == 0) == (params.targets == "inductive")]
        logger.info(
            "%s: %d of %d examples kept (%d repeat an item of their history)",
            part, len(new), len(found), sum(e.target in e.history for e in found),
        )  # fmt: skip
        kept[part] = limited(new, params.limits.get(part), params.seed)
        if not kept[part]:
            repeats = sum(e.target in e.history for e in found)
            raise UserError(
                f"task {name}: the {part} split is empty with split={params.split}, targets={params.targets}, "
                f"fit_share={params.fit_share:g} ({len(found)} examples, of which {repeats} repeat an item of their "
                "history): change them or the shares, give longer histories, or set "
                "task.params.consecutive_repeats=collapse where a log says everything twice"
            )
    check_no_leak(kept, params)
    if params.fit_share:
        check_set_apart(kept["train"], fit, params)
    titles = catalog.titles
    splits: dict[str, Any] = {part: _split(found, titles, counts, params) for part, found in kept.items()}
    held_out = splits["validation"].histories, [e.target for e in kept["validation"]]
    chosen = [[i.row for i in own] for own in fit.values() if own]
    interactions = Interactions.from_sequences(len(catalog), chosen, held_out)
    return Task(name, catalog, **splits, counts=counts, interactions=interactions, set_apart=params.fit_share > 0)


def check_set_apart(train: Sequence[Example], fit: Mapping[str, Sequence[Interaction]], params: Splitting) -> None:
    """Raise ValueError where a backend would be fitted on a training prompt's target, or on what came after it.

    leave_one_out: of every user, what is fitted on comes before the first target; global_time: the same for everybody;
    by_user and a published split: no user stands on both sides. A ValueError: it would be a bug in this toolkit.
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
            raise ValueError(f"train example {e.id}: history backends are fitted on its target's time, or its user")


def check_no_leak(parts: dict[str, list[Example]], params: Splitting) -> None:
    """Raise ValueError where an example shows what it asks for, or training knows what comes after.

    Of every example: the target is not in the history, and no item of the history is later than it. Between the parts:
    leave_one_out: of every user, train before validation before test; global_time: the same for everybody; by_user:
    no user stands in two parts. A ValueError: it would be a bug in this toolkit.
    """
    for part, found in parts.items():
        for e in found:
            if e.target in e.history:
                raise ValueError(f"{part} example {e.id}: its target is in its own history")
            if e.before > e.time:
                raise ValueError(f"{part} example {e.id}: its history is later than its target")
    if params.split == "leave_one_out":
        latest: dict[str, tuple[float, str]] = {}
        for part in PARTS:
            for e in sorted(parts[part], key=lambda e: e.time):
                when, where = latest.get(e.user, (e.time, part))
                if e.time < when:
                    raise ValueError(f"{part} example {e.id} is earlier than the same user's in {where}")
                latest[e.user] = (e.time, part)
    elif params.split == "global_time":
        for earlier, later in itertools.pairwise(PARTS):
            if max(e.time for e in parts[earlier]) >= min(e.time for e in parts[later]):
                raise ValueError(f"the {earlier} split reaches into the time of {later}")
    elif params.split == "by_user":
        users = [{e.user for e in parts[part]} for part in PARTS]
        if users[0] & users[1] or users[0] & users[2] or users[1] & users[2]:
            raise ValueError("a user is in two splits")


def label(count: int, warm_from: int) -> str:
    """What a target that was chosen ``count`` times is: cold, tail or warm; see `Splitting.warm_from`."""
    return "cold" if count == 0 else "warm" if count >= warm_from else "tail"


def raw_query(titles: Sequence[str], history: Sequence[int], last: int) -> str:
    """What is asked without a model: the titles of the history's ``last`` items, oldest first."""
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
