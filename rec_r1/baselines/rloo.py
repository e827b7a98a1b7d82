"""The baseline RLOO (Ahmadian et al. 2024, arXiv:2402.14740), which is REINFORCE with the mean of the other samples.

It is a training like that of the recipe, in a folder of its own, with another loss: the same prompts, rewards, rollouts
and steps, and the best checkpoint by validation.

It is trained by TRL's GRPOTrainer with options that make its gradient that of RLOO. TRL's RLOOTrainer (1.16) has no
`rollout_func`, so its completions would not end where the action is complete, as those of the recipe's training do.
With G completions of a prompt:

- RLOO's advantage is the reward minus the mean of the other G - 1, which is G / (G - 1) times the reward minus the mean
  of all G. The latter is GRPO's advantage with `scale_rewards: none`.
- RLOO's loss is minus the mean over completions of the advantage times the probability ratio of the whole completion.
  Where each generation is used in one step, all ratios are 1, and the gradient is that of the log probability of the
  completion, which is the sum over its tokens. GRPO's `loss_type: luspo` has this gradient.
- The factor (G - 1) / G is the same for all completions. The updates of optimizers of the Adam family do not depend
  on it if `max_grad_norm` is multiplied by it, too.

`tests/rec_r1/test_rloo.py` compares the gradient with that of TRL's RLOOTrainer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rec_r1 import runs
from rec_r1.config import Recipe, UserError, refuse
from rec_r1.config.passthrough import problems
from rec_r1.trl_options import grpo_config, steps_a_generation

Train = Callable[[Recipe, bool], int]
_LOSS = {
    "loss_type": "luspo",
    "scale_rewards": "none",
    "importance_sampling_level": "sequence",
    "multi_objective_aggregation": "sum_then_normalize",
}


def recipe_of(recipe: Recipe) -> Recipe:
    """The recipe of the RLOO training. Its output_dir is `baselines/rloo` in that of ``recipe``.

    Raises UserError for options that TRL refuses, and where several steps use the completions of one generation.
    """
    from trl import GRPOConfig

    refuse(problems("baselines.rloo", recipe.baselines.rloo, GRPOConfig))
    fields: Any = GRPOConfig.__dataclass_fields__
    grpo = {**recipe.grpo, **recipe.baselines.rloo}
    group, most = (grpo.get(name, fields[name].default) for name in ("num_generations", "max_grad_norm"))
    clipped = {} if most is None else {"max_grad_norm": most * (group - 1) / group}
    folder = Path(recipe.output_dir) / "baselines" / "rloo"
    found = dataclasses.replace(recipe, output_dir=str(folder), grpo={**grpo, **_LOSS, **clipped})
    steps = steps_a_generation(grpo_config(found))
    if steps > 1:
        raise UserError(
            f"baseline rloo: {steps} steps use the completions of one generation, and GRPOTrainer's ratios of several "
            "steps are not those of RLOO: set baselines.rloo='{num_iterations: 1, steps_per_generation: null, "
            "generation_batch_size: null}'"
        )
    return found


def trained(recipe: Recipe, train: Train) -> Path:
    """Train the RLOO policy of a recipe, or continue its training, unless it is complete.

    recipe: the recipe.
    train: trains one recipe, and returns an exit code. It takes the recipe, and whether to resume.

    Returns the folder of its run. Raises UserError as :func:`recipe_of` and as ``train``, and KeyboardInterrupt where a
    signal stopped the training.
    """
    one = recipe_of(recipe)
    folder = Path(one.output_dir)
    if train(one, runs.is_started(folder)):
        raise KeyboardInterrupt
    return folder
