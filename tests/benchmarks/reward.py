"""What a reward costs: this toolkit beside what the paper's released code does, in one run.

    python tests/benchmarks/reward.py                     # 1,000,000 synthetic documents and the bundled catalogue
    python tests/benchmarks/reward.py --dense             # exact inner products beside the bare matrix products

The batch is the paper's: 32 prompts x 12 completions, ndcg@1000, queries of 4, 15 and 182 words. *ours* is the Scorer
over `bm25` (parse, distinct queries, ranks, reward). *reference* is one pyserini search a completion, k = 1000, then
the ndcg from the returned ids, on --reference of the completions. Both index the same terms. The arms take turns.
*agree* is the share of completions whose two ndcg differ by less than 0.02: pyserini breaks ties by id as a string.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import retrievers
import rewards
from rec_r1 import config, tasks
from rec_r1.prompts import Action
from rec_r1.scoring import Scorer
from retrievers import Catalog

PROMPTS, GROUP, DEPTH = 32, 12, 1000
LENGTHS = (4, 15, 182)
VOCABULARY, TERMS = 500_000, 60
PLAIN = {"stemmer": None, "stopwords": None}  # the terms are the same for both arms


def say(text: str) -> None:
    print(text, flush=True)


def zipf(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Term numbers by Zipf's law: the i-th most frequent with probability ~ 1 / i."""
    chance = 1 / np.arange(1, VOCABULARY + 1)
    return np.searchsorted(np.cumsum(chance / chance.sum()), rng.random(shape)).clip(max=VOCABULARY - 1)


def synthetic(n: int, folder: Path) -> Catalog:
    """n documents of 60 Zipf-distributed terms, made once."""
    if not folder.exists():
        documents = zipf(np.random.default_rng(0), (n, TERMS))
        words = np.array([f"w{i}" for i in range(VOCABULARY)], dtype=object)
        Catalog.from_records(
            {"id": str(i), "title": str(i), "text": " ".join(words[row])} for i, row in enumerate(documents)
        ).save(folder)
    return Catalog.load(folder)


def real(folder: Path) -> Catalog:
    """The bundled catalogue, as the terms that `bm25` makes of it."""
    if not folder.exists():
        catalog = tasks.load(config.load("quickstart").task).catalog
        terms = retrievers.text.bm25.analyze(catalog.texts, retrievers.text.bm25.Params())
        records = ({"id": str(i), "title": str(i), "text": " ".join(words)} for i, words in enumerate(terms))
        Catalog.from_records(records).save(folder)
    return Catalog.load(folder)


