"""What a training needs of a machine, by the number of processes: batch sizes, memory and hours.

Memory and hours are estimated from the shape of the model. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rec_r1 import models
from rec_r1.checks.policy_check import Checked
from rec_r1.checks.steps import Steps
from rec_r1.config import Recipe, UserError
from rec_r1.evaluation.tables import aligned
from rec_r1.generation.vllm_engine import is_colocated
from rec_r1.trl_options import BatchSizes, batch_sizes

GIB = 2**30
FLOPS = 989e12  # Floating-point operations a second of an H100 in bfloat16, from its data sheet.
SHARE_OF_FLOPS = 0.4  # The share of FLOPS that a training is assumed to reach.
TOKENS_OF_VLLM = 15_000  # The tokens that vLLM is assumed to write in a second on an H100, with 3B parameters.
WRITTEN = 2 / 3  # The assumed mean length of a completion, as a share of `grpo.max_completion_length`.


def table(recipe: Recipe, args: Any, checked: Checked, steps: Steps, processes: Sequence[int]) -> Iterator[str]:
    """The lines of a table with one row for each number of processes, and what its columns mean.

    recipe: the recipe.
    args: its `trl.GRPOConfig`.
    checked: its model and its longest prompt.
    steps: the steps of its training.
    processes: the numbers of processes, each at least 1.
    """
    here = batch_sizes(recipe, args.world_size)
    head = ["processes", "completions a step", "at once", "passes", "GiB, copies", "GiB, sharded", "hours"]
    rows, impossible = [head], []
    for count in processes:
        try:
            sizes = batch_sizes(recipe, count)
        except UserError as error:
            impossible.append(f"{count} processes: {error}")
            continue
        copies, sharded = (f"{memory(recipe, args, checked, sizes, count, shards):.1f}" for shards in (1, count))
        seconds = seconds_a_step(args, checked, sizes, count)
        total = steps.total if args.max_steps > 0 else steps.total * here.completions / sizes.completions
        hours = "not known" if seconds is None else f"{seconds * total / 3600:.1f}"
        numbers = map(str, (count, *sizes))
        rows.append([*numbers, copies, sharded if count > 1 else "-", hours])
    yield from aligned(rows).splitlines()
    yield from impossible
    yield from _notes(recipe, args, checked, steps)


def _notes(recipe: Recipe, args: Any, checked: Checked, steps: Steps) -> Iterator[str]:
    """What the numbers of the table are, and what they leave out."""
    trained = "all weights" if recipe.lora is None else "LoRA"
    vllm = ""
    if is_colocated(args):
        vllm = f" vLLM takes {args.vllm_gpu_memory_utilization:.0%} of each GPU beside it."
    elif args.use_vllm:
        vllm = " vLLM has GPUs of its own."
    yield (
        f"Estimates, not measured. GiB: the memory of each process, with {trained}, where each has a copy of the model "
        f"(DDP), and where it is sharded (FSDP2 or ZeRO-3).{vllm} Libraries and memory that is kept after use take "
        "another 1 to 2 GiB."
    )
    if not is_colocated(args):
        yield (
            "Hours are not known, because they depend on how fast transformers, or a server of vLLM, writes on your "
            "machines: rec-r1 preflight measures it for transformers."
        )
        return
    written = round(args.max_completion_length * WRITTEN)
    yield (
        f"Hours: the time of {steps.total} steps on H100 GPUs, with prompts of {checked.prompt} tokens (the longest) "
        f"and completions of {written}, at {SHARE_OF_FLOPS:.0%} of the peak, with {TOKENS_OF_VLLM:,} tokens a second "
        "from each vLLM, and without the time of communication and validation."
    )


def memory_line(recipe: Recipe, args: Any, checked: Checked) -> str:
    """One line with an estimate of the memory that a process needs, for choosing a machine."""
    total, trainable = _parameters(checked.policy)
    gib = memory(recipe, args, checked, batch_sizes(recipe, args.world_size), args.world_size, 1)
    share = args.vllm_gpu_memory_utilization
    beside = f" beside the {share:.0%} of the GPU that vLLM takes" if is_colocated(args) else ""
    return (
        f"memory     about {gib:.1f} GiB per process{beside}: {total / 1e6:.0f}M parameters, {trainable / 1e6:.1f}M "
        "trainable (and another 1 to 2 GiB for libraries, buffers, and memory that is kept after use)"
    )


def memory(recipe: Recipe, args: Any, checked: Checked, sizes: BatchSizes, processes: int, shards: int) -> float:
    """An estimate of the memory that a process needs for training, in GiB, without what vLLM takes.

    It adds up:

    - weights: 2 or 4 bytes each, and 12 more for a trainable one (its gradient and two Adam moments in float32). Where
      all weights are trained with a KL term, the reference model is a second copy of the weights.
    - what the computation needs besides. Where each process has a copy of the model, this is a bfloat16 cast of each
      trainable float32 weight, and with several processes also the buckets in which DDP sums the gradients. Where the
      model is sharded, it is the gathered weights of the embeddings and of two layers.
    - key-value cache, where transformers generates: 2 (keys and values) x layers x key-value heads x head size x tokens
      x sequences.
    - activations of one backward pass: 34 x hidden size bytes per token and layer (Korthikanti et al. 2022,
      arXiv:2205.05198, without the attention term), where gradient checkpointing keeps one layer and the inputs of all;
      and the float32 logits of a chunk.

    recipe: the recipe.
    args: its `trl.GRPOConfig`.
    checked: its model and its longest prompt.
    sizes: its batch sizes on this number of processes.
    processes: the number of processes.
    shards: into how many parts weights, gradients and moments are cut. 1 = each process has a copy.
    """
    import torch

    text = checked.policy.config.get_text_config()
    total, trainable = _parameters(checked.policy)
    low = torch.bfloat16 if args.bf16 else models.fast_dtype()
    automatic = torch.float32 if recipe.lora is None else low
    dtype = automatic if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    bytes_each = dtype.itemsize
    computed = 2 if args.bf16 else bytes_each
    references = 1 if args.beta and recipe.lora is None else 0
    kept = total * bytes_each * (1 + references) + trainable * 12
    if shards > 1:
        outside = checked.policy.get_input_embeddings().weight.numel()
        beside = (outside + 2 * (total - outside) / text.num_hidden_layers) * computed
    else:
        beside = trainable * ((computed if computed < bytes_each else 0) + (4 if processes > 1 else 0))
    cache = 0.0
    if not args.use_vllm:
        steps = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        sequences = args.generation_batch_size / steps * sizes.completions / processes
        cache = _cache_of_a_token(text) * bytes_each * sequences * (checked.prompt + args.max_completion_length)
    tokens = (checked.prompt + args.max_completion_length) * sizes.at_once
    activations = 34 * text.hidden_size * tokens * (1 if args.gradient_checkpointing else text.num_hidden_layers)
    if args.gradient_checkpointing:
        activations += computed * text.hidden_size * tokens * text.num_hidden_layers
    activations += 3 * 4 * text.vocab_size * min(tokens, 1024)
    return float((kept / shards + beside + cache + activations) / GIB)


def seconds_a_step(args: Any, checked: Checked, sizes: BatchSizes, processes: int) -> float | None:
    """An estimate of the seconds of a step on H100 GPUs, one for each process. None = vLLM is not colocated.

    The floating-point operations for each token and parameter are 2 for generation, 2 for a forward pass, 4 for the
    backward pass, 2 for the reference where there is a KL term, and 2 for recomputation with gradient checkpointing.
    The time in which vLLM writes the completions is added.
    """
    if not is_colocated(args):
        return None
    total, _ = _parameters(checked.policy)
    written = args.max_completion_length * WRITTEN
    operations = 8 + (2 if args.beta else 0) + (2 if args.gradient_checkpointing else 0)
    computing = (checked.prompt + written) * operations * total / (FLOPS * SHARE_OF_FLOPS)
    return sizes.completions / processes * (computing + written / TOKENS_OF_VLLM)


def _parameters(model: Any) -> tuple[int, int]:
    """The number of parameters of a model, and how many of them are trainable."""
    return model.num_parameters(), sum(p.numel() for p in model.parameters() if p.requires_grad)


def _cache_of_a_token(text: Any) -> int:
    """The numbers that the key-value cache holds for a token. ``text``: the configuration of the language model."""
    heads = getattr(text, "num_attention_heads", 0)  # A state space model has none, and its state is small.
    head = getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1)
    return int(2 * text.num_hidden_layers * getattr(text, "num_key_value_heads", heads) * head)
