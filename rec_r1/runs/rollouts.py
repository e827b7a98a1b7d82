"""The recorded rollouts of a run: one row per completion, in files that each process of the training writes alone.

A process appends its rows to `rollouts.jsonl`, or to `rollouts.rankN.jsonl` if it is the process N. A file that has
reached PART_BYTES becomes a closed part: it is moved to `rollouts.parts/00000.jsonl` (`rollouts.rankN.parts/…`) and
compressed to `rollouts.parts/00000.jsonl.gz`. The newest rows are therefore always plain text, and a run whose rollouts
are smaller than that has one plain file.

A process may be killed at any moment. A part is moved by one renaming, and its plain file is deleted when the
compressed one is complete and on disk. Where both exist, they hold the same rows, and the compressed one is read.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from rec_r1.config import UserError
from rec_r1.runs import jsonl
from rec_r1.runs.jsonl import Row

logger = logging.getLogger(__name__)

PART_BYTES = 8 * 2**20  # A file of at least so many bytes is closed and compressed before more rows are appended.
_PART = re.compile(r"(\d+)\.jsonl(\.gz)?")
_LEVEL = 6  # zlib's own default. Level 9 saves less than 1% more, and takes longer (tests/benchmarks/rollouts.py).
_BUFFER = 2**20  # bytes that are read or copied at once


def file_of(run: Path, process: int) -> Path:
    """The file to which a process of a training appends its rollouts.

    run: the run's folder.
    process: the number of the process, from 0.
    """
    return run / ("rollouts.jsonl" if process == 0 else f"rollouts.rank{process}.jsonl")


def files(run: Path) -> list[Path]:
    """The files of all processes in a run's folder, those that consist of closed parts alone included."""
    closed = [folder.with_name(f"{folder.stem}.jsonl") for folder in run.glob("rollouts*.parts")]
    return sorted({*run.glob("rollouts*.jsonl"), *filter(is_in_parts, closed)})


def is_in_parts(file: Path) -> bool:
    """Whether a file of rollouts has closed parts. ``file``: a result of :func:`file_of`."""
    return bool(_parts(file))


def append(file: Path, rows: Iterable[Row]) -> None:
    """Append rows to the file of a process. A file that is large enough is closed and compressed first."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if file.is_file() and file.stat().st_size >= PART_BYTES:
        folder = _folder(file)
        folder.mkdir(exist_ok=True)
        file.rename(folder / f"{max(_parts(file), default=-1) + 1:05d}.jsonl")
        _compress(folder)
    with file.open("a", encoding="utf-8") as opened:
        opened.write(text)


def rows(file: Path) -> Iterator[tuple[Row, str]]:
    """The rollouts of one process in the order in which they were written, each with its place.

        for row, place in rollouts.rows(rollouts.file_of(Path("runs/quickstart"), 0)):
            print(place, row["step"], row["completion"], row["reward"])

    They are read one by one, so memory does not grow with the file. The training may go on meanwhile. A line that a
    killed process has not completed is left out.

    file: a result of :func:`file_of` or :func:`files`.

    Raises UserError for damaged lines and files. Warns of parts that are missing, whose rollouts are left out.
    """
    for path, opened in _in_order(file):
        with _blaming(path):
            yield from jsonl.rows(opened, path, _fix(path), may_be_cut=path == file)


def digest(files: Sequence[Path]) -> str:
    """A hash of the rollouts of all processes. It does not depend on how they are divided into parts.

    files: a result of :func:`files`.

    Raises UserError for a damaged file.
    """
    found = hashlib.sha256()
    for file in files:
        own = hashlib.sha256()
        for path, opened in _in_order(file):
            with _blaming(path):
                while block := opened.read(_BUFFER):
                    own.update(block)
        found.update(own.digest())
    return found.hexdigest()


def remove_after(run: Path, step: int) -> None:
    """Remove the rollouts of all processes that were recorded after a step, and incomplete lines and files.

    run: the run's folder. No process may write to it meanwhile.
    step: the last step whose rollouts are kept. -1 removes all.
    """
    for file in files(run):
        for temporary in _folder(file).glob(".*"):
            temporary.unlink()
        _compress(_folder(file))
        # The newest rows come first. Where a part keeps a row, no older part has a row to remove.
        newest = [file] if file.is_file() else []
        for path in [*newest, *reversed(_parts(file).values())]:
            if _keep_until(path, step, is_part=path != file):
                break


def _folder(file: Path) -> Path:
    """The folder with the closed parts of a file."""
    return file.with_name(f"{file.name.removesuffix('.jsonl')}.parts")


def _parts(file: Path) -> dict[int, Path]:
    """The closed parts of a file in ascending order, number -> path."""
    found = {}
    # A plain part comes before the compressed one of the same number, which takes its place.
    for path in sorted(_folder(file).glob("*.jsonl*")):
        if match := _PART.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _in_order(file: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open the closed parts of a file one after the other, and then the file itself.

    A training may close and compress parts meanwhile. The parts are therefore listed again before each is opened, and
    after the file itself is opened, which may have been moved just before.
    """
    done = -1
    while True:
        number, path = next(((n, p) for n, p in _parts(file).items() if n > done), (None, file))
        try:
            opened = _open(path)
        except FileNotFoundError:
            if number is None and max(_parts(file), default=-1) <= done:
                return  # The newest part was closed, and nothing has been appended since.
            continue
        with opened:
            if number is None:
                if max(_parts(file), default=-1) > done:
                    continue
                yield path, opened
                return
            if number > done + 1:
                missing = f"{done + 1:05d}" if number == done + 2 else f"{done + 1:05d} to {number - 1:05d}"
                logger.warning("%s: part %s is missing, so its rollouts are left out", _folder(file), missing)
            yield path, opened
            done = number


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        unpacked = gzip.open(path)  # noqa: SIM115  Closing the buffer closes it.
        return io.BufferedReader(unpacked, _BUFFER)  # type: ignore[type-var]  # A GzipFile can be read like a raw file.
    return path.open("rb")


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged compressed file in this block into UserErrors."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}): {_fix(path)}") from error


def _fix(path: Path) -> str:
    """What the user can do about a damaged file."""
    return (
        "delete that line"
        if path.suffix == ".jsonl"
        else "restore the file from a copy, or delete it to leave its rollouts out"
    )


def _compress(folder: Path) -> None:
    """Compress the plain parts in a folder: the one that was just closed, and those that a killed process has left."""
    for plain in sorted(folder.glob("*.jsonl")):
        compressed = plain.with_name(f"{plain.name}.gz")
        if not compressed.is_file():
            with plain.open("rb") as source, _replacing(compressed) as target:
                while block := source.read(_BUFFER):
                    target.write(block)
        plain.unlink()


def _keep_until(path: Path, step: int, is_part: bool) -> bool:
    """Drop the rows after a step, and an incomplete last line. A part that keeps no row is deleted.

    Returns whether a row is left.
    """
    kept = 0
    with _blaming(path), _open(path) as source, _replacing(path) as target:
        for row, _ in jsonl.rows(source, path, _fix(path), may_be_cut=not is_part):
            if isinstance(of_row := row.get("step"), int) and of_row <= step:
                target.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                kept += 1
    if is_part and not kept:
        path.unlink()
    return kept > 0


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` when it is complete and on disk. Compressed for `.gz`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(path.stem, "wb", _LEVEL, raw) as packed:
                    yield packed  # type: ignore[misc]  # A GzipFile is a binary file.
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
