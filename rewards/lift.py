"""Rewards beside what the user asked: what a completion gains over the raw query, and what it loses.

Within a group of completions the raw query's score is one number, so `lift` alone trains as the metric does. `harm`
does not: weighted beside a metric it makes a loss count for more than an equal gain, on queries that the retriever
already answers.

    rewards: {ndcg@100: 1.0, harm@10: 2.0}
"""

from dataclasses import dataclass

import numpy as np

from rewards.ranking import RankingReward
from rewards.types import Outcome


@dataclass(frozen=True)
class Lift:
    """metric@k of the completion's ranking minus that of the raw query's: (B,) float32 in [-1, 1].

    metric: a key of METRICS. k: depth of the cut. losses_only: gains count as 0, see `harm`.

    NaN where nothing was judged relevant. A malformed completion retrieved nothing: it loses all that the raw query
    finds.

    Raises ValueError when built with an unknown metric or a k that is not an integer >= 1, and for an outcome without
    raw_ranks.
    """

    k: int
    metric: str = "ndcg"
    losses_only: bool = False

    def __post_init__(self) -> None:
        RankingReward(self.metric, self.k)

    @property
    def __name__(self) -> str:
        kind = "harm" if self.losses_only else "lift"
        return f"{kind}@{self.k}" if self.metric == "ndcg" else f"{kind}_{self.metric}@{self.k}"

    def __call__(self, outcome: Outcome) -> np.ndarray:
        if outcome.raw_ranks is None:
            raise ValueError(f"{self.__name__}: the outcome has no raw_ranks: give the ranks of the raw queries")
        raw = Outcome(outcome.completions, outcome.actions, outcome.raw_ranks, outcome.grades, outcome.words)
        measured = RankingReward(self.metric, self.k)
        lift = (measured(outcome) - measured(raw)).astype(np.float32)
        return np.minimum(lift, 0.0) if self.losses_only else lift


def harm(k: int, metric: str = "ndcg") -> Lift:
    """min(0, `Lift`): 0 where the completion ranks no worse than the raw query, else what it loses, in [-1, 0]."""
    return Lift(k, metric, losses_only=True)
