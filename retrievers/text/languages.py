"""The languages of `bm25`, with their Snowball stemmers (PyStemmer), their stop words (bm25s) and their scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import regex

from retrievers.core.choices import choose

SAMPLED_DOCUMENTS = 1000  # `mismatch` counts the letters of about so many documents.
SAMPLED_CHARACTERS = 1000  # It counts the first so many characters of each.


class Language(NamedTuple):
    """A language.

    name: its English name.
    scripts: the Unicode names of its scripts. Default Latin.
    stopwords: the name of its list of stop words in `bm25s.stopwords`. None, the default, = there is no list.
    stemmed: whether Snowball has a stemmer with this name. Default True.
    """

    name: str
    scripts: tuple[str, ...] = ("Latin",)
    stopwords: str | None = None
    stemmed: bool = True


_WITH_STEMMER = {  # The keys are ISO 639-1 codes.
    "ar": Language("arabic", ("Arabic",)),
    "ca": Language("catalan"),
    "cs": Language("czech"),
    "da": Language("danish", stopwords="STOPWORDS_DANISH"),
    "de": Language("german", stopwords="STOPWORDS_GERMAN"),
    "el": Language("greek", ("Greek",)),
    "en": Language("english", stopwords="STOPWORDS_EN"),  # The 33 stop words of Lucene's EnglishAnalyzer.
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
# Languages with neither a stemmer nor stop words, by their scripts: pairs of a code and a name.
_WITHOUT_STEMMER = {
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
    for scripts, pairs in _WITHOUT_STEMMER.items()
    for code, name in zip(pairs[::2], pairs[1::2], strict=True)
}
TURKIC = ("az", "tr")  # In these languages, I is the capital letter of ı, and İ that of i.
STOPWORDS = [code for code, language in LANGUAGES.items() if language.stopwords]  # The languages with stop words.
_CODES = {language.name: code for code, language in LANGUAGES.items()}
_SCRIPTS = {
    script: regex.compile(rf"\p{{Script={script}}}")
    for script in dict.fromkeys(script for language in LANGUAGES.values() for script in language.scripts)
}


def code_of(language: Any) -> str | None:
    """The ISO 639-1 code of a language.

    language: a code, an English name, or None or "none" for no language, for which the result is None.

    Raises ValueError for any other value, naming the most similar language.
    """
    if language is None or language == "none":
        return None
    if isinstance(language, str) and (language in LANGUAGES or language in _CODES):
        return _CODES.get(language, language)
    if language is False:
        raise ValueError(
            "retriever.params.language is false, because YAML reads no as false: write norwegian, or null for no "
            "language"
        )
    choices = choose(language, LANGUAGES, _CODES)
    raise ValueError(
        f"retriever.params.language: unknown {language!r}: {choices}, or null for words as they are written"
    )


def check_analysis(stemmer: Any, stopwords: Any) -> None:
    """Raises ValueError, naming the choices, for a stemmer that PyStemmer lacks or stop words that bm25s lacks."""
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
    """The stop words of a language. code: one of STOPWORDS."""
    import bm25s.stopwords

    words: Sequence[str] = vars(bm25s.stopwords)[str(LANGUAGES[code].stopwords)]
    return words


def mismatch(texts: Sequence[str], code: str | None) -> str | None:
    """A warning where less than half of the letters in ``texts`` belong to the scripts of a language.

    code: the code of the language. None = no language.

    Returns one sentence, or None where texts and language fit, and for no language. The first 1,000 characters of about
    1,000 evenly spaced texts are counted.
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
    """The Unicode name of a letter's script, or "of another script" where no language in LANGUAGES has it."""
    return next((name for name, pattern in _SCRIPTS.items() if pattern.match(letter)), "of another script")
