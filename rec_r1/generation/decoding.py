"""Token ids in, token ids out: generate completions without computing tokens that nothing reads.

A prompt with several completions is processed once, and these share its key-value cache. Generation stops where the
action is complete (`prompts.ENDS`), not at the token limit. Completed rows leave the batch. transformers' `generate`
draws all tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rec_r1.prompts import ENDS

# Only these options have the same effect when a completion is generated in several calls. With any other option it is
# generated in one call.
_IN_SEGMENTS = {
    "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size", "cache_implementation", "use_cache",
}  # fmt: skip
_PENALTIES = ("repetition_penalty", "encoder_repetition_penalty")
_NGRAMS = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size")
_SEGMENT_ON_CPU, _SEGMENT_ON_GPU = 2, 16  # Completed rows leave the batch each time so many tokens are generated.


class Completion(NamedTuple):
    """The tokens of one completion.

    ids: the tokens, including the one that ends the completion.
    ended: whether it came to an end. False where it was truncated at `max_new_tokens`.
    """

    ids: list[int]
    ended: bool


class Ends:
    """Decides where a completion ends: at the first token that meets one of three conditions.

    tokenizer: the policy's tokenizer.
    token_ids: the token is one of these.
    name: a key of `prompts.ENDS`, whose function holds for the text up to the token, without special tokens. None = no
        such condition.
    strings: the token completes one of these strings, which may hold special tokens.
    """

    def __init__(self, tokenizer: Any, token_ids: Sequence[int], name: str | None, strings: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.token_ids = frozenset(token_ids)
        self.strings = tuple(strings)
        self.holds = None if name is None else ENDS[name]
        self._last = {string[-1] for string in strings} | ({">" if name == "tag" else "\n"} if name else set())
        # Token -> whether its text contains one of these characters. Only the tokens that are generated are decoded:
        # a vocabulary has up to 262,144.
        self._may_end: dict[int, bool] = {}

    def completion(self, ids: Sequence[int]) -> Completion:
        """The completion in ``ids``: the tokens up to the first end, or all of them, not ended, where there is none."""
        for place, token in enumerate(ids, 1):
            if self._is_end(ids[:place], token):
                return Completion(list(ids[:place]), True)
        return Completion(list(ids), False)

    def _is_end(self, ids: Sequence[int], token: int) -> bool:
        if token in self.token_ids:
            return True
        if not self._last:
            return False
        if token not in self._may_end:
            self._may_end[token] = not self._last.isdisjoint(self.tokenizer.decode([token]))
        if not self._may_end[token]:  # No other token can complete an end.
            return False
        if self.strings and any(string in self.tokenizer.decode(ids) for string in self.strings):
            return True
        # The parser never sees special tokens: a line that holds nothing else holds no word.
        return self.holds is not None and self.holds(self.tokenizer.decode(ids, skip_special_tokens=True))

    def criterion(self, start: int) -> Any:
        """The stopping criteria for one call of `generate` whose completions begin at column ``start``."""
        import torch
        from transformers import StoppingCriteriaList

        def stop(ids: Any, scores: Any, **_: Any) -> Any:
            ended = [self._is_end(row, row[-1]) for row in ids[:, start:].tolist()]
            return torch.tensor(ended, device=ids.device)

        return StoppingCriteriaList([stop])


def decode(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    copies: Sequence[int],
    how: Any,
    end: str | None = None,
    share: bool = True,
    collective: bool = False,
) -> list[Completion]:
    """Generate several completions for each prompt.

    model: a causal LM, and ``tokenizer``, its tokenizer.
    prompts: P lists of token ids, none of them empty.
    copies: P numbers: how many completions each prompt gets.
    how: a `transformers.GenerationConfig` with the ids of the tokens that end a completion. A string of its
        `stop_strings` ends a completion, too.
    end: a key of `prompts.ENDS`, which ends a completion, too. None = no such end.
    share: whether the completions of a prompt share its key-value cache. False makes one call of `generate`, in which
        each copy reads its prompt.
    collective: whether all processes must call the model equally often, as with FSDP and ZeRO-3. They then make one
        call of `generate` each, whatever ``share`` is, and generate tokens until the last of them is done.

    Returns the completions in the order of the prompts. Those of one prompt are neighbours.
    """
    import torch

    if len(prompts) > 1 and _reads_any_padding(how):
        return [
            completion
            for ids, count in zip(prompts, copies, strict=True)
            for completion in decode(model, tokenizer, [ids], [count], how, end, share, collective)
        ]
    ends = Ends(tokenizer, how.eos_token_id, end, how.stop_strings or ())
    share = share and not collective and _may_have_rows(model.config)
    # Options about n-grams would see the padding between the common tokens and the rest.
    common = _common(prompts) if share and not _ngrams(how) else 0
    batch = tokenizer.pad({"input_ids": [list(ids[common:]) for ids in prompts]}, return_tensors="pt").to(model.device)
    head = torch.tensor([list(prompts[0][:common])], dtype=torch.long, device=model.device).expand(len(prompts), -1)
    ids = torch.cat([head, batch["input_ids"]], dim=1)  # The padding is between the common tokens and the rest.
    mask = torch.cat([torch.ones_like(head), batch["attention_mask"]], dim=1)
    if not _ngrams(how):
        # A penalty reads masked tokens, too. With pad tokens there, which are often the end-of-sequence token, it would
        # make the short prompts of a batch end later.
        ids = torch.where(mask == 0, ids[:, -1:], ids)
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
            input_ids=ids[index], attention_mask=mask[index], generation_config=alone, stopping_criteria=criteria,
            synced_gpus=collective,
        )  # fmt: skip
    return [ends.completion(row) for row in out[:, ids.shape[1] :].tolist()]


def can_share(options: Any) -> bool:
    """Whether :func:`decode` may share key-value caches. options: fields of a GenerationConfig, without token ids."""
    known = all(value is None or name in _IN_SEGMENTS for name, value in options.items())
    return known and options.get("cache_implementation") is None and options.get("use_cache") is not False


def _ngrams(how: Any) -> bool:
    """Whether an option forbids n-grams. It would take several equal tokens in the padding for one."""
    return any(vars(how)[name] for name in _NGRAMS)


def _penalized(options: Mapping[str, Any]) -> bool:
    return any(options.get(name) not in (None, 1) for name in _PENALTIES)


def reads_prompt(options: Mapping[str, Any]) -> bool:
    """Whether options read a prompt's tokens, or count them. options: fields of a GenerationConfig."""
    return _penalized(options) or any(options.get(name) for name in (*_NGRAMS, "min_length"))


