"""Documents, interactions and judgments, and a tiny encoder, for the tests of encoders that are tuned."""

import numpy as np
import pytest
from tiny_encoder import tiny_encoder

from retrievers import Catalog, Interactions, Judgments
from retrievers.text.tuning import job, train

THINGS = ["garden hose", "garden spade", "kitchen knife", "kitchen pan", "office chair", "office lamp"]
TEXTS = [f"{thing} {kind}" for thing in THINGS for kind in ("small", "large", "cheap", "steel")]
N = len(TEXTS)


def make_catalog() -> Catalog:
    return Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS))


def make_interactions(users: int = 30, seed: int = 0, held: int = 10, raw_titles: int = 1) -> Interactions:
    """Users who choose items of two things, such as hoses and pans, whose texts have little in common."""
    rng = np.random.default_rng(seed)
    both = np.concatenate([np.arange(4), np.arange(12, 16)])
    sequences = [rng.permutation(both)[:5] + 4 * rng.integers(3) for _ in range(users + held)]
    held_out = [tuple(map(int, s[:-1])) for s in sequences[users:]], [int(s[-1]) for s in sequences[users:]]
    return Interactions.from_sequences(N, sequences[:users], held_out, raw_titles)


JUDGMENTS = Judgments(N, ["wet", "sharp", "bright"], [(0, 1, 2), (8, 9), (20, 21, 22, 23)], ["seat"], [(16, 17)])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """The folder of a tiny encoder of the catalogue's words."""
    return str(tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny", [*TEXTS, *JUDGMENTS.queries, "seat"]))


FIT = {"epochs": 2, "batch_size": 16, "learning_rate": 0.01}


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs what the process of a fit runs in the process of the test, which has imported everything already."""
    monkeypatch.setattr(job, "_run", lambda folder, device: train.run(folder))
