"""What the linear item-item models share: scores = history @ B, with B of shape (n, n), dense or sparse.

Here are the closed form that EASE and L3AE rest on, a column's strongest entries, the files that B lies in, and the
choice of a setting on held-out histories. n documents, U users.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from retrievers.core.index_folder import read_meta
from retrievers.core.numba_threads import compiled, shared
from retrievers.core.ranking import top
from retrievers.interactions import Interactions, history_matrix
from retrievers.recommenders.fitted import Model
from retrievers.recommenders.validation import DEPTH, gain
from retrievers.types import Query

logger = logging.getLogger(__name__)
BLOCK_ENTRIES = 1 << 22  # entries of an (n, n) matrix that are worked on at a time
PROGRESS_FROM = 2_000  # documents from which on a choice of settings shows its progress
CSR_ARRAYS = ("data", "indices", "indptr")
Setting = TypeVar("Setting")


class Linear:
    """scores = history @ weights. weights: (n, n) float32, an array in C order or a scipy CSR matrix; entry (i, j) is
    what a history with document i says for document j."""

    def __init__(self, weights: Any) -> None:
        self._weights = weights

    def scores(self, queries: Sequence[Query]) -> np.ndarray:
        """(Q, n) float32. Each row is summed by itself, in the order of the catalogue, in a batch as alone."""
        return multiplied(history_matrix(queries, self._weights.shape[0]), self._weights)


def multiplied(history: Any, weights: Any) -> np.ndarray:
    """scipy CSR (Q, n) times an array or scipy CSR (n, n) -> (Q, n) float32. The sparse product is compiled where there
    is numba: scipy's collects the entries of a result that is dense in the end."""
    if isinstance(weights, np.ndarray):
        return np.asarray(history @ weights)
    from retrievers.core.kernels import products

    kernel = compiled(products)
    if kernel is None:
        return np.asarray((history @ weights).toarray())
    out = np.zeros(history.shape, np.float32)
    left, right = (history.indptr, history.indices, history.data), (weights.indptr, weights.indices, weights.data)
    shared(lambda first, last: kernel(*left, *right, out, first, last), len(out))
    return out


def save(weights: Any, folder: Path, name: str = "weights") -> None:
    """Write ``weights`` so that :func:`load` can map them: one file, or three of a CSR matrix."""
    if isinstance(weights, np.ndarray):
        np.save(folder / f"{name}.npy", weights)
        return
    for part in CSR_ARRAYS:
        np.save(folder / f"{name}.{part}.npy", getattr(weights, part))


def load(folder: Path, name: str = "weights") -> Any:
    """The memory-mapped weights in ``folder``: all processes of a node share one copy. Raises OSError, EOFError or
    ValueError for what is no (n, n) matrix of the index's n documents."""
    weights, n = _load(folder, name), int(read_meta(folder, {"documents": None})["documents"])
    if weights.shape[0] != n:
        raise ValueError(f"the weights are of {weights.shape[0]} documents instead of {n}")
    return weights


def _load(folder: Path, name: str) -> Any:
    if (folder / f"{name}.npy").is_file():
        # asarray: a product with the memmap class costs scipy a detour
        dense = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
        if dense.dtype != np.float32 or dense.ndim != 2 or dense.shape[0] != dense.shape[1]:
            raise ValueError(f"the weights are {dense.dtype} {dense.shape}, not a square of float32")
        return dense
    from scipy.sparse import csr_matrix

    data, indices, indptr = (np.asarray(np.load(folder / f"{name}.{part}.npy", mmap_mode="r")) for part in CSR_ARRAYS)
    n = len(indptr) - 1
    # scipy's compiled loops believe what they are given, and would read beyond an array's end
    whole = data.dtype == np.float32 and len(data) == len(indices) == indptr[-1] and not indptr[0]
    if not whole or (np.diff(indptr) < 0).any() or (len(indices) and not 0 <= indices.min() <= indices.max() < n):
        raise ValueError("the weights' files do not fit together")
    return csr_matrix((data, indices, indptr), (n, n), copy=False)


def opened(folder: Path) -> Linear:
    """The model that :func:`save` left in ``folder``."""
    return Linear(load(folder))


