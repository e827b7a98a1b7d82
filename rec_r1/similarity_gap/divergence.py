"""How far the similarity of texts is from what users choose together. Pure functions over arrays.

Shapes: U users, n items, d dimensions, k neighbours, P pairs of items. X is the (U, n) matrix of choices. Two items met
if some user chose both. Co-consumption is the cosine of two items' columns of X, as in item-based neighbourhood models
(Sarwar et al. 2001).

Every statistic is reported with its null distribution: its values when the texts are assigned to the items at random,
`PERMUTATIONS` times. Pairs are not independent of each other, so the usual standard errors do not hold, and a
permutation of the labels is the valid test (Mantel 1967, "The detection of disease clustering and a generalized
regression approach").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

NEIGHBOURS = 10
PAIRS = 20_000  # The largest number of pairs of each sort. More are sampled.
PERMUTATIONS = 200
MAX_ITEMS_IN_MEMORY = 4_096  # For at most so many items all similarities are kept, in 67 MB.
TRIES = 30  # How many negatives of the wanted popularity are drawn before a pair is left out.
WIDTH = 1.05  # The largest ratio between the numbers of users of a negative and of the item that it replaces.

Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (P,) and (P,) items -> (P,) float32


def similarity(embeddings: np.ndarray) -> Similarity:
    """The function that returns the inner products of pairs of rows of (n, d) embeddings. With rows of unit length
    these are cosines."""
    vectors = np.asarray(embeddings, np.float32)
    if len(vectors) <= MAX_ITEMS_IN_MEMORY:
        whole = vectors @ vectors.T
        return lambda i, j: np.asarray(whole[i, j])
    return lambda i, j: np.einsum("pd,pd->p", vectors[i], vectors[j])


def cooccurrence(x: Any) -> Any:
    """scipy CSR (U, n) of zeros and ones -> scipy CSR (n, n) float32: how many users chose both items. The diagonal is
    left out."""
    counts = (x.T @ x).tocsr().astype(np.float32)
    counts.setdiag(0)
    counts.eliminate_zeros()
    counts.sort_indices()
    return counts


def cosines(counts: Any, popularity: np.ndarray) -> Any:
    """The cosines of the columns of X, x_i . x_j / (|x_i| |x_j|), as scipy CSR (n, n).

    counts: scipy CSR (n, n), how many users chose both items.
    popularity: (n,) how many users chose each item.
    """
    found = counts.copy()
    rows = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
    norms = np.sqrt(np.maximum(popularity, 1)).astype(np.float32)
    found.data = found.data / (norms[rows] * norms[found.indices])
    return found


def top_text(embeddings: np.ndarray, k: int, block: int = 512) -> np.ndarray:
    """(n, min(k, n - 1)) int64: the nearest other items of each item, by inner product, best first, ties by row.

    embeddings: (n, d).
    k: the number of neighbours.
    block: how many items are compared at once.
    """
    from retrievers.core.ranking import heads

    vectors = np.asarray(embeddings, np.float32)
    n = len(vectors)
    found = []
    for start in range(0, n, block):
        scores = vectors[start : start + block] @ vectors.T
        scores[
            np.arange(len(scores)), np.arange(start, start + len(scores))
        ] = -np.inf  # An item is not its own neighbour.
        found.append(heads(scores, max(1, min(k, n - 1)), -np.inf).rows)
    return np.concatenate(found).astype(np.int64)


def top_together(cosine: Any, k: int) -> list[np.ndarray]:
    """n arrays of up to k items each: those with the largest cosine above 0, ties by row. The array of an item that met
    no other is empty.

    cosine: scipy CSR (n, n), see :func:`cosines`.
    k: the number of neighbours.
    """
    out = []
    for i in range(cosine.shape[0]):
        place = slice(cosine.indptr[i], cosine.indptr[i + 1])
        rows, values = cosine.indices[place], cosine.data[place]
        out.append(rows[np.lexsort((rows, -values))[:k]].astype(np.int64))
    return out


class Keys:
    """A set of ordered pairs (i, j) of n items, which answers for many pairs at once."""

    def __init__(self, n: int, i: np.ndarray, j: np.ndarray) -> None:
        self._n, self._keys = n, np.unique(i.astype(np.int64) * n + j)

    def has(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """(...,) bool: whether each pair of (...,) ``i`` and ``j`` is in the set."""
        asked = i.astype(np.int64) * self._n + j
        if not len(self._keys):
            return np.zeros(asked.shape, bool)
        place = np.minimum(np.searchsorted(self._keys, asked), len(self._keys) - 1)
        return np.asarray(self._keys[place] == asked)


def together(counts: Any) -> Keys:
    """The ordered pairs that met. counts: see :func:`cooccurrence`."""
    return Keys(counts.shape[0], np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr)), counts.indices)


def overlap(text: np.ndarray, lists: list[np.ndarray]) -> Callable[[np.ndarray], float]:
    """overlap@k of the text neighbours T and the co-consumption neighbours C: the mean of |T_i ∩ C_i| / |C_i| over the
    items i with a co-consumption neighbour.

    text: (n, k) the text neighbours of each item.
    lists: n arrays of up to k co-consumption neighbours.

    Returns a function of (n,) labels, which gives the value when text i is assigned to item labels[i].
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
    """The share of (n, k) ``text`` neighbours that never met their item; a function of labels, see :func:`overlap`.
    met: see :func:`together`."""

    def statistic(labels: np.ndarray) -> float:
        return float(1 - met.has(np.broadcast_to(labels[:, None], text.shape), labels[text]).mean())

    return statistic


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """Spearman's rank correlation of two (P,) arrays. Tied values get their mean rank. NaN if one array is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(one), rankdata(two)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The probability that the score of a positive is above that of a negative, where a tie counts half.

    It is the Mann-Whitney U divided by the number of pairs (Hanley & McNeil 1982). NaN if one of the arrays is empty.
    """
    from scipy.stats import rankdata

    p, n = len(positive), len(negative)
    if not p or not n:
        return float("nan")
    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[:p].sum() - p * (p + 1) / 2) / (p * n))


