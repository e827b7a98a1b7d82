"""What completions earned, and which groups of completions are live or dead.

A group is the completions of one prompt. It is live if its rewards differ, and dead if they are all equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rewards import WeightedSum

LIVE = "live"
# Why all completions of a dead group earned the same.
DEAD_CAUSES = ("all_malformed", "all_zero", "all_perfect", "all_equal")


class Earned(NamedTuple):
    """The reward of one completion.

    query_id: the id of the training query.
    reward: the reward that the trainer got. None = the retriever failed, or no reward applies.
    malformed: whether the completion is malformed.
    quality: the value of the first ranking metric among the rewards. NaN = there is none.
    """

    query_id: str
    reward: float | None
    malformed: bool
    quality: float


def exact_in_groups(rewards: np.ndarray) -> np.ndarray:
    """(B,) rewards, rounded to multiples of 2^-20. TRL's float32 mean of G equal rewards up to 16 / G is then exactly
    their value, and a dead group has advantage 0. Otherwise rounding errors would give advantages of 0.001."""
    return np.round(rewards * 2.0**20) / 2.0**20


def earned(
    rewards: WeightedSum,
    components: Mapping[str, np.ndarray],
    total: np.ndarray,
    malformed: Sequence[bool],
    query_ids: Sequence[str],
) -> list[Earned]:
    """What B completions earned.

    rewards: the rewards of the training.
    components: their values by name, (B,) each.
    total: (B,) their weighted sums. NaN = no reward applies, or the retriever failed.
    malformed: B times whether the completion is malformed.
    query_ids: B ids of the queries. () = they are not known, and nothing is returned.
    """
    known = [None if np.isnan(reward) else float(reward) for reward in exact_in_groups(total)]
    quality = next((components[name] for name in rewards.ranking_names), np.full(len(known), np.nan))
    return [Earned(*row) for row in zip(query_ids, known, malformed, map(float, quality), strict=False)]


def cause(group: Sequence[Earned]) -> str | None:
    """LIVE where the rewards of a group differ, and otherwise one of DEAD_CAUSES.

    Returns None where fewer than two completions have a reward. The Scorer rounds rewards to multiples of 2^-20, so
    rewards that are closer than that count as equal.
    """
    known = [one for one in group if one.reward is not None]
    if len(known) < 2:
        return None
    if len({one.reward for one in known}) > 1:
        return LIVE
    if all(one.malformed for one in known):
        return "all_malformed"
    if all(one.quality == 0 for one in known):
        return "all_zero"
    return "all_perfect" if all(one.quality > 1 - 1e-6 for one in known) else "all_equal"
