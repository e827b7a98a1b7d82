"""Embeddings by id, in a table in which no two ids share a row, and the optimizer that trains them.

After Monolith (Liu et al. 2022, arXiv:2209.07663): an id gets a row of its own once it was seen often enough. Python's
dict takes the place of Monolith's cuckoo hash map. It has no collisions either, and is asked once per distinct id.

The optimizer is a row-wise Adam. A torch optimizer would also move the rows that a batch does not touch, because their
moments decay further, and would correct the bias of a young row by the age of the whole table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np

SHARED_ROW = 0  # The row that all ids without a row of their own share.
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # Adam's (Kingma and Ba 2015, arXiv:1412.6980).
SETTINGS = ("dim", "admit_after", "hash_bits", "scale", "seed")
ROW_ARRAYS = ("weights", "first", "second", "updates")  # The arrays of a saved table with an entry per row.


class IdTable:
    """A table of embeddings by id. Ids are 64-bit integers.

        table = IdTable(dim=8, admit_after=2)
        table.see(np.array([7, 7, 9]))                # [1, 1, 0]: id 7 has a row, and id 9 was seen only once
        table.update(table.find(np.array([7])), np.ones((1, 8), np.float32), learning_rate=0.1)

    dim: columns.
    admit_after: how often an id has to be seen before it gets its own row; 1 = at once.
    hash_bits: b = a fixed table of 2^b rows, in which ids with the same hash share a row. None = one row per id.
    scale: the standard deviation of a new embedding.
    seed: of the new embeddings and of the hash.

    Attribute weights: (rows, dim) float32. A row takes 12 * dim + 8 bytes, and an id 16 bytes and an entry of the dict.

    Raises ValueError for values outside these ranges.
    """

    def __init__(
        self, dim: int, admit_after: int = 1, hash_bits: int | None = None, scale: float = 0.1, seed: int = 0
    ) -> None:
        if dim < 1 or admit_after < 1:
            raise ValueError(f"IdTable: dim {dim}, admit_after {admit_after}: both must be >= 1")
        if hash_bits is not None and not 1 <= hash_bits <= 30:
            raise ValueError(f"hash_bits: {hash_bits} is not among 1 to 30 (2^bits rows); None = a row for every id")
        if hash_bits is not None and admit_after > 1:
            raise ValueError("hash_bits: a hashed table has no rows of its own to admit: leave admit_after out")
        self.dim, self.admit_after, self.hash_bits, self.scale, self.seed = dim, admit_after, hash_bits, scale, seed
        self._places: dict[int, int] = {}  # The place of each id that was seen, in the two arrays below.
        self._count, self._row = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.weights = np.zeros((0, dim), np.float32)
        self._first, self._second = np.zeros_like(self.weights), np.zeros_like(self.weights)
        self._updates = np.zeros(0, np.int64)
        self._add_rows(1 if hash_bits is None else 1 << hash_bits)

    def __len__(self) -> int:
        """The number of ids with a row of their own; of a hashed table, the number of its rows."""
        return len(self.weights) - (1 if self.hash_bits is None else 0)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """(N,) integers -> (N,) int64 rows, SHARED_ROW for ids without one. The table stays as it is.

        Raises ValueError for anything but one dimension of 64-bit integers.
        """
        keys, inverse, _ = _distinct(ids)
        if self.hash_bits is not None:
            return self._hashed(keys)[inverse]
        places = np.fromiter(map(self._places.get, keys.tolist(), repeat(-1)), np.int64, len(keys))
        rows = np.full(len(keys), SHARED_ROW)
        rows[places >= 0] = self._row[places[places >= 0]]
        return rows[inverse]

    def see(self, ids: np.ndarray) -> np.ndarray:
        """:func:`find` for ids that occurred: count them, and give a row to each that was seen often enough."""
        keys, inverse, counts = _distinct(ids)
        if self.hash_bits is not None:
            return self._hashed(keys)[inverse]
        places = np.fromiter((self._places.setdefault(key, len(self._places)) for key in keys.tolist()), np.int64)
        new = len(self._places) - len(self._count)
        self._count = np.concatenate([self._count, np.zeros(new, np.int64)])
        self._row = np.concatenate([self._row, np.full(new, SHARED_ROW)])
        self._count[places] += counts
        due = places[(self._row[places] == SHARED_ROW) & (self._count[places] >= self.admit_after)]
        self._row[due] = self._add_rows(len(due))
        return self._row[places][inverse]

    def update(self, rows: np.ndarray, gradients: np.ndarray, learning_rate: float) -> None:
        """One Adam step of these rows alone.

        rows: (N,) rows. The gradients of a repeated row are summed.
        gradients: (N, dim).
        """
        distinct, inverse = np.unique(rows, return_inverse=True)
        summed = np.zeros((len(distinct), self.dim), np.float32)
        np.add.at(summed, inverse, gradients)
        self._updates[distinct] += 1
        age = self._updates[distinct][:, None]
        first = BETA_1 * self._first[distinct] + (1 - BETA_1) * summed
        second = BETA_2 * self._second[distinct] + (1 - BETA_2) * summed**2
        self._first[distinct], self._second[distinct] = first, second
        pace = np.sqrt(second / (1 - BETA_2**age)) + EPSILON
        self.weights[distinct] -= (learning_rate * first / (1 - BETA_1**age) / pace).astype(np.float32)

    def state(self) -> dict[str, np.ndarray]:
        """The whole table as arrays, for `numpy.savez`. A table that is loaded from them continues in the same way."""
        found = {name: np.array(-1 if value is None else value) for name, value in self._settings().items()}
        found |= {"ids": np.array(list(self._places), np.int64), "count": self._count.copy(), "row": self._row.copy()}
        arrays: tuple[np.ndarray, ...] = (self.weights, self._first, self._second, self._updates)
        return found | {name: array.copy() for name, array in zip(ROW_ARRAYS, arrays, strict=True)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`state` returned, in this version or an older one, which saved further arrays.

        Raises ValueError for a table with other settings and for arrays that do not fit each other, and KeyError for a
        missing one.
        """
        for name, value in self._settings().items():
            own = -1 if value is None else value
            if state[name] != own:
                raise ValueError(f"the saved table has {name} {state[name]}, this one {own}: make it with the same")
        ids, count, row = state["ids"], state["count"], state["row"]
        weights, first, second, updates = (np.array(state[name]) for name in ROW_ARRAYS)
        rows = len(weights)
        if not len(ids) == len(count) == len(row):
            raise ValueError(f"the saved table has {len(ids)} ids, {len(count)} counts and {len(row)} rows of ids")
        if not ((row >= 0) & (row < rows)).all():
            raise ValueError(f"the saved table has ids in rows outside 0 to {rows - 1}")
        for name, array in zip(ROW_ARRAYS, (weights, first, second, updates), strict=True):
            if array.shape != ((rows,) if name == "updates" else (rows, self.dim)):
                raise ValueError(f"the saved {name} have shape {array.shape}, not {rows} rows")
        self._places = {key: place for place, key in enumerate(ids.tolist())}
        self._count, self._row = np.array(count), np.array(row)
        self.weights, self._first, self._second, self._updates = weights, first, second, updates

    @classmethod
    def saved(cls, state: Mapping[str, np.ndarray]) -> IdTable:
        """The table that returned this :meth:`state`, with its settings. For the errors see :meth:`load_state`."""
        settings: dict[str, Any] = {name: state[name].item() for name in SETTINGS}
        table = cls(**settings | {"hash_bits": None if settings["hash_bits"] == -1 else settings["hash_bits"]})
        table.load_state(state)
        return table

    def _settings(self) -> dict[str, Any]:
        values = (self.dim, self.admit_after, self.hash_bits, self.scale, self.seed)
        return dict(zip(SETTINGS, values, strict=True))

    def _add_rows(self, number: int) -> np.ndarray:
        """(number,) new rows with fresh embeddings."""
        rows = np.arange(len(self.weights), len(self.weights) + number)
        self.weights = np.concatenate([self.weights, self._fresh(rows)])
        empty = np.zeros((number, self.dim), np.float32)
        self._first, self._second = np.concatenate([self._first, empty]), np.concatenate([self._second, empty])
        self._updates = np.concatenate([self._updates, np.zeros(number, np.int64)])
        return rows

    def _hashed(self, keys: np.ndarray) -> np.ndarray:
        """(K,) rows of a hashed table: the first bits of a 64-bit hash."""
        bits = mix(keys.astype(np.uint64) ^ mix(np.array([self.seed]).astype(np.uint64)))
        return (bits >> np.uint64(64 - (self.hash_bits or 0))).astype(np.int64)

    def _fresh(self, rows: np.ndarray) -> np.ndarray:
        """(K, dim) float32 embeddings of new rows, uniform between -√3 scale and √3 scale. They depend on the seed and
        the row alone, so that batches of another size, or a pause between them, change nothing."""
        row = mix(rows.astype(np.uint64) + mix(np.array([self.seed]).astype(np.uint64)))
        bits = mix(row[:, None] ^ mix(np.arange(1, self.dim + 1, dtype=np.uint64))[None])
        unit = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
        return ((2 * unit - 1) * np.float32(np.sqrt(3) * self.scale)).astype(np.float32)


def _distinct(ids: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct ids, the place of each of ``ids`` among them, and how often each occurs."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError("ids: give one dimension of integers")
    if array.size and array.dtype == np.uint64 and int(array.max()) >= 1 << 63:
        raise ValueError(f"ids: {array.max()} is beyond 64-bit integers with a sign")
    keys, inverse, counts = np.unique(array.astype(np.int64), return_inverse=True, return_counts=True)
    return keys, inverse, counts


def mix(words: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, one to one, so that every bit of the result depends on every bit of the input: the step of
    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"; constants by Stafford)."""
    with np.errstate(over="ignore"):
        z = words + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
