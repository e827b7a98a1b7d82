"""The lock of a run's folder. A training holds it, so that no second one checks the folder or writes to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from rec_r1.config import UserError
from retrievers.core.index_folder import naming

logger = logging.getLogger(__name__)
NAME = "_training.lock"  # With grpo.push_to_hub the trainer uploads no file whose name begins with an underscore.
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}  # flock's errors on some file systems
_held: set[int] = set()  # The file descriptors of this process's locks.


def _close_inherited() -> None:
    """Close the locks of the parent in a forked process, which may live longer than its parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)  # A program that a process executes does not inherit them.


@contextlib.contextmanager
def held(folder: Path, training: str) -> Iterator[None]:
    """Hold the lock of a run's folder. The system releases it where this process dies.

    folder: the run's folder. It is made, and removed at the end where nothing was written into it.
    training: the training's name, which all its machines know. In a folder that machines share, the first one of them
        holds the lock for all.

    Raises UserError where another training holds the lock. A file system without locks is only warned of.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / NAME
    try:
        with naming(path):
            descriptor = _taken(path, training)
        try:
            yield
        finally:
            if descriptor in _held:
                path.unlink(missing_ok=True)  # Before it is released: afterwards it may be the lock of another one.
                _close(descriptor)
    finally:
        with contextlib.suppress(OSError):  # Something was written.
            for parent in made:
                parent.rmdir()


def _taken(path: Path, training: str) -> int | None:
    """Take a lock, and write into its file who holds it.

    Returns its file descriptor. None = another machine of this training holds it. Raises UserError as :func:`held`.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # Another training has just ended, and removed the folder.
            continue
        _held.add(descriptor)
        try:
            holder = _lock(descriptor, path)
            if holder is None and _is_at(path, descriptor):
                about = {"training": training, "process": os.getpid(), "host": socket.gethostname()}
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(about).encode())
                os.fsync(descriptor)  # Other machines can read it from now on.
                return descriptor
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)
        if holder is not None and holder.get("training") == training:
            return None
        if holder is not None:
            known = "process" in holder and "host" in holder
            who = f" (process {holder['process']} on {holder['host']})" if known else ""
            raise UserError(
                f"output_dir: {path.parent}: another training writes to this folder{who}: wait for it, or choose "
                "another folder with output_dir=FOLDER"
            )


def _lock(descriptor: int, path: Path) -> dict[str, object] | None:
    """Lock a file. Returns what is written about its holder where another process holds it, else None."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            found = json.loads(os.read(descriptor, 10_000))
        except ValueError:  # Its holder has not written it yet.
            return {}
        return found if isinstance(found, dict) else {}
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "output_dir: the file system of %s has no locks (%s): start no second training in this folder",
            path.parent, error.strerror,
        )  # fmt: skip
    return None


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still has this path: its former holder may have removed it before it was locked."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)
