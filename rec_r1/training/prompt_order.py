"""The order in which prompts are asked: a function of the seed, the epoch and what prompts earned before it, so that a
resumed run repeats the uninterrupted one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

LEAST = 0.1  # how likely a prompt is asked again, however often its completions all earned the same


def seed_of(seed: int, epoch: int) -> int:
    """The seed of an epoch's order, 32 bits (all that torch's CPU generator takes). The first epoch has TRL's own."""
    return seed if epoch == 0 else int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def draw(dead: Sequence[int], explore: float, batch: int, seed: int) -> list[int]:
    """An epoch's N prompts, of N: all that teach something once, and once more in place of prompts that do not.

    dead: N, how many times in a row, when a prompt was asked, its completions all earned the same; 0 = they did not the
    last time, or it was not asked yet. explore: a prompt is asked again with probability explore^dead, at least LEAST
    (after GRESO, Zheng et al. 2025, arXiv:2506.02177, which skips prompts by their rewards in earlier epochs). Where
    the prompts that teach are too few to fill the gaps, the others do. batch: so many prompts in a row are asked
    together, none of them twice as far as that can be had.
    """
    rng = np.random.default_rng(seed)
    times = np.asarray(dead)
    asked = (times == 0) | (rng.random(len(times)) < np.maximum(explore ** times.astype(float), LEAST))
    fill = np.concatenate([rng.permutation(np.flatnonzero(times == 0)), rng.permutation(np.flatnonzero(~asked))])
    order = [*rng.permutation(np.flatnonzero(asked)).tolist(), *fill[: int((~asked).sum())].tolist()]
    return _apart(order, batch)


def _apart(order: list[int], batch: int) -> list[int]:
    """``order`` with repetitions inside a batch exchanged for a later prompt, or else for an earlier one."""
    for place, prompt in enumerate(order):
        start = place - place % batch
        if prompt not in order[start:place]:
            continue
        mine = set(order[start : start + batch])
        for other in [*range(start + batch, len(order)), *range(start)]:
            there = other - other % batch
            if order[other] not in mine and prompt not in order[there : there + batch]:
                order[place], order[other] = order[other], prompt
                break
    return order


class PromptOrder:
    """TRL's RepeatSampler, seeded anew for every epoch; from the second on with the prompts that :func:`draw` chooses.

    TRL draws all epochs from one generator, so that a new process would begin with the order of the first one.
    epoch: gives the number of the epoch that begins, from 0. dead: an epoch -> `draw`'s, as known when it began; None =
    all prompts equally often.
    """

    def __init__(
        self,
        repeated: Any,
        seed: int,
        epoch: Callable[[], int],
        dead: Callable[[int], Sequence[int]] | None = None,
        explore: float = 1.0,
    ) -> None:
        self.repeated = repeated
        self.seed = seed
        self.epoch = epoch
        self.dead = dead
        self.explore = explore

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        if not self.repeated.shuffle:
            return iter(self.repeated)
        known = [] if self.dead is None or self.explore == 1 else self.dead(epoch)
        if epoch and any(known):
            order = draw(known, self.explore, self.repeated.batch_size, seed_of(self.seed, epoch))
            in_order = copy.copy(self.repeated)
            in_order.shuffle = False
            return (order[place] for place in in_order)
        self.repeated.generator.manual_seed(seed_of(self.seed, epoch))
        return iter(self.repeated)

    def __len__(self) -> int:
        return len(self.repeated)
