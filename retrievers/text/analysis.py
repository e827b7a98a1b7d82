"""Splits texts of every script into words. BM25, rewards that count words, and reports share this definition.

A text is folded first, so that equivalent spellings become the same:

- case and compatibility forms are folded (Unicode Standard 3.13, D146, in composed form);
- decimal digits become 0 to 9;
- every apostrophe becomes ', also ` and ´, which people type in its place;
- a space is inserted between a number and a vulgar fraction;
- characters that people do not type in a query are removed: default-ignorable characters (soft hyphens, joiners,
  variation selectors), enclosing marks, Hebrew points, Arabic vowel signs and tatweel, Armenian intonation marks.

The text is then split at the word boundaries of Unicode Standard Annex #29 by the `regex` library. A word has at least
one letter or number. Two rules differ, as the annex permits: full stops and commas join only digits ("3.5" is one word,
"avery.com" is two), and apostrophes join only letters.

Some scripts are written without spaces between words, or may be (Chinese, Japanese, Korean, Thai, Khmer, …). Their
letters are those between which Annex #14 allows a line break. They are split into overlapping pairs, as by Lucene's
CJKBigramFilter: 登山鞋 becomes 登山 and 山鞋. The terms of documents and queries also contain each single letter.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import chain, pairwise

import regex

from retrievers.text.languages import TURKIC, stop_words

_ASCII_WORD = re.compile(
    r"(?<![a-z0-9_])_*[a-z0-9][a-z0-9_]*(?:(?:(?<=[a-z])'(?=[a-z])|(?<=[0-9])[.,](?=[0-9]))[a-z0-9_]+)*"
)
_WORD = regex.compile(r"(?w)\b(?=(?:\p{Pc}\p{M}*+)*+[\p{L}\p{N}]).+?\b", regex.DOTALL)
_JOINS_NOTHING = regex.compile(r"[:;]|(?<![0-9])[.,]|[.,](?![0-9])|(?<=[0-9])'|'(?=[0-9])")
_BREAKS = "".join(rf"\p{{Line_Break={name}}}" for name in ("ID", "CJ", "NS", "SA", "AK", "AP", "AS", "H2", "H3"))
# Scripts whose signs stand for words and syllables. They have no spaces, but Annex #14 breaks their lines at spaces.
_SIGNS = "".join(
    rf"\p{{Script={name}}}"
    for name in ("Cuneiform", "Egyptian_Hieroglyphs", "Anatolian_Hieroglyphs", "Khitan_Small_Script")
)
_UNSPACED = rf"[[{_BREAKS}{_SIGNS}]&&[\p{{L}}\p{{N}}]]"
_LETTER = regex.compile(rf"{_UNSPACED}\p{{M}}*", regex.V1)  # A letter with its vowel signs and tone marks.
_RUN = regex.compile(rf"((?:{_UNSPACED}\p{{M}}*)+)|[^{_UNSPACED}]+", regex.V1)
_SHOWN = regex.compile(rf"{_UNSPACED}\p{{M}}*|[^\s{_UNSPACED}]+", regex.V1)
_NOT_TYPED = regex.compile(
    r"[\p{Default_Ignorable_Code_Point}\p{Me}"
    r"\u0591-\u05BD\u05BF\u05C1\u05C2\u05C4\u05C5\u05C7"  # Hebrew
    r"\u0640\u064B-\u0652\u0670\u055B\u055C\u055E]"  # Arabic, Armenian
)
_DIGIT = regex.compile(r"[\p{Nd}--[0-9]]", regex.V1)
_PUNCTUATION = str.maketrans(dict.fromkeys("‘’‛ʻʼ՚׳`", "'") | {"״": '"', "⁄": "/", "٫": ".", "٬": ","})
_ACUTE = str.maketrans("´\u1ffd", "''")
_AFTER_NUMBER = regex.compile(r"(?<=\p{N})(?=[¼½¾⅐-⅟↉])")  # "9½" becomes "9 1/2", not "91/2".
_TURKIC = str.maketrans({"I": "ı", "İ": "i"})
# Unicode's Stream-Safe Text Format (Standard Annex #15): no natural text has more marks than these on one letter, and
# Unicode sorts the marks of a letter in a time that grows with the square of their number.
MOST_MARKS = 30
_TOO_MANY_MARKS = regex.compile(rf"(\p{{M}}{{{MOST_MARKS}}})\p{{M}}+")
_INSIDE = str.maketrans("", "", "'\"")  # These characters may be inside a word. They are removed from its term.


def fold(text: str, turkic: bool = False) -> str:
    """Fold a text, so that equivalent spellings become the same, see the module. Of the marks on one letter, those
    beyond the first MOST_MARKS are dropped.

    turkic: whether to lower I to ı and İ to i, as in Turkish (status T of CaseFolding.txt). Default False.
    """
    if turkic:
        text = unicodedata.normalize("NFC", _few_marks(text)).translate(_TURKIC)
    if text.isascii():
        return text.lower().replace("`", "'")
    # Compatibility forms would lose both distinctions.
    text = _AFTER_NUMBER.sub(" ", _few_marks(text).translate(_ACUTE))
    for _ in range(2):
        text = unicodedata.normalize("NFKD", text).casefold()
    text = _NOT_TYPED.sub("", unicodedata.normalize("NFKD", text)).translate(_PUNCTUATION)
    # A digit that is newer than Python's Unicode data stays as it is.
    text = _DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0], digit[0])), text)
    return unicodedata.normalize("NFKC", _few_marks(text))  # What was removed may have stood between marks.


def _few_marks(text: str) -> str:
    """A text without the marks beyond MOST_MARKS in a row."""
    return _TOO_MANY_MARKS.sub(r"\1", text) if len(text) > MOST_MARKS else text


def words(text: str) -> list[str]:
    """The words of ``text`` in their order. Each is a part of ``fold(text)``.

    words("Women’s shoes, 9½")  # ["women's", "shoes", "9", "1", "2"]
    """
    return _split(fold(text))


def words_as_written(text: str) -> list[str]:
    """The words of ``text`` in their order and in its own spelling, for an engine that folds and splits by itself.

    Text of the scripts without spaces is not split.

    words_as_written("Straße, 登山鞋")  # ["Straße", "登山鞋"]
    """
    found: list[str] = []
    for run in _RUN.finditer(text):
        found += [run[0]] if run[1] is not None else _WORD.findall(_JOINS_NOTHING.sub(" ", run[0]))
    return found


def first_words(text: str, n: int | None) -> str:
    """The beginning of ``text`` up to its n-th word, where a word is what a reader takes for one.

    n: the number of words. None = the whole text.

    Here a word is a sequence of characters between white space, or one letter of a script without spaces. Each run of
    white space becomes one space.
    """
    text = " ".join(text.split())
    for count, match in enumerate(_SHOWN.finditer(text), 1):
        if count == n:
            return text[: match.end()]
    return text


def _split(folded: str, letters_too: bool = False) -> list[str]:
    """The words of a folded text.

    letters_too: whether to add every single letter of the scripts without spaces.
    """
    if folded.isascii():
        return _ASCII_WORD.findall(folded)
    found: list[str] = []
    for run in _RUN.finditer(folded):
        if run[1] is None:
            found += _WORD.findall(_JOINS_NOTHING.sub(" ", run[0]))
            continue
        letters = _LETTER.findall(run[1])
        if letters_too or len(letters) == 1:
            found += letters
        found += map("".join, pairwise(letters))
    return found


def terms(texts: Sequence[str], language: str | None, stemmer: str | None, stopwords: str | None) -> list[list[str]]:
    """The terms of each text: its stemmed words without stop words and apostrophes ("don't" becomes "dont").

    texts: n texts.
    language: the ISO 639-1 code of their language, which decides how the letter I is lowered. None = no language.
    stemmer: the name of a Snowball algorithm. None = no stemming.
    stopwords: the ISO 639-1 code of a list of stop words. None = no stop words.
    """
    import Stemmer

    turkic = language in TURKIC
    found = _words_and_letters(texts, turkic)
    dropped = {fold(word, turkic) for word in stop_words(stopwords)} if stopwords else set()
    kept = [word for word in dict.fromkeys(chain.from_iterable(found)) if word not in dropped]
    stems = Stemmer.Stemmer(stemmer).stemWords(kept) if stemmer else kept
    # A stem can be empty, such as porter's of "s". It is dropped, because bm25s reserves "" and has no scores for it.
    term_of = {word: term for word, stem in zip(kept, stems, strict=True) if (term := stem.translate(_INSIDE))}
    return [[term_of[word] for word in text if word in term_of] for text in found]


def _words_and_letters(texts: Sequence[str], turkic: bool) -> list[list[str]]:
    """The words of each text, and the single letters of the scripts without spaces."""
    # A word never contains white space. Most pieces between white space occur more than once, so their words are kept.
    pieces: dict[str, list[str]] = {}
    found = []
    for text in texts:
        if text.isascii() and not turkic:
            found.append(_split(fold(text)))
            continue
        own: list[str] = []
        for piece in text.split():
            if piece not in pieces:
                pieces[piece] = _split(fold(piece, turkic), letters_too=True)
            own += pieces[piece]
        found.append(own)
    return found
