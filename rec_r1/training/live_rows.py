"""Remove from a batch what does not change its gradient: completions of advantage 0, and columns that are all padding.

Each term of TRL's policy losses is multiplied by a row's advantage, so a row of advantage 0 adds nothing to the
gradient. But such a row counts where a loss is divided by the number of rows or tokens. Multiplying the loss by
`factor` corrects this division.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The tensors that GRPOTrainer (TRL 1.16) passes to its loss: (B, P) of the prompt, (B, C) or (B, 1) of the completion,
# (B,) of the row, and numbers of the batch.
_OF_PROMPT = ("prompt_ids", "prompt_mask")
_OF_COMPLETION = (
    "completion_ids", "completion_mask", "tool_mask", "old_per_token_logps", "sampling_per_token_logps",
    "ref_per_token_logps", "importance_sampling_ratio",
)  # fmt: skip
_OF_ROW = ("advantages",)
_OF_BATCH = ("num_items_in_batch",)
_MEAN_OVER_ROWS = ("grpo", "sapo", "dr_grpo", "luspo")  # Losses that are a mean over the rows of a batch.
_MEAN_OVER_TOKENS = ("bnpo",)  # The loss that is a mean over the tokens of a batch.
# Losses that are a mean over the tokens of one generation. TRL counts these tokens before the loss, so no factor is
# needed.
_MEAN_OVER_GENERATION = ("dapo", "cispo", "vespo")


def add_nothing(args: Any, router_loss: bool) -> bool:
    """Whether rows of advantage 0 add nothing to the loss.

    This holds for a loss without a KL term, an entropy bonus, a selection of tokens by their entropy in the batch, and
    a router loss.

    args: the `trl.GRPOConfig`.
    router_loss: whether the loss includes that of a mixture of experts' router.
    """
    return (
        args.loss_type in (*_MEAN_OVER_ROWS, *_MEAN_OVER_TOKENS, *_MEAN_OVER_GENERATION)
        and args.beta == 0
        and not args.entropy_coef
        and not args.use_adaptive_entropy
        and args.top_entropy_quantile == 1
        and not router_loss
    )


def is_live(inputs: Mapping[str, Any]) -> Any:
    """Which of the B rows are live, as (B,) bool: those with an advantage other than 0 and at least one token.

    inputs: those of GRPOTrainer's `compute_loss`.
    """
    return (inputs["advantages"] != 0) & _mask(inputs).any(dim=1)


def _mask(inputs: Mapping[str, Any]) -> Any:
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)


def live_rows(inputs: Mapping[str, Any], loss_type: str, at_least: int = 1) -> tuple[dict[str, Any], Any]:
    """The inputs of a loss without the rows that add nothing to its gradient.

    inputs: those of GRPOTrainer's `compute_loss`, with B rows.
    loss_type: the `loss_type` of GRPOConfig.
    at_least: the smallest number of rows to keep. Rows of advantage 0 are kept where fewer rows are live. At least one
        row is always kept, so that every process runs the backward pass, if only with gradients of 0.

    Returns the inputs with the kept rows, and the factor by which their loss must be multiplied. Inputs with a tensor
    that is not known here, such as images, are returned unchanged, with a factor of 1.
    """
    known = {*_OF_PROMPT, *_OF_COMPLETION, *_OF_ROW, *_OF_BATCH}
    if any(name not in known for name in inputs):
        return dict(inputs), 1.0
    mask, live = _mask(inputs), is_live(inputs).clone()
    missing = max(at_least, 1) - int(live.sum())
    if missing > 0:
        live[(~live).nonzero().flatten()[:missing]] = True
    kept = {name: value if name in _OF_BATCH else value[live] for name, value in inputs.items()}
    length = int(inputs["prompt_mask"][live].sum(dim=1).max())  # Prompts are padded on the left.
    width = int(mask[live].any(dim=0).nonzero().max()) + 1 if mask[live].any() else 1
    for name in _OF_PROMPT:
        kept[name] = kept[name][:, -length:]
    for name in kept.keys() & set(_OF_COMPLETION):
        kept[name] = kept[name][:, :width]
    factor: Any = 1.0
    if loss_type in _MEAN_OVER_ROWS:
        factor = live.sum() / len(live)
    elif loss_type in _MEAN_OVER_TOKENS:
        factor = mask[live].sum() / mask.sum().clamp(min=1)
    return kept, factor
