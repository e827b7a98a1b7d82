"""The catalogue: everything that can be retrieved. It is an Arrow table, which is memory-mapped after it is saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.core.index_folder import is_filled, new_folder
from retrievers.types import CatalogError, RetrieverError


def _string(value: object) -> str:
    """The value of a field as a string. None, a missing value in most formats, becomes "" and not the word "None"."""
    return "" if value is None else str(value)


def _fingerprint(columns: Mapping[str, Sequence[str]]) -> str:
    """The sha256 of all columns in the order of their names, in hex.

    Raises ValueError for a text with half of a surrogate pair, because Arrow cannot store it.
    """
    digest = hashlib.sha256()
    for name in sorted(columns):
        for row, value in enumerate([name, *columns[name]]):
            try:
                encoded = value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"document {columns['id'][row - 1]!r} holds half a character in {name!r} ({error}), which Arrow "
                    'cannot store: clean it with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
                ) from error
            # The length comes first, so that the values "ab", "c" and "a", "bc" have different fingerprints.
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


AT_A_TIME = 1000  # A loop over all values reads so many at once from the table.


class _Column(Sequence[str]):
    """The n values of one field, which stay in the Arrow table until they are read.

    A column of the datasets library makes a table for each value that is read, which takes seventy times as long.
    """

    def __init__(self, values: Any) -> None:
        self._values = values  # pyarrow.ChunkedArray

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, place: Any) -> Any:
        """One value, or a list of values for a slice."""
        return self._values[place].to_pylist() if isinstance(place, slice) else self._values[int(place)].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), AT_A_TIME):
            yield from self[start : start + AT_A_TIME]


class Catalog:
    """n documents with an ``id``, a ``text`` (which is indexed), a ``title`` (which people see) and other fields.

    :meth:`from_records` and :meth:`load` make one. A row is the position of a document, an int32 from 0. A saved
    catalogue is memory-mapped, so that all processes of a machine share one copy; its pickle holds only its folder.

        catalog = retrievers.Catalog.from_records(
            [
                {"id": "d1", "text": "red running shoes", "title": "Runner", "brand": "Acme"},
                {"id": "d2", "text": "garden hose"},
            ]
        )
        catalog.rows(["d2", "d1"])                     # array([1, 0], dtype=int32)
        catalog.titles[1], catalog.column("brand")[0]  # ("garden hose", "Acme")
        catalog = catalog.save("catalogues/shop")      # the memory-mapped copy
        catalog = retrievers.Catalog.load("catalogues/shop")

    table: a datasets.Dataset with at least the string columns id, text and title.
    fingerprint: the sha256 of all columns, in hex.
    folder: the folder that holds the saved table. None, the default, = the catalogue is only in memory.
    """

    def __init__(self, table: Any, fingerprint: str, folder: Path | None = None) -> None:
        self._table = table
        self.fingerprint = fingerprint
        # The path is absolute, because a child process may have another working directory.
        self.folder = folder.absolute() if folder is not None else None

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, str]]) -> Catalog:
        """A catalogue in memory, with one document per record.

        records: mappings from the names of fields to their values. Each needs an ``id`` and a ``text``. A missing or
            empty ``title`` becomes the text; any other field that a record lacks becomes "".

        Raises ValueError for an empty catalogue, a record without ``id`` or ``text``, an id that occurs twice, and a
        text with half of a surrogate pair.
        """
        import pyarrow
        from datasets import Dataset

        columns: dict[str, list[str]] = {"id": [], "text": [], "title": []}
        seen: set[str] = set()
        for row, record in enumerate(records):
            if record.get("id") is None or "text" not in record:
                raise ValueError(f"document {row} has no 'id' or no 'text', only {sorted(record)}: give both")
            columns |= {name: [""] * row for name in record if name not in columns}
            identifier, text = str(record["id"]), _string(record["text"])
            if identifier in seen:
                raise ValueError(f"document id {identifier!r} occurs twice in the catalogue: make every id unique")
            seen.add(identifier)
            for name, values in columns.items():
                values.append(_string(record.get(name)))
            columns["title"][-1] = columns["title"][-1] or text
        if not seen:
            raise ValueError("the catalogue is empty: give at least one document")
        fingerprint = _fingerprint(columns)  # This comes before the table, because its error names the broken document.
        # Without a fingerprint, Dataset pickles the whole table to hash it, which doubles the memory at the peak.
        return cls(Dataset(pyarrow.table(columns), fingerprint=fingerprint[:16]), fingerprint)

    def save(self, folder: str | Path) -> Catalog:
        """Write the catalogue to ``folder`` atomically, and return the memory-mapped copy.

        A folder that already holds this catalogue stays as it is. Raises RetrieverError where it holds anything else.
        """
        folder = Path(folder)
        if not is_filled(folder):
            meta = {"fingerprint": self.fingerprint, "documents": len(self)}
            with new_folder(folder) as temporary:
                self._table.save_to_disk(str(temporary / "table"))
                (temporary / "catalog.json").write_text(json.dumps(meta))
        saved = Catalog.load(folder)
        if saved.fingerprint != self.fingerprint:
            raise RetrieverError(
                f"catalogue {folder} holds {len(saved)} other documents (fingerprint {saved.fingerprint[:16]} instead "
                f"of {self.fingerprint[:16]}): delete the folder, or save to another one"
            )
        return saved

    @classmethod
    def load(cls, folder: str | Path) -> Catalog:
        """Open a saved catalogue, memory-mapped. Raises RetrieverError where the folder holds none, or a broken one."""
        from datasets import load_from_disk

        folder = Path(folder)
        try:
            meta = json.loads((folder / "catalog.json").read_text())
            table = load_from_disk(str(folder / "table"))
            if len(table) != meta.get("documents", len(table)):
                raise ValueError(f"{len(table)} documents instead of {meta['documents']}")
            return cls(table, meta["fingerprint"], folder)
        except Exception as error:
            raise RetrieverError(
                f"catalogue {folder} does not open ({type(error).__name__}: {error}): delete the folder, and it is "
                "built again"
            ) from error

    def __len__(self) -> int:
        return len(self._table)

    def __reduce__(self) -> tuple[Callable[..., Catalog], tuple[Any, ...]]:
        if self.folder is not None:
            return _reopen, (self.folder, self.fingerprint)
        return Catalog, (self._table, self.fingerprint)

    @cached_property
    def _arrow(self) -> Any:
        """The table as a pyarrow.Table, without a copy."""
        return self._table.with_format("arrow")[:]

    @cached_property
    def ids(self) -> Sequence[str]:
        """The n ids, in row order."""
        return _Column(self._arrow["id"])

    @cached_property
    def texts(self) -> Sequence[str]:
        """The n texts, in row order."""
        return _Column(self._arrow["text"])

    @cached_property
    def titles(self) -> Sequence[str]:
        """The n titles, in row order."""
        return _Column(self._arrow["title"])

    def column(self, name: str) -> Sequence[str]:
        """The n values of one field, in row order. Raises ValueError, naming the fields, where there is no such one."""
        if name not in self.fields:
            raise ValueError(f"the catalogue has no field {name!r}: choose from {', '.join(self.fields)}")
        return _Column(self._arrow[name])

    @property
    def fields(self) -> list[str]:
        """The names of all fields, with id, text and title."""
        return list(self._table.column_names)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {identifier: row for row, identifier in enumerate(self.ids)}

    def __contains__(self, identifier: object) -> bool:
        """Whether a document has this id."""
        return str(identifier) in self._row_of  # as `rows` takes ids

    def row(self, identifier: str) -> int:
        """The row of one id. Raises CatalogError, which is a KeyError, where the catalogue lacks the id."""
        return int(self.rows([identifier])[0])

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """(len(ids),) int32 rows, in the order of ``ids``.

        Raises CatalogError, which is a KeyError and a ValueError. It counts the unknown ids and names the first three.
        """
        ids = [str(i) for i in ids]
        unknown = [i for i in ids if i not in self._row_of]
        if unknown:
            raise CatalogError(
                f"{len(unknown)} of {len(ids)} ids are not in the catalogue, first: "
                + ", ".join(repr(i) for i in unknown[:3])
            )
        return np.array([self._row_of[i] for i in ids], dtype=np.int32)


def _reopen(folder: Path, fingerprint: str) -> Catalog:
    """Unpickle a saved catalogue. Raises RetrieverError where its folder now holds another one."""
    catalog = Catalog.load(folder)
    if catalog.fingerprint != fingerprint:
        raise RetrieverError(f"catalogue {folder} was replaced while it was in use: start the run again")
    return catalog
