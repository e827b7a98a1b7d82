"""VQ-Rec with its default encoder."""

import numpy as np
import pytest

import retrievers
from retrievers import Catalog, Interactions, Query

pytestmark = pytest.mark.slow  # a real encoder


def test_with_the_real_encoder_a_cold_document_is_found_by_its_text(tmp_path):
    things = ["garden hose", "garden spade", "kitchen knife", "kitchen pan", "office chair", "office lamp"]
    texts = [f"{thing}, {kind}" for thing in things for kind in ("small", "large", "cheap", "steel", "blue")]
    catalog = Catalog.from_records({"id": str(i), "text": text} for i, text in enumerate(texts))
    rng = np.random.default_rng(0)
    rooms = rng.integers(0, 3, 60)  # Users buy items for one room, and nobody buys blue ones.
    sequences = [[int(10 * r + rng.choice([0, 1, 2, 3, 5, 6, 7, 8])) for _ in range(5)] for r in rooms]
    given = Interactions.from_sequences(30, sequences)
    params = {"codes": 32, "dim": 32, "epochs": 20, "dropout": 0.0, "device": "cpu"}
    made = retrievers.open("vqrec", catalog, tmp_path / "index", given, **params)
    assert made.report["cold"] == 6 and made.model.features.shape == (30, 32)
    ranks = made.ranks([Query(history=(10 * r, 10 * r + 5)) for r in range(3)], np.array([[4, 9], [14, 19], [24, 29]]))
    assert (ranks <= 12).all()
    dense = retrievers.open("dense", catalog, tmp_path / "dense", device="cpu")
    assert np.array_equal(
        np.load(tmp_path / "dense" / "embeddings.npy"), np.load(tmp_path / "index" / "embeddings.npy")
    )
    assert dense is not None and (tmp_path / "index" / "embeddings.npy").stat().st_nlink in (1, 2)
