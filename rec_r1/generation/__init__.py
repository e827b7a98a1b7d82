"""Generate completions in the same way in rollouts, evaluations and baselines.

TRL generates the rollouts with the options of the recipe's `grpo` section. `sampling_of` reads the same options with
TRL's own defaults, so that held-out completions differ from rollouts only in that they are greedy, and in the
repetition penalty if `evaluation.repetition_penalty` is set. A model's own files give nothing but the ids of the tokens
that end a completion (see `models.load_policy`). vLLM reads the same ids from the same file, and TRL passes it all
other options. transformers generates the completions of evaluations, and those of held-out queries while a policy
trains unless vLLM writes its rollouts (`generation/vllm_engine.py`).
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rec_r1.config import Recipe, UserError, unknown_key
from rec_r1.generation import decoding
from rec_r1.prompts import Prompt, end_of

# The options of GRPOConfig that TRL passes to transformers under the same name.
_SHARED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation")
# Options of sampling, which greedy decoding does not need.
_OF_DRAWS = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Options that change the number or the type of the results, which neither TRL nor an evaluation reads.
_OF_RESULTS = (
    "num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
    "output_hidden_states",
)  # fmt: skip
# vLLM's options that transformers has under another name or under the same one, and those that an evaluation ignores.
_FROM_VLLM = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "stop": "stop_strings"}
_SAME_IN_VLLM = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_IDLE_IN_VLLM = ("seed", "skip_special_tokens", "detokenize", "logprobs")
_KWARGS = "grpo.generation_kwargs"
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # The files that affect what a model writes.
# The options of a `grpo` section that affect how completions are generated.
OPTIONS = ("max_completion_length", *_SHARED, "generation_kwargs", "chat_template_kwargs")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a policy generates the completions of a prompt.

    options: fields of transformers' GenerationConfig, without token ids.
    chat: arguments of the chat template.
    samples: how many completions each prompt gets.
    seed: the seed of the draws.
    end: a key of `prompts.ENDS`, which says where a completion ends. None = no such end.
    share: whether the completions of a prompt share its key-value cache.
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
        """How completions are decoded, such as "greedy" or "mean of 8 samples at temperature 1"."""
        beams, penalty = self.options.get("num_beams") or 1, self.options.get("repetition_penalty") or 1
        if not self.drawn:
            how = "greedy" if beams == 1 else f"beam search with {beams} beams"
            return how if penalty == 1 else f"{how}, repetition penalty {penalty:g}"
        return f"mean of {self.samples} samples at temperature {self.options['temperature']:g}"


def sampling_of(recipe: Recipe, samples: int = 1) -> Sampling:
    """How held-out completions are generated.

    recipe: the recipe.
    samples: 1 = one greedy completion for each prompt. More = so many, drawn with the options of rollouts.

    Raises UserError for generation options that are unknown or wrong, and for options of vLLM that transformers, which
    generates held-out completions, does not have.
    """
    options = _rollout_options(recipe)
    chat = recipe.grpo.get("chat_template_kwargs") or {}
    end = end_of(recipe.format) if recipe.speed.end_at_answer else None
    share = recipe.speed.share_prompts and decoding.can_share(options)
    if samples > 1:
        return Sampling(options, chat, samples, recipe.seed, end, share)
    penalty = recipe.evaluation.repetition_penalty
    penalized = options if penalty is None else {**options, "repetition_penalty": penalty}
    return Sampling(_greedy(penalized), chat, end=end, share=share)


def sampling_of_rollouts(recipe: Recipe) -> Sampling:
    """How training draws its completions. Raises UserError as :func:`sampling_of`.

    Training does not use the `seed` of the result: the trainer seeds its own draws.
    """
    return dataclasses.replace(sampling_of(recipe, 2), samples=1)


def _greedy(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _OF_DRAWS} | {"do_sample": False}


def _rollout_options(recipe: Recipe) -> dict[str, Any]:
    """The options that GRPOTrainer passes to `GenerationConfig`, or to vLLM, translated to transformers' names."""
    from trl import GRPOConfig

    fields: Any = GRPOConfig.__dataclass_fields__
    given = {name: recipe.grpo.get(name, fields[name].default) for name in ("max_completion_length", *_SHARED)}
    length = given.pop("max_completion_length")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise UserError(
            f"grpo.max_completion_length: {length!r}: give the largest number of tokens of a completion, such as 256"
        )
    more = generation_kwargs(recipe)
    if recipe.grpo.get("use_vllm"):
        if recipe.grpo.get("vllm_structured_outputs_regex"):
            raise UserError(
                "grpo.vllm_structured_outputs_regex: it applies to rollouts, and not to held-out completions, which "
                "transformers generates: remove it, and reward the format of completions instead"
            )
        more = _from_vllm(more)
        given["top_k"] = 0 if given["top_k"] == -1 else given["top_k"]  # For vLLM, both mean all tokens.
        given["cache_implementation"] = None
    elif more.get("stop_strings"):
        raise UserError(f"{_KWARGS}.stop_strings: TRL's rollouts accept it only with vLLM: remove it")
    options = {"max_new_tokens": length, "do_sample": True, **given, **more}
    _check(options, more)
    return options


