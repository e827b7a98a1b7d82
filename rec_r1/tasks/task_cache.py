"""Keep a task in the cache once its raw files were read: one folder with the catalogue, the splits and the counts.

The folder's files.json lists the lengths and CRC-32 of its files, so that a damaged copy is found, and made again from
the raw files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import logging.handlers
import queue
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rec_r1.config import TaskConfig, UserError, cache_folder
from rec_r1.tasks.integrity import sound
from rec_r1.tasks.types import Split, Task
from retrievers import Catalog, Interactions, Judgments
from retrievers.core.index_folder import new_folder

logger = logging.getLogger(__name__)
FORMAT_VERSION = 6  # Must be raised when the content of the folder changes, so that older copies are not read.
FILE_LIST = "files.json"
_COLUMNS = ("ids", "queries", "rows", "grades", "histories")


def prepared(config: TaskConfig, files: Sequence[Path], build: Callable[[], Task]) -> Task:
    """The task from the cache, or, if the cache does not have it, from the raw files.

    config: the recipe's section `task`.
    files: the raw files. The name of the cached folder depends on their sizes and dates, and on the settings.
    build: makes the task of the raw files.

    Raises UserError where the cache cannot be written, and what ``build`` raises.
    """
    folder = folder_of(config, files)
    problem = damage(folder) if folder.exists() else "missing"
    if problem is None:
        task = load(folder)
        for line in summary(folder)["said"]:  # The warnings of its first reading, such as what was left out.
            logger.warning("%s", line)
        return task
    if folder.exists():
        logger.warning("the prepared copy %s is damaged (%s) and is made again", folder, problem)
        shutil.rmtree(folder, ignore_errors=True)
    logger.info("reading %s into %s", ", ".join(path.name for path in files), folder)
    with _recorded_warnings() as warnings:
        task = sound(build())
    save(task, folder, files, warnings)
    if (problem := damage(folder)) is not None:
        raise UserError(f"the prepared copy {folder} cannot be written ({problem}): delete it, or set REC_R1_CACHE")
    return load(folder)


@contextlib.contextmanager
def _recorded_warnings() -> Iterator[list[str]]:
    """Record the warnings that the tasks log in the body. The list that it yields is complete after the body."""
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(records)
    handler.setLevel(logging.WARNING)
    warnings: list[str] = []
    source = logging.getLogger("rec_r1.tasks")
    source.addHandler(handler)
    try:
        yield warnings
    finally:
        source.removeHandler(handler)
        while not records.empty():
            warnings.append(records.get().getMessage())


def damage(folder: Path) -> str | None:
    """What is damaged in a prepared folder, by the lengths and checksums of its files. None = nothing."""
    try:
        listed = json.loads((folder / FILE_LIST).read_text(encoding="utf-8"))
        for name, expected in listed.items():
            found = _stamp(folder / name)
            if found != expected:
                return f"{name} was changed: {found} instead of {expected} (bytes, CRC-32)"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None if "task.json" in listed else f"{FILE_LIST} does not list task.json"


def _stamp(path: Path) -> list[int]:
    """[length in bytes, CRC-32] of a file."""
    length = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            length, crc = length + len(block), zlib.crc32(block, crc)
    return [length, crc]


def folder_of(config: TaskConfig, files: Sequence[Path]) -> Path:
    """The cached folder of a task. Its name is a hash of the settings, and of the files' paths, sizes and dates."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    shape = json.dumps([FORMAT_VERSION, config.name, config.splits, config.params, stats], sort_keys=True)
    return cache_folder() / "tasks" / f"{config.name}-{hashlib.sha256(shape.encode()).hexdigest()[:16]}"