def gram(x: Any, dtype: Any = np.float64) -> np.ndarray:
    """X, scipy CSR (U, n) of zeros and ones -> X'X, (n, n) ``dtype`` in C order (float32 counts to 2^24 users exactly).

    Never sparse as a whole: as soon as half of it is filled, that takes more memory than the dense one.
    """
    from retrievers.core.kernels import pairs

    n, kernel, columns = x.shape[1], compiled(pairs), x.T.tocsr()
    out = np.zeros((n, n), dtype)
    if kernel is not None:
        x = x.sorted_indices()
        parts = columns.indptr, columns.indices, x.indptr, x.indices
        shared(lambda first, last: kernel(*parts, out, first, last), n)
    for rows in blocks(n):  # from the diagonal on: it is symmetric
        if kernel is None:
            out[rows, rows.start :] = (columns[rows] @ x[:, rows.start :]).toarray()
        mirror(out, rows)
    return out


def mirror(matrix: np.ndarray, rows: slice) -> None:
    """Fill the columns ``rows`` of a symmetric (n, n) matrix from the rows, which hold its upper triangle."""
    corner = matrix[rows, rows]
    corner[:] = np.triu(corner) + np.triu(corner, 1).T
    matrix[rows.stop :, rows] = matrix[rows, rows.stop :].T


def inverse(matrix: np.ndarray, shift: float) -> np.ndarray:
    """(matrix + shift I)^-1 of a symmetric positive semidefinite (n, n) float matrix, in its own memory and precision.

    By Cholesky's factors (LAPACK's potrf and potri), n^3 operations where a general inverse takes 2 n^3. Raises
    ValueError where the sum is singular in that precision.
    """
    from scipy.linalg import get_lapack_funcs

    potrf, potri = get_lapack_funcs(("potrf", "potri"), (matrix,))

    matrix.ravel()[:: len(matrix) + 1] += shift
    # LAPACK counts by columns; the transpose of a symmetric matrix is itself, and so nothing is copied.
    factor, failed = potrf(matrix.T, lower=1, clean=0, overwrite_a=1)
    if not failed:
        half, failed = potri(factor, lower=1, overwrite_c=1)
    if failed:
        raise ValueError(f"the Gram matrix plus {shift:g} on its diagonal is singular: raise the regularization")
    out: np.ndarray = half.T  # its upper triangle holds the inverse
    for rows in blocks(len(out)):
        mirror(out, rows)
    return out


def ease_weights(matrix: np.ndarray, regularization: float) -> np.ndarray:
    """X'X -> B, (n, n), in the memory and precision of X'X: the minimum of ||X - XB||^2 + λ ||B||^2 with diag(B) = 0.

    P = (X'X + λI)^-1, B_ij = -P_ij / P_jj (Steck 2019, arXiv:1905.03375, equation 8).
    """
    return off_diagonal(inverse(matrix, regularization))


def off_diagonal(p: np.ndarray) -> np.ndarray:
    """P -> B, (n, n), in the memory of P: B_ij = -P_ij / P_jj, and 0 on the diagonal."""
    p *= -1.0 / p.diagonal()
    np.fill_diagonal(p, 0.0)
    return p


def narrowed(weights: np.ndarray, nonnegative: bool = False) -> np.ndarray:
    """(n, n) float64 -> float32 in the first half of the same memory, float32 -> in the same; with ``nonnegative``,
    negative entries are 0."""
    if weights.dtype == np.float32:
        return np.maximum(weights, 0, out=weights) if nonnegative else weights
    n = len(weights)
    out = weights.reshape(-1).view(np.float32)[: n * n].reshape(n, n)
    for rows in blocks(n):  # in order: a block is written over rows that are done, or over itself
        part = weights[rows].astype(np.float32)
        out[rows] = np.maximum(part, 0, out=part) if nonnegative else part
    return out


def strongest(columns: Iterator[tuple[np.ndarray | None, np.ndarray]], n: int, count: int) -> Any:
    """The ``count`` entries of the largest magnitude of each column, ties by row, zeros never -> scipy CSR (n, n)
    float32.

    columns: for each of the n, (rows, values); rows in ascending order, None = all.
    """
    from scipy.sparse import csc_matrix

    kept_rows, kept, sizes = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)], [0]
    for rows, values in columns:
        found = top(np.abs(values), count)[0] if len(values) else np.zeros(0, np.int32)
        found = np.sort(found[found >= 0])
        kept_rows.append((found if rows is None else rows[found]).astype(np.int32))
        kept.append(values[found].astype(np.float32))
        sizes.append(len(found))
    parts = np.concatenate(kept), np.concatenate(kept_rows), np.cumsum(sizes)
    return csc_matrix(parts, (n, n)).tocsr()


def dense_or_strongest(weights: np.ndarray, count: int | None) -> Any:
    """(n, n) float32 weights as they are, or the ``count`` strongest entries of each column."""
    if count is None:
        return weights
    n = len(weights)
    columns = (
        (None, column) for place in blocks(n) for column in np.ascontiguousarray(weights[:, place].T)
    )  # a column at a time would read the whole matrix for each
    return strongest(columns, n, count)


