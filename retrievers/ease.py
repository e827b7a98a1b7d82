"""EASE^R, the shallow autoencoder in closed form (Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data",
arXiv:1905.03375).

B minimises ||X - XB||^2 + λ ||B||^2 with diag(B) = 0: P = (X'X + λI)^-1, B_ij = -P_ij / P_jj. The inverse is float64
(by Cholesky's factors) unless asked otherwise, what is stored float32. A fit takes n^3 operations and 8 n^2 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.history import ByHistory, fitted
from retrievers.interactions import Interactions
from retrievers.linear import (
    Linear,
    check_count,
    check_flag,
    check_grid,
    check_memory,
    check_number,
    choose,
    dense_or_strongest,
    ease_weights,
    gram,
    narrowed,
    opened,
    save,
)

FORMAT = 1
PRECISIONS = ("float64", "float32")
GRID = (1.0, 3.16, 10.0, 31.6, 100.0, 316.0, 1000.0, 3160.0, 10000.0)


@dataclass(frozen=True)
class Params:
    """regularization: λ; a list, or None for GRID, is chosen from on the validation part. top: so many entries of the
    largest magnitude are kept a column (None = all, 4 n^2 bytes on disk). nonnegative: negative entries of B are set to
    0 after the fit, which is not the optimum under that constraint. precision: of the inverse, float64 or float32, with
    half the memory and about half the time: enough unless λ is small beside how often documents are chosen. max_gb: a
    fit that needs more memory is refused."""

    regularization: float | list[float] | None = None
    top: int | None = None
    nonnegative: bool = False
    precision: str = "float64"
    max_gb: float = 8.0

    def __post_init__(self) -> None:
        self.grid()
        if self.top is not None:
            check_count("top", self.top, "null, or 500,")
        check_flag("nonnegative", self.nonnegative)
        if self.precision not in PRECISIONS:
            raise ValueError(f"retriever.params.precision must be {' or '.join(PRECISIONS)}, got {self.precision!r}")
        check_number("max_gb", self.max_gb, 8, above=True)

    def grid(self) -> list[float]:
        return check_grid("regularization", self.regularization, GRID)


def build(
    catalog: Catalog, folder: str | Path | None = None, interactions: Interactions | None = None, **params: Any
) -> ByHistory:
    """Fit, or open what is in ``folder``. Raises ValueError for a bad parameter, a catalogue too large for the memory,
    or a λ to be chosen and nothing held out; for the rest see :func:`retrievers.history.fitted`."""
    settings = Params(**params)

    def fit(temporary: Path, given: Interactions) -> Mapping[str, Any]:
        precision = np.dtype(settings.precision)
        check_memory(given.documents, precision.itemsize, settings.max_gb)
        x = given.matrix()

        def model(regularization: float) -> Any:
            # X'X is counted anew for each λ: a second (n, n) matrix would double the memory to save a hundredth
            weights = narrowed(ease_weights(gram(x, precision), regularization), settings.nonnegative)
            return dense_or_strongest(weights, settings.top)

        chosen, measured = choose("regularization", settings.grid(), lambda each: Linear(model(each)), given)
        save(model(chosen), temporary)
        return {"regularization": chosen, "validation": measured}

    # max_gb shapes no model
    shaping = asdict(settings) | {"regularization": settings.grid()}
    del shaping["max_gb"]
    return fitted("ease", FORMAT, catalog, folder, interactions, shaping, fit, opened)
