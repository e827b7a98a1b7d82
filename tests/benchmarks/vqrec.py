"""Compares VQ-Rec with popularity: on all items, on cold items, and after pre-training on another domain.

    python tests/benchmarks/vqrec.py                                   # two synthetic domains
    python tests/benchmarks/vqrec.py --ml100k FOLDER --office FOLDER

The last item of each user is the test target, and the one before is the validation target. One item in ten is cold: it
is removed from the training and validation splits, and each choice of it is a cold test target, whose history are the
other items that the user chose before. Rankings leave out the history.

The *transfer* arms start from a network that was pre-trained on the other domain. Every arm has --epochs epochs in
total, including those that permute codes. *CPU s* is the processor time of a fit, with the codebook and, in the first
arm of a domain, the text embeddings; with OMP_NUM_THREADS=1 these are seconds of one core.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import retrievers
from retrievers import Catalog, Interactions, Query, Unseen
from retrievers.recommenders.vqrec.backend import pretrain

COLD, TESTS, SEED = 0.1, 2000, 0


class Domain(NamedTuple):
    """A catalogue, its interactions, and its tests by name: queries and their (Q, 1) targets."""

    name: str
    catalog: Catalog
    interactions: Interactions
    tests: dict[str, tuple[list[Query], np.ndarray]]


def domain(name: str, catalog: Catalog, sequences: Iterable[list[int]]) -> Domain:
    """Split the sequences of users as the docstring of this file says."""
    n = len(catalog)
    rng = np.random.default_rng(SEED)
    cold = np.zeros(n, bool)
    cold[rng.choice(n, round(COLD * n), replace=False)] = True
    train: list[list[int]] = []
    valid: tuple[list[tuple[int, ...]], list[int]] = ([], [])
    tests: dict[str, list[tuple[tuple[int, ...], int]]] = {"all": [], "cold": []}
    for sequence in sequences:
        warm: list[int] = []
        for row in sequence:
            if cold[row] and warm:
                tests["cold"].append((tuple(warm), row))
            elif not cold[row]:
                warm.append(row)
        if len(warm) < 3:
            train.append(warm)
            continue
        train.append(warm[:-2])
        valid[0].append(tuple(warm[:-2]))
        valid[1].append(warm[-2])
        tests["all"].append((tuple(warm[:-1]), warm[-1]))
    asked = {}
    for kind, pairs in tests.items():
        chosen = rng.permutation(len(pairs))[:TESTS]
        asked[kind] = (
            [Query(history=pairs[i][0]) for i in chosen],
            np.array([[pairs[i][1]] for i in chosen], np.int32).reshape(-1, 1),
        )
    return Domain(name, catalog, Interactions.from_sequences(n, train, valid), asked)


def ml100k(folder: Path) -> Domain:
    with (folder / "ml-100k.item").open(encoding="utf-8") as file:
        next(file)
        items = [line.rstrip("\n").split("\t") for line in file]
    catalog = Catalog.from_records({"id": i, "title": title, "text": f"{title} ({year}), {genres}"}
                                   for i, title, year, genres in items)  # fmt: skip
    with (folder / "ml-100k.inter").open(encoding="utf-8") as file:
        next(file)
        events = [line.split("\t") for line in file]
    rows = {i: row for row, i in enumerate(catalog.ids)}
    users: dict[str, list[int]] = {}
    for user, item, _, _ in sorted(events, key=lambda event: float(event[3])):
        users.setdefault(user, []).append(rows[item])
    return domain("ml100k", catalog, users.values())


def office(folder: Path) -> Domain:
    with gzip.open(folder / "items.jsonl.gz", "rt", encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    catalog = Catalog.from_records(
        {"id": i["id"], "title": i["title"], "text": f"{i['title']} {i['brand']}"} for i in items
    )
    rows = {i: row for row, i in enumerate(catalog.ids)}
    users: dict[str, list[int]] = {}
    with gzip.open(folder / "interactions.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in map(json.loads, file):
            own = users.setdefault(line["user"], [])
            own += [rows[i] for i in dict.fromkeys((*line["history"], line["next"])) if rows[i] not in own]
    return domain("office", catalog, users.values())


def made_up(name: str, topics: list[str], seed: int) -> Domain:
    """A synthetic domain with 40 items per topic. A user likes one colour, and chooses three items of one topic after
    another."""
    colours = ["red", "blue", "green", "black"]
    rng = np.random.default_rng(seed)
    kinds = [(topic, colour, i) for topic in range(len(topics)) for colour in range(4) for i in range(10)]
    catalog = Catalog.from_records({"id": f"{t}-{c}-{i}", "text": f"{colours[c]} {topics[t]}, model {i}"}
                                   for t, c, i in kinds)  # fmt: skip
    sequences = []
    for _ in range(400):
        topic, colour = rng.integers(len(topics)), rng.integers(4)
        steps = [(topic + step // 3) % len(topics) for step in range(rng.integers(5, 12))]
        sequences.append(list(dict.fromkeys(int(t * 40 + colour * 10 + rng.integers(10)) for t in steps)))
    return domain(name, catalog, sequences)


def measure(retriever: Any, domain: Domain) -> list[float]:
    """The ndcg@10 and recall@50 of all tests, then the recall@10 and recall@50 of cold tests."""
    figures = []
    for kind, depths in (("all", ()), ("cold", (10,))):
        queries, targets = domain.tests[kind]
        ranks = Unseen(retriever, len(domain.catalog)).ranks(queries, targets)[:, 0]
        if not depths:
            figures.append(
                float(np.where((ranks > 0) & (ranks <= 10), 1 / np.log2(np.maximum(ranks, 1) + 1.0), 0).mean())
            )
        figures += [float(((ranks > 0) & (ranks <= k)).mean()) for k in (*depths, 50)]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ml100k", type=Path, help="folder with ml-100k.inter and .item")
    parser.add_argument("--office", type=Path, help="folder with items.jsonl.gz and interactions.jsonl.gz")
    parser.add_argument("--work", type=Path, help="folder that keeps indexes and embeddings (default: none)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--align", type=int, default=5, help="how many of these epochs permute codes")
    parser.add_argument("--only", default="", help="parts of 'domain: arm', separated by semicolons")
    parser.add_argument("--params", type=json.loads, default={}, help="further parameters of vqrec, as JSON")
    args = parser.parse_args()
    domains = [load(path) for load, path in ((ml100k, args.ml100k), (office, args.office)) if path]
    domains = domains or [
        made_up("garden", ["hose", "spade", "seeds", "lawn mower", "gloves", "watering can", "fence", "shed"], 1),
        made_up("kitchen", ["knife", "pan", "kettle", "oven", "spoon", "plate", "apron", "toaster"], 2),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        run(domains, args, args.work or Path(temporary))


def run(domains: list[Domain], args: argparse.Namespace, work: Path) -> None:
    usual = {"epochs": args.epochs, **args.params}
    total = usual["epochs"]

    def wanted(name: str, arm: str) -> bool:
        return not args.only or any(part in f"{name}: {arm}" for part in args.only.split(";"))

    print(f"{'':<36}{'all':>9}{'all':>8}{'cold':>9}{'cold':>8}\n{'domain, arm':<36}{'ndcg@10':>9}{'rec@50':>8}"
          f"{'rec@10':>9}{'rec@50':>8}{'epochs':>8}{'CPU s':>7}", flush=True)  # fmt: skip
    for at, own in enumerate(domains):
        others = [other for place, other in enumerate(domains) if place != at]
        given, tests = own.interactions, ", ".join(f"{len(q)} {kind}" for kind, (q, _) in own.tests.items())
        print(f"{own.name}: {len(own.catalog)} documents, {int((given.counts > 0).sum())} warm, {len(given)} users, "
              f"{len(given.rows)} choices; tests: {tests}", flush=True)  # fmt: skip
        arms: list[tuple[str, str, dict[str, Any]]] = [
            ("popularity", "popularity", {}),
            ("scratch", "vqrec", usual),
            ("scratch, again", "vqrec", usual),
            ("scratch, another seed", "vqrec", usual | {"seed": 1}),
            ("continuous", "vqrec", usual | {"continuous": True}),
            ("ids beside codes", "vqrec", usual | {"ids": True}),
        ]
        if others and wanted(own.name, "transfer"):
            started = time.process_time()
            folder = pretrain([(o.catalog, o.interactions) for o in others], work / f"to-{own.name}", **usual)
            found = json.loads((folder / "index.json").read_text())["fit"]
            line(f"(pre-training on {', '.join(o.name for o in others)})", [], found, time.process_time() - started)
            # The number of bits comes from the pre-trained network, because the other domain may have more items.
            transferred = usual | {"pretrained": str(folder)}
            arms += [
                ("scratch, its bits", "vqrec", usual | {"bits": int(np.log2(found["values"]))}),
                ("transfer, as it is", "vqrec", transferred | {"epochs": 0, "align_epochs": 0}),
                ("transfer, permuted", "vqrec", transferred | {"epochs": 0, "align_epochs": args.align}),
                ("transfer, codes fitted", "vqrec", transferred | {"align_epochs": 0}),
                ("transfer, permuted, codes fitted", "vqrec",
                 transferred | {"align_epochs": args.align, "epochs": total - args.align}),
                ("transfer, permuted, all fitted", "vqrec",
                 transferred | {"align_epochs": args.align, "epochs": total - args.align, "freeze": False}),
            ]  # fmt: skip
        scores = {}
        for arm, kind, params in arms:
            if wanted(own.name, arm):
                started = time.process_time()
                folder = work / f"{own.name}-{arm.replace(', ', '-').replace(' ', '-')}"
                retriever = retrievers.open(kind, own.catalog, folder, own.interactions, **params)
                seconds = time.process_time() - started
                line(f"  {arm}", measure(retriever, own), retriever.report, seconds)  # type: ignore[attr-defined]
                if arm.startswith("scratch"):
                    scores[arm] = retriever.model.scores(own.tests["all"][0][:64])  # type: ignore[attr-defined]
        if "scratch, again" in scores and "scratch" in scores:
            same = np.array_equal(scores["scratch"], scores["scratch, again"])
            print(f"  two runs with one seed agree in every bit: {same}", flush=True)


def line(arm: str, figures: list[float], report: Any, seconds: float) -> None:
    cells = "".join(f"{figure:>{width}.4f}" for figure, width in zip(figures, (9, 8, 9, 8), strict=False))
    ran = report.get("ran", 0) + report.get("align", {}).get("ran", 0)
    print(f"{arm:<36}{cells:<34}{ran or '':>8}{seconds:>7.0f}", flush=True)


if __name__ == "__main__":
    main()