def met_pairs(counts: Any, rng: np.random.Generator, most: int = PAIRS) -> tuple[np.ndarray, np.ndarray]:
    """The pairs i < j that met: all of them, or ``most`` drawn without replacement."""
    from scipy.sparse import triu

    upper = triu(counts, 1).tocoo()
    i, j = upper.row.astype(np.int64), upper.col.astype(np.int64)
    if len(i) > most:
        drawn = np.sort(rng.choice(len(i), most, replace=False))
        i, j = i[drawn], j[drawn]
    return i, j


def any_pairs(n: int, rng: np.random.Generator, most: int = PAIRS) -> tuple[np.ndarray, np.ndarray]:
    """The pairs i < j of n items: all of them, or ``most`` drawn uniformly with replacement."""
    if n * (n - 1) // 2 <= most:
        i, j = np.triu_indices(n, 1)
        return i.astype(np.int64), j.astype(np.int64)
    i, j = rng.integers(0, n, most), rng.integers(0, n - 1, most)
    j = j + (j >= i)
    return np.minimum(i, j), np.maximum(i, j)


def matched_negatives(
    i: np.ndarray, j: np.ndarray, popularity: np.ndarray, met: Keys, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pair that met, a pair that never met and is as popular.

    One end of the pair, drawn at random, is kept. The other is replaced by an item that never met the kept one and has
    as many users, within a factor of `WIDTH`; below 20 users that is the same number.

    i, j: (P,) the pairs that met.
    popularity: (n,) how many users chose each item.
    met: see :func:`together`.
    rng: makes the draws.

    Returns (P,) kept items, (P,) their new partners, and (P,) bool: False if `TRIES` draws found no partner.

    Without the matching, the AUC would measure that popular items meet more often. Wider classes of popularity do not
    suffice: among the items of a class, the more popular ones are those that met.
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
    """A statistic and its null distribution.

    statistic: a function of (n,) labels.
    n: the number of items.
    rng: draws the permutations.
    permutations: how many random permutations of the labels are drawn.

    Returns value, of the labels as they are, and null_mean, null_low (2.5%) and null_high (97.5%) of the permutations.
    """
    drawn = np.array([statistic(rng.permutation(n)) for _ in range(permutations)])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {
        "value": statistic(np.arange(n)),
        "null_mean": float(drawn.mean()),
        "null_low": float(low),
        "null_high": float(high),
    }


def of_pairs(near: Similarity, i: np.ndarray, j: np.ndarray, values: np.ndarray) -> Callable[[np.ndarray], float]:
    """Spearman's correlation of the text similarity of pairs with (P,) ``values``, as a function of labels, see
    :func:`overlap`."""
    return lambda labels: spearman(near(labels[i], labels[j]), values)


def at_pairs(rows: Iterator[tuple[int, np.ndarray]], i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(P,) entries (i, j) of an (n, n) matrix. NaN for an entry that is in no block.

    rows: blocks of the matrix, each (first row, (m, n) array).
    i, j: (P,) places.
    """
    out = np.full(len(i), np.nan)
    for start, block in rows:
        here = np.flatnonzero((i >= start) & (i < start + len(block)))
        out[here] = block[i[here] - start, j[here]]
    return out


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def measure(embeddings: np.ndarray, x: Any, weights: Any = None, seed: int = 0) -> dict[str, Any]:
    """Measure one encoder.

    embeddings: (n, d), of unit length.
    x: scipy CSR (U, n) of zeros and ones, the choices.
    weights: a function that returns EASE's B as blocks of rows, see :func:`at_pairs`. None = without B.
    seed: of all draws, so that all encoders are measured on the same pairs.

    Returns the counts, and in "measures" every statistic with its null distribution. users_met and users_matched are
    the mean numbers of users of the replaced items and of the items that replace them; NaN if no pair is matched. Items
    that nobody chose are left out, because their cosine does not exist.

    Raises ValueError if fewer than three items were chosen, or no two items met.
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
    replaced = pairs["met"][0] + pairs["met"][1] - kept  # The end that is not kept.
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
