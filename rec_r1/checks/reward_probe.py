"""Rewards are called on made-up answers before anything is loaded: what fails on these fails in training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import rewards
from rec_r1.config import Recipe
from rec_r1.environment import rewards_of
from rec_r1.prompts import Action
from retrievers.text.analysis import words
from rewards import Outcome, Reward, WeightedSum

WORDS = "probe words of an answer"
LONG = " ".join([WORDS] * 50)


def outcome(raw: bool = False, own_words: str = WORDS) -> Outcome:
    """Five completions for a query with three relevant documents: ranked perfectly, half of them found, none found,
    none found with a long and repetitive text, malformed.

    raw: whether rewards compare with the raw query, which finds half of the documents.
    own_words: what the model is said to have written in the first; "" = nothing, as where the raw query is evaluated.
    """
    ranks = np.array([[1, 2, 3], [2, 5, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], np.int32)
    actions = [Action(WORDS, own_words), *(Action(WORDS, WORDS) for _ in range(2)), Action(LONG, LONG), None]
    completions = [action.written if action else "?" for action in actions]
    return Outcome(
        completions,
        actions,
        ranks,
        np.tile(np.array([3, 2, 1], np.float32), (5, 1)),
        words,
        ranks[[1] * 5] if raw else None,
    )


def problems(recipe: Recipe) -> Iterator[str]:
    """One line for every reward or metric that raises, returns another shape, or applies to no answer at all."""
    metrics = rewards.from_spec(dict.fromkeys(recipe.evaluation.metrics, 1.0))
    for section, total in (("rewards", rewards_of(recipe)), ("evaluation.metrics", metrics)):
        if not any(total.weights):
            yield f"{section}: every weight is 0, so every answer earns the same: give one of them a weight"
        for reward in total.rewards:
            if problem := _problem(reward, total.reads_raw, "" if section == "evaluation.metrics" else WORDS):
                yield f"{section}: {problem}"


def _problem(reward: Reward, raw: bool, own_words: str) -> str | None:
    one = WeightedSum((reward,), (1.0,))
    (name,) = one.names
    try:
        (values,) = one.components(outcome(raw, own_words)).values()
    except Exception as error:  # a reward of the user's own may raise anything
        said = " ".join(str(error).split()) or "no message"
        return said if repr(name) in said else f"reward {name!r} raises {type(error).__name__} on five answers: {said}"
    if np.isnan(values).all():
        return f"reward {name!r} is NaN for perfect, half-right, wrong and malformed answers alike: it never applies"
    return None


def malformed_pays(recipe: Recipe) -> str | None:
    """A warning where an answer that cannot be read earns more than one that can and finds nothing; else None."""
    total = rewards_of(recipe)
    *_, worst, malformed = total(outcome(total.reads_raw)).tolist()
    if not malformed > worst:
        return None
    return (
        f"rewards: a malformed answer earns {malformed:g}, and a well-formed one that finds nothing as little as "
        f"{worst:.2g}: add format: 1.0, or take rec_r1, so that writing nothing readable does not pay"
    )
