"""Check the sections that pass through to TRL and PEFT: the names, types, choices and ranges of their options.

Names and types come from the annotations of the classes. The tables below add what the classes state only in their
documentation, or check only in the middle of a training. `tests/rec_r1/test_passthrough.py` compares the tables with
the classes of the installed release.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rec_r1.config import Recipe, unknown_key
from rec_r1.config.typed import hints, mismatch, shown


class Range(NamedTuple):
    """An interval of numbers."""

    least: float
    most: float = math.inf
    above: bool = False  # Whether `least` itself is outside the interval.
    below: bool = False  # Whether `most` itself is outside the interval.

    def holds(self, value: float) -> bool:
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        low = f"above {self.least:g}" if self.above else f"at least {self.least:g}"
        if math.isinf(self.most):
            return low
        return f"{low} and {'below' if self.below else 'at most'} {self.most:g}"


COUNT, POSITIVE, SHARE = Range(1), Range(0, above=True), Range(0, 1)
NOT_NEGATIVE = Range(0)  # The range of every number that is not listed below and whose default is not negative.
PORT = Range(1, 65535)
SEED = Range(0, 2**32 - 1)  # The seeds that numpy.random.seed accepts.

# Options that the toolkit sets itself, by section, and the setting of the recipe that each of them comes from.
_SET_FOR_TRAINERS = {
    "output_dir": "output_dir",
    "seed": "seed",
    "trust_remote_code": "model.trust_remote_code",
    "resume_from_checkpoint": "the toolkit, which trains these policies in one go",
}
SET_ELSEWHERE = {
    "sft": _SET_FOR_TRAINERS,
    "reward_weighted_sft": _SET_FOR_TRAINERS,
    "dpo": _SET_FOR_TRAINERS,
    "rloo": dict.fromkeys(
        ("loss_type", "scale_rewards", "importance_sampling_level", "multi_objective_aggregation"),
        "the toolkit, which sets the loss of RLOO",
    ),
    "lora": {
        "task_type": "the toolkit",
        "peft_type": "the toolkit",
        "inference_mode": "the toolkit, which trains",
        "auto_mapping": "the toolkit",
        "base_model_name_or_path": "model.name",
        "revision": "model.name",
    },
}

# The types of options whose annotation in the class is too wide or too narrow.
ANNOTATIONS: dict[str, Any] = {
    "num_generations": int,  # null serves only a subclass inside TRL.
    "scale_rewards": bool | str,
    # corda, lora_ga and loftq are missing: they need a pass over data, or a quantised model, before training.
    "init_lora_weights": bool | Literal["gaussian", "eva", "olora", "pissa", "pissa_niter_16", "orthogonal", "mica"],
    "fsdp": bool | str | list[str] | None,
    "rank_pattern": dict[str, int],
    "alpha_pattern": dict[str, float],
    "layers_to_transform": list[int] | int | str | None,  # trl_options.lora_config expands a range such as 15-29.
    "dpo.loss_type": list[str] | str,
    "report_to": list[str] | str | None,
}

FILES = ("deepspeed", "fsdp_config", "accelerator_config")  # A text is a path, or JSON that starts with a brace.
PATTERNS = ("target_modules", "exclude_modules")  # A text is a regular expression, or all-linear.

CHOICES: dict[str, tuple[Any, ...]] = {
    "grpo.loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "dpo.loss_type": (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    ),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "scale_rewards": (True, False, "group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("vllm", "transformers"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "remove_unused_columns": (False, None),  # true would remove the columns that the reward needs.
}  # fmt: skip

RANGES = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "generation_batch_size", "steps_per_generation", "num_generations_eval", "num_iterations",
            "max_completion_length", "max_length", "ref_model_sync_steps", "vllm_tensor_parallel_size",
            "vllm_max_model_length", "dataloader_prefetch_factor", "ddp_timeout", "ddp_bucket_cap_mb",
            "torch_empty_cache_steps", "dataset_num_proc", "precompute_ref_batch_size", "pad_to_multiple_of",
            "r", "rank_pattern", "qalora_group_size", "eval_accumulation_steps",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "num_train_epochs", "logging_steps", "save_steps", "temperature", "repetition_penalty", "adam_epsilon",
            "sapo_temperature_neg", "sapo_temperature_pos", "vllm_server_timeout", "discopop_tau", "lora_alpha",
            "alpha_pattern", "delta", "f_alpha_divergence_coef",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(
        ("min_p", "top_entropy_quantile", "ref_model_mixup_alpha", "label_smoothing", "label_smoothing_factor"), SHARE
    ),
    **dict.fromkeys(("top_p", "vllm_gpu_memory_utilization"), Range(0, 1, above=True)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), Range(0, 1, below=True)),
    **dict.fromkeys(("vllm_server_port", "vllm_group_port"), PORT),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "num_generations": Range(2),  # An advantage compares the completions of one prompt.
    "layers_to_transform": NOT_NEGATIVE,
}  # fmt: skip


def problems(section: str, given: Mapping[str, Any], cls: type) -> Iterator[str]:
    """One line for every option of a section that its class does not accept, in order.

    section: the name of the section, such as baselines.sft.
    given: the section's options by name.
    cls: the class that the options are passed to.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    known = hints(cls) | ANNOTATIONS
    kind = section.rpartition(".")[2]
    elsewhere = SET_ELSEWHERE.get(kind, {})
    for key, value in given.items():
        name = f"{section}.{key}"
        if key in elsewhere:
            yield f"{name} is set by {elsewhere[key]}: remove it from {section}"
        elif key not in fields:
            yield unknown_key(name, str(key), cls.__name__, fields)
        else:
            if key == "init_lora_weights" and isinstance(value, str):
                value = re.sub(r"^pissa_niter_[1-9]\d{0,5}$", "pissa_niter_16", value)  # PEFT accepts any number.
            wrong = (
                mismatch(known.get(f"{kind}.{key}", known[key]), value, str(key))
                or _unreadable(key, value)
                or _out_of_choices(kind, fields[key], value)
                or _out_of_range(fields[key], value)
            )
            if wrong:
                yield f"{name} {wrong}"


