"""What passes through to TRL and PEFT, completed by what the machine and the recipe decide, and checked."""

from __future__ import annotations

import math
import os
from typing import Any

from rec_r1.config import Recipe, UserError, refuse
from rec_r1.config.passthrough import problems
from rec_r1.config.redaction import from_environment
from rec_r1.console import blamed_on
from rec_r1.environment import Environment
from rec_r1.generation import answer_tokens, generation_kwargs, render, sampling_of
from rec_r1.generation.rollouts import stop_for_vllm
from rec_r1.tasks import prompts

# The defaults of `grpo` that are not TRL's. Every step is logged, and no tracker is written to unless it is named.
DEFAULTS: dict[str, Any] = {"report_to": [], "logging_steps": 1}
# TRL asks for mixed precision in bf16 by default and refuses a CPU with it. Here the policy's dtype decides.
DEFAULTS_WITHOUT_GPU: dict[str, Any] = {"use_cpu": True, "bf16": False}


def grpo_config(recipe: Recipe) -> Any:
    """`trl.GRPOConfig` from the recipe; what the machine decides is filled in. Raises UserError."""
    import torch
    from trl import GRPOConfig

    refuse(problems("grpo", recipe.grpo, GRPOConfig))
    sampling_of(recipe)  # refuses generation options that rollouts would ignore, or follow alone
    options: dict[str, Any] = {**DEFAULTS, **recipe.grpo}
    if not torch.cuda.is_available():
        options = {**DEFAULTS_WITHOUT_GPU, **options}
    group = options.get("num_generations", 8)
    sizes = [
        options.get("per_device_train_batch_size", 8),
        options.get("steps_per_generation") or options.get("gradient_accumulation_steps", 1),
    ]
    batch = math.prod(sizes) * int(os.environ.get("WORLD_SIZE", "1"))
    if options.get("generation_batch_size") is None and batch % group:
        raise UserError(
            f"grpo.num_generations: {group} does not divide the {batch} completions of a step "
            "(per_device_train_batch_size x processes x gradient_accumulation_steps): make one a multiple of the other"
        )
    if options.get("use_vllm"):
        options["generation_kwargs"] = stop_for_vllm(recipe, generation_kwargs(recipe))
    options = hub_token_to_environment(options, "grpo") | {"trust_remote_code": recipe.model.trust_remote_code}
    with blamed_on("grpo", recipe.grpo):
        args = GRPOConfig(output_dir=recipe.output_dir, seed=recipe.seed, **options)
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


def hub_token_to_environment(options: dict[str, Any], section: str) -> dict[str, Any]:
    """``options`` without hub_token, which goes where the hub's library looks for it, $HF_TOKEN. The trainer pickles
    its options into every checkpoint and sends them to trackers: a secret among them would go along. Raises UserError
    for a token that is no text, or an environment variable that is not set."""
    kept = from_environment(options, UserError, section)
    token = kept.pop("hub_token", None)
    if token is not None:
        if not isinstance(token, str):
            raise UserError(f"{section}.hub_token must be text: leave it out, and set $HF_TOKEN")
        os.environ["HF_TOKEN"] = token
    return kept


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

    refuse(problems("lora", recipe.lora, LoraConfig))
    options = dict(recipe.lora)
    layers = options.get("layers_to_transform")
    if isinstance(layers, str):  # "15-29": PEFT takes a list, and nobody wants to read 15 numbers
        first, dash, last = layers.partition("-")
        if not (dash and first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise UserError(f"lora.layers_to_transform: {layers!r}: write a range such as 15-29, or a list")
        options["layers_to_transform"] = list(range(int(first), int(last) + 1))
    with blamed_on("lora", recipe.lora):
        return LoraConfig(task_type="CAUSAL_LM", **options)


def check_lengths(recipe: Recipe, env: Environment, tokenizer: Any, source: str) -> int:
    """The longest prompt in tokens. Raises UserError where prompt + completion do not fit the model's context."""
    from rec_r1 import models

    context = getattr(
        models.load_config(source, recipe.model.trust_remote_code).get_text_config(), "max_position_embeddings", None
    )
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
