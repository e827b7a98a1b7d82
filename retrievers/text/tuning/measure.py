"""The metric by which the epoch of a tuned model is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrievers.core.ranking import rank
from retrievers.text.tuning.job_folder import Job

MAX_VALIDATION_QUERIES = 1000  # At most so many validation queries are ranked after an epoch, among
MAX_VALIDATION_DOCUMENTS = 20_000  # at most so many documents, the relevant ones with them.
DEPTH = 10  # The k of ndcg@k, which chooses the epoch.


def measure(job: Job, model: Any) -> float | None:
    """The mean ndcg@10 of an encoder on the validation split; None without one. All relevant documents count alike.

    Rankings leave out the history. Of a large validation split or catalogue, always the same part is taken.
    """
    if not job.held_out:
        return None
    rng = np.random.default_rng(0)
    n, chosen = len(job.documents), some(len(job.held_out), MAX_VALIDATION_QUERIES, rng)
    relevant = [job.listed("relevant", q) for q in chosen.tolist()]
    ranked = np.arange(n)
    if n > MAX_VALIDATION_DOCUMENTS:
        others = rng.choice(n, MAX_VALIDATION_DOCUMENTS, replace=False)
        ranked = np.union1d(np.concatenate(relevant), others)
    documents = _encode(job, model, [job.document(row) for row in ranked.tolist()])
    queries = _encode(job, model, [job.query(job.held_out[q]) for q in chosen.tolist()])
    total = 0.0
    for q, vector, rows in zip(chosen.tolist(), queries, relevant, strict=True):
        scores = documents @ vector
        scores[np.isin(ranked, job.listed("left_out", q))] = -np.inf
        total += ndcg(rank(scores, np.searchsorted(ranked, rows), -np.inf))
    return round(total / len(chosen), 6)


def some(count: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """The numbers 0 to ``count`` - 1, or ``most`` of them, ascending."""
    return np.arange(count) if count <= most else np.sort(rng.choice(count, most, replace=False))


def ndcg(ranks: np.ndarray) -> float:
    """ndcg@10 of one query. ranks: those of all its relevant documents, which count alike; 0 = not in the ranking."""
    gains = 1 / np.log2(1 + ranks[(ranks > 0) & (ranks <= DEPTH)])
    return float(gains.sum() / (1 / np.log2(np.arange(2, 2 + min(len(ranks), DEPTH)))).sum())


def _encode(job: Job, model: Any, texts: list[str]) -> np.ndarray:
    vectors = model.encode(
        texts,
        batch_size=job.settings["encoder"]["batch_size"],
        normalize_embeddings=True,
        convert_to_numpy=True,
        show_progress_bar=False,
    )
    return np.asarray(vectors, np.float32)