def counts_words(end: str | None) -> bool:
    """Whether an end, a key of `prompts.ENDS`, is a line with a word or a number. In earlier versions the text of a
    special token counted as one, so that a completion could end before its answer."""
    return end in ("line", "numbers")


def _reads_any_padding(how: Any) -> bool:
    """Whether options would read the padding of a batch, whichever token fills it.

    Options about n-grams need pad tokens there, which no completion contains, and penalties need tokens of the same
    prompt, so that both together have no right token. n-grams of one token forbid the pad token itself, which often
    ends a completion. A minimum length counts the padding.
    """
    options = vars(how)
    one_token = any(options[name] == 1 for name in _NGRAMS)
    return bool(how.min_length) or one_token or (_ngrams(how) and _penalized(options))


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens are the same in all prompts, such as their examples. Two tokens of each prompt are not
    counted: with one, a short prompt would consist of padding in the part before the last token, and transformers would
    warn of it."""
    shortest = max(0, min(map(len, prompts)) - 2)
    return next((n for n in range(shortest) if len({ids[n] for ids in prompts}) > 1), shortest)


def _read(model: Any, ids: Any, mask: Any, common: int, how: Any) -> Any:
    """The key-value cache of the prompts without their last tokens. None where the model's cache cannot be copied row
    by row, and where each prompt has only one token.

    common: how many first tokens are the same in all prompts.
    """
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
        # `generate` takes a pad token at the end of a row for padding on the right. Nothing reads masked tokens here.
        filled = ids.masked_fill(mask == 0, int(ids[0, -1]))
        cache = _generate(model, filled[:, :-1], mask[:, :-1], once, cache)[cache_name()]
    return cache if has_rows(cache) else None


def _may_have_rows(config: Any) -> bool:
    """Whether the cache of a model with this configuration is likely to pass `has_rows`."""
    from transformers import DynamicCache

    return has_rows(DynamicCache(config=config.get_text_config()))


def has_rows(cache: Any) -> bool:
    """Whether the rows of a cache can be copied and removed one by one, and whether they keep every token.

    Layers with a sliding window do not keep every token, and padding would fill their window.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _generate(model: Any, ids: Any, mask: Any, how: Any, cache: Any = None) -> Any:
    """Call `generate` in this process alone. It skips the tokens of ``ids`` that ``cache`` already holds."""
    more = {} if cache is None else {cache_name(): cache}
    # By default `generate` waits for all processes of a training with ZeRO-3, even where this model is not sharded.
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=how, synced_gpus=False, **more)


def cache_name() -> str:
    """The name of the key-value cache in the installed transformers: `cache`, or `past_key_values` in older ones."""
    from transformers.generation.utils import ALL_CACHE_NAMES

    return str(ALL_CACHE_NAMES[0])


def _in_segments(model: Any, ids: Any, mask: Any, cache: Any, index: Any, how: Any, ends: Ends) -> list[Completion]:
    """Generate in segments, between which completed rows leave the batch.

    ids, mask: (B, L), one row for each completion.
    index: (B,) the row of ``cache`` that belongs to each completion.
    """
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
