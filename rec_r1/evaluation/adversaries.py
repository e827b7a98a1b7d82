"""Adversaries: completions that copy or stuff, written without a model, in the format of a recipe.

A reward that pays them more than the trained policy does not measure what the policy was trained for.

| action | adversaries |
|---|---|
| a query | copies of the query; frequent words; a stuffed query; words of a random document; a title of the prompt |
| a list of items, an edit | the last title of the history; the whole history; popular titles; random titles |
| an order of candidates | the order that changes nothing; each candidate's number with its first words |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import retrievers
from rec_r1.config import Recipe
from rec_r1.environment import Environment
from rec_r1.tasks import Split, popularity
from rec_r1.tasks.example_words import CatalogWords
from retrievers.text.analysis import first_words, fold, words
from retrievers.text.languages import STOPWORDS, stop_words

COPIES = (2, 10)  # How often an adversary copies the query.
STUFFED_WORDS = 182  # The longest query of a released Rec-R1 model, see `rewards.shaping.LengthPenalty`.
KEYWORDS = 10  # The length of lists of words and of titles.
FIRST_WORDS = 3  # How many words of each candidate are copied.


def adversaries(
    recipe: Recipe, env: Environment, split: Split, known: CatalogWords, seed: int = 0
) -> dict[str, list[str]]:
    """The completions of all adversaries that apply to the recipe's action.

    recipe: the recipe. The language of its retriever decides which words are stop words.
    env: its environment.
    split: the Q queries.
    known: the words of the catalogue.
    seed: of the random documents.

    Returns name -> Q completions.
    """
    action = env.format.config.action
    if action == "ranking":
        return _orders(env, split)
    if action in ("items", "edit"):
        return _titles(env, split, seed)
    return _queries(env, split, known, stop_words_of(recipe), seed)


def stop_words_of(recipe: Recipe) -> set[str]:
    """The folded stop words of the languages of a recipe's retriever. Of English where it analyses no words."""
    codes = retrievers.languages(recipe.retriever.kind, recipe.retriever.params) or ["en"]
    return {fold(word) for code in codes if code in STOPWORDS for word in stop_words(code)}


def _queries(env: Environment, split: Split, known: CatalogWords, stop: set[str], seed: int) -> dict[str, list[str]]:
    """Adversaries that write a query."""
    titles, shown = env.task.catalog.titles, env.format.cut
    frequent = known.most_frequent(STUFFED_WORDS, stop)

    def stuffed(query: str) -> list[str]:
        return [query, *frequent[: max(0, STUFFED_WORDS - len(words(query)))]]

    written: dict[str, list[list[str]]] = {
        f"query, {n} times": [[query] * n for query in split.queries] for n in COPIES
    }
    written["frequent words"] = [frequent[:KEYWORDS]] * len(split)
    written[f"stuffed, {STUFFED_WORDS} words"] = [stuffed(query) for query in split.queries]
    written["words of a random document"] = _random_words(env, split, stop, seed)
    if split.histories:
        written["last title"] = [[shown(titles[row]) for row in history[-1:]] for history in split.histories]
    if split.candidates:
        written["first words of candidates"] = [
            [first_words(titles[row], FIRST_WORDS) for row in rows] for rows in split.candidates
        ]
    found = {name: [env.format.write(parts) for parts in lists] for name, lists in written.items()}
    if env.format.examples:
        found["answer of an example"] = [env.format.examples[0][1]] * len(split)
    return found


def _random_words(env: Environment, split: Split, stop: set[str], seed: int) -> list[list[str]]:
    """For each of Q queries, the first distinct words of a random document, without stop words."""
    rng, texts = np.random.default_rng(seed), env.task.catalog.texts
    drawn = rng.integers(0, len(texts), len(split))
    return [[w for w in dict.fromkeys(words(texts[int(row)])) if w not in stop][:KEYWORDS] for row in drawn]


def _titles(env: Environment, split: Split, seed: int) -> dict[str, list[str]]:
    """Adversaries that write titles."""
    titles, most = env.task.catalog.titles, min(KEYWORDS, env.format.config.max_items)
    popular = np.argsort(-popularity(env.task), kind="stable")[:most].tolist()
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(len(titles), min(most, len(titles)), replace=False).tolist() for _ in range(len(split))]
    rows: dict[str, Sequence[Sequence[int]]] = {"popular titles": [popular] * len(split), "random titles": drawn}
    if split.histories:
        rows = {
            "last title": [history[-1:] for history in split.histories],
            "titles of the history": [history[-most:] for history in split.histories],
        } | rows
    return {
        name: [env.format.write([titles[int(row)] for row in own]) for own in lists] for name, lists in rows.items()
    }


def _orders(env: Environment, split: Split) -> dict[str, list[str]]:
    """Adversaries that write an order of candidates."""
    numbers = [range(1, len(rows) + 1) for rows in split.candidates]
    found = {"order that changes nothing": [env.format.write_order(own) for own in numbers]}
    if env.format.config.answer == "line":  # JSON has no place for words.
        titles = env.task.catalog.titles
        copied = [
            [f"{n}. {first_words(titles[row], FIRST_WORDS)}" for n, row in enumerate(rows, 1)]
            for rows in split.candidates
        ]
        found["first words of candidates"] = ["; ".join(parts) for parts in copied]
    return found
