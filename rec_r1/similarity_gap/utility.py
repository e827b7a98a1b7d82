"""What rankings are worth: metrics of systems with intervals, by slice, the share of a gap that each system closes, and
paired differences. Pure functions.

Shapes: Q queries, T targets per query, S systems, M metrics, n documents in the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rec_r1.evaluation.significance import interval, resampled
from rec_r1.similarity_gap.held_out import FEWEST_USERS, HeldOut
from rec_r1.tasks import Split
from rec_r1.tasks.sequences import label
from rewards import RankingReward
from rewards.types import Outcome

DEPTHS = (10, 50, 100)
METRICS = tuple(f"{name}@{k}" for name in ("ndcg", "recall") for k in DEPTHS)
MAIN = "ndcg@10"
UNLIKE = "relevant, not similar"
TINY = 1e-12  # A spread below this is a rounding error.


def scored(held_out: HeldOut, ranks: np.ndarray) -> np.ndarray:
    """(Q, T) int32 ranks of the targets, 0 = not retrieved -> (Q, M) float64 values, in the order of `METRICS`."""
    outcome = Outcome(held_out.split.queries, held_out.queries, ranks, held_out.grades)
    columns = [RankingReward(name, int(k))(outcome) for name, _, k in (m.partition("@") for m in METRICS)]
    return np.stack(columns, axis=1).astype(np.float64)


def listed(held_out: HeldOut, ranks: np.ndarray) -> np.ndarray:
    """(Q, T) int32 ranks of the targets, 0 = not retrieved -> (Q,) float64: the share of a query's targets that have a
    rank at any depth."""
    return np.asarray((ranks > 0).sum(axis=1) / np.maximum((held_out.targets >= 0).sum(axis=1), 1), np.float64)


def labels(split: Split, counts: np.ndarray, warm_from: int) -> list[str]:
    """Q labels of the targets: warm, tail or cold; "" for a task that does not label its targets.

    split: the queries.
    counts: (n,) ints; how often each item occurs in what was fitted on. With task.params.fit_share this is a part of
        training, while the task's own labels count all of it.
    warm_from: a target is warm if it was chosen so often, cold if it never was, and tail in between.
    """
    if "target" not in split.slices:
        return [""] * len(split)
    return [label(counts[targets[0]], warm_from) for targets in split.rows]


def unlike(split: Split, near: Sequence[np.ndarray]) -> np.ndarray:
    """(Q,) bool: no text of a query's history is similar to one of its targets.

    split: the queries.
    near: for each encoder (n, k) rows: the k nearest other documents of each document, which are similar to it.
    """
    out = np.ones(len(split), bool)
    for q, (history, targets) in enumerate(zip(split.histories, split.rows, strict=True)):
        rows = list(dict.fromkeys(history))
        out[q] = not any(np.isin(targets, lists[rows]).any() for lists in near)
    return out


def slices(of_targets: Sequence[str], not_similar: np.ndarray | None, users: Sequence[str]) -> dict[str, np.ndarray]:
    """name -> (Q,) bool: all queries, those of each label, and those whose targets are relevant and not similar.

    A slice with queries of fewer than `FEWEST_USERS` users is left out.

    of_targets: Q labels, see :func:`labels`.
    not_similar: (Q,) bool, see :func:`unlike`. None = unknown.
    users: Q labels; whose query it is.
    """
    names = np.asarray(of_targets)
    found = {"all": np.ones(len(names), bool)}
    found |= {f"{name} targets": names == name for name in ("warm", "tail", "cold")}
    if not_similar is not None:
        found[UNLIKE] = not_similar
    people = np.asarray(users)
    return {name: mask for name, mask in found.items() if len(set(people[mask])) >= FEWEST_USERS}


class Table:
    """S systems on one slice. The queries are resampled once, and all intervals are of the same resamples.

    values: name -> (Q, M), the values of each system.
    users: Q labels. The queries of one user are drawn together, see `significance.resampled`.
    mask: (Q,) bool, the queries of the slice.
    """

    def __init__(self, values: Mapping[str, np.ndarray], users: Sequence[str], mask: np.ndarray) -> None:
        self.names = list(values)
        stacked = np.concatenate([each[mask] for each in values.values()], axis=1)
        chosen = [user for user, here in zip(users, mask, strict=True) if here]
        self.queries, self.users = len(chosen), len(set(chosen))
        self._values = stacked.reshape(len(stacked), len(self.names), -1)
        self._means = stacked.mean(axis=0).reshape(len(self.names), -1)
        self._draws = resampled(stacked, chosen).reshape(-1, *self._means.shape)

    def place(self, name: str, metric: str) -> tuple[int, int]:
        """Where a system and a metric are in the arrays."""
        return self.names.index(name), METRICS.index(metric)

    def mean(self, name: str, metric: str = MAIN) -> float:
        """The mean of one system."""
        return float(self._means[self.place(name, metric)])

    def of(self, name: str, metric: str = MAIN) -> dict[str, float]:
        """The mean of one system, and the low and high ends of its interval."""
        s, m = self.place(name, metric)
        return interval(self._means[s, m], self._draws[:, s, m])

    def difference(self, one: str, two: str, metric: str = MAIN) -> dict[str, float]:
        """The same of the paired difference ``one`` minus ``two``."""
        (a, m), (b, _) = self.place(one, metric), self.place(two, metric)
        return interval(self._means[a, m] - self._means[b, m], self._draws[:, a, m] - self._draws[:, b, m])

    def differing(self, one: str, two: str, metric: str = MAIN) -> int:
        """The number of queries for which two systems have different values."""
        (a, m), (b, _) = self.place(one, metric), self.place(two, metric)
        return int(np.count_nonzero(self._values[:, a, m] != self._values[:, b, m]))

    def best(self, names: Sequence[str], metric: str = MAIN) -> str:
        """The system with the largest mean; among equals, the first."""
        return max(names, key=lambda name: self.mean(name, metric))

    def chosen(
        self, best: str, names: Sequence[str], against: str | None = None, metric: str = MAIN
    ) -> dict[str, float]:
        """The mean of a system that was chosen as the best, with an interval that is corrected for the choice.

        best: the system.
        names: the systems among which it was chosen by these same queries. ``against``, if it is one of them, does not
            count.
        against: another system; the result is then of ``best`` minus ``against``. None = of ``best`` alone.
        metric: the metric.

        The largest of several means is partly the largest by chance, so that its own interval would be too high. This
        interval holds for all of ``names`` at once: its width is that of the largest studentised deviation among them
        (the max statistic of Romano & Wolf 2005, "Stepwise multiple testing").
        """
        if best == against:
            return self.difference(best, best, metric)
        among = [name for name in names if name != against]
        places, m = [self.names.index(name) for name in among], METRICS.index(metric)
        means, draws = self._means[places, m], self._draws[:, places, m]
        if against is not None:
            other = self.names.index(against)
            means, draws = means - self._means[other, m], draws - self._draws[:, other, m, None]
        spread = draws.std(axis=0)
        off = (draws - means) / np.where(spread > TINY, spread, np.inf)
        above, below = np.percentile(off.max(axis=1), 97.5), np.percentile(off.min(axis=1), 2.5)
        b = among.index(best)
        mean, step = float(means[b]), float(spread[b])
        return {"mean": mean, "low": float(mean - above * step), "high": float(mean - below * step)}

    def closed(self, name: str, text: str, best: str, metric: str = MAIN) -> dict[str, float | None]:
        """The share of the gap that a system closes, (name - text) / (best - text), with its interval.

        name: the system.
        text, best: the two ends of the gap, which are the same systems in every resample.
        metric: the metric.

        Everything is None if the gap is 0. low and high are None if the interval of the gap, see :meth:`chosen`, holds
        0: a ratio has no bounds if its denominator may be 0 (Fieller 1954).
        """
        (s, m), (t, _), (b, _) = (self.place(each, metric) for each in (name, text, best))
        gap = self._means[b, m] - self._means[t, m]
        if gap <= 0:
            return {"mean": None, "low": None, "high": None}
        share = float((self._means[s, m] - self._means[t, m]) / gap)
        gaps = self._draws[:, b, m] - self._draws[:, t, m]
        if self.chosen(best, self.names, text, metric)["low"] <= 0:
            return {"mean": share, "low": None, "high": None}
        sound = gaps > 0
        shares = (self._draws[sound, s, m] - self._draws[sound, t, m]) / gaps[sound]
        return {**interval(share, shares)}

    def rows(self) -> list[dict[str, Any]]:
        """One row per system: its name, and the mean and interval of every metric."""
        return [{"system": name, "metrics": {m: self.of(name, m) for m in METRICS}} for name in self.names]
