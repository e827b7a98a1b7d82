"""Token ids in, token ids out: how completions are generated without computing what nobody reads.

A prompt that is answered several times is read once, and the copies share its key-value cache. A completion ends where
its answer does (`prompts.ENDS`), not at the token limit. Rows that have ended leave the
batch. All of it goes through transformers' `generate`, which draws the tokens.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from rec_r1.prompts import ENDS

# With any other option a completion is generated in one call: these alone mean the same where it is made in several.
_IN_SEGMENTS = {
    "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size", "cache_implementation", "use_cache",
}  # fmt: skip
_SEGMENT_ON_CPU, _SEGMENT_ON_GPU = 2, 16  # tokens between two moments at which rows that have ended leave the batch


class Completion(NamedTuple):
    """ids: the tokens, that which ends it included. ended: False where it was cut at `max_new_tokens`."""

    ids: list[int]
    ended: bool


class Ends:
    """Where a completion ends: at one of ``token_ids``, at the token that completes one of ``strings``, or at the one
    with which `ENDS[name]` holds of its text.

    name: a key of `prompts.ENDS`; None = none of them.
    """

    def __init__(self, tokenizer: Any, token_ids: Sequence[int], name: str | None, strings: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.token_ids = frozenset(token_ids)
        self.strings = tuple(strings)
        self.holds = None if name is None else ENDS[name]
        last = {string[-1] for string in strings} | ({">" if name == "tag" else "\n"} if name else set())
        self._last = _tokens_with(tokenizer, frozenset(last))

    def completion(self, ids: Sequence[int]) -> Completion:
        """``ids`` up to the first end; all of them, not ended, where there is none."""
        for place, token in enumerate(ids, 1):
            if self._is_end(ids[:place], token):
                return Completion(list(ids[:place]), True)
        return Completion(list(ids), False)

    def _is_end(self, ids: Sequence[int], token: int) -> bool:
        if token in self.token_ids:
            return True
        if token not in self._last:
            return False
        text = self.tokenizer.decode(ids)
        return any(string in text for string in self.strings) or (self.holds is not None and self.holds(text))

    def criterion(self, start: int) -> Any:
        """The same for one call of `generate`, whose completions begin at column ``start``."""
        import torch
        from transformers import StoppingCriteriaList

        def stop(ids: Any, scores: Any, **_: Any) -> Any:
            ended = [self._is_end(row, row[-1]) for row in ids[:, start:].tolist()]
            return torch.tensor(ended, device=ids.device)

        return StoppingCriteriaList([stop])


@functools.lru_cache(maxsize=8)
def _tokens_with(tokenizer: Any, characters: frozenset[str]) -> frozenset[int]:
    """The tokens whose text has one of ``characters``: no other token completes an end."""
    if not characters:
        return frozenset()
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return frozenset(token for token, text in enumerate(texts) if not characters.isdisjoint(text))


def decode(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    copies: Sequence[int],
    how: Any,
    end: str | None = None,
    share: bool = True,
) -> list[Completion]:
    """Completions of ``prompts``, ``copies[i]`` of the i-th, those of a prompt one after the other.

    prompts: P lists of token ids, none empty.
    how: `transformers.GenerationConfig` with the token ids that end a completion.
    end: a key of `prompts.ENDS`, which ends one, too, as do the strings of ``how.stop_strings``: the token that
        completes one is the completion's last.
    share: False = one call of `generate` in which every copy reads its prompt: where that call is collective, as under
        FSDP and ZeRO-3, all processes must make the same number of them.
    """
    import torch

    ends = Ends(tokenizer, how.eos_token_id, end, how.stop_strings or ())
    share = share and _may_have_rows(model.config)
    common = _common(prompts) if share and not how.no_repeat_ngram_size else 0  # which would see padding in between
    batch = tokenizer.pad({"input_ids": [list(ids[common:]) for ids in prompts]}, return_tensors="pt").to(model.device)
    head = torch.tensor([list(prompts[0][:common])], dtype=torch.long, device=model.device).expand(len(prompts), -1)
    ids = torch.cat([head, batch["input_ids"]], dim=1)  # padding stands between what all share and the rest
    mask = torch.cat([torch.ones_like(head), batch["attention_mask"]], dim=1)
    index = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(copies)).to(model.device)
    with torch.no_grad():
        if share:
            cache = _read(model, ids, mask, common, how)
            if cache is None:
                return decode(model, tokenizer, prompts, copies, how, end, share=False)
            return _in_segments(model, ids[index], mask[index], cache, index, how, ends)
        alone = copy.copy(how)
        alone.stop_strings = None
        criteria = ends.criterion(ids.shape[1])
        out = model.generate(
            input_ids=ids[index], attention_mask=mask[index], generation_config=alone, stopping_criteria=criteria
        )
    return [ends.completion(row) for row in out[:, ids.shape[1] :].tolist()]


def can_share(options: Any) -> bool:
    """Whether generation ``options`` (of a GenerationConfig, without token ids) allow decode's ``share``."""
    known = all(value is None or name in _IN_SEGMENTS for name, value in options.items())
    return known and options.get("cache_implementation") is None and options.get("use_cache") is not False


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, such as those of their examples; each keeps two of its own. With one, a
    short prompt would be all padding in what is read before the last token, and transformers would warn of it."""
    shortest = max(0, min(map(len, prompts)) - 2)
    return next((n for n in range(shortest) if len({ids[n] for ids in prompts}) > 1), shortest)


def _read(model: Any, ids: Any, mask: Any, common: int, how: Any) -> Any:
    """The cache of all but the prompts' last tokens, of which the first ``common`` are the same; None where the model
    keeps one that cannot be copied row by row, or where there is nothing before the last token."""
    from transformers import GenerationConfig

    once = GenerationConfig(
        max_new_tokens=1, do_sample=False, return_dict_in_generate=True, disable_compile=True,
        pad_token_id=how.pad_token_id, bos_token_id=how.bos_token_id, eos_token_id=how.eos_token_id,
    )  # fmt: skip
    cache = None
    if common:
        cache = _generate(model, ids[:1, :common], mask[:1, :common], once)[cache_name()]
        if not has_rows(cache):
            return None
        cache.batch_repeat_interleave(len(ids))
    if ids.shape[1] > common + 1:
        # A pad token at the end of a row would be taken for padding on the right; what is masked may be any token.
        filled = ids.masked_fill(mask == 0, int(ids[0, -1]))
        cache = _generate(model, filled[:, :-1], mask[:, :-1], once, cache)[cache_name()]
    return cache if has_rows(cache) else None


def _may_have_rows(config: Any) -> bool:
    """Whether a model of this configuration keeps a cache as `has_rows` wants it, as far as that shows beforehand."""
    from transformers import DynamicCache

    return has_rows(DynamicCache(config=config.get_text_config()))


def has_rows(cache: Any) -> bool:
    """Whether the rows of a cache can be copied and left out one by one, and hold every token: not where layers see a
    window only, which padding would use up."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _generate(model: Any, ids: Any, mask: Any, how: Any, cache: Any = None) -> Any:
    """`generate`, which goes on behind what ``cache`` holds of ``ids``."""
    more = {} if cache is None else {cache_name(): cache}
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=how, **more)


