"""Languages that `bm25` knows: stemmers of Snowball (PyStemmer), stop words of bm25s, and the scripts of each."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import regex

SAMPLED_DOCUMENTS = 1000  # documents whose letters are counted
SAMPLED_CHARACTERS = 1000  # of each


class Language(NamedTuple):
    """name: in English. scripts: Unicode's names of those it is written in. stopwords: the list's name in
    `bm25s.stopwords`; None = there is none. stemmed: whether Snowball has a stemmer of this name."""

    name: str
    scripts: tuple[str, ...] = ("Latin",)
    stopwords: str | None = None
    stemmed: bool = True


_WITH_STEMMER = {  # by ISO 639-1 code
    "ar": Language("arabic", ("Arabic",)),
    "ca": Language("catalan"),
    "cs": Language("czech"),
    "da": Language("danish", stopwords="STOPWORDS_DANISH"),
    "de": Language("german", stopwords="STOPWORDS_GERMAN"),
    "el": Language("greek", ("Greek",)),
    "en": Language("english", stopwords="STOPWORDS_EN"),  # the 33 of Lucene's EnglishAnalyzer
    "eo": Language("esperanto"),
    "es": Language("spanish", stopwords="STOPWORDS_SPANISH"),
    "et": Language("estonian"),
    "eu": Language("basque"),
    "fa": Language("persian", ("Arabic",)),
    "fi": Language("finnish"),
    "fr": Language("french", stopwords="STOPWORDS_FRENCH"),
    "ga": Language("irish"),
    "hi": Language("hindi", ("Devanagari",)),
    "hu": Language("hungarian"),
    "hy": Language("armenian", ("Armenian",)),
    "id": Language("indonesian"),
    "it": Language("italian", stopwords="STOPWORDS_ITALIAN"),
    "lt": Language("lithuanian"),
    "ne": Language("nepali", ("Devanagari",)),
    "nl": Language("dutch", stopwords="STOPWORDS_DUTCH"),
    "no": Language("norwegian", stopwords="STOPWORDS_NORWEGIAN"),
    "pl": Language("polish"),
    "pt": Language("portuguese", stopwords="STOPWORDS_PORTUGUESE"),
    "ro": Language("romanian"),
    "ru": Language("russian", ("Cyrillic",), "STOPWORDS_RUSSIAN"),
    "sr": Language("serbian", ("Cyrillic", "Latin")),
    "sv": Language("swedish", stopwords="STOPWORDS_SWEDISH"),
    "ta": Language("tamil", ("Tamil",)),
    "tr": Language("turkish", stopwords="STOPWORDS_TURKISH"),
    "yi": Language("yiddish", ("Hebrew",)),
}
# Words as they are written: these have neither a stemmer nor a list.
_NEITHER_STEMMED_NOR_STOPPED = {
    script: names.split()
    for script, names in {
        "Latin": "af afrikaans az azerbaijani hr croatian lv latvian ms malay sk slovak sl slovenian sw swahili "
        "vi vietnamese",
        "Cyrillic": "be belarusian bg bulgarian kk kazakh mk macedonian mn mongolian uk ukrainian",
        "Arabic": "ps pashto ur urdu",
        "Devanagari": "mr marathi",
        "Bengali": "bn bengali",
        "Ethiopic": "am amharic",
        "Georgian": "ka georgian",
        "Gujarati": "gu gujarati",
        "Gurmukhi": "pa punjabi",
        "Han": "zh chinese",
        "Han Hiragana Katakana": "ja japanese",
        "Hangul Han": "ko korean",
        "Hebrew": "he hebrew",
        "Kannada": "kn kannada",
        "Khmer": "km khmer",
        "Lao": "lo lao",
        "Malayalam": "ml malayalam",
        "Myanmar": "my burmese",
        "Sinhala": "si sinhala",
        "Telugu": "te telugu",
        "Thai": "th thai",
        "Tibetan": "bo tibetan",
    }.items()
}
LANGUAGES = _WITH_STEMMER | {
    code: Language(name, tuple(scripts.split()), stemmed=False)
    for scripts, pairs in _NEITHER_STEMMED_NOR_STOPPED.items()
    for code, name in zip(pairs[::2], pairs[1::2], strict=True)
}
TURKIC = ("az", "tr")  # whose I is the capital of ı, and İ of i
STOPWORDS = [code for code, language in LANGUAGES.items() if language.stopwords]
_CODES = {language.name: code for code, language in LANGUAGES.items()}
_SCRIPTS = {
    script: regex.compile(rf"\p{{Script={script}}}")
    for script in dict.fromkeys(script for language in LANGUAGES.values() for script in language.scripts)
}


def code_of(language: Any) -> str | None:
    """The ISO 639-1 code of a language, given by code or English name; None for none, which is None or "none".

    Raises ValueError for another, naming the nearest.
    """
    if language is None or language == "none":
        return None
    if isinstance(language, str) and (language in LANGUAGES or language in _CODES):
        return _CODES.get(language, language)
    if language is False:
        raise ValueError(
            "retriever.params.language is false, which is what YAML reads in no: write norwegian, or null for none"
        )
    nearest = difflib.get_close_matches(str(language), [*LANGUAGES, *_CODES], n=1, cutoff=0.0)[0]
    raise ValueError(
        f"retriever.params.language: unknown {language!r}: did you mean {nearest!r}? Choose from "
        f"{', '.join(LANGUAGES)}, or null for words as they are written"
    )


def check_analysis(stemmer: Any, stopwords: Any) -> None:
    """Raise ValueError, naming the choices, for a stemmer that PyStemmer lacks or a list that bm25s lacks."""
    import Stemmer

    if stemmer is not None and stemmer not in Stemmer.algorithms():
        raise ValueError(
            f"retriever.params.stemmer: unknown {stemmer!r}: choose from {', '.join(Stemmer.algorithms())}, or null"
        )
    if stopwords is not None and stopwords not in STOPWORDS:
        raise ValueError(
            f"retriever.params.stopwords: unknown list {stopwords!r}: choose from {', '.join(STOPWORDS)}, or null"
        )


def stop_words(code: str) -> Sequence[str]:
    """The stop words of one of STOPWORDS."""
    import bm25s.stopwords

    words: Sequence[str] = vars(bm25s.stopwords)[str(LANGUAGES[code].stopwords)]
    return words


def mismatch(texts: Sequence[str], code: str | None) -> str | None:
    """A sentence where less than half of the letters of ``texts`` are of a script that the language is written in.

    None where they go together, or where ``code`` is None. Of at most 1,000 texts, evenly spaced, the first 1,000
    characters are counted.
    """
    if code is None:
        return None
    chosen = range(0, len(texts), max(1, len(texts) // SAMPLED_DOCUMENTS))
    characters = Counter(character for row in chosen for character in texts[row][:SAMPLED_CHARACTERS])
    letters: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():
            letters[_script(character)] += count
    total, language = letters.total(), LANGUAGES[code]
    if not total or 2 * sum(letters[script] for script in language.scripts) >= total:
        return None
    script, count = letters.most_common(1)[0]
    others = [other for other, about in LANGUAGES.items() if script in about.scripts]
    return (
        f"{count / total:.0%} of the letters in the documents are {script}, and retriever.params.language is {code} "
        f"({language.name}): set it to {', '.join([*others, ''])}or null for words as they are written"
    )


def _script(letter: str) -> str:
    """Unicode's name of a letter's script, "of another script" where it is none of LANGUAGES'."""
    return next((name for name, pattern in _SCRIPTS.items() if pattern.match(letter)), "of another script")
