"""Make examples (history -> next item) of interactions, and split them so that training sees nothing of the future."""

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
from rec_r1.tasks.integrity import SPLITS
from rec_r1.tasks.leak_checks import check_no_leak, check_set_apart
from rec_r1.tasks.query_pools import check_fit_share, check_limits, check_seed, limited, share
from rec_r1.tasks.types import Split, Task
from retrievers import Catalog, Interactions
from retrievers.interactions import raw_query

logger = logging.getLogger(__name__)
SPLIT_METHODS = ("leave_one_out", "global_time", "by_user")
PUBLISHED = "published"  # The value of `Splitting.split` where the data have their own splits, see published.py.


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
    # The share of the training choices, the earliest, or of the training users (by_user), that retrievers are
    # fitted on. Prompts are made of the others, so that the retriever has not seen what a prompt asks for. 0: it
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
        """Raise UserError for a value out of range."""
        for name, given, choices in (
            ("split", self.split, (None, *SPLIT_METHODS)),
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
        check_fit_share(self.fit_share)
        check_limits(self.limits)
        check_seed(self.seed)


class Interaction(NamedTuple):
    """A user chose an item.

    user: the user's id.
    row: the item's row in the catalogue.
    time: when, in the unit of the file.
    """

    user: str
    row: int
    time: float


class Session(NamedTuple):
    """One line of a file of sessions.

    user: the user's id.
    history: rows of items, oldest first.
    target: the row of the item that was chosen next.
    split: the published split. "" = there is none.
    where: file and line, for messages.
    """

    user: str
    history: tuple[int, ...]
    target: int
    split: str
    where: str


class Example(NamedTuple):
    """One query with a history, and its target.

    id: the query's id, USER:PLACE.
    user: the user's id.
    place: the place of the target in all interactions of the user, from 0.
    history: rows, oldest first.
    target: the target's row.
    before: when the last item of the history was chosen.
    time: when the target was chosen.
    """

    id: str
    user: str
    place: int
    history: tuple[int, ...]
    target: int
    before: float
    time: float


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
        by_split = _by_user({user: _examples_of(own, params) for user, own in by_user.items()}, params)
        seen = {user: own for user, own in by_user.items() if _split_of(user, params) == "train"}
    elif params.split == "global_time":
        by_split, first_held_out = _global_time(
            {user: _examples_of(own, params) for user, own in by_user.items()}, params
        )
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


def _examples_of(own: Sequence[Interaction], params: Splitting, first: int = 1) -> list[Example]:
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


def _train_examples(found: list[Example], params: Splitting) -> list[Example]:
    """The training examples of one user that `Splitting.train_targets` keeps."""
    return found[-1:] if params.train_targets == "last" else found


def _leave_one_out(by_user: dict[str, list[Interaction]], params: Splitting) -> dict[str, list[Example]]:
    by_split: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for own in by_user.values():
        found = _examples_of(own, params)
        if len(own) < 3:
            by_split["train"] += found
            continue
        by_split["test"].append(found[-1])
        if len(found) > 1:
            by_split["validation"].append(found[-2])
        by_split["train"] += _train_examples(found[:-2], params)
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
        by_split["train"] += _train_examples([e for e in found if e.time < held_from], params)
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
        by_split[split] += _train_examples(found, params) if split == "train" else found
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
    interactions = Interactions.from_sequences(len(catalog), chosen, held_out, params.raw_titles)
    return Task(name, catalog, **splits, counts=counts, interactions=interactions, set_apart=params.fit_share > 0)


def label(count: int, warm_from: int) -> str:
    """The label of a target that was chosen ``count`` times in training: cold, tail or warm, see `warm_from`."""
    return "cold" if count == 0 else "warm" if count >= warm_from else "tail"


def _split(found: Sequence[Example], titles: Sequence[str], counts: np.ndarray, params: Splitting) -> Split:
    return Split(
        [e.id for e in found],
        [raw_query(titles, e.history, params.raw_titles) for e in found],
        [(e.target,) for e in found],
        [(1.0,) for _ in found],
        histories=[e.history for e in found],
        slices={"target": [label(counts[e.target], params.warm_from) for e in found]},
    )
