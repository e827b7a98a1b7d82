"""How a policy writes: one description, made from the recipe, for rollouts, held-out answers and every baseline.

TRL writes the rollouts from the recipe's `grpo` section. `sampling_of` reads the same options with TRL's own defaults,
so that a held-out answer differs from a rollout in one thing: it is greedy. From a model's files comes nothing but the
ids of the tokens that end an answer (see `models.load_policy`). Rollouts by vLLM end at the same tokens, which vLLM
reads from the same file, and TRL gives it every other option. Evaluations are always written by transformers.
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rec_r1.config import Recipe, UserError
from rec_r1.generation import decoding
from rec_r1.prompts import Prompt, end_of

# Of GRPOConfig, what TRL hands to transformers under the same name.
_SHARED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation")
# What only chooses among the tokens of a draw: greedy decoding has no use for it.
_OF_DRAWS = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# What makes another number or type of results, which neither TRL nor an evaluation reads.
_OF_RESULTS = (
    "num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
    "output_hidden_states",
)  # fmt: skip
# vLLM's names for what transformers can do as well; and those that change nothing but the draw of the moment.
_FROM_VLLM = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "stop": "stop_strings"}
_SAME_IN_VLLM = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_IDLE_IN_VLLM = ("seed", "skip_special_tokens", "detokenize", "logprobs")
_KWARGS = "grpo.generation_kwargs"
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # of a model's folder, what decides its answers
# What a `grpo` section says of how answers are written.
OPTIONS = ("max_completion_length", *_SHARED, "generation_kwargs", "chat_template_kwargs")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a policy writes ``samples`` completions of a prompt.

    options: fields of transformers' GenerationConfig, without token ids. chat: arguments of the chat template. seed:
    of the draws. end: where a completion ends, a key of
    `prompts.ENDS`. share: whether the samples of a prompt share its cache.
    """

    options: Mapping[str, Any]
    chat: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: int = 1
    seed: int = 0
    end: str | None = None
    share: bool = True

    @property
    def drawn(self) -> bool:
        return bool(self.options["do_sample"])

    @property
    def description(self) -> str:
        """How answers are decoded, e.g. "greedy" or "mean of 8 samples at temperature 1"."""
        beams = self.options.get("num_beams") or 1
        if not self.drawn:
            return "greedy" if beams == 1 else f"beam search with {beams} beams"
        return f"mean of {self.samples} samples at temperature {self.options['temperature']:g}"


def sampling_of(recipe: Recipe, samples: int = 1) -> Sampling:
    """What the recipe says: one greedy answer a prompt, or ``samples`` > 1 drawn as training draws its rollouts.

    Raises UserError for generation options that are unknown or wrong, or that rollouts would follow and held-out
    answers, which transformers writes, could not.
    """
    options = _rollout_options(recipe)
    chat = recipe.grpo.get("chat_template_kwargs") or {}
    end = end_of(recipe.format) if recipe.speed.end_at_answer else None
    share = recipe.speed.share_prompts and decoding.can_share(options)
    if samples > 1:
        return Sampling(options, chat, samples, recipe.seed, end, share)
    return Sampling(_greedy(options), chat, end=end, share=share)


def sampling_of_rollouts(recipe: Recipe) -> Sampling:
    """How training draws its completions. Its `seed` is not used: the trainer seeds its own draws. Raises UserError."""
    return dataclasses.replace(sampling_of(recipe, 2), samples=1)


def _greedy(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _OF_DRAWS} | {"do_sample": False}


