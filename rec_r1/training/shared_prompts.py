"""A model as GRPOTrainer's loss calls it, which reads a prompt once for all completions of it.

Of the tokens in a batch most are prompts, repeated for every completion. Here the distinct prompts pass through the
model first, and the completions after them, with the prompts' keys and values, through which gradients flow back.
"""

from __future__ import annotations

from typing import Any

from rec_r1.generation.decoding import cache_name, has_rows


class SharedPrompts:
    """``model`` with the call that the loss makes: (B, P + C) token ids, of which the first ``prompt_length`` = P are
    prompts, padded on their left. The result is that of ``model`` without the prompts' columns, which the loss drops.

    Only where one process holds the whole model, without gradient checkpointing, which keeps no cache, and without the
    loss of a mixture of experts' router, which is over all tokens.
    """

    def __init__(self, model: Any, prompt_length: int) -> None:
        self.model = model
        self.prompt_length = prompt_length
        self.works = True  # False once the model has shown a cache whose rows cannot be copied

    def __call__(self, input_ids: Any, attention_mask: Any, labels: Any, **options: Any) -> Any:
        import torch

        read = self.prompt_length - 1  # the last token of a prompt predicts the first of a completion
        if read < 1:  # prompts of one token
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
