"""Confidence intervals and significance tests for paired scores of Q queries.

The functions take groups: Q labels, which are the same for all queries of one user. The queries of a user resemble each
other, so they are resampled and tested together. Otherwise they would count as more evidence than they are.

Sources: `bootstrap` has the percentile intervals of Efron 1979. `randomisation` is the paired test of Fisher 1935,
which Smucker, Allan & Carterette 2007 (CIKM) recommend for retrieval. `holm` is the correction of Holm 1979.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
EXACT_UP_TO = 13  # Up to so many differences, all sign patterns are tried: 2^13 are fewer than RESAMPLES.
_TIE = 1e-12  # Sums that differ by less than this share are equal. Rounding depends on the order of the terms.


def bootstrap(values: np.ndarray, seed: int = 0, groups: Sequence[object] | None = None) -> dict[str, float]:
    """The mean of scores with its 95% bootstrap interval over queries, from RESAMPLES resamples.

    values: (Q,) scores, or paired differences of scores. NaN = the query is left out.
    seed: of the resamples.
    groups: Q labels. Whole groups are drawn, see `resampled`. None = every query is a group of its own.

    Returns mean, low, high and n, the number of queries. Without a query, n is 0 and the others are NaN.
    """
    known = values[~np.isnan(values)].astype(np.float64)
    if not len(known):
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    shared = _shared(values, groups)
    if shared is not None:
        return {**interval(float(known.mean()), resampled(known[:, None], shared, seed)[:, 0]), "n": len(known)}
    rng = np.random.default_rng(seed)
    # The resamples are drawn in blocks, because 10,000 x Q indices of a large test set would take gigabytes.
    means = np.concatenate(
        [known[rng.integers(0, len(known), (100, len(known)))].mean(axis=1) for _ in range(RESAMPLES // 100)]
    )
    return {**interval(float(known.mean()), means), "n": len(known)}


def resampled(values: np.ndarray, groups: Sequence[object], seed: int = 0) -> np.ndarray:
    """The means of S systems in RESAMPLES resamples. A resample has the same queries for all systems.

    A difference or a ratio of means of the same resample is therefore paired.

    values: (Q, S) scores.
    groups: Q labels. Whole groups are drawn (Davison & Hinkley 1997, section 3.8). With one query per group it is the
        bootstrap over queries.
    seed: of the resamples.

    Returns (RESAMPLES, S) means. Raises ValueError for NaN, and without a query.
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
    """The mean over seeds and queries with its 95% bootstrap interval.

    Every resample draws seeds with replacement and, independently, queries with replacement (the pigeonhole bootstrap,
    Owen 2007, arXiv:0711.1236), because all seeds have the same queries.

    values: (S, Q) scores of S seeds.
    groups: Q labels. Whole groups are drawn.
    seed: of the resamples.

    Returns mean, low and high. Raises ValueError for NaN, and without a query.
    """
    _refuse_unknown(values)
    return interval(float(values.mean()), resampled_over_seeds(values[..., None], groups, seed)[:, 0])


def difference_over_seeds(values: np.ndarray, groups: Sequence[object], seed: int = 0) -> dict[str, float]:
    """The mean difference over seeds and queries with its interval, as :func:`over_seeds`, and its two-sided p.

    p is twice the share of the same resamples in which the difference is 0 or has the other sign (Efron & Tibshirani
    1993, section 15.4), and at most 1. The observed difference counts as one more resample, so p is never 0.

    values: (S, Q) differences of the scores of S seeds.
    groups, seed: see :func:`over_seeds`.

    Returns mean, low, high and p. Raises ValueError as :func:`over_seeds`.
    """
    _refuse_unknown(values)
    draws = resampled_over_seeds(values[..., None], groups, seed)[:, 0]
    tie = _TIE * float(np.abs(values).mean())  # Differences that cancel leave a rounding error.
    count = min(np.count_nonzero(draws <= tie), np.count_nonzero(draws >= -tie))
    return {**interval(float(values.mean()), draws), "p": min(1.0, 2 * (1 + count) / (1 + len(draws)))}


