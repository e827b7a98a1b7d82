"""The parameters of a split into train, validation and test examples, and the records that are split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from rec_r1.config import UserError
from rec_r1.tasks.query_pools import check_limits

SPLIT_METHODS = ("leave_one_out", "global_time", "by_user")


@dataclass(frozen=True)
class Splitting:
    """How examples are made and split.

    split: leave_one_out = a user's last item is a test target, the one before a validation target, and all earlier
        ones are training targets | global_time = two points in time, the same for all users, separate the splits |
        by_user = every user is in one split, so that training knows no test user. None = by_user for sessions, which
        have no times, and leave_one_out for interactions.
    lines_in_order: for sessions: whether the lines of the file are in the order of time, at least by days or hours.
        global_time then splits by line, and the time of an item in a history is that of the first line that has it.
    validation_share, test_share: the shares of the examples in time (global_time), or of the users (by_user).
    fit_share: the share of the training data that retrievers such as EASE are fitted on: the earliest interactions, or
        some of the users (by_user). The training prompts are made of the rest, so that the retriever was not fitted on
        their targets. 0 = retrievers are fitted on all training data, which is right for evaluations, and wrong for
        rewards.
    consecutive_repeats: keep | collapse = an item that a user chooses several times in a row is in the history once.
        With either, no target is an item of its history.
    targets: the held-out targets that are kept: all | inductive = those that are not in the training data |
        transductive = those that are.
    train_targets: all = each item after a user's first is a training target | last = each user has one.
    history: how many items before the target are kept. `format.titles` says how many of them a prompt shows.
    raw_titles: the raw query is the titles of so many last items.
    warm_from: for the slice "target": cold = not in the training data, warm = at least so often in them, tail = the
        rest.
    limits: split -> at most so many examples, drawn at random. A split that is not named keeps all.
    drop_unknown: whether interactions with items that are not in the catalogue are left out. False = they are refused.
    seed: of the random choices.
    """

    split: str | None = None
    lines_in_order: bool = False
    validation_share: float = 0.1
    test_share: float = 0.1
    fit_share: float = 0.0
    consecutive_repeats: str = "keep"
    targets: str = "all"
    train_targets: str = "all"
    history: int = 50
    raw_titles: int = 1
    warm_from: int = 5
    limits: dict[str, int] = field(default_factory=dict)
    drop_unknown: bool = False
    seed: int = 0

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
        if not 0 <= self.fit_share < 1:
            raise UserError(f"task.params.fit_share: {self.fit_share}: must be at least 0 and below 1, 0.5 is usual")
        check_limits(self.limits)


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
