"""Write what a cross-encoder is tuned on into a folder, and run the process that tunes it.

Its negatives are documents that the inner retriever of `rerank` finds among its first m and that are not relevant: the
cross-encoder learns to order what it will be given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.progress import bar
from retrievers.core.ranking import certain_hits
from retrievers.encoders.cross import PairScorer
from retrievers.text.tuning import job
from retrievers.text.tuning.pairs import Pairs
from retrievers.text.tuning.settings import TunedCross
from retrievers.types import Query, Retriever

AT_A_TIME = 256  # Queries that are searched in one call.


def tune(
    folder: Path,
    identity: str,
    catalog: Catalog,
    scorer: PairScorer,
    tuned: TunedCross,
    data: job.Data,
    inner: Retriever,
    m: int,
) -> dict[str, Any]:
    """Tune a cross-encoder, or continue an interrupted fit.

    folder: the folder of the job. Its folder `encoder` then holds the tuned model.
    identity: a hash of everything that the fit depends on. The content of ``folder`` with another one is removed.
    catalog: the documents.
    scorer: the cross-encoder that is tuned.
    tuned: how.
    data: on what, see :func:`retrievers.text.tuning.job.data_of`.
    inner: the retriever whose first ``m`` documents are put into a new order.

    Returns the report of the fit as plain JSON. Raises the errors of :func:`retrievers.text.tuning.job.tune`, and
    RetrieverError where ``inner`` fails.
    """

    def write(temporary: Path) -> None:
        pairs = job.pairs_of(tuned, data, catalog)
        words = f"{tuned.negatives} of the first {m} documents"
        job.announce(scorer.model, tuned, data, pairs, words, folder)
        negatives = negatives_of(pairs, inner, len(catalog), m, tuned.negatives, tuned.seed)
        held_out = pairs.held_out
        asked = [Query(text, own) for text, own in zip(held_out.texts, held_out.left_out, strict=True)]
        found = _found(inner, asked, held_out.left_out, len(catalog), m)
        candidates = [rows.tolist() for rows in found]
        lists = {"candidates": candidates, "relevant": held_out.rows}
        job.write_files(temporary, identity, catalog, scorer.model, tuned, data, pairs, negatives, lists)

    return job.completed(folder, identity, scorer.model, write)


def negatives_of(pairs: Pairs, inner: Retriever, documents: int, m: int, count: int, seed: int) -> np.ndarray:
    """The negatives of X pairs: (X, ``count``) int64 rows.

    pairs: X pairs.
    inner: the retriever, which gets the text of a pair and the history before it.
    documents: n.
    m: the negatives are drawn from the first m documents that are not known to be relevant.
    seed: the seed of the draw.

    Where there are fewer than ``count``, the rest are random documents that are not known to be relevant. Raises
    ValueError where a query has no other documents.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((len(pairs), count), np.int64)
    histories = pairs.histories or [()] * len(pairs)
    asked = [Query(pairs.texts[q], tuple(h)) for q, h in zip(pairs.query.tolist(), histories, strict=True)]
    known = [pairs.known_of(pair) for pair in range(len(pairs))]
    if max(map(len, known), default=0) >= documents:
        raise ValueError(
            "retriever.params.tuned: all documents are relevant to one query or were chosen by one user, so that "
            "nothing is a negative: leave tuned out"
        )
    for pair, rows in enumerate(_found(inner, asked, known, documents, m)):
        drawn = rng.permutation(rows)[:count].tolist()
        while len(drawn) < count:
            row = int(rng.integers(documents))
            if row not in known[pair]:
                drawn.append(row)
        out[pair] = drawn
    return out


def _found(
    inner: Retriever, asked: Sequence[Query], left_out: Sequence[Any], documents: int, m: int
) -> Iterator[np.ndarray]:
    """Yield the first m rows of each query, without those that are left out."""
    with bar(len(asked), "finding candidates", "queries") as shown:
        for start in range(0, len(asked), AT_A_TIME):
            part, without = asked[start : start + AT_A_TIME], left_out[start : start + AT_A_TIME]
            depth = min(documents, m + max(map(len, without), default=0))
            for rows, own in zip(certain_hits(inner, part, depth).rows, without, strict=True):
                yield rows[(rows >= 0) & ~np.isin(rows, own)][:m].astype(np.int64)
            shown.update(len(part))
