"""Folders that hold an index. They are written atomically, and their index.json describes the index."""

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

HOW_TO_REBUILD = "delete the folder, and build it again with `rec-r1 index RECIPE`"
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # The error numbers of a full disk, a full quota and a size limit.
# The messages of libraries that raise errors of their own: safetensors and pyarrow, torch.save, numpy, SQLite.
_DISK_FULL_MESSAGE = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|os error (27|28|122)\b"
    r"|PytorchStreamWriter failed|unexpected pos|\d+ requested and \d+ written|database or disk is full"
)
_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{32}")
# Older versions made temporary folders without a lock file. Such a folder is a leftover after so many seconds.
LEFTOVER_AFTER_S = 24 * 3600


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk in this block into OSErrors that name a file.

    path: the file or folder to name, unless the error already names one.

    The system's error does not name the file where a write fails, and libraries raise errors of other types.
    """
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
    """Yield a temporary folder beside ``folder``. It is renamed to ``folder`` where the block ends without an error,
    and removed otherwise.

    An interrupted build therefore never leaves an index that opens. This function also removes what killed builds have
    left: a temporary folder whose lock file no process holds. An empty ``folder`` is replaced. Where two processes
    build the same folder at the same time, the folder of the first one stays. Folders are named by their content, so
    both have built the same index.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    # mkdtemp is not used, because only the owner may read its folders, and the users of a machine share one cache.
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    # The lock is taken before the folder exists, because a folder without a held lock counts as a leftover.
    with naming(folder), _held(_lock_of(temporary)):
        temporary.mkdir()
        try:
            yield temporary
            try:
                temporary.replace(folder)  # This succeeds where ``folder`` is missing or empty.
            except OSError:
                if not is_filled(folder):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock on the file ``path`` while the block runs, and then remove the file.

    On a file system without locks the block runs without one.
    """
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
    """Remove the temporary folders beside ``folder`` that killed builds have left.

    Folders of running builds stay: each such build holds the lock of its folder, and the system releases the lock
    when the process ends.
    """
    from filelock import FileLock, Timeout

    for lock in folder.parent.glob(".*.lock"):
        temporary = lock.with_suffix("")
        if not _TEMPORARY_NAME.fullmatch(temporary.name):
            continue
        try:
            with FileLock(lock, timeout=0):
                shutil.rmtree(temporary, ignore_errors=True)
                lock.unlink(missing_ok=True)
        except (Timeout, OSError, NotImplementedError):
            continue  # The lock is held or belongs to another user, or the file system has no locks.
    for temporary in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        if _TEMPORARY_NAME.fullmatch(temporary.name) and not _lock_of(temporary).exists():
            with suppress(OSError):  # The build may end at this moment and rename its folder.
                if time.time() - temporary.stat().st_mtime > LEFTOVER_AFTER_S:
                    shutil.rmtree(temporary, ignore_errors=True)


def is_filled(folder: str | Path) -> bool:
    """Whether ``folder`` is a file or a folder that is not empty. A new index must not replace it."""
    folder = Path(folder)
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def link_or_copy(existing: Path, path: Path) -> None:
    """Make ``path`` a hard link to the file ``existing``, or a copy on a file system without hard links."""
    try:
        os.link(existing, path)
    except OSError:
        shutil.copyfile(existing, path)


def link_folder(existing: Path, path: Path) -> None:
    """Make ``path`` a folder with the files of the folder ``existing``, at any depth, by :func:`link_or_copy`."""
    for file in sorted(found for found in existing.rglob("*") if found.is_file()):
        place = path / file.relative_to(existing)
        place.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(file, place)


def fingerprint_of(meta: Mapping[str, Any]) -> str:
    """The sha256 of the description of an index, in hex. The order of the keys does not matter."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write index.json, the description of an index, into a folder that is being built."""
    (folder / "index.json").write_text(json.dumps(meta, indent=1))


def read_meta(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Read index.json, and check that it describes the expected index.

    expected: the keys that index.json must have, and their values. None = any value.

    Raises RetrieverError, naming the folder and what differs, where the file is missing or broken, or describes
    another index.
    """
    try:
        meta = json.loads((folder / "index.json").read_text())
        if not isinstance(meta, dict):
            raise ValueError("index.json holds no object")
        missing = [key for key in expected if key not in meta]
        if missing:
            raise ValueError(f"index.json lacks {missing[0]!r}")
    except FileNotFoundError as error:  # The folder may hold other files of the user, so deleting it is not advised.
        raise RetrieverError(
            f"index {folder} does not open, because it has no index.json: set retriever.index to another folder, or "
            "delete the folder if it held nothing but an index"
        ) from error
    except NotADirectoryError as error:
        raise RetrieverError(f"retriever.index: {folder} is a file, or below one: set it to a folder") from error
    except (OSError, ValueError) as error:
        raise RetrieverError(
            f"index {folder} does not open ({type(error).__name__}: {error}): {HOW_TO_REBUILD}"
        ) from error
    for key, value in expected.items():
        if value is not None and meta[key] != value:
            raise RetrieverError(
                f"index {folder} was built with another {key} ({meta[key]!r} instead of {value!r}): "
                "delete the folder, or set retriever.index to another one"
            )
    return meta


def damaged(folder: Path | None, error: Exception) -> RetrieverError:
    """The RetrieverError for an index whose index.json is as expected, but whose other files are damaged."""
    return RetrieverError(f"index {folder} is damaged ({type(error).__name__}: {error}): {HOW_TO_REBUILD}")
