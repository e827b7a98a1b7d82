"""The examples of a prompt in words that the relevant documents share."""

import math
import re

from hypothesis import given
from hypothesis import strategies as st

from rec_r1 import tasks
from rec_r1.config import FormatConfig
from rec_r1.prompts import Format
from rec_r1.tasks.example_words import CatalogWords, telling_examples
from rec_r1.tasks.types import Split
from retrievers import Catalog

TEXTS = [
    "steel pot with lid", "iron pot with lid", "copper pot, lid of glass", "warm wool scarf", "long silk scarf",
    "scarf of warm wool", "rain coat", "coat for rain and wind", "winter coat", "glass of water",
]  # fmt: skip
CATALOG = Catalog.from_records([{"id": str(row), "text": text} for row, text in enumerate(TEXTS)])


def split(queries: list[str], rows: list[tuple[int, ...]]) -> Split:
    return Split([str(i) for i in range(len(queries))], queries, rows, [(1.0,) * len(own) for own in rows])


def test_words_that_the_relevant_documents_share():
    known = CatalogWords(CATALOG)
    assert known.shared("cooking", (0, 1, 2), 4) == ["lid", "pot"]  # only two documents have "with"
    assert known.shared("lid", (0, 1, 2), 4) == ["pot"]  # the query's own words are left out
    assert known.shared("cooking", (0, 1, 2), 1) == ["lid"]
    assert known.shared("cooking", (9,), 4) == []  # words of fewer than three documents teach nothing


WORDS = st.sampled_from(["pot", "lid", "steel", "iron", "scarf", "wool", "coat", "rain", "glass"])
DOCUMENTS = st.lists(st.lists(WORDS, min_size=1, max_size=6).map(" ".join), min_size=3, max_size=15)


@given(texts=DOCUMENTS, query=WORDS, count=st.integers(1, 5), data=st.data())
def test_the_words_are_those_of_a_plain_count(texts, query, count, data):
    rows = data.draw(st.lists(st.sampled_from(range(len(texts))), min_size=1, max_size=4, unique=True))
    bags = [set(re.findall(r"\w+", text)) for text in texts]
    scores = {}
    for word in set().union(*(bags[row] for row in rows)) - {query}:
        having, frequency = sum(word in bags[row] for row in rows), sum(word in bag for bag in bags)
        if 2 * having >= len(rows) and frequency >= 3:
            scores[word] = having * math.log(len(texts) / frequency)
    expected = sorted(scores, key=lambda word: (-scores[word], word))[:count]
    catalog = Catalog.from_records([{"id": str(row), "text": text} for row, text in enumerate(texts)])
    assert CatalogWords(catalog).shared(query, rows, count) == expected


def test_examples_are_queries_whose_documents_share_enough_words():
    queries = split(["cooking", "neck", "weather", "drink"], [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9,)])
    found = telling_examples(queries, CATALOG, 1, 2)
    assert list(found.values()) == [["lid", "pot"]]  # the scarves share one such word, and so do the coats
    assert set(telling_examples(queries, CATALOG, 3, 2)) == {0, 1, 2}  # two words are too much to ask for three
    assert set(telling_examples(queries, CATALOG, 4, 2)) == {0, 1, 2, 3}


def test_a_prompt_begins_with_them():
    queries = split(["cooking", "neck", "weather"], [(0, 1, 2), (3, 4, 5), (6, 7, 8)])
    config = FormatConfig(chat=False, prompt="{query}:", action="expand", example_words=2)
    places, format_ = tasks.examples(queries, CATALOG, Format(config), 1)
    assert places == [0]
    assert format_.prompt("belt", (), ()) == "cooking: lid, pot\nbelt:"
