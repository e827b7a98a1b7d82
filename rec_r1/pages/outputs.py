"""Check which files a command may write: new files, and earlier outputs of the same kind."""

from __future__ import annotations

import re
from pathlib import Path

from rec_r1.config import UserError
from rec_r1.evaluation.records import check_writable

# The folders in which a run keeps its files.
_RUN_FOLDERS = re.compile(r"best|checkpoint-\d+|evaluation|baselines|warm_start|rollouts.*\.parts")


def check_file(output: Path, suffix: str, note: str = "", option: str = "--output") -> None:
    """Check that a picture or a page may be written, before any work is done.

    output: the file to write.
    suffix: the suffix that its name must have.
    note: a text that the message about the suffix ends with.
    option: the option that names the file, for messages.

    Raises UserError for another suffix, for a folder, a link or a special file such as a device, and for a file in a
    folder that is missing, cannot be written to, or is one of a run's own.
    """
    if output.is_dir():
        raise UserError(f"{option}: {output} is a folder: name a file in it, such as {output / f'report{suffix}'}")
    _refuse_special(output, option)
    if output.suffix.lower() != suffix:
        raise UserError(f"{option}: {output}: give a name that ends in {suffix}{note}")
    if not output.parent.is_dir():
        raise UserError(f"{option}: the folder {output.parent} does not exist: make it first")
    refuse_inside_a_run(output, option)
    check_writable(output.parent, option)


def check_page(output: Path, option: str = "--output") -> None:
    """:func:`check_file` for a page in HTML, and for its Markdown version beside it, which must replace no other file.

    Arguments and errors are those of :func:`check_file`.
    """
    check_file(output, ".html", "; the Markdown is written beside it", option)
    beside = output.with_suffix(".md")
    if beside.is_dir():
        raise UserError(f"{option}: {beside} is a folder, and the Markdown needs this name: choose another name")
    _refuse_special(beside, option)
    if beside.exists() and not output.exists():
        raise UserError(
            f"{option}: the Markdown would replace {beside}, which was not written beside a page: choose another name"
        )


def refuse_inside_a_run(output: Path, option: str) -> None:
    """Raise UserError where a file or folder is inside one of a run's own folders. Links in its path are resolved."""
    place = output.absolute().parent.resolve() / output.name
    for folder in (place, *place.parents):
        if _RUN_FOLDERS.fullmatch(folder.name) and (folder.parent / "config.yaml").is_file():
            raise UserError(f"{option}: {output} is in {folder}, which belongs to a run: choose another place")


def _refuse_special(path: Path, option: str) -> None:
    if path.is_symlink():
        raise UserError(f"{option}: {path} is a link: name the file itself")
    if path.exists() and not path.is_file():
        raise UserError(f"{option}: {path} is no regular file: name another file")
