"""Hooks of TRL's SFTTrainer and DPOTrainer."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from rec_r1.config import Recipe
from rec_r1.environment import Environment
from rec_r1.evaluation.evaluate import metric_scorer, validation_split
from rec_r1.generation import generate, sampling_of
from rec_r1.tasks import prompts


class KeepBest(TrainerCallback):
    """Evaluates the policy on the validation split when the recipe's own training does, and keeps the best one.

    recipe, env: the recipe, and its task, format and Scorer.
    folder: where the best policy is saved.

    Set ``trainer`` before the training begins.
    """

    def __init__(self, recipe: Recipe, env: Environment, folder: Path) -> None:
        self.split = validation_split(recipe, env)
        self.asked = prompts(self.split, env.task.catalog, env.format)
        self.recipe, self.folder = recipe, folder
        self.scorer = metric_scorer(env.scorer, recipe.evaluation.metrics[:1])
        self.best, self.step, self.seconds = -math.inf, 0, 0.0
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.recipe.evaluation.every_steps
        if not every or not (state.global_step >= state.max_steps or state.global_step % every == 0):
            return
        started = time.monotonic()
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        model.eval()
        sampling, at_once = sampling_of(self.recipe), self.recipe.evaluation.batch_size
        completions = generate(model, tokenizer, self.asked, sampling, at_once)
        model.train()
        value = float(np.mean(self.scorer.score_split(completions, self.split).whole().rewards))
        if value > self.best:
            self.best, self.step = value, state.global_step
            self.trainer.save_model(str(self.folder))
        self.seconds += time.monotonic() - started