def _unreadable(key: str, value: Any) -> str | None:
    """The problem with a path that does not exist, or with an invalid regular expression. None = no problem."""
    if not isinstance(value, str):
        return None
    if key in FILES and value[:1] not in ("", "{") and not Path(value).is_file():
        return f"must be a file or a section, got {shown(value)}: no such file"
    if key in PATTERNS:
        try:
            re.compile(value)
        except re.error as error:
            return f"must be a regular expression or a list of names, got {shown(value)}: {error}"
    return None


def _out_of_choices(kind: str, field: dataclasses.Field[Any], value: Any) -> str | None:
    """The problem with a value that is not among its field's choices. None = no problem."""
    choices = CHOICES.get(f"{kind}.{field.name}", CHOICES.get(field.name))
    if field.name == "remove_unused_columns" and kind not in ("grpo", "rloo"):
        choices = None  # The datasets of SFT and DPO have no further columns.
    if choices is None and "choices" in field.metadata:
        choices = (*field.metadata["choices"], *([None] if field.default is None else []))
    if choices is None:
        return None
    bad = [one for one in (value if isinstance(value, list) else [value]) if not _among(one, choices)]
    return f"must be one of {', '.join(map(_written, choices))}, got {shown(bad[0])}" if bad else None


def _among(value: Any, choices: tuple[Any, ...]) -> bool:
    return any(value == choice and type(value) is type(choice) for choice in choices)


def _written(value: Any) -> str:
    """The value as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _out_of_range(field: dataclasses.Field[Any], value: Any) -> str | None:
    """The problem with a number outside its range, or with the first such number of a list or a mapping."""
    if field.name == "max_steps":  # For TRL, 0 means what a negative number means: num_train_epochs decides.
        return None if value == -1 or value > 0 else f"must be at least 1, or -1 for num_train_epochs, got {value}"
    default = field.default
    negative = isinstance(default, int | float) and default < 0
    allowed = RANGES.get(field.name, Range(-math.inf) if negative else NOT_NEGATIVE)
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, int | float) and not isinstance(one, bool) and not allowed.holds(one):
            return f"must be {allowed}, got {shown(one)}"
    if field.name in ("logging_steps", "save_steps") and value > 1 and value != int(value):
        return f"must be a whole number, or a share of all steps below 1, got {value}"
    return None


def check_sections(recipe: Recipe) -> Iterator[str]:
    """One line for every value of the sections that pass through to TRL and PEFT that these refuse."""
    from trl import DPOConfig, GRPOConfig, SFTConfig

    yield from problems("grpo", recipe.grpo, GRPOConfig)
    if recipe.lora is not None:
        from peft import LoraConfig

        yield from problems("lora", recipe.lora, LoraConfig)
    yield from problems("warm_start.sft", recipe.warm_start.sft, SFTConfig)
    yield from problems("baselines.sft", recipe.baselines.sft, SFTConfig)
    yield from problems("baselines.reward_weighted_sft", recipe.baselines.reward_weighted_sft, SFTConfig)
    yield from problems("baselines.dpo", recipe.baselines.dpo, DPOConfig)
    yield from problems("baselines.rloo", recipe.baselines.rloo, GRPOConfig)
