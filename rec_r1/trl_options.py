"""Check the options that a recipe passes to TRL and PEFT, and fill in those that the machine and the recipe decide."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from rec_r1.config import Recipe, UserError, refuse
from rec_r1.config.passthrough import problems
from rec_r1.config.redaction import from_environment
from rec_r1.console import blamed_on
from rec_r1.environment import Environment
from rec_r1.generation import generation_kwargs, lengths, sampling_of
from rec_r1.generation.rollouts import stop_for_vllm
from rec_r1.generation.vllm_engine import blaming_vllm, is_colocated
from rec_r1.runs.processes import is_lost, launched
from rec_r1.tasks import prompts
from retrievers import ToolkitError

# The defaults of `grpo` that are not TRL's. Every step is logged, and no tracker is written to unless it is named.
DEFAULTS: dict[str, Any] = {"report_to": [], "logging_steps": 1}
# TRL asks for mixed precision in bf16 by default and refuses a CPU with it. Here the policy's dtype decides.
DEFAULTS_WITHOUT_GPU: dict[str, Any] = {"use_cpu": True, "bf16": False}
GROUP, AT_ONCE = 8, 8  # TRL's defaults of num_generations and of per_device_train_batch_size.


class BatchSizes(NamedTuple):
    """How the completions of an optimizer step are divided among the processes and their passes.

    completions: the completions of one step, over all processes.
    at_once: how many of them go through the model of a process together: `per_device_train_batch_size`.
    passes: after how many such passes the optimizer steps: `gradient_accumulation_steps`.
    """

    completions: int
    at_once: int
    passes: int


def batch_sizes(recipe: Recipe, processes: int) -> BatchSizes:
    """The batch sizes of a recipe on a number of processes.

        batch_sizes(rec_r1.load_recipe("esci_bm25"), 4)     # BatchSizes(completions=384, at_once=12, passes=8)

    With `prompts_per_step` a step has the same completions on any number of processes. `at_once` then divides the share
    of a process and is at most `grpo.per_device_train_batch_size` (unset: the whole share). It is the largest such
    number that keeps the completions of each prompt together, so that the loss can read a prompt once for all of them,
    or the largest of all where none keeps them together. Without `prompts_per_step`, the options of `grpo` are the
    sizes.

    recipe: the recipe.
    processes: the number of processes, one for each GPU.

    Raises UserError, with numbers that work, where the completions of a step or of a generation cannot be divided.
    """
    given = recipe.grpo
    group, prompts = given.get("num_generations", GROUP), recipe.prompts_per_step
    if prompts is None:
        return _sizes_of_trl(given, group, processes)
    completions = prompts * group
    if completions % processes:
        raise UserError(_does_not_divide(prompts, group, processes))
    generated = given.get("generation_batch_size") or completions
    if (generated % completions and completions % generated) or math.gcd(generated, completions) % processes:
        raise UserError(
            f"grpo.generation_batch_size: {generated} completions, but a step on {processes} "
            f"process{'es' * (processes > 1)} has {prompts} prompts x {group} = {completions}: give a multiple of "
            f"{completions}, or leave it out"
        )
    share = math.gcd(generated, completions) // processes
    most = min(given.get("per_device_train_batch_size", share), share)
    unit = group if share % group == 0 and group <= most else 1
    at_once = next(size for size in range(most, 0, -1) if share % size == 0 and size % unit == 0)
    return BatchSizes(completions, at_once, completions // processes // at_once)


def _sizes_of_trl(given: dict[str, Any], group: int, processes: int) -> BatchSizes:
    """The sizes that the options of TRL state themselves. Raises UserError where a step has no whole groups."""
    at_once, passes = given.get("per_device_train_batch_size", AT_ONCE), given.get("gradient_accumulation_steps", 1)
    batch = at_once * (given.get("steps_per_generation") or passes) * processes
    if given.get("generation_batch_size") is None and batch % group:
        raise UserError(
            f"grpo.num_generations: {group} does not divide the {batch} completions of a step "
            "(per_device_train_batch_size x processes x gradient_accumulation_steps): make one a multiple of the other"
        )
    return BatchSizes(at_once * passes * processes, at_once, passes)


def _does_not_divide(prompts: int, group: int, processes: int) -> str:
    """The message for a number of processes that cannot share the completions of a step equally."""
    completions, unit = prompts * group, processes // math.gcd(processes, group)
    fewer = next(count for count in range(min(processes, completions), 0, -1) if completions % count == 0)
    more = next((count for count in range(processes + 1, completions + 1) if completions % count == 0), fewer)
    able = " or ".join(f"--num_processes={count}" for count in sorted({fewer, more}))
    near = sorted({max(prompts // unit, 1) * unit, (prompts // unit + 1) * unit})
    return (
        f"prompts_per_step: {prompts} prompts x {group} completions = {completions}, which {processes} processes "
        f"cannot share equally: launch with {able}, or set {' or '.join(f'prompts_per_step={one}' for one in near)}"
    )


def grpo_config(recipe: Recipe) -> Any:
    """The `trl.GRPOConfig` of a recipe, with the options that depend on the machine filled in.

    Raises UserError for options that TRL refuses, for generation options that rollouts and held-out completions cannot
    share, and for batch sizes that do not fit together.
    """
    import torch
    from trl import GRPOConfig

    refuse(problems("grpo", recipe.grpo, GRPOConfig))
    sampling_of(recipe)  # Raises UserError for generation options that only rollouts would use, or that nothing uses.
    options: dict[str, Any] = {**DEFAULTS, **recipe.grpo}
    if not torch.cuda.is_available():
        options = {**DEFAULTS_WITHOUT_GPU, **options}
    sizes = batch_sizes(recipe, launched())
    options |= {"per_device_train_batch_size": sizes.at_once, "gradient_accumulation_steps": sizes.passes}
    if options.get("use_vllm"):
        options["generation_kwargs"] = stop_for_vllm(recipe, generation_kwargs(recipe))
    options = hub_token_to_environment(options, "grpo") | {"trust_remote_code": recipe.model.trust_remote_code}
    with blamed_on("grpo", recipe.grpo):
        args = GRPOConfig(output_dir=recipe.output_dir, seed=recipe.seed, **options)
    steps_a_generation(args)
    return args


def steps_a_generation(args: Any) -> int:
    """How many optimizer steps use the completions of one generation. A run can be resumed only between generations.

    args: the `trl.GRPOConfig`.

    Raises UserError where a step would use the completions of two generations, each of them only in part.
    """
    batches, step = args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps
    if batches % step and step % batches:
        raise UserError(
            f"grpo.gradient_accumulation_steps: {step} batches make a step, and a generation has {batches} "
            "(steps_per_generation x num_iterations), so no checkpoint could be resumed exactly: make one a multiple "
            "of the other"
        )
    return int(max(1, batches // step))


def hub_token_to_environment(options: dict[str, Any], section: str) -> dict[str, Any]:
    """``options`` without hub_token, which is moved to the environment variable $HF_TOKEN.

    The hub's library reads the token there. Among its options, the trainer would write the token into every checkpoint
    and send it to experiment trackers.

    options: options of a TRL trainer by name. References such as $NAME are replaced by the variable's value.
    section: the name of the section in messages, such as grpo.

    Raises UserError for a token that is not a string, and for an environment variable that is not set.
    """
    remaining = from_environment(options, UserError, section)
    token = remaining.pop("hub_token", None)
    if token is not None:
        if not isinstance(token, str):
            raise UserError(f"{section}.hub_token must be text: leave it out, and set $HF_TOKEN")
        os.environ["HF_TOKEN"] = token
    return remaining


def check_vllm(args: Any) -> None:
    """Raise UserError where a `trl.GRPOConfig` needs vLLM and vLLM is not installed."""
    from trl.import_utils import is_vllm_available

    if args.use_vllm and not is_vllm_available():
        raise UserError(
            "grpo.use_vllm: true, but vLLM is not installed: pip install 'rec-r1[vllm]' on a machine with a GPU, or "
            "set grpo.use_vllm=false"
        )


def fill_in_vllm_length(args: Any, longest: int) -> int:
    """The largest number of tokens of a prompt and its completion. It becomes the context of a colocated vLLM.

    vLLM would otherwise take the model's whole context, and reserve memory for it.

    args: the `trl.GRPOConfig`, whose vllm_max_model_length is set where the recipe leaves it out.
    longest: the number of tokens of the longest prompt.

    Raises UserError where the recipe's own vllm_max_model_length is smaller.
    """
    tokens = longest + int(args.max_completion_length)
    if not is_colocated(args):
        return tokens
    if args.vllm_max_model_length is None:
        args.vllm_max_model_length = tokens
    if args.vllm_max_model_length < tokens:
        raise UserError(
            f"grpo.vllm_max_model_length: {args.vllm_max_model_length}: the longest prompt has {longest} tokens and a "
            f"completion up to {args.max_completion_length}: set grpo.vllm_max_model_length={tokens}, or leave it out"
        )
    return tokens


@contextlib.contextmanager
def refusals(args: Any) -> Iterator[None]:
    """Turn what TRL, PEFT or vLLM raises while the trainer is built into a UserError of one line.

    TRL refuses options by errors of several types: ValueError, ImportError, NotImplementedError and RuntimeError. The
    errors of a lost connection to another process pass.

    args: the `trl.GRPOConfig`.
    """
    try:
        with blaming_vllm(args):
            yield
    except ToolkitError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        if is_lost(error):
            raise
        raise UserError(f"grpo or lora: {' '.join(str(error).split())}") from error


def lora_config(recipe: Recipe) -> Any:
    """The `peft.LoraConfig` of a recipe's `lora` section, or None where all weights are trained.

    Raises UserError for options that PEFT refuses, and for a wrong range in layers_to_transform.
    """
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    refuse(problems("lora", recipe.lora, LoraConfig))
    options = dict(recipe.lora)
    layers = options.get("layers_to_transform")
    if isinstance(layers, str):  # A range such as "15-29", which PEFT takes only as a list.
        first, dash, last = layers.partition("-")
        if not (dash and first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise UserError(f"lora.layers_to_transform: {layers!r}: write a range such as 15-29, or a list")
        options["layers_to_transform"] = list(range(int(first), int(last) + 1))
    with blamed_on("lora", recipe.lora):
        return LoraConfig(task_type="CAUSAL_LM", **options)


def check_lengths(recipe: Recipe, env: Environment, tokenizer: Any, config: Any) -> int:
    """The number of tokens of the longest prompt among the task's queries.

    recipe: the recipe.
    env: its task and format.
    tokenizer: the policy's tokenizer.
    config: the configuration of the policy, from `models.load_config`.

    Raises UserError, which names the query, where a prompt and its completion do not fit into the model's context.
    """
    fix = "shorten or drop the query, set format.title_words, or lower grpo.max_completion_length"
    sampling = sampling_of(recipe)
    longest = 0
    for name, split in env.task.splits.items():
        queries = [f"task {env.task.name}: {name} query {identifier!r}" for identifier in split.ids]
        asked = prompts(split, env.task.catalog, env.format)
        longest = max(longest, lengths.check_context(asked, queries, tokenizer, sampling, config, fix))
    return longest
