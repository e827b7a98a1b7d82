"""Folders that hold an index: they are written atomically, and index.json says what is in them."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from retrievers.types import RetrieverError

HOW_TO_REBUILD = "delete the folder, `rec-r1 index RECIPE` builds it again"
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What libraries say that write by themselves: safetensors and pyarrow, torch.save, numpy, SQLite.
_DISK_FULL_MESSAGE = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|os error (27|28|122)\b"
    r"|PytorchStreamWriter failed|unexpected pos|\d+ requested and \d+ written|database or disk is full"
)
_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{32}")
LEFTOVER_AFTER_S = (
    24 * 3600
)  # seconds after which a temporary folder without a lock, as older versions made them, is a leftover


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of a full or read-only disk in this block are OSErrors that name ``path``, or what they already name: the
    system names nothing where a write fails, and libraries raise errors of their own."""
    try:
        yield
    except OSError as error:
        if error.filename is None and (
            error.errno in NO_SPACE | {errno.EROFS, errno.EIO} or _DISK_FULL_MESSAGE.search(str(error))
        ):
            number = error.errno or errno.ENOSPC
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    except Exception as error:
        if not _DISK_FULL_MESSAGE.search(str(error)):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes ``folder`` when the block ends well, and vanishes otherwise.

    So an interrupted build never leaves something that opens. What a killed one left is removed here: its temporary
    folder has a lock beside it that nobody holds any more. An empty folder counts as none. When two processes build
    the same folder at once, the first one wins; they are named by content, so both would have written the same.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    # Not mkdtemp: its folders are closed to everybody else, and a node's users share one cache.
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    with naming(folder), _held(_lock_of(temporary)):  # before the folder: one without a held lock is a leftover
        temporary.mkdir()
        try:
            yield temporary
            try:
                temporary.replace(folder)  # onto nothing, or onto an empty folder
            except OSError:
                if not is_filled(folder):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock file while the block runs; it is removed then. A file system without locks goes without."""
    from filelock import FileLock

    lock = FileLock(path)
    with suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _lock_of(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.lock")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of builds that were killed, beside ``folder``. Those that are being written stay:
    their process holds their lock, which the system frees when it dies."""
    from filelock import FileLock, Timeout

    for lock in folder.parent.glob(".*.lock"):
        temporary = lock.with_suffix("")
        if not _TEMPORARY_NAME.fullmatch(temporary.name):
            continue
        try:
            with FileLock(lock, timeout=0):
                shutil.rmtree(temporary, ignore_errors=True)
                lock.unlink(missing_ok=True)
        except (Timeout, OSError, NotImplementedError):  # held, another user's, or no locks here
            continue
    for temporary in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        if _TEMPORARY_NAME.fullmatch(temporary.name) and not _lock_of(temporary).exists():
            with suppress(OSError):  # its build may end at this moment
                if time.time() - temporary.stat().st_mtime > LEFTOVER_AFTER_S:
                    shutil.rmtree(temporary, ignore_errors=True)


def is_filled(folder: str | Path) -> bool:
    """Whether something other than an empty folder is there, so that nothing may be built in its place."""
    folder = Path(folder)
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def fingerprint_of(meta: Mapping[str, Any]) -> str:
    """sha256 of what describes an index, whatever the order of its keys; hex."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """index.json of a folder that is being built."""
    (folder / "index.json").write_text(json.dumps(meta, indent=1))


def read_meta(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """index.json, once it has every key of ``expected`` and those values (None = any value).

    Raises RetrieverError, naming the folder and what differs, where it is missing, broken or another index's.
    """
    try:
        meta = json.loads((folder / "index.json").read_text())
        if not isinstance(meta, dict):
            raise ValueError("index.json holds no object")
        missing = [key for key in expected if key not in meta]
        if missing:
            raise ValueError(f"index.json lacks {missing[0]!r}")
    except FileNotFoundError as error:  # perhaps a folder of the user's own: nothing to delete
        raise RetrieverError(
            f"index {folder} does not open: no index.json is in it: set retriever.index to another folder, or delete "
            "the folder if nothing but an index was in it"
        ) from error
    except (OSError, ValueError) as error:
        raise RetrieverError(
            f"index {folder} does not open ({type(error).__name__}: {error}): {HOW_TO_REBUILD}"
        ) from error
    for key, value in expected.items():
        if value is not None and meta[key] != value:
            raise RetrieverError(
                f"index {folder} was built with another {key} ({meta[key]!r}, now {value!r}): "
                "delete the folder or set retriever.index to another one"
            )
    return meta


def damaged(folder: Path | None, error: Exception) -> RetrieverError:
    """The RetrieverError for an index whose index.json is as expected and whose other files are damaged."""
    return RetrieverError(f"index {folder} is damaged ({type(error).__name__}: {error}): {HOW_TO_REBUILD}")
