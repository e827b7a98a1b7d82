"""Compares several personas per user with one persona and with popularity, and one vector per item with hashed vectors.

    python tests/benchmarks/personas.py --movielens FOLDER --office FOLDER    # ml-100k.inter; interactions.jsonl.gz
    python tests/benchmarks/personas.py                                      # synthetic users with two tastes each

The last item of each user is the test target, and the one before is the validation target. Rankings leave out the
history.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import retrievers  # noqa: E402
from retrievers import Catalog, Interactions, Query, Unseen  # noqa: E402

Sequences = list[list[int]]


def movielens(folder: Path) -> Sequences:
    lines = (folder / "ml-100k.inter").read_text().splitlines()[1:]
    numbers: dict[str, int] = {}
    users: dict[str, list[int]] = {}
    for user, item, _, _ in sorted((line.split("\t") for line in lines), key=lambda event: float(event[3])):
        users.setdefault(user, []).append(numbers.setdefault(item, len(numbers)))
    return list(users.values())


def office(folder: Path) -> Sequences:
    users: dict[str, dict[str, None]] = {}
    with gzip.open(folder / "interactions.jsonl.gz", "rt") as file:
        for line in map(json.loads, file):
            users.setdefault(line["user"], {}).update(dict.fromkeys((*line["history"], line["next"])))
    numbers: dict[str, int] = {}
    return [[numbers.setdefault(item, len(numbers)) for item in items] for items in users.values()]


def synthetic() -> Sequences:
    rng, found = np.random.default_rng(0), []
    for _ in range(600):
        tastes = rng.permutation(12)[:2] * 50
        items = (tastes[rng.integers(0, 2, 30)] + np.minimum(rng.zipf(1.3, 30) - 1, 49)).tolist()
        found.append(list(dict.fromkeys(items)))
    return found


def quality(name: str, sequences: Sequences, args: argparse.Namespace) -> None:
    sequences = [s for s in sequences if len(s) >= 3]
    documents = 1 + max(map(max, sequences))
    catalog = Catalog.from_records({"id": str(i), "text": str(i)} for i in range(documents))
    held = [tuple(s[:-2]) for s in sequences], [s[-2] for s in sequences]
    interactions = Interactions.from_sequences(documents, [s[:-2] for s in sequences], held)
    asked, targets = [Query(history=tuple(s[:-1])) for s in sequences], np.array([[s[-1]] for s in sequences])
    print(f"\n{name}: {len(sequences)} users, {documents} items, {len(interactions.rows)} choices")
    print(f"{'arm':<24}{'ndcg@10':>9}{'recall@50':>11}{'valid':>8}{'epoch':>7}{'fit s':>8}{'ms/query':>10}", flush=True)
    arms: dict[str, tuple[str, dict]] = {"popularity": ("popularity", {})}
    arms |= {f"{p} persona{'s' * (p > 1)}": ("personas", {"personas": p}) for p in (1, 2, 4)}
    arms["4, no steps"] = ("personas", {"steps": 0})
    arms |= {f"4, {2**b} hashed rows": ("personas", {"hash_bits": b}) for b in args.hash_bits}
    for arm, (kind, params) in arms.items():
        if args.only not in (None, arm):
            continue
        if kind == "personas":
            params = {"epochs": args.epochs, "seed": args.seed} | params
        started = time.perf_counter()
        retriever = retrievers.open(kind, catalog, None, interactions, **params)
        fitted = time.perf_counter()
        ranks = Unseen(retriever, documents).ranks(asked, targets)[:, 0]
        spent = 1000 * (time.perf_counter() - fitted) / len(asked)
        near = (ranks > 0) & (ranks <= 10)
        ndcg, recall = (
            np.where(near, 1 / np.log2(1 + np.maximum(ranks, 1)), 0).mean(),
            ((ranks > 0) & (ranks <= 50)).mean(),
        )
        report = dict(retrievers.fits(retriever)).get(kind, {})
        chosen = f"{report.get('ndcg@10', '')!s:>8}{report.get('epoch', '')!s:>7}"
        print(f"{arm:<24}{ndcg:>9.4f}{recall:>11.4f}{chosen}{fitted - started:>8.1f}{spent:>10.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--movielens", type=Path)
    parser.add_argument("--office", type=Path)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--hash-bits", type=int, nargs="*", default=[8, 10, 12])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="an arm's name, as in the table")
    args = parser.parse_args()
    given = [(path.name, read(path)) for path, read in ((args.movielens, movielens), (args.office, office)) if path]
    for name, sequences in given or [("synthetic", synthetic())]:
        quality(name, sequences, args)


if __name__ == "__main__":
    main()
