"""Interactions for the tests of the linear recommenders: small random ones, and two real data sets where available."""

import gzip
import importlib.util
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from retrievers import Catalog, Interactions

SHARED = Path(os.environ.get("REC_R1_SHARED", Path(__file__).parents[3] / "shared"))


def catalog_of(n: int) -> Catalog:
    return Catalog.from_records({"id": f"d{i}", "text": f"document {i} about {i % 3}"} for i in range(n))


def random_interactions(documents: int, users: int, seed: int = 0, held: int = 20) -> Interactions:
    """Sequences with some structure: a user mostly chooses items whose rows have the same remainder modulo 3."""
    rng = np.random.default_rng(seed)

    def sequence() -> list[int]:
        own = np.arange(documents)[np.arange(documents) % 3 == rng.integers(3)]
        most, any_ = rng.choice(own, rng.integers(2, 7)), rng.integers(0, documents, 1)
        return [int(row) for row in (*most, *any_)]

    validation = [sequence() for _ in range(held)]
    return Interactions.from_sequences(
        documents,
        [sequence() for _ in range(users)],
        ([tuple(s[:-2]) for s in validation], [s[-2] for s in validation]),
    )


@cache
def movielens() -> Interactions:
    """MovieLens-100k from recbole's wheel. Every rating is a choice, and the last one of each user is held out."""
    spec = importlib.util.find_spec("recbole")
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        pytest.skip("recbole, whose wheel carries MovieLens-100k, is not installed")
    path = Path(folders[0]) / "dataset_example" / "ml-100k" / "ml-100k.inter"
    ratings = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    items = {item: row for row, item in enumerate(sorted({rating[1] for rating in ratings}, key=int))}
    users: dict[str, list[tuple[float, int]]] = {}
    for user, item, _, time in ratings:
        users.setdefault(user, []).append((float(time), items[item]))
    sequences = [[row for _, row in sorted(own)] for own in users.values()]
    held = ([tuple(s[-51:-1]) for s in sequences], [s[-1] for s in sequences])
    return Interactions.from_sequences(len(items), [s[:-1] for s in sequences], held)


@cache
def amazon_office() -> Interactions:
    """Amazon Office, with lines of user, history and next item, the longest per user. Every fifth user is held out."""
    folder = SHARED / "data" / "amazon_office"
    if not folder.is_dir():
        pytest.skip("the shared folder with amazon_office is not here: set REC_R1_SHARED")
    with gzip.open(folder / "items.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = {json.loads(line)["id"]: row for row, line in enumerate(file)}
    users: dict[str, list[int]] = {}
    with gzip.open(folder / "interactions.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in map(json.loads, file):
            sequence = [rows[i] for i in (*line["history"], line["next"])]
            users[line["user"]] = max(sequence, users.get(line["user"], []), key=len)
    sequences = list(users.values())
    held = sequences[::5]
    train = [sequence for u, sequence in enumerate(sequences) if u % 5]
    return Interactions.from_sequences(len(rows), train, ([tuple(s[:-1]) for s in held], [s[-1] for s in held]))


def dense(retriever) -> np.ndarray:
    weights = retriever.model._weights
    return weights if isinstance(weights, np.ndarray) else weights.toarray()
