"""Rewards: from the ranks of relevant items to one number a completion. Pure numpy; knows no retriever."""

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
from rewards.shaping import FormatPenalty, LengthPenalty, RecR1, RepetitionPenalty, WeightedSum
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
    "WeightedSum",
    "average_precision",
    "capped_recall",
    "from_spec",
    "harm",
    "hit",
    "mrr",
    "ndcg",
    "precision",
    "recall",
]
