"""How far the similarity of texts is from what people choose together. Pure functions over arrays; n items, P pairs.

X is the (U, n) matrix of choices. Co-consumption is the cosine of two items' columns of X, as in item-based
neighbourhood models (Sarwar et al. 2001). Every figure stands beside what it becomes when the texts are dealt to the
items at random, `PERMUTATIONS` times: pairs are not independent of each other, so that the usual standard errors do not
hold, and the permutation of labels is the test that does (Mantel 1967, "The detection of disease clustering and a
generalized regression approach").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

NEIGHBOURS = 10
PAIRS = 20_000  # drawn of each sort, at most
PERMUTATIONS = 200
MAX_ITEMS_IN_MEMORY = 4_096  # For at most so many items all similarities are kept, in 67 MB.
TRIES = 30  # draws for a negative of the wanted popularity
WIDTH = 1.05  # a negative has at most so many times the users of what it stands for, and at least that part of them

Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (P,) and (P,) items -> (P,) float32


def similarity(embeddings: np.ndarray) -> Similarity:
    """Of (n, d) embeddings: the inner products of pairs of rows, cosines where these have unit length."""
    vectors = np.asarray(embeddings, np.float32)
    if len(vectors) <= MAX_ITEMS_IN_MEMORY:
        whole = vectors @ vectors.T
        return lambda i, j: np.asarray(whole[i, j])
    return lambda i, j: np.einsum("pd,pd->p", vectors[i], vectors[j])


def cooccurrence(x: Any) -> Any:
    """scipy CSR (U, n) of zeros and ones -> scipy CSR (n, n) float32: in how many users' choices two items meet; the
    diagonal is left out."""
    counts = (x.T @ x).tocsr().astype(np.float32)
    counts.setdiag(0)
    counts.eliminate_zeros()
    counts.sort_indices()
    return counts


def cosines(counts: Any, popularity: np.ndarray) -> Any:
    """scipy CSR (n, n) of common users and (n,) users of each item -> the cosines of the columns of X, in the same
    places: x_i . x_j / (|x_i| |x_j|)."""
    found = counts.copy()
    rows = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
    norms = np.sqrt(np.maximum(popularity, 1)).astype(np.float32)
    found.data = found.data / (norms[rows] * norms[found.indices])
    return found


def top_text(embeddings: np.ndarray, k: int, block: int = 512) -> np.ndarray:
    """(n, min(k, n - 1)) int64: each item's nearest others by inner product, best first, ties by row."""
    from retrievers.core.ranking import heads

    vectors = np.asarray(embeddings, np.float32)
    n = len(vectors)
    found = []
    for start in range(0, n, block):
        scores = vectors[start : start + block] @ vectors.T
        scores[np.arange(len(scores)), np.arange(start, start + len(scores))] = -np.inf  # nobody is one's own neighbour
        found.append(heads(scores, max(1, min(k, n - 1)), -np.inf).rows)
    return np.concatenate(found).astype(np.int64)


def top_together(cosine: Any, k: int) -> list[np.ndarray]:
    """n arrays of up to k items each: those with the largest cosine above 0, ties by row. Empty for an item that
    nobody chose together with another."""
    out = []
    for i in range(cosine.shape[0]):
        place = slice(cosine.indptr[i], cosine.indptr[i + 1])
        rows, values = cosine.indices[place], cosine.data[place]
        out.append(rows[np.lexsort((rows, -values))[:k]].astype(np.int64))
    return out


class Keys:
    """A set of ordered pairs of n items, asked for many at a time."""

    def __init__(self, n: int, i: np.ndarray, j: np.ndarray) -> None:
        self._n, self._keys = n, np.unique(i.astype(np.int64) * n + j)

    def has(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """(...,) bool, whether each pair is in the set."""
        asked = i.astype(np.int64) * self._n + j
        if not len(self._keys):
            return np.zeros(asked.shape, bool)
        place = np.minimum(np.searchsorted(self._keys, asked), len(self._keys) - 1)
        return np.asarray(self._keys[place] == asked)


def together(counts: Any) -> Keys:
    """The ordered pairs that some user chose both of."""
    return Keys(counts.shape[0], np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr)), counts.indices)


