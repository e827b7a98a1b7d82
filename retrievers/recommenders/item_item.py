"""The parts that the linear item-item models share: scores = history @ B, with B of shape (n, n), dense or sparse.

This module has the closed form that EASE and L3AE use, the selection of each column's largest entries, the files of B,
and the choice of a setting on the validation split.

Shapes: n items, U users, Q queries. X is the (U, n) matrix of interactions.
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
from retrievers.core.numba_threads import compiled, read_only, run_in_threads
from retrievers.core.parameters import check_number
from retrievers.core.ranking import top
from retrievers.interactions import Interactions, history_matrix
from retrievers.recommenders.fitted import Model
from retrievers.recommenders.validation import DEPTH, ndcg_of_ranking
from retrievers.types import Query

logger = logging.getLogger(__name__)
BLOCK_ENTRIES = 1 << 22  # Functions work on at most so many entries of an (n, n) matrix at a time.
PROGRESS_FROM = 2_000  # The choice of a setting shows a progress bar from so many items on.
CSR_ARRAYS = ("data", "indices", "indptr")  # The arrays of a scipy CSR matrix, one file each.
Setting = TypeVar("Setting")


class Linear:
    """A linear model: scores = history @ weights.

    weights: (n, n) float32, a numpy array in C order or a scipy CSR matrix. Entry (i, j) is the amount that item i in
        the history adds to the score of item j.
    """

    def __init__(self, weights: Any) -> None:
        self._weights = weights

    def scores(self, queries: Sequence[Query]) -> np.ndarray:
        """The scores of Q queries: (Q, n) float32.

        The terms of a row are added in the order of the catalogue, so that a row is the same in every batch.
        """
        return multiplied(history_matrix(queries, self._weights.shape[0]), self._weights)


def multiplied(history: Any, weights: Any) -> np.ndarray:
    """The product of the histories and the weights: (Q, n) float32.

    history: scipy CSR matrix, (Q, n) float32.
    weights: numpy array or scipy CSR matrix, (n, n) float32.

    The product of two sparse matrices is compiled where numba is installed. scipy computes a sparse result first, which
    is slower, because the result is mostly dense.
    """
    if isinstance(weights, np.ndarray):
        return np.asarray(history @ weights)
    from retrievers.core.kernels import products

    kernel = compiled(products)
    if kernel is None:
        return np.asarray((history @ weights).toarray())
    out = np.zeros(history.shape, np.float32)
    parts = read_only(part for matrix in (history, weights) for part in (matrix.indptr, matrix.indices, matrix.data))
    run_in_threads(lambda first, last: kernel(*parts, out, first, last), len(out))
    return out


def save(weights: Any, folder: Path, name: str = "weights") -> None:
    """Write ``weights`` to files that :func:`load` can map into memory: one for an array, three for a CSR matrix."""
    if isinstance(weights, np.ndarray):
        np.save(folder / f"{name}.npy", weights)
        return
    for part in CSR_ARRAYS:
        np.save(folder / f"{name}.{part}.npy", getattr(weights, part))


def load(folder: Path, name: str = "weights") -> Any:
    """The weights in ``folder``, memory-mapped, so that all processes of a machine share one copy.

    Raises OSError, EOFError or ValueError for files that do not hold an (n, n) matrix for the n items of the index.
    """
    weights, n = _load(folder, name), int(read_meta(folder, {"documents": None})["documents"])
    if weights.shape[0] != n:
        raise ValueError(f"the weights are for {weights.shape[0]} items instead of {n}")
    return weights


def _load(folder: Path, name: str) -> Any:
    if (folder / f"{name}.npy").is_file():
        # scipy multiplies a plain array faster than a numpy.memmap.
        dense = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
        if dense.dtype != np.float32 or dense.ndim != 2 or dense.shape[0] != dense.shape[1]:
            raise ValueError(f"the weights are {dense.dtype} {dense.shape}, not a square of float32")
        return dense
    from scipy.sparse import csr_matrix

    data, indices, indptr = (np.asarray(np.load(folder / f"{name}.{part}.npy", mmap_mode="r")) for part in CSR_ARRAYS)
    n = len(indptr) - 1
    # scipy's compiled loops do not check these arrays, and could read beyond their ends.
    whole = data.dtype == np.float32 and len(data) == len(indices) == indptr[-1] and not indptr[0]
    if not whole or (np.diff(indptr) < 0).any() or (len(indices) and not 0 <= indices.min() <= indices.max() < n):
        raise ValueError("the files of the weights do not belong together")
    return csr_matrix((data, indices, indptr), (n, n), copy=False)


def open_linear(folder: Path) -> Linear:
    """The model whose weights :func:`save` wrote into ``folder``."""
    return Linear(load(folder))


def gram(x: Any, dtype: Any = np.float64) -> np.ndarray:
    """The Gram matrix X'X: (n, n) numpy array in C order.

    x: X, a scipy CSR matrix (U, n) of zeros and ones.
    dtype: float64, the default, or float32, which is exact for up to 2^24 users.

    The result is dense from the start, because a sparse matrix needs more memory once half of its entries are not 0.
    """
    from retrievers.core.kernels import pairs

    n, kernel, columns = x.shape[1], compiled(pairs), x.T.tocsr()
    out = np.zeros((n, n), dtype)
    if kernel is not None:
        x = x.sorted_indices()
        parts = read_only([columns.indptr, columns.indices, x.indptr, x.indices])
        run_in_threads(lambda first, last: kernel(*parts, out, first, last), n)
    for rows in blocks(n):  # The matrix is symmetric, so only the upper triangle is computed.
        if kernel is None:
            out[rows, rows.start :] = (columns[rows] @ x[:, rows.start :]).toarray()
        fill_lower_triangle(out, rows)
    return out


def fill_lower_triangle(matrix: np.ndarray, rows: slice) -> None:
    """Copy the upper triangle of a symmetric (n, n) matrix to the lower one, for a slice of rows."""
    corner = matrix[rows, rows]
    corner[:] = np.triu(corner) + np.triu(corner, 1).T
    matrix[rows.stop :, rows] = matrix[rows, rows.stop :].T


def inverse(matrix: np.ndarray, shift: float) -> np.ndarray:
    """(matrix + shift I)^-1, in the memory and the precision of ``matrix``.

    matrix: (n, n) float32 or float64, symmetric and positive semidefinite. It is overwritten.
    shift: the number that is added to the diagonal.

    The inverse is computed from a Cholesky factor (LAPACK's potrf and potri), with n^3 operations, where a general
    inverse takes 2 n^3. Raises ValueError where the sum is singular in that precision.
    """
    from scipy.linalg import get_lapack_funcs

    potrf, potri = get_lapack_funcs(("potrf", "potri"), (matrix,))

    matrix.ravel()[:: len(matrix) + 1] += shift
    # LAPACK stores matrices by columns. A symmetric matrix is its own transpose, so that nothing needs to be copied.
    factor, failed = potrf(matrix.T, lower=1, clean=0, overwrite_a=1)
    if not failed:
        half, failed = potri(factor, lower=1, overwrite_c=1)
    if failed:
        raise ValueError(f"the Gram matrix plus {shift:g} on its diagonal is singular: raise the regularization")
    out: np.ndarray = half.T  # Only the upper triangle holds the inverse so far.
    for rows in blocks(len(out)):
        fill_lower_triangle(out, rows)
    return out


def ease_weights(matrix: np.ndarray, regularization: float) -> np.ndarray:
    """The B that minimises ||X - XB||^2 + λ ||B||^2 with diag(B) = 0: (n, n), in the memory and the precision of X'X.

    matrix: X'X, (n, n) float32 or float64. It is overwritten.
    regularization: λ.

    B_ij = -P_ij / P_jj with P = (X'X + λI)^-1 (Steck 2019, arXiv:1905.03375, equation 8).
    """
    return weights_from_inverse(inverse(matrix, regularization))


def weights_from_inverse(p: np.ndarray) -> np.ndarray:
    """B, (n, n), from P, in the memory of P: B_ij = -P_ij / P_jj, and 0 on the diagonal."""
    p *= -1.0 / p.diagonal()
    np.fill_diagonal(p, 0.0)
    return p


def as_float32(weights: np.ndarray, nonnegative: bool = False) -> np.ndarray:
    """The weights as float32, (n, n), in the memory of ``weights``. The weights are overwritten.

    weights: (n, n) float64 or float32.
    nonnegative: whether to set negative entries to 0. Default False.
    """
    if weights.dtype == np.float32:
        return np.maximum(weights, 0, out=weights) if nonnegative else weights
    n = len(weights)
    out = weights.reshape(-1).view(np.float32)[: n * n].reshape(n, n)
    for rows in blocks(n):  # In this order, a block only overwrites rows that are converted already, or itself.
        part = weights[rows].astype(np.float32)
        out[rows] = np.maximum(part, 0, out=part) if nonnegative else part
    return out


def largest_entries(columns: Iterator[tuple[np.ndarray | None, np.ndarray]], n: int, count: int) -> Any:
    """Keep the ``count`` entries of largest magnitude in each column: scipy CSR matrix, (n, n) float32.

    columns: the rows, in ascending order, and the values of each of the n columns. None as rows = all rows.
    n: the number of rows and columns.
    count: the number of entries per column. Of equal magnitudes, the smaller row is kept. Zeros are not kept.
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


def all_or_largest_entries(weights: np.ndarray, count: int | None) -> Any:
    """The (n, n) float32 ``weights`` where ``count`` is None, and otherwise the result of :func:`largest_entries`."""
    if count is None:
        return weights
    n = len(weights)
    columns = (
        (None, column) for place in blocks(n) for column in np.ascontiguousarray(weights[:, place].T)
    )  # Columns are copied in blocks, because reading a single column touches the memory of the whole matrix.
    return largest_entries(columns, n, count)


def blocks(n: int) -> Iterator[slice]:
    """Yield slices of the n rows of an (n, n) matrix: about sixteen or more, each of at most BLOCK_ENTRIES entries."""
    size = max(1, min(BLOCK_ENTRIES // n, -(-n // 16)))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def choose(
    name: str, grid: Sequence[Setting], fit: Callable[[Setting], Model], interactions: Interactions
) -> tuple[Setting, list[dict[str, Any]]]:
    """Choose the setting whose model has the best mean ndcg@10 on the validation split.

    name: the name of the setting, for messages.
    grid: the values to choose from. Of equally good ones, the first is chosen. A single value is not measured.
    fit: takes a value, and returns the fitted model.
    interactions: the interactions with the validation split.

    Returns the chosen value, and the metric of each value for the report.

    Raises ValueError where there are several values, but no validation split.
    """
    from tqdm import tqdm

    if len(grid) == 1:
        return grid[0], []
    if not len(interactions.validation_targets):
        raise ValueError(
            f"retriever.params.{name}: null or a list needs a validation split to choose on, and these interactions "
            "have none: give one number for each, such as 100"
        )
    bar = tqdm(grid, f"choosing {name}", disable=interactions.documents < PROGRESS_FROM, leave=False)
    found = [(ndcg(fit(setting), interactions), setting) for setting in bar]
    best, chosen = max(found, key=lambda pair: pair[0])  # max returns the first of equal values.
    logger.info(
        "chose %s %s from %d values: ndcg@%d is %.4f on %d validation targets",
        name, chosen, len(grid), DEPTH, best, len(interactions.validation_targets),
    )  # fmt: skip
    return chosen, [{name: setting, f"ndcg@{DEPTH}": round(value, 6)} for value, setting in found]


def ndcg(model: Model, interactions: Interactions, batch: int = 256) -> float:
    """The mean ndcg@10 of a model on the validation split. Rankings leave out the history.

    Each query has one relevant item, so its ndcg@10 is 1 / log2(1 + rank) down to rank 10, and 0 below.
    """
    queries, targets = interactions.validation_queries()
    total = 0.0
    for start in range(0, len(queries), batch):
        part = queries[start : start + batch]
        for query, row, target in zip(part, model.scores(part), targets[start : start + batch], strict=True):
            total += ndcg_of_ranking(row, query.history, int(target[0]), 0.0)
    return total / len(queries)


def check_memory(n: int, entry: int, max_gb: float, instead: str = "") -> None:
    """Raises ValueError where a fit needs more memory than allowed, or than the machine has available.

    n: the number of items.
    entry: the bytes per entry of all (n, n) matrices of the fit together.
    max_gb: the memory that a fit may need, in GB.
    instead: the beginning of the advice, "NAME: VALUE, or ", which names a setting that needs less memory. Default "".
    """
    needed, left = entry * n * n / 1e9, _available()
    if needed > max_gb:
        raise ValueError(
            f"retriever.params.max_gb: a fit on {n} items needs {needed:.1f} GB, more than {max_gb:g}: raise "
            f"max_gb, or set {instead}retriever.kind: sansa, whose matrices are sparse"
        )
    if needed > left:
        raise ValueError(
            f"a fit on {n} items needs {needed:.1f} GB, but only {left:.1f} GB are available: take a larger "
            f"machine, or set {instead}retriever.kind: sansa, whose matrices are sparse"
        )


def _available() -> float:
    """The available memory in GB. It is infinite where the system does not report it."""
    try:  # MemAvailable includes the page cache, which Linux can free. After files were read, few pages are unused.
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / 1e9
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (AttributeError, ValueError, OSError):
        return math.inf


def check_grid(name: str, value: Any, usual: Sequence[float], least: float = 0, above: bool = True) -> list[float]:
    """The values to choose from, as floats.

    name: the name of the parameter.
    value: a number, several numbers, or None for ``usual``.
    usual: the default values.
    least, above: see :func:`retrievers.core.parameters.check_number`, but ``above`` is True by default.

    Raises ValueError for anything else.
    """
    if value is None:
        return list(usual)
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed:
        raise ValueError(f"retriever.params.{name} is an empty list: give a number, several, or null")
    return [check_number(name, each, usual[len(usual) // 2], least, above) for each in listed]
