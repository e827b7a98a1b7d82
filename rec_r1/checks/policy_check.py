"""Check a recipe's model without its weights: its configuration, its tokenizer, and its layers on the meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rec_r1 import models
from rec_r1.checks.steps import Steps
from rec_r1.config import Recipe, UserError
from rec_r1.console import blamed_on
from rec_r1.environment import Environment
from rec_r1.generation.vllm_engine import check_server
from rec_r1.prompts import Format
from rec_r1.trl_options import check_lengths, fill_in_vllm_length, lora_config
from retrievers import unsharded

# Types of models in transformers 5.24 for which the log-probabilities that TRL 1.16 computes in its loss are not those
# of the model, even if it is given the right positions (rec_r1/training/positions.py says how both lists were found).
# Some are recurrent and read padding as text. ModernBERT's decoder and Inkling change hidden states or logits, which
# TRL leaves out.
NOT_COMPUTED_BY_TRL = ("cpmant", "dory", "inkling_text", "modernbert-decoder", "recurrent_gemma", "rwkv", "xlstm")


class Checked(NamedTuple):
    """A model that passed the check.

    tokenizer: its tokenizer.
    policy: the model with its adapter, on the meta device.
    prompt: the number of tokens of the longest prompt.
    warnings: one line for each setting that is allowed, but does not fit the model.
    """

    tokenizer: Any
    policy: Any
    prompt: int
    warnings: tuple[str, ...] = ()


def check_policy(recipe: Recipe, env: Environment, args: Any, steps: Steps, source: str) -> Checked:
    """Check that a recipe can train its model.

    recipe: the recipe.
    env: its task and format.
    args: its `trl.GRPOConfig`, whose vllm_max_model_length is set where the recipe leaves it out.
    steps: the number of steps of the training.
    source: the model, a result of :func:`models.resolve`.

    Raises UserError where the model is no decoder-only language model, where its tokenizer does not belong to it or has
    no chat template, where a prompt does not fit into its context or into that of vLLM, and where the LoRA, optimizer
    or scheduler options do not fit it.
    """
    config = _config(recipe, source)
    tokenizer = models.load_tokenizer(source, recipe.model.trust_remote_code)
    _check_tokenizer(recipe, tokenizer, config)
    with blamed_on("format.chat: the chat template"):
        prompt = check_lengths(recipe, env, tokenizer, config)
    fill_in_vllm_length(args, prompt)
    policy = _with_lora(recipe, skeleton(recipe, config), config)
    _check_optimizer(args, policy, steps)
    if Path(recipe.model.name).is_dir() and not any(Path(source).glob("*.safetensors")):
        raise UserError(f"model.name: {source} holds no *.safetensors: give a saved model's folder")
    said = (*too_short(env.format, tokenizer, args.max_completion_length), *thoughts(recipe, tokenizer))
    return Checked(tokenizer, policy, prompt, said)


def too_short(format_: Format, tokenizer: Any, limit: int) -> Iterator[str]:
    """One line where no completion of at most ``limit`` tokens is well-formed. A line is short enough in any case."""
    answer = format_.config.answer
    if answer == "line":
        return
    shortest = format_.write_order([1]) if format_.config.action == "ranking" else format_.write(["a"])
    tokens = len(tokenizer(shortest, add_special_tokens=False)["input_ids"])
    if limit < tokens:
        usual = 512 if answer == "think_json" else 128
        yield (
            f"grpo.max_completion_length: {limit}: the shortest completion of format.answer={answer} has {tokens} "
            f"tokens ({' '.join(shortest.split())}), so nearly all are cut and malformed: set "
            f"grpo.max_completion_length={usual}"
        )


def thoughts(recipe: Recipe, tokenizer: Any) -> Iterator[str]:
    """A warning where the chat template makes a model write thoughts that `format.answer` has no place for."""
    answer, options = recipe.format.answer, recipe.grpo.get("chat_template_kwargs") or {}
    if not recipe.format.chat:
        return
    message = [{"role": "user", "content": "a"}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False, **options)
    off = "set grpo.chat_template_kwargs={enable_thinking: false}"
    taken = "are taken for the answer" if answer == "line" else "make it malformed"
    if prompt.rstrip().endswith("<think>"):
        yield (
            f"format.answer: {answer}: the chat template of {recipe.model.name} ends the prompt with <think>, so each "
            f"completion begins with thoughts, which {taken}: {off}, if the template has this switch, or take a model "
            "that does not think"
        )
    elif answer != "think_json" and "enable_thinking" in tokenizer.chat_template and "enable_thinking" not in options:
        yield (
            f"format.answer: {answer}: {recipe.model.name} may write <think> and thoughts before its answer, "
            f"which {taken}: {off}, or format.answer=think_json"
        )


def check_server_of(recipe: Recipe, args: Any, checked: Checked, wait: bool) -> None:
    """Check the vLLM server of a recipe, if it uses one (see :func:`vllm_engine.check_server`).

    recipe: the recipe.
    args: its `trl.GRPOConfig`.
    checked: its model and its longest prompt.
    wait: whether to wait grpo.vllm_server_timeout seconds for a server that is not up yet, as the trainer does.

    Raises UserError as `check_server`.
    """
    bundled = models.BUNDLED.get(recipe.model.name)  # A server knows such a model by its id on the hub.
    tokens = checked.prompt + int(args.max_completion_length)
    patience = args.vllm_server_timeout if wait else 0.0
    check_server(args, bundled.hub if bundled else recipe.model.name, tokens, patience)


def _config(recipe: Recipe, source: str) -> Any:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    with blamed_on("model.name"):
        config = models.load_config(source, recipe.model.trust_remote_code)
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.to_dict().get("is_decoder")
    if config.is_encoder_decoder or is_encoder:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "a masked-language-model encoder"
        raise UserError(
            f"model.name: {recipe.model.name} ({config.model_type}) is {kind}: give a decoder-only language model, "
            "such as smollm2-135m"
        )
    if config.model_type in NOT_COMPUTED_BY_TRL:
        raise UserError(
            f"model.name: {recipe.model.name} ({config.model_type}): TRL does not compute the probabilities that this "
            "kind of model gives its completions, so training would go wrong: give another language model, such as "
            "smollm2-135m"
        )
    return config


def _check_tokenizer(recipe: Recipe, tokenizer: Any, config: Any) -> None:
    if recipe.format.chat and not tokenizer.chat_template:
        raise UserError(
            f"format.chat: true, but the tokenizer of {recipe.model.name} has no chat template: set format.chat=false, "
            "or take an instruction-tuned model"
        )
    highest, rows = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if highest >= rows:
        raise UserError(
            f"model.name: the tokenizer of {recipe.model.name} has ids up to {highest}, but the model has {rows} "
            "embeddings: this tokenizer belongs to another model: restore the model's own tokenizer files"
        )


def skeleton(recipe: Recipe, config: Any) -> Any:
    """The model's modules on the meta device, where weights take no memory.

    recipe: the recipe.
    config: the model's configuration, from `models.load_config`.

    Raises UserError for an attention implementation that the model or the installation lacks, and for a model that is
    no language model.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    attention = recipe.model.attn_implementation
    section = "model.name" if attention is None else f"model.attn_implementation: {attention}"
    config._attn_implementation = attention
    with blamed_on(section), torch.device("meta"):
        cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        # The class is called directly where it is known, because `from_config` would shard the model under ZeRO-3.
        if cls is not None:
            return cls(config)
        with unsharded():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)


