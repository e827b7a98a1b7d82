"""Ranking metrics over a batch, from the ranks of the judged targets alone, and the reward made of them.

Every metric here takes

    ranks   (B, T) integers, rank of each target from 1; 0 = not retrieved, or padding
    grades  (B, T) real numbers >= 0; relevant means grade > 0. Grade 0 = padding, or judged not relevant:
            either way the column counts for nothing
    k       depth of the cut, an integer >= 1

and returns (B,) float32 in [0, 1], computed in float64, NaN for rows that have no relevant target. The order
of targets along T carries no meaning. All raise ValueError for shapes that differ, a bad k, grades that are
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
MAX_EXPONENTIAL_GRADE = 500.0  # a sum of gains 2^g must stay within float64, which ends at 2^1024


def ndcg(ranks: np.ndarray, grades: np.ndarray, k: int, gain: str = "linear") -> np.ndarray:
    """Normalised discounted cumulative gain at k: DCG / ideal DCG, the sum of gain / log2(rank + 1).

    gain: "linear" is the grade g itself (Järvelin & Kekäläinen 2002, as in trec_eval's ndcg_cut);
        "exponential" is 2^g - 1 (Burges et al. 2005). The same for grades of 0 and 1.

    The ideal DCG takes the grades in descending order, not in the order in which the dataset lists them, and
    cuts at k as well, so that a perfect ranking scores 1 at any k.

    Raises ValueError as the module says, and for an unknown gain or an exponential gain that would overflow.
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
    """Share of the R relevant targets that stand within the top k (trec_eval's recall)."""
    judged = _judge(ranks, grades, k)
    return _ratio(judged.found.sum(axis=1), judged.relevant.sum(axis=1))


def capped_recall(ranks: np.ndarray, grades: np.ndarray, k: int) -> np.ndarray:
    """Relevant targets within the top k, divided by min(k, R) (BEIR, Thakur et al. 2021, "capped Recall@k").

    Unlike recall it can reach 1 where more than k targets are relevant.
    """
    judged = _judge(ranks, grades, k)
    return _ratio(judged.found.sum(axis=1), np.minimum(judged.relevant.sum(axis=1), k))


def precision(ranks: np.ndarray, grades: np.ndarray, k: int) -> np.ndarray:
    """Relevant targets within the top k, divided by k, however few were retrieved (trec_eval's P)."""
    judged = _judge(ranks, grades, k)
    applies = judged.relevant.any(axis=1)
    return _ratio(judged.found.sum(axis=1), np.where(applies, k, 0))


def mrr(ranks: np.ndarray, grades: np.ndarray, k: int) -> np.ndarray:
    """1 / rank of the first relevant target, 0 when it stands below k (trec_eval's recip_rank, cut at k)."""
    judged = _judge(ranks, grades, k)
    reciprocal = np.where(judged.found, 1.0 / np.maximum(judged.ranks, 1), 0.0).max(axis=1, initial=0.0)
    return _ratio(reciprocal, judged.relevant.any(axis=1))


def average_precision(ranks: np.ndarray, grades: np.ndarray, k: int) -> np.ndarray:
    """Sum of the precision at each relevant target's rank <= k, divided by R (trec_eval's map_cut)."""
    judged = _judge(ranks, grades, k)
    # Once sorted, the j-th found target (from 1) has exactly j relevant targets at or above its rank.
    ordered = np.sort(np.where(judged.found, judged.ranks, np.inf), axis=1)
    precisions = np.arange(1, ordered.shape[1] + 1) / ordered  # 0 at inf: the targets that were not found
    return _ratio(precisions.sum(axis=1), judged.relevant.sum(axis=1))


def hit(ranks: np.ndarray, grades: np.ndarray, k: int) -> np.ndarray:
    """1 where any relevant target stands within the top k, else 0 (trec_eval's success)."""
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
    """A metric cut at k, as a reward: (B,) float32 in [0, 1], NaN where nothing was judged relevant.

    metric: a key of METRICS. k: depth of the cut. gain: "linear" or "exponential", the latter for ndcg only.
    A malformed completion retrieved nothing, so it scores 0; combine with FormatPenalty to make it worse.

    Raises ValueError when built with an unknown metric or gain, or a k that is not an integer >= 1.
    """

    metric: str
    k: int
    gain: str = "linear"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}: choose from {', '.join(METRICS)}")
        check_k(self.k)
        check_gain(self.gain)
        if self.gain != "linear" and self.metric != "ndcg":
            raise ValueError(f"{self.metric} has no gain, got {self.gain!r}: remove gain, or use ndcg")

    @property
    def __name__(self) -> str:
        """Such as "ndcg@10" or "ndcg_exp@10": differs wherever the value does, so that logs never collide."""
        return f"{self.metric}{'_exp' if self.gain == 'exponential' else ''}@{self.k}"

    def __call__(self, outcome: Outcome) -> np.ndarray:
        if self.metric == "ndcg":
            return ndcg(outcome.ranks, outcome.grades, self.k, self.gain)
        return METRICS[self.metric](outcome.ranks, outcome.grades, self.k)


def check_k(k: Any) -> None:
    """Raise ValueError unless k is an integer >= 1 (a bool is not one)."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k must be an integer >= 1, got {k!r}: set it to the depth of the cut, such as 10")


def check_gain(gain: str) -> None:
    """Raise ValueError unless gain is one of GAINS."""
    if gain not in GAINS:
        raise ValueError(f"unknown gain {gain!r}: choose from {', '.join(GAINS)}")


class _Judged(NamedTuple):
    ranks: np.ndarray  # (B, T) int64
    grades: np.ndarray  # (B, T) float64
    relevant: np.ndarray  # (B, T) bool
    found: np.ndarray  # (B, T) bool: relevant and within the top k


def _judge(ranks: np.ndarray, grades: np.ndarray, k: int) -> _Judged:
    """Check what every metric takes, and say which targets are relevant and which of them were found."""
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
    """Refuse a target that is listed twice: it would count twice, and lift a metric above 1."""
    ordered = np.sort(ranks, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)
    if twice.any():
        row = int(twice.any(axis=1).argmax())
        raise ValueError(
            f"row {row} has two relevant targets at rank {ordered[row, 1:][twice[row]][0]}: "
            "drop duplicate targets from the dataset"
        )


def _ratio(value: ArrayLike, total: ArrayLike) -> np.ndarray:
    """value / total as (B,) float32, NaN where total is 0: the row has no relevant target."""
    divisor = np.asarray(total, dtype=np.float64)
    divisor = np.where(divisor == 0, np.nan, divisor)
    return (np.asarray(value, dtype=np.float64) / divisor).astype(np.float32)
