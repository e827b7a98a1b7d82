"""What the page has measured before the claims are tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rec_r1.config import Recipe
from rec_r1.similarity_gap.general import General
from rec_r1.similarity_gap.held_out import HeldOut
from rec_r1.similarity_gap.systems import Opened, open_system
from rec_r1.similarity_gap.utility import Table
from rec_r1.tasks import Task
from retrievers import Retriever

FITTED = ("people", "both")  # The roles of systems that are fitted on choices.
NO_CHOICES = "no system here is fitted on choices"


@dataclass(frozen=True)
class Measured:
    """What the page has measured already.

    recipe, task, held_out: what is measured, see `measure.measure`.
    opened: the systems.
    ranks: name -> (Q, T) int32 ranks of the targets.
    values: name -> (Q, M), in the order of `utility.METRICS`.
    masks: name of a slice -> (Q,) bool.
    general: the set that shows what a tuned encoder forgets. None = no encoder is tuned.
    """

    recipe: Recipe
    task: Task
    held_out: HeldOut
    opened: Opened
    ranks: Mapping[str, np.ndarray]
    values: Mapping[str, np.ndarray]
    masks: Mapping[str, np.ndarray]
    general: General | None

    def table(self) -> Table:
        """All systems on all queries."""
        return Table(self.values, self.held_out.users, np.ones(len(self.held_out.queries), bool))

    def open(self, kind: str, each: Sequence[Mapping[str, Any]]) -> list[Retriever]:
        """A retriever with each of S sets of parameters, from the cache or fitted now.

        Raises UserError or RetrieverError if one does not open.
        """
        return [open_system(self.recipe, self.task, kind, params) for params in each]


def seeded(settings: Mapping[str, Any], seeds: int) -> list[dict[str, Any]]:
    """``settings`` of a fit with S different seeds."""
    first = int(settings.get("seed", 0))
    # The first fit has the settings as they are, because a seed that is named gives the fit another folder.
    return [{**settings, "seed": first + s} if s else dict(settings) for s in range(seeds)]
