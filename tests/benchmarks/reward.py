"""Measures the time of rewards: with this toolkit, as in the paper's released code, and with other fast libraries.

    python tests/benchmarks/reward.py                     # 1,000,000 synthetic documents and the bundled catalogue
    python tests/benchmarks/reward.py --dense             # exact inner products, compared with plain matrix products

The batch is the paper's: 32 prompts x 12 completions, ndcg@1000, with queries of 4, 15 and 182 words. *ours* is the
Scorer with `bm25`: it parses completions, ranks the distinct queries and computes the rewards. reward_peers.py
describes the other arms, the peers. All arms index the same terms.

In each round, every arm has one turn, in which it repeats its batch for at least --seconds. *ours* scores the whole
batch, *reference* scores --reference completions of it, and the other peers score --completions. The first turn of each
arm is not timed. *CPU ms* is the processor time per completion, on all cores, and its ratio to ours. On a machine that
runs other programs, it varies less than the clock's time. The last two columns are the shares of completions whose ndcg
differs from ours by less than 0.02 and by less than 0.001; reward_peers.py explains the differences.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from corpora import synthetic
from reward_peers import DEPTH, PEERS, Arm, open_peers

import retrievers
import rewards
from rec_r1 import config, tasks
from rec_r1.prompts import Action
from rec_r1.scoring import Scorer
from retrievers import Catalog
from retrievers.core.numba_threads import threads

PROMPTS, GROUP = 32, 12
LENGTHS = (4, 15, 182)
AIM = 3  # The goal: to be so many times as fast as the fastest peer.
PLAIN = {"stemmer": None, "stopwords": None}  # Without analysis, all arms have the same terms.


def say(text: str) -> None:
    print(text, flush=True)


def real(folder: Path) -> Catalog:
    """The bundled catalogue, whose texts are replaced by the terms that `bm25` makes of them."""
    if not folder.exists():
        catalog = tasks.load(config.load("quickstart").task).catalog
        terms = retrievers.text.bm25.analyze(catalog.texts, retrievers.text.bm25.Params())
        records = ({"id": str(i), "title": str(i), "text": " ".join(words)} for i, words in enumerate(terms))
        Catalog.from_records(records).save(folder)
    return Catalog.load(folder)


def completions(
    catalog: Catalog, length: int, pool: list[str], rng: np.random.Generator
) -> tuple[list[str], list[int]]:
    """384 queries and their targets.

    A third of the words of a query are from the relevant document, and the others are drawn from all documents. The
    completions of one prompt have the same target, but different words.
    """
    texts, targets = [], []
    for _ in range(PROMPTS):
        target = int(rng.integers(len(catalog)))
        own = catalog.texts[target].split() or ["nothing"]
        for _ in range(GROUP):
            taken = rng.choice(own, min(len(own), max(1, length // 3)), replace=False).tolist()
            texts.append(" ".join(taken + rng.choice(pool, length - len(taken)).tolist()))
            targets.append(target)
    return texts, targets


class Turn(NamedTuple):
    rate: float  # Completions per second.
    cpu: float  # Processor time per completion, in milliseconds.
    scores: list[float]


def turn(arm: Arm, texts: list[str], targets: list[int], seconds: float) -> Turn:
    started, cpu, done = time.perf_counter(), time.process_time(), 0
    while True:
        scores = arm(texts, targets)
        done += len(texts)
        if (passed := time.perf_counter() - started) >= seconds:
            return Turn(done / passed, 1000 * (time.process_time() - cpu) / done, scores)


def measure(
    arms: dict[str, Arm], texts: list[str], targets: list[int], args: argparse.Namespace
) -> tuple[dict[str, list[Turn]], dict[str, np.ndarray]]:
    """The turns of each arm, one per round, and the absolute differences of each peer's ndcg from ours."""
    asked = {"ours": len(texts), "reference": args.reference}
    turns: dict[str, list[Turn]] = {name: [] for name in arms}
    apart: dict[str, list[np.ndarray]] = {name: [] for name in arms if name != "ours"}
    for name, arm in arms.items():  # This turn compiles loops and loads the indexes.
        count = asked.get(name, args.completions)
        arm(texts[:count], targets[:count])
    for number in range(args.rounds):
        order = np.random.default_rng(number).permutation(len(texts))  # Ours comes first and scores all of it.
        for name, arm in arms.items():
            chosen = order[: asked.get(name, args.completions)]
            turns[name].append(turn(arm, [texts[i] for i in chosen], [targets[i] for i in chosen], args.seconds))
            if name != "ours":
                expected = turns["ours"][-1].scores[: len(chosen)]
                apart[name].append(np.abs(np.subtract(turns[name][-1].scores, expected)))
    return turns, {name: np.concatenate(parts) for name, parts in apart.items()}


