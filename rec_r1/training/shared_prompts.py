"""A model for GRPOTrainer's loss that processes each prompt once for all of its completions.

Most tokens in a batch belong to prompts, which are repeated for every completion. This wrapper first passes the
distinct prompts through the model, and then the completions together with the keys and values of their prompts.
Gradients flow back through these keys and values.
"""

from __future__ import annotations

from typing import Any

from rec_r1.generation.decoding import cache_name, has_rows


class SharedPrompts:
    """A model that is called as the loss calls it, with (B, P + C) token ids.

    Its result is that of ``model`` without the columns of the prompts, which the loss does not use.

    It needs one process that holds the whole model. It does not work with gradient checkpointing, which keeps no cache,
    nor with the loss of a mixture of experts' router, which is computed over all tokens.

    model: the policy.
    prompt_length: P, the number of columns that hold prompts, padded on the left.
    """

    def __init__(self, model: Any, prompt_length: int) -> None:
        self.model = model
        self.prompt_length = prompt_length
        self.works = True  # False after the model returned a cache whose rows cannot be copied.

    def __call__(self, input_ids: Any, attention_mask: Any, labels: Any, **options: Any) -> Any:
        import torch

        read = self.prompt_length - 1  # A prompt's last token predicts the first one of a completion.
        if read < 1:  # The prompts have one token.
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **options)
        prompts = torch.stack([input_ids[:, :read], attention_mask[:, :read]], dim=1)
        distinct, copies = torch.unique(prompts, dim=0, return_inverse=True)
        if len(distinct) == len(prompts):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **options)
        name = cache_name()
        first = self.model(input_ids=distinct[:, 0], attention_mask=distinct[:, 1], use_cache=True, logits_to_keep=1)[
            name
        ]
        if not has_rows(first):
            self.works = False
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **options)
        first.batch_select_indices(copies)
        return self.model(
            input_ids=input_ids[:, read:], attention_mask=attention_mask, labels=labels[:, read:], **{name: first},
            **options,
        )  # fmt: skip