def _with_lora(recipe: Recipe, model: Any, config: Any) -> Any:
    import torch

    lora = lora_config(recipe)
    if lora is None:
        return model
    layers, count = lora.layers_to_transform, config.get_text_config().num_hidden_layers
    numbers = [layers] if isinstance(layers, int) else layers or []
    if numbers and max(numbers) >= count:
        raise UserError(
            f"lora.layers_to_transform: {recipe.model.name} has no layer {max(numbers)}: choose from 0 to {count - 1}"
        )
    modules = [name for name, _ in model.named_modules()]
    for module in lora.modules_to_save or []:
        if not any(name.endswith(module) for name in modules):
            raise UserError(
                f"lora.modules_to_save: {recipe.model.name} has no module {module!r}: name one, such as lm_head"
            )
    from peft import get_peft_model

    if not isinstance(lora.init_lora_weights, bool):  # Other initialisations compute with the weights.
        lora = dataclasses.replace(lora, init_lora_weights=True)
    with blamed_on("lora", recipe.lora or {}), torch.device("meta"):
        model = get_peft_model(model, lora)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("lora: no parameter is left to train: set lora.target_modules, or lora=null for all weights")
    return model


def _check_optimizer(args: Any, model: Any, steps: Steps) -> None:
    """Make the optimizer and the scheduler for a single parameter, so that wrong options are found before training.

    The trainer makes them only after the weights are loaded.
    """
    import torch
    from transformers import Trainer, get_scheduler

    with blamed_on(f"grpo.optim: {args.optim.value}"):
        cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if cls.__module__.startswith("torch."):
            cls([torch.nn.Parameter(torch.zeros(1))], **options)
    scheduler = f"lr_scheduler_type: {args.lr_scheduler_type.value}"
    with blamed_on("grpo.lr_scheduler_kwargs" if args.lr_scheduler_kwargs else f"grpo.{scheduler}"):
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
            args.get_warmup_steps(steps.total),
            steps.total,
            args.lr_scheduler_kwargs,
        )
