"""Check that prompts and their completions fit into a model's context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rec_r1.config import UserError
from rec_r1.console import progress
from rec_r1.generation import Sampling, render
from rec_r1.prompts import Prompt


def context_length(config: Any) -> int | None:
    """The largest number of tokens of a prompt and its completion. None = the model takes prompts of any length.

    config: the configuration of the policy, from transformers.
    """
    # It is read as an attribute, because some models, such as GPT-2, store it under another name in their files.
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def check_context(
    prompts: Sequence[Prompt], queries: Sequence[str], tokenizer: Any, sampling: Sampling, config: Any, fix: str
) -> int:
    """The number of tokens of the longest prompt, 0 where there is none.

    prompts: P prompts.
    queries: P names of their queries, with which an error message begins.
    tokenizer: the policy's tokenizer.
    sampling: how completions are generated. It gives the arguments of the chat template, and the largest number of
        tokens of a completion.
    config: the configuration of the policy. A model without `max_position_embeddings` takes prompts of any length.
    fix: what the user can do, with which an error message ends.

    Raises UserError for the first prompt that does not fit into the model's context together with a completion of the
    largest length.
    """
    context = context_length(config)
    completion = int(sampling.options["max_new_tokens"])
    longest = 0
    pairs = zip(prompts, queries, strict=True)
    for prompt, query in progress(pairs, "counting the tokens of prompts", "prompts", len(prompts)):
        length = len(render(prompt, tokenizer, sampling.chat))
        longest = max(longest, length)
        if context is not None and length + completion > context:
            raise UserError(
                f"{query}: its prompt has {length} tokens, and with a completion of {completion} tokens it exceeds the "
                f"model's context of {context}: {fix}"
            )
    return longest
