"""Sample completions from the untrained policy, as rollouts are sampled, and score them."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from rec_r1 import models
from rec_r1.config import Recipe
from rec_r1.environment import Environment
from rec_r1.evaluation.evaluate import score_raw
from rec_r1.generation import complete, render, sampling_of_rollouts, texts_of
from rec_r1.generation.decoding import Completion
from rec_r1.scoring import Scored
from rec_r1.tasks import Split, prompts


@dataclass(frozen=True)
class Sampled:
    """N training queries with G scored completions each, from the untrained policy.

    split: the N queries.
    samples: G.
    scored: the N x G completions. Those of a query are neighbours.
    raw: the N raw queries, scored by the same rewards.
    lengths: (N x G,) the number of tokens of each completion.
    clipped: (N x G,) whether a completion reached `grpo.max_completion_length` without an end.
    entropy: the mean entropy in nats of the distribution from which a token was drawn, see :func:`entropy_of`.
    seconds: how long the policy wrote.
    """

    split: Split
    samples: int
    scored: Scored
    raw: Scored
    lengths: np.ndarray
    clipped: np.ndarray
    entropy: float
    seconds: float


def draw(split: Split, queries: int, seed: int) -> Split:
    """``queries`` queries of a split, drawn without replacement; all of them where it has fewer."""
    return split.take(np.random.default_rng(seed).permutation(len(split))[:queries].tolist())


def sample(recipe: Recipe, env: Environment, split: Split, samples: int, source: str, batch_size: int) -> Sampled:
    """Sample ``samples`` completions for each query of a split from the untrained policy, and score them once.

    recipe: the recipe.
    env: its task, format and Scorer.
    split: N training queries.
    samples: how many completions each query gets.
    source: the untrained model, a result of :func:`models.resolve`.
    batch_size: how many completions are generated at once.

    Raises UserError for a model that does not load, and RetrieverError where the retriever fails.
    """
    sampling = dataclasses.replace(sampling_of_rollouts(recipe), samples=samples)
    tokenizer = models.load_tokenizer(source, recipe.model.trust_remote_code)
    policy = models.load_policy_for_evaluation(source, recipe, None)
    asked = prompts(split, env.task.catalog, env.format)
    started = time.monotonic()
    completions = complete(policy, tokenizer, asked, sampling, batch_size, "sampling completions")
    seconds = time.monotonic() - started
    repeated = split.take([q for q in range(len(split)) for _ in range(samples)])
    scored = env.scorer.score_split(texts_of(completions, tokenizer), repeated).whole()
    ids = [render(prompt, tokenizer, sampling.chat) for prompt in asked]
    temperature = float(sampling.options["temperature"])
    return Sampled(
        split,
        samples,
        scored,
        score_raw(split, env.scorer),
        np.array([len(one.ids) for one in completions]),
        np.array([not one.ended for one in completions]),
        entropy_of(policy, ids, completions[::samples], temperature),
        seconds,
    )


def entropy_of(policy: Any, prompt_ids: list[list[int]], completions: list[Completion], temperature: float) -> float:
    """The mean entropy, in nats, of the distributions from which the tokens of N completions were drawn.

    These are the distributions at the sampling temperature over all tokens. Options such as top_p and
    repetition_penalty, which change them further, are not taken into account.

    policy: a causal LM.
    prompt_ids: N lists of token ids.
    completions: N completions, one for each prompt.
    temperature: the sampling temperature.
    """
    import torch

    total, count = 0.0, 0
    for prompt, completion in zip(prompt_ids, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion.ids]], device=policy.device)
        with torch.no_grad():
            logits = policy(input_ids=ids, logits_to_keep=len(completion.ids) + 1).logits[0, :-1].float()
        total += float(torch.distributions.Categorical(logits=logits / temperature).entropy().sum())
        count += len(completion.ids)
    return total / max(1, count)
