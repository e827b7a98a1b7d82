"""Item-based nearest neighbours: the similarity of two items is the cosine of their columns in X, with shrinkage.

s_ij = (x_i . x_j) / (|x_i| |x_j| + shrink) for i != j, and 0 for i = j. In each column j, the ``neighbours`` largest
are kept, and the score of item j is the sum of s_ij over the items i of the history (Sarwar et al. 2001, "Item-based
collaborative filtering recommendation algorithms"; with the shrink term of Ferrari Dacrema et al. 2019,
arXiv:1907.06902, section 3.1). Shrinkage lowers the similarity of items that few users chose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.parameters import Checks
from retrievers.interactions import Interactions
from retrievers.recommenders.fitted import ByHistory, fitted
from retrievers.recommenders.item_item import blocks, largest_entries, open_linear, save

INDEX_FORMAT = 1


@dataclass(frozen=True)
class Params:
    """The parameters of `itemknn`. Raises ValueError, naming the field, for a bad value."""

    neighbours: int = 100  # How many neighbours of each item are kept.
    # Added to the denominator of the cosine: the larger, the less a few users in common count. 0: the cosine.
    shrink: float = 10.0

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.integers("neighbours")
        checks.numbers("shrink", as_float=True)
        checks.raise_all()


def similarities(x: Any, shrink: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows and the float64 similarities of each of n columns.

    x: X, a scipy CSR matrix (U, n) of zeros and ones.
    shrink: the shrink term.

    Rows are in ascending order, without those whose similarity is 0; the similarity of an item with itself is set to 0.
    The columns are computed in blocks, so that X'X is never in memory as a whole.
    """
    n = x.shape[1]
    columns = x.T.tocsr()
    norms = np.sqrt(np.diff(columns.indptr))
    for place in blocks(n):
        counts = columns[place] @ x
        counts.sort_indices()
        for j, start, stop in zip(range(place.start, n), counts.indptr, counts.indptr[1:], strict=False):
            rows = counts.indices[start:stop]
            values = counts.data[start:stop] / (norms[rows] * norms[j] + shrink)
            values[rows == j] = 0  # `largest_entries` does not keep zeros.
            yield rows, values


def build(
    catalog: Catalog, folder: str | Path | None = None, interactions: Interactions | None = None, **params: Any
) -> ByHistory:
    """Fit the item neighbours, or open the model in ``folder``.

    params: see :class:`Params`. The other arguments are those of :func:`retrievers.recommenders.fitted.fitted`.

    Raises ValueError for a bad parameter, and the errors of `fitted`.
    """
    settings = Params(**params)

    def fit(temporary: Path, given: Interactions) -> Mapping[str, Any]:
        weights = largest_entries(similarities(given.matrix(), settings.shrink), given.documents, settings.neighbours)
        save(weights, temporary)
        return {"entries": int(weights.nnz)}

    return fitted("itemknn", INDEX_FORMAT, catalog, folder, interactions, asdict(settings), fit, open_linear)
