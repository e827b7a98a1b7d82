"""A catalogue with fields, a strategy for structured queries, and their meaning in a few lines of Python."""

import json
import math
import random
from collections import Counter

from hypothesis import strategies as st

from retrievers import Catalog, Query, Structured
from retrievers.text.analysis import words

VOCABULARY = ["red", "blue", "shoe", "boot", "rain", "trail", "light", "warm", "sock", "lace"]
BRANDS = ["Acme", "O'Neill", 'Say "hi"', "back\\slash", "{curly}", "a, b", "naïve", "日本", ""]
FIELDS = {"title": 3, "text": 1}


def catalog(count: int = 60, seed: int = 0) -> Catalog:
    chance = random.Random(seed)

    def some(most: int) -> str:
        return " ".join(chance.choices(VOCABULARY, k=chance.randint(0, most)))

    records = [
        {"id": f"d{i}", "title": some(3), "text": some(9), "brand": chance.choice(BRANDS), "color": some(1)}
        for i in range(count)
    ]
    # A title that is missing would become the text.
    records = [{**record, "title": record["title"] or "untitled"} for record in records]
    return Catalog.from_records([*records, {**records[0], "id": "twin"}])


def _texts(most: int):
    text = st.lists(st.sampled_from([*VOCABULARY, "unknown"]), min_size=1, max_size=3).map(" ".join)
    return st.lists(text, max_size=most).map(tuple)


def queries(boosts: bool = True):
    """Structured queries that a schema with the filters brand and color allows."""
    chosen = st.lists(st.sampled_from([*BRANDS, "nobody"]), min_size=1, max_size=3, unique=True).map(tuple)
    filters = st.one_of(
        st.just(()),
        chosen.map(lambda values: (("brand", values),)),
        st.sampled_from(["red", "", "blue"]).map(lambda value: (("color", (value,)),)),
        chosen.map(lambda values: (("brand", values), ("color", ("red", "")))),
    )
    factor = st.sampled_from([0.1, 0.5, 2.0, 10.0])
    given = st.one_of(st.just(()), factor.map(lambda value: (("title", value),)), st.just((("text", 4.0),)))
    return st.builds(
        Structured,
        query=st.one_of(st.just(""), st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=4).map(" ".join)),
        must=_texts(2),
        should=_texts(2),
        filters=filters,
        boosts=given if boosts else st.just(()),
    ).filter(lambda asked: asked.text)


def asked(structured: Structured) -> Query:
    return Query(structured.text, structured=structured)


def is_hit(document: dict, structured: Structured, fields=tuple(FIELDS)) -> bool:
    """What `retrievers.types.Structured` says of a hit, for words that are neither stemmed nor dropped."""
    own = {word for name in fields for word in words(document[name])}
    required = {word for text in structured.must for word in words(text)}
    base = {*words(structured.query), *required} or {word for text in structured.should for word in words(text)}
    return bool(own & base) and required <= own and all(document[name] in values for name, values in structured.filters)


def documents_of(found: Catalog) -> list[dict]:
    columns = {name: found.column(name) for name in found.fields}
    return [{name: column[row] for name, column in columns.items()} for row in range(len(found))]


def score(found: Catalog, structured: Structured, row: int, k1: float = 1.2, b: float = 0.75) -> float:
    """The formula at the head of `retrievers/text/bm25_fields.py`."""
    weights, total = dict(FIELDS), 0.0
    for name, factor in structured.boosts:
        weights[name] *= factor
    counted = Counter(word for text in (structured.query, *structured.must, *structured.should) for word in words(text))
    for name, weight in weights.items():
        column = [Counter(words(text)) for text in found.column(name)]
        lengths = [sum(one.values()) for one in column]
        average = sum(lengths) / len(column)
        for word, times in counted.items():
            df = sum(word in one for one in column)
            idf, tf = math.log(1 + (len(column) - df + 0.5) / (df + 0.5)), column[row][word]
            total += weight * times * idf * tf / (tf + k1 * (1 - b + b * lengths[row] / average))
    return total


