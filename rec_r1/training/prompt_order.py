"""The order in which a training asks its prompts.

It depends only on the seed, the epoch, and the rewards of earlier epochs, so a resumed run asks the same prompts as an
uninterrupted one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

LEAST_PROBABILITY = 0.1  # Every prompt is asked again with at least this probability in each epoch.


def seed_of(seed: int, epoch: int) -> int:
    """The seed of an epoch's order. It has 32 bits, because torch's CPU generator takes no more.

    seed: the run's seed. It is used unchanged for the first epoch, as TRL does.
    epoch: the epoch, from 0.
    """
    return seed if epoch == 0 else int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def draw(dead: Sequence[int], explore: float, batch: int, seed: int) -> list[int]:
    """Choose and order the N prompts of an epoch.

    Every prompt whose last group was live is asked once. A prompt whose last groups were dead may be skipped, and a
    prompt with a live group is asked a second time in its place. Where there are too few of those, skipped prompts are
    asked after all. Skipping prompts by their earlier rewards follows GRESO (Zheng et al. 2025, arXiv:2506.02177).

    dead: N counts. For each prompt, how many of its latest groups in a row were dead. 0 = the last one was live, or the
        prompt has not been asked yet.
    explore: a prompt is asked again with probability explore^dead, or LEAST_PROBABILITY if that is larger.
    batch: how many prompts in a row are asked together. A prompt is put twice into one batch only where this cannot be
        avoided.
    seed: the seed of the epoch, from :func:`seed_of`.

    Returns N numbers of prompts, from 0.
    """
    rng = np.random.default_rng(seed)
    counts = np.asarray(dead)
    asked = (counts == 0) | (rng.random(len(counts)) < np.maximum(explore ** counts.astype(float), LEAST_PROBABILITY))
    fill = np.concatenate([rng.permutation(np.flatnonzero(counts == 0)), rng.permutation(np.flatnonzero(~asked))])
    order = [*rng.permutation(np.flatnonzero(asked)).tolist(), *fill[: int((~asked).sum())].tolist()]
    return _without_repetitions(order, batch)


def _without_repetitions(order: list[int], batch: int) -> list[int]:
    """``order``, in which each repetition inside a batch is swapped with a prompt of a later or earlier batch."""
    for place, prompt in enumerate(order):
        start = place - place % batch
        if prompt not in order[start:place]:
            continue
        own_batch = set(order[start : start + batch])
        for other in [*range(start + batch, len(order)), *range(start)]:
            other_start = other - other % batch
            if order[other] not in own_batch and prompt not in order[other_start : other_start + batch]:
                order[place], order[other] = order[other], prompt
                break
    return order


class PromptOrder:
    """TRL's RepeatSampler with a new seed for each epoch. From the second epoch on, :func:`draw` chooses the prompts.

    TRL draws the orders of all epochs from one generator, so a resumed process would start with the first order.

    repeated: TRL's RepeatSampler.
    seed: the run's seed.
    epoch: returns the number of the epoch that begins, from 0.
    dead: takes an epoch, and returns the counts for `draw` as they were when that epoch began. None = all prompts are
        asked equally often.
    explore: the argument of `draw`. 1 = all prompts are asked equally often.
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
