"""Rewards: from the ranks and grades of a query's targets to one number per completion.

    import rewards
    reward = rewards.from_spec({"ndcg@10": 1.0, "format": 1.0})
    reward(outcome)  # (B,) float32, one number per completion; see rewards.Outcome

The package needs only numpy and does not import `retrievers`.
"""

from rewards.lift import Lift, harm
from rewards.ranking import (
    METRICS,
    RankingReward,
    average_precision,
    capped_recall,
    hit,
    mrr,
    ndcg,
    precision,
    recall,
)
from rewards.shaping import (
    FormatPenalty,
    LengthPenalty,
    RecR1,
    RepetitionPenalty,
    StuffingPenalty,
    WeightedSum,
    is_copy,
    repeated,
)
from rewards.specs import REWARDS, from_spec
from rewards.types import Action, Outcome, Reward

__all__ = [
    "METRICS",
    "REWARDS",
    "Action",
    "FormatPenalty",
    "LengthPenalty",
    "Lift",
    "Outcome",
    "RankingReward",
    "RecR1",
    "RepetitionPenalty",
    "Reward",
    "StuffingPenalty",
    "WeightedSum",
    "average_precision",
    "capped_recall",
    "from_spec",
    "harm",
    "hit",
    "is_copy",
    "mrr",
    "ndcg",
    "precision",
    "recall",
    "repeated",
]
