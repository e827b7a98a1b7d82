"""What the tests of `lucene` and `tantivy` share: a small catalogue, and the comparison of their ranks with those of
`bm25`. Both store the length of a document in one byte, which is exact for up to 40 terms."""

import numpy as np

from retrievers import Catalog, Query

TEXTS = ["party popper", "sad face", "party face", "party face", "castle", "tada!", "", "running shoes"]


def make_catalog(texts=TEXTS, prefix="d") -> Catalog:
    return Catalog.from_records({"id": f"{prefix}{i}", "text": text} for i, text in enumerate(texts))


def long_documents() -> tuple[Catalog, list[Query]]:
    """2,000 documents of 50 to 400 terms, whose lengths are rounded, and 100 queries."""
    rng = np.random.default_rng(0)
    words, chance = np.array([f"w{i}" for i in range(2000)]), 1 / np.arange(1, 2001)
    chance /= chance.sum()
    catalog = make_catalog([" ".join(rng.choice(words, n, p=chance)) for n in rng.integers(50, 400, 2000)])
    return catalog, [Query(" ".join(rng.choice(words, 4, p=chance))) for _ in range(100)]


def rank_correlations(first, second, queries) -> list[float]:
    """Spearman's correlation of the ranks of documents that both retrieve, for queries with more than two of them."""
    n, out = len(first), []
    for query in queries:
        one, two = ([row for row in r.search([query], n).rows[0].tolist() if row >= 0] for r in (first, second))
        assert set(one) == set(two)
        if len(one) > 2:
            place = {row: i for i, row in enumerate(two)}
            out.append(float(np.corrcoef(range(len(one)), [place[row] for row in one])[0, 1]))
    print(f"{len(out)} queries, mean {np.mean(out):.6f}, least {min(out):.6f}")
    return out
