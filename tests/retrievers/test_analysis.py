"""Words in every script: real names and keywords of emoji in 25 languages (CLDR), and unusual texts."""

import json
import math
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

import retrievers
from retrievers import Catalog, Query
from retrievers.text.analysis import MOST_MARKS, _split, first_words, fold, words, words_as_written
from retrievers.text.bm25 import Params, analyze
from retrievers.text.languages import LANGUAGES, STOPWORDS, mismatch, stop_words

ANNOTATIONS = json.loads((Path(__file__).parent / "cldr_annotations.json").read_text(encoding="utf-8"))
TEXTS = {code: list(emoji.values()) for code, emoji in ANNOTATIONS.items() if code != "source"}
UNSPACED = ("zh", "ja", "th", "lo", "km", "my")  # Their keywords are joined without spaces, as in a sentence.
MARKS = st.sampled_from("\u0301\u0308\u093f\u0e31\u200d\u00ad\ufe0f\u064e\u05b8_'’`´½.,:;0٣九")
ANY_TEXT = st.text() | st.text(MARKS | st.characters(categories=("L", "M", "N", "P", "Cf", "Zs")))


def make_catalog(texts) -> Catalog:
    return Catalog.from_records({"id": str(i), "text": text} for i, text in enumerate(texts))


def reciprocal_ranks(language: str, spelt=lambda text: text) -> list[float]:
    """The reciprocal rank of each document for its first keyword, among documents with all keywords in one text."""
    kept = [texts for texts in TEXTS[language] if len(texts) > 1]
    joined = ("" if language in UNSPACED else " ").join
    documents = make_catalog([joined([texts[0], *texts[:0:-1]]) for texts in kept])
    retriever = retrievers.open("bm25", documents, language=language)
    ranks = retriever.ranks([Query(spelt(texts[1])) for texts in kept], np.arange(len(kept))[:, None])
    return [1 / rank if rank else 0.0 for rank in ranks[:, 0].tolist()]


def test_the_data_is_as_wide_as_it_says():
    scripts = {
        unicodedata.name(character).split()[0]
        for texts in TEXTS.values()
        for name, *_ in texts
        for character in name
        if character.isalpha()
    }
    assert len(TEXTS) == 25 and min(map(len, TEXTS.values())) == 32 and len(scripts) >= 18, scripts


@pytest.mark.parametrize("language", list(TEXTS))
def test_a_keyword_out_of_its_text_finds_it(language):
    found = reciprocal_ranks(language)
    assert min(found) > 0 and np.mean(found) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("language", list(TEXTS))
def test_equivalent_spellings_are_one(language):
    for texts in TEXTS[language]:
        for text in texts:
            terms = analyze([text], Params(language=language))
            assert terms[0]
            for form in ("NFC", "NFD", "NFKC", "NFKD"):
                assert analyze([unicodedata.normalize(form, text)], Params(language=language)) == terms
            if language != "tr":
                assert words(text.upper()) == words(text.lower()) == words(text)


@pytest.mark.parametrize("language", list(TEXTS))
def test_no_word_is_cut_at_its_own_marks(language):
    """In scripts with spaces, each piece between white space and punctuation is one word."""
    for texts in TEXTS[language]:
        for piece in regex.split(r"[^\p{L}\p{M}\p{N}\p{Cf}]+", " ".join(texts)):
            found = words(piece)
            if language in (*UNSPACED, "ko"):
                assert all(len(regex.findall(r"\P{M}\p{M}*", word)) <= 2 for word in found if not word.isascii())
            else:
                assert found == ([fold(piece)] if piece else [])


