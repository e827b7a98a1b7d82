"""What makes a resumed training the uninterrupted one: the order of prompts, and the moments of checkpoints.

The order is a function of (seed, epoch). A checkpoint is taken only between two generations, because the completions
that the trainer still has to train on are in no checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import GRPOTrainer

from rec_r1.options import steps_a_generation


def seed_of(seed: int, epoch: int) -> int:
    """The seed of an epoch's order, 32 bits (all that torch's CPU generator takes). The first epoch has TRL's own."""
    return seed if epoch == 0 else int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


class PromptOrder(Sampler[int]):
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


class Trainer(GRPOTrainer):
    """GRPOTrainer with prompts in an order that a resumed run finds again."""

    def _get_train_sampler(self, dataset: Any = None) -> PromptOrder:
        # The state is what a checkpoint keeps; its epoch counts in fractions. The dataloader's own set_epoch does not
        # pass through every wrapper that accelerate puts around a sampler.
        return PromptOrder(super()._get_train_sampler(dataset), self.args.seed, lambda: int(self.state.epoch or 0))


class Between(TrainerCallback):
    """Puts a checkpoint that is due inside a generation off to its end, and logs before each one: what the trainer has
    gathered since its last log is in no checkpoint."""

    def __init__(self) -> None:
        self.due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.due = self.due or control.should_save
        now = control.should_training_stop or state.global_step % steps_a_generation(args) == 0
        control.should_save = self.due and now
        if control.should_save:
            self.due = False
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save  # save_strategy=epoch; no generation is open


def total_steps(args: Any, prompts: int) -> int:
    """The steps of a training on so many prompts, as the trainer counts them: a generation takes as many prompts as it
    can fill, an epoch's remainder is left out."""
    if args.max_steps > 0:
        return int(args.max_steps)
    generations = prompts // (args.generation_batch_size // args.num_generations)
    batches = generations * args.steps_per_generation * args.num_iterations
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))
