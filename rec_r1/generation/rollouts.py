"""How a training's completions are generated: TRL's `rollout_func`, and what vLLM is told instead."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rec_r1.config import Recipe
from rec_r1.generation import generation_config, render, sampling_of_rollouts
from rec_r1.generation.decoding import decode
from rec_r1.prompts import TAG, Prompt, end_of

RolloutFunction = Callable[[list[Prompt], Any], dict[str, Any]]


def rollout_function(recipe: Recipe) -> RolloutFunction | None:
    """What GRPOTrainer takes as `rollout_func`; None where vLLM generates, which TRL asks itself.

    The function takes B prompts, the copies of one beside each other, and the trainer. It returns, a list for each
    completion, `prompt_ids`, `completion_ids` and `env_mask`: 1 for the policy's own tokens. A completion that ended at
    its answer gets an end-of-sequence token that the policy did not write (0): otherwise TRL would count it as cut off.
    """
    if recipe.grpo.get("use_vllm"):
        return None
    sampling = sampling_of_rollouts(recipe)

    def rollouts(prompts: list[Prompt], trainer: Any) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        groups = [(prompt, len(list(copies))) for prompt, copies in itertools.groupby(prompts)]
        asked = [render(prompt, tokenizer, sampling.chat) for prompt, _ in groups]
        with generating(trainer) as model:
            how = generation_config(sampling, tokenizer, model.generation_config.eos_token_id)
            share = sampling.share and not is_collective(trainer)
            found = decode(model, tokenizer, asked, [count for _, count in groups], how, sampling.end, share)
        prompt_ids = [ids for ids, (_, count) in zip(asked, groups, strict=True) for _ in range(count)]
        added = [done.ended and done.ids[-1] not in how.eos_token_id for done in found]
        end = [tokenizer.eos_token_id]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [done.ids + end * more for done, more in zip(found, added, strict=True)],
            "env_mask": [[1] * len(done.ids) + [0] * more for done, more in zip(found, added, strict=True)],
            "logprobs": None,
        }

    return rollouts


@contextlib.contextmanager
def generating(trainer: Any) -> Iterator[Any]:
    """The trainer's policy as `generate` needs it: unwrapped, without gradient checkpointing, its weights gathered."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from trl.models import unwrap_model_for_generation

    wrapped, args = trainer.model_wrapped, trainer.args
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(
            unwrap_model_for_generation(
                wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            )
        )
        if isinstance(wrapped, FullyShardedDataParallel):  # FSDP 1: its root module's own weights, for `generate`
            stack.enter_context(FullyShardedDataParallel.summon_full_params(wrapped, recurse=False))
        yield model


def is_collective(trainer: Any) -> bool:
    """Whether a call of the policy waits for all processes, because its weights are shared out among them."""
    from accelerate import DistributedType

    sharded: Sequence[Any] = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    return trainer.accelerator.distributed_type in sharded


def stop_for_vllm(recipe: Recipe, given: dict[str, Any]) -> dict[str, Any]:
    """``given``, generation_kwargs for vLLM, with </answer> among the strings at which a completion stops, where the
    format has it. (A line is over at its end once it holds a word, which no string can say: vLLM writes on.)

    Not with grpo.mask_truncated_completions: TRL takes what does not end in an end-of-sequence token for cut off.
    """
    wanted = recipe.speed.end_at_answer and end_of(recipe.format) == "tag"
    if not wanted or recipe.grpo.get("mask_truncated_completions"):
        return given
    stop = given.get("stop") or []
    stop = [*([stop] if isinstance(stop, str) else stop), TAG]
    return {**given, "stop": list(dict.fromkeys(stop)), "include_stop_str_in_output": True}
