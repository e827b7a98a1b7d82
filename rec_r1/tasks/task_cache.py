"""Raw files once read, kept as one Arrow folder in the cache: catalogue, parts, counts and the files' checksums.

files.json lists the folder's files with their lengths and CRC-32: a damaged copy is made again from the raw files.
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
from retrievers import Catalog, Interactions
from retrievers.core.index_folder import new_folder

logger = logging.getLogger(__name__)
FORMAT = 4
FILES = "files.json"
_COLUMNS = ("ids", "queries", "rows", "grades", "histories")


def prepared(config: TaskConfig, files: Sequence[Path], build: Callable[[], Task]) -> Task:
    """The task that ``build`` makes of ``files``; from the cache where it was made of just these before.

    The folder's name holds the settings and every file's size and date; its content, their sha256.
    """
    folder = folder_of(config, files)
    finding = damage(folder) if folder.exists() else "missing"
    if finding is None:
        task = load(folder)
        for line in summary(folder)["said"]:  # what was left out of it is said each time
            logger.warning("%s", line)
        return task
    if folder.exists():
        logger.warning("the prepared copy %s is damaged (%s) and is made again", folder, finding)
        shutil.rmtree(folder, ignore_errors=True)
    logger.info("reading %s into %s", ", ".join(path.name for path in files), folder)
    with _said() as said:
        task = sound(build())
    save(task, folder, files, said)
    if (finding := damage(folder)) is not None:
        raise UserError(f"the prepared copy {folder} cannot be written ({finding}): delete it, or set REC_R1_CACHE")
    return load(folder)


@contextlib.contextmanager
def _said() -> Iterator[list[str]]:
    """Yields the list of warnings that a task's reading logs."""
    heard: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(heard)
    handler.setLevel(logging.WARNING)
    said: list[str] = []
    source = logging.getLogger("rec_r1.tasks")
    source.addHandler(handler)
    try:
        yield said
    finally:
        source.removeHandler(handler)
        while not heard.empty():
            said.append(heard.get().getMessage())


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a prepared folder, by their lengths and checksums; None = nothing."""
    try:
        listed = json.loads((folder / FILES).read_text(encoding="utf-8"))
        for name, expected in listed.items():
            found = _stamp(folder / name)
            if found != expected:
                return f"{name} is not as it was written: {found} instead of {expected} (bytes, CRC-32)"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None if "task.json" in listed else f"{FILES} does not list task.json"


def _stamp(path: Path) -> list[int]:
    """[length in bytes, CRC-32]."""
    length = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            length, crc = length + len(block), zlib.crc32(block, crc)
    return [length, crc]


def folder_of(config: TaskConfig, files: Sequence[Path]) -> Path:
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    shape = json.dumps([FORMAT, config.name, config.splits, config.params, stats], sort_keys=True)
    return cache_folder() / "tasks" / f"{config.name}-{hashlib.sha256(shape.encode()).hexdigest()[:16]}"


def save(task: Task, folder: Path, files: Sequence[Path], said: Sequence[str]) -> None:
    """Write ``task``. said: the warnings of its reading."""
    from datasets import Dataset

    meta = {
        "name": task.name,
        "documents": len(task.catalog),
        "set_apart": task.set_apart,
        "repeats": task.repeats,
        "said": list(said),
        "queries": {part: len(split) for part, split in task.splits.items()},
        "sources": {name: checksum(path) for name, path in _names(files).items()},
    }
    with new_folder(folder) as temporary:
        task.catalog.save(temporary / "catalog")
        for part, split in task.splits.items():
            columns: dict[str, Any] = {
                name: list(getattr(split, name)) for name in _COLUMNS if len(getattr(split, name))
            }
            columns |= {f"slice:{name}": list(labels) for name, labels in split.slices.items()}
            Dataset.from_dict(columns).save_to_disk(str(temporary / part))
        if task.counts is not None:
            np.save(temporary / "counts.npy", task.counts)
        if task.interactions is not None:
            task.interactions.save(temporary)
        (temporary / "task.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        written = sorted(path for path in temporary.rglob("*") if path.is_file())
        stamps = {path.relative_to(temporary).as_posix(): _stamp(path) for path in written}
        (temporary / FILES).write_text(json.dumps(stamps, indent=1), encoding="utf-8")


def _names(files: Sequence[Path]) -> dict[str, Path]:
    """Each file by its name; with its folder where names repeat (topics/train.tsv, qrels/train.tsv)."""
    times = Counter(path.name for path in files)
    return {path.name if times[path.name] == 1 else f"{path.parent.name}/{path.name}": path for path in files}


def load(folder: Path) -> Task:
    """What :func:`save` wrote, its files as :func:`damage` has found them in order."""
    from datasets import load_from_disk

    meta = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    splits: dict[str, Any] = {}
    for part in meta["queries"]:
        table = load_from_disk(str(folder / part))
        columns = {name: table[name][:] for name in table.column_names}
        lists: dict[str, Any] = {
            name: [tuple(item) for item in columns[name]] if name in ("rows", "grades", "histories") else columns[name]
            for name in _COLUMNS
            if name in columns
        }
        slices = {name.removeprefix("slice:"): labels for name, labels in columns.items() if name.startswith("slice:")}
        splits[part] = Split(**lists, slices=slices)
    return Task(
        meta["name"],
        Catalog.load(folder / "catalog"),
        **splits,
        counts=np.load(counts) if (counts := folder / "counts.npy").is_file() else None,
        interactions=Interactions.load(folder) if (folder / "interactions.npz").is_file() else None,
        set_apart=meta["set_apart"],
        repeats=meta["repeats"],
        folder=folder,
    )


def summary(folder: Path) -> dict[str, Any]:
    """Name, counts and checksums of a prepared task."""
    found: dict[str, Any] = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    return found


def description(task: Task) -> list[str]:
    """What a task holds and where it lies, one fact a line: documents, queries and labels of each split, checksums of
    the files that it was read from."""
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
    """sha256 of a file, with a bar for large ones."""
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
