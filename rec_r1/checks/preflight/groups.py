"""What the groups of sampled completions earn under a reward: live and dead groups, mean, best of the group, raw query.

N prompts, G completions each. Every number here comes from ranks that were computed once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rec_r1.scoring.earned import LIVE, cause, earned, exact_in_groups
from rewards import Outcome, WeightedSum


@dataclass(frozen=True)
class Groups:
    """The groups of N prompts under one reward.

    name: the name of the reward.
    causes: N times LIVE, or why the group is dead, see `rec_r1.scoring.earned.cause`. None = no reward applies.
    values: (N, G) float64 rewards, rounded as training rounds them.
    raw: (N,) float64 rewards of the raw queries.
    """

    name: str
    causes: Sequence[str | None]
    values: np.ndarray
    raw: np.ndarray

    @property
    def known(self) -> int:
        """The number of groups that are live or dead."""
        return sum(cause is not None for cause in self.causes)

    @property
    def live(self) -> int:
        """The number of live groups."""
        return self.causes.count(LIVE)

    @property
    def share(self) -> float:
        """The share of live groups. 0 where no reward applies to any group."""
        return self.live / max(1, self.known)

    @property
    def mean(self) -> np.ndarray:
        """(N,) mean rewards of the groups."""
        return np.asarray(self.values.mean(axis=1))

    @property
    def best(self) -> np.ndarray:
        """(N,) best rewards of the groups."""
        return np.asarray(self.values.max(axis=1))


def groups_of(name: str, reward: WeightedSum, outcome: Outcome, raw: Outcome, ids: Sequence[str]) -> Groups:
    """The groups of N prompts under a reward.

    name: how the reward is called in the table.
    reward: the reward.
    outcome: N x G completions with their ranks. Those of a prompt are neighbours.
    raw: the N raw queries with their ranks.
    ids: the ids of the N queries.
    """
    components = reward.components(outcome)
    total = reward.combine(components)
    samples = len(total) // len(ids)
    malformed = [action is None for action in outcome.actions]
    repeated = [query_id for query_id in ids for _ in range(samples)]
    rows = earned(reward, components, total, malformed, repeated)
    causes = [cause(rows[start : start + samples]) for start in range(0, len(rows), samples)]
    values = exact_in_groups(total.astype(np.float64)).reshape(len(ids), samples)
    return Groups(name, causes, values, reward(raw).astype(np.float64))


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share: Wilson's score interval (Wilson 1927). (0, 1) where ``total`` is 0."""
    from scipy.stats import binomtest

    if not total:
        return 0.0, 1.0
    found = binomtest(count, total).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def dead_share(values: np.ndarray, size: int) -> float:
    """The expected share of dead groups, if each prompt had only ``size`` of its G completions.

    For one prompt it is the probability that ``size`` completions, drawn without replacement, earn the same: the sum of
    C(n_v, size) / C(G, size) over its distinct rewards v, which n_v completions earn.

    values: (N, G) rewards.
    size: 1 to G.
    """
    ways = math.comb(values.shape[1], size)
    shares = [sum(math.comb(count, size) for count in Counter(row).values()) / ways for row in values.tolist()]
    return float(np.mean(shares))


def live_share_at_twice(groups: Groups) -> float:
    """An estimate of the share of live groups with 2G completions a prompt: 1 - dead(G) x dead(G) / dead(G / 2).

    dead(g) is the share of dead groups of g completions, see :func:`dead_share`. The estimate assumes that each
    doubling of the group leaves the same share of the dead groups dead. That holds for large groups if the probability
    that a completion earns something else than usual has a beta distribution over prompts, because dead(g) is then
    proportional to a power of g. It is too high where many prompts can never be live.
    """
    values = groups.values[[cause is not None for cause in groups.causes]]
    if not len(values):
        return 0.0
    dead, half = dead_share(values, values.shape[1]), dead_share(values, values.shape[1] // 2)
    return 1.0 - dead * dead / half if half else 1.0


def no_live_group(share: float, prompts: int) -> float:
    """The probability that no group of a step is live: (1 - share) ^ prompts.

    share: the share of live groups.
    prompts: the number of prompts of a step.
    """
    return float((1.0 - share) ** prompts)
