"""Ranking metrics over a batch, computed from the ranks of the judged targets, and the reward that uses them.

Every metric here takes

    ranks   (B, T) integers, the rank of each target from 1; 0 = not retrieved, or padding
    grades  (B, T) real numbers >= 0. A target is relevant if its grade is above 0. Grade 0 = padding, or judged not
            relevant; such a target is ignored
    k       an integer >= 1; the metric reads the first k ranks

and returns (B,) float32 in [0, 1], computed in float64; NaN for rows without a relevant target. The order of the
targets along T does not matter. Every metric raises ValueError for shapes that differ, a bad k, grades that are
negative or not finite, ranks that are negative or not integers, and two relevant targets at one rank.

Definitions follow trec_eval (https://github.com/usnistgov/trec_eval) unless a docstring says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from rewards.types import Outcome

GAINS = ("linear", "exponential")
MAX_EXPONENTIAL_GRADE = 500.0  # keeps a sum of gains 2^g within float64, whose largest value is below 2^1024


def ndcg(ranks: np.ndarray, grades: np.ndarray, k: int, gain: str = "linear") -> np.ndarray:
    """Normalised discounted cumulative gain at k: DCG / ideal DCG, where DCG is the sum of gain / log2(rank + 1).

    ranks, grades, k: see the module.
    gain: "linear" takes the grade g as the gain (Järvelin & Kekäläinen 2002, as in trec_eval's ndcg_cut);
        "exponential" takes 2^g - 1 (Burges et al. 2005). Both are the same for grades of 0 and 1.

    The ideal DCG sorts the grades in descending order and also stops at k, so a perfect ranking scores 1 at any k.

    Raises ValueError as the module says, for an unknown gain, and for an exponential gain that would overflow.
    """
    check_gain(gain)
    judged = _judge(ranks, grades, k)
    gains = judged.grades
    if gain == "exponential":
        if gains.max(initial=0.0) > MAX_EXPONENTIAL_GRADE:
            raise ValueError(
                f"grades of up to {gains.max():g} overflow the exponential gain 2^g - 1: "
                f"rescale grades to at most {MAX_EXPONENTIAL_GRADE:g}, or use gain='linear'"
            )
        gains = np.exp2(gains) - 1.0
    discounts = 1.0 / np.log2(np.maximum(judged.ranks, 1) + 1.0)
    dcg = np.where(judged.found, gains * discounts, 0.0).sum(axis=1)
    best = np.sort(gains, axis=1)[:, ::-1][:, :k]
    ideal = (best / np.log2(np.arange(best.shape[1]) + 2.0)).sum(axis=1)
    return _ratio(dcg, ideal)


def recall(ranks: np.ndarray, grades: np.ndarray, k: int) -> np.ndarray:
    """The share of the R relevant targets that are in the top k (trec_eval's recall)."""
    judged = _judge(ranks, grades, k)
    return _ratio(judged.found.sum(axis=1), judged.relevant.sum(axis=1))


def capped_recall(ranks: np.ndarray, grades: np.ndarray, k: int) -> np.ndarray:
    """The number of relevant targets in the top k, divided by min(k, R) (BEIR, Thakur et al. 2021, "capped Recall@k").

    Unlike recall, it can reach 1 where more than k targets are relevant.
    """
    judged = _judge(ranks, grades, k)
    return _ratio(judged.found.sum(axis=1), np.minimum(judged.relevant.sum(axis=1), k))


def precision(ranks: np.ndarray, grades: np.ndarray, k: int) -> np.ndarray:
    """The number of relevant targets in the top k, divided by k even if fewer were retrieved (trec_eval's P)."""
    judged = _judge(ranks, grades, k)
    applies = judged.relevant.any(axis=1)
    return _ratio(judged.found.sum(axis=1), np.where(applies, k, 0))


def mrr(ranks: np.ndarray, grades: np.ndarray, k: int) -> np.ndarray:
    """1 / rank of the first relevant target; 0 where that rank is above k (trec_eval's recip_rank, cut at k)."""
    judged = _judge(ranks, grades, k)
    reciprocal = np.where(judged.found, 1.0 / np.maximum(judged.ranks, 1), 0.0).max(axis=1, initial=0.0)
    return _ratio(reciprocal, judged.relevant.any(axis=1))


def average_precision(ranks: np.ndarray, grades: np.ndarray, k: int) -> np.ndarray:
    """The sum of the precision at the rank of each relevant target in the top k, divided by R (trec_eval's map_cut)."""
    judged = _judge(ranks, grades, k)
    # After sorting, the j-th found target (from 1) has exactly j relevant targets at its rank or a better one.
    ordered = np.sort(np.where(judged.found, judged.ranks, np.inf), axis=1)
    precisions = np.arange(1, ordered.shape[1] + 1) / ordered  # j / inf = 0 for targets that were not found
    return _ratio(precisions.sum(axis=1), judged.relevant.sum(axis=1))


def hit(ranks: np.ndarray, grades: np.ndarray, k: int) -> np.ndarray:
    """1 where any relevant target is in the top k, else 0 (trec_eval's success)."""
    judged = _judge(ranks, grades, k)
    return _ratio(judged.found.any(axis=1), judged.relevant.any(axis=1))


METRICS: dict[str, Callable[..., np.ndarray]] = {
    "ndcg": ndcg,
    "recall": recall,
    "capped_recall": capped_recall,
    "precision": precision,
    "mrr": mrr,
    "map": average_precision,
    "hit": hit,
}


@dataclass(frozen=True)
class RankingReward:
    """A metric at k as a reward: (B,) float32 in [0, 1]; NaN where no target is relevant.

    A malformed completion retrieves nothing, so it scores 0. Add FormatPenalty to give it less.

    Raises ValueError when built with an unknown metric or gain, or a bad k.
    """

    metric: str  # A key of METRICS.
    k: int  # The metric reads the first k ranks; an integer >= 1.
    gain: str = "linear"  # The gain of a grade g in ndcg: `linear` is g, `exponential` is 2^g - 1.

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}: choose from {', '.join(METRICS)}")
        check_k(self.k)
        check_gain(self.gain)
        if self.gain != "linear" and self.metric != "ndcg":
            raise ValueError(f"{self.metric} has no gain, got {self.gain!r}: remove gain, or use ndcg")

    @property
    def __name__(self) -> str:
        """Such as "ndcg@10" or "ndcg_exp@10". Rewards with different values have different names in the log."""
        return f"{self.metric}{'_exp' if self.gain == 'exponential' else ''}@{self.k}"

    def __call__(self, outcome: Outcome) -> np.ndarray:
        if self.metric == "ndcg":
            return ndcg(outcome.ranks, outcome.grades, self.k, self.gain)
        return METRICS[self.metric](outcome.ranks, outcome.grades, self.k)


def check_k(k: Any) -> None:
    """Raises ValueError unless k is an integer >= 1; a bool is refused."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k must be an integer >= 1, got {k!r}: set it to a number of ranks, such as 10")


def check_gain(gain: str) -> None:
    """Raises ValueError unless gain is one of GAINS."""
    if gain not in GAINS:
        raise ValueError(f"unknown gain {gain!r}: choose from {', '.join(GAINS)}")


class _Judged(NamedTuple):
    ranks: np.ndarray  # (B, T) int64
    grades: np.ndarray  # (B, T) float64
    relevant: np.ndarray  # (B, T) bool
    found: np.ndarray  # (B, T) bool: relevant and within the top k


def _judge(ranks: np.ndarray, grades: np.ndarray, k: int) -> _Judged:
    """The checked arguments of a metric, which targets are relevant, and which of those are in the top k."""
    check_k(k)
    ranks, grades = np.asarray(ranks), np.asarray(grades)
    if ranks.ndim != 2 or ranks.shape != grades.shape:
        raise ValueError(
            f"ranks {ranks.shape} and grades {grades.shape} must share one shape (B, T): "
            "pad both to the same number of targets with rank 0 and grade 0"
        )
    if not np.issubdtype(ranks.dtype, np.integer) or (ranks < 0).any():
        found = "a negative one" if np.issubdtype(ranks.dtype, np.integer) else f"dtype {ranks.dtype}"
        raise ValueError(f"ranks must be integers >= 0, got {found}: count from 1, with 0 for not retrieved")
    grades = grades.astype(np.float64)
    bad = ~(np.isfinite(grades) & (grades >= 0))
    if bad.any():
        raise ValueError(f"grades must be finite and >= 0, got {grades[bad][0]:g}: use 0 for not relevant")
    relevant = grades > 0
    ranks = ranks.astype(np.int64)
    _check_distinct(np.where(relevant, ranks, 0))
    return _Judged(ranks, grades, relevant, relevant & (ranks >= 1) & (ranks <= k))


def _check_distinct(ranks: np.ndarray) -> None:
    """Raises ValueError for a target that is listed twice: it would count twice, and a metric could exceed 1."""
    ordered = np.sort(ranks, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)
    if twice.any():
        row = int(twice.any(axis=1).argmax())
        raise ValueError(
            f"row {row} has two relevant targets at rank {ordered[row, 1:][twice[row]][0]}: "
            "drop duplicate targets from the dataset"
        )


def _ratio(value: ArrayLike, total: ArrayLike) -> np.ndarray:
    """value / total as (B,) float32; NaN where total is 0, which means that the row has no relevant target."""
    divisor = np.asarray(total, dtype=np.float64)
    divisor = np.where(divisor == 0, np.nan, divisor)
    return (np.asarray(value, dtype=np.float64) / divisor).astype(np.float32)
