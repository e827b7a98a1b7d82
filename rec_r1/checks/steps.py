"""How many steps a training has: what TRL's sampler makes of the training queries that are left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from rec_r1.config import Recipe, UserError


class Steps(NamedTuple):
    """prompts: distinct queries per generation batch. used: queries asked per epoch, of ``queries`` available; the
    sampler shuffles anew for every epoch and drops the last, incomplete batch. epoch, total: optimizer steps."""

    queries: int
    prompts: int
    used: int
    epoch: int
    total: int

    def __str__(self) -> str:
        rest = self.queries - self.used
        drop = f" (another {rest} left out each time)" if rest else ""
        return f"{self.total} in all; an epoch asks {self.used} of {self.queries} training queries{drop}"


def plan(recipe: Recipe, queries: int, args: Any) -> Steps:
    """What ``trl.GRPOConfig`` ``args`` make of so many training queries.

    As in TRL 1.16: `RepeatSampler` deals the queries to batches of generation_batch_size / num_generations and drops
    what is left over, each batch serves num_iterations x steps_per_generation forward passes, and
    `Trainer.set_initial_training_values` counts gradient_accumulation_steps of these as one step. Raises UserError,
    with settings that work, where the queries do not fill one batch.
    """
    prompts = args.generation_batch_size // args.num_generations
    batches = queries // prompts
    if not batches:
        raise UserError(_too_few(recipe, queries, prompts, args))
    passes = batches * args.num_iterations * args.steps_per_generation
    epoch = math.ceil(passes / args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    return Steps(queries, prompts, batches * prompts, epoch, total)


def _too_few(recipe: Recipe, queries: int, prompts: int, args: Any) -> str:
    ways = []
    if queries and (settings := next(_smaller(recipe, queries, args), None)):
        ways.append(f"set {settings}")
    task = recipe.task
    if task.train_filter.raw_ndcg_below <= 1:
        ways.append(f"raise task.train_filter.raw_ndcg_below={task.train_filter.raw_ndcg_below:g} (1.01 keeps all)")
    if task.candidates:
        ways.append(f"raise task.candidates={task.candidates}")
    if recipe.format.examples:
        ways.append(f"lower format.examples={recipe.format.examples}")
    ways.append("add training queries")
    return (
        f"grpo: a batch of {args.generation_batch_size} completions, {args.num_generations} a prompt, takes {prompts} "
        f"training queries, and {queries} are left: training would end after 0 steps: {', or '.join(ways)}"
    )


def _smaller(recipe: Recipe, queries: int, args: Any) -> Iterator[str]:
    """Settings of `grpo` with which so many queries fill a batch, those that change least first."""
    size, parts, group = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_generations
    choices = [(size, smaller, group) for smaller in range(parts, 0, -1)]
    choices += [(smaller, 1, group) for smaller in range(size - 1, 0, -1)]
    choices += [(smaller, 1, smaller) for smaller in range(group - 1, 1, -1)]
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    unset = [name for name in ("generation_batch_size", "steps_per_generation") if recipe.grpo.get(name) is not None]
    for choice in choices:
        completions = choice[0] * choice[1] * args.world_size
        if completions % choice[2] == 0 and completions // choice[2] <= queries:
            changed = zip(names, choice, (size, parts, group), strict=True)
            settings = [f"grpo.{name}={new}" for name, new, old in changed if new != old]
            yield " ".join([*settings, *(f"grpo.{name}=null" for name in unset)])
