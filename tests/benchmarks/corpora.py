"""Catalogues of any size for measurements of speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from retrievers import Catalog

VOCABULARY, TERMS = 500_000, 60


def zipf(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Term numbers that follow Zipf's law: the probability of the i-th most frequent term is proportional to 1 / i."""
    chance = 1 / np.arange(1, VOCABULARY + 1)
    return np.searchsorted(np.cumsum(chance / chance.sum()), rng.random(shape)).clip(max=VOCABULARY - 1)


def synthetic(n: int, folder: Path) -> Catalog:
    """n documents of 60 terms that follow Zipf's law. They are made once and saved in ``folder``."""
    if not folder.exists():
        documents = zipf(np.random.default_rng(0), (n, TERMS))
        words = np.array([f"w{i}" for i in range(VOCABULARY)], dtype=object)
        Catalog.from_records(
            {"id": str(i), "title": str(i), "text": " ".join(words[row])} for i, row in enumerate(documents)
        ).save(folder)
    return Catalog.load(folder)
