"""The catalogue: what can be retrieved. One Arrow table, memory-mapped once it has been saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.core.index_folder import is_filled, new_folder
from retrievers.types import CatalogError, RetrieverError


def _string(value: object) -> str:
    """A field's value; None (a missing value in most formats) is no text, not the word "None"."""
    return "" if value is None else str(value)


def _fingerprint(columns: Mapping[str, Sequence[str]]) -> str:
    """sha256 over all columns, by name. Raises ValueError for text that is not whole unicode, which Arrow refuses."""
    digest = hashlib.sha256()
    for name in sorted(columns):
        for row, value in enumerate([name, *columns[name]]):
            try:
                encoded = value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"document {columns['id'][row - 1]!r} holds half a character in {name!r} ({error}): Arrow stores "
                    'whole ones, clean it with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
                ) from error
            digest.update(len(encoded).to_bytes(8, "little") + encoded)  # length first: "ab"+"c" != "a"+"bc"
    return digest.hexdigest()


class Catalog:
    """Documents in row order: ``id``, ``text`` (what is indexed), ``title`` (what people see), other fields.

    Make one with :meth:`from_records` or :meth:`load`. Rows are positions, int32, from 0. A saved catalogue
    pickles as its folder and is mapped, not read: all processes of a node share one copy.

        catalog = retrievers.Catalog.from_records(
            [
                {"id": "d1", "text": "red running shoes", "title": "Runner", "brand": "Acme"},
                {"id": "d2", "text": "garden hose"},
            ]
        )
        catalog.rows(["d2", "d1"])                     # array([1, 0], dtype=int32)
        catalog.titles[1], catalog.column("brand")[0]  # ("garden hose", "Acme")
        catalog = catalog.save("catalogues/shop")      # from now on memory-mapped
        catalog = retrievers.Catalog.load("catalogues/shop")
    """

    def __init__(self, table: Any, fingerprint: str, folder: Path | None = None) -> None:
        self._table = table  # datasets.Dataset with at least the columns id, text, title
        self.fingerprint = fingerprint
        self.folder = folder.absolute() if folder is not None else None  # a child may work elsewhere

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, str]]) -> Catalog:
        """Build in memory from mappings with ``id`` and ``text``; ``title`` falls back to the text, another
        field that a record lacks to "".

        Raises ValueError for an empty catalogue, a missing ``id`` or ``text``, or an id that stands twice.
        """
        import pyarrow
        from datasets import Dataset

        columns: dict[str, list[str]] = {"id": [], "text": [], "title": []}
        seen: set[str] = set()
        for row, record in enumerate(records):
            if record.get("id") is None or "text" not in record:
                raise ValueError(f"document {row} has no 'id' or no 'text', only {sorted(record)}: name both")
            columns |= {name: [""] * row for name in record if name not in columns}
            identifier, text = str(record["id"]), _string(record["text"])
            if identifier in seen:
                raise ValueError(f"document id {identifier!r} stands twice in the catalogue: ids must be unique")
            seen.add(identifier)
            for name, values in columns.items():
                values.append(_string(record.get(name)))
            columns["title"][-1] = columns["title"][-1] or text
        if not seen:
            raise ValueError("the catalogue is empty: it needs at least one document")
        fingerprint = _fingerprint(columns)  # first: its complaint about broken text names the document
        # Without a fingerprint Dataset pickles the whole table to hash it: twice as much memory at the peak.
        return cls(Dataset(pyarrow.table(columns), fingerprint=fingerprint[:16]), fingerprint)

    def save(self, folder: str | Path) -> Catalog:
        """Write to ``folder`` atomically and return the memory-mapped copy.

        A folder that already holds this catalogue is kept; RetrieverError where it holds anything else.
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
                f"catalogue {folder} holds {len(saved)} other documents ({saved.fingerprint[:16]}, now "
                f"{self.fingerprint[:16]}): delete the folder or save to another one"
            )
        return saved

    @classmethod
    def load(cls, folder: str | Path) -> Catalog:
        """Map a saved catalogue. Raises RetrieverError where the folder does not hold one."""
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
                f"catalogue {folder} does not open ({type(error).__name__}: {error}): delete the folder, "
                "it is built again"
            ) from error

    def __len__(self) -> int:
        return len(self._table)

    def __reduce__(self) -> tuple[Callable[..., Catalog], tuple[Any, ...]]:
        if self.folder is not None:
            return _reopen, (self.folder, self.fingerprint)
        return Catalog, (self._table, self.fingerprint)

    @cached_property
    def ids(self) -> Sequence[str]:
        return self._table["id"]

    @cached_property
    def texts(self) -> Sequence[str]:
        return self._table["text"]

    @cached_property
    def titles(self) -> Sequence[str]:
        return self._table["title"]

    def column(self, name: str) -> Sequence[str]:
        """One field of every document. Raises ValueError, naming the others, where the catalogue has no such field."""
        if name not in self.fields:
            raise ValueError(f"the catalogue has no field {name!r}: choose from {', '.join(self.fields)}")
        values: Sequence[str] = self._table[name]
        return values

    @property
    def fields(self) -> list[str]:
        """All column names."""
        return list(self._table.column_names)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {identifier: row for row, identifier in enumerate(self.ids)}

    def __contains__(self, identifier: object) -> bool:
        """Whether a document has this id."""
        return identifier in self._row_of

    def row(self, identifier: str) -> int:
        """The row of one id. Raises CatalogError (a KeyError) where the catalogue lacks it."""
        return int(self.rows([identifier])[0])

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """(len(ids),) int32 rows, in the order of ``ids``.

        Raises CatalogError (a KeyError and a ValueError) that counts the unknown ids and names the first three.
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
    """Unpickle: the catalogue that was pickled, or RetrieverError where the folder holds another by now."""
    catalog = Catalog.load(folder)
    if catalog.fingerprint != fingerprint:
        raise RetrieverError(f"catalogue {folder} was replaced while it was in use: start the run again")
    return catalog
