"""Folders that hold an index: written at one stroke, described by index.json, refused when foreign or broken."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retrievers.types import RetrieverError

AGAIN = "delete the folder, `rec-r1 index RECIPE` builds it again"


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes ``folder`` when the block ends well, and vanishes otherwise.

    So an interrupted build never leaves something that opens. An empty folder counts as none. When two
    processes build the same folder at once, the first one wins; they are named by content, so both would have
    written the same.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not mkdtemp: its folders are closed to everybody else, and a node's users share one cache.
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
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
        raise RetrieverError(f"index {folder} does not open ({type(error).__name__}: {error}): {AGAIN}") from error
    for key, value in expected.items():
        if value is not None and meta[key] != value:
            raise RetrieverError(
                f"index {folder} was built with another {key} ({meta[key]!r}, now {value!r}): "
                "delete the folder or set retriever.index to another one"
            )
    return meta


def damaged(folder: Path | None, error: Exception) -> RetrieverError:
    """The error for an index whose description is right and whose files are not."""
    return RetrieverError(f"index {folder} is damaged ({type(error).__name__}: {error}): {AGAIN}")