def show(length: int, turns: dict[str, list[Turn]], apart: dict[str, np.ndarray]) -> None:
    """Print one line per arm, and one line that compares ours with the fastest peer, which has the smallest ratio."""
    rates = {name: statistics.median(one.rate for one in some) for name, some in turns.items()}
    cpu = {name: statistics.median(one.cpu for one in some) for name, some in turns.items()}
    batch = PROMPTS * GROUP / rates["ours"]
    say(f"{length:>5}  {'ours':<12}  {rates['ours']:>8.0f}  {f'{batch:.3f} s a batch':<27}  {cpu['ours']:>7.2f}")
    medians, lines = {}, {}
    for name, differences in apart.items():
        ratios = [a.rate / b.rate for a, b in zip(turns["ours"], turns[name], strict=True)]
        medians[name] = statistics.median(ratios)
        lines[name] = f"{medians[name]:.1f}x ({', '.join(f'{ratio:.1f}' for ratio in ratios)})"
        agree = "  ".join(f"{np.mean(differences < limit):>6.0%}" for limit in (0.02, 0.001))
        times = f"{cpu[name]:>7.2f}  {cpu[name] / cpu['ours']:>6.1f}x"
        say(f"{length:>5}  {name:<12}  {rates[name]:>8.1f}  {lines[name]:<27}  {times}  {agree}")
    if medians:
        fastest = min(medians, key=medians.__getitem__)
        verdict = "" if medians[fastest] >= AIM else f", less than the {AIM}x aimed at"
        say(f"{length:>5}  ours / fastest peer, {fastest}: {lines[fastest]}{verdict}\n")


def compare(name: str, catalog: Catalog, folder: Path, args: argparse.Namespace) -> None:
    started = time.monotonic()
    index = retrievers.open("bm25", catalog, folder / "bm25", **PLAIN)
    say(f"bm25 index: {time.monotonic() - started:.0f} s, {size(folder / 'bm25') / 1e6:.0f} MB")
    scorer = Scorer(lambda text, _: Action(text, text), index, rewards.from_spec({f"ndcg@{DEPTH}": 1.0}))

    def ours(texts: list[str], targets: list[int]) -> list[float]:
        ask = (texts, ["q"] * len(texts), [[t] for t in targets], [[1.0]] * len(texts))
        return scorer.score(*ask).rewards.tolist()

    arms: dict[str, Arm] = {"ours": ours}
    for peer in args.arms:
        started = time.monotonic()
        arms |= open_peers([peer], catalog, folder, say)
        if peer in arms:
            say(f"{peer}: opened or built in {time.monotonic() - started:.0f} s")
    rng = np.random.default_rng(1)
    pool = " ".join(catalog.texts[i] for i in rng.integers(0, len(catalog), 2000).tolist()).split()
    say(
        f"\n{name}: {len(catalog):,} documents, {PROMPTS} x {GROUP} completions, k = {DEPTH}, {threads()} cores, "
        f"median of {args.rounds} rounds; reference asks {args.reference} of them, other peers {args.completions}"
    )
    columns = f"{'CPU ms':>7}  {'/ ours':>7}  {'<0.02':>6}  {'<0.001':>6}"
    say(f"{'words':>5}  {'arm':<12}  {'a second':>8}  {'ours / it (rounds)':<27}  {columns}")
    for length in args.words:
        texts, targets = completions(catalog, length, pool, rng)
        show(length, *measure(arms, texts, targets, args))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def memory(folder: Path, catalog: Path, barrier, answers) -> None:
    """Report the memory of this process before and after it has scored a batch. It runs in a child process."""
    catalog_ = Catalog.load(catalog)
    index = retrievers.open("bm25", catalog_, folder, **PLAIN)
    pool = " ".join(catalog_.texts[i] for i in range(500)).split()
    before = usage()
    texts, targets = completions(catalog_, 182, pool, np.random.default_rng(3))
    index.ranks([retrievers.Query(text) for text in texts], np.array(targets)[:, None])
    barrier.wait()  # Now both processes have scored their batch.
    answers.put({key: (usage()[key], before[key]) for key in ("Rss", "Pss")})
    barrier.wait()


