"""Examples for prompts: queries with words that their relevant documents share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from rec_r1.tasks.types import Split
from retrievers import Catalog
from retrievers.text.analysis import words

SAMPLED_DOCUMENTS = 50_000  # The documents that the frequency of a word is estimated from, evenly spaced.
_LEAST_DOCUMENTS = 3  # A word of fewer sampled documents is left out: it is often a name or a number.
_LEAST_LETTERS = 3
_ENOUGH_TARGETS = 3  # With fewer relevant documents, shared words may be shared by chance.
_SHARED = 0.5  # A word is shared if at least this share of the relevant documents has it.


class CatalogWords:
    """How many documents of a catalogue have each word.

    catalog: its texts are read once, at most SAMPLED_DOCUMENTS of them.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._texts = catalog.texts
        step = max(1, math.ceil(len(catalog) / SAMPLED_DOCUMENTS))
        sampled = range(0, len(catalog), step)
        self._frequency = Counter(word for row in sampled for word in set(words(self._texts[row])))
        self._sampled = len(sampled)

    def share(self, word: str) -> float:
        """The share of the sampled documents that have a word."""
        return self._frequency[word] / self._sampled

    def most_frequent(self, count: int, left_out: Collection[str] = ()) -> list[str]:
        """The words that most sampled documents have, the most frequent first.

        count: the largest number of words.
        left_out: words that are left out, such as stop words. Words of fewer than three letters are left out, too.
        """
        kept = [w for w in self._frequency if len(w) >= _LEAST_LETTERS and w not in left_out]
        return sorted(kept, key=lambda word: (-self._frequency[word], word))[:count]

    def shared(self, query: str, rows: Sequence[int], count: int) -> list[str]:
        """The words that at least half of the relevant documents have and few others, best first.

        query: the query's text. Its own words are left out.
        rows: the catalogue rows of its relevant documents.
        count: the largest number of words.

        A word's score is the number of relevant documents that have it, times log(N / df), the inverse document
        frequency (Spärck Jones 1972) over the N sampled documents. Words that begin like a chosen one are left out,
        so that the list does not have both singular and plural.
        """
        found = Counter(word for row in rows for word in set(words(self._texts[row])))
        asked = set(words(query))
        scores = {
            word: number * math.log(self._sampled / self._frequency[word])
            for word, number in found.items()
            if number >= _SHARED * len(rows)
            and word not in asked
            and len(word) >= _LEAST_LETTERS
            and self._frequency[word] >= _LEAST_DOCUMENTS
        }
        chosen: list[str] = []
        for word in sorted(scores, key=lambda word: (-scores[word], word)):
            if len(chosen) == count:
                break
            if not any(word.startswith(other) or other.startswith(word) for other in (*chosen, *asked)):
                chosen.append(word)
        return chosen


def telling_examples(split: Split, catalog: Catalog, count: int, number: int) -> dict[int, list[str]]:
    """Choose ``count`` queries as examples, and their words: place in the split -> words.

    split: the queries.
    catalog: has the texts of their relevant documents.
    number: the largest number of words of an example.

    The examples are spread evenly over the queries with at least three relevant documents that share ``number`` words.
    If there are fewer than ``count`` such queries, they are spread over those whose documents share any word, or else
    over all queries.
    """
    known = CatalogWords(catalog)
    shared = [known.shared(query, rows, number) for query, rows in zip(split.queries, split.rows, strict=True)]
    best = [q for q, found in enumerate(shared) if len(split.rows[q]) >= _ENOUGH_TARGETS and len(found) == number]
    some = [q for q, found in enumerate(shared) if found]
    places = next((group for group in (best, some) if len(group) >= count), list(range(len(split))))
    # The middles of equal parts are taken: the first and the last query of a file are often unusual, such as numbers.
    parts = np.linspace(0, len(places), min(count, len(places)) + 1)
    return {places[int(middle)]: shared[places[int(middle)]] for middle in (parts[:-1] + parts[1:]) / 2}