def _refuse_unknown(values: np.ndarray) -> None:
    """Raise ValueError for NaN, and where there is no value."""
    if not values.size or np.isnan(values).any():
        raise ValueError(f"over_seeds: shape {values.shape}, {np.isnan(values).sum()} values without a number")


def resampled_over_seeds(values: np.ndarray, groups: Sequence[object], seed: int = 0) -> np.ndarray:
    """The means of C systems in the RESAMPLES resamples of :func:`over_seeds`, which are the same for all systems.

    values: (S, Q, C) scores of S seeds, without NaN.
    groups, seed: see :func:`over_seeds`.

    Returns (RESAMPLES, C) means.
    """
    _, group = np.unique(np.asarray([str(label) for label in groups]), return_inverse=True)
    (seeds, queries, systems), count = values.shape, int(group.max()) + 1
    sums = np.zeros((count, seeds * systems + 1))
    flat = values.transpose(1, 0, 2).reshape(queries, -1)
    np.add.at(sums, group, np.column_stack([flat, np.ones(queries)]))
    rng, means = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // 100):
        totals = rng.multinomial(count, np.full(count, 1 / count), 100) @ sums
        drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), 100)
        shaped = totals[:, :-1].reshape(100, seeds, systems)
        means.append((shaped * drawn[..., None]).sum(axis=1) / (seeds * totals[:, -1:]))
    return np.concatenate(means)


def interval(mean: float, draws: np.ndarray) -> dict[str, float]:
    """A mean with its 95% percentile interval, as mean, low and high. draws: its values in the bootstrap resamples."""
    # The mean of equal scores depends on the order of the sum in its last digit. It must not lie outside the interval.
    low, high = (
        mean if abs(end - mean) <= _TIE * max(1.0, abs(mean)) else end for end in np.percentile(draws, [2.5, 97.5])
    )
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def _shared(values: np.ndarray, groups: Sequence[object] | None) -> list[str] | None:
    """The labels of the queries whose value is not NaN. None = no two of them have the same label."""
    if groups is None:
        return None
    known = [str(label) for label, value in zip(groups, values, strict=True) if not np.isnan(value)]
    return known if len(set(known)) < len(known) else None


def randomisation(
    differences: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, groups: Sequence[object] | None = None
) -> float:
    """The two-sided p value of the paired randomisation test of two systems.

    It is the probability that the mean difference is at least as far from 0 as the observed one, if the two systems
    were exchanged at random for each query. For up to EXACT_UP_TO queries with a difference, all sign patterns are
    tried. For more, random patterns are drawn, and the observed one is added: p = (1 + hits) / (1 + resamples), which
    is never 0.

    differences: (Q,) differences of the two systems' scores. NaN = the query is left out.
    seed: of the random patterns.
    resamples: the number of random patterns.
    groups: Q labels. The systems are exchanged for all queries of a group together. None = every query is a group of
        its own.

    Returns 1 without a query, and without any difference.
    """
    known = differences[~np.isnan(differences)].astype(np.float64)
    shared = _shared(differences, groups)
    if shared is not None:
        _, group = np.unique(np.asarray(shared), return_inverse=True)
        sums, sizes = np.bincount(group, known), np.bincount(group, np.abs(known))
        known = np.where(np.abs(sums) > _TIE * sizes, sums, 0.0)  # Differences that cancel leave a rounding error.
    known = known[known != 0]
    if not len(known):
        return 1.0
    observed = abs(known.sum()) - _TIE * np.abs(known).sum()
    if len(known) <= EXACT_UP_TO:
        patterns = (np.arange(2 ** len(known))[:, None] >> np.arange(len(known))) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ known) >= observed))
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, resamples, 1000):  # In blocks, because of the memory.
        signs = 1.0 - 2.0 * rng.integers(0, 2, (min(1000, resamples - start), len(known)), dtype=np.int8)
        hits += int(np.count_nonzero(np.abs(signs @ known) >= observed))
    return (1 + hits) / (1 + resamples)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p values for their number.

    If all corrected values below alpha count as findings, the probability of any false finding is at most alpha.
    """
    order = np.argsort(np.asarray(p), kind="stable")
    adjusted = np.empty(len(order))
    running = 0.0
    for place, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - place) * float(p[i])))
        adjusted[i] = running
    return [float(value) for value in adjusted]
