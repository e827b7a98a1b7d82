"""A batch without what leaves its gradient as it is: completions of advantage 0, and columns that are all padding.

Every term of TRL's policy losses is a product with a row's advantage, so that a row of advantage 0 adds nothing to the
gradient. The row does count where a loss divides by the number of rows or tokens: `factor` restores that division.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What GRPOTrainer (TRL 1.16) hands to its loss: columns of the prompt; of the completion, which may be a single one.
_OF_PROMPT = ("prompt_ids", "prompt_mask")
_OF_COMPLETION = (
    "completion_ids", "completion_mask", "tool_mask", "old_per_token_logps", "sampling_per_token_logps",
    "ref_per_token_logps", "importance_sampling_ratio",
)  # fmt: skip
_OF_ROW = ("advantages",)
_OF_BATCH = ("num_items_in_batch",)
_PER_ROW = ("grpo", "sapo", "dr_grpo", "luspo")  # losses that are means over the rows of a batch
_PER_TOKEN = ("bnpo",)  # over its tokens
_PER_GENERATION = (
    "dapo",
    "cispo",
    "vespo",
)  # over the tokens of all that was generated at once, which TRL counts first


def add_nothing(args: Any, router_loss: bool) -> bool:
    """Whether rows of advantage 0 add nothing to the loss of ``args``, a GRPOConfig: it has no KL term, no entropy
    bonus, no choice of tokens by their entropy in the batch, and no ``router_loss`` (of a mixture of experts)."""
    return (
        args.loss_type in (*_PER_ROW, *_PER_TOKEN, *_PER_GENERATION)
        and args.beta == 0
        and not args.entropy_coef
        and not args.use_adaptive_entropy
        and args.top_entropy_quantile == 1
        and not router_loss
    )


def is_live(inputs: Mapping[str, Any]) -> Any:
    """(B,) bool: which rows of a loss' inputs teach something."""
    return (inputs["advantages"] != 0) & _mask(inputs).any(dim=1)


def _mask(inputs: Mapping[str, Any]) -> Any:
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)


def live_rows(inputs: Mapping[str, Any], loss_type: str, at_least: int = 1) -> tuple[dict[str, Any], Any]:
    """``inputs`` of a loss with the rows that teach something, and the factor for their loss.

    inputs: of GRPOTrainer's `compute_loss`, B rows. at_least: so many rows stay, others too where fewer teach
    something. One always does: backward then runs on every process, and gives gradients of 0. Inputs that are not
    known here (images) are returned as they are.
    """
    known = {*_OF_PROMPT, *_OF_COMPLETION, *_OF_ROW, *_OF_BATCH}
    if any(name not in known for name in inputs):
        return dict(inputs), 1.0
    mask, live = _mask(inputs), is_live(inputs).clone()
    missing = max(at_least, 1) - int(live.sum())
    if missing > 0:
        live[(~live).nonzero().flatten()[:missing]] = True
    kept = {name: value if name in _OF_BATCH else value[live] for name, value in inputs.items()}
    length = int(inputs["prompt_mask"][live].sum(dim=1).max())  # prompts are padded on their left
    width = int(mask[live].any(dim=0).nonzero().max()) + 1 if mask[live].any() else 1
    for name in _OF_PROMPT:
        kept[name] = kept[name][:, -length:]
    for name in kept.keys() & set(_OF_COMPLETION):
        kept[name] = kept[name][:, :width]
    factor: Any = 1.0
    if loss_type in _PER_ROW:
        factor = live.sum() / len(live)
    elif loss_type in _PER_TOKEN:
        factor = mask[live].sum() / mask.sum().clamp(min=1)
    return kept, factor
