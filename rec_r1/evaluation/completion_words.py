"""Describe the words that a policy writes: how many, how many copied or repeated, how rare, how often stuffed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rec_r1.config import Recipe
from rec_r1.environment import Environment, rewards_of
from rec_r1.prompts import Action
from rec_r1.tasks.example_words import CatalogWords
from retrievers.text.analysis import first_words, words
from rewards import StuffingPenalty, is_copy, repeated


def floor_of(recipe: Recipe) -> StuffingPenalty:
    """The reward `stuffing` of a recipe, or the one with default parameters where the recipe does not have it."""
    return next((r for r in rewards_of(recipe).rewards if isinstance(r, StuffingPenalty)), StuffingPenalty())


def definition(floor: StuffingPenalty) -> str:
    """Sentences that say which completions are stuffed, and which are copies."""
    return (
        f"A query is stuffed if it has more than {floor.max_words} written words, or if more than "
        f"{100 * floor.max_repeated:g}% of them repeat an earlier one; it is a copy if it has the raw query's words "
        "and no others."
    )


def described(
    actions: Sequence[Action | None], queries: Sequence[str], known: CatalogWords, floor: StuffingPenalty
) -> dict[str, float]:
    """Statistics of B completions. Means are over the well-formed ones that have a word.

    actions: B actions. None = malformed.
    queries: B raw queries.
    known: the words of the catalogue.
    floor: says which completions are stuffed.

    Returns, by name:
    completions: B.
    malformed: the share of malformed completions.
    words: the mean number of words of an action.
    echo: the share of an action's words that are also in its query, averaged over actions.
    repeated: the share of an action's words that repeat an earlier one, averaged over actions.
    documents: the share of the catalogue's documents that have a word, averaged over the words of all actions. Rare
        words have a small one.
    copies, stuffed: the shares of actions that :func:`definition` describes. NaN for lists, orders and edits.
    stuffing: the mean of ``floor``, in [-1, 0]. NaN for lists, orders and edits.
    """
    pairs = [(a, words(a.written), words(q)) for a, q in zip(actions, queries, strict=True) if a is not None]
    own = [(mine, asked) for _, mine, asked in pairs if mine]
    sent = [(mine, asked) for action, mine, asked in pairs if action.text]
    shares = [known.share(word) for mine, _ in own for word in mine]
    return {
        "completions": len(actions),
        "malformed": 1 - len(pairs) / len(actions) if len(actions) else float("nan"),
        "words": _mean([len(mine) for mine, _ in own]),
        "echo": _mean([float(np.mean([word in set(asked) for word in mine])) for mine, asked in own]),
        "repeated": _mean([repeated(mine) for mine, _ in own]),
        "documents": _mean(shares),
        "copies": _mean([is_copy(mine, asked) for mine, asked in sent]),
        "stuffed": _mean([_is_stuffed(mine, floor) for mine, _ in sent]),
        "stuffing": _mean([floor.of(mine, asked) for mine, asked in sent]),
    }


def _is_stuffed(written: Sequence[str], floor: StuffingPenalty) -> bool:
    return len(written) > floor.max_words or repeated(written) > floor.max_repeated


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def cut(
    env: Environment, actions: Sequence[Action | None], lengths: Sequence[int], completions: Sequence[str]
) -> list[str]:
    """B completions whose queries have at most so many written words.

    env: its format writes the shortened completions.
    actions: B actions, which are queries. None = malformed.
    lengths: B numbers of words.
    completions: the B completions of the actions. Those that are malformed or short enough stay as they are.
    """
    return [
        completion
        if action is None or len(words(action.written)) <= length
        else env.format.write([_shortened(action.written, length)])
        for action, length, completion in zip(actions, lengths, completions, strict=True)
    ]


def _shortened(text: str, length: int) -> str:
    """The longest beginning of ``text`` that ends between two words of a reader and has at most ``length`` words, and
    at least the first word."""
    cuts = (first_words(text, n) for n in range(max(1, length), 0, -1))
    return next((part for part in cuts if len(words(part)) <= length), first_words(text, 1))