@pytest.mark.parametrize("language", ["zh", "th", "hi", "de"])
def test_scores_are_the_formulas_in_any_script(language):
    docs = [" ".join(texts) for texts in TEXTS[language]]
    params = Params(language=language)
    retriever = retrievers.open("bm25", make_catalog(docs), language=language)
    terms = analyze(docs, params)
    n, average = len(docs), sum(map(len, terms)) / len(docs)
    for name, *_ in TEXTS[language][:8]:
        hits = retriever.search([Query(name)], n)
        got = {row: score for row, score in zip(hits.rows[0], hits.scores[0], strict=True) if row >= 0}
        for row, doc in enumerate(terms):
            tf, expected = Counter(doc), 0.0
            for term in analyze([name], params)[0]:
                df = sum(term in other for other in terms)
                idf = math.log(1 + (n - df + 0.5) / (df + 0.5))
                expected += idf * tf[term] / (tf[term] + 1.2 * (0.25 + 0.75 * len(doc) / average)) if tf[term] else 0.0
            assert got.get(row, 0.0) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("防水登山鞋 男款", ["防水", "水登", "登山", "山鞋", "男款"]),
        ("猫", ["猫"]),
        ("トレッキング靴", ["トレ", "レッ", "ッキ", "キン", "ング", "グ靴"]),
        ("ﾈｺ ＬＥＤ", ["ネコ", "led"]),
        ("LG전자 3개", ["lg", "전자", "3", "개"]),
        ("ภาษา", ["ภา", "าษ", "ษา"]),
        ("हिन्दी किताबें १२", ["हिन्दी", "किताबें", "12"]),
        ("שָׁלוֹם צה״ל ג׳ירפה", ["שלום", 'צה"ל', "ג'ירפה"]),
        ("مُحَمَّد ٣٫٥", ["محمد", "3.5"]),
        ("می‌خواهم cam\u00adera", ["میخواهم", "camera"]),
        ("I’m don't 'tis dogs'", ["i'm", "don't", "tis", "dogs"]),
        ("3.5 1,000 avery.com u.s. 5'10 a_b", ["3.5", "1,000", "avery", "com", "u", "s", "5", "10", "a_b"]),
        ("Ἀθῆναι ΟΔΟΣ οδός", ["ἀθῆναι", "οδοσ", "οδόσ"]),
        ("አማርኛ፡ቋንቋ བོད་ཡིག", ["አማርኛ", "ቋንቋ", "བོད", "ཡིག"]),
        ("Ինչո՞ւ ½ 👩‍🏫 C++ __ \u0301", ["ինչու", "1", "2", "c"]),
        ("size 9½ ९¾ 1½½ x½", ["size", "9", "1", "2", "9", "3", "4", "1", "1", "2", "1", "2", "x1", "2"]),
        ("don´t don`t don\u1ffdt don\uff40t `code` ´", ["don't"] * 4 + ["code"]),
        ("don`t `code` 5`10", ["don't", "code", "5", "10"]),
        ("ᠮᠣᠩᠭᠣᠯ ᎣᏏᏲ 𞤀𞤣𞤤", ["ᠮᠣᠩᠭᠣᠯ", "ᎣᏏᏲ", "𞤢𞤣𞤤"]),
    ],
)
def test_words_by_hand(text, found):
    assert words(text) == found


@pytest.mark.parametrize("query", ["登山鞋", "鞋", "防水", "男"])
def test_a_piece_of_a_clause_finds_it(query):
    retriever = retrievers.open("bm25", make_catalog(["防水登山鞋 男款", "红色雨伞"]))
    assert retriever.search([Query(query)], 2).rows.tolist() == [[0, -1]]


def test_single_letters_are_terms_and_not_words():
    assert analyze(["登山鞋"], Params()) == [["登", "山", "鞋", "登山", "山鞋"]]
    assert len(words("防水登山鞋" * 40)) == 199 and len(set(words("防水登山鞋" * 40))) == 5


def test_contractions_and_possessives():
    plain = Params(language=None)
    assert analyze(["I'm I’m don't", "Im dont"], plain) == [["im", "im", "dont"], ["im", "dont"]]
    assert analyze(["the lecturer's", "lecturers’", "lecturer"], Params()) == [["lectur"]] * 3
    assert analyze(["l’avion d'accord"], Params(language="fr")) == analyze(["avion accord"], Params(language="fr"))


@given(ANY_TEXT)
@example("\u0301abc")
@example("İI_\u200d٣")
@example("ア゛か゛")
@example("9½½")
@example("n\u1ffdt")
def test_any_text_has_words(text):
    found, folded = words(text), fold(text)
    assert fold(folded) == folded
    assert all(word in folded and regex.search(r"[\p{L}\p{N}]", word) for word in found)
    assert words(" ".join(found)) == found
    assert words(unicodedata.normalize("NFD", text)) == words(unicodedata.normalize("NFC", text)) == found
    for terms in analyze([text], Params()):
        " ".join(terms).encode()  # There are no half characters, which neither a file nor an index can store.


def test_digits_that_are_newer_than_pythons_unicode_data_are_words():
    """`regex` knows the digits of newer versions of Unicode than `unicodedata`, such as those of Nag Mundari."""
    for digit in regex.findall(r"\p{Nd}", "".join(map(chr, range(0x10000, 0x20000)))):
        assert words(f"a {digit}") == ["a", fold(digit)]


@given(st.lists(ANY_TEXT, max_size=4))
@settings(deadline=None)
def test_terms_are_those_of_the_whole_text(texts):
    """`terms` splits the pieces between white space, and `words` splits the whole text. Both find the same words."""
    for text, found in zip(texts, analyze(texts, Params(language=None)), strict=True):
        whole = _split(fold(text), letters_too=True)
        assert found == [word.replace("'", "").replace('"', "") for word in whole]
        assert set(words(text)) <= set(whole)


@given(st.text(st.characters(max_codepoint=127)) | st.text(st.sampled_from("a1_'`.,;:- \nZ")))
def test_the_short_way_for_ascii_is_the_long_one(text):
    long = _split(fold(text + " é"))  # A text that is not ASCII is split by the code for all scripts.
    assert [*words(text), "é"] == long


