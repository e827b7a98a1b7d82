"""Synthetic data for the tests of VQ-Rec: topics that follow one another, and a stub encoder for them."""

from types import SimpleNamespace

import numpy as np
import pytest

from retrievers import Catalog, Interactions, Query
from retrievers.recommenders.vqrec import backend

TOPICS, EACH, DIMENSIONS = 8, 12, 16
SMALL = {"codes": 4, "bits": 3, "dim": 16, "max_history": 8, "epochs": 4, "train_batch": 16, "learning_rate": 0.01}


class Stub:
    """An encoder whose embedding is the vector of the topic, plus a smaller vector of the item."""

    dimension = DIMENSIONS
    model = SimpleNamespace(tuned_on=lambda: ())  # As of an encoder that was not tuned here.

    def __init__(self, **settings):
        self.settings = settings

    def describe(self):
        return {"model": "stub"}

    def documents(self, texts):
        out = np.zeros((len(texts), DIMENSIONS), np.float16)
        for i, text in enumerate(texts):
            topic, own = map(int, text.split())
            out[i] = (np.random.default_rng(topic).normal(size=DIMENSIONS)
                      + 0.3 * np.random.default_rng(1000 + own).normal(size=DIMENSIONS))  # fmt: skip
        return out


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    """Replaces the encoder in the tests of a module that imports this fixture."""
    monkeypatch.setattr(backend, "Encoder", Stub)


def make_catalog(each=EACH) -> Catalog:
    return Catalog.from_records({"id": f"d{i}", "text": f"{i // each} {i}"} for i in range(TOPICS * each))


COLD = [EACH - 1 + topic * EACH for topic in range(TOPICS)]  # The last item of every topic.


def make_interactions(users=120, seed=0, each=EACH) -> Interactions:
    """Sequences that stay in a topic or move on to one of two others, to one of these with probability 0.8. No two
    topics have the same two. The last item of each sequence is its validation target."""
    rng = np.random.default_rng(seed)
    after = np.random.default_rng(7).integers(0, TOPICS, (TOPICS, 2))
    sequences = []
    for _ in range(users):
        topic = int(rng.geometric(0.25)) % TOPICS
        sequence = []
        for _ in range(rng.integers(5, 10)):
            sequence.append(int(topic * each + rng.integers(each - 1)))
            topic = topic if rng.random() < 0.3 else int(after[topic, int(rng.random() < 0.2)])
        sequences.append(sequence)
    return Interactions.from_sequences(
        TOPICS * each, [s[:-1] for s in sequences], ([tuple(s[:-1]) for s in sequences], [s[-1] for s in sequences])
    )


def some_queries(count=70, seed=1) -> list[Query]:
    rng = np.random.default_rng(seed)
    histories = [tuple(rng.integers(0, TOPICS * EACH, rng.integers(1, 12)).tolist()) for _ in range(count)]
    return [
        Query(history=h, weights=tuple(rng.choice([-1.0, -0.5, 0.0, 1.0, 2.0], len(h)).tolist()) if q % 2 else ())
        for q, h in enumerate(histories)
    ]
