"""Embeddings by id, in a table that grows as ids arrive and in which no two ids share a row.

After Monolith (Liu et al. 2022, arXiv:2209.07663): an id gets a row once it was seen often enough, and loses it when
it stays away. Monolith's cuckoo hash map is Python's dict here: as free of collisions, and a batch asks it only for
its distinct ids.

The table owns its optimizer, a row-wise Adam. A torch optimizer would keep on moving rows that a batch does not touch
(their moments decay on), correct the bias of a young row by the age of the table, and need its state tensors
exchanged whenever the table grows or a row changes hands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import repeat
from typing import Any

import numpy as np

SHARED_ROW = 0  # the row that all ids without one of their own share
NEVER_SEEN = np.iinfo(np.int64).max  # "last seen" of a free slot: never due
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # Adam's (Kingma and Ba 2015, arXiv:1412.6980)
INITIAL_ROWS = 64  # rows at first; doubled from then on
SETTINGS = ("dim", "admit_after", "expire_after", "hash_bits", "scale", "seed")
ROW_ARRAYS = ("weights", "_first", "_second", "_updates")
SLOT_ARRAYS = ("_count", "_last", "_row")


class IdTable:
    """A table of embeddings by id.

    dim: columns.
    admit_after: how often an id has to be seen before it gets its own row; 1 = at once.
    expire_after: an id that is not seen for more steps than this loses its row and its count; None = never.
    hash_bits: b = a fixed table of 2^b rows, in which ids with the same hash share a row. Such a table neither admits
        nor expires ids. None = one row per id.
    scale: standard deviation of a new embedding.
    seed: of the new embeddings and of the hash.

    Attribute weights: (capacity, dim) float32. Beyond INITIAL_ROWS, capacity is less than twice the largest number of
    ids that had a row at the same time. A row takes 12 * dim + 8 bytes. An id that is counted and has no row takes 24
    bytes and an entry of the dict; without expire_after this memory is never freed.

    Raises ValueError for values outside these ranges.
    """

    def __init__(
        self,
        dim: int,
        admit_after: int = 1,
        expire_after: int | None = None,
        hash_bits: int | None = None,
        scale: float = 0.1,
        seed: int = 0,
    ) -> None:
        if dim < 1 or admit_after < 1 or (expire_after is not None and expire_after < 1):
            raise ValueError(f"IdTable: dim {dim}, admit_after {admit_after}, expire_after {expire_after}: all >= 1")
        if hash_bits is not None and not 1 <= hash_bits <= 30:
            raise ValueError(f"hash_bits: {hash_bits} is not among 1 to 30 (2^bits rows); None = a row for every id")
        if hash_bits is not None and (admit_after > 1 or expire_after is not None):
            raise ValueError("hash_bits: a hashed table has no rows of its own to admit or expire: leave those out")
        self.dim, self.admit_after, self.expire_after = dim, admit_after, expire_after
        self.hash_bits, self.scale, self.seed = hash_bits, scale, seed
        self.step = 0
        self._text: bool | None = None  # whether ids are strings; None before the first
        self._slots: dict[int | str, int] = {}
        self._ids: list[int | str | None] = []  # by slot
        self._free_slots: list[int] = []
        self._free_rows: list[int] = []
        self._oldest = NEVER_SEEN  # no slot was last seen before this
        size = INITIAL_ROWS if hash_bits is None else 1 << hash_bits
        self._admitted = 0  # rows given out, ever
        self._used = 1 if hash_bits is None else size  # rows in use or free, of the capacity
        self.weights = np.zeros((size, dim), np.float32)
        self._first, self._second = np.zeros_like(self.weights), np.zeros_like(self.weights)
        self._updates = np.zeros(size, np.int64)
        self._count, self._row = np.zeros(INITIAL_ROWS, np.int64), np.full(INITIAL_ROWS, SHARED_ROW, np.int64)
        self._last = np.full(INITIAL_ROWS, NEVER_SEEN)
        fresh = np.arange(self._used)
        self.weights[fresh] = self._fresh(fresh)

    def __len__(self) -> int:
        """Ids with a row of their own; of a hashed table, its rows."""
        return self._used if self.hash_bits is not None else self._used - 1 - len(self._free_rows)

    @property
    def capacity(self) -> int:
        """Rows in memory."""
        return len(self.weights)

    def find(self, ids: Any) -> np.ndarray:
        """(N,) int64 array or N strings -> (N,) int64 rows, SHARED_ROW for ids without one. Changes nothing."""
        keys, inverse, _ = self._distinct(ids)
        if self.hash_bits is not None:
            return self._hashed(keys)[inverse]
        slots = self._find_slots(keys)
        return np.where(slots >= 0, self._row[slots], SHARED_ROW)[inverse]

    def see(self, ids: Any, step: int | None = None) -> np.ndarray:
        """:func:`find` for ids that occurred: counts them, admits whom it is time for, and first forgets who stayed
        away. step: the step's number (None: one more than the last). Raises ValueError for one below the last."""
        keys, inverse, counts = self._distinct(ids)
        step = self.step + 1 if step is None else int(step)
        if step < self.step:
            raise ValueError(f"step: {step} after {self.step}: give a step that is not below the last one")
        self.step = step
        if len(keys):
            self._text = isinstance(keys[0], str)
        if self.hash_bits is not None:
            return self._hashed(keys)[inverse]
        self._expire()
        if not len(keys):
            return np.zeros(0, np.int64)
        slots = self._find_slots(keys)
        new = np.flatnonzero(slots < 0)
        slots[new] = self._new_slots([keys[i] for i in new.tolist()])
        self._count[slots] += counts
        self._last[slots] = step
        self._oldest = min(self._oldest, step)
        due = slots[(self._row[slots] == SHARED_ROW) & (self._count[slots] >= self.admit_after)]
        self._row[due] = self._new_rows(len(due))
        return self._row[slots][inverse]

    def update(self, rows: np.ndarray, gradients: np.ndarray, learning_rate: float) -> None:
        """One Adam step of these rows alone: (N,) rows, repeated ones add up, and (N, dim) gradients."""
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
        """All of it as arrays without pickled objects, for `numpy.savez`; what goes on from it goes on the same."""
        ids = [key for key in self._ids if key is not None]
        taken = np.array([key is not None for key in self._ids], bool)
        found = {name: np.array(-1 if getattr(self, name) is None else getattr(self, name)) for name in SETTINGS}
        if self._text:
            encoded = [str(key).encode("utf-8", "surrogatepass") for key in ids]
            found["ids"] = np.frombuffer(b"".join(encoded), np.uint8)
            found["ends"] = np.cumsum([len(key) for key in encoded], dtype=np.int64)
        else:
            found["ids"] = np.array(ids, np.int64)
        text = -1 if self._text is None else int(self._text)
        found["clock"] = np.array([self.step, self._oldest, self._admitted, self._used, text])
        found["taken"] = taken
        found["free_slots"], found["free_rows"] = np.array(self._free_slots, int), np.array(self._free_rows, int)
        for names, size in zip((ROW_ARRAYS, SLOT_ARRAYS), (self._used, len(self._ids)), strict=True):
            found.update({name.strip("_"): getattr(self, name)[:size].copy() for name in names})
        return found

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what :meth:`state` gave. Raises ValueError where it is of a table with other settings, or its
        arrays do not fit each other; KeyError where one is missing."""
        for name in SETTINGS:
            own = -1 if getattr(self, name) is None else getattr(self, name)
            if state[name] != own:
                raise ValueError(f"the saved table has {name} {state[name]}, this one {own}: make it with the same")
        step, oldest, admitted, used, text = (int(x) for x in state["clock"])
        ids: list[Any] = state["ids"].tolist()
        if text > 0:
            whole, ends = state["ids"].tobytes(), state["ends"].tolist()
            ids = [whole[a:b].decode("utf-8", "surrogatepass") for a, b in zip([0, *ends], ends, strict=False)]
        if len(ids) != state["taken"].sum():
            raise ValueError(f"the saved table has {len(ids)} ids for {state['taken'].sum()} places")
        if not all(0 <= row < used for name in ("row", "free_rows") for row in state[name].tolist()):
            raise ValueError(f"the saved table has ids in rows outside 0 to {used - 1}")
        self.step, self._oldest, self._admitted, self._used = step, oldest, admitted, used
        self._text = None if text < 0 else bool(text)
        given = iter(ids)
        self._ids = [next(given) if here else None for here in state["taken"].tolist()]
        self._slots = {key: slot for slot, key in enumerate(self._ids) if key is not None}
        self._free_slots, self._free_rows = state["free_slots"].tolist(), state["free_rows"].tolist()
        for names, size in zip((ROW_ARRAYS, SLOT_ARRAYS), (self._used, len(self._ids)), strict=True):
            for name in names:
                saved = state[name.strip("_")]
                if len(saved) != size or saved.shape[1:] != getattr(self, name).shape[1:]:
                    raise ValueError(f"the saved {name.strip('_')} have shape {saved.shape}, not {size} rows")
                room = size if names is ROW_ARRAYS and self.hash_bits is not None else max(INITIAL_ROWS, size)
                array = np.zeros((room, *saved.shape[1:]), saved.dtype)
                array[:size] = saved
                setattr(self, name, array)
        self._last[len(self._ids) :] = NEVER_SEEN

    @classmethod
    def saved(cls, state: Mapping[str, np.ndarray]) -> IdTable:
        """The table that gave this :meth:`state`, with its settings. For the errors see :meth:`load_state`."""
        settings: dict[str, Any] = {name: state[name].item() for name in SETTINGS}
        for name in ("expire_after", "hash_bits"):
            settings[name] = None if settings[name] == -1 else settings[name]
        table = cls(**settings)
        table.load_state(state)
        return table

    def _distinct(self, ids: Any) -> tuple[Sequence[int | str], np.ndarray, np.ndarray]:
        """The distinct ids, where each of ids is among them, and how often it occurs. Raises ValueError for ids that
        are neither integers nor strings, or not what the table holds."""
        if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "OU":
            ids = ids.tolist()
        text = not isinstance(ids, np.ndarray) and any(isinstance(key, str) for key in ids)
        array = None if text else np.asarray(ids)
        if text:
            if not all(isinstance(key, str) for key in ids):
                raise ValueError("ids: some are no strings: give integers alone, or strings alone")
            places: dict[int | str, int] = {}
            inverse = np.fromiter((places.setdefault(key, len(places)) for key in ids), np.int64, len(ids))
            keys, counts = list(places), np.bincount(inverse, minlength=len(places))
        else:
            if array is None or array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise ValueError("ids: give one dimension of integers or of strings")
            if array.size and array.dtype == np.uint64 and int(array.max()) >= 1 << 63:
                raise ValueError(f"ids: {array.max()} is beyond 64-bit integers with a sign")
            found, inverse, counts = np.unique(array.astype(np.int64), return_inverse=True, return_counts=True)
            keys = found.tolist()
        if len(keys) and self._text not in (None, text):
            raise ValueError(f"ids: this table holds {'strings' if self._text else 'integers'}: keep to one kind")
        return keys, inverse, counts

    def _find_slots(self, keys: Sequence[int | str]) -> np.ndarray:
        """(K,) int64, -1 = unknown."""
        return np.fromiter(map(self._slots.get, keys, repeat(-1)), np.int64, len(keys))

    def _new_slots(self, keys: Sequence[int | str]) -> np.ndarray:
        reused = [self._free_slots.pop() for _ in range(min(len(keys), len(self._free_slots)))]
        start = len(self._ids)
        slots = reused + list(range(start, start + len(keys) - len(reused)))
        self._ids += [None] * (len(slots) - len(reused))
        self._grow(SLOT_ARRAYS, len(self._ids), NEVER_SEEN)
        for slot, key in zip(slots, keys, strict=True):
            self._ids[slot] = key
            self._slots[key] = slot
        found = np.array(slots, np.int64)
        self._count[found], self._row[found] = 0, SHARED_ROW
        return found

    def _new_rows(self, number: int) -> np.ndarray:
        """Rows with fresh embeddings and no memory of a former owner."""
        reused = [self._free_rows.pop() for _ in range(min(number, len(self._free_rows)))]
        more = number - len(reused)
        rows = np.array(reused + list(range(self._used, self._used + more)), np.int64)
        self._used += more
        self._grow(ROW_ARRAYS, self._used, 0)
        self.weights[rows] = self._fresh(np.arange(self._admitted + 1, self._admitted + number + 1))
        self._first[rows], self._second[rows], self._updates[rows] = 0, 0, 0
        self._admitted += number
        return rows

    def _grow(self, names: Sequence[str], needed: int, empty_last: int) -> None:
        """Doubles these arrays until they hold ``needed``."""
        for name in names:
            array = getattr(self, name)
            if len(array) < needed:
                size = max(needed, 2 * len(array))
                larger = np.full((size, *array.shape[1:]), empty_last if name == "_last" else 0, array.dtype)
                larger[: len(array)] = array
                setattr(self, name, larger)

    def _expire(self) -> None:
        """Forgets the ids last seen more than ``expire_after`` steps ago. Looks only when some may be due."""
        if self.expire_after is None or self.step - self.expire_after <= self._oldest:
            return
        stale = np.flatnonzero(self._last < self.step - self.expire_after)
        rows = self._row[stale]
        for slot in stale.tolist():
            key = self._ids[slot]
            assert key is not None
            del self._slots[key]
            self._ids[slot] = None
        self._free_slots += stale.tolist()
        self._free_rows += rows[rows != SHARED_ROW].tolist()
        self._row[stale], self._count[stale], self._last[stale] = SHARED_ROW, 0, NEVER_SEEN
        self._oldest = int(self._last.min())

    def _hashed(self, keys: Sequence[int | str]) -> np.ndarray:
        """(K,) rows of a hashed table: the first bits of a 64-bit hash."""
        if len(keys) and isinstance(keys[0], str):
            salt = self.seed.to_bytes(8, "little", signed=True)
            words = (blake2b(str(k).encode("utf-8", "surrogatepass"), digest_size=8, key=salt).digest() for k in keys)
            bits = np.frombuffer(b"".join(words), np.uint64)
        else:
            bits = mix(np.array(keys, np.int64).astype(np.uint64) ^ mix(np.array([self.seed]).astype(np.uint64)))
        return (bits >> np.uint64(64 - (self.hash_bits or 0))).astype(np.int64)

    def _fresh(self, numbers: np.ndarray) -> np.ndarray:
        """(K, dim) float32, even between -√3 scale and √3 scale: a function of the seed and how many rows were given
        out before, so that batches of another size, or a pause between, change nothing."""
        row = mix(numbers.astype(np.uint64) + mix(np.array([self.seed]).astype(np.uint64)))
        bits = mix(row[:, None] ^ mix(np.arange(1, self.dim + 1, dtype=np.uint64))[None])
        unit = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
        return ((2 * unit - 1) * np.float32(np.sqrt(3) * self.scale)).astype(np.float32)


def mix(words: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, one to one, every bit of the result depending on every bit given: SplitMix64's step (Steele,
    Lea and Flood 2014, "Fast splittable pseudorandom number generators"; constants by Stafford)."""
    with np.errstate(over="ignore"):
        z = words + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