def blocks(n: int) -> Iterator[slice]:
    """Slices of the rows 0 to n, at least sixteen, each with at most BLOCK_ENTRIES entries of an (n, n) matrix."""
    size = max(1, min(BLOCK_ENTRIES // n, -(-n // 16)))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def choose(
    name: str, grid: Sequence[Setting], fit: Callable[[Setting], Model], interactions: Interactions
) -> tuple[Setting, list[dict[str, Any]]]:
    """The setting of ``grid`` whose model has the best mean ndcg@10 on the validation part, the first where some tie;
    and what each had, for the report. A grid of one is not measured.

    Raises ValueError where there is a choice and nothing held out to choose by.
    """
    from tqdm import tqdm

    if len(grid) == 1:
        return grid[0], []
    if not len(interactions.validation_targets):
        raise ValueError(
            f"retriever.params.{name}: null or a list is chosen from by held-out choices, and these interactions have "
            "none: give one number for each, such as 100"
        )
    bar = tqdm(grid, f"choosing {name}", disable=interactions.documents < PROGRESS_FROM, leave=False)
    found = [(ndcg(fit(setting), interactions), setting) for setting in bar]
    best, chosen = max(found, key=lambda pair: pair[0])  # max keeps the first of equals
    logger.info(
        "%s %s chosen of %d: ndcg@%d %.4f on %d held-out choices",
        name, chosen, len(grid), DEPTH, best, len(interactions.validation_targets),
    )  # fmt: skip
    return chosen, [{name: setting, f"ndcg@{DEPTH}": round(value, 6)} for value, setting in found]


def ndcg(model: Model, interactions: Interactions, batch: int = 256) -> float:
    """Mean ndcg@10 of the validation targets, each the only relevant document: 1 / log2(1 + rank) down to rank 10,
    with the history itself left out of the ranking."""
    queries, targets = interactions.validation_queries()
    total = 0.0
    for start in range(0, len(queries), batch):
        part = queries[start : start + batch]
        for query, row, target in zip(part, model.scores(part), targets[start : start + batch], strict=True):
            total += gain(row, query.history, int(target[0]), 0.0)
    return total / len(queries)


def check_memory(n: int, entry: int, max_gb: float, instead: str = "") -> None:
    """Raises ValueError where (n, n) matrices of ``entry`` bytes an entry, all together, exceed ``max_gb`` or what the
    machine has left. instead: a setting that takes less, "NAME: VALUE or ", to be named beside sansa."""
    needed, left = entry * n * n / 1e9, _available()
    if needed > max_gb:
        raise ValueError(
            f"retriever.params.max_gb: {n} documents need {needed:.1f} GB to fit, more than {max_gb:g}: raise max_gb, "
            f"or set {instead}retriever.kind: sansa, whose matrices are sparse"
        )
    if needed > left:
        raise ValueError(
            f"{n} documents need {needed:.1f} GB to fit and {left:.1f} GB are available: take a larger machine, or set "
            f"{instead}retriever.kind: sansa, whose matrices are sparse"
        )


def _available() -> float:
    """GB of memory that could be had now; infinite where the system does not say."""
    try:  # what Linux could free counts: the free pages alone are few once files have been read
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / 1e9
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (AttributeError, ValueError, OSError):
        return math.inf


def check_number(name: str, value: Any, usual: float, least: float = 0, above: bool = False) -> float:
    """``value`` as a float: 1 and 1.0 are one index. Raises ValueError, naming the parameter, where it is none or too
    small. above: ``least`` itself is."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or (above and value == least):
        raise ValueError(
            f"retriever.params.{name} must be a number {'>' if above else '>='} {least:g}, got {value!r}: {usual:g} "
            "is usual"
        )
    return float(value)


def check_count(name: str, value: Any, usual: int | str) -> None:
    """Raises ValueError where ``value`` is no integer >= 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"retriever.params.{name} must be an integer >= 1, got {value!r}: {usual} is usual")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError where ``value`` is neither true nor false."""
    if type(value) is not bool:
        raise ValueError(f"retriever.params.{name} must be true or false, got {value!r}")


def check_grid(name: str, value: Any, usual: Sequence[float], least: float = 0, above: bool = True) -> list[float]:
    """A number, several or None (``usual``) -> the values to choose from. Raises ValueError for anything else."""
    if value is None:
        return list(usual)
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed:
        raise ValueError(f"retriever.params.{name} is an empty list: give a number, several, or null")
    return [check_number(name, each, usual[len(usual) // 2], least, above) for each in listed]
