"""Check that a baseline has the settings of the run in its output folder, because both are compared there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rec_r1.baselines.settings import OF_BUDGET
from rec_r1.config import Recipe, UserError, comparable, load
from rec_r1.config.redaction import put_back, take_out
from rec_r1.generation import OPTIONS, Sampling, sampling_of
from rec_r1.runs.run_config import absolute, differences, may_change

# The sections of a recipe that a baseline must share with the run in its folder.
_SHARED_WITH_RUN = ("task", "retriever", "format", "grounding", "evaluation")
_NO_EFFECT_ON_SCORES = (  # Settings of these sections that may differ.
    "retriever.cache", "retriever.max_error_rate", "retriever.error_steps", "evaluation.every_steps",
    "evaluation.batch_size", "evaluation.validation_limit", "evaluation.transcript_hits",
)  # fmt: skip
# Baselines that must also share the section `model`, and those that must share the rewards.
_USES_MODEL = ("untrained", "few_shot", "best_of", "sft", "reward_weighted_sft", "dpo", "rloo", "prompt_search")
_USES_REWARDS = ("best_of", "sft", "reward_weighted_sft", "dpo", "rloo", "prompt_search")
# Baselines that are trained. They must also share the adapter, the seed and the number of steps.
_TRAINED = ("sft", "reward_weighted_sft", "dpo", "rloo")


def check_same_run(recipe: Recipe, name: str) -> None:
    """Raise UserError where the recipe's output_dir holds a run with other settings.

    The systems in one folder are compared with each other, so they need the same task, retriever, format and metrics.

    recipe: the recipe.
    name: the baseline. Baselines that use the recipe's model need the same model, and generate completions in the same
        way. Those that use its rewards need the same rewards, and those that are trained the same
        adapter, seed and number of steps.
    """
    source = Path(recipe.output_dir) / "config.yaml"
    if not source.is_file():
        return
    run = load(source)
    was, now = (take_out(comparable(absolute(one))) for one in (run, recipe))
    more = [*(["model"] if name in _USES_MODEL else []), *(["rewards"] if _uses_rewards(recipe, name) else [])]
    more += ["lora", "seed", "prompts_per_step"] if name in _TRAINED else []
    now["grpo"], was["grpo"] = ({k: one["grpo"].get(k) for k in _of_training(name)} for one in (now, was))
    for section in (*_SHARED_WITH_RUN, *more, "grpo"):
        for key, *values in differences(section, was[section], now[section]):
            # A server may be moved: its fingerprint is compared when the records of two systems are compared.
            if key.startswith(_NO_EFFECT_ON_SCORES) or (section in ("retriever", "grounding") and may_change(key)):
                continue
            before, here = map(put_back, values)
            raise UserError(
                f"{key}: {here!r}, but the run in {recipe.output_dir} has {before!r}: give {key} the run's value, or "
                "choose another folder with output_dir=FOLDER"
            )
    if name in (*_USES_MODEL, "endpoint") and _decoding(run) != _decoding(recipe):
        was, now = (_decoding_settings(one) for one in (run, recipe))
        key = next((key for key in was if was[key] != now[key]), "grpo.use_vllm")
        raise UserError(
            f"{key}: {now[key]!r}, but the run in {recipe.output_dir} has {was[key]!r}, so its policies generate "
            f"other completions: give {key} the run's value, or choose another folder with output_dir=FOLDER"
        )


def _of_training(name: str) -> tuple[str, ...]:
    """The options of GRPO that a baseline must share with the run, so that neither has more rollouts or updates."""
    rates = ("learning_rate", "lr_scheduler_type", "optim") if name == "rloo" else ()
    return (*OF_BUDGET, *rates) if name in _TRAINED else ()


def _uses_rewards(recipe: Recipe, name: str) -> bool:
    return name in _USES_REWARDS and not (name == "sft" and recipe.baselines.outputs)


def _decoding(recipe: Recipe) -> Sampling:
    """How a policy generates held-out completions, without the settings that change no completion."""
    return dataclasses.replace(sampling_of(recipe), share=True)


def _decoding_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide how a policy generates completions, by name."""
    grpo = {f"grpo.{key}": recipe.grpo.get(key) for key in (*OPTIONS, "use_vllm")}
    return grpo | {"speed.end_at_answer": recipe.speed.end_at_answer}
