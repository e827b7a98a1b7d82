"""Record the settings with which the policy or the prompt of a baseline was made, so that it is made only once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rec_r1 import runs
from rec_r1.config import Recipe, UserError, comparable, read_params
from rec_r1.generation import OPTIONS
from rec_r1.runs.run_config import absolute

RECORD = "settings.json"
# The keys of the section `baselines` that affect the policy or the prompt of each baseline.
_KEYS = {
    "sft": ("samples", "rollouts", "outputs", "sft"),
    "reward_weighted_sft": ("reward_temperature", "reward_weighted_sft"),
    "dpo": ("samples", "rollouts", "dpo"),
    "prompt_search": ("search_rollouts",),
    "warm_start": (),  # It has a section of its own.
}
# These make as many updates as the recipe's training, and their policy is chosen on validation.
_POST_TRAINED = ("sft", "reward_weighted_sft", "dpo")
# The options of GRPO that decide how many rollouts and updates a training has, and with that how many a baseline has.
OF_BUDGET = (
    "max_steps", "num_train_epochs", "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps",
    "generation_batch_size", "steps_per_generation", "num_iterations",
)  # fmt: skip


def is_made(folder: Path, recipe: Recipe, kind: str, digest: str = "") -> bool:
    """Whether a folder holds a result that was made with the settings of a recipe. False = it holds none.

    folder: the folder of the baseline.
    recipe: the recipe.
    kind: the baseline, a key of `_KEYS`.
    digest: the hash of the run's rollouts. "" = the result does not depend on them.

    Raises UserError for a result that was made with other settings, or from other rollouts.
    """
    record = folder / RECORD
    if not record.is_file():
        return False
    settings = _settings(recipe, kind)
    # Older versions recorded fewer settings. A missing one had its default value, and missing options of GRPO are taken
    # to be those of the recipe.
    recorded = {"grpo": settings["grpo"], **runs.read_json(record, "delete its folder")}
    if kind in _POST_TRAINED and "evaluation" not in recorded:
        raise UserError(
            f"{folder}: an older version trained it, with fewer updates than the recipe's training has, and without "
            "validation: delete it, and it is trained again"
        )
    if recorded.pop("rollouts", "") != digest:
        raise UserError(f"{folder}: trained on other rollouts than the run's: delete it, and it is trained again")
    if _settings(read_params(Recipe, recorded, str(record)), kind) != settings:
        raise UserError(f"{folder}: made with other settings: delete it, or choose another output_dir")
    return True


def write(folder: Path, recipe: Recipe, kind: str, digest: str = "") -> None:
    """Write the settings for :func:`is_made`, which has the same arguments."""
    about = _settings(recipe, kind) | ({"rollouts": digest} if digest else {})
    runs.write_atomically(folder / RECORD, json.dumps(about, indent=1))


def _settings(recipe: Recipe, kind: str) -> dict[str, Any]:
    """The settings that affect the result of a baseline, with absolute paths. ``kind``: a key of `_KEYS`."""
    plain = comparable(absolute(recipe))
    by_budget = kind in _POST_TRAINED or (kind == "prompt_search" and recipe.baselines.search_rollouts is None)
    left_out = {"output_dir", "evaluation"} | ({"warm_start"} if kind != "warm_start" else set())
    left_out |= set() if by_budget else {"prompts_per_step"}
    settings = {k: v for k, v in plain.items() if k not in left_out}
    without_effect = ("cache", "max_error_rate", "error_steps")
    settings["retriever"] = {k: v for k, v in plain["retriever"].items() if k not in without_effect}
    settings["baselines"] = {k: plain["baselines"][k] for k in _KEYS[kind]}
    # Of the options of GRPO, only those of generation matter, because samples are drawn with them.
    names = (*OPTIONS, *(OF_BUDGET if by_budget else ()))
    settings["grpo"] = {name: plain["grpo"][name] for name in names if name in plain["grpo"]}
    if kind != "warm_start":  # The policy or the prompt is chosen on validation, with greedy completions.
        every = ("every_steps",) if kind in _POST_TRAINED else ()
        keys = ("metrics", "validation_limit", "repetition_penalty", *every)
        settings["evaluation"] = {k: plain["evaluation"][k] for k in keys}
    return settings