def cache_name() -> str:
    """What this release of transformers calls the key-value cache: `cache`, or in older ones `past_key_values`."""
    from transformers.generation.utils import ALL_CACHE_NAMES

    return str(ALL_CACHE_NAMES[0])


def _in_segments(model: Any, ids: Any, mask: Any, cache: Any, index: Any, how: Any, ends: Ends) -> list[Completion]:
    """``ids``, ``mask`` (B, L): a row for each completion. index: (B,) its row in ``cache``."""
    import torch

    cache.batch_select_indices(index)
    found: list[Completion | None] = [None] * len(ids)
    rows, length = list(range(len(ids))), ids.shape[1]
    while rows:
        how_next = copy.copy(how)
        segment = _SEGMENT_ON_CPU if ids.device.type == "cpu" else _SEGMENT_ON_GPU
        how_next.max_new_tokens = min(segment, how.max_new_tokens - (ids.shape[1] - length))
        how_next.return_dict_in_generate, how_next.stop_strings = True, None
        ids = _generate(model, ids, mask, how_next, cache).sequences
        whole = ids.shape[1] - length >= how.max_new_tokens
        kept = []
        for place, new in enumerate(ids[:, length:].tolist()):
            completion = ends.completion(new)
            if completion.ended or whole:
                found[rows[place]] = completion
            else:
                kept.append(place)
        rows = [rows[place] for place in kept]
        if rows:
            left = torch.tensor(kept, device=ids.device)
            cache.batch_select_indices(left)
            ids = ids[left]
            mask = torch.cat([mask[left], mask.new_ones(len(kept), ids.shape[1] - mask.shape[1])], dim=1)
    return [completion for completion in found if completion is not None]
