"""Call the rewards on made-up completions before anything is loaded, to find rewards that would fail in training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import rewards
from rec_r1.config import Recipe
from rec_r1.environment import rewards_of
from rec_r1.prompts import Action
from retrievers.text.analysis import words
from rewards import Outcome, Reward, WeightedSum

ORDINARY_TEXT = "probe words of an answer"  # The text of an ordinary completion.
LONG_TEXT = " ".join([ORDINARY_TEXT] * 50)  # The text of a long and repetitive completion.


def outcome(raw: bool = False, own_words: str = ORDINARY_TEXT) -> Outcome:
    """Five made-up completions for a query with three targets.

    The first ranks the targets perfectly. The second finds some of them. The third finds none, and neither does the
    fourth, which has a long and repetitive text. The fifth is malformed.

    raw: whether rewards compare with the raw query. It gets the ranks of the second completion.
    own_words: the words that the model added itself in the first completion. "" = none, as in an evaluation of the raw
        query.
    """
    ranks = np.array([[1, 2, 3], [2, 5, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], np.int32)
    ordinary, long = Action(ORDINARY_TEXT, ORDINARY_TEXT), Action(LONG_TEXT, LONG_TEXT)
    actions = [Action(ORDINARY_TEXT, own_words), ordinary, ordinary, long, None]
    completions = [action.written if action else "?" for action in actions]
    return Outcome(
        completions,
        actions,
        ranks,
        np.tile(np.array([3, 2, 1], np.float32), (5, 1)),
        words,
        ranks[[1] * 5] if raw else None,
        ["probe"] * 5,
        [action.written if action else "" for action in actions],
    )


def problems(recipe: Recipe) -> Iterator[str]:
    """One line for each reward or metric that fails on made-up completions, or that applies to none of them."""
    metrics = rewards.from_spec(dict.fromkeys(recipe.evaluation.metrics, 1.0))
    for section, total in (("rewards", rewards_of(recipe)), ("evaluation.metrics", metrics)):
        if not any(total.weights):
            yield f"{section}: every weight is 0, so all completions earn the same: give one of them a weight"
        for reward in total.rewards:
            if problem := _problem(reward, total.reads_raw, "" if section == "evaluation.metrics" else ORDINARY_TEXT):
                yield f"{section}: {problem}"


def _problem(reward: Reward, raw: bool, own_words: str) -> str | None:
    one = WeightedSum((reward,), (1.0,))
    (name,) = one.names
    try:
        (values,) = one.components(outcome(raw, own_words)).values()
    except Exception as error:  # A user's own reward may raise any exception.
        message = " ".join(str(error).split()) or "no message"
        if repr(name) in message:
            return message
        return f"reward {name!r} raises {type(error).__name__} on five made-up completions: {message}"
    if np.isnan(values).all():
        return f"reward {name!r} is NaN for perfect, half-right, wrong and malformed completions: it never applies"
    return None


def malformed_pays(recipe: Recipe) -> str | None:
    """A warning where a malformed completion earns more than a well-formed one that finds nothing, or None."""
    total = rewards_of(recipe)
    *_, worst, malformed = total(outcome(total.reads_raw)).tolist()
    if not malformed > worst:
        return None
    return (
        f"rewards: a malformed completion earns {malformed:g}, and a well-formed one that finds nothing may earn only "
        f"{worst:.2g}: add format: 1.0, or use rec_r1, so that malformed completions do not earn more"
    )
