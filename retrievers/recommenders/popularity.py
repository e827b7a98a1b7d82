"""Popularity ranks items by how many users chose them, whatever the history. It is the simplest baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.interactions import Interactions
from retrievers.recommenders.fitted import ByHistory, fitted
from retrievers.types import Query

INDEX_FORMAT = 1


@dataclass(frozen=True)
class Params:
    """This backend has no parameters."""


class Counts:
    """The fitted model: how many users chose each item. folder: it holds counts.npy, (n,) float32."""

    def __init__(self, folder: Path) -> None:
        self._counts = np.load(folder / "counts.npy", mmap_mode="r")

    def scores(self, queries: Sequence[Query]) -> np.ndarray:
        """The counts, for every query: (Q, n) float32."""
        return np.broadcast_to(self._counts, (len(queries), len(self._counts)))


def build(
    catalog: Catalog, folder: str | Path | None = None, interactions: Interactions | None = None, **params: Any
) -> ByHistory:
    """Count how many users chose each item, or open the counts in ``folder``.

    Arguments and errors are those of :func:`retrievers.recommenders.fitted.fitted`. There are no parameters.
    """
    Params(**params)

    def fit(temporary: Path, given: Interactions) -> Mapping[str, Any]:
        np.save(temporary / "counts.npy", given.counts.astype(np.float32))
        return {}

    return fitted("popularity", INDEX_FORMAT, catalog, folder, interactions, params, fit, Counts, answers_empty=True)
