"""Is the dimension of embeddings what limits an encoder on LIMIT-small, or what the embeddings are aligned with?

    python tests/benchmarks/limit.py --data FOLDER

FOLDER holds corpus.jsonl, queries.jsonl and qrels.jsonl of LIMIT-small (google-deepmind/limit): 46 documents, and 1,000
queries with two relevant ones each, which are all pairs of 45 or 46 documents. For each dimension d it prints the
recall@2 of

- free embeddings: one free vector per query and per document, which gradient descent fits to these very judgments. If
  they reach 1, then d dimensions can hold the judgments, whatever an encoder does with them;
- an encoder (MiniLM), whose embeddings are projected onto their first d principal components;
- BM25, which has no dimension.

Free embeddings are fitted on what they are tested with, as in the paper on LIMIT (arXiv:2508.21038, its abstract). They
say what is possible in d dimensions, not what an encoder could learn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import retrievers
from rec_r1.evaluation.significance import bootstrap
from retrievers import Query

DIMENSIONS = (2, 3, 4, 5, 6, 8, 12)
K = 2


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def recalls(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(Q, n) scores and (Q, n) bool -> (Q,) recall@`K`."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    return np.asarray(np.take_along_axis(relevant, best, axis=1).sum(axis=1) / relevant.sum(axis=1))


def free(relevant: np.ndarray, dimension: int, seed: int, steps: int) -> np.ndarray:
    """(Q, n) scores of free unit vectors, fitted to ``relevant`` by cross-entropy over the documents, with a learned
    temperature, by Adam."""
    torch.manual_seed(seed)
    wanted = torch.from_numpy(relevant / relevant.sum(axis=1, keepdims=True)).float()
    queries, documents = (torch.nn.Parameter(torch.randn(size, dimension)) for size in relevant.shape)
    scale = torch.nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.Adam([queries, documents, scale], lr=0.02)

    def scores() -> torch.Tensor:
        a, b = (torch.nn.functional.normalize(each, dim=1) for each in (queries, documents))
        return a @ b.T * scale.exp()

    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores(), wanted).backward()
        optimizer.step()
    return np.asarray(scores().detach())


def projected(vectors: np.ndarray, documents: int, dimension: int) -> np.ndarray:
    """(Q, n) inner products of unit vectors that are projected onto ``dimension`` principal components of all.

    vectors: (n + Q, D), the documents first.
    """
    centred = vectors - vectors.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    short = centred @ axes[:dimension].T
    short /= np.linalg.norm(short, axis=1, keepdims=True)
    return np.asarray(short[documents:] @ short[:documents].T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of LIMIT-small")
    parser.add_argument("--encoder", default="all-minilm-l6-v2", help="the encoder (all-minilm-l6-v2)")
    parser.add_argument("--seeds", type=int, default=3, help="fits of the free embeddings (3)")
    parser.add_argument("--steps", type=int, default=1500, help="gradient steps of each (1500)")
    args = parser.parse_args()

    records = [{"id": row["_id"], "text": row["text"]} for row in lines(args.data / "corpus.jsonl")]
    catalog = retrievers.Catalog.from_records(records)
    asked = {row["_id"]: row["text"] for row in lines(args.data / "queries.jsonl")}
    place = {name: q for q, name in enumerate(asked)}
    relevant = np.zeros((len(asked), len(catalog)), bool)
    for row in lines(args.data / "qrels.jsonl"):
        relevant[place[row["query-id"]], catalog.rows([row["corpus-id"]])[0]] = True

    def shown(values: np.ndarray) -> str:
        found = bootstrap(values)
        return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"

    queries = [Query(text) for text in asked.values()]
    targets = np.array([np.flatnonzero(row) for row in relevant], np.int32)
    for kind, params in (("bm25", {}), ("dense", {"model": args.encoder})):
        ranks = retrievers.open(kind, catalog, **params).ranks(queries, targets)
        print(f"{kind}: recall@{K} {shown(((ranks > 0) & (ranks <= K)).mean(axis=1))}")

    everything = retrievers.Catalog.from_records(
        [*records, *({"id": f"query {name}", "text": text} for name, text in asked.items())]
    )
    vectors = np.asarray(retrievers.open("dense", everything, model=args.encoder).embeddings, np.float64)
    print(f"\n| d | free embeddings, {args.seeds} fits | {args.encoder}, first d components |\n|---|---|---|")
    for dimension in tqdm(DIMENSIONS, "dimensions", leave=False):
        fits = [recalls(free(relevant, dimension, seed, args.steps), relevant).mean() for seed in range(args.seeds)]
        ours = recalls(projected(vectors, len(catalog), dimension), relevant)
        print(f"| {dimension} | {min(fits):.3f} to {max(fits):.3f} | {shown(ours)} |")
    print(
        f"| {vectors.shape[1]} | – | {shown(recalls(projected(vectors, len(catalog), vectors.shape[1]), relevant))} |"
    )


if __name__ == "__main__":
    main()
