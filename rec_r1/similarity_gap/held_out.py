"""The held-out queries that all systems are asked, checked and in the form that the measurements need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rec_r1 import tasks
from rec_r1.config import Recipe, UserError
from rec_r1.evaluation.records import users_of
from rec_r1.tasks import Split, Task
from retrievers import Query

FEWEST_USERS = 10  # Whole users are resampled. With fewer, the intervals are too narrow to support a claim.


@dataclass(frozen=True)
class HeldOut:
    """Q queries with at most T targets each, made once and passed to everything that measures.

    split: the queries as the task has them.
    queries: Q queries, each with its text and its history.
    targets: (Q, T) int32 catalogue rows, -1 = padding.
    grades: (Q, T) float32, 0 = padding.
    users: Q labels; whose query it is.
    digest: a hash of the queries and targets, which is part of the key under which ranks are cached.
    """

    split: Split
    queries: Sequence[Query]
    targets: np.ndarray
    grades: np.ndarray
    users: Sequence[str]
    digest: str

    @classmethod
    def of(cls, split: Split) -> HeldOut:
        """The held-out queries of a split."""
        queries = split.raw()
        targets, grades = tasks.pad(split.rows, split.grades)
        asked = json.dumps([[[query.text, query.history] for query in queries], targets.tolist()])
        return cls(split, queries, targets, grades, users_of(split), hashlib.sha256(asked.encode()).hexdigest())


def load(recipe: Recipe, split: str) -> tuple[Task, HeldOut]:
    """The recipe's task, and the queries of one of its splits.

    split: test, validation or train.

    Raises UserError for a task without histories, and for a split of fewer than `FEWEST_USERS` users.
    """
    task = tasks.load(recipe.task)
    if task.interactions is None or not len(task.interactions.rows) or not task.test.histories:
        raise UserError(
            f"task {task.name} has no histories of choices to measure against: take a sequential task, such as "
            "task.name=sequential task.path=FOLDER"
        )
    held_out = HeldOut.of(task.splits[split])
    users = len(set(held_out.users))
    if users < FEWEST_USERS:
        raise UserError(
            f"task {task.name}: the {split} split has {len(held_out.queries)} choices of {users} users, and an "
            f"interval needs at least {FEWEST_USERS} users: take another --split, a larger task.params.limits if it is "
            "set, or more data"
        )
    return task, held_out
