"""The parameters of `tantivy`, and the fields of its index."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from retrievers.core.parameters import Checks, is_name
from retrievers.text import bm25, structured
from retrievers.text.structured import Serving

LIGHTEST, HEAVIEST = 1e-6, 1e6  # The range of the weights of fields, in which no score leaves the range of float32.
ANALYSIS_PARAMETERS = ("language", "stemmer", "stopwords")  # The parameters of `bm25` that make the terms.


@dataclass(frozen=True)
class Params:
    """The parameters of `tantivy`. Raises ValueError, naming the field, for a bad value."""

    # An ISO 639-1 code or an English name, which brings its stemmer and stop words. null: no language.
    language: str | None = "en"
    # A Snowball algorithm. auto: the language's own. null: words are not stemmed.
    stemmer: str | None = bm25.OF_LANGUAGE
    # The language whose stop words are dropped. auto: the language's own. null: none are dropped.
    stopwords: str | None = bm25.OF_LANGUAGE
    # Fields that are searched instead of the text, with the weights of their scores: {title: 2.5, text: 1}.
    fields: dict[str, float] | None = None
    # Which structured queries are answered, such as {filters: [brand]}, see `format.action`. null: none.
    structured: Serving | None = None

    def __post_init__(self) -> None:
        checks = Checks(self)
        with checks:
            object.__setattr__(self, "structured", structured.read(self.structured))  # A recipe has a mapping.
        with checks:
            self._check_fields()
        with checks:
            bm25.set_analysis(self, ANALYSIS_PARAMETERS)
        checks.raise_all()

    def _check_fields(self) -> None:
        if self.fields is None:
            return
        names = self.fields if isinstance(self.fields, dict) else {}
        if not (names and all(map(is_name, names)) and all(map(_is_weight, names.values()))):
            raise ValueError(
                f"retriever.params.fields must map fields to weights from {LIGHTEST:g} to {HEAVIEST:g}, got "
                f"{self.fields!r:.200}: write them as {{title: 2.5, text: 1}}"
            )
        # 1 and 1.0, and any order of the fields, have the same fingerprint.
        weights = {name: float(self.fields[name]) for name in sorted(self.fields)}
        object.__setattr__(self, "fields", weights)

    def analysis(self) -> bm25.Params:
        """The parameters that make the terms, as those of `bm25`."""
        return bm25.Params(**{name: vars(self)[name] for name in ANALYSIS_PARAMETERS})

    def columns(self) -> dict[str, tuple[str, float]]:
        """The searched fields of the index: the name in tantivy -> the name in the catalogue and the weight."""
        return {f"terms{i}": field for i, field in enumerate((self.fields or {"text": 1.0}).items())}

    def filters(self) -> dict[str, str]:
        """The fields by which structured queries filter: the name in the catalogue -> the name in tantivy."""
        names = self.structured.filters if self.structured is not None else []
        return {name: f"value{i}" for i, name in enumerate(names)}

    def described(self) -> dict[str, Any]:
        """The parameters for index.json. `structured` is left out where it is null, as in indexes of older versions."""
        found = asdict(self)
        if self.structured is None:
            del found["structured"]
        return found


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and LIGHTEST <= value <= HEAVIEST  # NaN fails both comparisons.
