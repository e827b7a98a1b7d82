"""SANSA: EASE with a sparse approximate inverse of X'X + λI, for catalogues whose dense inverse exceeds the memory
(Spišák et al. 2023, "Scalable Approximate NonSymmetric Autoencoder for Collaborative Filtering",
doi:10.1145/3604915.3608827), by the authors' package.

The package returns two sparse matrices with W1 W2 = -P diag(1 / diag(P)) for P = (X'X + λI)^-1. The diagonal of W1 W2
is -1, and EASE's B is W1 W2 + I. Therefore scores = history W1 W2 + history.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.parameters import Checks
from retrievers.interactions import Interactions, history_matrix
from retrievers.recommenders.fitted import ByHistory, fitted
from retrievers.recommenders.item_item import check_grid, choose, load, save
from retrievers.types import Query, RetrieverError

INDEX_FORMAT = 2  # The version of the files. Version 1 was also fitted on the columns of items that nobody chose.
GRID = (1.0, 10.0, 100.0, 1000.0)
INSTALL = "apt-get install libsuitesparse-dev && pip install 'rec-r1[sansa]'"


@dataclass(frozen=True)
class Params:
    """The parameters of `sansa`. Raises ValueError, naming the field, for a bad value."""

    # λ. Of a list, the best on validation choices is taken. null: of a grid from 1 to 1,000.
    regularization: float | list[float] | None = None
    density: float = 0.01  # The share of the entries of W1 and W2 between chosen documents that is kept.
    # icf: an incomplete factor, which needs little memory and scales X'X first, so that λ differs from EASE's.
    # cholmod: the exact factor, whose largest entries are kept; closer to EASE.
    factorizer: str = "icf"

    def __post_init__(self) -> None:
        checks = Checks(self)
        with checks:
            self.grid()
        checks.numbers("density", above=True, most=1)
        checks.choice("factorizer", ("icf", "cholmod"))
        checks.raise_all()

    def grid(self) -> list[float]:
        """The values of λ to choose from."""
        return check_grid("regularization", self.regularization, GRID)


class Factored:
    """The fitted model: scores = history W1 W2 + history.

    left, right: W1 and W2, scipy CSR matrices (n, n) of float32.
    """

    def __init__(self, left: Any, right: Any) -> None:
        self._left, self._right = left, right

    @classmethod
    def opened(cls, folder: Path) -> Factored:
        """The model in ``folder``, memory-mapped."""
        return cls(load(folder, "left"), load(folder, "right"))

    def scores(self, queries: Sequence[Query]) -> np.ndarray:
        """The scores of Q queries: (Q, n) float32."""
        history = history_matrix(queries, self._left.shape[0])
        out: np.ndarray = (history @ self._left @ self._right).toarray()
        users = np.repeat(np.arange(len(queries)), np.diff(history.indptr))
        out[users, history.indices] += history.data
        return out


def factors(x: Any, regularization: float, settings: Params) -> tuple[Any, Any]:
    """W1 and W2: scipy CSR matrices, both (n, n).

    x: X, a scipy CSR matrix (U, n).
    regularization: λ.
    settings: the parameters.

    The package only gets the columns of items that somebody chose, because it gives an empty column the norm of its
    neighbour, or raises an IndexError. For the other items, B is 0, and the diagonal of W1 W2 is -1.

    Raises RetrieverError where the package is not installed, and ValueError where too few items were chosen together.
    """
    sansa = _import()
    kind = sansa.ICFGramianFactorizerConfig if settings.factorizer == "icf" else sansa.CHOLMODGramianFactorizerConfig
    config = sansa.SANSAConfig(
        l2=regularization,
        weight_matrix_density=float(settings.density),
        gramian_factorizer_config=kind(),
        lower_triangle_inverter_config=sansa.UMRUnitLowerTriangleInverterConfig(),
    )
    shown = np.bincount(x.indices, minlength=x.shape[1]) > 0
    # The package runs the garbage collector about 26 times per fit, which takes up to a second each time in a large
    # process. Objects that are frozen are not collected, so that this is fast.
    gc.freeze()
    try:
        left, right = sansa.SANSA(config).fit(x[:, shown]).weights
    except IndexError as error:  # The package raises it where a column of its residual is empty.
        raise ValueError(
            f"sansa cannot be fitted on {shown.sum()} items of which so few were chosen together: set "
            "retriever.kind: ease"
        ) from error
    finally:
        gc.unfreeze()
    return _with_unchosen_items(left, shown, 1.0), _with_unchosen_items(right, shown, -1.0)


def _with_unchosen_items(part: Any, shown: np.ndarray, diagonal: float) -> Any:
    """Insert rows and columns for the items that nobody chose: scipy CSR matrix, (n, n) float32.

    part: (m, m), for the m chosen items.
    shown: (n,) bool, which items were chosen.
    diagonal: the diagonal entry of the other items. Their other entries are 0.
    """
    from scipy.sparse import csr_matrix, diags

    rows = np.flatnonzero(shown)
    place = csr_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))), (len(shown), len(rows)))
    out = csr_matrix(place @ part @ place.T + diags(np.where(shown, 0.0, diagonal)), dtype=np.float32)
    out.eliminate_zeros()
    out.sort_indices()
    return out


def _import() -> Any:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        import sansa
    except ImportError as error:
        raise RetrieverError(f"retriever.kind: sansa needs the package sansa ({error}): {INSTALL}") from error
    # Importing sansa configures logging for the whole process, in great detail. This restores the configuration.
    root.handlers[:] = before
    root.setLevel(level)
    logging.getLogger("sansa").setLevel(logging.ERROR)
    return sansa


def build(
    catalog: Catalog, folder: str | Path | None = None, interactions: Interactions | None = None, **params: Any
) -> ByHistory:
    """Fit SANSA, or open the model in ``folder``. Only a fit needs the package.

    params: see :class:`Params`. The other arguments are those of :func:`retrievers.recommenders.fitted.fitted`.

    Raises ValueError for a bad parameter, and for several values of λ without a validation split. Raises also the
    errors of `fitted` and :func:`factors`.
    """
    settings = Params(**params)

    def fit(temporary: Path, given: Interactions) -> Mapping[str, Any]:
        x = given.matrix()
        chosen, measured = choose(
            "regularization", settings.grid(), lambda value: Factored(*factors(x, value, settings)), given
        )
        left, right = factors(x, chosen, settings)
        save(left, temporary, "left")
        save(right, temporary, "right")
        return {"regularization": chosen, "validation": measured, "entries": int(left.nnz + right.nnz)}

    shaping = asdict(settings) | {"regularization": settings.grid(), "density": float(settings.density)}
    return fitted("sansa", INDEX_FORMAT, catalog, folder, interactions, shaping, fit, Factored.opened)
