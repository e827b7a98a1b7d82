"""Intervals and tests for paired scores of queries. Shapes: Q queries.

groups: Q labels, the same for the queries of one user: these resemble each other, and taken one by one they would count
as more evidence than they are.

bootstrap: Efron 1979, percentile intervals. randomisation: the paired test of Fisher 1935, recommended for retrieval
by Smucker, Allan & Carterette 2007 (CIKM). holm: Holm 1979.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
EXACT_UP_TO = 13  # 2^13 sign patterns are fewer than RESAMPLES: all of them are tried
_TIE = 1e-12  # sums of the same differences in another order differ by rounding


def bootstrap(values: np.ndarray, seed: int = 0, groups: Sequence[object] | None = None) -> dict[str, float]:
    """Mean of (Q,) ``values`` with its 95% percentile bootstrap interval over queries, 10,000 resamples.

    Of paired differences it is the paired interval. NaN queries are left out; empty -> NaN. groups: whole groups are
    drawn, see `resampled`; with a group a query nothing changes.
    """
    known = values[~np.isnan(values)].astype(np.float64)
    if not len(known):
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    shared = _shared(values, groups)
    if shared is not None:
        return {**interval(float(known.mean()), resampled(known[:, None], shared, seed)[:, 0]), "n": len(known)}
    rng = np.random.default_rng(seed)
    # In blocks: 10,000 x Q indices at once would be gigabytes for a large test set.
    means = np.concatenate(
        [known[rng.integers(0, len(known), (100, len(known)))].mean(axis=1) for _ in range(RESAMPLES // 100)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(known.mean()), "low": float(low), "high": float(high), "n": len(known)}


def resampled(values: np.ndarray, groups: Sequence[object], seed: int = 0) -> np.ndarray:
    """(RESAMPLES, S) means of (Q, S) ``values`` of S systems, resampled jointly: a draw takes the same queries for all
    systems, so that what is computed from several of its means (a difference, a ratio) is paired.

    groups: whole groups are drawn (Davison & Hinkley 1997, section 3.8). With a group a query it is the bootstrap over
    queries. Raises ValueError for NaN, or no query.
    """
    if not len(values) or np.isnan(values).any():
        raise ValueError(f"resampled: {len(values)} queries, {np.isnan(values).sum()} values without a number")
    _, group = np.unique(np.asarray([str(label) for label in groups]), return_inverse=True)
    count = int(group.max()) + 1
    sums = np.zeros((count, values.shape[1] + 1))
    np.add.at(sums, group, np.column_stack([values, np.ones(len(values))]))
    rng, means = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // 100):
        drawn = rng.integers(0, count, (100, count)) + count * np.arange(100)[:, None]
        times = np.bincount(drawn.ravel(), minlength=100 * count).reshape(100, count)
        totals = times @ sums
        means.append(totals[:, :-1] / totals[:, -1:])
    return np.concatenate(means)


def over_seeds(values: np.ndarray, groups: Sequence[object], seed: int = 0) -> dict[str, float]:
    """Mean of (S, Q) ``values``, S seeds by Q queries, with its 95% percentile interval over seeds and queries.

    Every resample draws seeds and, independently of them, queries, both with replacement (the pigeonhole bootstrap,
    Owen 2007, arXiv:0711.1236): the same queries are answered under every seed, so that neither are replicates of the
    other. groups: Q labels; whole groups are drawn. Raises ValueError for NaN, or without a query.
    """
    if not values.size or np.isnan(values).any():
        raise ValueError(f"over_seeds: shape {values.shape}, {np.isnan(values).sum()} values without a number")
    _, group = np.unique(np.asarray([str(label) for label in groups]), return_inverse=True)
    count, seeds = int(group.max()) + 1, len(values)
    sums = np.zeros((count, seeds + 1))
    np.add.at(sums, group, np.column_stack([values.T, np.ones(values.shape[1])]))
    rng, means = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // 100):
        queries = rng.multinomial(count, np.full(count, 1 / count), 100)
        totals = queries @ sums
        drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), 100)
        means.append((totals[:, :-1] * drawn).sum(axis=1) / (seeds * totals[:, -1]))
    return interval(float(values.mean()), np.concatenate(means))


def interval(mean: float, draws: np.ndarray) -> dict[str, float]:
    """``mean`` with the 95% percentile interval of its bootstrap ``draws``."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def _shared(values: np.ndarray, groups: Sequence[object] | None) -> list[str] | None:
    """The labels of the queries that have a value; None where no two of them share one."""
    if groups is None:
        return None
    known = [str(label) for label, value in zip(groups, values, strict=True) if not np.isnan(value)]
    return known if len(set(known)) < len(known) else None


def randomisation(
    differences: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, groups: Sequence[object] | None = None
) -> float:
    """Two-sided p of the paired randomisation test: were each query's two systems exchanged at random, how often would
    the mean difference be at least as far from 0?

    differences: (Q,), NaN left out. Up to 13 queries that differ, all 2^Q sign patterns are counted; above,
    ``resamples`` random ones, and the one observed is counted among them: p = (1 + hits) / (1 + resamples), never 0.
    Queries without a difference change no mean and are left out first. Empty, or no difference at all: 1. groups: the
    systems are exchanged for all queries of a group at once, so that what is said here of queries holds of groups;
    with a group a query nothing changes.
    """
    known = differences[~np.isnan(differences)].astype(np.float64)
    shared = _shared(differences, groups)
    if shared is not None:
        _, group = np.unique(np.asarray(shared), return_inverse=True)
        sums, sizes = np.bincount(group, known), np.bincount(group, np.abs(known))
        known = np.where(np.abs(sums) > _TIE * sizes, sums, 0.0)  # a group's differences may cancel but for rounding
    known = known[known != 0]
    if not len(known):
        return 1.0
    observed = abs(known.sum()) - _TIE * np.abs(known).sum()
    if len(known) <= EXACT_UP_TO:
        patterns = (np.arange(2 ** len(known))[:, None] >> np.arange(len(known))) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ known) >= observed))
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, resamples, 1000):  # in blocks, as above
        signs = 1.0 - 2.0 * rng.integers(0, 2, (min(1000, resamples - start), len(known)), dtype=np.int8)
        hits += int(np.count_nonzero(np.abs(signs @ known) >= observed))
    return (1 + hits) / (1 + resamples)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number, step-down: the chance of one false finding among all stays below alpha."""
    order = np.argsort(np.asarray(p), kind="stable")
    adjusted = np.empty(len(order))
    running = 0.0
    for place, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - place) * float(p[i])))
        adjusted[i] = running
    return [float(value) for value in adjusted]
