"""What rankings are worth to people: metrics of systems with intervals, by slice, the share of a gap that each closes,
and paired differences. Pure functions. Q queries, S systems, M metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rec_r1.evaluation.significance import interval, resampled
from rec_r1.tasks import Split, pad
from rec_r1.tasks.sequences import label
from rewards import RankingReward
from rewards.types import Outcome

DEPTHS = (10, 50, 100)
METRICS = tuple(f"{name}@{k}" for name in ("ndcg", "recall") for k in DEPTHS)
MAIN = "ndcg@10"
UNLIKE = "relevant, not similar"
FEWEST_USERS = 10  # whole users are resampled: of fewer, the intervals are too narrow to claim anything by
TINY = 1e-12  # a spread of less is rounding


def scored(split: Split, ranks: np.ndarray) -> np.ndarray:
    """(Q, T) int32 ranks of the targets, 0 = not retrieved -> (Q, M) float64, in the order of `METRICS`."""
    _, grades = pad(split.rows, split.grades)
    outcome = Outcome(split.queries, split.raw(), ranks, grades)
    columns = [RankingReward(name, int(k))(outcome) for name, _, k in (m.partition("@") for m in METRICS)]
    return np.stack(columns, axis=1).astype(np.float64)


def listed(split: Split, ranks: np.ndarray) -> np.ndarray:
    """(Q, T) int32 ranks of the targets, 0 = not retrieved -> (Q,) float64: the share of a query's targets that have
    a rank at all, however deep."""
    targets, _ = pad(split.rows, split.grades)
    return np.asarray((ranks > 0).sum(axis=1) / np.maximum((targets >= 0).sum(axis=1), 1), np.float64)


def labels(split: Split, counts: np.ndarray, warm_from: int) -> list[str]:
    """Q labels: warm where the target was chosen ``warm_from`` times or more, cold where never, tail between; "" for a
    task that does not label its targets. counts: (n,) ints, how often each item stands in what was fitted on: with
    task.params.fit_share this is a part of training, and the task's own labels are of all of it."""
    if "target" not in split.slices:
        return [""] * len(split)
    return [label(counts[targets[0]], warm_from) for targets in split.rows]


def unlike(split: Split, near: Sequence[np.ndarray]) -> np.ndarray:
    """(Q,) bool: none of a query's targets is among the ``near`` texts of anything in its history.

    near: for each encoder (n, k) rows, each document's k nearest others; a target that one of them names is similar.
    """
    out = np.ones(len(split), bool)
    for q, (history, targets) in enumerate(zip(split.histories, split.rows, strict=True)):
        rows = list(dict.fromkeys(history))
        out[q] = not any(np.isin(targets, lists[rows]).any() for lists in near)
    return out


def slices(of_targets: Sequence[str], not_similar: np.ndarray | None, users: Sequence[str]) -> dict[str, np.ndarray]:
    """name -> (Q,) bool: all, the labels of the target (warm, tail, cold), and relevant but not similar, of queries of
    `FEWEST_USERS` users or more each. of_targets: Q labels. users: Q labels, whose queries these are."""
    names = np.asarray(of_targets)
    found = {"all": np.ones(len(names), bool)}
    found |= {f"{name} targets": names == name for name in ("warm", "tail", "cold")}
    if not_similar is not None:
        found[UNLIKE] = not_similar
    people = np.asarray(users)
    return {name: mask for name, mask in found.items() if len(set(people[mask])) >= FEWEST_USERS}


class Table:
    """S systems on one slice, resampled once: every number of it comes from the same draws.

    values: name -> (Q, M). users: Q labels; whose queries are drawn together, see `significance.resampled`.
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
        return self.names.index(name), METRICS.index(metric)

    def mean(self, name: str, metric: str = MAIN) -> float:
        return float(self._means[self.place(name, metric)])

    def of(self, name: str, metric: str = MAIN) -> dict[str, float]:
        """mean, low, high of one system."""
        s, m = self.place(name, metric)
        return interval(self._means[s, m], self._draws[:, s, m])

    def difference(self, one: str, two: str, metric: str = MAIN) -> dict[str, float]:
        """mean, low, high of ``one`` minus ``two``, paired."""
        (a, m), (b, _) = self.place(one, metric), self.place(two, metric)
        return interval(self._means[a, m] - self._means[b, m], self._draws[:, a, m] - self._draws[:, b, m])

    def differing(self, one: str, two: str, metric: str = MAIN) -> int:
        """The number of queries that two systems have different values for."""
        (a, m), (b, _) = self.place(one, metric), self.place(two, metric)
        return int(np.count_nonzero(self._values[:, a, m] != self._values[:, b, m]))

    def best(self, names: Sequence[str], metric: str = MAIN) -> str:
        """The system of the largest mean, the first where some tie."""
        return max(names, key=lambda name: self.mean(name, metric))

    def chosen(
        self, best: str, names: Sequence[str], against: str | None = None, metric: str = MAIN
    ) -> dict[str, float]:
        """mean, low, high of ``best``, or of ``best`` minus ``against``, where ``best`` was chosen among ``names`` by
        these same queries. The largest of several means is likely to have been lucky, so that its own interval would
        lie too high. This one holds for all of ``names`` at once: its width is that of the largest studentised
        deviation among them (the max statistic of Romano & Wolf 2005, "Stepwise multiple testing").

        ``names`` may hold ``against``, which is no choice.
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
        """The share of the gap that a system closes, (M - text) / (best - text): mean, low, high.

        text and best are the same systems in every draw. All None where the gap is 0. low and high are None where the
        gap's own interval, see :meth:`chosen`, holds 0: a ratio to something that may be nothing has no bounds
        (Fieller 1954).
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
        """A row a system: system, metrics (name -> mean, low, high)."""
        return [{"system": name, "metrics": {m: self.of(name, m) for m in METRICS}} for name in self.names]
