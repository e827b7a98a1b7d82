"""What a word is, in every script of Unicode: for the terms of BM25, for rewards that count words, for reports.

A text is folded first, so that equivalent spellings are one: case and compatibility forms (Unicode Standard 3.13,
D146, in composed form), decimal digits as 0 to 9, every apostrophe as ' (also ` and ´, which are typed for it), a
blank before a vulgar fraction that follows a number, and without what readers do not type: default-ignorable characters
(soft hyphens, joiners, variation selectors), enclosing marks, Hebrew points, Arabic vowel signs and tatweel, Armenian
intonation marks.

It is then cut at the word boundaries of Unicode Standard Annex #29, by the `regex` library; a word holds a letter or a
number. Two tailorings, which the annex provides for: full stops and commas join digits only ("3.5", but "avery",
"com"), and apostrophes join letters only. Letters between which Annex #14 allows a line break, so those of scripts
that are written without spaces between words, or may be (Chinese, Japanese, Korean, Thai, Khmer, …), are cut into
overlapping pairs, as by Lucene's CJKBigramFilter: 登山鞋 is 登山 and 山鞋. Documents and queries also yield their
single letters.
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
_WORD = regex.compile(r"(?w)\b(?=(?:\p{Pc}\p{M}*)*[\p{L}\p{N}]).+?\b", regex.DOTALL)
_JOINS_NOTHING = regex.compile(r"[:;]|(?<![0-9])[.,]|[.,](?![0-9])|(?<=[0-9])'|'(?=[0-9])")
_BREAKS = "".join(rf"\p{{Line_Break={name}}}" for name in ("ID", "CJ", "NS", "SA", "AK", "AP", "AS", "H2", "H3"))
# Scripts of signs for words and syllables, whose lines Annex #14 breaks at spaces, which they did not have.
_SIGNS = "".join(
    rf"\p{{Script={name}}}"
    for name in ("Cuneiform", "Egyptian_Hieroglyphs", "Anatolian_Hieroglyphs", "Khitan_Small_Script")
)
_UNSPACED = rf"[[{_BREAKS}{_SIGNS}]&&[\p{{L}}\p{{N}}]]"
_LETTER = regex.compile(rf"{_UNSPACED}\p{{M}}*", regex.V1)  # with its vowel signs and tone marks
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
_AFTER_NUMBER = regex.compile(r"(?<=\p{N})(?=[¼½¾⅐-⅟↉])")  # "9½" is 9 1/2, not 91/2
_TURKIC = str.maketrans({"I": "ı", "İ": "i"})
_INSIDE = str.maketrans("", "", "'\"")  # what may stand inside a word, and is left out of its term


def fold(text: str, turkic: bool = False) -> str:
    """``text`` in the one spelling that all its equivalent ones share; see the module.

    turkic: I is the capital of ı, and İ of i (status T of CaseFolding.txt), as in Turkish.
    """
    if turkic:
        text = unicodedata.normalize("NFC", text).translate(_TURKIC)
    if text.isascii():
        return text.lower().replace("`", "'")
    text = _AFTER_NUMBER.sub(" ", text.translate(_ACUTE))  # both would be lost in compatibility forms
    for _ in range(2):
        text = unicodedata.normalize("NFKD", text).casefold()
    text = _NOT_TYPED.sub("", unicodedata.normalize("NFKD", text)).translate(_PUNCTUATION)
    text = _DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)
    return unicodedata.normalize("NFKC", text)


def words(text: str) -> list[str]:
    """The words of ``text``, folded, in their order: pieces of ``fold(text)``."""
    return _split(fold(text))


def first_words(text: str, n: int | None) -> str:
    """``text`` up to its first n words as one reads them: what stands between blanks, and each letter of a script
    without spaces; None = all of it. Blanks become one space each."""
    text = " ".join(text.split())
    for count, match in enumerate(_SHOWN.finditer(text), 1):
        if count == n:
            return text[: match.end()]
    return text


def _split(folded: str, letters_too: bool = False) -> list[str]:
    """The words of a folded text; letters_too: and the single letters of the runs that have no spaces."""
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
    """The terms of each text: words without stop words, stemmed, their apostrophes closed up ("don't" is "dont").

    language, stopwords: ISO 639-1 codes; stemmer: an algorithm of Snowball; None = none.
    """
    import Stemmer

    turkic = language in TURKIC
    found = _found(texts, turkic)
    dropped = {fold(word, turkic) for word in stop_words(stopwords)} if stopwords else set()
    kept = [word for word in dict.fromkeys(chain.from_iterable(found)) if word not in dropped]
    stems = Stemmer.Stemmer(stemmer).stemWords(kept) if stemmer else kept
    # A stem can be empty (porter's of "s"). bm25s keeps "" for its own use, with no column to score it by.
    term_of = {word: term for word, stem in zip(kept, stems, strict=True) if (term := stem.translate(_INSIDE))}
    return [[term_of[word] for word in text if word in term_of] for text in found]


def _found(texts: Sequence[str], turkic: bool) -> list[list[str]]:
    """The words and single letters of each text."""
    pieces: dict[str, list[str]] = {}  # no word reaches over a blank, and most pieces between blanks occur again
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