def generation_kwargs(recipe: Recipe) -> dict[str, Any]:
    """The recipe's `grpo.generation_kwargs` as a mapping. Raises UserError where it is neither that nor JSON of one."""
    given = recipe.grpo.get("generation_kwargs") or {}
    if isinstance(given, str):  # TRL accepts JSON, too.
        try:
            given = json.loads(given)
        except ValueError as error:
            raise UserError(f"{_KWARGS}: {given!r}: not valid JSON: write a mapping of options") from error
    if not isinstance(given, dict):
        raise UserError(f"{_KWARGS}: {given!r}: write a mapping of options, such as {{no_repeat_ngram_size: 3}}")
    return dict(given)


def _from_vllm(given: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's sampling parameters under transformers' names. Raises UserError for one that transformers lacks."""
    for name in given:
        if name not in (*_FROM_VLLM, *_SAME_IN_VLLM, *_IDLE_IN_VLLM):
            raise UserError(
                f"{_KWARGS}.{name}: transformers, which generates held-out completions, has no such option of vLLM: "
                f"use one of {', '.join((*_SAME_IN_VLLM, *_FROM_VLLM))}, or grpo.use_vllm=false"
            )
    found = {_FROM_VLLM.get(name, name): value for name, value in given.items() if name not in _IDLE_IN_VLLM}
    return found | ({"top_k": 0} if found.get("top_k") == -1 else {})


def _check(options: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Raise UserError for options that `generate` would ignore or fail at.

    options: all options.
    more: the options from the recipe's generation_kwargs alone, under transformers' names.
    """
    import transformers
    from transformers import GenerationConfig

    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in more:
        if name not in known:
            raise UserError(unknown_key(f"{_KWARGS}.{name}", str(name), "GenerationConfig", known))
        if name in _OF_RESULTS:
            raise UserError(f"{_KWARGS}.{name}: training reads only the text of one completion at a time: remove it")
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
        GenerationConfig(**_greedy(options)).validate(strict=True)  # The trained model is saved with these options.
        for name, processor in processors.items():
            neutral = name in ("top_k", "no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff") and not more.get(name)
            if more.get(name) is not None and not neutral:
                processor(more[name])
    except (ValueError, TypeError, AttributeError) as error:
        place = _KWARGS if more else "grpo"
        raise UserError(f"{place}: {' '.join(str(error).split())}: correct it") from error


def answer_tokens(recipe: Recipe) -> int:
    """The largest number of tokens of a completion, in training and evaluation. Raises UserError."""
    return int(sampling_of(recipe).options["max_new_tokens"])


def generation_config(sampling: Sampling, tokenizer: Any, ends: int | Sequence[int] | None) -> Any:
    """The `transformers.GenerationConfig` for a sampling.

    sampling: how completions are generated.
    tokenizer: the policy's tokenizer.
    ends: the ids of the tokens that end a completion according to the model's own files. The tokenizer's
        end-of-sequence token is added to them, as in the rollouts of TRL and of vLLM.
    """
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
    """Set a model's own generation options to those of its evaluation, before the model is saved.

    Whoever loads the saved model then gets the completions that were measured. Only `Sampling.end` is missing, because
    no file of a model can hold it. Rollouts do not read these options.

    model, tokenizer: the policy and its tokenizer.
    recipe: the recipe.
    """
    model.generation_config = generation_config(sampling_of(recipe), tokenizer, model.generation_config.eos_token_id)


def render(prompt: Prompt, tokenizer: Any, chat_options: Mapping[str, Any]) -> list[int]:
    """The token ids of a prompt, as TRL makes them.

    prompt: chat messages, which go through the chat template, or a string, which does not.
    tokenizer: the policy's tokenizer.
    chat_options: arguments of the chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_options
    )
    return list(encoded["input_ids"])


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    batch_size: int,
    progress: str | None = None,
    collective: bool = False,
) -> list[decoding.Completion]:
    """Generate completions in batches of prompts of similar length.

    model: a causal LM from `models.load_policy`, or a PEFT model around one.
    tokenizer: its tokenizer.
    prompts: P prompts.
    sampling: how completions are generated. Greedy decoding draws no random numbers, so an evaluation does not change
        the training around it.
    batch_size: how many completions are generated at once.
    progress: the label of the progress bar. None = no bar.
    collective: whether all processes must call the model equally often, as with FSDP and ZeRO-3.

    Returns the tokens in the order of the prompts. The samples of one prompt are neighbours.
    """
    import torch
    from tqdm import tqdm

    ids = [render(prompt, tokenizer, sampling.chat) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    completions: dict[int, list[decoding.Completion]] = {}
    how = generation_config(sampling, tokenizer, model.generation_config.eos_token_id)
    if sampling.drawn:
        torch.manual_seed(sampling.seed)
    bar = tqdm(total=len(ids), desc=progress, unit=" queries", disable=progress is None)
    step = max(1, batch_size // sampling.samples)
    for chosen in (order[start : start + step] for start in range(0, len(order), step)):
        copies = [sampling.samples] * len(chosen)
        asked = [ids[i] for i in chosen]
        found = decoding.decode(model, tokenizer, asked, copies, how, sampling.end, sampling.share, collective)
        for place, i in enumerate(chosen):
            completions[i] = found[place * sampling.samples : (place + 1) * sampling.samples]
        bar.update(len(chosen))
    bar.close()
    return [completion for i in range(len(ids)) for completion in completions[i]]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    batch_size: int,
    progress: str | None = None,
    collective: bool = False,
) -> list[str]:
    """The texts of the completions that :func:`complete`, which takes the same arguments, generates."""
    found = complete(model, tokenizer, prompts, sampling, batch_size, progress, collective)
    return texts_of(found, tokenizer)


def texts_of(completions: Sequence[decoding.Completion], tokenizer: Any) -> list[str]:
    """The texts of completions, without special tokens."""
    texts: list[str] = tokenizer.batch_decode([one.ids for one in completions], skip_special_tokens=True)
    return texts


def answer(
    recipe: Recipe, source: str, weights: Path | None, asked: Sequence[Prompt], progress: str, sampling: Sampling
) -> tuple[list[str], float]:
    """Load a policy and generate its completions.

    recipe: the recipe.
    source: the model before training, a result of `models.resolve`.
    weights: the folder of the trained policy. None = the model before training.
    asked: the prompts.
    progress: the label of the progress bar.
    sampling: how completions are generated.

    Returns the completions, and how many seconds the policy took to generate them, without its loading. Raises
    UserError where the model does not load.
    """
    from rec_r1 import models

    tokenizer = models.load_tokenizer(source, recipe.model.trust_remote_code)
    model = models.load_policy_for_evaluation(source, recipe, weights)
    started = time.monotonic()
    answers = generate(model, tokenizer, asked, sampling, recipe.evaluation.batch_size, progress)
    seconds = time.monotonic() - started
    del model
    gc.collect()
    return answers, seconds


def identity(recipe: Recipe, source: str, weights: Path | None, asked: Sequence[Prompt], sampling: Sampling) -> str:
    """A hash of everything that affects the result of `answer`, whose arguments it takes.

    It covers the model's files, the prompts, the decoding, the numeric type and, where completions are drawn, the batch
    size. Equal hashes mean equal completions, up to the order of floating-point sums.
    """
    from rec_r1 import models

    whole = hashlib.sha256()
    for folder in [Path(source)] + ([weights] if weights is not None else []):
        for path in sorted(folder.iterdir()):
            if path.suffix in _MODEL_FILES and path.name != "trainer_state.json":  # That file is only a log.
                with path.open("rb") as file:
                    whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    automatic = str(models.fast_dtype() if models.is_rounded(recipe) else "torch.float32")
    dtype = automatic if recipe.model.dtype == "auto" else f"torch.{recipe.model.dtype}"
    batch = recipe.evaluation.batch_size if sampling.drawn else None  # A batch shares one stream of random numbers.
    how = dataclasses.asdict(sampling)
    if not sampling.drawn:
        how.pop("share")  # Sharing does not change greedy completions, up to the order of sums.
    if decoding.reads_prompt(sampling.options):
        # Completions that were stored without this entry depend on the padding of their batches.
        how["padding"] = "not read"
    if decoding.counts_words(sampling.end):
        # Completions that were stored without this entry may have ended at a line that held only a special token.
        how["ends"] = "without special tokens"
    rest = [list(asked), how, dtype, recipe.model.attn_implementation, batch]
    whole.update(json.dumps(rest, sort_keys=True, default=str).encode())
    return whole.hexdigest()