def completions(
    catalog: Catalog, length: int, pool: list[str], rng: np.random.Generator
) -> tuple[list[str], list[int]]:
    """384 queries and their targets: a third of the words from the relevant document, the rest as documents have
    them; the completions of one prompt share the target, not the words."""
    texts, targets = [], []
    for _ in range(PROMPTS):
        target = int(rng.integers(len(catalog)))
        own = catalog.texts[target].split() or ["nothing"]
        for _ in range(GROUP):
            taken = rng.choice(own, min(len(own), max(1, length // 3)), replace=False).tolist()
            texts.append(" ".join(taken + rng.choice(pool, length - len(taken)).tolist()))
            targets.append(target)
    return texts, targets


def reference(index: Path):
    """Completion and target -> ndcg@1000, the way of the paper's code."""
    os.environ.setdefault("OPENAI_API_KEY", "unused")  # pyserini's import asks for one
    from jnius import autoclass
    from pyserini.search.lucene import LuceneSearcher

    searcher = LuceneSearcher(str(index))
    searcher.set_bm25(1.2, 0.75)
    searcher.set_analyzer(autoclass("org.apache.lucene.analysis.core.WhitespaceAnalyzer")())

    def score(text: str, target: int) -> float:
        ids = [hit.docid for hit in searcher.search(text, k=DEPTH)]
        return 1 / math.log2(ids.index(str(target)) + 2) if str(target) in ids else 0.0

    return score


def compare(name: str, catalog: Catalog, folder: Path, rounds: int, subset: int) -> None:
    started = time.monotonic()
    index = retrievers.open("bm25", catalog, folder / "bm25", **PLAIN)
    say(f"bm25 index: {time.monotonic() - started:.0f} s, {size(folder / 'bm25') / 1e6:.0f} MB")
    started = time.monotonic()
    retrievers.open("lucene", catalog, folder / "lucene", whitespace=True)
    say(f"lucene index: {time.monotonic() - started:.0f} s, {size(folder / 'lucene') / 1e6:.0f} MB")
    search = reference(folder / "lucene" / "lucene")
    scorer = Scorer(lambda text, _: Action(text, text), index, rewards.from_spec({f"ndcg@{DEPTH}": 1.0}))
    rng = np.random.default_rng(1)
    pool = " ".join(catalog.texts[i] for i in rng.integers(0, len(catalog), 2000).tolist()).split()
    say(
        f"\n{name}: {len(catalog):,} documents, {PROMPTS} x {GROUP} completions, k = {DEPTH}, median of {rounds} rounds"
    )
    say(f"{'words':>5}  {'ours/s':>9}  {'reference/s':>11}  {'ratio (rounds)':<28}  {'384 rewards':>11}  agree")
    for length in LENGTHS:
        texts, targets = completions(catalog, length, pool, rng)
        ask = ([*texts], ["q"] * len(texts), [[t] for t in targets], [[1.0]] * len(texts))
        scorer.score(*ask)  # compiled and in memory, as from a run's second step on
        for text, target in list(zip(texts, targets, strict=True))[:5]:
            search(text, target)
        ours, theirs, agree = [], [], 1.0
        for number in range(rounds):
            started = time.perf_counter()
            scored = scorer.score(*ask)
            ours.append(len(texts) / (time.perf_counter() - started))
            chosen = np.random.default_rng(number).choice(len(texts), min(subset, len(texts)), replace=False)
            started = time.perf_counter()
            got = [search(texts[i], targets[i]) for i in chosen]
            theirs.append(len(got) / (time.perf_counter() - started))
            agree = float(np.mean(np.abs(scored.rewards[chosen] - got) < 0.02))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        shown = f"{statistics.median(ratios):.0f}x ({', '.join(f'{r:.0f}' for r in ratios)})"
        a, b = statistics.median(ours), statistics.median(theirs)
        say(f"{length:>5}  {a:>9.0f}  {b:>11.1f}  {shown:<28}  {len(texts) / a:>9.3f} s  {agree:.0%}")


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def memory(folder: Path, catalog: Path, barrier, answers) -> None:
    """In a process of its own: what it holds once it has scored a batch."""
    catalog_ = Catalog.load(catalog)
    index = retrievers.open("bm25", catalog_, folder, **PLAIN)
    pool = " ".join(catalog_.texts[i] for i in range(500)).split()
    before = usage()
    texts, targets = completions(catalog_, 182, pool, np.random.default_rng(3))
    index.ranks([retrievers.Query(text) for text in texts], np.array(targets)[:, None])
    barrier.wait()  # both hold theirs now
    answers.put({key: (usage()[key], before[key]) for key in ("Rss", "Pss")})
    barrier.wait()


def usage() -> dict[str, float]:
    """MB of this process: resident, and its proportional share of what it shares (Linux)."""
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
    parser.add_argument("--reference", type=int, default=48, help="completions of the reference arm a round")
    parser.add_argument("--folder", type=Path, default=config.cache_folder() / "benchmark", help="indexes, kept")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--queries", type=int, default=PROMPTS * GROUP)
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    args = parser.parse_args()
    if args.dense:
        dense(args.documents, args.dimension, args.queries, args.rounds, args.device)
        return
    folder = args.folder / f"synthetic-{args.documents}"
    compare("synthetic", synthetic(args.documents, folder / "catalog"), folder, args.rounds, args.reference)
    if Path("/proc/self/smaps_rollup").exists():
        measure_memory(folder / "bm25", folder / "catalog")
    compare("emoji", real(args.folder / "emoji" / "catalog"), args.folder / "emoji", args.rounds, args.reference)


if __name__ == "__main__":
    main()
