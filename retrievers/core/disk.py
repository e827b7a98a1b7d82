"""A disk cache that never reads pickles. An entry that is stored as a pickle counts as missing.

diskcache stores numbers, texts and bytes directly, and pickles everything else. Unpickling can run arbitrary code, and
other users may be able to write to the folder of a cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_disk(folder: str | Path, **settings: Any) -> Any:
    """Open a `diskcache.Cache` whose keys and values are bytes, texts and numbers.

    folder: the folder of the cache. It is created where it is missing.
    settings: settings of `diskcache.Cache`, such as size_limit in bytes.

    The cache raises TypeError for any other key or value. Raises OSError or sqlite3.Error where the folder cannot be
    used.
    """
    import diskcache
    from diskcache.core import MODE_PICKLE

    class PlainDisk(diskcache.Disk):  # type: ignore[misc]
        """diskcache's hook for serialisation. This one neither writes nor reads pickles."""

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
                # diskcache treats an OSError as a missing entry.
                raise OSError("this entry is a pickle, or its file is outside the folder")
            try:
                return super().fetch(mode, filename, value, read)
            except UnicodeDecodeError as error:
                raise OSError("this entry is damaged") from error

        def remove(self, file_path: str) -> None:
            if self._inside(file_path):
                super().remove(file_path)

        def _inside(self, name: str) -> bool:
            return Path(self._directory).resolve() in (Path(self._directory) / name).resolve().parents

    return diskcache.Cache(str(folder), disk=PlainDisk, **settings)


def _refuse(value: Any) -> None:
    if type(value) not in (bytes, str, int, float) or (type(value) is int and not -(2**63) <= value < 2**63):
        raise TypeError(f"a disk cache stores bytes, texts and 64-bit numbers only, got {type(value).__name__}")
