"""The number of steps of a training, from the number of training queries and TRL's batch sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from rec_r1.config import Recipe, UserError


class Steps(NamedTuple):
    """The steps of a training.

    queries: the number of training queries.
    prompts: the number of distinct queries in one generation batch.
    used: the number of queries that one epoch asks. TRL's sampler shuffles the queries for each epoch, and drops the
        last batch where it is incomplete.
    epoch: the number of optimizer steps of one epoch.
    total: the number of optimizer steps of the training.
    """

    queries: int
    prompts: int
    used: int
    epoch: int
    total: int

    def __str__(self) -> str:
        rest = self.queries - self.used
        dropped = f" (each epoch leaves out another {rest})" if rest else ""
        return f"{self.total} in all; an epoch asks {self.used} of {self.queries} training queries{dropped}"


def plan(recipe: Recipe, queries: int, args: Any) -> Steps:
    """The steps of a training, computed as TRL 1.16 does.

    `RepeatSampler` puts the queries into batches of generation_batch_size / num_generations, and drops the rest. Each
    batch is used in num_iterations x steps_per_generation forward passes. `Trainer.set_initial_training_values` counts
    gradient_accumulation_steps of these passes as one step.

    recipe: the recipe.
    queries: the number of training queries.
    args: the `trl.GRPOConfig` of the recipe.

    Raises UserError, with settings that work, where the queries do not fill one batch.
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
    fixes = []
    if queries and (settings := next(_smaller(recipe, queries, args), None)):
        fixes.append(f"set {settings}")
    task = recipe.task
    if task.train_filter.raw_ndcg_below <= 1:
        fixes.append(f"raise task.train_filter.raw_ndcg_below={task.train_filter.raw_ndcg_below:g} (1.01 keeps all)")
    if task.candidates:
        fixes.append(f"raise task.candidates={task.candidates}")
    if recipe.format.examples:
        fixes.append(f"lower format.examples={recipe.format.examples}")
    fixes.append("add training queries")
    return (
        f"grpo: a batch of {args.generation_batch_size} completions, {args.num_generations} for each prompt, takes "
        f"{prompts} training queries, and {queries} are left, so training would end after 0 steps: "
        f"{', or '.join(fixes)}"
    )


def _smaller(recipe: Recipe, queries: int, args: Any) -> Iterator[str]:
    """Settings with which ``queries`` queries fill a batch, the smallest change first."""
    if recipe.prompts_per_step is not None:
        alone = " grpo.generation_batch_size=null" * (recipe.grpo.get("generation_batch_size") is not None)
        fewer = range(min(recipe.prompts_per_step, queries), 0, -1)
        yield from (f"prompts_per_step={n}{alone}" for n in fewer if n * args.num_generations % args.world_size == 0)
        return
    size, batches, group = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_generations
    choices = [(size, smaller, group) for smaller in range(batches, 0, -1)]
    choices += [(smaller, 1, group) for smaller in range(size - 1, 0, -1)]
    choices += [(smaller, 1, smaller) for smaller in range(group - 1, 1, -1)]
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    unset = [name for name in ("generation_batch_size", "steps_per_generation") if recipe.grpo.get(name) is not None]
    for choice in choices:
        completions = choice[0] * choice[1] * args.world_size
        if completions % choice[2] == 0 and completions // choice[2] <= queries:
            changed = zip(names, choice, (size, batches, group), strict=True)
            settings = [f"grpo.{name}={new}" for name, new, old in changed if new != old]
            yield " ".join([*settings, *(f"grpo.{name}=null" for name in unset)])
