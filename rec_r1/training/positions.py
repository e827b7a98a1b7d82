"""Positions of tokens for models that do not count them from the attention mask.

Prompts of a batch are padded on the left, and TRL's loss passes no positions. Most models do not need them: rotary
positions are relative, and some models count the attention mask themselves. The others would begin to count at the
padding, and the loss would be computed from other probabilities than those with which the completions were sampled.
"""

from __future__ import annotations

from typing import Any

# For each type of causal language model in transformers 5.24 of which a small random model could be made, the
# log-probabilities of padded prompts in the loss were compared with those of each prompt alone. These types are wrong
# without positions and right with them (tests/rec_r1/test_positions.py).
NEEDED_BY = (
    "biogpt", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "hunyuan_v1_dense", "hunyuan_v1_moe", "openai-gpt", "xglm",
)  # fmt: skip


def give_positions(model: Any) -> None:
    """Make a model take positions from the attention mask, if its type needs that and the caller passes none.

    model: the policy, with or without an adapter, or the reference model. Models of other types stay as they are.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # The outermost one is what the loss calls.
            if module.config.model_type in NEEDED_BY:
                module.register_forward_pre_hook(_count, with_kwargs=True)
            return


def _count(module: Any, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids, mask = options.get("input_ids"), options.get("attention_mask")
    if ids is None or mask is None or mask.dim() != 2 or options.get("position_ids") is not None:
        return given, options
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return given, {**options, "position_ids": positions[:, -ids.shape[1] :]}  # The mask also covers cached tokens.
