"""What the completions of a batch earned, in the form in which groups are called live or dead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rewards import WeightedSum

Row = tuple[str, float | None, bool, float]  # Query id, reward, malformed, first ranking metric: `Earned`'s fields.


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
) -> list[Row]:
    """What B completions earned: the fields of `rec_r1.training.prompt_record.Earned` for each.

    rewards: the rewards of the training.
    components: their values by name, (B,) each.
    total: (B,) their weighted sums. NaN = no reward applies, or the retriever failed.
    malformed: B times whether the completion is malformed.
    query_ids: B ids of the queries. () = they are not known, and nothing is returned.
    """
    known = [None if np.isnan(reward) else float(reward) for reward in exact_in_groups(total)]
    quality = next((components[name] for name in rewards.ranking_names), np.full(len(known), np.nan))
    return list(zip(query_ids, known, malformed, map(float, quality), strict=False))