def _rollout_options(recipe: Recipe) -> dict[str, Any]:
    """What TRL's GRPOTrainer gives to `GenerationConfig`; where it asks vLLM, the same in transformers' words."""
    from trl import GRPOConfig

    fields: Any = GRPOConfig.__dataclass_fields__
    given = {name: recipe.grpo.get(name, fields[name].default) for name in ("max_completion_length", *_SHARED)}
    length = given.pop("max_completion_length")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise UserError(
            f"grpo.max_completion_length: {length!r}: give the number of tokens that an answer may have, such as 256"
        )
    more = generation_kwargs(recipe)
    if recipe.grpo.get("use_vllm"):
        if recipe.grpo.get("vllm_structured_outputs_regex"):
            raise UserError(
                "grpo.vllm_structured_outputs_regex: it would shape the rollouts and not the held-out answers, which "
                "transformers writes: remove it, and let the rewards teach the form"
            )
        more = _from_vllm(more)
        given["top_k"] = 0 if given["top_k"] == -1 else given["top_k"]  # both mean all tokens to vLLM
        given["cache_implementation"] = None
    elif more.get("stop_strings"):
        raise UserError(f"{_KWARGS}.stop_strings: TRL's rollouts take none without vLLM: remove it")
    options = {"max_new_tokens": length, "do_sample": True, **given, **more}
    _check(options, more)
    return options


def generation_kwargs(recipe: Recipe) -> dict[str, Any]:
    """The recipe's `grpo.generation_kwargs` as a mapping. Raises UserError."""
    given = recipe.grpo.get("generation_kwargs") or {}
    if isinstance(given, str):  # TRL takes JSON, too
        try:
            given = json.loads(given)
        except ValueError as error:
            raise UserError(f"{_KWARGS}: {given!r}: not valid JSON: write a mapping of options") from error
    if not isinstance(given, dict):
        raise UserError(f"{_KWARGS}: {given!r}: write a mapping of options, such as {{no_repeat_ngram_size: 3}}")
    return dict(given)


def _from_vllm(given: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's sampling parameters in transformers' words. Raises UserError for one that transformers does not have."""
    for name in given:
        if name not in (*_FROM_VLLM, *_SAME_IN_VLLM, *_IDLE_IN_VLLM):
            raise UserError(
                f"{_KWARGS}.{name}: vLLM's rollouts would follow it and held-out answers, which transformers writes, "
                f"could not: use one of {', '.join((*_SAME_IN_VLLM, *_FROM_VLLM))}, or grpo.use_vllm=false"
            )
    found = {_FROM_VLLM.get(name, name): value for name, value in given.items() if name not in _IDLE_IN_VLLM}
    return found | ({"top_k": 0} if found.get("top_k") == -1 else {})


def _check(options: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Refuse what `generate` would ignore or fail at. more: the recipe's generation_kwargs, in transformers' words."""
    import transformers
    from transformers import GenerationConfig

    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in more:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise UserError(f"{_KWARGS}.{name}: GenerationConfig has no such option: did you mean {nearest!r}?")
        if name in _OF_RESULTS:
            raise UserError(f"{_KWARGS}.{name}: training reads one completion a prompt and nothing else: remove it")
    processors = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
        "typical_p": transformers.TypicalLogitsWarper,
        "epsilon_cutoff": transformers.EpsilonLogitsWarper,
        "eta_cutoff": transformers.EtaLogitsWarper,
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": transformers.NoRepeatNGramLogitsProcessor,
    }
    try:
        GenerationConfig(**options)
        GenerationConfig(**_greedy(options)).validate(strict=True)  # else the trained model could not be saved
        for name, processor in processors.items():
            neutral = name in ("top_k", "no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff") and not more.get(name)
            if more.get(name) is not None and not neutral:
                processor(more[name])
    except (ValueError, TypeError, AttributeError) as error:
        place = _KWARGS if more else "grpo"
        raise UserError(f"{place}: {' '.join(str(error).split())}: correct it") from error


def answer_tokens(recipe: Recipe) -> int:
    """Tokens that an answer may have, in training as in evaluation: the recipe's, else TRL's default."""
    return int(sampling_of(recipe).options["max_new_tokens"])


def generation_config(sampling: Sampling, tokenizer: Any, ends: int | Sequence[int] | None) -> Any:
    """`transformers.GenerationConfig`. ends: what the model's own files say ends an answer; with the tokenizer's end of
    sequence that is what ends TRL's rollouts, and vLLM's."""
    from transformers import GenerationConfig

    declared = [ends] if isinstance(ends, int) else list(ends or [])
    own = tokenizer.eos_token_id
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": declared if own in declared else [own, *declared],
    }
    return GenerationConfig(**{**ids, **sampling.options}, disable_compile=True)


