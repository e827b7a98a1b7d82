"""EASE^R, a linear autoencoder in closed form (Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data",
arXiv:1905.03375).

B minimises ||X - XB||^2 + λ ||B||^2 with diag(B) = 0. With P = (X'X + λI)^-1, B_ij = -P_ij / P_jj. A fit takes n^3
operations for n items. B is stored as float32. The inverse is computed in float64. For a large catalogue it is computed
in float32, which takes half the time and memory, where the measured error is small enough.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.parameters import Checks, check_integer, wrong
from retrievers.interactions import Interactions
from retrievers.recommenders.fitted import ByHistory, fitted
from retrievers.recommenders.item_item import (
    Linear,
    all_or_largest_entries,
    as_float32,
    blocks,
    check_grid,
    check_memory,
    choose,
    ease_weights,
    gram,
    inverse,
    open_linear,
    save,
    weights_from_inverse,
)

logger = logging.getLogger(__name__)
INDEX_FORMAT = 2  # The version of the files. Version 1 always used float64.
FLOAT64_UP_TO = 5_000  # With precision null, float64 is used for up to so many items, where a fit takes seconds.
TOLERANCE = 1e-5  # The largest accepted error of float32: the Euclidean norm of the error of a column of B.
ERROR_PROBES = 32  # The error is estimated with so many random vectors.
USERS_AT_A_TIME = 1 << 16  # The estimate reads so many rows of X at a time.
PRECISIONS = ("float64", "float32")
GRID = (1.0, 3.16, 10.0, 31.6, 100.0, 316.0, 1000.0, 3160.0, 10000.0)


@dataclass(frozen=True)
class Params:
    """The parameters of `ease`. Raises ValueError, naming the field, for a bad value."""

    # λ. Of a list, the best on validation choices is taken. null: of a grid from 1 to 10,000.
    regularization: float | list[float] | None = None
    # How many entries of the largest magnitude each column of B keeps. null: all, 4 n² bytes on disk.
    top: int | None = None
    # Whether negative entries of B become 0 after the fit, which is not the optimum under that constraint.
    nonnegative: bool = False
    # The precision of the inverse: float64 or float32. null: float64 for up to 5,000 items, and else float32 if its
    # measured error is at most 1e-5.
    precision: str | None = None
    max_gb: float = 8.0  # A fit that may need more memory is refused: 8 n² bytes, or 4 n² for float32.

    def __post_init__(self) -> None:
        checks = Checks(self)
        with checks:
            self.grid()
        with checks:
            check_integer("top", self.top, "null, or 500,", optional=True)
        checks.flags("nonnegative")
        with checks:
            if self.precision is not None and self.precision not in PRECISIONS:
                raise wrong("precision", f"null, {', '.join(PRECISIONS)}", self.precision, None)
        checks.numbers("max_gb", above=True)
        checks.raise_all()

    def grid(self) -> list[float]:
        """The values of λ to choose from."""
        return check_grid("regularization", self.regularization, GRID)


def build(
    catalog: Catalog, folder: str | Path | None = None, interactions: Interactions | None = None, **params: Any
) -> ByHistory:
    """Fit EASE, or open the model in ``folder``.

    params: see :class:`Params`. The other arguments are those of :func:`retrievers.recommenders.fitted.fitted`.

    Raises ValueError for a bad parameter, for a catalogue that is too large for the memory, and for several values of λ
    without a validation split. Raises also the errors of `fitted`.
    """
    settings = Params(**params)

    def fit(temporary: Path, given: Interactions) -> Mapping[str, Any]:
        single = settings.precision == "float32"
        instead = "" if single else "precision: float32, which needs half of it, or "
        check_memory(given.documents, 4 if single else 8, settings.max_gb, instead)
        x = given.matrix()

        def model(regularization: float) -> tuple[Any, dict[str, Any]]:
            # X'X is computed again for each λ. Keeping it would double the memory and save a hundredth of the time.
            weights, how = solve(x, regularization, settings.precision)
            return all_or_largest_entries(as_float32(weights, settings.nonnegative), settings.top), how

        chosen, measured = choose("regularization", settings.grid(), lambda each: Linear(model(each)[0]), given)
        weights, how = model(chosen)
        save(weights, temporary)
        return {"regularization": chosen, **how, "validation": measured}

    # max_gb does not affect the model, so it is not part of the fingerprint.
    shaping = asdict(settings) | {"regularization": settings.grid()}
    del shaping["max_gb"]
    return fitted("ease", INDEX_FORMAT, catalog, folder, interactions, shaping, fit, open_linear)


def solve(x: Any, regularization: float, precision: str | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """Compute B, (n, n) float64 or float32, and a report with its ``precision`` and, for float32, its ``error``.

    x: X, a scipy CSR matrix (U, n) of zeros and ones.
    regularization: λ.
    precision: see :class:`Params`.

    Raises ValueError where X'X + λI is singular in the precision that is used.
    """
    if precision == "float32" or (precision is None and x.shape[1] > FLOAT64_UP_TO):
        p, error = _float32_inverse(x, regularization)
        if p is not None and error > TOLERANCE and precision:
            logger.warning(
                "with λ %g the error of float32 is %.1e, above %g: set retriever.params.precision: float64",
                regularization, error, TOLERANCE,
            )  # fmt: skip
        if p is not None and (precision or error <= TOLERANCE):
            return weights_from_inverse(p), {"precision": "float32", "error": error}
        del p  # This frees its memory before the float64 matrix is made.
        if precision:
            raise ValueError(
                f"retriever.params.precision: X'X plus {regularization:g} on its diagonal is singular in float32: set "
                "float64, or raise the regularization"
            )
        logger.info(
            "with λ %g the error of float32 is %.1e, above %g: computing in float64", regularization, error, TOLERANCE
        )
    return ease_weights(gram(x), regularization), {"precision": "float64"}


def _float32_inverse(x: Any, regularization: float) -> tuple[Any, float]:
    """The inverse in float32 and the error of its B. They are None and infinity where the matrix is singular."""
    try:
        p = inverse(gram(x, np.float32), regularization)
    except ValueError:
        return None, math.inf
    return p, column_error(x, p, regularization)


def column_error(x: Any, p: np.ndarray, regularization: float) -> float:
    """Estimate the error of a B that is computed from ``p``: the largest Euclidean norm of the error of a column.

    x: X, a scipy CSR matrix (U, n).
    p: (n, n), the computed inverse of A = X'X + λI, with a small error E = A^-1 - p.
    regularization: λ.

    No entry of B has a larger error than that, and no score a larger error than that times the norm of the history.

    The estimate needs only X, and is computed in float64. To first order in E, the error of column j of B is
    (E_j - E_jj p_j / p_jj) / p_jj. For a random vector z of signs, E z is about p (z - A p z). The mean of z_j (E z)_j
    is E_jj, and the mean square of a row of E times z is the squared norm of that row (Hutchinson's estimators). With
    32 vectors z, the estimate of a norm has a relative standard error of an eighth.
    """
    n, diagonal = len(p), p.diagonal()[:, None].astype(np.float64)
    z = np.random.default_rng(0).choice([-1.0, 1.0], (n, ERROR_PROBES))

    def by_p(right: np.ndarray) -> np.ndarray:
        return np.concatenate([p[rows].astype(np.float64) @ right for rows in blocks(n)])

    y = by_p(z)
    rest = z - regularization * y
    for start in range(0, x.shape[0], USERS_AT_A_TIME):
        part = x[start : start + USERS_AT_A_TIME].astype(np.float64)
        rest -= part.T @ (part @ y)
    off = by_p(rest)
    off -= (z * off).mean(1, keepdims=True) * y / diagonal
    return float(np.sqrt(np.square(off / diagonal).mean(1)).max())
