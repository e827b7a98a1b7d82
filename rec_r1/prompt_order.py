"""The order in which a training takes its prompts, a function of (seed, epoch): a resumed run finds it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def seed_of(seed: int, epoch: int) -> int:
    """The seed of an epoch's order, 32 bits (all that torch's CPU generator takes). The first epoch has TRL's own."""
    return seed if epoch == 0 else int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


class PromptOrder:
    """TRL's RepeatSampler, seeded anew for every epoch.

    TRL draws all epochs from one generator, so that a new process would begin with the order of the first one.
    epoch: gives the number of the epoch that begins, from 0.
    """

    def __init__(self, repeated: Any, seed: int, epoch: Callable[[], int]) -> None:
        self.repeated = repeated
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.repeated.shuffle:
            self.repeated.generator.manual_seed(seed_of(self.seed, self.epoch()))
        return iter(self.repeated)

    def __len__(self) -> int:
        return len(self.repeated)
