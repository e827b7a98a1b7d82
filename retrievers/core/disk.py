"""diskcache without pickles: entries that are stored as pickles count as missing.

diskcache stores numbers, text and bytes directly and pickles everything else. Unpickling can run arbitrary code, and
other users may be able to write to the folder of a cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_disk(folder: str | Path, **settings: Any) -> Any:
    """A `diskcache.Cache` of bytes, text and numbers, under keys of these. Storing anything else raises TypeError.
    Raises OSError or sqlite3.Error where the folder cannot be used."""
    import diskcache
    from diskcache.core import MODE_PICKLE

    class PlainDisk(diskcache.Disk):  # type: ignore[misc]
        """The library's own hook; see the module."""

        def put(self, key: Any) -> Any:
            _refuse(key)
            return super().put(key)

        def get(self, key: Any, raw: bool) -> Any:
            return super().get(key, True)

        def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> Any:
            _refuse(value)
            return super().store(value, read, key)

        def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
            if mode == MODE_PICKLE or not (filename is None or self._inside(filename)):
                raise OSError("this row is not read")  # diskcache takes it for a miss
            try:
                return super().fetch(mode, filename, value, read)
            except UnicodeDecodeError as error:
                raise OSError("this row is damaged") from error

        def remove(self, file_path: str) -> None:
            if self._inside(file_path):
                super().remove(file_path)

        def _inside(self, name: str) -> bool:
            return Path(self._directory).resolve() in (Path(self._directory) / name).resolve().parents

    return diskcache.Cache(str(folder), disk=PlainDisk, **settings)


def _refuse(value: Any) -> None:
    if type(value) not in (bytes, str, int, float) or (type(value) is int and not -(2**63) <= value < 2**63):
        raise TypeError(f"{type(value).__name__}: a cache on disk keeps bytes, text and numbers")
