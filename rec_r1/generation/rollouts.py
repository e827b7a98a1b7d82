"""Generate the completions of a training: TRL's `rollout_func`, the options of vLLM where it generates, and held-out
completions by whichever of the two writes the rollouts."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rec_r1.config import Recipe
from rec_r1.generation import Sampling, generate, generation_config, render, sampling_of_rollouts, texts_of
from rec_r1.generation.decoding import decode
from rec_r1.generation.vllm_engine import complete_greedily
from rec_r1.prompts import ANSWER_END, Prompt, end_of

RolloutFunction = Callable[[list[Prompt], Any], dict[str, Any]]


def rollout_function(recipe: Recipe) -> RolloutFunction | None:
    """The `rollout_func` for GRPOTrainer. None where vLLM generates, because TRL then calls vLLM itself.

    The function takes B prompts, in which the copies of one prompt are neighbours, and the trainer. It returns
    `prompt_ids`, `completion_ids` and `env_mask`, each with one list for each completion. `env_mask` is 1 for the
    policy's own tokens. A completion that stops where its action is complete gets an end-of-sequence token that the
    policy did not write (mask 0). Without this token TRL would count the completion as truncated.
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
            copies, together = [count for _, count in groups], is_collective(trainer)
            found = decode(model, tokenizer, asked, copies, how, sampling.end, sampling.share, together)
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


def generate_held_out(trainer: Any, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int) -> list[str]:
    """Greedy completions of held-out prompts while a policy trains, by the engine that writes its rollouts.

    Every process must call it with equally many prompts. A sharded policy would otherwise wait for a batch that another
    process does not have, and TRL would hand out vLLM's completions wrongly.

    trainer: the `trl.GRPOTrainer`.
    prompts: P prompts. P is equal on all processes.
    sampling: how completions are generated: greedily.
    batch_size: how many completions transformers generates at once. vLLM chooses its own batches.

    Returns the texts of the completions in the order of the prompts.
    """
    tokenizer = trainer.processing_class
    if trainer.use_vllm:
        asked = [render(prompt, tokenizer, sampling.chat) for prompt in prompts]
        return texts_of(complete_greedily(trainer, asked, sampling), tokenizer)
    with generating(trainer) as model:
        return generate(model, tokenizer, prompts, sampling, batch_size, collective=is_collective(trainer))


@contextlib.contextmanager
def generating(trainer: Any) -> Iterator[Any]:
    """The trainer's policy, prepared for `generate`: unwrapped, with all weights, without gradient checkpointing.

    Dropout is off, as in evaluation and in use, so that training samples from the policy that is measured and saved.
    """
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
        if isinstance(wrapped, FullyShardedDataParallel):  # In FSDP 1, `generate` needs the root module's own weights.
            stack.enter_context(FullyShardedDataParallel.summon_full_params(wrapped, recurse=False))
        trains = [module for module in model.modules() if module.training]
        model.eval()
        try:
            yield model
        finally:
            for module in trains:  # TRL reads from the model whether it trains.
                module.training = True


def is_collective(trainer: Any) -> bool:
    """Whether a call of the policy waits for all processes, because each process holds a part of the weights."""
    from accelerate import DistributedType

    sharded: Sequence[Any] = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    return trainer.accelerator.distributed_type in sharded


def stop_for_vllm(recipe: Recipe, given: dict[str, Any]) -> dict[str, Any]:
    """generation_kwargs for vLLM in which a completion stops at </answer>, where the format has this tag.

    recipe: the recipe.
    given: the recipe's generation_kwargs, in vLLM's names.

    In the format `line` vLLM generates up to the token limit, because no stop string can describe a line that holds a
    word. With grpo.mask_truncated_completions ``given`` is returned unchanged, because TRL counts a completion without
    an end-of-sequence token as truncated.
    """
    stops_at_tag = recipe.speed.end_at_answer and end_of(recipe.format) == "tag"
    if not stops_at_tag or recipe.grpo.get("mask_truncated_completions"):
        return given
    stop = given.get("stop") or []
    stop = [*([stop] if isinstance(stop, str) else stop), ANSWER_END]
    return {**given, "stop": list(dict.fromkeys(stop)), "include_stop_str_in_output": True}