def overlap(text: np.ndarray, lists: list[np.ndarray]) -> Callable[[np.ndarray], float]:
    """overlap@k of two sorts of neighbours: the mean over items with a co-consumption neighbour of
    |T_i ∩ C_i| / |C_i|, with T_i of (n, k) ``text`` and C_i, up to k of them, of ``lists``.

    Returns a function of (n,) labels: the text neighbours are those of a catalogue whose item i is called labels[i].
    """
    n, sizes = len(lists), np.array([len(each) for each in lists])
    near = Keys(n, np.repeat(np.arange(n), sizes), np.concatenate(lists) if sizes.sum() else np.zeros(0, np.int64))

    def statistic(labels: np.ndarray) -> float:
        items = np.broadcast_to(labels[:, None], text.shape)
        hits = near.has(items, labels[text]).sum(axis=1)
        known = sizes[labels] > 0
        return float((hits[known] / sizes[labels][known]).mean()) if known.any() else float("nan")

    return statistic


def apart(text: np.ndarray, met: Keys) -> Callable[[np.ndarray], float]:
    """The share of (n, k) ``text`` neighbours that nobody chose together with their item; a function of labels, as
    :func:`overlap`'s."""

    def statistic(labels: np.ndarray) -> float:
        return float(1 - met.has(np.broadcast_to(labels[:, None], text.shape), labels[text]).mean())

    return statistic


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """Spearman's rank correlation of two (P,) arrays, tied values at their mean rank; NaN where one is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(one), rankdata(two)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The chance that a positive's score is above a negative's, ties counting half: the Mann-Whitney U over P N
    (Hanley & McNeil 1982). NaN where one of them is empty."""
    from scipy.stats import rankdata

    p, n = len(positive), len(negative)
    if not p or not n:
        return float("nan")
    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[:p].sum() - p * (p + 1) / 2) / (p * n))


def met_pairs(counts: Any, rng: np.random.Generator, most: int = PAIRS) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j that some user chose both of: all of them, or ``most`` drawn without replacement."""
    from scipy.sparse import triu

    upper = triu(counts, 1).tocoo()
    i, j = upper.row.astype(np.int64), upper.col.astype(np.int64)
    if len(i) > most:
        drawn = np.sort(rng.choice(len(i), most, replace=False))
        i, j = i[drawn], j[drawn]
    return i, j


def any_pairs(n: int, rng: np.random.Generator, most: int = PAIRS) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j of n items: all of them, or ``most`` drawn evenly, each for itself (one may come twice)."""
    if n * (n - 1) // 2 <= most:
        i, j = np.triu_indices(n, 1)
        return i.astype(np.int64), j.astype(np.int64)
    i, j = rng.integers(0, n, most), rng.integers(0, n - 1, most)
    j = j + (j >= i)
    return np.minimum(i, j), np.maximum(i, j)


