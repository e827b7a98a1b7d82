"""Do inverse-propensity weights bring grades made of clicks closer to the truth? Clicks are simulated, so it is known.

Each query has 20 items with true grades from 0 to 3. A ranker that knows them badly shows ten of them in each session,
and differs a little from session to session. A user examines position k with probability (1 / k)^eta and clicks an
examined item with a probability that rises with its grade (Joachims, Swaminathan and Schnabel 2017, section 6). The
clicks are written to clicks.csv and read by the task `catalog`, once for each way to grade them. Its grades order each
query's items, and that order is compared with the true grades.

    python tests/benchmarks/click_bias.py
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

ITEMS, SHOWN = 20, 10
NOISE = 0.1  # how likely an examined item of grade 0 is clicked
COLUMNS = {"query": "query", "item": "item", "clicks": "clicks"}
POSITION, IMPRESSIONS = {"position": "position"}, {"impressions": "impressions"}


def arms(eta: float) -> dict[str, dict[str, object]]:
    """Ways to grade the clicks -> `task.params`. eta: the true position bias, which the last two get wrong."""
    weighted = {"columns": COLUMNS | POSITION, "position_bias": eta}
    rate = {"columns": COLUMNS | IMPRESSIONS, "combine": "rate"}
    both = {"columns": COLUMNS | POSITION | IMPRESSIONS, "combine": "rate", "position_bias": eta}
    return {
        "number of clicks": {"columns": COLUMNS, "combine": "sum"},
        "number, weighted": {**weighted, "combine": "sum"},
        "click-through rate": rate,
        "rate, weighted": both,
        "rate, weighted, clip 0.3": {**both, "clip": 0.3},
        "rate, half the true eta": {**both, "position_bias": eta / 2},
        "rate, twice the true eta": {**both, "position_bias": eta * 2, "clip": 0.01},
    }


def simulate(random: np.random.Generator, queries: int, sessions: int, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """True grades, (queries, ITEMS) int, and impressions and clicks by position, (queries, ITEMS, SHOWN, 2) int."""
    grades = random.choice(4, (queries, ITEMS), p=[0.55, 0.25, 0.13, 0.07])
    score = grades + random.normal(0, 2.0, grades.shape)
    attraction = NOISE + (1 - NOISE) * (2.0**grades - 1) / 7
    examined = (1.0 / np.arange(1, SHOWN + 1)) ** eta
    counts = np.zeros((queries, ITEMS, SHOWN, 2), np.int64)
    places = np.arange(SHOWN)
    for query in range(queries):
        for _ in range(sessions):
            order = np.argsort(-(score[query] + random.normal(0, 0.7, ITEMS)))[:SHOWN]
            clicked = random.random(SHOWN) < examined * attraction[query, order]
            counts[query, order, places, 0] += 1
            counts[query, order, places, 1] += clicked
    return grades, counts


def write(folder: Path, counts: np.ndarray) -> None:
    with (folder / "items.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "title"], *([f"i{item}", f"item {item}"] for item in range(ITEMS))])
    with (folder / "clicks.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "item", "position", "impressions", "clicks"])
        for query, item, place in np.argwhere(counts[..., 0] > 0).tolist():
            writer.writerow([f"query {query}", f"i{item}", place + 1, *counts[query, item, place].tolist()])


def estimated(folder: Path, params: Mapping[str, object], queries: int) -> np.ndarray:
    """(queries, ITEMS) float64: the grades that the task reads; 0 where it has none."""
    from rec_r1 import tasks
    from rec_r1.config import TaskConfig

    task = tasks.load(TaskConfig(name="catalog", path=str(folder), params=dict(params)))
    found = np.zeros((queries, ITEMS))
    for split in task.splits.values():
        for text, rows, grades in zip(split.queries, split.rows, split.grades, strict=True):
            found[int(text.split()[1]), list(rows)] = grades
    return found


def measured(truth: np.ndarray, guess: np.ndarray, random: np.random.Generator) -> tuple[float, float]:
    """Mean ndcg@10 of the order by ``guess`` (ties in random order), and Kendall's tau-b, over queries with a grade."""
    from rewards import RankingReward
    from rewards.types import Outcome

    kept = truth.max(axis=1) > 0
    truth, guess = truth[kept], guess[kept]
    order = np.lexsort((random.random(guess.shape), -guess), axis=1)
    ranks = np.argsort(order, axis=1).astype(np.int32) + 1
    outcome = Outcome([""] * len(truth), [None] * len(truth), ranks, truth.astype(np.float32))
    taus = [stats.kendalltau(one, other).statistic for one, other in zip(truth, guess, strict=True)]
    return float(RankingReward("ndcg", 10)(outcome).mean()), float(np.nanmean(taus))


def with_interval(values: np.ndarray) -> str:
    """The mean over seeds and its 95% interval by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():+.3f} [{values.mean() - half:+.3f}, {values.mean() + half:+.3f}]"


def show(title: str, results: dict[str, np.ndarray]) -> None:
    """results: arm -> (seeds, 2) ndcg@10 and tau. Differences are from the unweighted arm of the same kind."""
    print(f"\n{title}")
    print(f"{'graded by':<27}{'ndcg@10':>8}{'tau':>8}   {'ndcg@10 - unweighted':<28}tau - unweighted")
    for name, values in results.items():
        base = results["number of clicks" if name.startswith("number") else "click-through rate"]
        line = f"{name:<27}{values[:, 0].mean():>8.3f}{values[:, 1].mean():>8.3f}"
        if values is not base:
            line += f"   {with_interval(values[:, 0] - base[:, 0]):<28}{with_interval(values[:, 1] - base[:, 1])}"
        print(line.rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--sessions", type=int, nargs="+", default=[30, 300], help="of each query")
    parser.add_argument("--etas", type=float, nargs="+", default=[1.0, 0.5], help="true position bias")
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["REC_R1_CACHE"] = f"{temporary}/cache"
        for eta in args.etas:
            for sessions in args.sessions:
                results: dict[str, list[tuple[float, float]]] = {name: [] for name in arms(eta)}
                for seed in tqdm(range(args.seeds), desc=f"eta {eta:g}, {sessions} sessions", unit=" seeds"):
                    random = np.random.default_rng([seed, sessions, round(10 * eta)])
                    truth, counts = simulate(random, args.queries, sessions, eta)
                    folder = Path(temporary, f"{eta}-{sessions}-{seed}")
                    folder.mkdir()
                    write(folder, counts)
                    for name, params in arms(eta).items():
                        guess = estimated(folder, params, args.queries)
                        results[name].append(measured(truth, guess, np.random.default_rng(seed)))
                title = f"true eta {eta:g}, {sessions} sessions of each of {args.queries} queries, {args.seeds} seeds"
                show(title, {name: np.array(values) for name, values in results.items()})


if __name__ == "__main__":
    main()