@given(st.text(max_size=60), st.integers(1, 8))
def test_first_words(text, n):
    cut = first_words(text, n)
    assert " ".join(text.split()).startswith(cut) and first_words(cut, n) == cut
    assert first_words(text, None) == " ".join(text.split())
    if text.isascii():
        assert cut == " ".join(text.split()[:n])


def test_first_words_of_a_clause():
    assert first_words("防水登山鞋 男款", 6) == "防水登山鞋 男" and first_words("Red  shoes, size 9", 2) == "Red shoes,"


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    [
        *("\u0301", "_", "é'", "🇩", "\u200d", 'א"', "1,", "ก\u0e31", "九", "é.", " ", "ｱﾞ"),
        *("_\u0301", "\u0301\u0316", "\u00ad\u0301\u0316", "\u200d\u0316\u0301", "\u0f73\u0f71"),
    ],
)
def test_long_texts_take_time_in_proportion(unit):
    """A pattern that takes quadratic time would need minutes for these texts, and so would sorting their marks."""
    text = "é" + unit * 200_000
    assert fold(text, turkic=True) is not None and len(words_as_written(text)) <= 600_001
    assert len(words(text)) <= 400_001


def test_more_marks_than_any_letter_has_are_dropped():
    """Thirty is Unicode's own limit for a text that is read as a stream."""
    marks = "\u0316" * (MOST_MARKS - 1) + "\u0301"
    assert words(f"x{marks} z") == [f"x{marks}", "z"]  # As many as are allowed stay.
    assert words(f"x{marks}\u0301\u0316 z") == words(f"x{marks[:-1]}\u200d\u0301\u00ad\u0316 z") == [f"x{marks}", "z"]


@pytest.mark.parametrize("code", list(LANGUAGES))
def test_every_language_has_what_it_says(code):
    import Stemmer

    language = LANGUAGES[code]
    params = Params(language=code)
    assert params == Params(language=language.name)
    assert params.stemmer == (language.name if language.stemmed else None)
    assert language.stemmed == (language.name in Stemmer.algorithms())
    assert params.stopwords == (code if language.stopwords else None)
    if code in STOPWORDS:
        assert len(stop_words(code)) > 30 and analyze([" ".join(stop_words(code))], params) == [[]]


def test_the_default_is_english_and_stemmer_and_stopwords_override():
    assert Params() == Params(language="english") == Params(language="en", stemmer="english", stopwords="en")
    assert Params(stemmer=None, stopwords=None) == Params(language="en", stemmer=None, stopwords=None)
    assert Params(language=None) == Params(language="none", stemmer=None, stopwords=None)
    assert Params(language="de", stemmer=None).stopwords == "de"
    assert analyze(["Die Häuser der Stadt"], Params(language="de")) == [["haus", "stadt"]]


def test_turkish_letters_have_their_own_capitals():
    turkish = Params(language="tr", stemmer=None)
    for word in ("istanbul", "ılık", "çiçek"):
        capitals = word.replace("i", "İ").upper()
        assert analyze([capitals, unicodedata.normalize("NFD", capitals)], turkish) == [[word], [word]]


@pytest.mark.parametrize(
    ("language", "message"),
    [
        ("germn", "did you mean 'german'"),
        ("xx", r"retriever\.params\.language: unknown 'xx': choose from .* or null"),
        (7, "unknown 7"),
        (["en"], r"unknown \['en'\]"),
        (False, "write norwegian"),
    ],
)
def test_an_unknown_language_is_named(language, message):
    with pytest.raises(ValueError, match=message):
        Params(language=language)


@pytest.mark.parametrize("language", list(TEXTS))
def test_a_language_of_another_script_is_named(language):
    texts = [" ".join(texts) for texts in TEXTS[language]]
    assert mismatch(texts, language) is None and mismatch(texts, None) is None
    latin = LANGUAGES[language].scripts == ("Latin",)
    other = "ru" if latin else "en"
    line = mismatch(texts, other)
    assert line is not None and f"language is {other}" in line
    assert f" {language}," in line  # The message also names this language.


def test_a_catalogue_without_letters_goes_with_any_language():
    assert mismatch(["", "123 !"], "en") is None and mismatch([], "en") is None


def test_mismatches_look_into_parts():
    catalog = make_catalog(["防水登山鞋", "红色雨伞"])
    (line,) = retrievers.mismatches("bm25", {}, catalog)
    assert line.startswith("100% of the letters in the documents are Han") and "zh" in line
    parts = {"retrievers": [{"kind": "bm25", "params": {"k1": 0.9}}, {"kind": "bm25", "params": {"language": "zh"}}]}
    assert retrievers.mismatches("hybrid", parts, catalog) == [line]
    assert retrievers.mismatches("dense", {}, catalog) == retrievers.mismatches("bm25", {"language": None}, catalog)
    assert retrievers.mismatches("milvus", {}, catalog) == retrievers.mismatches("lucene", {}, catalog) == [line]
    assert retrievers.mismatches("milvus", {"mode": "dense"}, catalog) == []
