"""SANSA: EASE for catalogues whose dense inverse fits no memory, by a sparse approximate inverse of X'X + λI (Spišák et
al. 2023, "Scalable Approximate NonSymmetric Autoencoder for Collaborative Filtering", doi:10.1145/3604915.3608827),
through the authors' package.

It returns two sparse matrices with W1 W2 = -P diag(1 / diag(P)), whose diagonal is -1; EASE's B is that plus I, and so
scores = history W1 W2 + history.
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
from retrievers.interactions import Interactions, history_matrix
from retrievers.recommenders.fitted import ByHistory, fitted
from retrievers.recommenders.item_item import check_grid, check_number, choose, load, save
from retrievers.types import Query, RetrieverError

INDEX_FORMAT = 2  # 1 was fitted on empty columns, too
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
        self.grid()
        if check_number("density", self.density, 0.01, above=True) > 1:
            raise ValueError(f"retriever.params.density must be at most 1, got {self.density!r}: 0.01 is usual")
        if self.factorizer not in ("icf", "cholmod"):
            raise ValueError(f"retriever.params.factorizer: unknown {self.factorizer!r}: choose icf or cholmod")

    def grid(self) -> list[float]:
        return check_grid("regularization", self.regularization, GRID)


class Factored:
    """scores = history W1 W2 + history. left, right: scipy CSR (n, n) float32."""

    def __init__(self, left: Any, right: Any) -> None:
        self._left, self._right = left, right

    @classmethod
    def opened(cls, folder: Path) -> Factored:
        return cls(load(folder, "left"), load(folder, "right"))

    def scores(self, queries: Sequence[Query]) -> np.ndarray:
        """(Q, n) float32; see :class:`retrievers.recommenders.item_item.Linear`."""
        history = history_matrix(queries, self._left.shape[0])
        out: np.ndarray = (history @ self._left @ self._right).toarray()
        users = np.repeat(np.arange(len(queries)), np.diff(history.indptr))
        out[users, history.indices] += history.data
        return out


def factors(x: Any, regularization: float, settings: Params) -> tuple[Any, Any]:
    """X, scipy CSR (U, n) -> W1, W2, both (n, n). Raises RetrieverError without the package, ValueError where too few
    documents were chosen together for it.

    The package sees the columns that hold something, since an empty one gets its neighbour's norm there, or ends in an
    IndexError. In B the others are zero: -1 on the diagonal of W1 W2.
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
    # The package collects garbage some 26 times a fit, up to a second each in a large process: not in what is frozen.
    gc.freeze()
    try:
        left, right = sansa.SANSA(config).fit(x[:, shown]).weights
    except IndexError as error:  # its residual has an empty column
        raise ValueError(
            f"sansa cannot be fitted on {shown.sum()} chosen documents of which so few were chosen together: set "
            "retriever.kind: ease"
        ) from error
    finally:
        gc.unfreeze()
    return _widened(left, shown, 1.0), _widened(right, shown, -1.0)


def _widened(part: Any, shown: np.ndarray, diagonal: float) -> Any:
    """(m, m) -> scipy CSR (n, n) float32: rows and columns ``shown``, (n,) bool, and ``diagonal`` for the others."""
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
        raise RetrieverError(f"retriever.kind: sansa needs its extra ({error}): {INSTALL}") from error
    # its import sets up logging for the whole process, down to every step of a scan
    root.handlers[:] = before
    root.setLevel(level)
    logging.getLogger("sansa").setLevel(logging.ERROR)
    return sansa


def build(
    catalog: Catalog, folder: str | Path | None = None, interactions: Interactions | None = None, **params: Any
) -> ByHistory:
    """Fit, or open what is in ``folder``, which needs no package. Raises ValueError for a bad parameter, or a λ to be
    chosen and nothing held out; for the rest see :func:`retrievers.recommenders.fitted.fitted`."""
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