TEXTS = [
    "red shoe", "'; DROP TABLE items; --", "$$; COPY items TO '/tmp/x'; $$", "a' | 'b' & !('c')", "\\", '"',
    "red\0shoe",
    "{query}", '{"match_all": {}}', "*:*", "brand:Acme OR *", "/.*/", "red~2 shoe^1e9", "%(ids)s %s %", "{0} {}",
    "\x1b[2J\x07\x7f red", "\u202e red", "日本 red", "🎉" * 40, "to_tsquery('red')", "<script>red</script>",
    "red\nshoe\r\t",
    "_id _source _all", "((((((((((", "word " * 500, "x" * 10_000, "\ud83d", "NaN", " ",
    "re\u0301d " + "\u0301\u0316" * 300, "\ufdfa" * 60, "red\u2028shoe", "\ufeffred",
]  # fmt: skip
NAMES = [
    "brand", "brand", "brand", "title", "title", "color",
    "price", "_id", "_source", "brand.keyword", "brand'; DROP TABLE items; --", "brand)s",
    "brand::int", "*", "", "filter_0", "id", "script", "{query}", "x" * 10_000,
    "ｂｒａｎｄ", "BRAND", "bra\u0301nd", " brand", "brand\0", "\ud83d", "brand, color",
]  # fmt: skip
VALUES = ["Acme", "nobody", "a' OR 1=1 --", '{"exists": {"field": "_id"}}', "*", "%(ids)s", '","b', "{}", "NULL", "\0"]
NUMBERS = [1, 2.5, 0, -1, 1e308, 10**400, float("nan"), float("inf"), "2", True, None, [], {}]
KEYS = ["script", "knn", "filter", "query_string", "sort", "size", "from", "aggs", "__class__", "minimum_should_match"]


def hostile(count: int = 500, seed: int = 0) -> list[str]:
    """Completions of the format `json` that no engine may be harmed by. Some of them are well-formed."""
    chance = random.Random(seed)

    def texts():
        return [chance.choice(TEXTS) for _ in range(chance.choice([0, 1, 1, 2, 3, 40]))]

    def odd():
        return chance.choice([*NUMBERS, chance.choice(TEXTS), texts(), {"match_all": {}}, [[["red"]]], {"$ne": None}])

    found = []
    for _ in range(count - 11):
        answer = {}
        for key in ("query", "must", "should", "filters", "boosts"):
            if chance.random() < 0.5:
                continue
            sane = {
                "query": lambda: chance.choice(TEXTS),
                "must": texts,
                "should": texts,
                "filters": lambda: {
                    chance.choice(NAMES): chance.choice([chance.choice(VALUES), [chance.choice(VALUES)] * 2])
                    for _ in range(chance.randint(1, 2))
                },
                "boosts": lambda: {chance.choice(NAMES): chance.choice(NUMBERS)},
            }[key]
            answer[key] = sane() if chance.random() < 0.85 else odd()
        if chance.random() < 0.1:
            answer[chance.choice(KEYS)] = odd()
        found.append(f"<answer>{json.dumps(answer)}</answer>")
    mega, deep, wide = "x" * 1_000_000, "[" * 50_000 + "]" * 50_000, ", ".join(['"red"'] * 100_000)
    return [
        *found,
        f'<answer>{{"query": "{mega}"}}</answer>',
        f'<answer>{{"query": "red", "must": ["shoe", "{mega}"]}}</answer>',
        f'<answer>{{"query": "red", "filters": {{"brand": ["{mega}"]}}}}</answer>',
        f'<answer>{{"query": {deep}}}</answer>',
        f'<answer>{{"must": [{wide}]}}</answer>',
        '<answer>{"query": "red", "query": "shoe", "filters": {"brand": "Acme", "brand": "nobody"}}</answer>',
        '<answer>{"query": "red", "boosts": {"title": 1e999}}</answer>',
        '<answer>{"query": "red", "boosts": {"title": NaN}}</answer>',
        '<answer>{"query": "red"}</answer><answer>{"query": "shoe"}</answer>',
        '<answer>{"query": "red"} ; rm -rf /</answer>',
        "<answer>" + "{" * 100_000,
    ]
