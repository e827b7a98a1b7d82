"""What passes through to TRL and PEFT, completed by what the machine and the recipe decide, and checked."""

from __future__ import annotations

import math
import os
from typing import Any

from rec_r1.config import Recipe, UserError, check_keys
from rec_r1.environment import Environment
from rec_r1.tasks import prompts


def grpo_config(recipe: Recipe) -> Any:
    """`trl.GRPOConfig` from the recipe; what the machine decides is filled in. Raises UserError."""
    import torch
    from trl import GRPOConfig

    check_keys("grpo", recipe.grpo, GRPOConfig)
    options: dict[str, Any] = {"report_to": [], "logging_steps": 1, **recipe.grpo}
    if not torch.cuda.is_available():
        # TRL asks for bf16 mixed precision by default and refuses a CPU with it; here the policy's dtype decides.
        options = {"use_cpu": True, "bf16": False, **options}
    group = options.get("num_generations", 8)
    sizes = [
        options.get("per_device_train_batch_size", 8),
        options.get("steps_per_generation") or options.get("gradient_accumulation_steps", 1),
    ]
    for size in (group, *sizes):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"grpo: batch and group sizes must be whole numbers from 1 on, got {size!r}: mend it")
    batch = math.prod(sizes) * int(os.environ.get("WORLD_SIZE", "1"))
    if "generation_batch_size" not in options and (group < 2 or batch % group):
        raise UserError(
            f"grpo.num_generations: {group} does not divide the {batch} completions of a step "
            "(per_device_train_batch_size x processes x gradient_accumulation_steps): make one a multiple of the other"
        )
    try:
        args = GRPOConfig(output_dir=recipe.output_dir, seed=recipe.seed, **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"grpo: {' '.join(str(error).split())}") from error
    steps_a_generation(args)
    return args


def steps_a_generation(args: Any) -> int:
    """How many steps of the optimizer use up what is generated at once; only between two of them can a run be resumed.

    Raises UserError where a step would end inside one generation and begin inside another.
    """
    batches, step = args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps
    if batches % step and step % batches:
        raise UserError(
            f"grpo.gradient_accumulation_steps: {step} batches a step, and a generation has {batches} "
            "(steps_per_generation x num_iterations): no checkpoint could be resumed from exactly; make one a multiple "
            "of the other"
        )
    return int(max(1, batches // step))


def answer_tokens(recipe: Recipe) -> int:
    """Tokens that an answer may have, in training as in evaluation: the recipe's, else TRL's default."""
    from trl import GRPOConfig

    default: Any = GRPOConfig.__dataclass_fields__["max_completion_length"].default
    return int(recipe.grpo.get("max_completion_length") or default)


def check_vllm(args: Any) -> None:
    """Raises UserError where the options ask for vLLM and it is not installed."""
    from trl.import_utils import is_vllm_available

    if args.use_vllm and not is_vllm_available():
        raise UserError(
            "grpo.use_vllm: true, and vLLM is not installed: pip install 'rec-r1[vllm]' on a machine with a GPU, or "
            "set grpo.use_vllm=false"
        )


def lora_config(recipe: Recipe) -> Any:
    """`peft.LoraConfig` from the recipe's `lora` section; None for full fine-tuning."""
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    check_keys("lora", recipe.lora, LoraConfig)
    options = dict(recipe.lora)
    layers = options.get("layers_to_transform")
    if isinstance(layers, str):  # "15-29": PEFT takes a list, and nobody wants to read 15 numbers
        first, dash, last = layers.partition("-")
        if not (dash and first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise UserError(f"lora.layers_to_transform: {layers!r}: write a range such as 15-29, or a list")
        options["layers_to_transform"] = list(range(int(first), int(last) + 1))
    return LoraConfig(task_type="CAUSAL_LM", **options)


def check_lengths(recipe: Recipe, env: Environment, tokenizer: Any, source: str) -> int:
    """The longest prompt in tokens. Raises UserError where prompt + completion do not fit the model's context."""
    from transformers import AutoConfig

    from rec_r1.evaluate import render

    context = getattr(AutoConfig.from_pretrained(source).get_text_config(), "max_position_embeddings", None)
    answer = answer_tokens(recipe)
    options = recipe.grpo.get("chat_template_kwargs") or {}
    longest = 0
    for part, split in env.task.splits.items():
        for identifier, prompt in zip(split.ids, prompts(split, env.task.catalog, env.format), strict=True):
            length = len(render(prompt, tokenizer, options))
            longest = max(longest, length)
            if context is not None and length + answer > context:
                raise UserError(
                    f"task {env.task.name}: {part} query {identifier!r} makes a prompt of {length} tokens, and with "
                    f"grpo.max_completion_length={answer} it exceeds the model's context of {context}: shorten or "
                    "drop the query, or set format.title_words"
                )
    return longest
