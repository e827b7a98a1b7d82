"""The policy that a training begins with: the recipe's model, or the same model after a warm start by SFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rec_r1 import models
from rec_r1.baselines.sft_dpo import warm_start
from rec_r1.config import RUN_FILE, Recipe
from rec_r1.environment import Environment
from rec_r1.trl_options import lora_config


def first_policy(recipe: Recipe, env: Environment, source: str) -> tuple[Any, Any]:
    """Load the policy that GRPO begins with. A warm start is trained first, unless that was done before.

    recipe: the recipe. With `warm_start.samples` its output_dir gets the folder `warm_start`.
    env: its task, format and Scorer.
    source: the model, a result of `models.resolve`.

    Returns the policy, and the `peft.LoraConfig` of the adapter that the trainer must add. It is None where all weights
    are trained, and where the policy already has the adapter of the warm start, which GRPO trains further.

    Raises UserError as `sft_dpo.warm_start`.
    """
    lora = lora_config(recipe)
    if not recipe.warm_start.samples:
        return models.load_policy(source, recipe.model, all_weights_train=lora is None), lora
    folder = Path(recipe.output_dir)
    weights = folder / "warm_start"
    # A run that has begun keeps its warm start: `runs.prepare` has compared the settings, and lets some of them change.
    if not ((folder / RUN_FILE).is_file() and weights.is_dir()):
        weights = warm_start(recipe, env).weights
    if lora is None:
        return models.load_policy(str(weights), recipe.model, all_weights_train=True), None
    from peft import PeftModel

    policy: Any = models.load_policy(source, recipe.model)
    return PeftModel.from_pretrained(policy, str(weights), is_trainable=True), None
