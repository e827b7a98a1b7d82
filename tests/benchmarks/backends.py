"""Measures the queries per second of every backend, on the bundled catalogue or on one of yours.

    python tests/benchmarks/backends.py
    python tests/benchmarks/backends.py --catalog items.jsonl.gz      # lines with id, title, description
    python tests/benchmarks/backends.py --synthetic 100000 --only bm25 tantivy lucene      # documents of 60 terms

*ranks* is the call behind a reward, with --queries (384) distinct queries of 15 words and one target each. *search*
returns ten hits per query. Every round has new queries, so that caches and stored embeddings do not help. The table
shows the median of --rounds rounds. *opensearch* is measured on the cluster at $REC_R1_OPENSEARCH_URL, which keeps the
index.

With --lsa, encoding takes almost no time, so that the search of a large index is measured and not its encoder.

The cross-encoder of `rerank` has the size of MiniLM and random weights, which are as fast as trained ones.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from corpora import synthetic  # noqa: E402

import retrievers  # noqa: E402
from rec_r1 import config, tasks  # noqa: E402
from retrievers import Catalog, Query  # noqa: E402
from retrievers.encoders import lsa  # noqa: E402

WORDS, PORT = 15, 18_077
BACKENDS = {
    "bm25": ("bm25", {}),
    "tantivy": ("tantivy", {}),
    "lucene": ("lucene", {}),
    "dense (exact)": ("dense", {}),
    "dense (faiss Flat)": ("dense", {"engine": "faiss"}),
    "dense (faiss HNSW32)": ("dense", {"engine": "faiss", "factory": "HNSW32", "tune": "efSearch=128"}),
    "late": ("late", {}),
    "hybrid (bm25 + dense)": ("hybrid", {}),
    "rerank (bm25, m = 20)": ("rerank", {"m": 20}),
    "milvus (Lite, text)": ("milvus", {}),
    "milvus (Lite, dense)": ("milvus", {"mode": "dense"}),
    "postgres (text)": ("postgres", {}),
    "postgres (vector)": ("postgres", {"mode": "vector"}),
    "postgres (hybrid)": ("postgres", {"mode": "hybrid"}),
    "remote (bm25)": ("remote", {"url": f"http://127.0.0.1:{PORT}"}),
    "opensearch": ("opensearch", {"url": os.environ.get("REC_R1_OPENSEARCH_URL")}),
}


def load(path: Path | None) -> Catalog:
    if path is None:
        return tasks.load(config.load("quickstart").task).catalog
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    return Catalog.from_records(
        {"id": item["id"], "title": item["title"], "text": f"{item['title']} {item.get('description', '')}"}
        for item in items
    )


def batch(pool: list[str], rng: np.random.Generator, queries: int) -> list[Query]:
    return [Query(" ".join(rng.choice(pool, WORDS))) for _ in range(queries)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", type=Path)
    parser.add_argument("--synthetic", type=int, help="the number of documents, of terms that follow Zipf's law")
    parser.add_argument("--lsa", action="store_true", help="encode by latent semantic analysis, in 384 dimensions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queries", type=int, default=384, help="queries of a batch (384); fewer for slow backends")
    parser.add_argument("--only", nargs="+", choices=BACKENDS, default=list(BACKENDS), metavar="NAME")
    args = parser.parse_args()
    if args.synthetic:
        with tempfile.TemporaryDirectory() as folder:
            catalog = synthetic(args.synthetic, Path(folder) / "catalog")
    else:
        catalog = load(args.catalog)
    rng = np.random.default_rng(0)
    pool = " ".join(catalog.texts[i] for i in rng.integers(0, len(catalog), 1000).tolist()).split()
    print(f"{len(catalog):,} documents, {args.queries} queries of {WORDS} words, median of {args.rounds} rounds")
    print(f"{'backend':<24}{'ranks/s':>10}{'search/s':>10}{'build s':>10}{'MB':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = {"model": str(lsa.fit(catalog.texts, Path(folder) / "lsa", 384))} if args.lsa else {}
        for name in args.only:
            kind, params = BACKENDS[name]
            encodes = kind == "dense" or params.get("mode") in ("vector", "hybrid", "dense")
            measure(name, kind, params | (model if encodes else {}), catalog, pool, args.rounds, args.queries)


def random_cross_encoder(folder: Path) -> Path:
    """A cross-encoder with the shape and the tokenizer of MiniLM, saved in ``folder``."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from retrievers.encoders.files import resolve

    encoder = resolve("all-minilm-l6-v2")
    config = AutoConfig.from_pretrained(encoder, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


def measure(name: str, kind: str, params: dict, catalog: Catalog, pool: list[str], rounds: int, size: int) -> None:
    server = None
    if kind == "opensearch" and params["url"] is None:
        return
    if kind == "postgres":
        from postgres_server import shared_database  # A server of this process, on this machine.

        params = params | {"url": shared_database()}
    if kind == "remote":
        if len(catalog) != 1854:
            return  # `rec-r1 serve` serves the catalogue of a recipe, here the bundled one.
        command = [sys.executable, "-m", "rec_r1.cli", "serve", "quickstart", "--port", str(PORT)]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert server.stdout is not None
        while "http://" not in server.stdout.readline():
            assert server.poll() is None, "rec-r1 serve ended"
    try:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as model:
            if kind == "rerank":
                params = params | {"model": str(random_cross_encoder(Path(model)))}
            started = time.perf_counter()
            retriever = retrievers.open(kind, catalog, Path(folder) / "index", **params)
            built = time.perf_counter() - started
            stored = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6
            rng = np.random.default_rng(1)
            targets = rng.integers(0, len(catalog), (size, 1))
            retriever.ranks(batch(pool, rng, size), targets)  # Not timed: it compiles loops, loads models and connects.
            retriever.search(batch(pool, rng, size), 10)
            ranks, searches = [], []
            for _ in range(rounds):
                queries = batch(pool, rng, size)
                started = time.perf_counter()
                retriever.ranks(queries, targets)
                ranks.append(size / (time.perf_counter() - started))
                queries = batch(pool, rng, size)
                started = time.perf_counter()
                retriever.search(queries, 10)
                searches.append(size / (time.perf_counter() - started))
        a, b = statistics.median(ranks), statistics.median(searches)
        print(f"{name:<24}{a:>10.0f}{b:>10.0f}{built:>10.1f}{stored:>8.1f}", flush=True)
    finally:
        if server is not None:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
