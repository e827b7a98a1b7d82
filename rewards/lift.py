"""Rewards that compare a completion's ranking with the ranking of the raw query.

All completions of a group have the same raw query, so `lift` alone trains a policy exactly as its metric does. `harm`
is added to a metric: a loss against the raw query then counts for more than a gain of the same size.

    rewards: {ndcg@100: 1.0, harm@10: 2.0}
"""

from dataclasses import dataclass

import numpy as np

from rewards.ranking import RankingReward
from rewards.types import Outcome


@dataclass(frozen=True)
class Lift:
    """metric@k of the completion's ranking minus metric@k of the raw query's ranking: (B,) float32 in [-1, 1].

    The value is NaN where no target is relevant. A malformed completion retrieves nothing, so it gets minus the raw
    query's metric.

    Raises ValueError when built with an unknown metric or a bad k, and when called with an outcome without raw_ranks.
    """

    k: int  # The metric reads the first k ranks; an integer >= 1.
    metric: str = "ndcg"  # The metric that is compared, such as ndcg, recall or mrr.
    losses_only: bool = False  # Whether gains count as 0, see :func:`harm`.

    def __post_init__(self) -> None:
        RankingReward(self.metric, self.k)

    @property
    def __name__(self) -> str:
        kind = "harm" if self.losses_only else "lift"
        return f"{kind}@{self.k}" if self.metric == "ndcg" else f"{kind}_{self.metric}@{self.k}"

    def __call__(self, outcome: Outcome) -> np.ndarray:
        if outcome.raw_ranks is None:
            raise ValueError(f"{self.__name__}: the outcome has no raw_ranks: pass the ranks of the raw queries")
        raw = Outcome(outcome.completions, outcome.actions, outcome.raw_ranks, outcome.grades, outcome.words)
        measured = RankingReward(self.metric, self.k)
        lift = (measured(outcome) - measured(raw)).astype(np.float32)
        return np.minimum(lift, 0.0) if self.losses_only else lift


def harm(k: int, metric: str = "ndcg") -> Lift:
    """min(0, lift), in [-1, 0]: 0 where the completion ranks the targets no worse than the raw query does.

    k, metric: see :class:`Lift`.
    """
    return Lift(k, metric, losses_only=True)