def matched_negatives(
    i: np.ndarray, j: np.ndarray, popularity: np.ndarray, met: Keys, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For pairs that met, pairs that never did and are as popular: of each (i, j) one end is kept, and the other
    becomes an item of as many users, within a factor of `WIDTH`, that nobody chose together with the kept one. Below
    20 users that is the same number.

    Without it an AUC would measure that popular items meet. A wide class would not do: of its items the popular ones
    are those that met. Which end is kept is drawn. Returns (P,) kept, (P,) replacement, (P,) bool: False where `TRIES`
    draws found none (an item that met all of these).
    """
    swap = rng.random(len(i)) < 0.5
    kept, other = np.where(swap, j, i), np.where(swap, i, j)
    order = np.argsort(popularity, kind="stable")
    ordered, wanted = popularity[order].astype(np.float64), popularity[other].astype(np.float64)
    first = np.searchsorted(ordered, wanted / WIDTH, side="left")
    sizes = np.searchsorted(ordered, wanted * WIDTH, side="right") - first
    found, replacement = np.zeros(len(i), bool), other.copy()
    for _ in range(TRIES):
        left = np.flatnonzero(~found)
        if not len(left):
            break
        drawn = order[first[left] + (rng.random(len(left)) * sizes[left]).astype(np.int64)]
        good = (drawn != kept[left]) & ~met.has(kept[left], drawn)
        replacement[left[good]] = drawn[good]
        found[left[good]] = True
    return kept, replacement, found


def null(
    statistic: Callable[[np.ndarray], float], n: int, rng: np.random.Generator, permutations: int = PERMUTATIONS
) -> dict[str, float]:
    """A statistic of labels as it is (value), and over random permutations of them: mean, low and high (2.5% and
    97.5%)."""
    drawn = np.array([statistic(rng.permutation(n)) for _ in range(permutations)])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {
        "value": statistic(np.arange(n)),
        "null_mean": float(drawn.mean()),
        "null_low": float(low),
        "null_high": float(high),
    }


def of_pairs(near: Similarity, i: np.ndarray, j: np.ndarray, values: np.ndarray) -> Callable[[np.ndarray], float]:
    """Spearman's correlation of text similarity with (P,) ``values`` over pairs; a function of labels."""
    return lambda labels: spearman(near(labels[i], labels[j]), values)


def at_pairs(rows: Iterator[tuple[int, np.ndarray]], i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(P,) entries (i, j) of an (n, n) matrix that comes as blocks of rows, (first row, (m, n)). NaN: not in any."""
    out = np.full(len(i), np.nan)
    for start, block in rows:
        here = np.flatnonzero((i >= start) & (i < start + len(block)))
        out[here] = block[i[here] - start, j[here]]
    return out


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def measure(embeddings: np.ndarray, x: Any, weights: Any = None, seed: int = 0) -> dict[str, Any]:
    """Everything above for one encoder. embeddings: (n, d) of unit length. x: scipy CSR (U, n) of zeros and ones.
    weights: a function of () -> blocks of rows of EASE's B, or None.

    Items that nobody chose are left out: their cosine does not exist. All draws depend on ``seed`` alone, so that
    encoders are measured on the same pairs. users_met and users_matched are the mean users of the two sides of the
    AUC: of what met the kept item, and of what stands for it; NaN where no pair is matched. Raises ValueError where
    fewer than three items were chosen or none met.
    """
    popularity = np.asarray((x > 0).sum(axis=0)).ravel()
    known = np.flatnonzero(popularity)
    counts = cooccurrence(x.tocsc()[:, known].tocsr())
    if len(known) < 3 or not counts.nnz:
        raise ValueError("no two items were chosen by one user: there is no co-consumption to compare texts with")
    users, cosine, met = popularity[known], cosines(counts, popularity[known]), together(counts)
    n, rng = len(known), np.random.default_rng(seed)
    near, vectors = similarity(embeddings[known]), np.asarray(embeddings[known], np.float32)
    pairs = {"met": met_pairs(counts, rng), "any": any_pairs(n, rng)}
    kept, other, found = matched_negatives(*pairs["met"], users, met, rng)
    one, two = (end[found] for end in pairs["met"])
    replaced = pairs["met"][0] + pairs["met"][1] - kept  # the end that is not kept
    text, lists = top_text(vectors, NEIGHBOURS), top_together(cosine, NEIGHBOURS)
    statistics: dict[str, Callable[[np.ndarray], float]] = {
        "overlap": overlap(text, lists),
        "apart": apart(text, met),
        "auc": lambda labels: auc(near(labels[one], labels[two]), near(labels[kept[found]], labels[other[found]])),
    }
    for sort, (i, j) in pairs.items():
        statistics[f"cosine_{sort}"] = of_pairs(near, i, j, np.asarray(cosine[i, j]).ravel())
        if weights is not None:
            both = at_pairs(weights(), known[i], known[j]) + at_pairs(weights(), known[j], known[i])
            statistics[f"ease_{sort}"] = of_pairs(near, i, j, both / 2)
    found_pairs = {"items": n, "met_pairs": len(pairs["met"][0]), "any_pairs": len(pairs["any"][0])}
    return {
        **found_pairs,
        "all_met_pairs": counts.nnz // 2,
        "share_met": counts.nnz / (n * (n - 1)),
        "matched_pairs": int(found.sum()),
        "matched_share": float(found.mean()),
        "users_met": _mean(users[replaced[found]]),
        "users_matched": _mean(users[other[found]]),
        "listed": sum(len(each) > 0 for each in lists),
        "neighbours": text.shape[1],
        "measures": {name: null(each, n, rng) for name, each in statistics.items()},
    }
