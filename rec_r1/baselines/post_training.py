"""Train a policy with TRL's SFTTrainer or DPOTrainer, under the conditions of the recipe's own training.

It makes as many updates as the training by reinforcement learning, and its policy is chosen on the validation queries
in the same way. Otherwise the comparison would show how long each was trained.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

from rec_r1 import models
from rec_r1.config import Recipe, refuse
from rec_r1.config.passthrough import problems
from rec_r1.console import blamed_on
from rec_r1.environment import Environment
from rec_r1.evaluation import budget
from rec_r1.generation import write_as_evaluated
from rec_r1.tasks import keep_headroom
from rec_r1.trl_options import batch_sizes, hub_token_to_environment, lora_config

logger = logging.getLogger(__name__)
# Options of the recipe's `grpo` section that depend on the machine. SFT and DPO use them, too.
_OF_MACHINE = ("gradient_checkpointing", "bf16", "use_cpu", "report_to", "disable_tqdm")
# With a vocabulary of 49,152 tokens, 96 examples at once took 11.4 GB where 16 take 3.6, and were no faster. TRL's
# other trainers keep the logits of all tokens, prompts included, which RL's loss does not.
_MOST_AT_ONCE = 16
_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")


class Training:
    """A training of a recipe's policy by SFT or DPO.

    recipe, env: the recipe, and its task, format and Scorer.
    kind: a baseline of `sft_dpo.METHODS`, or warm_start.

    Raises UserError for options that TRL refuses.
    """

    def __init__(self, recipe: Recipe, env: Environment, kind: str) -> None:
        self.recipe, self.env, self.kind = recipe, env, kind
        self.config = _config(recipe, kind)

    def train(self, rows: list[dict[str, Any]], folder: Path, queries: int | None = None) -> float:
        """Train a policy on training examples, and save it in a folder.

        rows: prompts and completions, as TRL's trainers read them.
        folder: where the policy is saved.
        queries: how many training queries pass the recipe's filter. None = they are counted here.

        Returns how many seconds it took, without validation.
        """
        from datasets import Dataset
        from transformers import PrinterCallback, set_seed
        from trl import DPOTrainer, SFTTrainer

        from rec_r1.baselines.callbacks import KeepBest

        started = time.monotonic()
        recipe, config = self.recipe, self.config
        self._set_batch(len(rows), queries)
        config.output_dir = str(folder)
        models.keep_freed_memory()
        source, lora = models.resolve(recipe.model.name), lora_config(recipe)
        set_seed(recipe.seed)
        trainer_class: Any = DPOTrainer if self.kind == "dpo" else SFTTrainer
        options = recipe.grpo.get("chat_template_kwargs")
        if options:
            rows = [{**row, "chat_template_kwargs": options} for row in rows]
        tokenizer = models.load_tokenizer(source, recipe.model.trust_remote_code)
        policy = models.load_policy(source, recipe.model, all_weights_train=lora is None)
        write_as_evaluated(policy, tokenizer, recipe)
        with blamed_on(*section_of(recipe, self.kind)):
            trainer = trainer_class(
                model=policy,
                args=config,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                peft_config=lora,
            )
        trainer.remove_callback(PrinterCallback)
        keep = None
        if self.kind != "warm_start":
            keep = KeepBest(recipe, self.env, folder)
            keep.trainer = trainer
            trainer.add_callback(keep)
        at_once, parts = config.per_device_train_batch_size, config.gradient_accumulation_steps
        name, kind, batch = recipe.model.name, self.kind.replace("_", " "), at_once * parts
        logger.info("training %s by %s on %d examples, %d an update", name, kind, len(rows), batch)
        trainer.train()
        if keep is None or not keep.step:
            trainer.save_model(str(folder))
        else:
            logger.info("the best of %d updates on validation is %d", trainer.state.global_step, keep.step)
        models.drop_pickles(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template, which says nothing about this policy.
        return time.monotonic() - started - (keep.seconds if keep else 0.0)

    def _set_batch(self, examples: int, queries: int | None) -> None:
        """Choose how many examples an update reads, so that there are as many updates as in the recipe's training.

        With RL's own batch, SFT would make only a few updates, because it has one example for a prompt. In a warm
        start, which is compared with nothing, an update reads 16. Sizes that the recipe sets remain as they are.
        """
        recipe, config = self.recipe, self.config
        if section_of(recipe, self.kind)[1].keys() & set(_SIZES):
            return
        most, batch = batch_sizes(recipe, 1).at_once, _MOST_AT_ONCE
        if self.kind != "warm_start":
            if queries is None:
                queries = len(keep_headroom(self.env.task.train, self.env.retriever, recipe.task.train_filter))
            batch = round(examples * config.num_train_epochs / budget.updates(recipe, queries))
        batch = max(1, min(batch, most))
        parts = math.ceil(batch / _MOST_AT_ONCE)
        config.per_device_train_batch_size, config.gradient_accumulation_steps = math.ceil(batch / parts), parts


def _config(recipe: Recipe, kind: str) -> Any:
    """The `trl.SFTConfig` or `trl.DPOConfig` of a recipe. Raises UserError for options that TRL refuses."""
    import torch
    from trl import DPOConfig, SFTConfig

    cls: Any = DPOConfig if kind == "dpo" else SFTConfig
    section, given = section_of(recipe, kind)
    refuse(problems(section, given, cls))
    options: dict[str, Any] = {"report_to": [], "logging_steps": 10, "save_strategy": "no", "max_length": None}
    if not torch.cuda.is_available():
        options |= {"use_cpu": True, "bf16": False}
    options |= {key: recipe.grpo[key] for key in _OF_MACHINE if key in recipe.grpo}
    options["per_device_train_batch_size"] = min(batch_sizes(recipe, 1).at_once, _MOST_AT_ONCE)
    if recipe.lora is not None:
        # TRL's own rates are for all weights. The best one for LoRA is about ten times as high, so that a baseline with
        # TRL's rate would be too easy to beat. (LoRA Without Regret, Schulman et al. 2025.)
        options["learning_rate"] = 10 * cls.__dataclass_fields__["learning_rate"].default
    from_recipe = {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "trust_remote_code": recipe.model.trust_remote_code,
    }
    with blamed_on(section, given):
        return cls(**{**from_recipe, **options, **hub_token_to_environment(given, section)})


def section_of(recipe: Recipe, kind: str) -> tuple[str, dict[str, Any]]:
    """The section of the recipe with the options of a trainer: its name, and the options."""
    baselines = recipe.baselines
    return {
        "warm_start": ("warm_start.sft", recipe.warm_start.sft),
        "sft": ("baselines.sft", baselines.sft),
        "reward_weighted_sft": ("baselines.reward_weighted_sft", baselines.reward_weighted_sft),
        "dpo": ("baselines.dpo", baselines.dpo),
    }[kind]