def write_as_evaluated(model: Any, tokenizer: Any, recipe: Recipe) -> None:
    """Let a model that is saved carry how it is evaluated, so that loading it gives the answers that were measured, but
    for where one ends (`Sampling.end`), which no file of a model can say. Rollouts name all options themselves."""
    model.generation_config = generation_config(sampling_of(recipe), tokenizer, model.generation_config.eos_token_id)


def render(prompt: Prompt, tokenizer: Any, chat_options: Mapping[str, Any]) -> list[int]:
    """Token ids of a prompt as TRL makes them: chat messages through the template, a string as it is."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_options
    )
    return list(encoded["input_ids"])


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    batch_size: int,
    progress: str | None = None,
    collective: bool = False,
) -> list[str]:
    """Completions of a causal LM from `models.load_policy` (or PEFT around one), in the order of ``prompts``; of
    several samples those of a prompt follow each other.

    Batches are cut from the prompts sorted by length, so that little is padded.

    progress: what the bar is called; None = no bar. Greedy, it draws no random numbers, so training before and after
    an evaluation goes on as it would have without. collective: whether all processes must call the model equally
    often, as under FSDP and ZeRO-3.
    """
    import torch
    from tqdm import tqdm

    ids = [render(prompt, tokenizer, sampling.chat) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    completions = [""] * (len(ids) * sampling.samples)
    how = generation_config(sampling, tokenizer, model.generation_config.eos_token_id)
    share = sampling.share and not collective
    if sampling.drawn:
        torch.manual_seed(sampling.seed)
    bar = tqdm(total=len(ids), desc=progress, unit=" queries", disable=progress is None)
    step = max(1, batch_size // sampling.samples)
    for chosen in (order[start : start + step] for start in range(0, len(order), step)):
        copies = [sampling.samples] * len(chosen)
        found = decoding.decode(model, tokenizer, [ids[i] for i in chosen], copies, how, sampling.end, share)
        texts = tokenizer.batch_decode([completion.ids for completion in found], skip_special_tokens=True)
        for place, text in enumerate(texts):
            completions[chosen[place // sampling.samples] * sampling.samples + place % sampling.samples] = text
        bar.update(len(chosen))
    bar.close()
    return completions


def answer(
    recipe: Recipe,
    source: str,
    weights: Path | None,
    asked: Sequence[Prompt],
    progress: str,
    sampling: Sampling | None = None,
) -> list[str]:
    """What a policy writes: the model ``source`` as it was (``weights`` None), or with what training saved.

    sampling: None = greedily, as the recipe says. Raises UserError as `sampling_of` and where the model does not load.
    """
    from rec_r1 import models

    sampling = sampling or sampling_of(recipe)
    tokenizer = models.load_tokenizer(source, recipe.model.trust_remote_code)
    model = models.load_policy_for_evaluation(source, recipe, weights)
    answers = generate(model, tokenizer, asked, sampling, recipe.evaluation.batch_size, progress)
    del model
    gc.collect()
    return answers


def identity(recipe: Recipe, source: str, weights: Path | None, asked: Sequence[Prompt], sampling: Sampling) -> str:
    """A hash of all that decides what `answer` returns: model files, prompts, decoding, numeric type, and of draws the
    batch size. Equal hashes mean equal answers, up to the order of floating-point sums."""
    from rec_r1 import models

    whole = hashlib.sha256()
    for folder in [Path(source)] + ([weights] if weights is not None else []):
        for path in sorted(folder.iterdir()):
            if path.suffix in _MODEL_FILES and path.name != "trainer_state.json":  # which is a log
                with path.open("rb") as file:
                    whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    dtype = str(models.fast_dtype()) if recipe.model.dtype == "auto" else f"torch.{recipe.model.dtype}"
    batch = recipe.evaluation.batch_size if sampling.drawn else None  # a batch shares one stream of random numbers
    how = dataclasses.asdict(sampling)
    if not sampling.drawn:
        how.pop("share")  # the same answers, up to the order of sums
    rest = [list(asked), how, dtype, recipe.model.attn_implementation, batch]
    whole.update(json.dumps(rest, sort_keys=True, default=str).encode())
    return whole.hexdigest()
