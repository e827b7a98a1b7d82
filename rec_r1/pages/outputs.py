"""Which files a command may write: new ones, or earlier outputs of the same kind."""

from __future__ import annotations

import re
from pathlib import Path

from rec_r1.config import UserError
from rec_r1.evaluation.records import check_writable

_OF_A_RUN = re.compile(r"best|checkpoint-\d+|evaluation|baselines")  # folders that a run keeps for itself


def check_file(output: Path, suffix: str, note: str = "", option: str = "--output") -> None:
    """Raise UserError, before any work, where no picture or page may be written as ``output``: another suffix than
    ``suffix``, a folder, a link, a device or another special file, a folder that is missing, not writable, or a run's.
    note: what is said after the suffix.
    """
    if output.is_dir():
        raise UserError(f"{option}: {output} is a folder: name a file in it, such as {output / f'report{suffix}'}")
    _refuse_special(output, option)
    if output.suffix.lower() != suffix:
        raise UserError(f"{option}: {output}: give a name that ends in {suffix}{note}")
    if not output.parent.is_dir():
        raise UserError(f"{option}: folder {output.parent} does not exist: make it first")
    refuse_inside_a_run(output, option)
    check_writable(output.parent, option)


def check_page(output: Path, option: str = "--output") -> None:
    """:func:`check_file` for a page, whose Markdown is written beside it: not over another file of that name."""
    check_file(output, ".html", "; the Markdown lies beside it", option)
    beside = output.with_suffix(".md")
    if beside.is_dir():
        raise UserError(f"{option}: {beside} is a folder, and the Markdown goes there: choose another")
    _refuse_special(beside, option)
    if beside.exists() and not output.exists():
        raise UserError(
            f"{option}: the Markdown would replace {beside}, which was not written beside a page: choose another"
        )


def refuse_inside_a_run(output: Path, option: str) -> None:
    """Raise UserError where ``output`` lies in a folder that a run keeps for itself, by whatever path it is named."""
    place = output.absolute().parent.resolve() / output.name
    for folder in (place, *place.parents):
        if _OF_A_RUN.fullmatch(folder.name) and (folder.parent / "config.yaml").is_file():
            raise UserError(f"{option}: {output} lies in {folder}, which belongs to a run: choose another place")


def _refuse_special(path: Path, option: str) -> None:
    if path.is_symlink():
        raise UserError(f"{option}: {path} is a link: name a file itself")
    if path.exists() and not path.is_file():
        raise UserError(f"{option}: {path} is no regular file: name another")
