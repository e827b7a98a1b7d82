"""What writes the completions of a policy: its weights in this process, or an OpenAI-compatible server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rec_r1 import models
from rec_r1.config import Recipe
from rec_r1.generation import answer_tokens, generate, lengths, sampling_of
from rec_r1.generation.endpoint import Endpoint, answers
from rec_r1.prompts import Prompt, up_to_end

logger = logging.getLogger(__name__)

# P prompts, P names for messages, the label of a progress bar or None -> P completions. It raises UserError for a
# prompt that cannot be completed.
Write = Callable[[Sequence[Prompt], Sequence[str], str | None], list[str]]
# Options of greedy decoding that an OpenAI-compatible server knows, or that change nothing there.
_KNOWN_TO_SERVERS = {"max_new_tokens", "do_sample", "repetition_penalty", "cache_implementation", "use_cache"}


def load_model(recipe: Recipe, source: str, weights: Path | None) -> Write:
    """Load a policy, which writes greedily, as in a held-out evaluation.

    recipe: the recipe of its run.
    source: the model before training, a result of `models.resolve`.
    weights: the folder of the trained policy. None = the model before training.

    Raises UserError where the model does not load.
    """
    tokenizer = models.load_tokenizer(source, recipe.model.trust_remote_code)
    model = models.load_policy_for_evaluation(source, recipe, weights)
    sampling = sampling_of(recipe)

    def write(asked: Sequence[Prompt], names: Sequence[str], progress: str | None) -> list[str]:
        fix = "shorten the query or its history"
        lengths.check_context(asked, names, tokenizer, sampling, model.config, fix)
        return generate(model, tokenizer, asked, sampling, recipe.evaluation.batch_size, progress)

    return write


def endpoint_of(recipe: Recipe, url: str, model: str, **options: Any) -> Endpoint:
    """The server that completes the prompts of a run as its policy would: greedily, and with the same options.

    recipe: the recipe of the run.
    url: the address up to and with /v1.
    model: the name under which the server knows the run's weights.
    options: further fields of `Endpoint`, such as `timeout_s`.

    Raises UserError for an address that is none. Logs a warning for an option of the recipe that servers lack.
    """
    sampling = sampling_of(recipe)
    extra: dict[str, Any] = {}
    if sampling.options.get("repetition_penalty") not in (None, 1, 1.0):
        extra["repetition_penalty"] = sampling.options["repetition_penalty"]
    if sampling.chat:
        extra["chat_template_kwargs"] = dict(sampling.chat)
    for name, value in sampling.options.items():
        if name not in _KNOWN_TO_SERVERS and value not in (None, 0, False):
            logger.warning("%s=%r: an OpenAI-compatible server has no such option: completions may differ", name, value)
    variable = recipe.baselines.endpoint.key_variable
    return Endpoint(url, model, variable, max_tokens=answer_tokens(recipe), extra=extra, **options)


def by_endpoint(recipe: Recipe, endpoint: Endpoint) -> Write:
    """Let a server write the completions of a run's prompts. Nothing is cached, because its weights may change.

    recipe: the recipe of the run.
    endpoint: from :func:`endpoint_of`.

    The result raises UserError where the server refuses, fails, or cannot be reached.
    """

    def write(asked: Sequence[Prompt], names: Sequence[str], progress: str | None) -> list[str]:
        texts, _ = answers(asked, endpoint, None, progress)
        return [up_to_end(text, sampling_of(recipe).end) for text in texts]

    return write