def usage() -> dict[str, float]:
    """The memory of this process in MB: resident (Rss), and with shared pages in proportion (Pss). Linux only."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("Rss:", "Pss:"))}


def measure_memory(folder: Path, catalog: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.SimpleQueue()
    children = [context.Process(target=memory, args=(folder, catalog, barrier, answers)) for _ in range(2)]
    for child in children:
        child.start()
    held = [answers.get() for _ in children]
    for child in children:
        child.join()
    for i, one in enumerate(held, 1):
        say(f"process {i} of 2: resident {one['Rss'][0]:.0f} MB, of that its own or its share {one['Pss'][0]:.0f} MB")


def dense(n: int, dimension: int, queries: int, rounds: int, device: str | None) -> None:
    import torch

    from retrievers.text.exact_search import Exact

    rng = np.random.default_rng(0)
    embeddings = np.empty((n, dimension), np.float16)
    for start in range(0, n, 100_000):
        part = rng.standard_normal((min(100_000, n - start), dimension), np.float32)
        embeddings[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    asked = rng.standard_normal((queries, dimension)).astype(np.float32)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    targets = rng.integers(0, n, (queries, 1))
    exact = Exact(embeddings, device)
    where = torch.cuda.get_device_name() if exact.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    say(f"\ndense exact: {n:,} x {dimension} float16, {queries} queries, {where}")
    on = torch.from_numpy(asked).to(exact.device)
    dtype = torch.float16 if exact.device.type == "cuda" else torch.float32
    chunk = torch.from_numpy(embeddings[: exact.chunk]).to(exact.device, dtype)

    def wait() -> None:
        if exact.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(work) -> float:
        wait()
        started = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - started

    def bare() -> None:
        factor = on.to(dtype)
        for _ in range(math.ceil(n / exact.chunk)):
            factor @ chunk.T

    for work in (bare, lambda: exact.ranks(asked, targets)):
        work()
    pairs = [(timed(lambda: exact.ranks(asked, targets)), timed(bare)) for _ in range(rounds)]
    for ours, products in pairs:
        say(f"ranks {ours:.3f} s, bare products {products:.3f} s: {ours / products:.2f}x")
    say(f"median {statistics.median(a / b for a, b in pairs):.2f}x")
    if exact.device.type == "cuda":
        block = torch.empty(1 << 30, dtype=torch.uint8, device=exact.device)
        copy = statistics.median(timed(block.clone) for _ in range(10))
        bandwidth = 2 * (1 << 30) / copy
        reading = embeddings.nbytes / bandwidth
        say(f"memory {bandwidth / 1e9:.0f} GB/s: reading the matrix once {reading * 1e3:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=PEERS, default=list(PEERS), help="beside ours (default: all)")
    parser.add_argument("--catalogs", nargs="+", choices=("synthetic", "emoji"), default=["synthetic", "emoji"])
    parser.add_argument("--words", nargs="+", type=int, default=LENGTHS, help="lengths of the queries")
    parser.add_argument("--reference", type=int, default=48, help="completions per turn of the reference")
    parser.add_argument("--completions", type=int, default=PROMPTS * GROUP, help="completions per turn of other peers")
    parser.add_argument("--seconds", type=float, default=1.0, help="the shortest time of a turn")
    parser.add_argument("--folder", type=Path, default=config.cache_folder() / "benchmark", help="for the indexes")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--queries", type=int, default=PROMPTS * GROUP)
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    args = parser.parse_args()
    if args.dense:
        dense(args.documents, args.dimension, args.queries, args.rounds, args.device)
        return
    if "synthetic" in args.catalogs:
        folder = args.folder / f"synthetic-{args.documents}"
        compare("synthetic", synthetic(args.documents, folder / "catalog"), folder, args)
        if Path("/proc/self/smaps_rollup").exists():
            measure_memory(folder / "bm25", folder / "catalog")
    if "emoji" in args.catalogs:
        compare("emoji", real(args.folder / "emoji" / "catalog"), args.folder / "emoji", args)


if __name__ == "__main__":
    main()
