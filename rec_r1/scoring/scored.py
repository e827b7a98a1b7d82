"""The type of scored completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rec_r1.prompts import Action
from retrievers import Query, RetrieverError
from rewards import Outcome


@dataclass(frozen=True)
class Scored:
    """B scored completions."""

    outcome: Outcome  # What the rewards were computed from.
    actions: Sequence[Action | None]  # B actions of the outcome. None = malformed.
    components: dict[str, np.ndarray]  # Each reward and metric by name, (B,) float32.
    rewards: np.ndarray  # (B,) float32 weighted sums. NaN = no reward applies, or the retriever failed.
    failed: np.ndarray  # (B,) bool: whether the retriever failed for this row. Its ranks then mean nothing.
    lists: Sequence[list[int] | None]  # B lists of rows, for actions that are lists. None = a query, or malformed.
    asked: Sequence[Query | None]  # B queries that the retriever got. None = a list, or malformed.
    retrieval: dict[str, float]  # The values retrieval/… of `summary`.
    # For structured queries: B causes, why each completion is malformed. None = it is not; () = other actions.
    causes: Sequence[str | None] = ()

    def whole(self) -> Scored:
        """Itself, if every row was scored. Raises RetrieverError otherwise, because a mean over the rest is biased."""
        if self.failed.any():
            raise RetrieverError(
                f"the retriever failed for {int(self.failed.sum())} of {len(self.failed)} queries (the log above says "
                "why), so the result would be incomplete: restart the retriever, and run the command again"
            )
        return self