def save(task: Task, folder: Path, files: Sequence[Path], warnings: Sequence[str]) -> None:
    """Write a task atomically.

    task: the task.
    folder: the folder to make.
    files: the raw files, whose checksums are stored.
    warnings: what was logged when the raw files were read.
    """
    meta = {
        "name": task.name,
        "documents": len(task.catalog),
        "set_apart": task.set_apart,
        "repeats": task.repeats,
        "said": list(warnings),
        "queries": {name: len(split) for name, split in task.splits.items()},
        "sources": {name: checksum(path) for name, path in _names(files).items()},
    }
    with new_folder(folder) as temporary:
        task.catalog.save(temporary / "catalog")
        for name, split in task.splits.items():
            columns: dict[str, Any] = {
                name: list(getattr(split, name)) for name in _COLUMNS if len(getattr(split, name))
            }
            columns |= {f"slice:{name}": list(labels) for name, labels in split.slices.items()}
            _table(columns).save_to_disk(str(temporary / name))
        if task.counts is not None:
            np.save(temporary / "counts.npy", task.counts)
        if task.interactions is not None:
            task.interactions.save(temporary)
        if task.judgments is not None:
            columns = {"queries": list(task.judgments.queries), "rows": list(task.judgments.rows)}
            _table(columns).save_to_disk(str(temporary / "judgments"))
        (temporary / "task.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        written = sorted(path for path in temporary.rglob("*") if path.is_file())
        stamps = {path.relative_to(temporary).as_posix(): _stamp(path) for path in written}
        (temporary / FILE_LIST).write_text(json.dumps(stamps, indent=1), encoding="utf-8")


def _table(columns: dict[str, Any]) -> Any:
    """A datasets.Dataset of these columns, which are all of one length."""
    import pyarrow
    from datasets import Dataset

    # Nobody asks for the fingerprint. Without one, Dataset pickles the whole table to hash it.
    return Dataset(pyarrow.table(columns), fingerprint="task")


def _names(files: Sequence[Path]) -> dict[str, Path]:
    """Each file by its name, or by folder and name where a name repeats (topics/train.tsv, qrels/train.tsv)."""
    times = Counter(path.name for path in files)
    return {path.name if times[path.name] == 1 else f"{path.parent.name}/{path.name}": path for path in files}


def load(folder: Path) -> Task:
    """Read the task that :func:`save` wrote. :func:`damage` must have found nothing."""
    from datasets import load_from_disk

    meta = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    splits: dict[str, Any] = {}
    for name in meta["queries"]:
        columns = load_from_disk(str(folder / name))[:]
        lists: dict[str, Any] = {
            name: [tuple(item) for item in columns[name]] if name in ("rows", "grades", "histories") else columns[name]
            for name in _COLUMNS
            if name in columns
        }
        slices = {name.removeprefix("slice:"): labels for name, labels in columns.items() if name.startswith("slice:")}
        splits[name] = Split(**lists, slices=slices)
    judgments = None
    if (folder / "judgments").is_dir():
        columns = load_from_disk(str(folder / "judgments"))[:]
        fit = columns["queries"], [tuple(rows) for rows in columns["rows"]]
        held_out = splits["validation"].queries, splits["validation"].rows
        judgments = Judgments(meta["documents"], *fit, *held_out)
    return Task(
        meta["name"],
        Catalog.load(folder / "catalog"),
        **splits,
        counts=np.load(counts) if (counts := folder / "counts.npy").is_file() else None,
        interactions=Interactions.load(folder) if (folder / "interactions.npz").is_file() else None,
        judgments=judgments,
        set_apart=meta["set_apart"],
        repeats=meta["repeats"],
        folder=folder,
    )


def summary(folder: Path) -> dict[str, Any]:
    """The content of task.json: the name, counts, checksums and warnings of a prepared task."""
    found: dict[str, Any] = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    return found


def description(task: Task) -> list[str]:
    """Lines that describe a task: its documents, the queries and labels of each split, checksums, and its folder."""
    lines = [f"{task.name}: {len(task.catalog):,} documents"]
    for name, split in task.splits.items():
        judged = sum(len(rows) for rows in split.rows)
        labels = "; ".join(
            f"{what}: " + ", ".join(f"{label} {values.count(label):,}" for label in sorted(set(values))[:12])
            for what, values in split.slices.items()
            if isinstance(values, list)
        )
        labels = f" ({labels})" if labels else ""
        lines.append(f"{name:<10} {len(split):,} queries, {judged:,} relevant documents{labels}")
    if task.folder is None:
        return [*lines, "nothing to prepare: this task comes with the toolkit"]
    lines += [f"sha256     {digest}  {name}" for name, digest in summary(task.folder)["sources"].items()]
    return [*lines, f"in {task.folder}"]


def checksum(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. A large file gets a progress bar."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=f"sha256 {path.name}", unit="B", unit_scale=True, disable=size < 1 << 26) as bar,
    ):
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
