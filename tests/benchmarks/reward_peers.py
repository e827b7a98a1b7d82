"""The other libraries that reward.py compares with, the peers. Each is called in the fastest way that we know.

Every arm gets the texts of the completions and their targets, and returns the ndcg@1000 of each, from the ids that its
library returns for k = 1000. Building the index is not timed; splitting queries into terms is. All arms index the same
terms, split at white space, without stemming and stop words, and score with k1 = 1.2 and b = 0.75, the constants of
tantivy.

  reference     pyserini, one search per completion on one thread, as in the paper's released code
  batch_search  pyserini's LuceneSearcher.batch_search, on all cores
  bm25s         bm25s.retrieve with its numba backend, the whole batch on all cores, with the arrays that `bm25` stores
  tantivy       one search per completion, without counting all matches, on as many threads as there are cores; a word
                that a query repeats is one term with a boost, as in pyserini, which is up to twice as fast

Ids are read only up to the target. Our arm orders equal scores by the row of the document. Another arm may give another
ndcg for these reasons:

  reference, batch_search   Equal scores are ordered by the id as a string, so that "10" comes before "9". Short queries
                            over documents of one length have hundreds of equal scores. Lucene stores the length of a
                            document in one byte, which is exact for up to 40 terms and for the 60 of synthetic ones.
  bm25s                     Equal scores have a random order, also at the cut after the 1,000th hit. The float32 scores
                            of the terms are added in the order of the query, and not in one order for all queries.
  tantivy                   Equal scores have our order. Lengths are stored in one byte, as in Lucene.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import retrievers
from retrievers import Catalog, RetrieverError
from retrievers.core.numba_threads import threads

DEPTH = 1000
Arm = Callable[[list[str], list[int]], list[float]]  # It takes texts and targets, and returns the ndcg@1000 of each.


class Peer(NamedTuple):
    open: Callable[[Catalog, Path], Arm]  # It takes the catalogue and the folder for indexes.
    install: str


def ndcg(ids: Iterable[Any], target: Any) -> float:
    """The ndcg of a ranking with one relevant document: 1 / log2(rank + 1), or 0 where it is not among the ids."""
    return next((1 / math.log2(rank + 1) for rank, one in enumerate(ids, 1) if one == target), 0.0)


@cache
def pyserini_searcher(catalog: Catalog, folder: Path) -> Any:
    """The searcher that both arms of pyserini share."""
    retrievers.open("lucene", catalog, folder / "lucene", whitespace=True)
    os.environ.setdefault("OPENAI_API_KEY", "unused")  # Importing pyserini fails without one.
    from jnius import autoclass
    from pyserini.search.lucene import LuceneSearcher

    searcher = LuceneSearcher(str(folder / "lucene" / "lucene"))
    searcher.set_bm25(1.2, 0.75)
    searcher.set_analyzer(autoclass("org.apache.lucene.analysis.core.WhitespaceAnalyzer")())
    return searcher


def reference(catalog: Catalog, folder: Path) -> Arm:
    searcher = pyserini_searcher(catalog, folder)

    def score(texts: list[str], targets: list[int]) -> list[float]:
        return [
            ndcg((hit.docid for hit in searcher.search(text, k=DEPTH)), str(target))
            for text, target in zip(texts, targets, strict=True)
        ]

    return score


def batch_search(catalog: Catalog, folder: Path) -> Arm:
    searcher = pyserini_searcher(catalog, folder)

    def score(texts: list[str], targets: list[int]) -> list[float]:
        names = [str(i) for i in range(len(texts))]
        found = searcher.batch_search(texts, names, k=DEPTH, threads=threads())
        return [
            ndcg((hit.docid for hit in found[name]), str(target)) for name, target in zip(names, targets, strict=True)
        ]

    return score


def bm25s(catalog: Catalog, folder: Path) -> Arm:
    import bm25s
    import numba  # noqa: F401  bm25s needs it for this backend.

    retrievers.open("bm25", catalog, folder / "bm25", stemmer=None, stopwords=None)
    model = bm25s.BM25.load(folder / "bm25", load_corpus=False, show_progress=False)
    model.backend = "numba"
    k = min(DEPTH, len(catalog))

    def score(texts: list[str], targets: list[int]) -> list[float]:
        terms = [text.split() for text in texts]
        rows, scores = model.retrieve(terms, k=k, n_threads=threads(), show_progress=False)
        found = (rows == np.array(targets)[:, None]) & (scores > 0)  # bm25s may return non-matches.
        return np.where(found.any(1), 1 / np.log2(found.argmax(1) + 2), 0.0).tolist()

    return score


def tantivy(catalog: Catalog, folder: Path) -> Arm:
    import tantivy

    retrievers.open("tantivy", catalog, folder / "tantivy", stemmer=None, stopwords=None)
    index = tantivy.Index.open(str(folder / "tantivy" / "tantivy"))
    searcher, schema = index.searcher(), index.schema

    def query(text: str) -> Any:
        clauses = []
        for term, count in Counter(text.split()).items():
            one = tantivy.Query.term_query(schema, "terms0", term, "freq")
            clauses.append((tantivy.Occur.Should, tantivy.Query.boost_query(one, count) if count > 1 else one))
        return tantivy.Query.boolean_query(clauses)

    def single(text: str, target: int) -> float:
        hits = searcher.search(query(text), DEPTH, count=False).hits
        return ndcg((address.doc for _, address in hits), target)

    def score(texts: list[str], targets: list[int]) -> list[float]:
        with ThreadPoolExecutor(threads()) as pool:
            return list(pool.map(single, texts, targets))

    return score


PEERS = {
    "reference": Peer(reference, "pip install 'rec-r1[lucene]'"),
    "batch_search": Peer(batch_search, "pip install 'rec-r1[lucene]'"),
    "bm25s": Peer(bm25s, "pip install 'rec-r1[fast]'"),
    "tantivy": Peer(tantivy, "pip install 'rec-r1[tantivy]'"),
}


def open_peers(names: Iterable[str], catalog: Catalog, folder: Path, say: Callable[[str], None]) -> dict[str, Arm]:
    """The arms with these names. An arm whose package is missing is left out, and a line says how to install it."""
    opened = {}
    for name in names:
        try:
            opened[name] = PEERS[name].open(catalog, folder)
        except (ImportError, RetrieverError) as error:
            say(f"without {name} ({error}): {PEERS[name].install}")
    return opened
